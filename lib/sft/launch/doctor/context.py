"""What the doctor examines, and what a check says of it.

A check is a function of a `Case` that yields rows (state, what, found, next command). It raises SftError for what no row was
written for; the table shows that in red. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.recipe import presets, recipe, schema
from sft.runner import plan
from sft.runner.processes import processes

OK, NOTE, RED, LEFT = "ok", "note", "RED", "-"
# GB of one GPU by a pattern of the name that a cluster's file, a recipe or Beaker gives; the first that matches counts.
MEMORY_GB = (
    (r"B300", 288.0), (r"GB200", 186.0), (r"B200", 180.0), (r"H200", 141.0), (r"H100 NVL", 94.0), (r"H100", 80.0),
    (r"A100 40 ?GB", 40.0), (r"A100 80 ?GB", 80.0), (r"L40S?", 48.0), (r"(RTX )?A6000", 48.0), (r"RTX 8000", 48.0),
    (r"(RTX )?A5000", 24.0), (r"L4", 24.0), (r"A10", 24.0), (r"T4", 16.0), (r"P100", 16.0), (r"P4", 8.0),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    state: str
    what: str
    found: str
    next: str = ""


@dataclass(frozen=True)
class Case:
    """What is examined: a run on a cluster, and which stages the answer matters for."""

    place: plan.Place
    recipe: recipe.Recipe
    cluster: schema.Cluster
    stages: tuple[str, ...] = schema.STAGES

    @property
    def run(self) -> Path:
        return self.place.runs / self.recipe.run

    @property
    def file(self) -> str:
        return f"env/{self.place.cluster}.toml"

    def needs(self, *stages: str) -> bool:
        return not set(self.stages).isdisjoint(stages)

    @property
    def far(self) -> bool:
        """Whether jobs see other disks than this machine."""
        return self.cluster.launcher != "local" and not self.cluster.shared_disk

    @property
    def training(self) -> schema.Hardware:
        return self.recipe.hardware(self.place.cluster, "train")

    @property
    def ranks(self) -> int:
        return self.training.nodes * processes(self.training, self.cluster)[0]

    @property
    def prepared(self) -> dict[str, Any] | None:
        """What prepare says of the data, when it is done."""
        try:
            return json.loads((self.run / "prepare" / "dataset.json").read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def steps(self) -> int | None:
        """Optimizer steps: stated, or about those that the prepared tokens fill; None before prepare."""
        train, data = self.recipe.train, self.prepared
        if train.steps or data is None or not data.get("tokens"):
            return train.steps or None
        return max(1, round(train.epochs * data["tokens"] / train.global_batch_tokens))

    @property
    def model(self) -> presets.ModelConfig | None:
        """The geometry, or None while the vocabulary is only known to a tokenizer that was not read yet."""
        found = presets.resolve(self.recipe.model, int((self.prepared or {}).get("vocab_size") or 0))
        return found if found.vocab_size else None

    def with_gpu(self, told: str = "") -> Case:
        """The case with what is known of its GPUs: the recipe's word, the cluster file's, else what the scheduler told."""
        cluster = self.cluster
        name = self.training.gpu or cluster.gpu or told
        stated = not self.training.gpu or self.training.gpu == cluster.gpu  # the file's figures are of its own type
        size = (cluster.gpu_memory_gb if stated else 0.0) or memory_gb(name)
        tflops = cluster.gpu_tflops if stated else 0.0
        planned = dataclasses.replace(cluster, gpu=name, gpu_memory_gb=size, gpu_tflops=tflops)
        return dataclasses.replace(self, cluster=planned)


def memory_gb(gpu: str) -> float:
    """GB of a GPU by name, e.g. "NVIDIA A100 80GB"; 0 where it is not known or the type has several sizes."""
    found = (size for name, size in MEMORY_GB if re.search(rf"(?<![A-Z0-9]){name}(?![A-Z0-9])", gpu.upper()))
    return next(found, 0.0)


def red(what: str, e: Exception) -> Row:
    found, _, then = (
        str(e).rpartition("; next: ")
        if "; next: " in str(e)
        else (str(e).partition("\nnext: ")[0], "", str(e).partition("\nnext: ")[2])
    )
    return Row(RED, what, found.replace("\n", "; "), then)


def amount(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def hours_text(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
