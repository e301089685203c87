"""Open a run in TensorBoard, in a real headless Chromium: check that the page shows its curves, and take a picture.

    python docs/screenshot.py runs/quickstart docs/tensorboard.png

Exits 1, and says which, if a curve of the run is not on the page. Needs chromium or chrome.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_MS = 30_000
"""Of the page's own clock, which runs as fast as the page has nothing to wait for."""


def browser() -> str | None:
    """The program, if one is installed."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextlib.contextmanager
def serving(log_directory: Path, seconds: float = 120.0) -> Iterator[str]:
    """TensorBoard's address while it serves a directory.

    Raises:
        RuntimeError: it did not come up in time.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_directory), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/"
    try:
        deadline = time.monotonic() + seconds
        while not _runs(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"TensorBoard shows no run of {log_directory} at {address}")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def open_page(address: str, picture: Path | None = None, size: tuple[int, int] = (1900, 2060)) -> str:
    """Let a headless browser run the page, and return the text of its elements.

    Args:
        address: of the page.
        picture: also write what is seen into this PNG file, in a few colours to keep it small.
        size: of the window, in pixels.

    Raises:
        RuntimeError: there is no browser.
    """
    program = browser()
    if program is None:
        raise RuntimeError(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [
            program, "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # TensorBoard draws its curves with WebGL
            f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}",
            f"--virtual-time-budget={_PATIENCE_MS}",
        ]  # fmt: skip
        if picture is not None:
            subprocess.run([*command, f"--screenshot={shot}", address], check=True, capture_output=True, timeout=180)
            seen = Image.open(shot).convert("RGB")
            seen = seen.resize((seen.width * 3 // 4, seen.height * 3 // 4), Image.Resampling.LANCZOS)
            seen.quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
        page = subprocess.run([*command, "--dump-dom", address], check=True, capture_output=True, timeout=180)
    return page.stdout.decode()


def tags(address: str) -> dict[str, list[str]]:
    """The curves of each run that TensorBoard serves."""
    with urllib.request.urlopen(f"{address}data/plugin/scalars/tags") as answer:
        found: dict[str, dict[str, object]] = json.load(answer)
    return {run: sorted(curves) for run, curves in found.items()}


def shown(page: str) -> set[str]:
    """The names of the cards on the page."""
    return set(re.findall(r'title="((?:eval|train)/\w+)"', page))


def main() -> int:
    """Parse the command line, then look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory, or a directory of runs")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG file to write")
    arguments = parser.parse_args()
    with serving(arguments.run) as address:
        expected = {curve for curves in tags(address).values() for curve in curves}
        found = shown(open_page(f"{address}?darkMode=false#timeseries", arguments.picture))
    missing = expected - found
    print(f"on the page: {', '.join(sorted(found))}")
    if missing:
        print(f"not on the page: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing else 0


def _runs(address: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
        return any(tags(address).values())
    return False


if __name__ == "__main__":
    sys.exit(main())
