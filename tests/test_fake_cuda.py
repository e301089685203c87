"""Steps on a GPU, counted without one: kernels launched, waits of the host for the device, devices that mix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from covering import Pair, cover
from fake_cuda import fake_cuda, unavailable
from fake_steps import fake_run
from helpers import make_tokenizer, tiny_llama
from step_counts import large_step
from transformers import LlamaForCausalLM

from toolkit.training.validation import sample_answers, validate, without_dropout

MOST_KERNELS = {(1, 700, 60): 615, (1, 700, 699): 625, (8, 2048, 256): 640, (8, 2048, 2047): 795}
"""Of steps of EXAONE-2.4B's shape by rows, tokens and supervised tokens of a row: a twentieth more than counted."""
WITHOUT_TRITON = {(1, 700, 60): 735, (8, 2048, 256): 1_290}
LARGEST_UPDATE = {True: 41, False: 127}
"""Most kernels of the update, with Triton and without."""

OFFLOADING = ("weight_offload.py", "offload_unit.py")
"""Files whose copies are page-locked on a GPU (tests/test_block_stream.py), which here they are not."""
THE_STEPS_OWN = "tolist at distributed.py"
"""The one wait that a step is allowed: for its losses, the gradient norm and the sample of the update."""

OPTIONS: dict[str, dict[str, tuple[object, ...]]] = {
    "trains": {
        "tensors": ("--mask.train", '["last:2", "head"]'),
        "adapters": ("--mask.train", '[{"lora": {"select": ["last:2"], "rank": 4}}]'),
        "quantised adapters": (
            "--mask.train", '[{"lora": {"select": ["last:2"], "rank": 4, "base_precision": "nf4"}}]',
        ),
        "rows": ("--mask.train", '[{"rows": {"select": ["head"], "from": 5, "to": 90}}, "last:1"]'),
        "everything": ("--mask.train", '["all"]'),
    },
    "optimizer": {name: ("--optim.name", name) for name in ("adamw", "adamw_8bit")},
    "dtype": {name: ("--model.dtype", name) for name in ("bfloat16", "float32")},
    "precision": {name: ("--prefix.precision", name) for name in ("model", "int8", "nf4")},
    "placement": {name: ("--prefix.placement", name) for name in ("device", "cpu", "disk")},
    "batch": {
        "one row": ("--train.micro_batch_size", 1),
        "padded": ("--train.micro_batch_size", 2, "--data.packing", "off"),
        "packed": ("--train.micro_batch_size", 2, "--data.packing", "on"),
    },
    "accumulation": {str(steps): ("--train.gradient_accumulation_steps", steps) for steps in (1, 2)},
    "checkpointing": {mode: ("--train.gradient_checkpointing", mode) for mode in ("off", "on")},
}  # fmt: skip
"""Flags by option and value; every pair of values runs."""

FORBIDDEN: set[Pair] = {
    frozenset({("trains", "everything"), (option, value)})
    for option in ("precision", "placement")
    for value in OPTIONS[option]
    if value not in ("model", "device")
}
"""Where everything trains there is no frozen prefix."""

ROWS = cover({option: list(values) for option, values in OPTIONS.items()}, "one GPU", FORBIDDEN)


@pytest.fixture(autouse=True)
def needs_fake_cuda() -> None:
    if reason := unavailable():
        pytest.skip(reason)


@pytest.mark.parametrize("triton", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["Triton", "torch"])
def test_a_step_of_a_large_model_waits_once_and_launches_few_kernels(triton: bool) -> None:
    if triton:
        pytest.importorskip("triton")
    with large_step(triton) as (step, count):
        for shape, most in (MOST_KERNELS if triton else WITHOUT_TRITON).items():
            step(*shape)
            assert count.launched() <= most, (shape, count.launches.most_common(12))
            assert count.launched("update") <= LARGEST_UPDATE[triton]
            assert [what.rpartition(":")[0] for what in count.waits.elements()] == [THE_STEPS_OWN]
            assert not count.mixed


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model`` with three blocks, of which one is frozen: what all blocks do is counted in a few."""
    directory = tmp_path_factory.mktemp("shallow")
    config = tiny_llama().config
    config.num_hidden_layers = 3
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


QUICK = [row for row in ROWS if row["trains"] == "tensors"][:2]
"""What runs in the first tier."""


@pytest.mark.parametrize(
    "row",
    [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS],
    ids=lambda row: " ".join(row.values()),
)
def test_no_option_mixes_devices_or_adds_a_wait_to_a_step(
    row: dict[str, str], shallow_model: Path, tmp_path: Path
) -> None:
    flags = [flag for option, value in row.items() for flag in OPTIONS[option][value]]
    allowed = {THE_STEPS_OWN: 1}
    if row["optimizer"] == "adamw_8bit":
        allowed["the gradient's norm at low_bit_state.py"] = 100  # read once a step, and remembered
    with fake_run(shallow_model, tmp_path, *flags) as run:
        assert not run.count.mixed, "while it is set up"
        run.step()
        waits = Counter(what.rpartition(":")[0] for what in run.count.waits.elements())
        if row["placement"] != "device":
            waits = Counter({what: n for what, n in waits.items() if not what.endswith(OFFLOADING)})
        assert all(count <= allowed.get(what, 0) for what, count in waits.items()), waits
        assert not run.count.mixed


@pytest.mark.parametrize("packing", ["on", "off"])
def test_validation_and_sample_answers_do_not_mix_devices(shallow_model: Path, tmp_path: Path, packing: str) -> None:
    trains = OPTIONS["trains"]["tensors"]
    flags = (*trains, "--data.validation", 0.2, "--train.micro_batch_size", 2, "--data.packing", packing)
    with (
        fake_run(shallow_model, tmp_path, *flags, "--output.sample_answers", 1) as run,
        without_dropout(run.trainer.state),
    ):
        context, state = run.trainer.context, run.trainer.state
        validate(context, state, may_stop=False)
        assert len(sample_answers(context, state)) == 1
        assert not run.count.mixed


def test_mixed_devices_waits_and_copies_are_seen() -> None:
    with fake_cuda() as count:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="device"):
            there + here
        torch._foreach_copy_([there], [here])
        assert count.mixed
        count.clear()
        there.add_(1)
        assert count.launched() == 1
        assert not count.waits
        float(there.sum())
        there.tolist()
        there[there > 0]
        there.cpu()
        here.to("cuda")
        here.pin_memory().to("cuda", non_blocking=True)
        assert sum(count.waits.values()) == 5, count.waits
        assert sum(count.copies.values()) == 3


def test_what_a_gpu_replaced_is_put_back() -> None:
    with fake_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2]
