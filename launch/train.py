"""Fine-tune the part of a language model that a layer mask selects.

One process:        python launch/train.py --config recipes/quickstart.yaml
DeepSpeed ZeRO:     deepspeed launch/train.py --ds ds_configs/zero2.json
Other launchers:    torchrun | accelerate launch | srun ... launch/train.py ...

Exit codes: 0 done; 1 failed; 2 bad usage, config or data; 75 stopped by SIGTERM or SIGUSR1 with nothing lost, start
again to go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from toolkit.runtime.environment import require_packages

require_packages(ROOT)

from toolkit.commands.cli import leave, run_command
from toolkit.runtime.signals import listening


def main() -> int:
    """Parse the command line, then train."""
    with listening():  # first of all: whatever takes long can be stopped
        from toolkit.config import flags

        parser = flags.parser(__doc__ or "")
        flags.add_resume_override(parser)
        invocation = flags.parse(parser, ROOT / "recipes" / "quickstart.yaml")
        from toolkit.training.run import run  # imports torch, which --help and a faulty recipe need not wait for

        return run(invocation)


if __name__ == "__main__":
    leave(run_command(main))
