"""A small Google Cloud Storage on 127.0.0.1 for tests: the JSON API that the real client speaks, with faults on demand.

In:  `with Server() as s:` and STORAGE_EMULATOR_HOST=s.url; s.fault("download", "break", after=1000, times=2)
Out: s.objects, s.requests (operation, name, first byte) and s.received, to see what was sent and what was not.

Operations: list, stat, download, upload (of a whole object), session (begins a resumable upload), chunk (PUT of one), delete, permissions.
Faults: a status number; "reset" (closed before the request is acted on); "lost" (acted on, closed without an answer);
"break" (closed after `after` bytes of the body); "corrupt" (one byte changed); "stall" (no answer for `seconds`).
Like the real one it refuses bytes whose CRC32C is not the stated one, unless s.checks is False.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

from patience import PATIENCE

PIECE = 1 << 16


@dataclass
class Stored:
    data: bytes
    generation: int

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.value(self.data).to_bytes(4, "big")).decode()


@dataclass
class Fault:
    operation: str
    kind: str | int
    times: int
    after: int
    seconds: float


@dataclass
class Session:
    name: str
    size: int
    crc32c: str
    match: str | None
    data: bytearray = field(default_factory=bytearray)
    made: Stored | None = None


class Server:
    def __init__(self, latency_s: float = 0.0) -> None:
        self.objects: dict[str, Stored] = {}
        self.sessions: dict[str, Session] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.authorizations: list[str | None] = []
        self.received = self.sent_bytes = 0
        self.pause_at = 0  # received and sent bytes at which everything stands still until `resume`; 0 = never
        self.resume = threading.Event()
        self.checks = True
        self.permissions = {"storage.objects.create", "storage.objects.get", "storage.objects.delete"}
        self.latency_s = latency_s
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.closing = threading.Event()
        self.http = Http(("127.0.0.1", 0), Handler)
        self.http.server = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def fault(self, operation: str, kind: str | int, times: int = 1, after: int = 0, seconds: float = 30) -> None:
        self.faults.append(Fault(operation, kind, times, after, seconds))

    def take(self, operation: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.operation == operation and fault.times:
                    fault.times -= 1
                    return fault
        return None

    def store(self, name: str, data: bytes, crc32c: str, match: str | None) -> tuple[int, Stored | None, str]:
        """(status, object, message), under the generation precondition."""
        with self.lock:
            old = self.objects.get(name)
            if match is not None and int(match) != (old.generation if old else 0):
                return 412, None, "conditionNotMet"
            new = Stored(data, next(self.numbers))
            if self.checks and crc32c and crc32c != new.crc32c:
                return 400, None, f'Provided CRC32C "{crc32c}" doesn\'t match calculated CRC32C "{new.crc32c}".'
            self.objects[name] = new
            return 200, new, ""

    @property
    def moved(self) -> int:
        return self.received + self.sent_bytes

    def sent(self, operation: str) -> list[int]:
        """First bytes of the requests of one operation."""
        return [start for o, _, start in self.requests if o == operation]


def xml_facts(stored: Stored) -> dict[str, str]:
    """Headers of the XML API."""
    generation = str(stored.generation)
    said = {"ETag": f'"{generation}"', "x-goog-generation": generation, "x-goog-hash": f"crc32c={stored.crc32c}"}
    return {**said, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exc_info()[1], (OSError, ValueError)
        ):  # a client that was killed, or a socket closed by a fault
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    @property
    def mine(self) -> Server:
        return self.server.server  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_POST = do_PUT = do_DELETE = do_GET

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        time.sleep(self.mine.latency_s)
        operation, name = self.operation(url.path, query)
        start = self.first_byte(operation)
        self.mine.requests.append((operation, name, start))
        self.mine.authorizations.append(self.headers.get("Authorization"))
        fault = self.mine.take(operation)
        body = self.body(fault)
        if body is None or (fault and fault.kind == "reset"):
            return self.close()
        if fault and isinstance(fault.kind, int):
            return self.answer(fault.kind, {"error": {"code": fault.kind, "message": f"fault {fault.kind}"}})
        if fault and fault.kind == "stall":
            self.mine.closing.wait(fault.seconds)
            return self.close()
        getattr(self, f"on_{operation}")(name, query, body, fault)

    def operation(self, path: str, query: dict[str, str]) -> tuple[str, str]:
        if "session" in query:
            return "chunk", query["session"]
        if match := re.fullmatch(r"/upload/storage/v1/b/[^/]+/o", path):
            return ("session" if query["uploadType"] == "resumable" else "upload"), query.get("name", "")
        if path.endswith("/iam/testPermissions"):
            return "permissions", ""
        if match := re.fullmatch(r"(/download)?/storage/v1/b/[^/]+/o/(.+)", path):
            kind = (
                "delete"
                if self.command == "DELETE"
                else "download"
                if match[1] or query.get("alt") == "media"
                else "stat"
            )
            return kind, unquote(match[2])
        if match := re.fullmatch(r"/(?!storage/|upload/|download/)[^/]+/(.+)", path):
            return ("upload" if self.command == "PUT" else "download"), unquote(
                match[1]
            )  # the XML API, which obstore speaks
        return "list", ""

    def first_byte(self, operation: str) -> int:
        said = self.headers.get("Range" if operation == "download" else "Content-Range", "")
        match = re.match(r"bytes[= ](\d+)-", said)
        return int(match[1]) if match else -1 if said else 0

    def body(self, fault: Fault | None) -> bytes | None:
        """The request's body; None when the connection is to break inside it."""
        length = int(self.headers.get("Content-Length") or 0)
        cut = bool(fault and fault.kind == "break" and length)
        data = self.read(min(length, fault.after) if cut and fault else length)
        cut = len(data) < length  # by the fault, or because the client was killed
        if cut and self.first_byte("chunk") >= 0 and "session=" in self.path:
            self.accept(parse_qs(urlsplit(self.path).query)["session"][0], data)  # whole 256 KiB stay
        if fault and fault.kind == "corrupt" and length:
            flipped = bytearray(data)
            flipped[len(data) // 2] ^= 1
            data = bytes(flipped)
        return None if cut else data

    def read(self, length: int) -> bytes:
        pieces = []
        while length and (piece := self.rfile.read(min(length, PIECE))):
            pieces.append(piece)
            length -= len(piece)
            self.mine.received += len(piece)
            if self.pause():
                break
        return b"".join(pieces)

    def pause(self) -> bool:
        """Stands still where the test says so; what the client has sent beyond that is lost."""
        stop = bool(self.mine.pause_at and self.mine.moved >= self.mine.pause_at)
        return stop and self.mine.resume.wait(PATIENCE)

    def close(self) -> None:
        """As a broken network does it: a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def answer(
        self, status: int, said: Any = None, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        if fault and fault.kind == "lost":
            return self.close()
        data = said if isinstance(said, bytes) else json.dumps(said).encode() if said is not None else b""
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if fault and fault.kind == "break":
            self.wfile.write(data[: fault.after])
            self.wfile.flush()
            return self.close()
        for start in range(0, len(data), PIECE):
            self.wfile.write(data[start : start + PIECE])
            self.wfile.flush()
            self.mine.sent_bytes += min(PIECE, len(data) - start)
            if self.pause():
                return self.close()

    def error(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"code": status, "message": message}})

    def described(self, name: str, stored: Stored) -> dict[str, str]:
        facts = {"size": str(len(stored.data)), "crc32c": stored.crc32c, "generation": str(stored.generation)}
        return {"kind": "storage#object", "bucket": "b", "name": name, **facts}

    def on_list(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        names = sorted(n for n in self.mine.objects if n.startswith(query.get("prefix", "")))
        first = int(query.get("pageToken", 0))
        page = names[first : first + 100]
        more = {"nextPageToken": str(first + 100)} if len(names) > first + 100 else {}
        self.answer(200, {"items": [self.described(n, self.mine.objects[n]) for n in page], **more}, fault=fault)

    def on_permissions(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        asked = parse_qs(urlsplit(self.path).query)["permissions"]
        self.answer(200, {"permissions": [p for p in asked if p in self.mine.permissions]}, fault=fault)

    def on_stat(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        stored = self.mine.objects.get(name)
        self.answer(200, self.described(name, stored), fault=fault) if stored else self.error(404, "no such object")

    def on_delete(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        stored = self.mine.objects.get(name)
        if stored is None:
            return self.error(404, "no such object")
        if int(query.get("ifGenerationMatch", stored.generation)) != stored.generation:
            return self.error(412, "conditionNotMet")
        del self.mine.objects[name]
        self.answer(204, fault=fault)

    def on_download(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        stored = self.mine.objects.get(name)
        if stored is None or int(query.get("generation", stored.generation)) != stored.generation:
            return self.error(404, "no such object")
        data, status, headers = stored.data, 200, {"Content-Type": "application/octet-stream", **xml_facts(stored)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if fault and fault.kind == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.answer(status, data, headers, fault)

    def on_upload(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        if self.command == "PUT":
            stated, match = (self.headers.get(f"x-goog-{what}", "") for what in ("hash", "if-generation-match"))
            status, made, message = self.mine.store(name, body, stated.removeprefix("crc32c="), match or None)
            return self.answer(200, b"", xml_facts(made), fault) if made else self.error(status, message)
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        _, facts, data, _ = body.split(b"--" + boundary[1].encode(), 3)
        said = json.loads(facts.split(b"\r\n\r\n", 1)[1])
        data = data.split(b"\r\n\r\n", 1)[1][:-2]
        self.stored(said["name"], data, said.get("crc32c", ""), query.get("ifGenerationMatch"), fault)

    def stored(self, name: str, data: bytes, crc32c: str, match: str | None, fault: Fault | None) -> Stored | None:
        status, made, message = self.mine.store(name, data, crc32c, match)
        if made is None:
            self.error(status, message)
        else:
            self.answer(200, self.described(name, made), fault=fault)
        return made

    def on_session(self, name: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        said, key = json.loads(body), f"s{next(self.mine.numbers)}"
        size = int(self.headers["X-Upload-Content-Length"])
        self.mine.sessions[key] = Session(said["name"], size, said.get("crc32c", ""), query.get("ifGenerationMatch"))
        where = f"{self.mine.url}/upload/storage/v1/b/b/o?uploadType=resumable&session={key}"
        self.answer(200, {}, {"Location": where}, fault)

    def accept(self, key: str, data: bytes, whole: bool = False) -> None:
        session, start = self.mine.sessions[key], self.first_byte("chunk")
        assert start <= len(session.data), "a hole in the upload"
        kept = data if whole else data[: len(data) >> 18 << 18]
        session.data[start:] = kept

    def on_chunk(self, key: str, query: dict[str, str], body: bytes, fault: Fault | None) -> None:
        session = self.mine.sessions.get(key)
        if session is None:
            return self.error(410, "the session has ended")
        if session.made:
            return self.answer(200, self.described(session.name, session.made), fault=fault)
        if self.first_byte("chunk") >= 0:
            self.accept(key, body, whole=True)
        if len(session.data) < session.size:
            last = {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {}
            return self.answer(308, headers=last, fault=fault)
        session.made = self.stored(session.name, bytes(session.data), session.crc32c, session.match, fault)
        if session.made is None:
            del self.mine.sessions[key]
