"""How gradients are computed on a CPU: measured once a machine, chosen once a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_parts import point_to
from helpers import metrics, tiny_flags, tiny_llama, train

from toolkit.models import attention_gradients, faster_way, float32_gradients
from toolkit.models.attention_gradients import blocks_are_faster
from toolkit.models.faster_way import is_faster_here, machine, speedup
from toolkit.models.float32_gradients import Float32Linear, float32_is_faster, has_float32_forward
from toolkit.models.padded_rows import PaddedLinear
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.training import gradient_choice
from toolkit.training.gradient_choice import choose_gradients

RECORD = "gradients.json"


@pytest.fixture(autouse=True)
def own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory without answers."""
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "answers"))
    faster_way._saved_or_measured.cache_clear()
    yield tmp_path / "answers"
    faster_way._saved_or_measured.cache_clear()


Measured = Callable[[float, float], Counter[str]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Sets the speed-ups that a measurement of layers and of attention finds; counts measurements."""

    def measure(layers: float, attention: float) -> Counter[str]:
        calls: Counter[str] = Counter()
        faster_way._saved_or_measured.cache_clear()

        def found(what: str, gain: float) -> float:
            calls[what] += 1
            return gain

        monkeypatch.setattr(float32_gradients, "_measure_speedup", lambda: found("layers", layers))
        monkeypatch.setattr(
            attention_gradients,
            "_measure_speedup",
            lambda tokens, in_float32: found(f"{'float32' if in_float32 else 'bfloat16'} {tokens}", attention),
        )
        return calls

    return measure


@pytest.mark.parametrize("gain", [1.5, 1.1])
def test_what_was_measured_is_kept_for_this_machine(own_answers: Path, measured: Measured, gain: float) -> None:
    calls = measured(gain, gain)
    for _ in range(2):
        assert float32_is_faster() is blocks_are_faster(500, False) is (gain > 1.2)
        faster_way._saved_or_measured.cache_clear()
    assert calls == {"layers": 1, "bfloat16 512": 1}
    path = own_answers / "float32-gradients.json"
    for unusable in ({"another machine": True}, dict.fromkeys(json.loads(path.read_text()), "yes"), []):
        path.write_text(json.dumps(unusable))
        measured(1.3, 1.0)
        assert float32_is_faster()
        others = unusable.keys() - {machine()} if isinstance(unusable, dict) else set()
        assert set(json.loads(path.read_text())) == {machine(), *others}


def test_attention_is_measured_at_the_power_of_two_next_to_the_rows(measured: Measured) -> None:
    calls = measured(1.0, 2.0)
    for tokens in (1, 60, 89, 92, 430, 600, 2000, 10**6):
        assert blocks_are_faster(tokens, False)
    assert blocks_are_faster(430, True)
    assert calls == {"bfloat16 64": 1, "bfloat16 128": 1, "bfloat16 512": 1, "bfloat16 2048": 1, "float32 512": 1}


def test_the_faster_way_is_told_by_the_thread_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(faster_way.time, "thread_time", lambda: clock[0])
    threads = []

    def takes(seconds: float) -> Callable[[], None]:
        def way() -> None:
            clock[0] += seconds
            threads.append(torch.get_num_threads())

        return way

    before = torch.get_num_threads()
    assert speedup(takes(3.0), takes(2.0)) == pytest.approx(1.5)
    assert set(threads) == {1}
    assert torch.get_num_threads() == before
    assert is_faster_here("x.json", "", lambda: 1.2)
    assert not is_faster_here("y.json", "", lambda: 1.19)


def test_runs_that_measure_at_the_same_time_keep_each_others_answers(own_answers: Path) -> None:
    path = own_answers / "x.json"

    def meanwhile(key: str) -> float:
        own_answers.mkdir(exist_ok=True)
        path.write_text(json.dumps({key: False}))
        return 2.0

    assert is_faster_here("x.json", "", meanwhile, "another machine")
    assert json.loads(path.read_text()) == {"another machine": False, machine(): True}
    assert not is_faster_here("x.json", ", longer rows", meanwhile, f"{machine()}, longer rows"), "the first one stays"


def test_both_ways_are_measured_as_a_run_computes_them() -> None:
    assert float32_gradients._measure_speedup() > 0
    state = torch.random.get_rng_state()
    assert attention_gradients._measure_speedup(64, False) > 0
    assert attention_gradients._measure_speedup(64, True) > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_forward_pass_follows_where_bfloat16_is_emulated(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes much more than gradients do: with instructions for bfloat16, outputs stay torch's bit for bit."""
    for number, (gain, forward) in enumerate(((1.1, False), (2.9, False), (3.1, True))):
        measured(gain, 1.0)
        monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / f"answers {number}"))
        run = tmp_path / str(number)
        run.mkdir()
        for resumes in (False, True):
            model = tiny_llama().bfloat16()
            choice = choose_gradients(model, 430, World(), run, resumes)
            assert choice is not None
            assert choice.forward_in_float32 is has_float32_forward(model) is forward
            assert choice.text.startswith("outputs and gradients of linear layers in float32") is forward
            measured(9.0 - gain, 1.0)  # a resumed run goes on with its own


