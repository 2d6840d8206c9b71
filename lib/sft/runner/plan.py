"""The planner: which stages of which runs are stale, and why. Reads files, writes nothing. Standard library only.

A stage is stale when it has no whole manifest, when its key is not the one the recipe asks for, when an input (a file of
the recipe, or the upstream manifest) is not the one it consumed, or when its upstream is stale. File times play no part.
`python -m sft plan` calls this while Make parses; every stage calls it again before it starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
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
from sft.formats.record import to_json
from sft.formats.remote import SyncMetrics
from sft.formats.run import RunFile
from sft.recipe import chat_templates, inputs, recipe, schema

REPO = paths.REPO
# Raise a stage's number when its code makes different bytes from the same options.
VERSIONS = {"prepare": 4, "sync": 1, "train": 1, "convert": 2, "evaluate": 4, "report": 2}


@dataclass(frozen=True)
class Place:
    """Where a run lives and where its inputs are looked for."""

    runs: Path
    data: tuple[Path, ...] = ()
    cluster: str = "local"

    @property
    def roots(self) -> tuple[Path, ...]:
        return (*self.data, REPO / "recipes")

    @property
    def cache(self) -> Path:
        return self.runs / ".cache"

    def storage(self, cluster: schema.Cluster) -> str:
        return paths.for_user(cluster.storage.replace("{runs}", str(self.runs)))

    def load_cluster(self) -> schema.Cluster:
        return recipe.load_cluster(recipe.find(REPO / "env", self.cluster, "cluster"))

    @staticmethod
    def parse(runs: str, data: str, cluster: str) -> Place:
        for root in filter(None, data.split(":")):
            if not Path(root).is_dir():
                raise SftError(f"DATA={data}: {root} is not a folder; next: name existing folders, separated by ':'")
        return Place(Path(runs), tuple(Path(r) for r in data.split(":") if r), cluster)


@dataclass
class State:
    """One stage of one run, wanted against recorded."""

    stage: str
    key: str
    config: dict[str, Any]
    manifest: Manifest | None = None
    inputs: list[Input] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    elsewhere: str = ""  # sync only: current by content, but on another cluster's storage

    @property
    def stale(self) -> bool:
        return bool(self.reasons)


def load_run(place: Place, run: str, overrides: Sequence[str] = ()) -> recipe.Recipe:
    """The recipe of a run by its folder's name: the recipe's file, the overrides recorded in run.json, and those given.

    Raises SftError when they do not make this run.
    """
    file = recipe.find(REPO / "recipes", recipe.from_run(run), "recipe")
    loaded = recipe.load(file, overrides, place.cluster)
    if loaded.run != run:
        try:
            recorded = RunFile.read(place.runs / run / run_format.NAME).overrides
        except (OSError, SftError):
            recorded = ()
        loaded = recipe.load(file, [*recorded, *overrides], place.cluster)
    if loaded.run != run:
        raise SftError(
            f"{place.runs / run}: {file} with overrides {list(overrides)} makes the run {loaded.run!r}, not {run!r};"
            f" next: make STAGE RECIPE={loaded.name} FIELD=VALUE"
        )
    return loaded


def states(place: Place, r: recipe.Recipe, cache: HashCache | None = None) -> dict[str, State]:
    """The state of every stage of a run, upstream first."""
    cache = cache or HashCache(place.cache)
    found: dict[str, State] = {}
    for stage in schema.STAGES:
        upstream = [found[u] for u in schema.UPSTREAM[stage]]
        config = r.config(stage)
        state = State(stage, manifest.key(stage, VERSIONS[stage], config, [u.key for u in upstream]), config)
        _compare(state, place.runs / r.run, upstream, lambda stage=stage: input_files(place, r, stage, cache))
        found[stage] = state
    _look_elsewhere(found["sync"], place)
    return found


def consumed(place: Place, r: recipe.Recipe, stage: str, cache: HashCache | None = None) -> tuple[State, list[Input]]:
    """(state, inputs) of a stage that is about to run. Raises SftError for a stale upstream or a missing file."""
    cache = cache or HashCache(place.cache)
    found = states(place, r, cache)
    for upstream in schema.UPSTREAM[stage]:
        if found[upstream].stale:
            raise SftError(
                f"{place.runs / r.run / upstream / manifest.NAME}: {upstream} is stale"
                f" ({'; '.join(found[upstream].reasons)}); next: make {upstream} RECIPE={r.name}"
                + "".join(f" {k}={v}" for k, v in r.overrides)
            )
    return found[stage], [upstream_entry(found[u]) for u in schema.UPSTREAM[stage]] + input_files(
        place, r, stage, cache
    )


def identity(key: str, entries: Sequence[Input]) -> str:
    """Hex name of what a stage will make: its key and the content of its inputs."""
    return hashlib.sha256(canonical([key, to_json(entries)])).hexdigest()


def input_files(place: Place, r: recipe.Recipe, stage: str, cache: HashCache) -> list[Input]:
    """Manifest entries of the local files a stage's recipe tables name. Raises SftError for a missing one."""
    named = named_files(place, r, stage)
    return [Input(file=name, bytes=file.stat().st_size, sha256=cache.sha256(file)) for name, file in named]


