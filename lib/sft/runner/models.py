"""[convert] model: the model of a run that trains none, as it is named, found and identified. Standard library only.

    make evaluate RECIPE=x MODEL=runs/y/train/step300        the step of another run
    named("/data/runs/y/train/step300", place.runs)          -> "runs/y/train/step300": the folder of runs has one name everywhere
    inputs(…)                                                what identifies it in a manifest
    scored_by(place.runs / "y")                              -> ["x_model-…"]: the runs that need y for it

A step that has a manifest is identified by it, a folder by the hashes of its files. Names with a revision identify themselves. Of a
model in a bucket, on the hub without a revision, or on a disk that only jobs see, the planner knows the name only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.common import paths
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.formats import manifest
from sft.formats import run as run_format
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Input
from sft.formats.run import RunFile
from sft.recipe import mounts
from sft.recipe.recipe import MODEL, Recipe
from sft.recipe.schema import Cluster
from sft.runner import references

RUNS = "runs/"
FIELD = "'model' in [convert]"
READ = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""The files at the top of a Hugging Face folder that identify it."""


def named(text: str, runs: Path) -> str:
    """How a recipe names the model of MODEL=text. Raises SftError."""
    text = text.rstrip("/")
    if not text or text.startswith("~"):
        raise SftError(
            f"MODEL={text}: a path is expected; next: write it without '~', or hf://org/name for a model of the hub"
        )
    if "://" in text:
        return text
    here, folder = os.path.abspath(text), os.path.abspath(runs)
    if here.startswith(folder + "/"):
        text = RUNS + os.path.relpath(here, folder)
    if text.startswith(RUNS):
        return _stored(text, runs)
    return here if os.path.exists(here) else text


def _stored(name: str, runs: Path) -> str:
    """The address in a bucket of a run's step or export that is only there; else the name."""
    part = _Part(name, runs)
    where = Elsewhere.of(part.stage).where
    inner = part.folder.relative_to(part.stage).as_posix()
    return f"{where}/{inner}" if where.startswith(paths.BUCKETS) and not part.folder.is_dir() else name


class _Part:
    """A step or an export among the runs: its stage's folder, its own folder, and the list of its files."""

    def __init__(self, name: str, runs: Path) -> None:
        words = name.removeprefix(RUNS).split("/")
        run = runs / words[0]
        if ".." in words or "" in words:
            raise SftError(f"{FIELD} = {name!r}: no plain path; next: runs/<run> or runs/<run>/train/step<N>")
        match words[1:]:
            case [] | ["convert"] | ["convert", "model"]:
                self.stage, self.folder = run / "convert", run / "convert" / "model"
                self.listed = self.stage / manifest.NAME
            case ["train", step]:
                self.stage, self.folder = run / "train", run / "train" / step
                self.listed = self.folder / manifest.NAME
            case _:
                raise SftError(
                    f"{FIELD} = {name!r}: neither a step nor an export; next: runs/<run> for its export, or runs/<run>/train/step<N>"
                )


def folder(r: Recipe, runs: Path, roots: Sequence[Path], cluster: Cluster, cluster_name: str, stage: str) -> Path:
    """The folder of a model that is not remote. Raises SftError naming the next command."""
    name = r.convert.model
    if name.startswith(RUNS):
        found = _Part(name, runs).folder
        if not found.is_dir():
            raise SftError(_no_part(name, runs))
        return found
    if name.startswith(mounts.WEKA) or mounts.in_jobs(name, cluster):
        found = Path(mounts.require(name, stage, cluster, cluster_name, f"{r.file}: {FIELD}"))
    else:
        found = Path(name) if name.startswith("/") else paths.find(roots, name, f"{r.file}: {FIELD}")
    if not found.is_dir():
        raise SftError(f"{r.file}: {FIELD} = {name!r}: {found} is no folder; next: correct MODEL=")
    if not (found / "config.json").is_file():
        raise SftError(
            f"{r.file}: {FIELD} = {name!r}: neither a step nor a Hugging Face model: {found} has no config.json; next: correct MODEL="
        )
    return found


