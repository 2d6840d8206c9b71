"""make verify: hashes what a run has on this machine and follows its manifests. Standard library only.

    verify(Path("runs/x"), Path("runs/.cache"))     prints a line for each stage, each kept step and the synced copy; raises SftError

A stage is sound where its manifest has its seal, its key is that of its options, every listed file that is here has its bytes, no other file
is in its folder, and the stages that it was made from are those that are there now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.strings import first_names
from sft.formats import elsewhere, evaluations, identity, manifest, metrics, remote, steps
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Manifest, StepManifest
from sft.formats.remote import Remote, SyncMetrics
from sft.formats.run import NAME as RUN_FILE
from sft.formats.run import RunFile
from sft.formats.steps import Best
from sft.recipe import schema
from sft.runner import plan

Line = tuple[str, str, list[str]]
"""What was looked at, what was found, and the problems."""


def verify(run: Path, cache: Path) -> None:
    """Prints what was found in the folder of a run. Raises SftError for damage."""
    found = []
    for name, result, problems in _lines(run, cache):
        print(f"{name:10}{'; '.join(problems) or result}")
        found += problems
    if found:
        raise SftError(
            f"{run}: {len(found)} problem(s); next: remove the manifest of the broken stage and run it again, remove files that no"
            " stage made, or restore them from a backup"
        )


def _lines(run: Path, cache: Path) -> Iterator[Line]:
    for stage in (*schema.STAGES, "report"):
        folder = run / stage
        if not (folder / manifest.NAME).exists():
            yield stage, "not made", []
        else:
            yield _guarded(stage, _stage, folder)
            if stage == "sync":
                yield _guarded(" copy", _copy, folder, cache)
        if stage == "train" and folder.is_dir():
            for step in sorted(folder.glob("step*"), key=lambda p: (len(p.name), p.name)):
                if steps.STEP.fullmatch(step.name) and step.is_dir():
                    yield _guarded(f" {step.name}", step_problems, step)
            yield _guarded(" marks", _marks, folder)
    if os.path.lexists(run / RUN_FILE):
        yield _guarded(RUN_FILE, lambda file: (f"recipe {RunFile.read(file).recipe}", []), run / RUN_FILE)


def _guarded(name: str, check: Callable[..., tuple[str, list[str]]], *arguments: Path) -> Line:
    """The line of a check. A file that cannot be read is a problem like any other."""
    try:
        result, problems = check(*arguments)
    except SftError as error:
        return name, "", [str(error).partition("; next:")[0]]
    except OSError as error:
        return name, "", [f"{error.filename}: {error.strerror}"]
    return name, result, problems


def _stage(folder: Path) -> tuple[str, list[str]]:
    made, away = manifest.load(folder / manifest.NAME), Elsewhere.of(folder)
    here = away.here(folder, made.outputs)
    problems = manifest.broken_outputs(folder, here)
    beside = (elsewhere.NAME, *(steps.BESIDE if made.stage == "train" else ()))
    problems += [f"{folder / name}: no stage made this file" for name in manifest.strays(folder, made.outputs, beside)]
    chain, keys = [], []
    for entry in made.inputs:
        if entry.manifest:
            upstream = folder / ".." / _upstream_manifest(entry.manifest)
            if not upstream.is_file():
                chain.append(f"{upstream} is missing")
            elif (found := manifest.load(upstream)).digest != entry.sha256:
                chain.append(f"{upstream} is not the one that {folder.name} consumed")
            else:
                keys.append(found.key)
    if not chain and made.version is not None:
        chain += _key_problem(folder, made, keys)
    absent = len(made.outputs) - len(here)
    names = [o.path for o in made.outputs if o not in here]
    rest = f"; {absent} are elsewhere: {away.where} ({first_names(names, 3)})" if absent else ""
    seal = "" if made.seal else "; its manifest is of a version without seals"
    return f"{len(here)} files verified{rest}{seal}", problems + chain


def _key_problem(folder: Path, made: Manifest, upstream: list[str]) -> list[str]:
    """The key must be that of the options in the manifest and of the stages before it."""
    assert made.version is not None
    wanted = manifest.key(made.stage, made.version, made.config, [] if made.stage == "report" else upstream)
    where = folder / manifest.NAME
    return [] if made.key == wanted else [f"{where}: its key is {made.key[:20]}…, its options make {wanted[:20]}…"]


def _upstream_manifest(entry: str) -> str:
    """`prepare/manifest.json` from `../prepare/manifest.json`. Raises SftError for any other form."""
    if not re.fullmatch(r"\.\./[a-z]+/manifest\.json", entry):
        raise SftError(f"manifest input {entry!r} is not ../<stage>/manifest.json")
    return entry.removeprefix("../")


def step_problems(step: Path) -> tuple[str, list[str]]:
    """(what was verified, problems) of a checkpoint's folder."""
    made = StepManifest.read(step / manifest.NAME)
    problems = manifest.broken_outputs(step, made.outputs)
    problems += [f"{step / name}: no stage made this file" for name in manifest.strays(step, made.outputs)]
    if step.name != f"step{made.step}":
        problems.append(f"{step / manifest.NAME}: it is of step {made.step}")
    return f"{len(made.outputs)} files verified", problems


