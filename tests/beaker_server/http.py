"""The part of Beaker's API that is HTTP: creating experiments, and the files of datasets."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from beaker_server.experiments import ExperimentCalls
from beaker_server.state import Dataset, now

LIMIT = 32 << 20  # bytes of one request


def digest_of(data: bytes | bytearray) -> str:
    return "SHA256 " + base64.b64encode(hashlib.sha256(data).digest()).decode()


class Handler(BaseHTTPRequestHandler):
    beaker: ExperimentCalls
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _parts(self) -> tuple[list[str], dict[str, str]]:
        url = urlsplit(self.path)
        path = url.path.removeprefix("/api/v3")
        return [unquote(p) for p in path.strip("/").split("/")], {k: v[0] for k, v in parse_qs(url.query).items()}

    def _storage(self, dataset: Dataset) -> dict[str, Any]:
        key = dataset.message.id
        return {"id": key, "token": "storage-token", "tokenExpires": "2099-01-01T00:00:00Z", "address": self.beaker.url}

    def do_POST(self) -> None:
        parts, query = self._parts()
        if parts == ["uploads"]:
            key = self.beaker._name("upload")
            self.beaker.uploads[key] = bytearray()
            return self._answer(200, headers={"Upload-ID": key})
        body = json.loads(self._body() or b"{}")
        if parts[0] == "workspaces" and parts[2] == "experiments":
            fault = self.beaker._take("create")
            if fault and isinstance(fault.kind, int):
                return self._answer(fault.kind, {"message": "the server is broken"})
            if fault and fault.kind == "dropped":
                self.close_connection = True
                return None
            if refusal := self.beaker.refusal(body, query.get("name", "")):
                return self._answer(refusal[0], {"message": refusal[1]})
            made = self.beaker.create(body, query.get("name", ""))
            if fault and fault.kind == "lost":
                self.close_connection = True
                return None
            return self._answer(200, {"id": made.message.id})
        if parts == ["datasets"]:
            if self.beaker.find_dataset(query["name"]):
                return self._answer(409, {"message": "dataset name is already in use"})
            made_dataset = self.beaker.make_dataset(query["name"])
            return self._answer(200, {"id": made_dataset.message.id, "storage": self._storage(made_dataset)})
        return self._answer(404, {"message": self.path})

    def do_PUT(self) -> None:
        parts, _ = self._parts()
        if parts[0] == "datasets" and parts[2] == "files":
            file = self.beaker.datasets[parts[1]].folder.joinpath(*parts[3:])
            file.parent.mkdir(parents=True, exist_ok=True)
            data = self._body()
            if digest := self.headers.get("Digest"):  # the content is that of an upload
                found = [bytes(u) for u in self.beaker.uploads.values() if digest_of(u) == digest]
                if data or not found:
                    return self._answer(400, {"message": f"no upload has the digest {digest}"})
                data = found[0]
            elif len(data) > LIMIT:
                return self._answer(413, {"message": "larger than one request may be"})
            file.write_bytes(data)
            return self._answer(200)
        return self._answer(404, {"message": self.path})

    def do_PATCH(self) -> None:
        parts, _ = self._parts()
        data = self._body()
        if parts[0] == "uploads":
            return self._piece(self.beaker.uploads[parts[1]], data)
        self.beaker.datasets[parts[1]].message.committed.CopyFrom(now())
        return self._answer(200)

    def _piece(self, upload: bytearray, data: bytes) -> None:
        """A piece of a file at its offset; the last one is answered with the digest of the whole."""
        fault = self.beaker._take("piece")
        if fault and fault.kind == "dropped":
            self.close_connection = True
            return None
        length, offset = int(self.headers["Upload-Length"]), int(self.headers["Upload-Offset"])
        if len(data) > LIMIT or offset + len(data) > length or offset > len(upload):
            return self._answer(
                400, {"message": f"a piece of {len(data)} at {offset} of {length}, {len(upload)} are here"}
            )
        upload[offset : offset + len(data)] = data
        return self._answer(200, headers={"Digest": digest_of(upload)} if len(upload) == length else {})

    def do_GET(self) -> None:
        parts, _ = self._parts()
        if parts[0] == "datasets" and len(parts) == 2:
            return self._answer(200, {"storage": self._storage(self.beaker.datasets[parts[1]])})
        if parts[0] == "datasets" and parts[2] == "files":
            fault = self.beaker._take("download")
            data = self.beaker.datasets[parts[1]].folder.joinpath(*parts[3].split("/")).read_bytes()
            return self._answer(200, data if not fault else data[: len(data) // 2])
        return self._answer(404, {"message": self.path})
