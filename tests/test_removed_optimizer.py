"""``adamw_bf16`` of earlier versions: its finished runs are read as before, and nothing trains with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from checkpoint_parts import edit_state
from helpers import ENGLISH, metrics, run_here, tiny_flags, train

import toolkit
from toolkit.checkpoint.state import read_state
from toolkit.runtime.errors import CheckpointError, ConfigError

NAME = "adamw_bf16"


@pytest.fixture
def old(tiny_model: Path, tmp_path: Path) -> Path:
    """A finished run as that optimizer left it: float32 masters and moments in the checkpoint, its name in recipes."""
    run = tmp_path / "run"
    saving = ("--output.save_every_steps", 2, "--output.keep", 9)
    assert train(*tiny_flags(tiny_model, run, "--train.max_steps", 4, "--data.validation", 0.25, *saving)) == 0
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    recipe["optim"]["name"] = NAME
    (run / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        saved = read_state(checkpoint).recipe
        edit_state(checkpoint, recipe={**saved, "optim": {**saved["optim"], "name": NAME}})
    return run


def test_a_finished_run_evaluates_generates_exports_and_starts_another(old: Path, tmp_path: Path) -> None:
    loss = metrics(old, "eval_loss")[-1]
    assert toolkit.evaluate(old).loss == pytest.approx(loss, abs=1e-6)
    toolkit.export(old, tmp_path / "export")
    toolkit.export(old, tmp_path / "delta", delta=True)
    answers = [toolkit.generate(source, ["does heat help?"], max_new_tokens=4) for source in (old, tmp_path / "delta")]
    assert answers[0] == answers[1]
    losses = [toolkit.evaluate(source, ENGLISH).loss for source in (old, tmp_path / "export")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    base = yaml.safe_load((old / "config.yaml").read_text(encoding="utf-8"))["model"]["name_or_path"]
    for source in (old, tmp_path / "delta"):
        more = ("--train.max_steps", 2, "--model.delta", source)
        assert train(*tiny_flags(Path(base), tmp_path / source.name / "on", *more)) == 0


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_recipe_that_names_it_is_refused_with_the_remedy(tiny_model: Path, tmp_path: Path, verb: str) -> None:
    done = run_here(verb, *tiny_flags(tiny_model, tmp_path / "run", "--optim.name", NAME))
    assert done.returncode == 2
    assert "optim.name: adamw_bf16 was removed; write adamw_8bit, which takes as many bytes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_to_resume_says_what_to_write_and_goes_on_with_it(old: Path) -> None:
    (old / "checkpoints" / "latest").write_text("step-00000002")
    own = ["--config", str(old / "config.yaml"), "--output.dir", str(old)]
    with pytest.raises(ConfigError, match="An interrupted run goes on with it and --resume-override"):
        train(*own)
    with pytest.raises(CheckpointError, match=r"optim\.name was 'adamw_bf16', is now 'adamw_8bit'"):
        train(*own, "--optim.name", "adamw_8bit")
    assert train(*own, "--optim.name", "adamw_8bit", "--resume-override") == 0
    assert metrics(old, "step")[-1] == 4
