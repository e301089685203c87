"""Validation loss and perplexity of a run, an export, a delta or any model.

    python launch/evaluate.py runs/quickstart                                  # the rows its run held out
    python launch/evaluate.py runs/quickstart --data.path other.jsonl          # every row of that file
    python launch/evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --data.path other.jsonl

Prints a line for people, then one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from toolkit.runtime.environment import require_packages

require_packages(ROOT)

from toolkit.commands.cli import run_command
from toolkit.config import flags


def main() -> int:
    """Parse the command line, then evaluate."""
    parser = flags.parser(__doc__ or "")
    parser.add_argument("source", help="run directory, export, delta, model directory or Hub id")
    parser.add_argument("--data.path", dest="path", help="rows to evaluate on; default: what the run held out")
    parser.add_argument("--data.split", dest="split", help="split of a Hub data set; default: its only one, or train")
    parser.add_argument("--batch-size", type=flags.positive, default=1, help="rows computed at once; default: 1")
    flags.add_opening(parser, "precision to compute in; default: the run's, or that in which a model is stored")
    arguments = parser.parse_args()
    if arguments.split and not arguments.path:
        parser.error("--data.split goes with --data.path; the rows that a run held out are those of its recipe")
    from toolkit.inference.evaluation import evaluate_source

    outcome = evaluate_source(
        arguments.source,
        arguments.path,
        arguments.split,
        arguments.batch_size,
        arguments.step,
        arguments.base,
        arguments.trust_remote_code,
        arguments.dtype,
    )
    tokens = f"{outcome.supervised_tokens} supervised tokens of {outcome.rows} rows"
    print(f"loss {outcome.loss:.4f}, perplexity {outcome.perplexity:.2f} over {tokens}")
    print(json.dumps({**asdict(outcome), "perplexity": outcome.perplexity}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
