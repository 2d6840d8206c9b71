"""elsewhere.json: the place of the outputs of a stage that ran on a machine whose disks are not here.

    {"where": "/weka/…/runs/<run>/train", "outputs": ["step300/…", …]}

It is stored beside the manifest. `outputs` are the files that are only there. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sft.formats.manifest import Output
from sft.formats.record import Record

NAME = "elsewhere.json"
UNLISTED = ("metrics.jsonl", "LATEST", "BEST", "evaluations.jsonl")
"""Small files of training that its manifest does not list and that people look at."""


@dataclass(frozen=True)
class Elsewhere(Record):
    """Where a stage's folder is, and which of its outputs are only there. Empty for a stage that was made here."""

    NEXT: ClassVar[str] = "remove the folder and make the stage again"
    ASCII: ClassVar[bool] = True
    where: str = ""
    outputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> Elsewhere:
        """The file of a stage's folder, or an empty one. Raises SftError for a damaged file."""
        try:
            return cls.read(folder / NAME)
        except FileNotFoundError:
            return cls()

    def here(self, folder: Path, outputs: Iterable[Output]) -> list[Output]:
        """The outputs in `folder` on this machine, which can be verified here: those that are not elsewhere, and those that came here too."""
        absent = set(self.outputs)
        return [o for o in outputs if o.path not in absent or (folder / o.path).is_file()]
