"""Train, evaluate, ask and export from Python, on the bundled model and the 64 questions of examples/data.

    python examples/api.py

The same as the commands of the README, a few minutes on 2 CPU cores. Each argument is a dotted recipe key, as in
``train.epochs=1``.
"""

from __future__ import annotations

import logging
import sys

import toolkit


def main(settings: list[str]) -> None:
    """Run one model through the whole toolkit.

    Args:
        settings: ``section.key=value`` each, laid over recipes/quickstart.yaml.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = dict(setting.split("=", 1) for setting in settings)
    recipe = "recipes/quickstart.yaml"

    report = toolkit.plan(recipe, overrides, gpu_memory="24GiB")
    print(report)

    result = toolkit.train(recipe, overrides)
    outcome = toolkit.evaluate(result.run)
    print(f"validation loss {outcome.loss:.4f} on {outcome.rows} rows that the run held out")

    question = {"QUESTION": "Does aspirin lower fever?", "CONTEXTS": ["Aspirin inhibits cyclooxygenase."]}
    (answer,) = toolkit.generate(result.run, [question], max_new_tokens=48)
    print(f"answer: {answer}")

    directory = toolkit.export(result.run)
    print(f"exported: {directory}; transformers' from_pretrained loads it")


if __name__ == "__main__":
    main(sys.argv[1:])
