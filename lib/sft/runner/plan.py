"""The planner: which stages of which runs are stale, and why. It reads files and writes none. Standard library only.

A stage is stale if its manifest is missing or damaged, if its key is not the one that the recipe gives, if an input (a file
of the recipe, or the upstream manifest) is not the one it consumed, or if its upstream is stale. File times do not matter.
`python -m sft plan` calls this while Make parses. Every stage calls it again before it starts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import canonical, hash_file
from sft.common.hashcache import HashCache
from sft.formats import manifest
from sft.formats import run as run_format
from sft.formats.manifest import Input, Manifest
from sft.formats.record import NewerError, to_json
from sft.formats.remote import SyncMetrics, list_problems
from sft.formats.run import RunFile
from sft.recipe import chat_templates, clusters, inputs, mounts, recipe, schema, typed
from sft.recipe.recipe import BASELINE
from sft.runner import bases, continuation, ended, models, references
from sft.runner.precision import check_precision

REPO = paths.REPO
VERSIONS = {"prepare": 10, "sync": 1, "train": 3, "convert": 3, "evaluate": 6, "report": 3}
"""Raise a stage's number when its code makes other bytes from the same options. tests/test_versions.py watches this."""


@dataclass(frozen=True)
class Place:
    """The folder of runs, the folders that hold their inputs (DATA), and the cluster."""

    runs: Path
    data: tuple[Path, ...] = ()
    cluster: str = "local"

    @property
    def roots(self) -> tuple[Path, ...]:
        return (*self.data, REPO / "recipes")

    @property
    def cache(self) -> Path:
        return self.runs / ".cache"

    @property
    def datasets(self) -> Path:
        """Data sets of the hub that evaluation tasks read. The doctor's check fetches them, and nodes without internet find them."""
        return self.cache / "datasets"

    def storage(self, cluster: schema.Cluster) -> str:
        """The root of the cluster's storage, with its placeholders replaced."""
        return paths.for_user(cluster.storage.replace("{runs}", str(self.runs)))

    def load_cluster(self) -> schema.Cluster:
        """env/<cluster>.toml. Raises SftError."""
        return clusters.load_cluster(clusters.find_cluster(REPO / "env", self.cluster))

    @staticmethod
    def parse(runs: str, data: str, cluster: str) -> Place:
        """From command-line text; `data` is separated by ':'. Raises SftError for a folder that does not exist."""
        for root in filter(None, data.split(":")):
            if not Path(root).is_dir():
                raise SftError(f"DATA={data}: {root} is not a folder; next: name existing folders, separated by ':'")
        return Place(Path(runs), tuple(Path(r) for r in data.split(":") if r), cluster)


@dataclass
class State:
    """One stage of one run: the key and config that the recipe gives, its manifest, and the reasons why it is stale."""

    stage: str
    key: str
    config: dict[str, Any]
    manifest: Manifest | None = None
    inputs: list[Input] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    elsewhere: str = ""  # sync only: up to date, but on another cluster's storage
    origin: Path | None = None  # another run's folder of this stage, which this run can refer to

    @property
    def stale(self) -> bool:
        return bool(self.reasons)


def load_run(place: Place, run: str, overrides: Sequence[str] = ()) -> recipe.Recipe:
    """The recipe of a run, by the name of its folder: the recipe's file with the overrides of run.json and `overrides`.

    Raises SftError if they do not make this run, or if run.json is needed and damaged.
    """
    file = typed.find(REPO / "recipes", recipe.from_run(run), "recipe")
    loaded = recipe.load(file, overrides, place.cluster)
    if loaded.run != run:
        try:
            recorded = RunFile.read(place.runs / run / run_format.NAME).overrides
        except FileNotFoundError:
            recorded = ()
        loaded = recipe.load(file, [*recorded, *overrides], place.cluster)
    if loaded.run != run:
        raise SftError(
            f"{place.runs / run}: {file} with overrides {list(overrides)} makes the run {loaded.run!r}, not {run!r};"
            f" next: make STAGE RECIPE={loaded.name} FIELD=VALUE"
        )
    return loaded