def _marks(train: Path) -> tuple[str, list[str]]:
    """LATEST and BEST name finished steps, BEST has the validation loss of its step, the mark of the inputs is that of the manifest, and so
    are the copies of the records that belong to steps."""
    problems, named = [], []
    known = identity.read_identity(train)
    if known is None and steps.holds_steps(train):
        problems.append(f"{train / identity.NAME}: missing")
    if known and (train / manifest.NAME).is_file():
        made = manifest.load(train / manifest.NAME)
        if known != plan.identity(made.key, made.inputs):
            problems.append(f"{train / identity.NAME}: it is of another recipe or other inputs than {manifest.NAME}")
    for copy in sorted((train / metrics.COPIES).glob("step*-*.jsonl")):
        if hash_file(copy)[:16] != copy.stem.partition("-")[2]:
            problems.append(f"{copy}: its name is not the hash of its content")
    for name in (steps.LATEST, steps.BEST):
        if not (train / name).is_file():
            if os.path.lexists(train / name):
                problems.append(f"{train / name}: not a file")
                continue
            if name == steps.LATEST and steps.holds_steps(train):
                problems.append(f"{train / name}: missing")
            continue
        step = steps.named_step(train, name)
        if step is None or not (step / manifest.NAME).is_file():
            problems.append(f"{train / name}: it names no finished step")
        named.append(f"{name} {step.name if step else '?'}")
    best = Best.read(train)
    if best is None and (train / steps.BEST).is_file():
        problems.append(f"{train / steps.BEST}: damaged: a step, a metric and a value are expected")
    if best and best.value not in _measured(train, best):
        problems.append(f"{train / steps.BEST}: {best.value} is not the {best.metric} of step {best.step}")
    return ", ".join(named) or "none", problems


def _measured(train: Path, best: Best) -> list[float | None]:
    """The values of BEST's metric that were measured of its step."""
    found: list[float | None] = []
    if best.metric == "validation_loss":
        found += [r.validation_loss for r in metrics.read_steps(train / metrics.NAME) if r.step == best.step]
    for scored in evaluations.read(train):
        if scored.step == best.step:
            found += [
                s.value for task, all_ in scored.tasks.items() for m, s in all_.items() if best.metric == f"{task}/{m}"
            ]
            found += [scored.validation.loss] if scored.validation and best.metric == "validation/loss" else []
    return found


def _copy(sync: Path, cache: Path) -> tuple[str, list[str]]:
    """The dataset and the base that training reads: in the storage where that is a folder, else this machine's copy of a bucket."""
    made = SyncMetrics.of(manifest.load(sync / manifest.NAME), str(sync / manifest.NAME))
    synced = Remote.read(sync / remote.NAME)
    root = Path(made.storage)
    if "://" in made.storage:
        root = cache / "local"
        if not (root / synced.dataset).is_dir():
            return f"in {made.storage}, not read; make sync CHECK=1 compares it", []
    elif not root.is_dir():
        return f"in {root}, which this machine does not see", []
    problems = manifest.broken_outputs(root, synced.files)
    prepared = manifest.load(sync / manifest.NAME).inputs[0].sha256
    problems += remote.list_problems(root / synced.dataset, root / synced.base if synced.base else None, prepared)
    for name in filter(None, (synced.dataset, synced.base)):
        listed = synced.below(name)
        problems += [
            f"{root / name / stray}: no stage made this file" for stray in manifest.strays(root / name, listed)
        ]
    return f"{len(synced.files)} files verified in {root}", problems
