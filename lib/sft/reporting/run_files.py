"""The files of a run that the report shows, each read once.

In: the folder of a run. Out: the manifests of the stages that are done, and the records of their other files.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TypeVar

from sft.common.errors import SftError
from sft.formats import dataset, gate, manifest, metrics, preview, results
from sft.formats.dataset import DatasetInfo
from sft.formats.gate import ConvertMetrics, GateRecord
from sft.formats.manifest import Manifest
from sft.formats.metrics import MetricsRecord, TrainMetrics
from sft.formats.preview import Preview
from sft.formats.record import Record
from sft.formats.results import Results
from sft.recipe import schema
from sft.reporting import trainings

R = TypeVar("R", bound=Record)


class RunFiles:
    """A run. Every property is None when its stage is not done, and raises SftError for a damaged or missing file."""

    def __init__(self, folder: Path) -> None:
        """A stage with a damaged manifest counts as not done."""
        self.folder = folder
        self.done: dict[str, Manifest] = {}
        for stage in schema.STAGES:
            try:
                self.done[stage] = manifest.load(folder / stage / manifest.NAME)
            except (FileNotFoundError, SftError):
                continue

    @cached_property
    def dataset(self) -> DatasetInfo | None:
        return self._read(DatasetInfo, "prepare", dataset.NAME)

    @cached_property
    def preview(self) -> Preview | None:
        return self._read(Preview, "prepare", preview.NAME)

    @cached_property
    def train(self) -> TrainMetrics | None:
        return TrainMetrics.of(self.done["train"], self._manifest("train")) if "train" in self.done else None

    @cached_property
    def steps(self) -> list[MetricsRecord]:
        """Steps and headers of attempts, and the steps of the run that training continued; empty when train is not done."""
        if "train" not in self.done:
            return []
        self.check("train", metrics.NAME)
        return trainings.joined(self.folder)

    @cached_property
    def convert(self) -> ConvertMetrics | None:
        return ConvertMetrics.of(self.done["convert"], self._manifest("convert")) if "convert" in self.done else None

    @cached_property
    def gate(self) -> GateRecord | None:
        return self._read(GateRecord, "convert", gate.NAME)

    @cached_property
    def results(self) -> Results | None:
        return self._read(Results, "evaluate", results.NAME)

    def _manifest(self, stage: str) -> str:
        return str(self.folder / stage / manifest.NAME)

    def _read(self, kind: type[R], stage: str, name: str) -> R | None:
        if stage not in self.done:
            return None
        self.check(stage, name)
        return kind.read(self.folder / stage / name)

    def check(self, stage: str, top: str) -> None:
        """Compares a file of a stage, or a folder's files, with the stage's manifest. Raises SftError: what is damaged is not shown."""
        listed = [o for o in self.done[stage].outputs if o.path == top or o.path.startswith(f"{top}/")]
        if broken := manifest.broken_outputs(self.folder / stage, listed):
            raise SftError(f"{broken[0]}; next: make verify RUN={self.folder.name}")
