"""Runs on every rank under a launcher: take rows of the pairwise table through a run's whole life. Not a test itself.

Arguments: FOLDER, with a model, rows in files, and plan.json, which lists rows. Each row's outcome is a line of
outcomes.jsonl: its number, and what was wrong or none.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.update(TQDM_DISABLE="1", DS_LOG_LEVEL="error", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402
import yaml  # noqa: E402
from helpers import clean_environment, metrics  # noqa: E402
from pairwise_table import VALUES  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.inference.open_model import open_model  # noqa: E402
from toolkit.mask.apply import merge_adapters  # noqa: E402
from toolkit.runtime import distributed, signals  # noqa: E402
from toolkit.runtime.distributed import World  # noqa: E402
from toolkit.runtime.errors import UsageError  # noqa: E402
from toolkit.training.between_steps import BetweenSteps  # noqa: E402
from toolkit.training.phases import PhaseState  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402


class Killed(BaseException):
    """Ends a run where nothing of it can see it coming."""


class WrongError(Exception):
    """A row did not do what it should."""


def recipe(world: World, folder: Path, name: str, row: dict[str, str], resume: bool) -> Path:
    """The recipe file of a row, the same for every rank."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(folder / "model")}, "output": {"dir": str(folder / name)},
    }  # fmt: skip
    for key, values in VALUES.items():
        section, leaf = key.split(".")
        value = values[row[key]]
        if value == "DELTA":
            value = str(folder / f"delta-{row['model.dtype']}")
        elif value == "CACHE":
            value = str(folder / "cache")
        elif isinstance(value, str) and value.endswith((".jsonl", ".csv")):
            value = str(folder / value)
        elif key == "data.path":
            value = [{**entry, "path": str(folder / entry["path"])} for entry in value]
        sections.setdefault(section, {})[leaf] = value
    if row["data.folds"] != "none":
        sections["data"]["fold"] = 0
        sections["output"]["dir"] = str(directory(folder, name, row))
    if not resume:
        sections["output"]["resume"] = "auto"
    path = folder / f"{name}.yaml"
    if world.is_main:
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")  # the command validates it
    world.barrier()
    return path


def directory(folder: Path, name: str, row: dict[str, str]) -> Path:
    """The run directory of a row."""
    return folder / name / "fold-0" if row["data.folds"] != "none" else folder / name


