"""Runs one stage: checks its inputs, locks, calls the stage's own code, publishes its folder, writes the manifest last.

    def prepare(stage: Stage) -> Result: ...
    main("prepare", prepare)            # python stages/prepare.py runs/<run> [--cluster C] [--data ROOTS] [field=value …]

A stage writes into `stage.out`, a work folder named by what it will make, which survives a kill so that the next attempt
can continue; the finished folder is renamed into place. Training works in place (its checkpoints are the continuation).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import sync_folder, write_atomic
from sft.common.hashcache import HashCache
from sft.common.locks import lock
from sft.common.process import report_errors
from sft.formats import elsewhere, manifest, remote
from sft.formats import run as run_format
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Manifest, Output
from sft.formats.remote import Remote, SyncMetrics
from sft.formats.run import RunFile
from sft.recipe.recipe import Recipe
from sft.runner import plan
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.publish import _flush, _keep_only, _link_tree, provenance


@dataclass(frozen=True)
class Result:
    """What a stage made: files and folders relative to its folder, and figures worth keeping."""

    outputs: Sequence[str]
    metrics: dict[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of those files of the outputs that were hashed on their way to the disk; the others are read again for it."""


class Stage:
    """What a stage's code may use."""

    def __init__(self, name: str, place: plan.Place, recipe: Recipe, argv: Sequence[str], follower: bool = False):
        self.name, self.place, self.recipe, self.argv, self.follower = name, place, recipe, list(argv), follower
        self.cluster = place.load_cluster()
        self.storage = place.storage(self.cluster)
        self.hardware = recipe.hardware(place.cluster, name)
        self.run = place.runs / recipe.run
        self.cache = place.cache
        self.out = self.run / name
        self.started = datetime.now(UTC)
        self.result: Result | None = None
        self._hashes = HashCache(place.cache)
        self._verified: set[str] = set()
        if name == "report":
            self.config: dict[str, Any] = {}
            self.key = manifest.key(name, plan.VERSIONS[name], {}, [])
            self.inputs = plan.report_inputs(self.run)
        else:
            state, self.inputs = plan.consumed(place, recipe, name, self._hashes)
            self.key, self.config = state.key, state.config

    @property
    def identity(self) -> str:
        """Hex name of what will be made: the key and the content of the inputs."""
        return plan.identity(self.key, self.inputs)

    def find(self, path: str, what: str = "") -> Path:
        """A recipe's relative path under the DATA roots or recipes/. Raises SftError."""
        return paths.find(self.place.roots, path, f"{self.recipe.file}: {what or self.name}")

    def sha256(self, file: Path) -> str:
        """sha256 (hex) of an input, read again only where it is another file than when it was last hashed."""
        return self._hashes.sha256(file)

    def folder(self, upstream: str) -> Path:
        """The published folder of an earlier stage, every byte verified once. Raises SftError naming what is wrong."""
        folder = self.run / upstream
        if upstream not in self._verified:
            self._verify(folder, f"make {upstream} RECIPE={self.recipe.name} after removing {folder / manifest.NAME}")
            self._verified.add(upstream)
        return folder

    @property
    def remote(self) -> Remote:
        """What sync put on the cluster's storage."""
        return Remote.read(self.folder("sync") / remote.NAME)

    def _synced(self, name: str) -> Path:
        """A folder that sync made, where this machine reads it: brought and verified first where the storage is a bucket."""
        file = self.run / "sync" / manifest.NAME
        root = SyncMetrics.of(manifest.load(file), str(file)).storage
        if "://" not in root:
            return Path(root) / name
        from sft.storage.localise import localise

        # Rank 0 and the first rank of every other machine verify; the rest wait for them and read the same files.
        first = not self.follower or os.environ.get("LOCAL_RANK") == "0"
        folder = localise(root, name, self.cache, self.log, again=first and name not in self._verified)
        self._verified.add(name)
        return folder

    @property
    def dataset(self) -> Path:
        """The synced dataset (data/, validation/, dataset.json), every byte verified once."""
        name = self.remote.dataset
        folder = self._synced(name)
        if name not in self._verified:
            self._verify(
                folder, f"make sync RECIPE={self.recipe.name} after removing {self.run / 'sync' / manifest.NAME}"
            )
            self._verified.add(name)
        return folder

    @property
    def base(self) -> Path | None:
        """The synced base weights, every byte verified once, or None when training starts from random weights."""
        synced = self.remote
        if not (name := synced.base):
            return None
        folder = self._synced(name)
        if name not in self._verified:
            again = f"make sync RECIPE={self.recipe.name} after removing {folder}"
            self._verify(folder, again, synced.below(name))
            self._verified.add(name)
        return folder

    def _verify(self, folder: Path, again: str, listed: Sequence[Output] | None = None) -> None:
        if self.follower:
            return  # rank 0 has hashed it
        away = Elsewhere.of(folder)
        if away.outputs:
            raise SftError(
                f"{folder}: {len(away.outputs)} outputs are elsewhere, in {away.where}; next: make {self.name} with the CLUSTER that made"
                f" them, or bring them here and remove {folder / elsewhere.NAME}"
            )
        try:
            broken = manifest.broken_outputs(folder, listed or manifest.load(folder / manifest.NAME).outputs)
        except FileNotFoundError:
            raise SftError(f"{folder / manifest.NAME}: not there; next: {again}") from None
        if broken:
            raise SftError("\n".join(broken) + f"\nnext: {again}")

    def log(self, text: str) -> None:
        print(f"[{self.name}] {text}", flush=True)

    def finish(self, result: Result) -> None:
        self.result = result

    # --- publication ----------------------------------------------------------------------------------------------

    def open_work(self) -> None:
        """The work folder of this identity; work of other identities is left to be continued or cleaned."""
        old = self.run / ".work" / f"{self.name}-old"
        if old.exists() and not (self.run / self.name).exists():
            os.rename(old, self.run / self.name)  # killed between the two renames of an earlier publication
        self.out = self.run / ".work" / f"{self.name}-{self.identity[:16]}"
        self.out.mkdir(parents=True, exist_ok=True)

    def open_in_place(self) -> None:
        """runs/<run>/<stage> itself. A folder made from other inputs is moved aside, never mixed with or deleted."""
        mark = self.out / ".identity"
        if self.out.is_dir() and (not mark.is_file() or mark.read_text() != self.identity):
            aside = self.run / ".replaced" / f"{self.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
            aside.parent.mkdir(exist_ok=True)
            os.rename(self.out, aside)
            self.log(f"inputs changed: the earlier {self.name} folder is now {aside}")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / manifest.NAME).unlink(missing_ok=True)
        write_atomic(mark, self.identity.encode())

    def publish(self, in_place: bool) -> None:
        """Hashes the outputs, flushes them to disk, writes the manifest last and renames the folder into place."""
        assert self.result is not None
        outputs = manifest.describe(self.out, self.result.outputs, self.result.hashes)
        if not in_place:
            _keep_only(self.out, {o.path for o in outputs})
        _flush(self.out, [o.path for o in outputs])
        self._record(outputs, self.recipe.run, self.place.cluster, plan.VERSIONS[self.name]).write(
            self.out / manifest.NAME
        )
        if not in_place:
            final, old = self.run / self.name, self.run / ".work" / f"{self.name}-old"
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.rename(final, old)
            os.rename(self.out, final)
            sync_folder(self.run)
            shutil.rmtree(old, ignore_errors=True)
            self.out = final
        self._hashes.save()

    def _record(
        self, outputs: tuple[Output, ...], run: str, cluster: str | None = None, version: int | None = None
    ) -> Manifest:
        """The manifest of what was made; without a cluster, that of a result in the cache, which belongs to no run."""
        assert self.result is not None
        return Manifest(
            manifest.SCHEMA,
            self.name,
            run,
            self.key,
            self.config,
            tuple(self.inputs),
            outputs,
            self.result.metrics,
            cluster,
            version,
            provenance(self.argv, self.started) if cluster else None,
        )

    def run_shared(self, body: Callable[[Stage], Result]) -> None:
        """Runs the body once per identity for all runs: the result lies in the cache, each run gets hard links to it."""
        shared = self.cache / self.name / self.identity[:32]
        work, self.out = self.out, shared.with_suffix(".work")
        shared.parent.mkdir(parents=True, exist_ok=True)
        with lock(shared.with_suffix(".lock"), wait=True):
            if not manifest.is_whole(shared):
                self.out.mkdir(exist_ok=True)
                self.result = body(self)
                shutil.rmtree(shared, ignore_errors=True)
                outputs = manifest.describe(self.out, self.result.outputs, self.result.hashes)
                _keep_only(self.out, {o.path for o in outputs})
                _flush(self.out, [o.path for o in outputs])
                self._record(outputs, "").write(self.out / manifest.NAME)
                os.rename(self.out, shared)
            else:
                self.log(f"the same result is in {shared}: linked, not made again")
            made = manifest.load(shared / manifest.NAME)
            self.out = work
            hashes = {o.path: o.sha256 for o in made.outputs}  # of what was whole a moment ago
            linked = _link_tree(shared, work, list(hashes))
        self.result = Result(list(hashes), made.metrics, {name: hashes[name] for name in linked})