def states(place: Place, r: recipe.Recipe, cache: HashCache | None = None, *, reuse: bool = False) -> dict[str, State]:
    """The state of every stage of a run, upstream first. reuse: a stale stage that another run has made is not stale."""
    cache = cache or HashCache(place.cache)
    found: dict[str, State] = {}
    for stage in r.stages:
        upstream = [found[u] for u in r.upstream(stage)]
        config = r.config(stage)
        state = State(stage, manifest.key(stage, VERSIONS[stage], config, [u.key for u in upstream]), config)
        files = functools.partial(input_files, place, r, stage, cache)
        _compare(state, place.runs / r.run, upstream, files)
        if stage == "train" and state.manifest and not state.reasons:
            state.reasons += ended.reasons(state.manifest, r)
        found[stage] = (_reused(state, place.runs, r, upstream, files) if reuse and state.stale else None) or state
    if "sync" in found:
        _look_elsewhere(found["sync"], place, place.runs / r.run / "sync" / manifest.NAME)
    return found


def _reused(
    state: State, runs: Path, r: recipe.Recipe, upstream: list[State], files: Callable[[], list[Input]]
) -> State | None:
    """The state with another run's result: one with the same key, made from the same inputs. None if there is none."""
    if any(u.stale for u in upstream):
        return None
    try:
        wanted = [upstream_entry(u) for u in upstream] + files()
    except SftError:
        return None  # a missing file, which is reported before anything runs

    def is_current(made: Manifest) -> bool:
        return list(made.inputs) == wanted and not (state.stage == "train" and ended.reasons(made, r))

    found = references.find_origin(runs, r.run, state.stage, state.key, is_current)
    if found is None:
        return None
    return State(state.stage, state.key, state.config, found[1], wanted, origin=found[0])


def consumed(place: Place, r: recipe.Recipe, stage: str, cache: HashCache | None = None) -> tuple[State, list[Input]]:
    """(state, inputs) of a stage that is about to run. Raises SftError for a stale upstream or a missing file."""
    cache = cache or HashCache(place.cache)
    found = states(place, r, cache)
    for upstream in r.upstream(stage):
        if found[upstream].stale:
            raise SftError(
                f"{place.runs / r.run / upstream / manifest.NAME}: {upstream} is stale"
                f" ({'; '.join(found[upstream].reasons)}); next: make {upstream} RECIPE={r.name}"
                + "".join(f" {k}={v}" for k, v in r.overrides)
            )
    return found[stage], [upstream_entry(found[u]) for u in r.upstream(stage)] + input_files(place, r, stage, cache)


def identity(key: str, entries: Sequence[Input]) -> str:
    """64 hex digits that name a stage's result: a digest of its key and of the inputs' content."""
    return hashlib.sha256(canonical([key, to_json(entries)])).hexdigest()


def input_files(place: Place, r: recipe.Recipe, stage: str, cache: HashCache) -> list[Input]:
    """Manifest entries of the local files that a stage's recipe tables name. Raises SftError for a missing file."""
    named = named_files(place, r, stage)
    found = [Input(file=name, bytes=file.stat().st_size, sha256=cache.sha256(file)) for name, file in named]
    if stage == "train" and (origin := continuation.named(r, place.runs)):
        found += continuation.inputs(origin, r, cache)
    if stage == "convert" and r.convert.checkpoint == "best":
        found += ended.best_inputs(place.runs / r.run / "train", r)
    if stage in ("convert", "evaluate") and r.convert.model:
        found += models.inputs(place.runs, place.roots, place.load_cluster(), r, cache)
    return found


def named_files(place: Place, r: recipe.Recipe, stage: str) -> list[tuple[str, Path]]:
    """(name in the recipe, file) of the local files that a stage reads. Raises SftError for a missing file."""

    def find(path: str, what: str = "") -> Path:
        return paths.find(place.roots, path, f"{r.file}: {what or stage}")

    if stage == "prepare":
        return inputs.prepare_files(r.prepare, find)
    if stage == "sync":
        return inputs.base_files(r.model, find)
    if stage == "convert":
        return inputs.convert_files(r.convert, find)
    if stage == "evaluate":
        own = inputs.convert_files(r.convert, find) if r.convert.model else []
        return [*own, *inputs.evaluate_files(r.evaluate, find)]
    return []


def task_data(place: Place, r: recipe.Recipe) -> Path:
    """Where the data sets of the recipe's tasks are on this machine: named by the tasks, their files and their data."""
    files = to_json(input_files(place, r, "evaluate", HashCache(place.cache)))
    asked = [list(r.evaluate.tasks), sorted(r.evaluate.data.items()), files]
    return place.datasets / hashlib.sha256(canonical(asked)).hexdigest()[:16]


