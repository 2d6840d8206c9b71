"""A bucket on 127.0.0.1 that is fast enough not to be what a benchmark measures.

In:  a folder in memory (/dev/shm), a number of processes, the seconds that each answer waits (the round trip).
Out: `with Bucket(folder, 0.03) as url:` the JSON API as Google's client speaks it and the XML API as obstore does.

Several processes share one listening socket and keep the objects as files: a download is sendfile, an upload goes from the
socket into the file, its CRC32C is computed and, where one was stated, compared. No faults: those are in tests/gcs_server.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

PROCESSES = 2


@contextlib.contextmanager
def bucket(folder: Path, latency_s: float, processes: int = PROCESSES) -> Iterator[str]:
    """The server's URL while the body runs."""
    for name in ("objects", "facts", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        children = []
        for _ in range(processes):
            if not (child := os.fork()):
                try:
                    serve(listening, folder, url, latency_s)
                finally:
                    os._exit(0)
            children.append(child)
    try:
        yield url
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)


def serve(listening: socket.socket, folder: Path, url: str, latency_s: float) -> None:
    while True:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=Talk(connection, folder, url, latency_s).run, daemon=True).start()


class Talk:
    """One connection."""

    def __init__(self, connection: socket.socket, folder: Path, url: str, latency_s: float):
        self.connection, self.folder, self.url, self.latency_s = connection, folder, url, latency_s
        self.stream = connection.makefile("rb", buffering=1 << 16)

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := self.stream.readline():
                method, path, _ = line.decode("latin-1").split(" ", 2)
                headers = {}
                while (line := self.stream.readline()) not in (b"\r\n", b""):
                    key, _, value = line.decode("latin-1").partition(":")
                    headers[key.strip().lower()] = value.strip()
                if headers.get("expect", "").lower() == "100-continue":
                    self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.request(method, path, headers)
        self.connection.close()

    def request(self, method: str, path: str, headers: dict[str, str]) -> None:
        url = urlsplit(path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        length = int(headers.get("content-length") or 0)
        time.sleep(self.latency_s)
        if url.path.startswith("/upload/"):
            if "session" in query:
                return self.chunk(query["session"], headers, length)
            if query["uploadType"] == "resumable":
                return self.begin(json.loads(self.stream.read(length)), headers)
            return self.whole(headers, length)
        if url.path.startswith(("/storage/", "/download/")):
            if url.path.endswith("/iam/testPermissions"):
                asked = parse_qs(url.query)["permissions"]
                return self.answer(200, {"permissions": asked})
            name = unquote(url.path.partition("/o/")[2])
            if not name:
                return self.listing(query.get("prefix", ""), int(query.get("pageToken", 0)))
            if query.get("alt") == "media" or url.path.startswith("/download/"):
                return self.download(name, headers)
            return self.answer(200, json.loads(self.facts(name).read_bytes()))
        return self.xml(method, unquote(url.path.split("/", 2)[2]), query, headers, length)

    def object_file(self, name: str) -> Path:
        return self.folder / "objects" / quote(name, safe="")

    def facts(self, name: str) -> Path:
        return self.folder / "facts" / quote(name, safe="")

    def receive(self, file: Path, length: int, at: int = 0) -> None:
        """The next bytes of the connection into a file, without a copy of them in Python."""
        fd = os.open(file, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, at + length)
            if length:
                with mmap.mmap(fd, at + length) as memory, memoryview(memory) as view:
                    while length:
                        count = self.stream.readinto1(view[at : at + length])  # type: ignore[attr-defined]
                        if not count:
                            raise ConnectionError("the client went away")
                        at, length = at + count, length - count
        finally:
            os.close(fd)

    def store(self, part: Path, name: str, crc32c: str = "") -> dict[str, str]:
        size, value = part.stat().st_size, 0
        with part.open("rb") as f:
            while data := f.read(1 << 20):
                value = google_crc32c.extend(value, data)
        found = base64.b64encode(value.to_bytes(4, "big")).decode()
        assert not crc32c or crc32c == found, "other bytes arrived than were stated"
        said = {"name": name, "bucket": "bench", "size": str(size), "crc32c": found}
        said["generation"] = str(time.time_ns() // 1000)
        os.replace(part, self.object_file(name))
        self.facts(name).write_text(json.dumps(said))
        return said

    def part(self) -> Path:
        return self.folder / "parts" / os.urandom(8).hex()

    def whole(self, headers: dict[str, str], length: int) -> None:
        boundary = re.search(r'boundary="?([^";]+)', headers["content-type"])
        assert boundary
        mark = b"--" + boundary[1].encode()
        head, facts = b"", b""
        while head.count(mark) < 2 or not head.endswith(b"\r\n\r\n"):
            head += self.stream.readline()
        facts = head.split(b"\r\n\r\n", 2)[1]
        tail = len(b"\r\n" + mark + b"--")
        part = self.part()
        self.receive(part, length - len(head) - tail)
        rest = self.stream.read(tail)
        assert rest.strip() == mark + b"--", rest
        said = json.loads(facts.rpartition(b"\r\n" + mark)[0] or facts)
        self.answer(200, self.store(part, said["name"], said.get("crc32c", "")))

    def begin(self, said: dict[str, str], headers: dict[str, str]) -> None:
        part = self.part()
        part.with_suffix(".json").write_text(json.dumps({**said, "size": int(headers["x-upload-content-length"])}))
        part.touch()
        self.answer(
            200, {}, [f"Location: {self.url}/upload/storage/v1/b/bench/o?uploadType=resumable&session={part.name}"]
        )

    def chunk(self, session: str, headers: dict[str, str], length: int) -> None:
        part = self.folder / "parts" / session
        said = json.loads(part.with_suffix(".json").read_bytes())
        match = re.match(r"bytes (\d+)-", headers.get("content-range", ""))
        if match:
            self.receive(part, length, int(match[1]))
        if (size := part.stat().st_size) < said["size"]:
            return self.answer(308, None, [f"Range: bytes=0-{size - 1}"] if size else [])
        return self.answer(200, self.store(part, said["name"], said.get("crc32c", "")))

    def listing(self, prefix: str, first: int) -> None:
        names = sorted(n for n in map(unquote, os.listdir(self.folder / "facts")) if n.startswith(prefix))
        more = {"nextPageToken": str(first + 1000)} if len(names) > first + 1000 else {}
        items = [json.loads(self.facts(n).read_bytes()) for n in names[first : first + 1000]]
        self.answer(200, {"items": items, **more})

    def download(self, name: str, headers: dict[str, str]) -> None:
        said = json.loads(self.facts(name).read_bytes())
        size = int(said["size"])
        first, last = 0, size - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            first, last = int(match[1]), min(int(match[2] or last), last)
        head = [
            f"Content-Length: {last - first + 1}", "Content-Type: application/octet-stream",
            f"ETag: \"{said['generation']}\"", f"x-goog-generation: {said['generation']}",
            "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT", f"x-goog-hash: crc32c={said['crc32c']}",
        ]  # fmt: skip
        if match:
            head.append(f"Content-Range: bytes {first}-{last}/{size}")
        lines = [f"HTTP/1.1 {206 if match else 200} OK", *head, "", ""]
        self.connection.sendall("\r\n".join(lines).encode())
        with self.object_file(name).open("rb") as f:
            while first <= last:
                first += os.sendfile(self.connection.fileno(), f.fileno(), first, last - first + 1)

    def xml(self, method: str, name: str, query: dict[str, str], headers: dict[str, str], length: int) -> None:
        """obstore's: whole objects, and uploads in parts."""
        if method in ("GET", "HEAD"):
            return self.download(name, headers)
        if method == "POST" and "uploads" in query:
            upload = self.part()
            upload.mkdir()
            text = f"<InitiateMultipartUploadResult><UploadId>{upload.name}</UploadId></InitiateMultipartUploadResult>"
            return self.answer(200, text.encode())
        if method == "PUT" and "partNumber" in query:
            self.receive(self.folder / "parts" / query["uploadId"] / query["partNumber"].zfill(6), length)
            return self.answer(200, b"", [f"ETag: {query['partNumber']}"])
        if method == "POST":
            self.stream.read(length)
            whole = self.part()
            with whole.open("wb") as out:
                for part in sorted((self.folder / "parts" / query["uploadId"]).iterdir()):
                    with part.open("rb") as f:
                        os.copy_file_range(f.fileno(), out.fileno(), part.stat().st_size)
            said = self.store(whole, name)
            return self.answer(200, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>",
                               [f"x-goog-generation: {said['generation']}", 'ETag: "x"'])  # fmt: skip
        part = self.part()
        self.receive(part, length)
        said = self.store(part, name)
        return self.answer(200, b"", [f"x-goog-generation: {said['generation']}", f'ETag: "{said["generation"]}"'])

    def answer(self, status: int, said: Any = None, headers: list[str] | tuple[str, ...] = ()) -> None:
        data = said if isinstance(said, bytes) else json.dumps(said).encode() if said is not None else b""
        kind = "application/json" if data[:1] in b"{[" else "application/xml"
        lines = [f"HTTP/1.1 {status} OK", f"Content-Length: {len(data)}", f"Content-Type: {kind}", *headers, "", ""]
        self.connection.sendall("\r\n".join(lines).encode() + data)
