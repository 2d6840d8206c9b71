"""Runs one stage: checks its inputs, takes its lock, calls the stage's own code and publishes its folder, manifest last.

    def prepare(stage: Stage) -> Result: ...
    main("prepare", prepare)            # python stages/prepare.py runs/<run> [--cluster C] [--data FOLDERS] [field=value …]

A stage writes into `stage.out`, a work folder named by the identity of the result. It survives a kill, so that the next
attempt can resume. The finished folder is renamed into place. Training writes into its final folder, where its checkpoints are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft.common import paths
from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.files import remove_unfinished, sync_folder
from sft.common.hashcache import HashCache
from sft.common.library_logs import quiet_libraries
from sft.common.locks import lock
from sft.common.process import report_errors
from sft.formats import elsewhere, identity, manifest
from sft.formats import run as run_format
from sft.formats.elsewhere import Elsewhere
from sft.formats.identity import damaged, read_identity, write_identity
from sft.formats.manifest import Manifest, Output
from sft.formats.remote import Remote
from sft.formats.run import RunFile
from sft.formats.steps import holds_steps
from sft.recipe import mounts
from sft.recipe.recipe import Recipe
from sft.runner import plan, references
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.publish import flush, keep_only, link_files, provenance
from sft.runner.upstream import Upstream


@dataclass(frozen=True)
class Result:
    """What a stage made. `outputs`: files and folders, relative to its folder. `metrics`: figures for its manifest."""

    outputs: Sequence[str]
    metrics: dict[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 (hex) of the output files that were hashed while they were written. The others are read again and hashed."""
    measured: Sequence[str] = ()
    """Outputs with times in them, which the manifest's digest leaves out."""
    absent: Sequence[Output] = ()
    """Outputs that are not in the folder but in the folder `where`, which elsewhere.json then names."""
    where: str = ""


class Stage:
    """A stage that runs, as its own code sees it: options, verified inputs, and the folder `out` to write into.

    follower: another rank of the same stage, or a reader beside it. It takes no lock and publishes nothing.
    """

    def __init__(self, name: str, place: plan.Place, recipe: Recipe, argv: Sequence[str], follower: bool = False):
        self.name, self.place, self.recipe, self.argv, self.follower = name, place, recipe, list(argv), follower
        self.cluster = place.load_cluster()
        self.storage = place.storage(self.cluster)
        if self.cluster.storage_wait_s:
            os.environ[paths.STORAGE_WAIT] = str(self.cluster.storage_wait_s)  # also for processes that this one starts
        self.hardware = recipe.hardware(place.cluster, name)
        self.run = place.runs / recipe.run
        self.cache = place.cache
        self.out = self.run / name
        self.started = datetime.now(UTC)
        self.result: Result | None = None
        self._hashes = HashCache(place.cache)
        self._upstream = Upstream(self.run, name, recipe.name, place.cache, follower, lambda text: self.log(text))
        if name == "report":
            self.config: dict[str, Any] = {}
            self.key = manifest.key(name, plan.VERSIONS[name], {}, [])
            self.inputs = plan.report_inputs(self.run)
        else:
            state, self.inputs = plan.consumed(place, recipe, name, self._hashes)
            self.key, self.config = state.key, state.config

    @property
    def identity(self) -> str:
        """64 hex digits that name the result: a digest of the key and of the inputs' content."""
        return plan.identity(self.key, self.inputs)

    def find(self, path: str, what: str = "") -> Path:
        """A recipe's relative path under the DATA roots or recipes/, or its path on a disk of the cluster. Raises SftError."""
        if mounts.is_on_disk(path):
            where = f"{self.recipe.file}: {what or self.name}"
            found = Path(mounts.require(path, self.name, self.cluster, self.place.cluster, where))
            if not found.exists():
                raise SftError(f"{where} = {path!r}: {found} is not there; next: correct the path")
            return found
        return paths.find(self.place.roots, path, f"{self.recipe.file}: {what or self.name}")

    def sha256(self, file: Path) -> str:
        """sha256 (hex) of an input. The file is read only if it has changed since it was last hashed."""
        return self._hashes.sha256(file)

    def folder(self, upstream: str) -> Path:
        """The folder of an earlier stage, verified once. Raises SftError naming the damage."""
        return self._upstream.folder(upstream)

    @property
    def remote(self) -> Remote:
        """What sync put on the cluster's storage."""
        return self._upstream.remote()

    @property
    def dataset(self) -> Path:
        """The synced dataset (data/, validation/, dataset.json), verified once. Raises SftError naming the damage."""
        return self._upstream.dataset()

    @property
    def base(self) -> Path | None:
        """The synced base weights, verified once, or None if training starts from random weights. Raises SftError."""
        return self._upstream.base()

    def log(self, text: str) -> None:
        say(f"[{self.name}] {text}")

    def finish(self, result: Result) -> None:
        """Sets the result, which `open_stage` publishes when it closes."""
        self.result = result

    # --- publication ----------------------------------------------------------------------------------------------

    def open_work(self) -> None:
        """Makes `out` the work folder of this identity. Work folders of other identities are not touched."""
        old = self.run / ".work" / f"{self.name}-old"
        if old.exists() and not os.path.lexists(self.run / self.name):
            os.rename(old, self.run / self.name)  # killed between the two renames of an earlier publication
        self.out = self.run / ".work" / f"{self.name}-{self.identity[:16]}"
        self.out.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.out)

    def open_in_place(self) -> None:
        """Makes `out` runs/<run>/<stage>. A folder that was made from other inputs is moved to .replaced, not deleted.

        Raises SftError where a folder with work in it does not say what it was made from.
        """
        references.release(self.out)
        known = read_identity(self.out)
        if known is None and holds_steps(self.out):
            raise damaged(self.out / identity.NAME)
        if self.out.is_dir() and known != self.identity:
            replaced = references.set_aside(self.out)
            self.log(f"inputs changed: the earlier {self.name} folder is now {replaced}")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / manifest.NAME).unlink(missing_ok=True)
        write_identity(self.out, self.identity)

    def publish(self, in_place: bool) -> None:
        """Hashes the outputs, flushes them to disk, writes the manifest and renames the folder into place."""
        assert self.result is not None
        made = self._describe(self.result, delete_others=not in_place)
        if self.result.absent:
            absent = tuple(o.path for o in self.result.absent)
            Elsewhere(self.result.where, absent).write(self.out / elsewhere.NAME)
        else:
            (self.out / elsewhere.NAME).unlink(missing_ok=True)  # of an earlier result
        made.write(self.out / manifest.NAME)
        if not in_place:
            final, old = self.run / self.name, self.run / ".work" / f"{self.name}-old"
            shutil.rmtree(old, ignore_errors=True)
            references.release(final)
            if final.exists():
                os.rename(final, old)
            os.rename(self.out, final)
            sync_folder(self.run)
            shutil.rmtree(old, ignore_errors=True)
            self.out = final
        self._hashes.save()

    def run_shared(self, body: Callable[[Stage], Result]) -> None:
        """Calls the body once for all runs of the same identity. The result is in the cache; runs get hard links to it."""
        shared = self.cache / self.name / self.identity[:32]
        work, self.out = self.out, shared.with_suffix(".work")
        shared.parent.mkdir(parents=True, exist_ok=True)
        with lock(shared.with_suffix(".lock"), wait=True):
            if not manifest.is_whole(shared):
                self.out.mkdir(exist_ok=True)
                result = body(self)
                shutil.rmtree(shared, ignore_errors=True)
                self._describe(result, delete_others=True, in_cache=True).write(self.out / manifest.NAME)
                os.rename(self.out, shared)
                sync_folder(shared.parent)
            else:
                self.log(f"the same result is in {shared}: linked, not made again")
            made = manifest.load(shared / manifest.NAME)
            self.out = work
            hashes = {o.path: o.sha256 for o in made.outputs}  # verified or written a moment ago
            linked = link_files(shared, work, list(hashes))
        self.result = Result(list(hashes), made.metrics, {name: hashes[name] for name in linked})

    def _describe(self, result: Result, *, delete_others: bool, in_cache: bool = False) -> Manifest:
        """The manifest of the outputs in `out`, which are flushed. in_cache: a result that belongs to no run."""
        outputs = manifest.describe(self.out, result.outputs, result.hashes)
        outputs = tuple(replace(o, measured=True) if o.path in result.measured else o for o in outputs)
        names = [o.path for o in outputs]
        if delete_others:
            keep_only(self.out, set(names))
        flush(self.out, names)
        outputs = tuple(sorted((*outputs, *result.absent), key=lambda o: o.path)) if result.absent else outputs
        return self._manifest(result, outputs, in_cache)

    def _manifest(self, result: Result, outputs: tuple[Output, ...], in_cache: bool) -> Manifest:
        return Manifest(
            schema=Manifest.SCHEMA,
            stage=self.name,
            run="" if in_cache else self.recipe.run,
            key=self.key,
            config=self.config,
            inputs=tuple(self.inputs),
            outputs=outputs,
            metrics=result.metrics,
            cluster=None if in_cache else self.place.cluster,
            version=None if in_cache else plan.VERSIONS[self.name],
            provenance=None if in_cache else provenance(self.argv, self.started),
        )