def _compare(state: State, run: Path, upstream: list[State], files: Callable[[], list[Input]]) -> None:
    """Sets the manifest, inputs and reasons of a state. `files` hashes the stage's files, which is done only if needed."""
    file = run / state.stage / manifest.NAME
    try:
        state.manifest = manifest.load(file)
    except FileNotFoundError:
        state.reasons.append("not made yet")
    except NewerError:
        raise  # making it again would replace the result of a newer checkout
    except SftError as error:
        state.reasons.append(str(error).partition("; next:")[0])
    if (made := state.manifest) and made.key != state.key:
        state.reasons += differences(made.config, state.config)
        if made.version != VERSIONS[state.stage]:
            state.reasons.append(f"version {made.version} -> {VERSIONS[state.stage]}")
    state.reasons += [f"{u.stage} is stale" for u in upstream if u.stale]
    if state.reasons or made is None:
        return
    state.inputs = [upstream_entry(u) for u in upstream] + files()
    before = {e.name: e.sha256 for e in made.inputs}
    after = {e.name: e.sha256 for e in state.inputs}
    for name in [*after, *(n for n in before if n not in after)]:
        if before.get(name) != after.get(name):
            state.reasons.append(
                f"{name} {'is new' if name not in before else 'is gone' if name not in after else 'changed'}"
            )
    if not state.reasons and made.key != state.key:
        state.reasons.append("key changed")


def upstream_entry(state: State) -> Input:
    """The manifest entry of an upstream stage."""
    assert state.manifest is not None
    return Input(manifest=f"../{state.stage}/{manifest.NAME}", sha256=state.manifest.digest)


def _look_elsewhere(sync: State, place: Place, file: Path) -> None:
    """Sets `elsewhere` if the synced data is on another cluster's storage or was deleted: training then needs a new sync."""
    if sync.manifest is None or sync.stale:
        return
    cluster = place.load_cluster()
    storage = place.storage(cluster)
    try:
        made = SyncMetrics.of(sync.manifest, str(file))
    except SftError as error:
        sync.elsewhere = str(error).partition("; next:")[0]
        return
    was = made.storage
    if was != storage and ("://" in was + storage or Path(was).resolve() != Path(storage).resolve()):
        sync.elsewhere = f"storage {was} -> {storage}"
    elif not cluster.shared_disk and "SFT_JOB" not in os.environ and not Path(storage).is_dir():
        return  # jobs check this themselves: their disk is not here
    elif "://" not in storage and not (Path(made.dataset) / manifest.NAME).is_file():
        sync.elsewhere = f"the dataset is gone from {storage}"
    elif "://" not in storage and (
        problems := list_problems(Path(made.dataset), Path(made.base) if made.base else None, sync.inputs[0].sha256)
    ):
        sync.elsewhere = problems[0]


@dataclass(frozen=True)
class Work:
    """What the goals need: {stage: reasons} of the stages that must run, and {stage: folder} of those that another run has.

    unchecked: a line for each input that only jobs see, and for the step that training goes on from.
    """

    stale: dict[str, list[str]]
    reused: dict[str, Path]
    unchecked: tuple[str, ...] = ()


def work(place: Place, r: recipe.Recipe, goals: Sequence[str]) -> Work:
    """The stages that must run for the goals, with their reasons, and those that another run has made.

    A sync that is up to date but elsewhere must run if it is a goal or if training must run. The report must run if any
    stage must. Raises SftError for a missing input of any stage that must run, before the first one starts.
    """
    found = states(place, r, reuse=True)
    last = [g for g in goals if g in schema.STAGES] + ["evaluate"] * (not {"all", "smoke"}.isdisjoint(goals))
    wanted = [s for s in r.stages if any(s in r.chain(goal) for goal in last)]
    runs = [s for s in wanted if found[s].stale]
    for stage in runs:
        named_files(place, r, stage)
    if not {"prepare", "sync", "train"}.isdisjoint(runs):
        bases.check_base(place.roots, place.runs / r.run, r)
    if "train" in runs:
        check_precision(r.train, r.hardware(place.cluster, "train"), place.load_cluster(), f"CLUSTER={place.cluster}")
    unchecked = _on_disks_of_jobs(place, r, runs)
    if "prepare" in runs and not inputs.is_elsewhere(r.prepare.tokenizer):
        _check_template(r, "template", "prepare", r.prepare.template, "tokenizer")
    if "convert" in runs:
        _check_template(r, "eval_template", "convert", r.convert.eval_template, "")
    if "evaluate" in runs:
        inputs.check_tasks(r.evaluate, lambda path: paths.find(place.roots, path, f"{r.file}: evaluate"), r.file)
    sync = found.get("sync")
    if sync and sync.elsewhere and (found["train"].stale or "sync" in goals):
        sync.reasons.append(sync.elsewhere)
    stale = {s.stage: s.reasons for s in found.values() if s.stale}
    reused = {s.stage: s.origin for s in found.values() if s.origin and not s.stale}
    if reasons := report_reasons(place.runs / r.run, bool(runs) or not reused.keys().isdisjoint(wanted)):
        stale["report"] = reasons
    return Work(stale, reused, tuple(unchecked))


