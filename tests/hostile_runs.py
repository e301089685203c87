"""Hostile run directories: links, foreign names and odd bytes; nothing outside may change, whatever a command does.

    python tests/hostile_runs.py                 # 200 of them, prints their number
    python tests/hostile_runs.py --runs 20 --first 1000

The tree around each run is compared before and after: every name, kind, mode, link target and byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import stat
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

ODD = (
    b"",
    b"\0" * 300,
    b"\xff\xfe{",
    b"caf\xe9\n",
    b"[" * 60_000,
    b'{"step": 1e999}\n',
    b"null\n",
    b"{}",
    b"- a\n",
    b"\n\n",
)
NAMES = (
    ".lock", "config.yaml", "mask.json", "plan.json", "metrics.jsonl", "data_files.json", "record.json",
    "skipped_rows.jsonl", "rendering.json", "gradients.json", "trackers.json", "schedule.json", "tokenizer", "slurm",
    "tensorboard", "out_of_fold.jsonl", "checkpoints/latest", "checkpoints/best", "checkpoints/step-00000001",
    "checkpoints/step-00000003", "checkpoints/.step-00000003.staging", "checkpoints/.step-00000003.replaced",
    "checkpoints/.step-00000001.removed", "checkpoints/step-00000001/state.json", "checkpoints/step-00000001/optimizer",
    "checkpoints/step-00000002/evaluation.json", "checkpoints/.step-00000003.evaluation.json", "checkpoints",
)  # fmt: skip
FOREIGN = ("step-00000002-copy", ".gitignore", "step-2", ".step-1.staging", "notes", "step-٠٠٠٠٠٠٠١", ".mine.staging")


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every name below a folder with its kind, mode, link target and content; links are not followed."""
    found: dict[str, tuple[object, ...]] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            mode = path.lstat().st_mode
            target = str(path.readlink()) if stat.S_ISLNK(mode) else None
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else None
            found[str(path.relative_to(folder))] = (mode, target, digest)
    return found


def make_hostile(run: Path, outside: Path, seed: int) -> list[str]:
    """Spoil a run directory in one to three places; what was done, in words."""
    dice = random.Random(seed)
    done = []
    targets = [outside, *sorted(outside.rglob("*"))]
    for _ in range(dice.randint(1, 3)):
        kind = dice.choice(("link", "link", "odd bytes", "foreign", "hard link"))
        name = dice.choice(NAMES)
        path = run / name
        if kind == "foreign":
            name = dice.choice(FOREIGN)
            folder = run / "checkpoints"
            if folder.is_symlink() or not folder.is_dir():
                continue
            path = folder / name
        above = [run / parent for parent in path.relative_to(run).parents]
        if any(parent.is_symlink() or (parent.exists() and not parent.is_dir()) for parent in above):
            continue  # spoiled already
        if kind != "foreign" or not os.path.lexists(path):
            remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        target = dice.choice(targets)
        if kind == "link":
            path.symlink_to(target, target_is_directory=target.is_dir())
        elif kind == "hard link":
            path.hardlink_to(dice.choice([one for one in targets if one.is_file()]))
        elif kind == "odd bytes":
            path.write_bytes(dice.choice(ODD))
        elif not os.path.lexists(path):
            path.mkdir()
            (path / "mine").write_text("mine")
        done.append(f"{kind} {name}")
    return done


def changed(before: dict[str, tuple[object, ...]], folder: Path, run: Path) -> list[str]:
    """What is not as it was in a folder around a run. A link ``checkpoints`` is one that the user may mean: it gets
    files of a run."""
    after, link = snapshot(folder), run / "checkpoints"
    found = [path for path in before if after.get(path) != before[path]]
    new = [folder / path for path in sorted(after.keys() - before.keys())]
    here = link.resolve() if link.is_symlink() else None
    return found + [str(path) for path in new if here not in path.resolve().parents]


def remove(path: Path) -> None:
    """Remove whatever is there; a link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    """Make a run, spoil copies of it, train, evaluate the readers and prune each; print what was kept."""
    from helpers import make_tiny_model, run_here, tiny_flags, train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="hostile directories; default: 200")
    parser.add_argument("--first", type=int, default=0, help="seed of the first; default: 0")
    given = parser.parse_args()
    short = ("--train.max_steps", 2, "--mask.train", "norm", "--output.save_every_steps", 1, "--output.keep", 2)
    codes: Counter[int] = Counter()
    broken = []
    with tempfile.TemporaryDirectory(prefix="frostline-hostile-") as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model")
        train(*tiny_flags(model, folder / "whole", *short))
        for seed in range(given.first, given.first + given.runs):
            outside, run = folder / "outside", folder / "run"
            for kept in (".ssh/id", ".bashrc", "thesis.txt", "step-00000001/notes.txt", "MANIFEST.json", "latest"):
                (outside / kept).parent.mkdir(parents=True, exist_ok=True)
                (outside / kept).write_text("ten years of records")
            shutil.copytree(folder / "whole", run, symlinks=True)
            done = make_hostile(run, outside, seed)
            before = snapshot(outside)
            flags = tiny_flags(model, run, *short, "--train.max_steps", 3, "--output.keep", 1, "--resume-override")
            ended = [run_here("train.py", *flags), run_here("export.py", run, "--delta", "--output", folder / "delta")]
            codes.update(one.returncode for one in ended)
            touched = changed(before, outside, run)
            said = "".join(one.stderr for one in ended)
            if touched or "Traceback" in said:
                broken.append(f"seed {seed} ({', '.join(done)}): changed {touched}, said {said[-400:]}")
                print(broken[-1], flush=True)
            for left in (outside, run, folder / "delta"):
                remove(left)
    print(f"{given.runs:,} hostile run directories, exit codes {dict(codes)}: "
          f"{'nothing around them changed' if not broken else f'{len(broken)} BROKEN'}")  # fmt: skip
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
