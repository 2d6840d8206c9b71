"""[train] continue: the step of another run from which a training goes on. Standard library only.

    found = named(r, place.runs)        runs/x/train/step300; None where the recipe continues nothing
    check(found, r, …)                  that it is there, where the training sees it, and has the state that the recipe's optimizer needs
    inputs(found, r, cache)             what identifies it in train's manifest: the step's own manifest, which lists every byte
    continued_by(place.runs / "x")      -> ["y"]: the runs that go on from a step of x

The step's options and its learning rate are in the metrics.jsonl beside it. Training itself compares data, tokenizer and tensors.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.common import paths
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.formats import manifest, metrics
from sft.formats import run as run_format
from sft.formats.adapter import KEY as ADAPTER
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Input, Manifest
from sft.formats.metrics import Attempt, StepRecord, read_metrics
from sft.formats.record import to_json
from sft.formats.run import RunFile
from sft.recipe import recipe, schema, typed
from sft.recipe.architecture import differing_fields
from sft.recipe.base_config import Base, read_base
from sft.recipe.differences import Difference, mismatch
from sft.recipe.recipe import Recipe
from sft.recipe.resolve import resolve
from sft.runner import references

FIELD = "'continue' in [train]"
PLAIN = "runs/<run>/train/step<N>"
_NAME = re.compile(r"runs/([^/]+)/train/step(0|[1-9]\d*)")
WEIGHTS_ONLY = "its weights alone, with [model] base"


@dataclass(frozen=True)
class Origin:
    """The step that a training goes on from. `name`: as the recipe has it."""

    name: str
    run: str
    step: int
    folder: Path

    @property
    def train(self) -> Path:
        """The folder of the training that saved it."""
        return self.folder.parent


def named(r: Recipe, runs: Path) -> Origin | None:
    """The step that the recipe names; None where it continues nothing. Raises SftError for another form of path, and for a
    step of the run itself."""
    if not (name := r.train.continue_from):
        return None
    match = _NAME.fullmatch(name)
    if match is None or run_of(name) is None:
        raise SftError(f"{r.file}: {FIELD} = {name!r}: a step of a run is expected, as {PLAIN}; next: correct the path")
    if match[1] == r.run:
        raise SftError(
            f"{r.file}: {FIELD} = {name!r}: that is this run, which goes on by itself; next: remove the field; after epochs or"
            f" steps were raised: make extend RECIPE={r.name}"
        )
    return Origin(name, match[1], int(match[2]), runs / match[1] / "train" / f"step{match[2]}")


def run_of(name: str) -> str | None:
    """The run of a step's name; None for another form of path."""
    match = _NAME.fullmatch(name)
    return match[1] if match and ".." not in match[1] and recipe.RUN.fullmatch(match[1]) else None


def missing(found: Origin, r: Recipe) -> SftError:
    """The error for a step that is not on this machine."""
    where = Elsewhere.of(found.train).where
    if where:
        return SftError(
            f"{r.file}: {FIELD} = {found.name!r}: its files are in {where}; next: the CLUSTER that has them, or make fetch"
        )
    kept = [p.name for p in found.train.glob("step*") if (p / manifest.NAME).is_file()]
    there = f"there are: {', '.join(sorted(kept, key=lambda n: (len(n), n)))}" if kept else "make runs lists the runs"
    return SftError(
        f"{r.file}: {FIELD} = {found.name!r}: {found.folder} is no whole step; {there}; next: correct the path"
    )


def inputs(found: Origin, r: Recipe, cache: HashCache) -> list[Input]:
    """What identifies the step, also where only its training's manifest is on this machine. Raises SftError."""
    name, file = "continue/manifest.json", found.folder / manifest.NAME
    if file.is_file():
        return [Input(file=name, bytes=file.stat().st_size, sha256=cache.sha256(file))]
    made = _manifest(found.train)
    listed = f"{found.folder.name}/{manifest.NAME}"
    for output in made.outputs if made else ():
        if output.path == listed:
            return [Input(file=name, bytes=output.bytes, sha256=output.sha256)]
    raise missing(found, r)


def check(found: Origin, r: Recipe, cluster: schema.Cluster, cluster_name: str, base: Base | None = None) -> None:
    """Raises SftError for a step that training would not see where it runs, or could not go on from. `base`: the recipe's, if
    its config.json is on this machine."""
    far = cluster.launcher != "local" and not cluster.shared_disk and "train" in cluster.stages
    stored = f"{paths.for_user(cluster.runs).rstrip('/')}/{found.run}/train"
    if far and str(found.train.absolute()) != stored and Elsewhere.of(found.train).where != stored:
        raise SftError(
            f"{r.file}: {FIELD} = {found.name!r}: it is not in {stored}, where jobs on {cluster_name} look; next: make fetch"
            f" RECIPE=… CLUSTER={cluster_name} PUSH=1, or train on the cluster that has it"
        )
    if not far and not (found.folder / manifest.NAME).is_file():
        raise missing(found, r)
    check_options(found, r)
    if (found.folder / "config.json").is_file():
        _check_model(found, r, base)