def _no_part(name: str, runs: Path) -> str:
    part = _Part(name, runs)
    where = Elsewhere.of(part.stage).where
    if where:
        return f"{FIELD} = {name!r}: its files are in {where}; next: the CLUSTER that has them, or make fetch"
    kept = sorted((p.name for p in part.stage.glob("step*") if p.is_dir()), key=lambda n: (len(n), n))
    there = f"there are: {', '.join(kept)}" if kept else "make runs lists the runs"
    return f"{FIELD} = {name!r}: {part.folder} is not there; {there}; next: correct MODEL="


def inputs(runs: Path, roots: Sequence[Path], cluster: Cluster, r: Recipe, cache: HashCache) -> list[Input]:
    """What identifies the model. Raises SftError for one that is not there."""
    name = r.convert.model
    if paths.REMOTE.match(name) or mounts.in_jobs(name, cluster):
        return []
    if name.startswith(RUNS):
        return [_listed(_Part(name, runs), name, runs, cache)]
    root = folder(r, runs, roots, cluster, "", "evaluate")
    if (root / "model_and_optim").is_dir():
        own = root / manifest.NAME
        files = [own] if own.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    else:
        files = sorted(p for p in root.iterdir() if p.suffix in READ and p.is_file())
    found = [(f"model/{f.relative_to(root).as_posix()}", f) for f in files]
    return [Input(file=name, bytes=f.stat().st_size, sha256=cache.sha256(f)) for name, f in found]


def _listed(part: _Part, name: str, runs: Path, cache: HashCache) -> Input:
    """The manifest of a step or export, also where only its stage's manifest is here."""
    if part.listed.is_file():
        return Input(file="model/manifest.json", bytes=part.listed.stat().st_size, sha256=cache.sha256(part.listed))
    try:
        made = manifest.load(part.stage / manifest.NAME)
    except FileNotFoundError:
        raise SftError(_no_part(name, runs)) from None
    inner = part.listed.relative_to(part.stage).as_posix()
    for output in made.outputs:
        if output.path == inner:
            return Input(file="model/manifest.json", bytes=output.bytes, sha256=output.sha256)
    raise SftError(_no_part(name, runs))


def check(r: Recipe, stage: str, runs: Path, roots: Sequence[Path], cluster: Cluster, cluster_name: str) -> None:
    """Raises SftError for a model that the stage could not read where it runs."""
    name = r.convert.model
    if paths.REMOTE.match(name):
        return
    far = cluster.launcher != "local" and not cluster.shared_disk and stage in cluster.stages
    if name.startswith(mounts.WEKA) or mounts.in_jobs(name, cluster):
        mounts.require(name, stage, cluster, cluster_name, f"{r.file}: {FIELD}")
    elif not far:
        folder(r, runs, roots, cluster, cluster_name, stage)
    elif name.startswith(RUNS):
        part = _Part(name, runs)
        stored = f"{paths.for_user(cluster.runs).rstrip('/')}/{part.stage.parent.name}/{part.stage.name}"
        if str(part.stage.absolute()) != stored and Elsewhere.of(part.stage).where != stored:
            raise SftError(
                f"{r.file}: {FIELD} = {name!r}: it is not in {stored}, where jobs on {cluster_name} look; next: make fetch"
                f" RECIPE=… CLUSTER={cluster_name} PUSH=1, or name a copy with gs:// or s3://"
            )
    else:
        raise SftError(
            f"{r.file}: {FIELD} = {name!r}: jobs on {cluster_name} do not see this machine's disks; next: gs://, s3://, hf://org/name, or"
            f" a path on a mount of env/{cluster_name}.toml ({mounts.listed(cluster)})"
        )


def scored_by(run: Path) -> list[str]:
    """The names of the runs whose [convert] model is a step or the export of this run."""
    own = f"{RUNS}{run.name}/"
    return [
        other.name for other in references.others(run) if any(f"{name}/".startswith(own) for name in _models_of(other))
    ]


def _models_of(run: Path) -> Iterator[str]:
    """[convert] model as the run's overrides and its finished stages have it."""
    with contextlib.suppress(OSError, SftError):
        words = RunFile.read(run / run_format.NAME).overrides
        yield from (word.removeprefix(f"{MODEL}=") for word in words if word.startswith(f"{MODEL}="))
    for stage in ("convert", "evaluate"):
        with contextlib.suppress(OSError, SftError):
            config = manifest.load(run / stage / manifest.NAME).config
            yield str((config if stage == "convert" else config.get("convert", {})).get("model", ""))
