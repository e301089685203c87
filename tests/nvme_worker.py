"""Runs on two ranks under a launcher: train with the optimizer's state in files. Not a test itself.

Arguments: FOLDER, then the flags of launch/train.py. The folder holds runs of one process, ``local`` and ``phases``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoint_parts import point_to  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.engine.deepspeed import nvme_files  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402

PHASES = ("--mask.schedule", "{train: head, until_step: 3}")
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "fresh": (None, ()),
    "from-local": ("local", ()),
    "from-files": ("fresh", ()),
    "phases-in-files": (None, PHASES),
    "pipelined": (None, ()),
    "weights-too": ("local", ()),
}
"""Name: whose checkpoint of step 2 is gone on with, none for a new run; and flags of its own."""


def ds_file(folder: Path, name: str) -> Path:
    """The shipped file; in two of the runs with another drive, read and written ahead, and with weights in files."""
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text(encoding="utf-8"))
    if name == "pipelined":
        zero = ds_config["zero_optimization"]
        zero["sub_group_size"] = 300_000
        own = {"nvme_path": str(folder / "drive"), "pipeline_read": True, "pipeline_write": True, "buffer_count": 8}
        zero["offload_optimizer"] |= own
    if name == "weights-too":
        section = {"device": "nvme", "nvme_path": "auto", "buffer_size": 1_000_000}
        ds_config["zero_optimization"] |= {"offload_param": section, "stage3_param_persistence_threshold": 0}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    return path


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    given, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    folder, world = Path(given), distributed.join_process_group(engine_needs_group=True)
    in_files: dict[str, int] = {}
    clear = nvme_files.remove_swap_folders

    def counted(ds_config: object, world: distributed.World) -> None:
        folders = nvme_files.swap_folders(ds_config)  # type: ignore[arg-type]
        in_files[name] = sum(p.stat().st_size for own in folders for p in own.rglob("*.swp") if "grad" not in p.name)
        clear(ds_config, world)  # type: ignore[arg-type]

    nvme_files.remove_swap_folders = counted
    codes = {}
    for name, (source, own) in RUNS.items():
        if source is not None and world.is_main:
            shutil.copytree(folder / source, folder / name)
            point_to(folder / name, 2)
        world.barrier()
        words = [*rest, *own, "--output.dir", str(folder / name), "--ds", str(ds_file(folder, name))]
        codes[name] = train_in_group(
            flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", words), world
        )
    if world.is_main:
        (folder / "result.json").write_text(json.dumps({"codes": codes, "in files": in_files}), encoding="utf-8")
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
