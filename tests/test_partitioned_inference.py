"""Answers of a model that ZeRO-3 divides among ranks: those of one process, whichever ranks have questions left."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_runs import save_of_zoo
from helpers import run_here, run_ranks, run_script, tiny_flags, train
from test_generation import flags, lines, questions  # noqa: F401 - a fixture
from transformers import GenerationMixin

from toolkit.engine.deepspeed.inference import read_inference_config
from toolkit.runtime.errors import ConfigError

LORA = '[{"lora": {"select": "last:2", "rank": 4, "dora": true, "base_precision": "int8"}}]'


def ds_file(path: Path, **zero: Any) -> Path:
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_answer_what_one_process_answers_and_hold_half_the_model_each(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Models of several types, and a bfloat16 run with adapters on quantised layers."""
    names = ("llama", "gpt2", "mixtral", "gemma3_text")
    sources = [save_of_zoo(name, tmp_path / name) for name in names]
    run = tmp_path / "run"
    own = tiny_flags(tiny_model, run, "--mask.train", LORA, "--train.max_steps", 2)
    own[own.index("--model.dtype") + 1] = "bfloat16"
    assert train(*own) == 0
    (tmp_path / "sources.json").write_text(json.dumps([*map(str, sources), str(run)]))
    done = run_ranks("tests/partitioned_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in (*names, "run"):
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for rank in ranks:
            assert rank["together"] == rank["alone"] == ranks[0]["alone"], name
            assert len(rank["alone"]) == 5
            assert rank["gathered"] == 0
        assert sum(rank["held"] for rank in ranks) == pytest.approx(ranks[0]["elements"], rel=1e-2)
        assert ranks[0]["held"] == ranks[1]["held"]
        assert ranks[0]["dtypes"] == ["torch.bfloat16" if name == "run" else "torch.float32"]


@pytest.mark.distributed
def test_the_command_divides_model_and_questions(tiny_model: Path, questions: Path) -> None:  # noqa: F811
    alone = run_here("generate.py", *flags(tiny_model, questions))
    assert alone.returncode == 0, alone.stderr
    output = questions.with_name("answers.jsonl")
    expected = output.read_bytes()
    more = ("--overwrite", "--ds", "ds_configs/zero3.json")
    done = run_script(
        "launch/generate.py", *flags(tiny_model, questions, *more), launcher=("deepspeed", "--num_gpus", "2")
    )
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected


@pytest.mark.distributed
def test_one_rank_keeps_the_parameters_on_the_host_and_answers_on_after_an_interruption(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = ("why?", "/new", "how?")

    def talk(*flags: object) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
        done = run_here("generate.py", tiny_model, "--max-new-tokens", 4, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    expected = talk()
    generate, interrupted = GenerationMixin.generate, list[bool]()

    def once_interrupted(self: Any, *given: Any, **options: Any) -> Any:
        if interrupted:
            return generate(self, *given, **options)
        interrupted.append(True)
        block = self.get_decoder().layers[1].mlp

        def raises(*_: object) -> None:
            handle.remove()
            raise KeyboardInterrupt

        handle = block.register_forward_pre_hook(raises)
        with pytest.raises(KeyboardInterrupt):
            generate(self, *given, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationMixin, "generate", once_interrupted)
    monkeypatch.setattr("toolkit.commands.conversation._read_line", reading(["why?", "why?", "/new", "how?", None]))
    monkeypatch.setattr(sys, "stdin", Terminal())
    done = run_here("generate.py", tiny_model, "--max-new-tokens", 4, "--ds", "ds_configs/zero3_offload.json")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line] == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reading(words: list[str | None]) -> Any:
    waiting = iter(words)
    return lambda talks: next(waiting)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2}, "zero_optimization.stage is 2, which divides nothing that answers are computed with; write 3"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.device is 'nvme', which only training uses"),
        ({"stage": 3, "sub_group_size": "auto"}, 'zero_optimization.sub_group_size is "auto", but nothing fills it'),
        ({"stage": "three"}, "zero_optimization.stage is 'three'; expected 0, 1, 2 or 3"),
    ],
)
def test_files_that_divide_no_parameters_are_refused_before_a_model_loads(
    tmp_path: Path, zero: dict[str, Any], message: str
) -> None:
    done = run_here(
        "generate.py", tmp_path / "no-model", "--question", "why?", "--ds", ds_file(tmp_path / "ds", **zero)
    )
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_what_only_training_needs_is_left_out_of_a_file(tmp_path: Path) -> None:
    path = ds_file(tmp_path / "ds.json", stage=3, offload_optimizer={"device": "cpu"}, overlap_comm=True)
    assert read_inference_config(path)["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    with pytest.raises(ConfigError, match="no such file"):
        read_inference_config(tmp_path / "none.json")
