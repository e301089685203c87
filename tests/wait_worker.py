"""Records signals, then waits for a stop, or for something that never comes. Not a test itself.

Arguments: "stop"; "wait" inside ``signals.waiting``; or "build FOLDER", whose lock is a build's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolkit.runtime import signals


def main() -> int:
    with signals.record_signals({}):
        print("ready", flush=True)
        if sys.argv[1] == "wait":
            with signals.waiting("the tide"):
                time.sleep(60)
        if sys.argv[1] == "build":
            from toolkit.engine.deepspeed.machine import _wait_for_build

            _wait_for_build(Path(sys.argv[2]) / "lock")
        while not signals.stop_requested():
            time.sleep(0.01)
        print(f"stopped by {signals.stop_reason()}", file=sys.stderr, flush=True)
        print("out", flush=True)
        return signals.STOPPED


if __name__ == "__main__":
    sys.exit(main())
