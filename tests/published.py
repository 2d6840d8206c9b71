"""Writes finished stages and steps for tests, through the formats' own writers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sft.formats import manifest
from sft.formats.manifest import Input, Manifest, StepManifest


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
        manifest.SCHEMA, stage, run or folder.parent.name, key or f"sha256:{stage}", config or {}, tuple(inputs),
        manifest.describe(folder, outputs), metrics or {}, "local", 1, provenance or {},
    )  # fmt: skip
    made.write(folder / manifest.NAME)
    return made


def upstream(folder: Path) -> Input:
    """The input that names an earlier stage's manifest."""
    return Input(manifest=f"../{folder.name}/{manifest.NAME}", sha256=manifest.load(folder / manifest.NAME).digest)


def publish_step(folder: Path, number: int, outputs: Iterable[str]) -> None:
    """Writes the manifest of a checkpoint's folder."""
    StepManifest(manifest.SCHEMA, number, manifest.describe(folder, outputs)).write(folder / manifest.NAME)
