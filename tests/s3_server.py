"""S3 on 127.0.0.1 for tests: moto's server in an environment of its own (tests/peers.py), behind a proxy that makes faults.

In:  `with Proxy(url_of_moto) as s:` and AWS_ENDPOINT_URL=s.url; s.fault("GET", "break", times=2, after=1000)
Out: s.requests, (method, path with its query).

Faults: a status number; "reset" (closed before it is passed on); "lost" (passed on, closed without an answer); "break" (closed after
`after` bytes of the answer); "corrupt" (one byte of the answer changed).
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from patience import PATIENCE
from peers import environment

MOTO = ("moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5", "crc32c==2.9.post0")
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
"""An environment in which no other source of credentials is used."""


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    """The address of a server with the bucket `test`. `folder` gets its log."""
    python = environment("moto", *MOTO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url, limit = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                request = urllib.request.Request(f"{url}/test", method="PUT")
                urllib.request.urlopen(request, timeout=PATIENCE).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < limit
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


class Proxy:
    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.faults: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.proxy = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method: str, kind: str | int, times: int = 1, after: int = 0, having: str = "") -> None:
        """`having`: only for paths, with their query, that contain this."""
        self.faults.append({"method": method, "kind": kind, "times": times, "after": after, "having": having})

    def take(self, method: str, path: str) -> dict[str, Any]:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault["method"] == method and fault["having"] in path and fault["times"]:
                    fault["times"] -= 1
                    return fault
        return {"kind": ""}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        self.close_connection = True
        super().handle_one_request()

    def do_GET(self) -> None:
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        fault = proxy.take(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault["kind"] == "reset":
            return
        if isinstance(fault["kind"], int):
            self.send_response(fault["kind"])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        headers = {k: v for k, v in self.headers.items() if k != "Expect"}
        server = http.client.HTTPConnection(proxy.upstream, timeout=PATIENCE)
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        data = answer.read()
        if fault["kind"] == "lost":
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        if fault["kind"] == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.wfile.write(data[: fault["after"]] if fault["kind"] == "break" else data)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET
