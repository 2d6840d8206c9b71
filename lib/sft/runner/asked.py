"""What Make was asked for: goals that exist, overrides that a goal reads, and hardware words with their stage.

    check_goals(["train", "evalaute"], known, place)             raises: no goal 'evalaute'; did you mean 'evaluate'?
    Asked(["evaluate"], cluster, "ai2-jupiter").resolve(["cpus=8"])     ->  ["evaluate.cpus=8"]

A word that nothing reads is refused before anything runs. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.formats import manifest
from sft.recipe import other_names, recipe, schema, typed

READS: dict[str, tuple[str, ...]] = {
    "prepare": ("prepare",),
    "sync": ("sync", "model"),
    "train": ("train", "model"),
    "convert": ("convert",),
    "evaluate": ("evaluate",),
}
"""The tables that each stage reads."""
LAST = {
    "all": "evaluate",
    "smoke": "evaluate",
    "preview": "prepare",
    "export": "prepare",
    "steps": "train",
    "lr-range": "train",
    "overfit": "train",
}
"""The last stage whose fields a goal reads, for goals that are no stages."""
NO_FIELDS = (
    "help", "setup", "check", "test", "test-quick", "record-versions", "results", "fields", "verify", "diff", "compare", "soup", "lock",
    "nightly", "cp", "clean-cache", "jobs", "to-core", "runs", "delete", "archive", "schema", "completion", "chat", "serve", "mutants", "soak", "flip", "import-config", "docs",
)  # fmt: skip
"""Goals that read no recipe. The others name a run by all of its overrides, as `make report` does."""
WATCHING = ("every", "every_limit", "every_device", "best")
"""Fields of [evaluate] that training reads."""
_VERBS = {
    "eval": "evaluate", "score": "evaluate", "finetune": "train", "fine-tune": "train", "sft": "train", "launch": "train",
    "submit": "train", "run": "train", "resume": "train", "tokenize": "prepare", "tokenise": "prepare", "data": "prepare",
    "upload": "sync", "export-hf": "convert", "hf": "convert", "status": "jobs", "ps": "jobs", "queue": "jobs", "stop": "cancel",
    "kill": "cancel", "lint": "check", "tests": "test", "install": "setup", "init": "setup", "clean": "clean-cache",
    "validate": "doctor", "options": "fields", "config": "show", "download": "fetch", "push": "push-hub", "average": "soup", "ls": "runs", "list": "runs", "rm": "delete", "remove": "delete", "talk": "chat", "sweeps": "sweep", "import": "import-config", "convert-config": "import-config",
}  # fmt: skip
"""Words of other tools."""


HERE = ("lr-range", "overfit")
"""Goals that train for a few steps, on this machine alone, and keep no checkpoint."""


def check_here(goals: Sequence[str], cluster: schema.Cluster, name: str) -> None:
    """Raises SftError for goals that run on this machine alone, with a CLUSTER whose stages are jobs."""
    for goal in HERE:
        if goal in goals and cluster.launcher != "local":
            raise SftError(
                f"make {goal} CLUSTER={name}: it runs on this machine alone, and env/{name}.toml has launcher ="
                f" {cluster.launcher!r}; next: leave CLUSTER= out, on a machine with the GPUs"
            )


def known_goals(makefile: Path) -> list[str]:
    """The goals of a Makefile: the targets of its rules. Those with % stand for one goal for each of benchmarks/bench_*.py."""
    found = re.findall(r"^([a-z][a-z0-9 %-]*):(?!=)", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    goals = [name for names in found for name in names.split() if "%" not in name]
    benches = (
        p.stem.removeprefix("bench_").replace("_", "-")
        for p in sorted((makefile.parent / "benchmarks").glob("bench_*.py"))
    )
    return [*dict.fromkeys(goals), "slurm-up", "slurm-down", *(f"bench-{name}" for name in benches)]


def check_goals(goals: Sequence[str], known: Collection[str], recipes: Collection[str]) -> None:
    """Raises SftError for words on Make's command line that are no goals, each with what was probably meant."""
    lines = [f"make: no goal {g!r}{_meant(g, known, recipes)}" for g in goals if not _is_goal(g, known)]
    if lines:
        raise SftError("\n".join(lines) + "\nnext: correct it; make help lists the goals")


def _is_goal(goal: str, known: Collection[str]) -> bool:
    return goal in known or goal.endswith(f"/{manifest.NAME}") or goal.startswith(".venv/")