def test_a_record_from_before_the_forward_pass_had_a_choice_goes_on_as_it_did(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"in_float32": True, "attention_in_blocks": False, "machine": "x"}))
    choice = choose_gradients(tiny_llama().bfloat16(), 430, World(), tmp_path, resumes=True)
    assert choice == gradient_choice.GradientChoice(True, False, "x", forward_in_float32=False)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2 avx2", ""), ("avx2 avx512f", " with AVX-512"), ("avx512f avx512_bf16", " with AVX-512 bf16"),
        ("avx512f avx512_bf16 amx_bf16", " with AMX"),
    ],
)  # fmt: skip
def test_processors_of_one_name_are_told_apart_by_what_they_have_for_bfloat16(
    monkeypatch: pytest.MonkeyPatch, flags: str, name: str
) -> None:
    text = f"model name\t: AMD EPYC\nflags\t\t: fpu {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert machine() == f"AMD EPYC{name}, torch {torch.__version__}"
    before = name if name == " with AMX" else ""
    assert machine(is_short=True) == f"AMD EPYC{before}, torch {torch.__version__}"


def test_a_run_from_before_instructions_were_named_is_on_this_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gradient_choice, "machine", lambda is_short=False: "a CPU" if is_short else "a CPU with AVX-512"
    )
    for named, is_other in (("a CPU", False), ("a CPU with AVX-512", False), ("a CPU with AMX", True)):
        caplog.clear()
        record = {"in_float32": True, "attention_in_blocks": False, "machine": named}
        (tmp_path / RECORD).write_text(json.dumps(record))
        choose_gradients(tiny_llama().bfloat16(), 430, World(), tmp_path, resumes=True)
        assert ("on another machine" in caplog.text) is is_other


def chosen(run: Path, resumes: bool = False) -> tuple[bool, bool]:
    """What a run chooses, as its layers and attention show it."""
    model = tiny_llama().bfloat16()
    choice = choose_gradients(model, 430, World(), run, resumes)
    assert choice is not None
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is (Float32Linear if choice.in_float32 else PaddedLinear)
    marks = [getattr(layer.self_attn, name) for name in ("_gradient_in_float32", "_gradient_in_blocks")]
    assert marks == [choice.in_float32, choice.attention_in_blocks]
    return choice.in_float32, choice.attention_in_blocks


@pytest.mark.parametrize("gains", [(2.0, 1.0), (1.0, 2.0), (2.0, 2.0), (1.0, 1.0)])
def test_a_run_keeps_what_it_began_with_on_any_machine(
    tmp_path: Path, measured: Measured, gains: tuple[float, float], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    wanted = (gains[0] > 1.2, gains[1] > 1.2)
    measured(*gains)
    assert chosen(tmp_path) == wanted
    assert "this CPU is faster at it" in caplog.text
    monkeypatch.setattr(gradient_choice, "machine", lambda is_short=False: "another processor")
    calls = measured(3 - gains[0], 3 - gains[1])
    caplog.clear()
    assert chosen(tmp_path, resumes=True) == wanted
    assert not calls
    assert f"as the run began on another machine ({machine()}; this is another processor)" in caplog.text


def test_a_run_from_before_there_was_a_record_goes_on_as_it_did(tmp_path: Path, measured: Measured) -> None:
    for layers in (2.0, 1.0):
        (tmp_path / "answers").mkdir(exist_ok=True)
        (tmp_path / "answers" / "float32-gradients.json").write_text(json.dumps({machine(): layers > 1.2}))
        measured(1.0, 2.0)
        assert chosen(tmp_path, resumes=True) == (layers > 1.2, False)
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"in_float32": true}', '{"in_float32": 1, "attention_in_blocks": true, "machine": "x"}']
)
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(CheckpointError, match=r"gradients\.json cannot be read .*; expected in_float32"):
        choose_gradients(tiny_llama().bfloat16(), 430, World(), tmp_path, resumes=True)


def test_where_there_is_no_choice_nothing_is_measured_or_written(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(2.0, 2.0)
    assert choose_gradients(tiny_llama(), 430, World(), tmp_path, resumes=False) is None
    monkeypatch.setattr(World, "device", torch.device("cuda"))
    assert choose_gradients(tiny_llama().bfloat16(), 430, World(), tmp_path, False) is None
    assert not calls
    assert not (tmp_path / RECORD).exists()


def test_all_ranks_take_what_rank_0_found(tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(1.0, 2.0)
    choice = choose_gradients(tiny_llama().bfloat16(), 430, World(), tmp_path, resumes=False)
    calls = measured(2.0, 1.0)
    other = World(rank=1, size=2)
    monkeypatch.setattr(World, "broadcast_object", lambda self, value: (choice, None))
    assert choose_gradients(tiny_llama().bfloat16(), 430, other, tmp_path, resumes=False) == choice
    assert not calls


def test_a_resumed_run_repeats_an_uninterrupted_one_though_the_machine_s_answer_changed(
    tmp_path: Path, tiny_model: Path, measured: Measured
) -> None:
    options = ("--train.epochs", 1, "--model.dtype", "bfloat16", "--output.save_every_steps", 2, "--output.keep", 9)
    flags = [*tiny_flags(tiny_model, tmp_path / "whole"), *map(str, options)]
    measured(1.0, 2.0)
    assert train(*flags) == 0
    losses = metrics(tmp_path / "whole")
    assert len(losses) > 4
    (tmp_path / "answers" / "attention-gradients.json").unlink()
    measured(1.0, 1.0)
    point_to(tmp_path / "whole", 8)
    assert train(*flags) == 0
    assert metrics(tmp_path / "whole") == losses
    assert train(*flags, "--output.dir", str(tmp_path / "other")) == 0
    assert metrics(tmp_path / "other") != losses
