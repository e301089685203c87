"""Write what a peer of quality.py trains on: token ids of training and validation rows, by the toolkit's data path."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import Workload
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.batches import epoch_order
from toolkit.data.dataset import load_dataset
from toolkit.models.bundled import bundled_directory
from toolkit.models.load import load


def main() -> None:
    """Write the workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--validation", default="none")
    parser.add_argument("--data.task", dest="task")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    given = parser.parse_args()
    model = str(bundled_directory(given.model)) if given.model.startswith("bundled:") else given.model
    loaded = load(ModelConfig(name_or_path=model))
    more = {} if given.task is None else {"task": given.task}
    config = DataConfig(path=given.rows, validation=None if given.validation == "none" else given.validation, **more)
    dataset = load_dataset(config, loaded.tokenizer, given.seed, loaded.ends)
    train, validation = (
        [(list(example.token_ids), example.answer_start) for example in part or ()]
        for part in (dataset.train, dataset.validation)
    )
    orders = [epoch_order(len(train), given.seed, epoch).tolist() for epoch in range(given.epochs)]
    workload = Workload(model, given.rows, train, orders, given.seed, given.rate)
    replace(workload, validation=validation, dtype=given.dtype).save(given.target)


if __name__ == "__main__":
    main()
