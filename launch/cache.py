"""Run ``frostline cache`` from a checkout, installed or not; see toolkit/commands/cache.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolkit.runtime.environment import require_packages

require_packages()

from toolkit.commands.cache import main
from toolkit.commands.cli import exit_process, run_command

if __name__ == "__main__":
    exit_process(run_command(main))
