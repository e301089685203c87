"""Two ranks answer with models that ZeRO-3 divides, and print what each held, gathered and answered.

Started as ``LAUNCHER tests/partitioned_worker.py FOLDER``; FOLDER/sources.json names the models and runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import PreTrainedModel  # noqa: E402

from toolkit.engine.deepspeed.inference import PartitionedModel, read_inference_config  # noqa: E402
from toolkit.inference.answering import Answerer  # noqa: E402
from toolkit.inference.open_model import open_model  # noqa: E402
from toolkit.runtime.distributed import World, join_ranks  # noqa: E402
from toolkit.runtime.shipped import shipped_file  # noqa: E402
from toolkit.tasks.sample import ask  # noqa: E402

SAMPLES = [(row, ask("why do they? " * words)) for row, words in enumerate((1, 9, 4, 2, 6))]
BATCH_SIZE = 2
"""Five samples make three batches: first each rank has one, then rank 1 has none and joins rank 0's passes."""


def main(folder: Path) -> None:
    sources = json.loads((folder / "sources.json").read_text())
    with join_ranks(engine_needs_group=True) as world:
        for source in sources:
            alone, _ = answer(source, World(), None)
            ds_config = read_inference_config(shipped_file("ds_configs/zero3.json"))
            ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            together, model = answer(source, world, ds_config)
            parameters = list(model.parameters())
            line = {
                "source": source, "rank": world.rank, "alone": alone, "together": together,
                "elements": sum(int(parameter.ds_numel) for parameter in parameters),
                "held": sum(parameter.ds_tensor.numel() for parameter in parameters),
                "gathered": sum(parameter.numel() for parameter in parameters),
                "dtypes": sorted({str(parameter.dtype) for parameter in parameters}),
            }  # fmt: skip
            (folder / f"{Path(source).name}-{world.rank}.json").write_text(json.dumps(line))


def answer(source: str, world: World, ds_config: dict[str, object] | None) -> tuple[list[str | None], PreTrainedModel]:
    opened = open_model(source)
    model = opened.loaded.model.eval()
    partitioned = None if ds_config is None else PartitionedModel(model, world, ds_config)
    answerer = Answerer(
        opened.loaded, 512, 6, BATCH_SIZE, rendering=opened.rendering, world=world, partitioned=partitioned
    )
    return [answer for _, answer in answerer.in_order(SAMPLES)], model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
