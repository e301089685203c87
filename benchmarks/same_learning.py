"""Same learning: the toolkit against a plain loop with fp32 masters, and what the naive bf16 loop learns.

    python benchmarks/same_learning.py --data PATH/TO/ori_pqal.json [--rows 40]

SmolLM2-135M, top 4 blocks and untied head, batch 1, AdamW 1e-5, 3 epochs, on the first rows of PubMedQA. The toolkit
runs as a user runs it: launch/train.py in a process of its own. Exits 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.plain_loop import plain_loop  # noqa: E402
from toolkit.config.schema import DataConfig, ModelConfig  # noqa: E402
from toolkit.data.batches import epoch_order  # noqa: E402
from toolkit.data.dataset import load_dataset  # noqa: E402
from toolkit.models.load import load  # noqa: E402

EPOCHS, SEED, LR = 3, 42, 1e-5


def toolkit_losses(data: Path, run: Path) -> list[float]:
    """Step losses of ``launch/train.py`` on ``data``, read from its metrics."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "recipes" / "quickstart.yaml")]
    flags = ["--data.path", data, "--data.validation", "none", "--train.seed", SEED, "--output.dir", run]
    subprocess.run([*command, *map(str, flags)], check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def plain_losses(data: Path, fp32_masters: bool) -> list[float]:
    """Step losses of the plain loop on the same rows in the same order."""
    loaded = load(ModelConfig())
    examples = load_dataset(DataConfig(path=str(data)), loaded.tokenizer, SEED).train
    rows = [(example.token_ids, example.answer_start) for example in examples]
    orders = [epoch_order(len(rows), SEED, epoch) for epoch in range(EPOCHS)]
    return plain_loop(loaded.model, rows, orders, LR, fp32_masters)


def main() -> int:
    """Run all three, print one table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json")
    parser.add_argument("--rows", type=int, default=40, help="rows from the start of the file; default: 40")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        every = json.loads(arguments.data.read_text(encoding="utf-8"))
        data.write_text(json.dumps(dict(islice(every.items(), arguments.rows))), encoding="utf-8")
        ours = toolkit_losses(data, Path(folder) / "run")
        masters = plain_losses(data, fp32_masters=True)
        naive = plain_losses(data, fp32_masters=False)
    apart = [abs(a - b) for a, b in zip(ours, masters, strict=True)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rows} rows, {EPOCHS} epochs")
    print(f"{'loop':<28}" + "".join(f"{f'epoch {epoch + 1}':>10}" for epoch in range(EPOCHS)) + f"{'gain':>10}")
    gains = {}
    for name, losses in (("frostline", ours), ("plain, fp32 masters", masters), ("plain, bf16 AdamW", naive)):
        size = len(losses) // EPOCHS
        means = [sum(losses[e * size : (e + 1) * size]) / size for e in range(EPOCHS)]
        gains[name] = means[0] - means[-1]
        print(f"{name:<28}" + "".join(f"{mean:>10.4f}" for mean in means) + f"{gains[name]:>10.4f}")
    print(f"largest step difference, frostline and plain with fp32 masters: {max(apart):.4f}")
    bounds = {
        "each step within 0.03 of the plain loop": max(apart) <= 3e-2,
        "frostline gains at least 0.05": gains["frostline"] >= 0.05,
        "naive bf16 stays within 0.01": abs(gains["plain, bf16 AdamW"]) <= 0.01,
    }
    for bound, holds in bounds.items():
        print(f"{'ok  ' if holds else 'MISS'} {bound}")
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
