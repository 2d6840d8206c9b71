"""manifest.json: the record that a stage writes last, and the proof that its folder is whole. Standard library only.

    {"schema": 2, "stage": "train", "run": "smoke", "cluster": "local", "key": "sha256:…", "version": 1,
     "config": {…exactly what the key hashed…},
     "inputs": [{"manifest": "../sync/manifest.json", "sha256": "…"}, {"file": "smoke/train.jsonl", "bytes": 1, "sha256": "…"}],
     "outputs": [{"path": "data/token_ids_part_0000.npy", "bytes": 1, "sha256": "…"}],
     "metrics": {…}, "provenance": {"git", "dirty", "argv", "host", "started", "finished", "versions"}, "seal": "…"}

Paths are relative to the manifest, so that a copied run still verifies. A manifest's digest covers what was made and
from what (stage, key, inputs, outputs). It leaves out time and place, so equal content has an equal digest on every machine. An output that is `measured` has times in
it, and the digest leaves it out too. The seal is the sha256 of everything else in the file, so a changed figure is found. Schema 2 has a seal.
Manifests of schema 1 are read: the oldest have none.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from sft.common.errors import SftError
from sft.common.files import canonical, hash_file
from sft.common.paths import inside
from sft.formats.record import FormatError, Record, VersionError, to_json

NAME = "manifest.json"
FEW_FILES, FEW_BYTES = 16, 1 << 20
"""Threads that hash up to so many files and bytes take longer to start than to work."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Output:
    """One file that a stage made. `path` is relative to the manifest; `bytes` is its size; `sha256` is hex."""

    path: str
    bytes: int
    sha256: str
    measured: bool | None = None
    """True for a file with times in it, which differ between two runs of the same work."""


@dataclass(frozen=True)
class Input:
    """What a stage was made from: another stage's manifest (sha256 = its digest) or a file that the recipe names."""

    manifest: str | None = None
    file: str | None = None
    bytes: int | None = None
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.manifest or self.file or ""