@contextlib.contextmanager
def open_stage(name: str, options: RunOptions, *, in_place: bool = False, follower: bool = False) -> Iterator[Stage]:
    """Opens a stage for its code to work in and publishes it when `stage.finish(Result(…))` was called.

    in_place: work in runs/<run>/<stage> itself. follower: another rank of the same stage, which neither locks nor writes.
    Raises SftError for bad input, a stale upstream, or a lock that somebody else holds.
    """
    place, recipe = options.place, options.load_recipe()
    if follower:
        yield Stage(name, place, recipe, sys.argv, follower=True)
        return
    run = place.runs / recipe.run
    (run / ".work").mkdir(parents=True, exist_ok=True)
    with lock(run / ".work" / f"{name}.lock"):
        stage = Stage(name, place, recipe, sys.argv)
        RunFile(recipe.name, tuple(f"{k}={v}" for k, v in recipe.overrides)).write(run / run_format.NAME)
        stage.open_in_place() if in_place else stage.open_work()
        yield stage
        if stage.result is not None:
            stage.publish(in_place)


def main(name: str, body: Callable[[Stage], Result], *, shared: bool = False) -> None:
    """The program of a stage that has no options of its own. Exit statuses: see `sft.runner.cli`."""

    @program(name, f"stages/{name}.py")
    @run_options
    def stage_program(options: RunOptions) -> None:
        run_stage(name, options, body, shared=shared)

    sys.exit(stage_program())


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
