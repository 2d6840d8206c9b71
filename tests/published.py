"""Writes finished stages and steps for tests, through the formats' own writers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sft.formats import manifest
from sft.formats.manifest import Input, Manifest, Provenance, StepManifest
from sft.formats.metrics import StepRecord, TrainMetrics
from sft.formats.packs import StepSummary, TokensPerStep


def publish(
    folder: Path,
    outputs: Iterable[str],
    *,
    stage: str = "",
    run: str = "",
    key: str = "",
    config: dict[str, Any] | None = None,
    inputs: Sequence[Input] = (),
    metrics: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Manifest:
    """Writes the manifest of a stage's folder, runs/<run>/<stage>, and returns it."""
    stage = stage or folder.name
    made = Manifest(
        Manifest.SCHEMA, stage, run or folder.parent.name, key or f"sha256:{stage}", config or {}, tuple(inputs),
        manifest.describe(folder, outputs), metrics or {}, "local", 1, Provenance(**(provenance or {})),
    )  # fmt: skip
    made.write(folder / manifest.NAME)
    return made


def rewrite(file: Path, **changes: Any) -> None:
    """Changes fields of a stage's manifest, which gets the seal of its new content."""
    dataclasses.replace(manifest.load(file), **changes).write(file)


def publish_again(folder: Path) -> None:
    """Takes the files of a published stage as they are now into its manifest."""
    names = [o.path for o in manifest.load(folder / manifest.NAME).outputs]
    rewrite(folder / manifest.NAME, outputs=manifest.describe(folder, names))


def upstream(folder: Path) -> Input:
    """The input that names an earlier stage's manifest."""
    return Input(manifest=f"../{folder.name}/{manifest.NAME}", sha256=manifest.load(folder / manifest.NAME).digest)


def publish_step(folder: Path, number: int, outputs: Iterable[str]) -> None:
    """Writes the manifest of a checkpoint's folder."""
    StepManifest(StepManifest.SCHEMA, number, manifest.describe(folder, outputs)).write(folder / manifest.NAME)


def step_record(step: int, **changes: Any) -> StepRecord:
    """A record of train/metrics.jsonl."""
    values = {"loss": 2.0, "lr": 1e-4, "grad_norm": 1.0, "labels": 100, "tokens": 200 * step, "tokens_per_s": 1000.0}
    return StepRecord(**{"step": step, **values, "padding": 0.0, "imbalance_expected": 0.0, "seconds": 0.2, **changes})


def step_summary(steps: int, **changes: Any) -> StepSummary:
    """The plan of a run, as train's metrics have it."""
    values = dict.fromkeys((f.name for f in dataclasses.fields(StepSummary) if f.type == "int"), 1)
    values |= dict.fromkeys((f.name for f in dataclasses.fields(StepSummary) if f.type == "float"), 0.5)
    words = {"order": "shuffle", "long_documents_policy": "truncate", "digest": "ab", "exact": True}
    per_step = TokensPerStep(min=10, mean=20.0, max=30)
    return StepSummary(**{**values, **words, "steps": steps, "trained_tokens_per_step": per_step, **changes})


def train_metrics(final_step: int, **changes: Any) -> TrainMetrics:
    """The metrics in train's manifest."""
    values = {"checkpoint": f"step{final_step}", "loss": 1.0, "first_loss": 3.0, "tokens": 200 * final_step}
    values |= {"tokens_per_s": 1000.0, "skipped_steps": 0, "attempts": 1, "data": step_summary(final_step)}
    return TrainMetrics(**{"final_step": final_step, **values, **changes})