def _on_disks_of_jobs(place: Place, r: recipe.Recipe, stages: Sequence[str]) -> list[str]:
    """One line for each input of these stages that only their jobs see, and for the step that a training goes on from. Raises
    SftError for one that they would not see."""
    cluster, found = place.load_cluster(), []
    if "train" in stages and (origin := continuation.named(r, place.runs)):
        base = bases.find_base(place.roots, place.runs / r.run, r)
        continuation.check(origin, r, cluster, place.cluster, base)
        found.append(continuation.line(origin, r))
    for stage in stages:
        for what, path in mounts.named(r, stage):
            mounts.require(path, stage, cluster, place.cluster, f"{r.file}: {what}")
            found.append(f"{what} = {path!r}: checked in the job of {stage}")
        if r.convert.model and stage in ("convert", "evaluate"):
            models.check(r, stage, place.runs, place.roots, cluster, place.cluster)
            if mounts.in_jobs(r.convert.model, cluster):
                found.append(f"{models.FIELD} = {r.convert.model!r}: checked in the job of {stage}")
    return found


def _check_template(r: recipe.Recipe, field: str, table: str, name: str, default: str) -> None:
    if name == default or inputs.is_template_file(name) or (default and inputs.own_template(name)):
        return
    if field == "eval_template" and name == "model":  # the recipe has checked that there is one
        return
    if name not in chat_templates.TEMPLATES:
        known = ", ".join(filter(None, (default, *chat_templates.TEMPLATES)))
        raise SftError(
            f"{r.file}: '{field}' in [{table}] = {name!r}: none of {known}, nor a .jinja, .jinja2 or .j2 file"
        )


def report_inputs(run: Path) -> list[Input]:
    """Manifest entries of what the report shows: finished stages, evaluations during training, comparisons."""
    entries: list[Input] = []
    for stage in schema.STAGES:
        try:
            digest = manifest.load(run / stage / manifest.NAME).digest
            entries.append(Input(manifest=f"../{stage}/{manifest.NAME}", sha256=digest))
        except (FileNotFoundError, SftError):
            continue
    with contextlib.suppress(FileNotFoundError, SftError):
        baseline = manifest.load(run.with_name(run.name + BASELINE) / "evaluate" / manifest.NAME)
        entries.append(Input(file="baseline", sha256=baseline.digest))
    extra = [run / "train" / "evaluations.jsonl", *sorted((run / "compare").glob("*.json"))]
    entries += [
        Input(file=f.relative_to(run).as_posix(), bytes=f.stat().st_size, sha256=hash_file(f))
        for f in extra
        if f.is_file()
    ]
    return entries


def report_reasons(run: Path, stages_will_run: bool) -> list[str]:
    """Why the report is stale; an empty list if it is up to date."""
    if stages_will_run:
        return ["a stage is stale"]
    try:
        made = manifest.load(run / "report" / manifest.NAME)
    except (FileNotFoundError, SftError):
        return ["not made yet"]
    same = made.inputs == tuple(report_inputs(run)) and made.version == VERSIONS["report"]
    return [] if same else ["a stage's manifest changed"]


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """`field old -> new` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for k in [*after, *(k for k in before if k not in after)]:
            lines += differences(before.get(k), after.get(k), f"{name}.{k}".lstrip("."))
        return lines
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, (b, a) in enumerate(zip(before, after, strict=True)) for d in differences(b, a, f"{name}.{i}")]
    return [] if before == after else [f"{name} {_show(before)} -> {_show(after)}"]


def _show(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def environment_digest(root: Path = REPO) -> str:
    """12 hex digits that name the pinned environment of a checkout, so that it is installed again after an edited pin."""
    h = hashlib.sha256()
    for name in ("pyproject.toml", "env/lock.txt", "env/setup.sh"):
        h.update((root / name).read_bytes())
    return h.hexdigest()[:12] + (
        "-" + "".join(c for c in os.environ["TORCH"] if c.isalnum()) if os.environ.get("TORCH") else ""
    )
