"""Write a workload: ``prepare.py DIRECTORY [flags of workload.add_flags]``.

The token ids come from the toolkit's own data path and the order of each epoch from its own loop, so that what the
other contenders read is what the toolkit trains on. The head is untied in the checkpoint that all of them load.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.shapes import Shape, named_shape, write_model
from benchmarks.workload import ROOT, Workload, add_flags
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.batches import epoch_order
from toolkit.data.dataset import load_dataset
from toolkit.mask.apply import untie_head
from toolkit.models.load import load, load_tokenizer

SAMPLE = ROOT / "examples" / "data" / "clinical_qa_en.jsonl"
SEED = 42


def first_rows(source: Path, count: int, directory: Path) -> Path:
    """Write the first rows of a .jsonl file, or of a .json object keyed by row, as a file of the same form."""
    target = directory / f"rows{source.suffix}"
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".json":
        target.write_text(json.dumps(dict(islice(json.loads(text).items(), count))), encoding="utf-8")
    else:
        target.write_text("\n".join(text.splitlines()[:count]) + "\n", encoding="utf-8")
    return target


def write_random_model(shape: Shape, directory: Path, tokenizer: Path | None, hollow: int = 0) -> None:
    """Write a model directory of random weights with a tokenizer, by default the bundled one."""
    config = ModelConfig(name_or_path=str(tokenizer)) if tokenizer else ModelConfig()
    write_model(shape, directory, hollow)
    load_tokenizer(config).save_pretrained(directory)


def prepare(directory: Path, data: Path | None, rows: int, epochs: int, model: Path) -> Workload:
    """Write ``directory/workload.json`` for the model in ``model``, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = first_rows(data or SAMPLE, rows, directory)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(model)))
    examples = load_dataset(DataConfig(path=str(path)), tokenizer, SEED).train
    workload = Workload(
        model=str(model),
        data=str(path),
        rows=[(list(example.token_ids), example.answer_start) for example in examples],
        orders=[epoch_order(len(examples), SEED, epoch).tolist() for epoch in range(epochs)],
        seed=SEED,
    )
    workload.save(directory / "workload.json")
    return workload


def main() -> None:
    """Write the model and the workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    add_flags(parser)
    parser.add_argument("--frozen", type=int, help="blocks below the frost line of a --shape, instead of its own")
    given = parser.parse_args()
    model = given.directory / "model"
    if given.shape:
        shape = named_shape(given.shape)
        if given.frozen is not None:
            shape = replace(shape, blocks=given.frozen + Workload.last)
        hollow = shape.blocks - Workload.last if given.shape == "larger-than-gpu" else 0
        write_random_model(shape, model, given.tokenizer, hollow)
    else:
        loaded = load(ModelConfig())
        untie_head(loaded.model, loaded.anatomy)
        loaded.save(model)
    prepare(given.directory, given.data, given.rows, given.epochs, model)


if __name__ == "__main__":
    main()