def _meant(goal: str, known: Collection[str], recipes: Collection[str]) -> str:
    name, sign, value = goal.partition(":")
    if sign:
        return f"; a field is set with '=': {name}={value or '…'}"
    if goal in recipes:
        return f"; did you mean RECIPE={goal}?"
    if goal in recipe.FIELDS:
        return f"; a field is set with '=': {goal}=…"
    if "/" in goal:
        return f"; a file that can be made is <runs>/<run>/<stage>/{manifest.NAME}"
    if verb := _VERBS.get(goal):
        return f"; did you mean '{verb}'?"
    near = difflib.get_close_matches(goal, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


@dataclasses.dataclass(frozen=True)
class Asked:
    """The goals of a make, the cluster with its name, and the stage that `make dry-run STAGE=` names."""

    goals: Sequence[str]
    cluster: schema.Cluster
    cluster_name: str
    dry_run: str = "train"
    other_model: bool = False
    """Whether MODEL= names a model that the run does not train."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that were asked for by name, upstream first. `all` asks for each."""
        last = {**LAST, "dry-run": self.dry_run}
        named = {last.get(g, g) for g in self.goals}
        if not {"all", "smoke"}.isdisjoint(self.goals):
            return schema.STAGES
        return tuple(s for s in schema.STAGES if s in named)

    @property
    def chain(self) -> tuple[str, ...]:
        """The stages that the goals reach: those that were asked for, and all before them."""
        if self.goals and set(self.goals) <= {"to-hf"}:
            return ("convert",)
        chain = schema.STAGES[: schema.STAGES.index(self.stages[-1]) + 1] if self.stages else ()
        return tuple(s for s in chain if s not in ("sync", "train")) if self.other_model else chain

    @property
    def takes_none(self) -> bool:
        """Whether no goal reads a recipe."""
        return bool(self.goals) and all(g in NO_FIELDS or g.startswith(("bench-", "slurm-")) for g in self.goals)

    def resolve(self, fields: Sequence[str]) -> list[str]:
        """The overrides, hardware words with their stage. Raises SftError for those that no stage of the goals reads."""
        if self.takes_none and fields:
            raise SftError(
                f"make {self.goals[0]}: it reads no recipe, so {fields[0]!r} would do nothing; next: remove it"
            )
        problems: list[str] = []
        resolved = [self._resolve(f, fields, problems) for f in fields]
        if problems:
            raise SftError("\n".join(problems))
        return resolved

    def _resolve(self, override: str, fields: Sequence[str], problems: list[str]) -> str:
        name, sign, text = override.partition("=")
        if name in typed.HARDWARE_FIELDS and name not in recipe.FIELDS_OF_TABLES and not self.chain:
            stages = typed.HARDWARE_FIELDS[name].metadata["stages"] or schema.STAGES
            problems.append(
                f"override '{override}': for which stage? next: write {stages[-1]}.{override}, or remove it"
            )
        if not sign or not self.chain:
            return override  # the goals only name a run, or the recipe reports it
        if name in typed.HARDWARE_FIELDS and name not in recipe.FIELDS_OF_TABLES:
            return self._hardware(name, text, problems)
        path = recipe.locate(name, self.cluster_name, [])
        if path is None:
            return override  # the recipe reports it
        if path[0] == "on":
            self._check_hardware(path[-2], path[-1], override, problems)
        elif not self._reads(path[0], path[-1], fields):
            problems.append(self._unread(override, path))
        return override

    def _reads(self, table: str, field: str, fields: Sequence[str]) -> bool:
        """Whether a stage of the goals reads the field. Training that evaluates its checkpoints reads [evaluate] and [convert]."""
        if any(table in READS[stage] for stage in self.chain) or "dry-run" in self.goals:
            return True  # a dry run makes nothing: the override only names the run
        watched = any(f.partition("=")[0].rpartition(".")[2] == "every" for f in fields)
        return (
            "train" in self.chain
            and table in ("convert", "evaluate")
            and (field in WATCHING or watched or self.watches)
        )

    watches: bool = False
    """Whether the recipe asks for evaluations during training."""

    def _unread(self, override: str, path: tuple[str, ...]) -> str:
        name, _, value = override.partition("=")
        readers = [s for s, tables in READS.items() if path[0] in tables]
        known = other_names.OTHER_NAMES.get(path[-1])
        ours = f"; where another trainer's {path[-1]!r} is meant, {other_names.translated(path[-1])}" if known else ""
        return (
            f"override '{name}={value}': [{path[0]}] has this field, which {' and '.join(readers)} read"
            f"{'s' * (len(readers) == 1)}, and make {' '.join(self.goals)} does not{ours};"
            f" next: remove it, or make {readers[0]}"
        )

    def _hardware(self, name: str, text: str, problems: list[str]) -> str:
        """A word such as cpus=8, for the one stage that it can mean."""
        readers = typed.HARDWARE_FIELDS[name].metadata["stages"] or schema.STAGES
        asked = [s for s in self.stages if s in readers] or [s for s in self.chain if s in readers]
        if len(asked) == 1:
            self._check_hardware(asked[0], name, f"{name}={text}", problems)
            return f"{asked[0]}.{name}={text}"
        if not asked:
            problems.append(
                f"override '{name}={text}': {' and '.join(readers)} read{'s' * (len(readers) == 1)} it, and make"
                f" {' '.join(self.goals)} does not; next: remove it"
            )
        else:
            words = " or ".join(f"{s}.{name}={text}" for s in asked)
            problems.append(f"override '{name}={text}': for which stage? next: write {words}")
        return f"{name}={text}"

    def _check_hardware(self, stage: str, name: str, override: str, problems: list[str]) -> None:
        """A number of a stage that is not reached, or of a job where the stage runs without one."""
        readers = typed.HARDWARE_FIELDS[name].metadata["stages"] or schema.STAGES
        if stage not in self.chain:
            problems.append(
                f"override '{override}': make {' '.join(self.goals)} does not reach {stage}; next: remove it"
            )
        elif stage not in readers:
            problems.append(
                f"override '{override}': {stage} does not read it, {' and '.join(readers)} would; next: remove it"
            )
        elif typed.HARDWARE_FIELDS[name].metadata["launchers"] and stage not in self.cluster.stages:
            there = ", ".join(self.cluster.stages)
            problems.append(
                f"override '{override}': {stage} is no job with CLUSTER={self.cluster_name}, whose file has"
                f" stages = {there}; next: remove it, or add {stage} there"
            )
