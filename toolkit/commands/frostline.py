"""The ``frostline`` command, which ``pip install`` creates: ``frostline VERB …``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import NoReturn

import toolkit
from toolkit.runtime.environment import require_packages

VERBS = {
    "train": "fine-tune the part of a model that a layer mask selects",
    "data-check": "look at the data: duplicates, leaks, odd answers, personal identifiers",
    "sweep": "train a recipe with several masks, rates, epochs or seeds, and compare quality and cost",
    "plan": "print memory, compute and disk of a run before any weight is loaded",
    "evaluate": "print the validation loss of a run, an export, a delta or any model",
    "rate": "have people compare two models' answers: blinded sheets, and what they show",
    "generate": "answer questions",
    "verify": "check records or answers by the rules of a task",
    "document": "write grounded documents as Markdown and .docx, with sources and what is not verified",
    "triage": "decide on patients' reports, or assess adverse event notes; for research, not for care",
    "road": "walk notes from triage and records to a checked document; for research, not for care",
    "report": "write a run's report as one HTML file: result, curves, answers, cost, methods",
    "export": "write a model directory for transformers, or a delta",
    "submit": "train as a SLURM job",
    "cache": "list or remove what is kept beside the runs: hidden states, tokens, the converted model",
}
"""Help text by verb; the module of the same name, with _ for -, in this package runs it."""


def main() -> NoReturn:
    """Run the verb of the command line and end the process with its exit code."""
    require_packages()
    from toolkit.commands.cli import exit_process, run_command

    verb, *words = sys.argv[1:] or ["--help"]
    if verb not in VERBS:
        _build_parser().parse_args([verb])  # exits: --help, --version, or an error
    command = import_module(f"toolkit.commands.{verb.replace('-', '_')}").main
    exit_process(run_command(lambda: command(words, f"frostline {verb}")), at_once=verb == "plan")


def _build_parser() -> argparse.ArgumentParser:
    """Return a parser of the verbs alone, for ``--help``, ``--version`` and unknown verbs."""
    parser = argparse.ArgumentParser(
        prog="frostline", description="Partial fine-tuning of causal language models.",
        epilog="frostline VERB --help lists the options of a verb.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {toolkit.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verbs.add_parser(name, help=summary)
    return parser