def check_options(found: Origin, r: Recipe) -> None:
    """Raises SftError where the step has another optimizer state than the recipe's, and where a schedule starts from a
    learning rate that is not known."""
    options = _options(found)
    rows = [
        Difference(name, repr(options[name]), repr(ours), _write(name, options[name]))
        for name in schema.STATE_FIELDS
        if name in options and (ours := to_json(getattr(r.train, name))) != options[name]
    ]
    if rows:
        raise SftError(
            mismatch(
                f"{r.file}: {FIELD} = {found.name!r}: its optimizer state is of other options",
                rows,
                f"set them as there, or take {WEIGHTS_ONLY}",
                ("field", "step", "recipe", "write"),
            )
        )
    if r.train.continue_schedule in ("constant", "decayed") and rate(found) is None:
        raise SftError(
            f"{r.file}: 'continue_schedule' in [train] = {r.train.continue_schedule!r} starts from the learning rate of"
            f" {found.name}, and {found.train / metrics.NAME} has no record of step {found.step}; next: continue_schedule = 'recipe'"
            " or 'rewarmed', or another step"
        )


def _check_model(found: Origin, r: Recipe, base: Base | None) -> None:
    """Raises SftError for another architecture, as far as it is known before training. Rows for tokens may be added to a base's."""
    read = read_base(found.folder)
    if read is None or (base is None and not r.model.preset):
        return
    saved = read.config
    ours = resolve(r.model, saved.vocab_size, base)
    rows = [
        Difference(name, repr(getattr(saved, name)), repr(getattr(ours, name)))
        for name in differing_fields(saved, ours, ignore=("init_std", "vocab_size", "family"))
    ]
    if rows:
        problem = f"{r.file}: {FIELD} = {found.name!r}: [model] is another architecture"
        raise SftError(mismatch(problem, rows, "correct [model], or choose another step", ("field", "step", "recipe")))


def _write(name: str, value: Any) -> str:
    return f"{name}={','.join(value) if isinstance(value, list) else value}"


def _manifest(train: Path) -> Manifest | None:
    with contextlib.suppress(OSError, SftError):
        return manifest.load(train / manifest.NAME)
    return None


def _options(found: Origin) -> dict[str, Any]:
    """The options of the step's training on which the optimizer's state depends: as its attempts recorded them, or its
    manifest; empty where neither is here."""
    options: dict[str, Any] = {}
    if made := _manifest(found.train):
        default = to_json(schema.Train())
        options = {name: made.config.get(name, default[name]) for name in schema.STATE_FIELDS}
    with contextlib.suppress(OSError, SftError):
        for header in (a for a in read_metrics(found.train / metrics.NAME, last=0) if isinstance(a, Attempt)):
            if header.options and header.from_step < found.step:
                options = dict(header.options)
    if not options:
        with contextlib.suppress(OSError, ValueError):
            adapters = f'"{ADAPTER}":' in (found.folder / "config.json").read_text(encoding="utf-8")
            options = {"method": "lora" if adapters else "full"}
    return options


def rate(found: Origin) -> float | None:
    """The learning rate of the step; None where it was not recorded."""
    with contextlib.suppress(OSError, SftError):
        records = read_metrics(found.train / metrics.NAME)
        return next((s.lr for s in records if isinstance(s, StepRecord) and s.step == found.step), None)
    return None


def line(found: Origin, r: Recipe) -> str:
    """What is said before training starts."""
    at = rate(found)
    texts = {
        "recipe": f"schedule = {r.train.schedule!r} over all steps",
        "rewarmed": f"a warm-up, then schedule = {r.train.schedule!r} over the remaining steps",
        "constant": "constant",
        "decayed": f"from there to {r.train.final_lr_fraction:g} of it, {r.train.decay_shape}",
    }
    was = "" if at is None else f", {at:.3g} at that step"
    return (
        f"continues {found.name} with its optimizer state and, where the data are the same, at its place in them; learning"
        f" rate{was}: {texts[r.train.continue_schedule]}"
    )


def continued_by(run: Path) -> list[str]:
    """The names of the runs that go on from a step of this run."""
    own = f"runs/{run.name}/train/"
    return [other.name for other in references.others(run) if any(name.startswith(own) for name in _continued(other))]


def steps_in_use(train: Path) -> list[Path]:
    """The steps in the folder of a training that other runs go on from."""
    run = train.parent
    names = {
        name
        for other in references.others(run)
        for name in _continued(other)
        if name.startswith(f"runs/{run.name}/train/")
    }
    return [train / name.rpartition("/")[2] for name in sorted(names)]


def _continued(run: Path) -> Iterator[str]:
    """[train] continue of a run: in its overrides, its recipe's file, and the manifest of its training."""
    with contextlib.suppress(OSError, SftError):
        recorded = RunFile.read(run / run_format.NAME)
        words = [word.partition("=")[2] for word in recorded.overrides if word.startswith(f"{recipe.CONTINUE}=")]
        table = typed.read_toml(paths.REPO / "recipes" / f"{recorded.recipe}.toml", "recipe").get("train", {})
        yield from words or [str(table.get("continue", ""))]
    with contextlib.suppress(OSError, SftError):
        yield str(manifest.load(run / "train" / manifest.NAME).config.get("continue", ""))
