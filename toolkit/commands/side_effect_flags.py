"""Flags that ask what training does to a model beside its task: drift and forgetting."""

from __future__ import annotations

import argparse

from toolkit.config import flags


def add_side_effect_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--drift", action="store_true",
        help="score the base's own greedy answers to 60 everyday prompts under every source: how far each has moved",
    )  # fmt: skip
    parser.add_argument(
        "--drift.max_new_tokens", dest="drift_max_new_tokens", type=flags.positive_int, default=64, metavar="N",
        help="longest of these answers in tokens; default: 64",
    )  # fmt: skip
    parser.add_argument(
        "--forgetting", metavar="FILE",
        help="labelled items with options, or a task file of lm-eval that names local rows, on which base and sources "
        "are compared too",
    )  # fmt: skip
    parser.add_argument(
        "--forgetting.task", dest="forgetting_task", type=flags.name_or_mapping, metavar="TASK",
        help="task by which these items are read, or a task file of lm-eval; default: choice",
    )  # fmt: skip


def check_side_effect_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the process if a flag would do nothing."""
    if arguments.drift_max_new_tokens != 64 and not arguments.drift:
        parser.error("--drift.max_new_tokens goes with --drift; without it nothing is measured by it")
    if arguments.forgetting_task is not None and arguments.forgetting is None:
        parser.error("--forgetting.task goes with --forgetting, which names the items")
