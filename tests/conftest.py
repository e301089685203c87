"""Shared fixtures."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch.distributed as dist
from helpers import make_tiny_model

from toolkit.runtime.cache_root import cache_root

SLOW_FIXTURES = {"frostline", "store_worker"}
"""What takes long to set up: an installation in an environment of its own, writers that are killed at every call."""


def pytest_configure() -> None:
    """Take signals that were ignored when the tests began, as by nohup or in a shell's background: tests send them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts ranks or uses a slow fixture, and put first what takes long.

    A file's tests stay in one process: short files at the end keep all processes busy until then. Files with slow tests
    take longest, then those with many tests.
    """
    for item in items:
        starts_ranks = item.get_closest_marker("distributed") and not item.get_closest_marker("first_tier")
        if starts_ranks or SLOW_FIXTURES.intersection(item.fixturenames):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: 0 if item.path in slow_files else 1 / tests[item.path])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave what all tests' modules loaded, some half a million objects, out of the garbage collections to come.

    A run collects several times, as does DeepSpeed; each took a quarter of a second and more.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo it, so that nothing is taken for leaked at the end."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep a test that is neither slow nor of the first tier from starting ranks, whichever fixture would."""
    helpers.may_start_ranks = any(item.get_closest_marker(name) for name in ("slow", "first_tier"))


SUMMARY = "summary"


@pytest.fixture
def summarise(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Have lines printed after all tests, whichever process this one runs in."""
    return lambda text: record_property(SUMMARY, text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, text in report.user_properties:
                    if name == SUMMARY:
                        terminalreporter.write_line(f"{report.nodeid}\n{text}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of this session: no test meets another session's activations, or leaves any behind.

    The converted model is lent to it where there is one, because converting takes a while. TEST_FLOAT32_GRADIENTS, on
    or off, takes the place of measuring which gradients this processor is faster at.
    """
    root, model = tmp_path_factory.mktemp("cache"), "smollm2-135m-instruct-bf16"
    if (cache_root() / model).is_dir():
        (root / model).symlink_to((cache_root() / model).resolve(), target_is_directory=True)
    if forced := os.environ.get("TEST_FLOAT32_GRADIENTS"):
        from toolkit.models.faster_way import machine

        answers = {f"{machine()}{what}": forced == "on" for what in ("", ", forward")}
        for kind, power in product(("bfloat16", "float32"), range(6, 12)):
            answers[f"{machine()}, {kind} attention of {2**power} tokens"] = forced == "on"
        for name in ("float32-gradients.json", "attention-gradients.json"):
            (root / name).write_text(json.dumps(answers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_CACHE", str(root))
        yield root


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """This process does not wait until its files are on the disk, which no test can see from within it.

    A tiny run would wait 40 times. Tests of lost or killed writers start processes of their own, which do wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def own_ranks() -> Iterator[None]:
    """A test that joins a process group leaves neither it nor a rank behind for what later tests start."""
    was_joined = dist.is_initialized()
    yield
    is_left = dist.is_initialized() and not was_joined
    if is_left:
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    assert not is_left, "the test left a process group behind"


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """No handler or level is left from a command that ran in this process, where it wrote to its own test's stderr."""
    log = logging.getLogger("frostline")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.INFO)
    yield
    log.handlers = []


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: a Llama of 6 blocks with a tied head and random float32 weights."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the log says."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("frostline").addHandler(handler)
    yield lines
    logging.getLogger("frostline").removeHandler(handler)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU whose memory is the host's and whose streams are fake: ``fake_streams.FakeGpu``."""
    from fake_streams import install

    return install(monkeypatch)
