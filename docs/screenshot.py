"""Open a run in TensorBoard, in a real headless Chromium: check that the page shows its curves, and take a picture.

    python docs/screenshot.py runs/quickstart docs/tensorboard.png

Exits 1, and says which, if a curve of the run is not on the page. Needs chromium or chrome.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
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
from typing import Any

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_SECONDS, _DRAWING_SECONDS = 120.0, 15.0
"""How long to wait for the cards, and then for their curves."""


def browser() -> str | None:
    """Return the path of an installed browser; None without one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextlib.contextmanager
def serving(log_directory: Path, seconds: float = 120.0) -> Iterator[str]:
    """Serve a directory with TensorBoard, and yield its address.

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


class Browser:
    """A headless browser with one page, steered through its debugging pipe (Chrome DevTools Protocol).

    The page runs in real time: with a virtual clock TensorBoard's curves, which a thread draws, come too late.

    Args:
        program: chromium or chrome.
        profile: an empty directory.
        size: of the window, in pixels.
    """

    def __init__(self, program: str, profile: Path, size: tuple[int, int]) -> None:
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()

        def pipes() -> None:  # it reads from 3 and writes to 4
            first, second = os.dup(reads), os.dup(writes)
            os.dup2(first, 3)
            os.dup2(second, 4)

        command = [
            program, "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # TensorBoard draws its curves with WebGL
            f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--remote-debugging-pipe",
        ]  # fmt: skip
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=pipes, pass_fds=(3, 4), **quiet)  # type: ignore[call-overload]
        os.close(reads)
        os.close(writes)
        self._unread, self._count, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command and return the browser's answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": values, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                received = os.read(self._in, 1 << 20)
                if not received:
                    raise RuntimeError("the browser has ended")
                self._unread += received
            line, _, self._unread = self._unread.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found

    def html(self) -> str:
        """Return the page's HTML as it stands."""
        look = "document.documentElement ? document.documentElement.outerHTML : ''"
        return str(self.call("Runtime.evaluate", expression=look)["result"]["value"])

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


def open_page(
    address: str, expected: set[str], picture: Path | None = None, size: tuple[int, int] = (1900, 2060)
) -> str:
    """Let a headless browser run the page until it shows what is expected, and a little longer.

    Args:
        address: of the page.
        expected: names of cards.
        picture: also write what is seen into this PNG file, in a few colours to keep it small.
        size: of the window, in pixels.

    Returns:
        The page's HTML.

    Raises:
        RuntimeError: there is no browser.
    """
    program = browser()
    if program is None:
        raise RuntimeError(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        page = Browser(program, Path(profile), size)
        try:
            page.call("Page.navigate", url=address)
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not expected <= shown(page.html()) and time.monotonic() < deadline:
                time.sleep(1)
            time.sleep(_DRAWING_SECONDS if picture is not None else 0)
            if picture is not None:
                shot = base64.b64decode(page.call("Page.captureScreenshot")["data"])
                seen = Image.open(io.BytesIO(shot)).convert("RGB")
                seen = seen.resize((seen.width * 3 // 4, seen.height * 3 // 4), Image.Resampling.LANCZOS)
                seen.quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
            return page.html()
        finally:
            page.close()


def tags(address: str) -> dict[str, list[str]]:
    """Return the names of the curves of each run that TensorBoard serves."""
    with urllib.request.urlopen(f"{address}data/plugin/scalars/tags") as answer:
        found: dict[str, dict[str, object]] = json.load(answer)
    return {run: sorted(curves) for run, curves in found.items()}


def shown(page: str) -> set[str]:
    """Return the names of the cards on a page."""
    return set(re.findall(r'title="((?:eval|train)/\w+)"', page))


def main() -> int:
    """Parse the command line, then look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory, or a directory of runs")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG file to write")
    arguments = parser.parse_args()
    with serving(arguments.run) as address:
        expected = {curve for curves in tags(address).values() for curve in curves}
        found = shown(open_page(f"{address}?darkMode=false#timeseries", expected, arguments.picture))
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
