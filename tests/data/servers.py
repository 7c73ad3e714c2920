"""HTTP servers on loopback that serve a folder, whose subfolders are buckets to S3 clients, and misbehave when told."""

import re
import subprocess
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FolderServer(ThreadingHTTPServer):
    """Serves a folder's files and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.faults: defaultdict[str, deque[str]] = defaultdict(deque)
        """By file name, what goes wrong at its next requests: a status, `cut`, `stall` or `drip` after half of the
        bytes, or `drip headers`; of what drips a byte comes every 20 ms."""
        self.requests: list[tuple[str, str | None]] = []
        """File names and ranges."""
        self.queries: list[str] = []
        self.authorizations: list[str | None] = []
        self.stalled = threading.Event()
        self.go_on = threading.Event()

    def asked(self, name: str) -> int:
        return sum(1 for asked, _ in self.requests if asked == name)


class _Handler(BaseHTTPRequestHandler):
    server: FolderServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(unquote(self.path))
        path = self.server.folder / url.path[1:]
        asked = self.headers.get("Range")
        self.server.requests.append((path.name, asked))
        self.server.queries.append(url.query)
        self.server.authorizations.append(self.headers.get("Authorization"))
        faults = self.server.faults[path.name]
        fault = faults.popleft() if faults else ""
        if fault.isdigit() or not path.is_file():
            self._answer(int(fault or 404), {"Content-Length": "0"})
            return
        if fault == "drip headers":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Padding: ")
            return
        content = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        start = int(match[1]) if match and self.server.ranges else 0
        body = content[start:]
        headers = {"Content-Length": str(len(body))}
        if start >= len(content) > 0:
            self._answer(416, {"Content-Length": "0"})
        elif start:
            self._answer(206, headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
            self._send(body, fault)
        else:
            self._answer(200, headers)
            self._send(body, fault)

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _drip(self, beginning: bytes) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.write(beginning)
            while not self.server.go_on.wait(0.02):
                self.wfile.write(b"x")

    def _send(self, body: bytes, fault: str) -> None:
        if fault == "drip":
            self._drip(body[: len(body) // 2])
            return
        self.wfile.write(body[: len(body) // 2] if fault else body)
        self.close_connection = bool(fault)
        if fault == "stall":
            self.server.stalled.set()
            self.server.go_on.wait(30)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[FolderServer]:
    """A server in threads of this process."""
    with FolderServer(folder, ranges=ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()


@contextmanager
def serving_process(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, which can be killed, and its port."""
    command = [sys.executable, __file__, str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


if __name__ == "__main__":
    with FolderServer(Path(sys.argv[1]), int(sys.argv[2])) as started:
        print(started.server_port, flush=True)
        started.serve_forever()
