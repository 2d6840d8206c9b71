"""remote.json: what sync put on the storage that training reads from.

    {"dataset": "datasets/<16 hex>", "base": "base/<name>-<16 hex>" or null, "files": [{"path", "bytes", "sha256"}]}

All paths are relative to the root of the storage. Only sync's manifest names the root (`SyncMetrics.storage`), so the same
content on another cluster is the same result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.manifest import FileList, Manifest, Output
from sft.formats.record import Record, to_json

NAME = "remote.json"


@dataclass(frozen=True)
class Remote(Record):
    """The dataset, the base weights (None when training starts from random weights), and all files of both."""

    NEXT: ClassVar[str] = "make sync again"
    ASCII: ClassVar[bool] = True
    dataset: str
    base: str | None
    files: tuple[Output, ...]

    def below(self, folder: str) -> list[Output]:
        """The files of one folder, with paths relative to it."""
        top = f"{folder}/"
        return [dataclasses.replace(f, path=f.path.removeprefix(top)) for f in self.files if f.path.startswith(top)]


@dataclass(frozen=True)
class SyncMetrics(Record):
    """The metrics in sync's manifest. `dataset` and `base` are whole addresses; `bytes` is the size of all files."""

    NEXT: ClassVar[str] = "make sync again"
    storage: str
    dataset: str
    base: str | None
    files: int
    bytes: int
    base_commit: str | None = None

    @classmethod
    def of(cls, made: Manifest, name: str) -> SyncMetrics:
        """From sync's manifest; `name` opens the error message. Raises SftError."""
        return cls.from_value(made.metrics, f"{name}: metrics")

    def to_metrics(self) -> dict[str, Any]:
        return dict(to_json(self))


def list_problems(dataset: Path, base: Path | None, prepared: str) -> list[str]:
    """What is wrong with the lists of files of a synced dataset and base, which prove that the copies are complete.

    `prepared`: the digest of prepare's manifest, of which the dataset's list is a copy.
    """
    file, problems = dataset / manifest.NAME, []
    try:
        if manifest.load(file).digest != prepared:
            problems.append(f"{file}: it is of another dataset")
        if base:
            FileList.read(base.with_name(f"{base.name}.json"))
    except SftError as error:
        problems.append(str(error).partition("; next:")[0])
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
    return problems
