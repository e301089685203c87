"""Run ``frostline sweep`` from a checkout, installed or not; see toolkit/commands/sweep.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolkit.runtime.environment import require_packages

require_packages()

from toolkit.commands.cli import exit_process, run_command
from toolkit.commands.sweep import main

if __name__ == "__main__":
    exit_process(run_command(main))
