"""The benchmarks run, on a tiny model, and count what they say they count."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_script
from transformers import AutoModelForCausalLM

from benchmarks import depth, partial_finetuning, step_profile
from benchmarks.contenders import DoesNotFitError, Outcome, require_success
from benchmarks.plain_loop import plain_loop
from benchmarks.prepare import SAMPLE, prepare, write_random_model
from benchmarks.process import run_process
from benchmarks.record import SAME_LEARNING, Record, rms
from benchmarks.report import table
from benchmarks.seams import PHASES, Seams
from benchmarks.shapes import TINY, larger_than, write_model
from benchmarks.workload import Workload
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.batches import epoch_order
from toolkit.data.dataset import load_dataset
from toolkit.models.load import load_tokenizer


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workload:
    """Four rows, three epochs, a model of the tiny shape."""
    folder = tmp_path_factory.mktemp("workload")
    write_random_model(TINY, folder / "model", tiny_model)
    return prepare(folder, SAMPLE, 4, 3, folder / "model")


@pytest.fixture(scope="module")
def trainer(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return step_profile.set_up_run(workload, [], tmp_path_factory.mktemp("profile"))


def loaded(workload: Workload) -> Any:
    return AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.bfloat16)


def test_the_peers_get_the_toolkits_tokens_order_and_mask(workload: Workload, trainer: Any) -> None:
    examples = load_dataset(DataConfig(path=workload.data), load_tokenizer(ModelConfig(name_or_path=workload.model)), 0)
    assert workload.rows == [(list(example.token_ids), example.answer_start) for example in examples.train]
    assert workload.orders == [epoch_order(4, workload.seed, epoch).tolist() for epoch in range(3)]
    names = [name for name, _ in loaded(workload).named_parameters()]
    assert [name for name in names if workload.trains(name, TINY.blocks)] == sorted(
        trainer.state.mask.names, key=names.index
    )
    assert Workload.read(Path(workload.model).parent / "workload.json").sequence == workload.sequence


def test_the_plain_loop_trains_exactly_the_mask_and_records_every_step(workload: Workload, trainer: Any) -> None:
    model = loaded(workload)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    record = plain_loop(model, workload, fp32_masters=True)
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if name in trainer.state.mask.names} == moved != set()
    assert len(record.starts) == len(record.ends) == len(record.losses) == 12
    assert record.trainable == sum(torch.Size(tensor.shape).numel() for tensor in trainer.state.mask.trainable)


def test_hollow_blocks_take_no_room_and_pass_their_input_on(tmp_path: Path) -> None:
    write_model(TINY, tmp_path / "model", hollow=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    states = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[2], states[3])
    hollow = (tmp_path / "model" / "model-00000.safetensors").stat()
    assert hollow.st_size > 2 * TINY.hidden * TINY.feed_forward * 3
    assert hollow.st_blocks * 512 < hollow.st_size


def test_a_shape_larger_than_a_memory_is_just_that() -> None:
    memory = 50_000_000
    shape = larger_than(TINY, memory)
    step = larger_than(TINY, memory).bytes - shape.bytes
    assert step == 0
    assert 1.1 * memory <= shape.bytes < 1.11 * memory
    model = AutoModelForCausalLM.from_config(TINY.config())
    assert TINY.bytes == 2 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_every_contender_gets_a_row_and_the_losses_agree(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--shape", "tiny", "--tokenizer", tiny_model, "--rows", 2, "--epochs", 2, "--directory", tmp_path)
    names = ("--contenders", "cold", "masters", "trl")
    result = run_script("benchmarks/partial_finetuning.py", *flags, *names, "--threads", 1, "--trl-python", "false")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in result.stdout.splitlines() if "|" in line}
    assert rows["TRL SFTTrainer"][0].strip() == "not installed"
    masters, ours = rows["plain loop, fp32 masters"], rows["frostline, cold cache"]
    assert masters[1].strip() == "1.00"
    assert [float(cell) for cell in ours[-2:]] == pytest.approx([float(cell) for cell in masters[-2:]], abs=1e-2)
    assert "ok   all train the same number of parameters" in result.stdout
    assert not list(tmp_path.iterdir()), "models and runs are removed"
    assert str(tmp_path) not in result.stdout, "a saved table names no path of the machine"


def test_the_profile_accounts_for_the_whole_step_and_leaves_the_engine_as_it_was(trainer: Any) -> None:
    upcoming = step_profile.batches(trainer)
    seconds = step_profile.measure_phases(trainer, upcoming, 3)
    assert all(len(times) == 3 and min(times) > 0 for times in seconds.values())
    operations, kinds = step_profile.measure_operations(trainer, upcoming)
    assert {row[0] for row in operations} >= {"aten::mm"}
    assert all(kinds[kind] > 0 for kind in ("AdamW", "gradient norm and clip"))
    floors = step_profile.measure_floors(trainer, next(upcoming), trained=1000)
    text = step_profile.report(seconds, operations, kinds, floors)
    assert all(f"| {phase} " in text for phase in PHASES)
    assert not {"forward_loss", "backward", "update"} & set(vars(trainer.state.engine))


def test_the_counted_arithmetic_is_that_of_the_suffix(trainer: Any) -> None:
    micro = next(step_profile.batches(trainer))
    with step_profile.FlopCounterMode(display=False) as counter, Seams(trainer, counter) as seams:
        step_profile.train_step(micro, trainer.state.prefix, trainer.state.engine, trainer.context.world)
    tokens, supervised = micro[0].input_ids.numel(), len(micro[0].targets)
    matrices = sum(torch.Size(size).numel() for size in TINY.block().values() if len(size) == 2)
    forward = 2 * (4 * matrices * tokens + TINY.vocabulary * TINY.hidden * supervised)
    assert 2.8 * forward < seams.suffix_flops < 4.2 * forward  # 3x, attention, and what is recomputed
    assert seams.suffix_flops <= counter.get_total_flops()


def test_cold_runs_get_a_fresh_cache_and_warm_ones_the_last_cold_ones(
    workload: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caches: list[tuple[str, str]] = []

    def fake(given: Workload, scratch: Path, *flags: str) -> Outcome:
        named = dict(zip(flags[::2], flags[1::2], strict=True))
        caches.append((Path(named["--prefix.cache_dir"]).name, named.get("--prefix.precision", "model")))
        return outcome(1.0, 1.0, 1)

    keys = "--prefix.cache {auto} --prefix.cache_dir STR --prefix.precision {int8} "
    monkeypatch.setattr(partial_finetuning, "recipe_flags", lambda: keys)
    monkeypatch.setattr(partial_finetuning, "run_toolkit", fake)
    given = Namespace(shape=None, trl_python=None, llamafactory_python=None)
    field = partial_finetuning.Field(given, tmp_path, workload)
    for name in ("warm", "cold", "int8", "warm"):
        assert isinstance(field.run(name), Outcome)
    first, second, third, fourth, fifth = caches
    assert first == second, "a warm run without a cold one before it fills its cache first"
    assert fifth == third != first
    assert fourth[1] == "int8"
    assert fourth[0] not in (first[0], third[0])


def test_a_process_that_fails_is_told_from_one_that_does_not_fit(tmp_path: Path) -> None:
    watched = tmp_path / "lines"
    code = f"import sys; open({str(watched)!r}, 'w').write('one\\ntwo\\nhal'); print(sys.argv[1]); sys.exit(3)"
    fine = run_process([sys.executable, "-c", code, "-"], tmp_path / "log", [watched])
    assert fine.code == 3
    assert [line for _, line in fine.lines[watched]] == ["one", "two"]
    assert fine.peak_bytes > 0
    with pytest.raises(RuntimeError, match=r"exit code 3.*\n.*no such tensor"):
        require_success(run_process([sys.executable, "-c", code, "no such tensor"], tmp_path / "log"), tmp_path / "log")
    with pytest.raises(DoesNotFitError):
        require_success(
            run_process([sys.executable, "-c", code, "CUDA out of memory"], tmp_path / "log"), tmp_path / "log"
        )


def outcome(first: float, later: float, peak: int) -> Outcome:
    """A run of two steps an epoch and two epochs, one second between the epochs."""
    starts = [0.0, first, 2 * first + 1, 2 * first + later + 1]
    ends = [start + length for start, length in zip(starts, (first, first, later, later), strict=True)]
    return Outcome(Record(starts, ends, [4.0, 3.0, 2.0, 1.0], 7), -0.5, 99.0, peak, epochs=2)


def test_an_outcome_counts_the_filling_in_the_run_and_the_pause_in_no_epoch() -> None:
    run = outcome(2.0, 1.0, 1)
    assert (run.run, run.first_epoch, run.later_epoch, run.epoch(0)) == (7.5, 4.5, 2.0, 4.0)
    assert run.losses == [3.5, 1.5]


def test_a_loop_that_loses_its_updates_is_out_of_the_bound_of_same_learning() -> None:
    """Epoch means of the naive bfloat16 loop and of the one with masters, as both were measured."""
    masters, naive = [2.9248, 2.8809, 2.8474], [2.9325, 2.9285, 2.9285]
    assert rms(naive, masters) > 3 * SAME_LEARNING
    results: dict[str, list[Any]] = {}
    for name, losses in (("cold", naive), ("masters", masters)):
        results[name] = [Outcome(Record([0.0, 1, 2], [1.0, 2, 3], losses, 7), 0.0, 4.0, 1, epochs=3)]
    held = partial_finetuning.bounds(results, speed=False)
    assert (
        [text for text, holds in held.items() if not holds] == [text for text in held if "masters loop" in text] != []
    )


@pytest.mark.parametrize(
    ("on_gpu", "difference", "holds"), [(False, 1e-6, False), (True, 1e-6, True), (True, 0.1, False)]
)
def test_cold_and_warm_losses_are_compared_to_the_bit_on_cpus_alone(
    on_gpu: bool, difference: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    results: dict[str, list[Any]] = {}
    for name, losses in (("cold", [2.0, 1.0]), ("warm", [2.0, 1.0 + difference])):
        results[name] = [Outcome(Record([0.0, 1], [1.0, 2], losses, 7), 0.0, 4.0, 1, epochs=2)]
    found = partial_finetuning.bounds(results, speed=False)
    assert [held for text, held in found.items() if "cold and warm" in text] == [holds]


def test_depth_compares_later_epochs_and_holds_them_to_five_percent() -> None:
    gib = 2**30
    runs = {
        6: [(outcome(2.0, 1.0, gib), outcome(1.0, 1.0, gib))],
        12: [(outcome(4.0, 1.04, 2 * gib), outcome(1.04, 1.04, gib))],
        24: [(outcome(8.0, 1.2, 4 * gib), outcome(1.2, 1.2, gib))],
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in depth.result_table(runs).splitlines()]
    assert rows[3] == ["12", "4000", "2.00", "1040", "1.04", "1040", "1.04", "2.00", "2.00", "1.00", "1.00"]
    assert list(depth.bounds(runs).values()) == [True, False]


def test_depth_runs_each_depth_cold_and_warm_in_rotated_order(
    workload: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def fake(given: Workload, scratch: Path, *flags: str) -> Outcome:
        seen.append(f"{scratch.parent.name} {scratch.name}")
        return outcome(1.0, 1.0, 1)

    monkeypatch.setattr(depth, "run_toolkit", fake)
    runs = depth.measure({6: workload, 12: workload}, tmp_path, rounds=2)
    assert [word.split()[0] for word in seen[::2]] == ["6-0", "12-0", "12-1", "6-1"]
    assert [word.split()[1] for word in seen] == ["cold", "warm"] * 4
    assert [len(pairs) for pairs in runs.values()] == [2, 2]


def test_a_table_is_markdown_with_aligned_columns() -> None:
    assert table(["a", "b"], [["x", "10"]]).splitlines() == ["| a |  b |", "|---|---:|", "| x | 10 |"]


def test_saved_results_name_date_and_hardware() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert path.name.startswith(first[:10]), path
        assert " of " in first or "NVIDIA" in first, path


@pytest.mark.distributed
def test_of_two_ranks_one_tokenises_and_at_the_next_start_none() -> None:
    result = run_script("benchmarks/token_store.py", "--rows", 40, "--tokens", 60, "--ranks", 2, "--word-level")
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| 40 ")]
    assert [row[1:3] for row in rows] == [[name, rank] for name in ("first", "second") for rank in "01"]
    assert sorted(int(row[5]) for row in rows) == [0, 0, 0, 40]
    assert all(0 < int(row[6].removesuffix(" MiB")) < 2000 for row in rows)
