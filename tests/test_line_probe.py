"""plan.py --suggest probe: the readout's fit and score, one pass over the rows, and the line that is recommended."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
import zoo
from helpers import ENGLISH, REFERENCE_MASK, invocation, make_tokenizer, run_here, tiny_llama
from torch import nn

from benchmarks import probe as benchmark
from toolkit.config.schema import MaskConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.inference.open_model import load_base
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.planning import line_choice, line_probe, readout_fit
from toolkit.planning.line_choice import LineChoice
from toolkit.planning.line_probe import LineGain, ProbedStates, collect_states, probe_lines
from toolkit.runtime.errors import DataError, ModelError
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import split


def loaded(model: Any) -> Any:
    return SimpleNamespace(model=model.eval(), anatomy=detect_anatomy(model), tokenizer=make_tokenizer())


def examples(count: int = 12, vocabulary: int = 64) -> list[Example]:
    """Rows of random tokens, of which each has another length and number of supervised ones."""
    draw = random.Random(0)
    return [
        Example(tuple(draw.randrange(3, vocabulary) for _ in range(12 + 2 * row)), ((5 + row, 12 + 2 * row),))
        for row in range(count)
    ]


def collected(model: Any, rows: list[Example]) -> tuple[ProbedStates, Any]:
    anatomy = detect_anatomy(model)
    prefix, top = split(model.requires_grad_(False), anatomy, anatomy.block_count)
    states = collect_states(prefix, top, rows, 0, torch.device("cpu"))
    assert states is not None
    return states, top


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_each_block_runs_once_a_row_and_gives_what_enters_every_line(name: str) -> None:
    model, rows = zoo.make(name).eval(), examples(8)
    anatomy = detect_anatomy(model)
    prefix, top = split(model.requires_grad_(False), anatomy, anatomy.block_count)
    blocks, calls = list(prefix.model.get_submodule(anatomy.blocks).children()), Counter[int]()
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *given, number=number: calls.update([number]))
    states = collect_states(prefix, top, rows, 0, torch.device("cpu"))
    assert states is not None
    assert calls == {number: len(rows) for number in range(anatomy.block_count)}
    assert states.row.tolist() == [row for row, example in enumerate(rows) for _ in range(example.supervised_tokens)]
    for boundary in range(anatomy.block_count + 1):
        below = Prefix(model, anatomy, boundary)
        expected = []
        for example in rows:
            batch = collate([example], 0)
            expected.append(below(batch)[batch.supervised])
        assert torch.equal(states.hidden[boundary], torch.cat(expected))
    probe = probe_lines(loaded(model), rows)  # head and norm of every kind give the losses of the whole model
    whole = 0.0
    for example in rows:
        batch = collate([example], 0)
        logits = model(batch.input_ids).logits[batch.supervised]
        whole += float(nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
    assert probe.base_loss == pytest.approx(whole / len(states.row), rel=1e-4)
    assert [gain.boundary for gain in probe.gains] == list(range(anatomy.block_count))


def test_of_a_long_answer_positions_are_looked_at_that_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_probe, "POSITIONS", 4)
    model, rows = tiny_llama(), examples(8)
    states, _ = collected(model, rows)
    expected = []
    for example in rows:
        answer = example.token_ids[example.answer_start :]
        expected += [answer[number * len(answer) // 4] for number in range(4)]
    assert states.batch.targets.tolist() == expected


def reference_gain(model: Any, states: ProbedStates, boundary: int) -> tuple[float, float]:
    """The readout of one line by plain torch, with explicit features in the place of a kernel."""
    norm, head = model.model.norm, model.lm_head
    last, targets, row = states.hidden[-1].float(), states.batch.targets, states.row

    def losses(at: torch.Tensor) -> torch.Tensor:
        each = nn.functional.cross_entropy(head(norm(at)), targets, reduction="none")
        return torch.stack([each[row == number].sum() for number in range(int(row.max()) + 1)])

    leaf = last.clone().requires_grad_()
    losses(leaf).sum().backward()
    lines = range(boundary, len(states.hidden))
    scaled = [states.hidden[line].float() / states.hidden[line].float().norm(dim=-1, keepdim=True) for line in lines]
    features = torch.cat([*(part / len(lines) ** 0.5 for part in scaled), torch.ones(len(last), 1)], dim=1).double()
    row_fold, fold = torch.arange(int(row.max()) + 1) % readout_fit.FOLDS, row % readout_fit.FOLDS
    slope, tried = leaf.grad.double(), []
    for ridge in readout_fit.RIDGES:
        for damping in readout_fit.DAMPINGS:
            direction, along, bend = torch.zeros_like(slope), torch.zeros(4), torch.zeros(4)
            for number in range(4):
                own, x, y = fold == number, features[fold != number], -slope[fold != number]
                fisher = y.T @ y / len(y)
                fisher += damping * fisher.diagonal().mean() * torch.eye(len(fisher))
                # the kernel's diagonal: 1 for the constant, 1 for hidden states of length 1
                weights = torch.linalg.solve(x.T @ x + 2 * ridge * torch.eye(x.shape[1]), x.T @ y)
                direction[own] = features[own] @ weights @ torch.linalg.inv(fisher)
                along[number] = -(slope[own] * direction[own]).sum()
                bend[number] = (direction[own] @ fisher * direction[own]).sum()
            along, bend = (along.sum() - along).clamp(0), bend.sum() - bend
            tried.append((direction * (along / bend)[fold, None], along**2 / bend))
    best = torch.stack([decrease for _, decrease in tried]).argmax(0)
    direction = torch.stack([tried[int(best[fold[n]])][0][n] for n in range(len(fold))]).float()
    with torch.no_grad():
        base, trial = losses(last), losses(last + direction)
        slope = torch.stack([(leaf.grad * direction)[row == number].sum() for number in range(len(base))])
        step = torch.zeros(len(base))
        for number in range(4):
            others = row_fold != number
            bend, down = float((trial - base - slope)[others].sum()), float(-slope[others].sum())
            far = min(down / (2 * bend), readout_fit.FAR) if bend > 0 else readout_fit.FAR
            step[~others] = max(far, 0) if down > 0 else 0
        gains = base - losses(last + step[row, None] * direction)
    counts = torch.bincount(row)
    mean = gains.sum() / counts.sum()
    spread = (gains - mean * counts).square().sum() * len(gains) / (len(gains) - 1)
    return float(mean), float(spread.sqrt() / counts.sum())


def test_the_gains_are_those_of_a_ridge_regression_with_explicit_features() -> None:
    model, rows = tiny_llama(), examples()
    probe = probe_lines(loaded(model), rows)
    states, _ = collected(model, rows)
    for gain in probe.gains:
        mean, error = reference_gain(model, states, gain.boundary)
        assert gain.gain == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert gain.error == pytest.approx(error, rel=1e-3)


def test_a_row_is_scored_by_a_readout_that_was_not_fitted_to_it() -> None:
    torch.manual_seed(0)
    features, slope, fold = torch.randn(24, 5), torch.randn(24, 3), torch.arange(24) % readout_fit.FOLDS
    kernel, own = features @ features.T, fold == 1
    changed = slope.clone()
    changed[own] = torch.nan
    before = readout_fit.out_of_fold(kernel, slope, fold, 1.0)
    after = readout_fit.out_of_fold(kernel, changed, fold, 1.0)
    assert torch.equal(after[own], before[own])
    assert after[~own].isnan().all()
    changed[own] = 7 * slope[own]
    factors = [readout_fit.fisher_factors(one, fold, 0.1)[1] for one in (slope, changed)]
    assert torch.equal(*factors)
    base, along, trial = torch.ones(8), -torch.rand(8), torch.rand(8) + 1
    rows = torch.arange(8) % readout_fit.FOLDS
    steps = readout_fit.step_sizes(base, along, trial, rows)
    along[rows == 1] = trial[rows == 1] = torch.nan
    assert torch.equal(readout_fit.step_sizes(base, along, trial, rows)[rows == 1], steps[rows == 1])


def test_what_the_lower_states_know_is_seen_from_their_line_on() -> None:
    """The answer repeats the token under it, which the embeddings show and the random blocks hide."""
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape) / 4)
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(20)
    draw, rows = random.Random(0), []
    for _ in range(40):
        token = draw.randrange(3, 9)
        rows.append(Example((1, *[token] * 10), ((2, 11),)))
    gains = [gain.gain for gain in probe_lines(loaded(model), [*rows]).gains]
    assert gains[0] > gains[-1] > 0


def test_the_same_rows_give_the_same_numbers_and_the_weights_stay() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert probe_lines(loaded(model), examples()) == probe_lines(loaded(model), examples())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_too_few_rows_and_a_model_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(DataError, match="found 7 distinct training rows; expected at least 8"):
        probe_lines(loaded(tiny_llama()), examples(7))
    for name in ("hrm_text", "gemma3n_text"):
        with pytest.raises(ModelError, match="nothing to probe"):
            probe_lines(loaded(zoo.make(name)), examples(8))


def test_a_loss_that_is_not_finite_and_too_many_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        probe_lines(loaded(model), examples(8))
    monkeypatch.setattr(line_probe, "MOST_POSITIONS", 50)
    with pytest.raises(DataError, match=r"found \d+ positions in 8 rows; expected at most 50: name fewer"):
        probe_lines(loaded(tiny_llama()), examples(8))


def test_no_more_blocks_are_recommended_than_the_budget_has(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 blocks 0.6 are 3.6, of which a fourth would be two thirds; one block may always."""
    monkeypatch.setattr(line_choice, "plan_masks", lambda *given: [])
    monkeypatch.setattr(line_choice, "comparison_rows", lambda *given: [])
    monkeypatch.setattr(line_choice, "load_base", lambda *given: loaded(tiny_llama()))
    monkeypatch.setattr(line_choice, "sample_rows", lambda *given: examples(8))
    monkeypatch.setattr(line_choice, "probe_lines", lambda *given: line_probe.LineProbe(1.0, 8, 8, ()))
    given = invocation("--model.name_or_path", str(tiny_model))
    shares = (0.1, 0.5, 0.6, 1.0)
    most = [line_choice.choose_line(given, 1, None, share, 8, None).most_blocks for share in shares]
    assert most == [1, 3, 3, 6]