def named_files(place: Place, r: recipe.Recipe, stage: str) -> list[tuple[str, Path]]:
    """The local files a stage's recipe tables name, by their name there. Raises SftError for a missing one."""

    def find(path: str, what: str = "") -> Path:
        return paths.find(place.roots, path, f"{r.file}: {what or stage}")

    if stage == "prepare":
        return inputs.prepare_files(r.prepare, find)
    if stage == "sync":
        return inputs.base_files(r.model, find)
    if stage == "convert":
        return inputs.convert_files(r.convert, find)
    if stage == "evaluate":
        return inputs.evaluate_files(r.evaluate, find)
    return []


def _compare(state: State, run: Path, upstream: list[State], files: Any) -> None:
    file = run / state.stage / manifest.NAME
    try:
        state.manifest = manifest.load(file)
    except FileNotFoundError:
        state.reasons.append("not made yet")
    except SftError:
        state.reasons.append(f"{file} is torn")
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
    assert state.manifest is not None
    return Input(manifest=f"../{state.stage}/{manifest.NAME}", sha256=state.manifest.digest)


def _look_elsewhere(sync: State, place: Place) -> None:
    """Synced data may lie on another cluster's storage, or have been removed there: then training needs a new sync first."""
    if sync.manifest is None or sync.stale:
        return
    cluster = place.load_cluster()
    storage = place.storage(cluster)
    made = SyncMetrics.of(sync.manifest, str(place.runs / sync.manifest.run / "sync" / manifest.NAME))
    was = made.storage
    if was != storage and ("://" in was + storage or Path(was).resolve() != Path(storage).resolve()):
        sync.elsewhere = f"storage {was} -> {storage}"
    elif not cluster.shared_disk and "SFT_JOB" not in os.environ and not Path(storage).is_dir():
        return  # a disk that is not here: the job that reads it looks
    elif "://" not in storage and not (Path(made.dataset) / manifest.NAME).is_file():
        sync.elsewhere = f"the dataset is gone from {storage}"


def stale_stages(place: Place, r: recipe.Recipe, goals: Sequence[str]) -> dict[str, list[str]]:
    """{stage: reasons} of what must run for the goals (stages, or 'all').

    A sync that is only elsewhere counts if training follows or it is asked for; a report beside other goals comes after
    them. Raises SftError for an input that a stage to run needs and that is not there: told now, not when its turn comes.
    """
    found = states(place, r)
    last = max((schema.STAGES.index(g) for g in goals if g in schema.STAGES), default=-1)
    last = len(schema.STAGES) - 1 if not {"all", "smoke"}.isdisjoint(goals) else last
    runs = [s for s in schema.STAGES[: last + 1] if found[s].stale]
    for stage in runs:
        named_files(place, r, stage)
    if "prepare" in runs and not inputs.is_remote(r.prepare.tokenizer):
        _check_template(r, "template", "prepare", r.prepare.template, "tokenizer")
    if "convert" in runs:
        _check_template(r, "eval_template", "convert", r.convert.eval_template, "")
    if "evaluate" in runs:
        inputs.check_tasks(r.evaluate, lambda path: paths.find(place.roots, path, f"{r.file}: evaluate"), r.file)
    sync = found["sync"]
    if sync.elsewhere and (found["train"].stale or "sync" in goals):
        sync.reasons.append(sync.elsewhere)
    stale = {s.stage: s.reasons for s in found.values() if s.stale}
    if reasons := report_reasons(place.runs / r.run, bool(runs)):
        stale["report"] = reasons
    return stale


def _check_template(r: recipe.Recipe, field: str, table: str, name: str, default: str) -> None:
    if name == default or inputs.is_template_file(name):
        return
    if name not in chat_templates.TEMPLATES:
        known = ", ".join(filter(None, (default, *chat_templates.TEMPLATES)))
        raise SftError(
            f"{r.file}: '{field}' in [{table}] = {name!r}: none of {known}, nor a .jinja, .jinja2 or .j2 file"
        )


def report_inputs(run: Path) -> list[Input]:
    """Manifest entries of what the report shows: the stages that are done, evaluations during training, comparisons."""
    entries: list[Input] = []
    for stage in schema.STAGES:
        try:
            digest = manifest.load(run / stage / manifest.NAME).digest
            entries.append(Input(manifest=f"../{stage}/{manifest.NAME}", sha256=digest))
        except (FileNotFoundError, SftError):
            continue
    extra = [run / "train" / "evaluations.jsonl", *sorted((run / "compare").glob("*.json"))]
    entries += [
        Input(file=f.relative_to(run).as_posix(), bytes=f.stat().st_size, sha256=hash_file(f))
        for f in extra
        if f.is_file()
    ]
    return entries


def report_reasons(run: Path, stages_will_run: bool) -> list[str]:
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


def environment_digest() -> str:
    """Names the state of the pinned environment, so that editing a pin makes it again."""
    h = hashlib.sha256()
    for name in ("pyproject.toml", "env/lock.txt", "env/setup.sh"):
        h.update((REPO / name).read_bytes())
    return h.hexdigest()[:12] + (
        "-" + "".join(c for c in os.environ["TORCH"] if c.isalnum()) if os.environ.get("TORCH") else ""
    )
