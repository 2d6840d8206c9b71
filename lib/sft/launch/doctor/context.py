"""What the doctor examines, and the rows that its checks return.

A check is a function of a `Context` that yields rows (state, what, found, next command). The table shows an SftError that
it raises as a red row. Standard library only.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from sft.common.errors import SftError
from sft.formats.dataset import DatasetInfo
from sft.recipe import recipe, schema
from sft.recipe.architecture import ModelConfig
from sft.recipe.base_config import Base
from sft.recipe.resolve import resolve
from sft.runner import bases, plan
from sft.runner.processes import processes

OK, NOTE, RED, SKIPPED = "ok", "note", "RED", "-"
"""The states of a row: fine, worth knowing, stops the run, not checked."""
# GB of one GPU by a pattern of its name in a cluster's file, in a recipe or on Beaker. The first match counts.
MEMORY_GB = (
    (r"B300", 288.0), (r"GB200", 186.0), (r"B200", 180.0), (r"H200", 141.0), (r"H100 NVL", 94.0), (r"H100", 80.0),
    (r"A100 40 ?GB", 40.0), (r"A100 80 ?GB", 80.0), (r"L40S?", 48.0), (r"(RTX )?A6000", 48.0), (r"RTX 8000", 48.0),
    (r"(RTX )?A5000", 24.0), (r"L4", 24.0), (r"A10", 24.0), (r"T4", 16.0), (r"P100", 16.0), (r"P4", 8.0),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table. `next` is the command or the edit that helps."""

    state: str
    what: str
    found: str
    next: str = ""


class SchedulerAnswer(NamedTuple):
    """What a scheduler answered to the doctor: the type of the cluster's GPUs, or "" if unknown, and rows of the table."""

    gpu: str = ""
    rows: tuple[Row, ...] = ()


class LauncherChecks(Protocol):
    """The doctor's part of a launcher; sft.launch.launcher describes the whole."""

    def check(self, context: Context) -> Iterator[Row]: ...
    def ask(self, context: Context) -> SchedulerAnswer: ...


def load_checks(launcher: str) -> LauncherChecks:
    """The module of a launcher by its name in the schema. Raises ModuleNotFoundError where a package that it needs is missing."""
    return cast(LauncherChecks, importlib.import_module(f"sft.launch.{launcher}"))


@dataclass(frozen=True)
class Context:
    """A run on a cluster, and the stages that are to run there."""

    place: plan.Place
    recipe: recipe.Recipe
    cluster: schema.Cluster
    stages: tuple[str, ...] = schema.STAGES
    imports: bool = False  # import tasks with their data, which may take a minute: `make doctor` and launchers do

    @property
    def run(self) -> Path:
        return self.place.runs / self.recipe.run

    @property
    def file(self) -> str:
        """The name of the cluster's file, for messages."""
        return f"env/{self.place.cluster}.toml"

    def needs(self, *stages: str) -> bool:
        """Whether one of these stages is to run."""
        return not set(self.stages).isdisjoint(stages)

    def reads(self, field: str) -> bool:
        """Whether the cluster's launcher reads this field of the cluster's file."""
        launchers = next(f for f in dataclasses.fields(schema.Cluster) if f.name == field).metadata["launchers"]
        return not launchers or self.cluster.launcher in launchers

    @property
    def far(self) -> bool:
        """Whether jobs cannot see this machine's disks."""
        return self.cluster.launcher != "local" and not self.cluster.shared_disk

    @property
    def training(self) -> schema.Hardware:
        return self.recipe.hardware(self.place.cluster, "train")

    @property
    def ranks(self) -> int:
        """The number of training processes on all nodes."""
        return self.training.nodes * processes(self.training, self.cluster)[0]

    @property
    def prepared(self) -> DatasetInfo | None:
        """prepare's dataset.json; None before prepare."""
        try:
            return DatasetInfo.of(self.run / "prepare")
        except (OSError, SftError):
            return None

    @property
    def steps(self) -> int | None:
        """Optimizer steps: the recipe's, or about as many as the prepared tokens fill; None before prepare."""
        train, data = self.recipe.train, self.prepared
        if train.steps or data is None:
            return train.steps or None
        return max(1, round(train.epochs * data.splits["data"].tokens / train.global_batch_tokens))

    @property
    def model(self) -> ModelConfig | None:
        """The geometry; None where only the tokenizer or a remote base, which are not here yet, say it."""
        base = self.base
        if base is None and not self.recipe.model.preset:
            return None
        found = resolve(self.recipe.model, self.prepared.facts.vocab_size if self.prepared else 0, base)
        return found if found.vocab_size else None

    @property
    def base(self) -> Base | None:
        """What the base's config.json says; None for random weights and before sync brings a remote base."""
        return bases.find_base(self.place.roots, self.run, self.recipe)

    def with_gpu(self, reported: str = "") -> Context:
        """The context with the type of its GPUs: the recipe's, else the cluster file's, else the one the scheduler reported."""
        cluster = self.cluster
        name = self.training.gpu or cluster.gpu or reported
        same = not self.training.gpu or self.training.gpu == cluster.gpu  # the file's figures are of the file's type
        size = (cluster.gpu_memory_gb if same else 0.0) or memory_gb(name)
        tflops = cluster.gpu_tflops if same else 0.0
        planned = dataclasses.replace(cluster, gpu=name, gpu_memory_gb=size, gpu_tflops=tflops)
        return dataclasses.replace(self, cluster=planned)


def memory_gb(gpu: str) -> float:
    """GB of a GPU by its name, e.g. "NVIDIA A100 80GB"; 0 for an unknown type and for one of several sizes."""
    found = (size for name, size in MEMORY_GB if re.search(rf"(?<![A-Z0-9]){name}(?![A-Z0-9])", gpu.upper()))
    return next(found, 0.0)


def red(what: str, e: Exception) -> Row:
    """A red row from an error: its message, and the command after "next:"."""
    text = str(e)
    if "; next: " in text:
        found, _, then = text.rpartition("; next: ")
    else:
        found, _, then = text.partition("\nnext: ")
    return Row(RED, what, found.replace("\n", "; "), then)


def amount(size: float) -> str:
    """Bytes for people: 1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def hours_text(hours: float) -> str:
    """Hours for people: 1.5 -> "90 min", 2.25 -> "2.2 h"."""
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