def test_a_faulty_sample_is_said_before_any_line_is_planned(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning all lines of 30 blocks takes half a minute."""
    monkeypatch.setattr(line_choice, "plan_masks", lambda *given: pytest.fail("planned"))
    write_rows(tmp_path / "few.jsonl", 3)
    for path, message in (
        (tmp_path / "few.jsonl", "found 3 distinct training rows"),
        (tmp_path / "none", "no such file"),
    ):
        given = ("--model.name_or_path", str(tiny_model), "--data.path", str(path), "--data.validation", "none")
        with pytest.raises(DataError, match=message):
            line_choice.choose_line(invocation(*given), 1, None, 1.0, 40, None)


def test_rows_that_repeat_do_not_make_the_sample_smaller(tiny_model: Path, tmp_path: Path) -> None:
    """Of 40 places spread over 211 rows, 38 held the one that is there 200 times."""
    write_rows(tmp_path / "rows.jsonl", 12, first=200)
    given = invocation("--model.name_or_path", str(tiny_model), "--data.path", str(tmp_path / "rows.jsonl"))
    found = line_choice.sample_rows(given, load_base(given.config.model), 40)
    assert len(found) == len({example.content for example in found}) == 12
    few = line_choice.sample_rows(given, load_base(given.config.model), 8)
    assert len({example.content for example in few}) == 8


def write_rows(path: Path, count: int, first: int = 1) -> None:
    """Write rows of which no two are the same, the first one so many times."""
    texts = ["word 0"] * first + [f"word {number}" for number in range(1, count)]
    lines = (json.dumps({"prompt": "Say it.", "completion": text}) for text in texts)
    path.write_text("\n".join(lines), encoding="utf-8")


def test_a_picture_without_a_suffix_replaces_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "gain.png").write_text("mine")
    flags = ("--model.name_or_path", tiny_model, "--data.path", ENGLISH, *REFERENCE_MASK)
    assert run_here("plan.py", *flags, "--png", tmp_path / "gain").returncode == 2
    assert (tmp_path / "gain.png").read_text() == "mine"


def choice(gains: list[float], error: float = 0.01, most: int = 6, fits: list[bool | None] | None = None) -> LineChoice:
    costs = [
        {"mask": "", "trained": 60 - b, "boundary": b, "blocks": 6, "memory": 600 - 50 * b, "fits": fit, "disk": 6 - b,
         "flops": 100 - 10 * b, "seconds": None}
        for b, fit in enumerate(fits or [None] * 6)
    ]  # fmt: skip
    return LineChoice(2.0, 8, 80, tuple(LineGain(b, gain, error) for b, gain in enumerate(gains)), tuple(costs), most)


def test_the_highest_line_is_recommended_that_reaches_nine_tenths_of_the_most() -> None:
    gains = [0.30, 0.31, 0.29, 0.20, 0.28, 0.10]
    found = choice(gains)
    assert (found.best, found.recommended) == (1, 4)
    assert "0.280 of 0.310 nats a token (line 1), at 0.67 of its operations and 0.73 of its memory" in found.reason()
    sections = yaml.safe_load(found.mask_block())
    assert sections["train"] == {"learning_rate": 5e-4}
    mask = build_mask(MaskConfig(**sections["mask"]), detect_anatomy(tiny_llama()))
    assert mask.boundary == 4
    assert choice(gains, most=1).recommended == 5
    assert choice(gains, fits=[False, False, False, True, False, True]).recommended == 3
    assert found.as_dict()["lines"][4]["gain"] == 0.28


def test_no_line_is_recommended_where_the_probe_sees_nothing_or_nothing_fits() -> None:
    nothing = choice([-0.1, 0.005, 0.0, 0.0, 0.0, 0.0])
    assert nothing.recommended is None
    assert "no line is recommended: at none does the readout" in nothing.table()
    assert "mask:" not in nothing.table()
    assert "none within the budget fits" in choice([0.3] * 6, fits=[False] * 6).reason()


def test_the_command_prints_every_line_with_its_cost_and_draws_them(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model.name_or_path", tiny_model, "--model.dtype", "float32", "--data.path", ENGLISH, *REFERENCE_MASK]
    flags += ["--data.validation", "none", "--suggest", "probe", "--rows", 12]
    result = run_here("plan.py", *flags, "--tflops", "1", "--png", tmp_path / "gain.svg")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["frost", "line", "expected", "gain", "trained", "memory", "disk", "flops", "seconds"]
    assert [line.split()[0] for line in lines[1:7]] == list("012345")
    assert sum(line.endswith("recommended") for line in lines[1:7]) == 1
    assert "it had lines in the wrong order (docs/plan.md)" in result.stdout
    assert "<svg" in (tmp_path / "gain.svg").read_text(encoding="utf-8")
    flags += ["--gpu-memory", "1MiB", "--json"]
    printed = json.loads(run_here("plan.py", *flags).stdout)
    given = [flag for flag in flags if flag not in ("--suggest", "probe", "--rows", 12)]
    compared = run_here("plan.py", *given, "--compare", "lora last:2")
    (planned,) = json.loads(compared.stdout)
    for key in ("trained", "memory", "flops", "disk"):
        assert printed["lines"][4][key] == planned[key]
    assert printed["recommended"] is None
    assert not any(line["fits"] for line in printed["lines"])
    with_cache = run_here("plan.py", *flags, "--prefix.cache", "on")  # line 0 has nothing to cache
    assert with_cache.returncode == 0, with_cache.stderr
    assert len(json.loads(with_cache.stdout)["lines"]) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suggest", "probe", "--budget", "2"], "--budget is 2.0"),
        (["--suggest", "gradient", "--png", "x.svg"], "leave out --json and --png"),
        (["--suggest", "probe", "--compare", "all"], "leave out --suggest"),
        (["--suggest", "probe", "--rows", "3"], "--rows is 3; expected at least 8"),
        (["--suggest", "probe", "--png", "gain"], "expected a file name that ends in .png, .svg, .pdf"),
        (["--suggest", "spectrum", "--gpu-memory", "24GiB"], "--suggest spectrum plans nothing"),
        (["--suggest", "gradient", "--world-size", "2"], "--suggest gradient plans nothing"),
        (["--suggest", "spectrum", "--rows", "3"], "--rows goes with --suggest gradient and"),
        (["--compare", "all", "--budget", "0.5"], "--budget goes with --suggest"),
    ],
)
def test_a_probe_that_cannot_be_made_says_why(given: list[str], message: str, tiny_model: Path) -> None:
    found = run_here("plan.py", "--model.name_or_path", tiny_model, "--data.path", ENGLISH, *given)
    assert found.returncode == 2
    assert message in found.stderr


def test_the_benchmark_compares_what_was_predicted_with_measured_losses(tmp_path: Path) -> None:
    found = choice([0.30, 0.31, 0.29, 0.20, 0.28, 0.10])
    prediction = {**found.as_dict(), "date": "2026-11-28", "others": {"spectrum": 1, "gradient": 5}}
    losses: benchmark.Losses = {None: 3.0, 5: 2.9, 4: 2.8, 2: 2.7, 0: 2.6}
    lines = benchmark.lines_chosen(prediction, losses)
    assert lines == {"probe": 4, "always last:4": 2, "spectrum": 1, "gradient": 5, "the same rule, measured": 0}
    rows = [row.split("|")[1:-1] for row in benchmark.regret_table(prediction, losses).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["probe", "4", "2.800", "0.200", "0.60", "0.67"],
        ["always last:4", "2", "2.700", "0.100", "0.80", "0.83"],
        ["spectrum", "1", "~2.650", "~0.050", "0.90", "0.92"],
        ["gradient", "5", "2.900", "0.300", "0.50", "0.58"],
        ["the same rule, measured", "0", "2.600", "0.000", "1.00", "1.00"],
    ]
    assert benchmark.gain_table(prediction, losses).endswith("right order: 6 of 6")
    within = [row.split("|")[1:-1] for row in benchmark.within_table(prediction, losses).splitlines()[2:]]
    assert [[cell.strip() for cell in row[1:]] for row in within] == [
        ["5", "0.000", "0.000"], ["4", "0.000", "0.000"], ["2", "0.000", "0.000"], ["0", "0.000", "0.100"],
    ]  # fmt: skip
    kept, measured = tmp_path / "kept.json", tmp_path / "measured.json"
    kept.write_text(json.dumps({"a": prediction}))
    measured.write_text(json.dumps([{"boundary": line, "loss": loss} for line, loss in losses.items()]))
    assert benchmark.main(["--predictions", str(kept), "--name", "a", "--measured", str(measured)]) == 0
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--predictions", str(kept), "--name", "a", "--data", "x.json"])


def test_losses_of_a_sweep_are_the_lowest_of_each_line_and_those_of_its_base(tmp_path: Path) -> None:
    def scored(loss: float) -> dict[str, object]:
        return {"validation": {"value": loss, "metric": "loss"}}

    trials = [{"boundary": line, **scored(loss)} for line, loss in ((4, 2.8), (4, 2.7), (0, 2.6))]
    swept = tmp_path / "sweep.json"
    swept.write_text(json.dumps({"base": {"rows": scored(3.0)}, "trials": [*trials, {"boundary": 2}]}))
    assert benchmark.measured_losses(swept, 6) == {None: 3.0, 4: 2.7, 0: 2.6}
    odd = [{"boundary": None, **scored(2.5)}, {"boundary": 3, "validation": {"value": None, "metric": "loss"}}]
    swept.write_text(json.dumps({"base": {"rows": scored(3.0)}, "trials": [*trials, *odd]}))
    assert benchmark.measured_losses(swept, 6) == {None: 3.0, 4: 2.7, 0: 2.6}
    swept.write_text(json.dumps({"base": {"rows": scored(3.0), "others": scored(3.1)}, "trials": trials}))
    with pytest.raises(ValueError, match="found 2 sets of held-out rows, scored by loss; expected one"):
        benchmark.measured_losses(swept, 6)


def test_losses_of_quality_are_those_of_its_adapters_by_line() -> None:
    losses = benchmark.measured_losses(benchmark.ROOT / "benchmarks" / "results" / "quality.json", 30)
    assert {line: round(loss, 3) for line, loss in losses.items()} == {
        None: 2.942, 22: 2.716, 0: 2.576, 26: 2.755, 14: 2.616
    }  # fmt: skip