@dataclass(frozen=True)
class Provenance:
    """The commit, command, host, times and package versions behind a result. It is for people: no key or digest covers it.

    `started` and `finished` are times in ISO 8601, in UTC.
    """

    git: str = ""
    dirty: bool = False
    argv: tuple[str, ...] = ()
    host: str = ""
    started: str = ""
    finished: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest(Record):
    """A stage's manifest. `config` is what the key hashed; `metrics` are the stage's figures (see the stage's format)."""

    NEXT: ClassVar[str] = "run the stage again"
    SCHEMA: ClassVar[int] = 2
    """Since 2 every manifest has a seal."""
    schema: int
    stage: str
    run: str
    key: str
    config: dict[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    metrics: dict[str, Any]
    cluster: str | None = None
    version: int | None = None
    provenance: Provenance | None = None
    seal: str | None = None

    @classmethod
    def parse(cls, value: Any) -> Self:
        check_schema(cls, value, 1, cls.SCHEMA)
        made = super().parse(value)
        if made.seal is None and (made.schema > 1 or "seal" in value):
            raise FormatError("it has no seal: it was changed after it was written")
        if made.seal is not None and made.seal != seal(value):
            raise FormatError("its seal is not that of its content: a value was changed after it was written")
        for entry in made.inputs:
            if not entry.name or not entry.sha256:
                raise FormatError(f"input {to_json(entry)} has no name or no sha256")
        return made

    @property
    def digest(self) -> str:
        """sha256 (hex) of what was made and from what. It says schema 1 for every schema: equal content has an equal digest."""
        value = {**to_json(self), "schema": 1}
        value["outputs"] = [entry for entry in value["outputs"] if not entry.get("measured")]
        return hashlib.sha256(
            canonical({k: value[k] for k in ("schema", "stage", "key", "inputs", "outputs")})
        ).hexdigest()

    def to_value(self) -> dict[str, Any]:
        order = ("schema", "stage", "run", "cluster", "key", "version", "config", "inputs", "outputs", "metrics",
                 "provenance")  # fmt: skip
        value = to_json(self)
        value = {k: value[k] for k in order if k in value}
        return {**value, "seal": seal(value)}


def seal(value: Mapping[str, Any]) -> str:
    """sha256 (hex) of a manifest's JSON value without its seal."""
    return hashlib.sha256(canonical({k: v for k, v in value.items() if k != "seal"})).hexdigest()


@dataclass(frozen=True)
class StepManifest(Record):
    """manifest.json of a checkpoint's folder stepN: its files."""

    NEXT: ClassVar[str] = "copy the step again, or use another one"
    SCHEMA: ClassVar[int] = 1
    ASCII: ClassVar[bool] = True
    schema: int
    step: int
    outputs: tuple[Output, ...]

    @classmethod
    def parse(cls, value: Any) -> Self:
        check_schema(cls, value, cls.SCHEMA, cls.SCHEMA)
        return super().parse(value)


def check_schema(cls: type[Record], value: Any, oldest: int, newest: int) -> None:
    """Raises VersionError unless the value says a schema that this code reads."""
    if not isinstance(value, dict):
        raise FormatError("not an object")
    found = value.get("schema")
    if type(found) is not int or not oldest <= found <= newest:
        raise VersionError(cls, found, "schema", newest)


@dataclass(frozen=True)
class FileList(Record):
    """<name>.json beside a folder of base weights in a storage: the files of the folder."""

    NEXT: ClassVar[str] = "make sync again"
    ASCII: ClassVar[bool] = True
    files: tuple[Output, ...] = field(default=())


def listed_outputs(data: bytes, name: str) -> tuple[Output, ...]:
    """The outputs in the bytes of a stage's or a step's manifest. Raises SftError for a damaged one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SftError(f"{name}: damaged: not JSON ({error}); next: {Manifest.NEXT}") from None
    kind: type[Manifest] | type[StepManifest] = (
        StepManifest if isinstance(value, dict) and "step" in value else Manifest
    )
    return kind.from_value(value, name).outputs


def load(file: Path) -> Manifest:
    """A stage's manifest. Raises FileNotFoundError, or SftError for one that is damaged or of another schema."""
    return Manifest.read(file)


def key(stage: str, version: int, config: Mapping[str, Any], upstream: Iterable[str]) -> str:
    """The name of a stage's result before it exists: its options, the stage's version and the upstream keys."""
    body = {"stage": stage, "version": version, "config": config, "upstream": list(upstream)}
    return "sha256:" + hashlib.sha256(canonical(body)).hexdigest()


def describe(root: Path, paths: Iterable[str], known: Mapping[str, str] | None = None) -> tuple[Output, ...]:
    """One output per file, for files and folders named relative to `root`. `known` maps some files to their sha256.

    Raises SftError for a link or a missing path.
    """
    files: list[str] = []
    for name in paths:
        path = inside(root, name, f"output of {root.name}")
        if not path.exists():
            raise SftError(f"{path}: the stage names this output but did not write it")
        found = sorted(p for p in path.rglob("*") if not p.is_dir() or p.is_symlink()) if path.is_dir() else [path]
        if links := [str(p) for p in found if p.is_symlink()]:
            raise SftError(f"outputs must not be links: {', '.join(links)}")
        files += [p.relative_to(root).as_posix() for p in found]
    sizes = [(root / f).stat().st_size for f in files]
    hashes = _mapped(lambda f: (known or {}).get(f) or hash_file(root / f), files, sum(sizes))
    return tuple(map(Output, files, sizes, hashes))


def is_whole(folder: Path) -> bool:
    """Whether the folder has a well-formed manifest and every byte it lists."""
    try:
        return not broken_outputs(folder, load(folder / NAME).outputs)
    except (FileNotFoundError, SftError):
        return False


def strays(folder: Path, outputs: Iterable[Output], beside: Iterable[str] = ()) -> list[str]:
    """Files of a stage's folder that its manifest does not list, relative to the folder.

    `beside`: patterns of names at the top of the folder that the stage keeps there, also folders. Names of the operating system are left out.
    """
    listed, patterns = {o.path for o in outputs}, (NAME, *beside)
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        kept = any(fnmatch.fnmatchcase(name.partition("/")[0], pattern) for pattern in patterns)
        if (
            name not in listed
            and not kept
            and not path.is_dir()
            and path.name != ".DS_Store"
            and path.name[:4] != ".nfs"
        ):
            found.append(name)
    return found


def broken_outputs(folder: Path, outputs: Iterable[Output]) -> list[str]:
    """What is wrong with the files that a manifest lists: one line per missing, short or altered file."""

    def check(entry: Output) -> str | None:
        file = inside(folder, entry.path, f"{folder / NAME}: outputs")
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != entry.bytes:
            return f"{file} has {size} bytes, the manifest says {entry.bytes}"
        if (found := hash_file(file)) != entry.sha256:
            return f"{file} has sha256 {found[:16]}…, the manifest says {entry.sha256[:16]}…"
        return None

    entries = list(outputs)
    return [line for line in _mapped(check, entries, sum(entry.bytes for entry in entries)) if line]


def _mapped(work: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
    """`work` of each file, in threads where that takes less time. `size`: bytes of all of them."""
    if len(items) <= FEW_FILES and size <= FEW_BYTES:
        return list(map(work, items))
    from concurrent.futures import ThreadPoolExecutor  # start-up: the planner hashes no outputs

    with ThreadPoolExecutor() as pool:
        return list(pool.map(work, items))