def start(world: World, recipe_file: Path, ds: str, end: str = "nothing") -> int:
    """Train, and end it in the middle as ``end`` says."""
    given = ["--config", str(recipe_file), *(["--ds", str(ROOT / "ds_configs" / f"{ds}.json")] if ds != "none" else [])]
    after_step = BetweenSteps.after_step

    def ended(self: BetweenSteps, state: PhaseState, is_stopping: bool) -> bool:
        middle = self._progress.step == max(1, self._context.total_steps // 2)
        if middle and end == "a signal":
            if world.is_main:
                signals.request_stop("a test", broadcast=False)
            is_stopping = True  # as if it had come before the step ended
        stopping = after_step(self, state, is_stopping)
        if middle and end == "a kill":
            raise Killed
        return stopping

    BetweenSteps.after_step = ended  # type: ignore[method-assign]
    try:
        with signals.record_signals({}):
            return train_in_group(flags.parse(flags.create_parser(""), recipe_file, given), world)
    except Killed:
        return -9
    finally:
        BetweenSteps.after_step = after_step  # type: ignore[method-assign]
        gc.collect()


def command(script: str, *given: object) -> str:
    """What a launch script prints, run in this process, which for it is one by itself and no rank."""
    spec = importlib.util.spec_from_file_location(f"launch_{script}", ROOT / "launch" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = [f"launch/{script}.py", *map(str, given)]
    with (
        patch.object(sys, "argv", words), patch.dict(os.environ, clean_environment(), clear=True),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):  # fmt: skip
        code = module.main()
    require(code == 0, f"{script} ended with {code}")
    return out.getvalue()


def require(is_so: bool, otherwise: str) -> None:
    """Raise ``WrongError`` unless something is so."""
    if not is_so:
        raise WrongError(otherwise)


def use(folder: Path, run: Path, row: dict[str, str]) -> None:
    """Evaluate, generate, export, and reload in transformers, on one rank."""
    losses, steps = metrics(run), [step for step in metrics(run, "step") if isinstance(step, int)]
    require(sorted(set(steps)) == list(range(1, len(losses) + 1)), f"steps {steps}")
    validated = metrics(run, "eval_loss")
    if row["data.validation"] != "none":
        require(len(validated) >= 1, "nothing was validated")
        require((run / "checkpoints" / "best").is_file(), "no checkpoint is the best")
    held_out = () if validated else ("--data.path", folder / "rows.jsonl")
    trusted = ("--trust-remote-code",) if row["model.trust_remote_code"] == "true" else ()
    said = json.loads(command("evaluate", run, *held_out, *trusted).splitlines()[-1])
    exact = row["prefix.precision"] == "model"
    if validated:
        require(abs(said["loss"] - validated[-1]) < (0.05 if exact else 1.0), f"{said['loss']} for {validated[-1]}")
    if row["data.test"] != "none" or row["data.folds"] != "none":
        tested = json.loads(command("evaluate", run, "--part", "test", *trusted).splitlines()[-1])
        rows = 8 if row["data.path"] == "a mixture" else 6
        expected = {"none": rows // 2, "a share": round(0.2 * rows), "a file": 1}[row["data.test"]]  # none: a fold
        require(tested["rows"] == expected, f"{tested['rows']} test rows, expected {expected}")
    answer = command(
        "generate", run, "--question", "Is it safe?", "--context", "It is.", "--max-new-tokens", 3, *trusted
    )
    require(bool(answer), "no answer")
    target = run / "export"
    command("export", run, "--output", target, *trusted)
    opened = open_model(str(run), None, None, bool(trusted))
    assert opened.delta is not None
    ours = opened.loaded.model.eval()
    merge_adapters(ours, opened.delta.tensors)
    attention = ours.config._attn_implementation
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=ours.dtype, attn_implementation=attention).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        apart = float((ours(ids).logits.float() - theirs(ids).logits.float()).abs().max())
    require(apart < 1e-3, f"the export's logits are {apart:.3g} from the run's")


def live(world: World, folder: Path, name: str, row: dict[str, str]) -> str | None:
    """Take a row through a run's life; what went wrong, or none."""
    run = directory(folder, name, row)
    try:
        code = start(world, recipe(world, folder, name, row, resume=False), row["ds"], row["ended by"])
        expected = {"a signal": (75, 0), "a kill": (-9,), "nothing": (0,)}[row["ended by"]]
        require(code in expected, f"the first start ended with {code}")
        has = world.broadcast_object(any((run / "checkpoints").glob("step-*")) if world.is_main else None)
        code = start(world, recipe(world, folder, name, row, resume=bool(has)), row["ds"])
        require(code == 0, f"the second start ended with {code}")
        if world.is_main:
            use(folder, run, row)
    except UsageError as error:
        return f"refused: {error}"
    except Exception as error:
        return "".join(traceback.format_exception(error))[-3000:]
    return None


def main() -> None:
    """Live all rows, one after the other."""
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
    warnings.simplefilter("ignore")
    world = distributed.join_process_group()
    gc.freeze()  # each run collects garbage several times: not of what is loaded for all of them
    plan = json.loads((folder / "plan.json").read_text())
    for dtype in ("float32", "bfloat16"):
        base = {**plan["usual"], "model.dtype": dtype, "mask.train": "parts of blocks", "ds": "none"}
        assert start(world, recipe(world, folder, f"delta-{dtype}", base, resume=False), "none") == 0
    for number, row in sorted(plan["rows"], key=lambda numbered: numbered[1]["ds"] != "none"):
        distributed.join_process_group(engine_needs_group=row["ds"] != "none")
        wrong = live(world, folder, f"row-{number}", row)
        all_wrong = [one for one in world.all_gather_object(wrong) if one is not None]
        if world.is_main:
            with (folder / "outcomes.jsonl").open("a") as out:
                said = re.sub(r"\x1b\[[0-9;]*m", "", all_wrong[0]) if all_wrong else None
                out.write(json.dumps({"row": number, "wrong": said}) + "\n")
        world.barrier()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
