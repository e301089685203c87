"""A server on this machine that answers wandb as its own does, as far as a run needs, and keeps what it is sent."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RUN = {
    "id": "1", "name": "r1", "displayName": "run", "description": "", "config": "{}", "sweepName": None,
    "historyLineCount": 0, "project": {"id": "p", "name": "frostline", "entity": {"id": "e", "name": "team"}},
}  # fmt: skip
_ANSWERS = {
    "viewer": {"id": "v", "entity": "team", "username": "u", "flags": "{}", "teams": {"edges": []}},
    "upsertBucket": {"bucket": _RUN, "inserted": True},
    "model": {"bucket": None},
    "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []},
    "createRunFiles": {"runID": "r1", "uploadHeaders": [], "files": []},
    "project": {"run": None},
}


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the server's address, and path and headers with body of each request so far."""
    received: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append((self.path, f"{self.headers}\n{body.decode()}"))
            answer = json.dumps({"data": _ANSWERS} if self.path == "/graphql" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