@contextlib.contextmanager
def open_stage(name: str, options: RunOptions, *, in_place: bool = False, follower: bool = False) -> Iterator[Stage]:
    """Opens a stage for its code to work in. Publishes it at the end if `stage.finish(Result(…))` was called.

    in_place: write into runs/<run>/<stage> itself. follower: see Stage.
    Raises SftError for bad input, a stale upstream, or a lock that another process holds.
    """
    place, recipe = options.place, options.load_recipe()
    if follower:
        yield Stage(name, place, recipe, sys.argv, follower=True)
        return
    run = place.runs / recipe.run
    (run / ".work").mkdir(parents=True, exist_ok=True)
    with lock(run / ".work" / f"{name}.lock"):
        if name != "train":  # its processes have logs of their own
            quiet_libraries(run / ".work" / f"{name}.log")
        stage = Stage(name, place, recipe, sys.argv)
        RunFile(recipe.name, tuple(f"{k}={v}" for k, v in recipe.overrides)).write(run / run_format.NAME)
        stage.open_in_place() if in_place else stage.open_work()
        yield stage
        if stage.result is not None:
            stage.publish(in_place)


def run_stage(name: str, options: RunOptions, body: Callable[[Stage], Result], *, shared: bool = False) -> None:
    """Opens the stage, calls `body` and publishes its result. shared: runs of the same identity share one result."""
    began = time.monotonic()
    runs = options.run.parent
    with report_errors(name, runs if runs.is_dir() else None):
        with open_stage(name, options) as stage:
            if shared:
                stage.run_shared(body)
            else:
                stage.finish(body(stage))
        stage.log(f"done in {time.monotonic() - began:.1f} s: {stage.out / manifest.NAME}")


def main(name: str, body: Callable[[Stage], Result], *, shared: bool = False) -> None:
    """The program of a stage that has no options of its own. Exit statuses: see `sft.runner.cli`."""

    @program(name, f"stages/{name}.py")
    @run_options
    def stage_program(options: RunOptions) -> None:
        run_stage(name, options, body, shared=shared)

    sys.exit(stage_program())
