"""An HTTP/1.1 server of a folder on loopback: byte ranges, keep-alive, and faults when asked for.

    with serve(folder) as server:
        server.faults["a.bin"] = ["500", "", "cut"]  # the next three replies ("": no fault)
        requests of f"{server.url}/a.bin"

Faults: an HTTP status ("500"); "cut" closes the connection in the middle of the body; "slow" waits
`slow_s` before replying; "drip" sends half of the body and waits; "short" sends half of the body
as if that were all. `ignores_ranges` makes it reply with whole files, like http.server.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class RangeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with the usual 5, sixteen connections at once wait a second

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list[str]] = {}
        self.ignores_ranges = False
        self.slow_s = 1.0
        self.delay_s = 0.0  # before every reply: a round trip
        self.requests: list[tuple[str, str | None]] = []  # (path, Range header)
        self.connections = 0
        self.closing = threading.Event()

    def next_fault(self, path: str) -> str | None:
        for name, faults in self.faults.items():
            if path.endswith(name) and faults:
                return faults.pop(0)
        return None


class RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RangeServer

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_GET(self):
        with suppress(ConnectionError):  # a client that gave up
            self.reply()

    def reply(self):
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        self.server.requests.append((path, self.headers.get("Range")))
        time.sleep(self.server.delay_s)
        fault = self.server.next_fault(path)
        if fault == "slow":
            self.server.closing.wait(self.server.slow_s)
        if fault and fault.isdigit():
            return self.send(int(fault), b"", {})
        file = self.server.folder / path
        if not file.is_file():
            return self.send(404, b"", {})
        size = file.stat().st_size
        start, stop, partial = 0, size, False
        if (asked := self.headers.get("Range")) and not self.server.ignores_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, partial = int(first), min(int(last) + 1, size), True
            if start >= size:
                return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
        with file.open("rb") as opened:
            opened.seek(start)
            body = opened.read(stop - start)
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if partial else {}
        self.send(206 if partial else 200, body, headers, fault)

    def send(self, status: int, body: bytes, headers: dict[str, str], fault: str | None = None):
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if fault == "drip":
            self.server.closing.wait(self.server.slow_s)
        if fault == "cut":
            self.close_connection = True
        else:
            self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """A RangeServer of `folder` in a thread, until the block ends."""
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
