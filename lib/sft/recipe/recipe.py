"""Recipes: TOML in, frozen dataclasses out. Every mistake is reported with file, field, value and the next command.

    recipe = load(Path("recipes/smoke.toml"), ["lr=1e-4"])
    recipe.train.lr, recipe.run, recipe.config("train")

The options are declared in `sft.recipe.schema`, `sft.recipe.typed` reads their values, and `sft.recipe.rules` has what needs more than one. Standard library only: the planner uses this while Make parses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.paths import REPO
from sft.common.strings import distinct
from sft.recipe import chat_templates, clusters, rules, schema, typed
from sft.recipe.edit import to_toml
from sft.recipe.options import hint_of, name_of, names_of

CLUSTERS = REPO / "env"
SUITES = REPO / "recipes" / "suites"
FIELDS_OF_TABLES = {name for cls in schema.TABLES.values() for name in names_of(cls)}
FIELDS = FIELDS_OF_TABLES | typed.HARDWARE_FIELDS.keys()
MODEL, CONTINUE = "convert.model", "train.continue"
BASELINE = "_baseline"
"""What the name of a run that scores another's base ends with: the runs/x of runs/x_baseline."""
RUN = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}(_[A-Za-z0-9.+-]+)*")


@dataclass(frozen=True)
class Recipe:
    """One experiment. `overrides`: (dotted field, canonical value) of the overrides that change a result."""

    name: str
    file: str
    model: schema.Model
    prepare: schema.Prepare
    sync: schema.Sync
    train: schema.Train
    convert: schema.Convert
    evaluate: schema.Evaluate
    on: dict[str, dict[str, schema.Hardware]]
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def run(self) -> str:
        """Folder name of the run: the recipe's name, then each override in the order of the tables."""
        parts = [
            f"_{_short(path)}-{_label(value) if path == CONTINUE else _file_safe(value)}"
            for path, value in self.overrides
            if path != MODEL
        ]
        name = self.name + "".join(parts)
        name = name if len(name) <= 120 else f"{self.name}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return name + (self._other_model if MODEL in dict(self.overrides) else "")

    @property
    def _other_model(self) -> str:
        """The end of a run's name for [convert] model; that of the base is BASELINE."""
        model = self.convert.model
        if model and model == self.model.base:
            return BASELINE
        return f"_model-{_label(model)}"

    @property
    def loss_weights(self) -> dict[str, float]:
        """{name of the source: factor on its loss}; empty where no source has another factor than 1."""
        sources = self.prepare.sources
        weights = dict(zip(distinct([s.path for s in sources]), [s.loss_weight for s in sources], strict=True))
        return weights if any(w != 1.0 for w in weights.values()) else {}

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the run, upstream first. One that scores another model trains nothing."""
        return tuple(s for s in schema.STAGES if not (self.convert.model and s in ("sync", "train")))

    def upstream(self, stage: str) -> tuple[str, ...]:
        """The stages whose results a stage reads directly. Another model is read as it is, by convert and by evaluate."""
        if self.convert.model and stage in ("convert", "evaluate"):
            return ("prepare",)
        return schema.UPSTREAM[stage]

    def chain(self, stage: str) -> tuple[str, ...]:
        """The stage and all that it needs, upstream first."""
        found = {stage}
        for name in reversed(schema.STAGES):
            found |= set(self.upstream(name)) if name in found else set()
        return tuple(s for s in schema.STAGES if s in found)

    def hardware(self, cluster: str, stage: str) -> schema.Hardware:
        """[on.<cluster>.<stage>], or the defaults."""
        return self.on.get(cluster, {}).get(stage, schema.Hardware())

    def config(self, stage: str) -> dict[str, Any]:
        """What the stage's key hashes: its own table, and [model] where it reads it, without `key=False` options.

        A stage that uses a named chat template has the digest of its text, too, so that an edit of the text restages it.
        """
        config: dict[str, Any] = _keyed(getattr(self, stage))
        template = {"prepare": self.prepare.template, "convert": self.convert.eval_template}.get(stage, "")
        if named := chat_templates.TEMPLATES.get(template):
            config["template_text"] = f"{template} {named.digest[:12]}"
        if stage == "sync":
            config["base"] = self.model.base
        if stage == "train":
            config["model"] = _keyed(self.model)
            if weights := self.loss_weights:
                config["loss_weights"] = weights
            if self.train.early_stopping_patience:  # which counts validations
                config["validate_every"] = self.train.validate_every
        if stage == "evaluate" and self.convert.model:  # it exports the model by itself
            config["convert"] = self.config("convert")
        return config


def load(file: Path, overrides: typing.Sequence[str] = (), cluster: str = "local") -> Recipe:
    """Reads and checks a recipe.

    overrides: `field=value` or `table.field=value`, as typed on the command line.
    Raises SftError with a line for every mistake.
    """
    name = file.stem
    with contextlib.suppress(ValueError):
        file = file.relative_to(Path.cwd())  # messages name recipes/x.toml
    if not typed.NAME.fullmatch(name):
        raise SftError(
            f"{file}: a recipe's name is lower-case letters, digits, '.' and '-', not {name!r}; next: rename the file"
        )
    data = typed.read_toml(file, "recipe")
    problems: list[str] = []
    taken = _apply(data, [*overrides, *_fields_of_suite(overrides)], cluster, problems)
    _add_suite(data, problems)
    _add_method(data, taken)
    _add_defaults_of_harness(data)
    for table in data:
        if table not in schema.TABLES and table != "on":
            problems.append(f"no table [{table}]{typed.did_you_mean(table, [*schema.TABLES, 'on'])}")
    values = {t: typed.build(cls, data.get(t, {}), t, problems) for t, cls in schema.TABLES.items()}
    if values["evaluate"] is not None:
        values["evaluate"] = _with_task_options(values["evaluate"], problems)
    on = _hardware(data.get("on", {}), problems)
    _add_clusters_own(on, data.get("on", {}), cluster)
    if not problems:
        problems += rules.check(values, on)
    if problems:
        lines = "\n".join(f"{file}: {p}" for p in problems)
        raise SftError(f"{lines}\nnext: correct it, then `make show RECIPE={name}`; `make fields` lists every field")
    recipe = Recipe(name=name, file=str(file), on=on, **values)
    return dataclasses.replace(recipe, overrides=_changing(taken, file))


def _fields_of_suite(overrides: typing.Sequence[str]) -> list[str]:
    """The fields of a suite that is named on the command line, as overrides: they come before those of the recipe's file.

    Those that are overridden themselves are left out. A suite that does not exist is reported where it is added.
    """
    given = dict(o.partition("=")[::2] for o in overrides)
    file = SUITES / f"{given.get('evaluate.suite', given.get('suite', ''))}.toml"
    if not file.is_file():
        return []
    fields = typed.read_toml(file, "suite").items()
    return [
        f"evaluate.{name}={value if isinstance(value, str) else to_toml(value)}"
        for name, value in fields
        if given.keys().isdisjoint((name, f"evaluate.{name}"))
    ]


def _add_defaults_of_harness(data: dict[str, Any]) -> None:
    """oe-eval processes replies like open-instruct's submission, which says r1_style for every model, if nothing is said."""
    table = data.get("evaluate")
    if isinstance(table, dict) and table.get("harness") == "oe-eval":
        data["evaluate"] = {"process_output": "r1_style", **table}


def _add_suite(data: dict[str, Any], problems: list[str]) -> None:
    """Gives [evaluate] the fields of its suite that it does not set itself."""
    table = data.get("evaluate")
    name = table.get("suite") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(name, str) or not name:
        return
    known = sorted(f.stem for f in SUITES.glob("*.toml"))
    if name not in known:
        hint = typed.did_you_mean(name, known) or f"; there are: {', '.join(known)}"
        problems.append(f"'suite' in [evaluate] = {name!r}: no such file in {SUITES}{hint}")
        return
    suite = typed.read_toml(SUITES / f"{name}.toml", "suite")
    fields = {f.name for f in dataclasses.fields(schema.Evaluate)} - {"suite"}
    for field in suite:
        if field not in fields:
            problems.append(
                f"{SUITES / name}.toml: no field {field!r} in [evaluate]{typed.did_you_mean(field, sorted(fields))}"
            )
            return
    data["evaluate"] = {**suite, **table}
    if "by_task" in suite and isinstance(own := table.get("by_task", {}), dict):
        tasks = data["evaluate"]["tasks"]  # a recipe may name other tasks than its suite
        shared = {
            task: options for task, options in suite["by_task"].items() if isinstance(tasks, list) and task in tasks
        }
        data["evaluate"]["by_task"] = {**own, **{t: {**shared[t], **own.get(t, {})} for t in shared}}


def _with_task_options(evaluate: schema.Evaluate, problems: list[str]) -> schema.Evaluate:
    """[evaluate] with the values of [evaluate.by_task.<task>] converted like its own fields."""
    fields = {f.name: f for f in dataclasses.fields(schema.Evaluate)}
    hints = typing.get_type_hints(schema.Evaluate)
    found: dict[str, dict[str, Any]] = {}
    for task, options in evaluate.by_task.items():
        where = f"in [evaluate.by_task.{task}]"
        if task not in (evaluate.tasks or ()):
            problems.append(
                f"[evaluate.by_task.{task}]: no such entry in 'tasks'{typed.did_you_mean(task, evaluate.tasks or ())}"
            )
        found[task] = {}
        for name, value in options.items():
            if name not in schema.PER_TASK:
                hint = (
                    f"; write thinking = {{ {task} = true }} in [evaluate]"
                    if name == "thinking"
                    else typed.did_you_mean(name, schema.PER_TASK)
                )
                problems.append(
                    f"'{name}' {where}: not a field of one task{hint}; there are: {', '.join(schema.PER_TASK)}"
                )
                continue
            try:
                found[task][name] = typed.convert(value, hints[name], f"evaluate.by_task.{task}.{name}", problems)
                typed.check_bounds(found[task][name], fields[name].metadata)
            except (TypeError, ValueError) as e:
                problems.append(f"'{name}' {where} = {value!r}: {e}")
    return dataclasses.replace(evaluate, by_task=found)


def _add_method(data: dict[str, Any], taken: dict[str, tuple[str, Any]]) -> None:
    """Gives [train] the learning rate of LoRA if it sets none itself. `taken`: the overrides and the values before them."""
    table = data.get("train")
    if not isinstance(table, dict) or table.get("method") != "lora":
        return
    if "train.lr" in taken and taken["train.lr"][1] is None:
        taken["train.lr"] = (taken["train.lr"][0], schema.LORA_LR)
    table.setdefault("lr", schema.LORA_LR)


def from_run(run: str) -> str:
    """The recipe's name in a run's name. Raises SftError for a name that no run can have."""
    if not RUN.fullmatch(run) or ".." in run:
        raise SftError(f"{run!r} is not a run's name: <recipe>[_<field>-<value>…]")
    return run.split("_")[0]


def _hardware(data: Any, problems: list[str]) -> dict[str, dict[str, schema.Hardware]]:
    on: dict[str, dict[str, schema.Hardware]] = {}
    if not isinstance(data, dict):
        problems.append("[on] must hold [on.<cluster>.<stage>] tables")
        return on
    for cluster, stages in data.items():
        on[cluster] = {}
        if not isinstance(stages, dict):
            problems.append(f"[on.{cluster}] = {stages!r} must hold [on.{cluster}.<stage>] tables")
            continue
        if not (CLUSTERS / f"{cluster}.toml").is_file():
            names = sorted(p.stem for p in CLUSTERS.glob("*.toml"))
            hint = typed.did_you_mean(cluster, names) or f"; there are: {', '.join(names)};"
            problems.append(
                f"[on.{cluster}]: no such cluster{hint} next: correct the name, or write env/{cluster}.toml"
            )
        for stage, numbers in stages.items():
            if stage not in schema.STAGES:
                problems.append(f"no stage '{stage}' in [on.{cluster}]{typed.did_you_mean(stage, schema.STAGES)}")
                continue
            on[cluster][stage] = typed.build(schema.Hardware, numbers, f"on.{cluster}.{stage}", problems)
            if isinstance(numbers, dict) and (launcher := _launcher(cluster)):
                problems += typed.unread(schema.Hardware, numbers, launcher, f" in [on.{cluster}.{stage}]")
            problems += typed.of_other_stages(numbers, stage, f" in [on.{cluster}.{stage}]")
    return on


def _add_clusters_own(on: dict[str, dict[str, schema.Hardware]], given: Any, cluster: str) -> None:
    """Adds the numbers of stages that the files of these clusters have, where the recipe does not give them itself."""
    for name in {cluster, *on}:
        for stage, numbers in clusters.numbers_of_stages(CLUSTERS / f"{name}.toml").items():
            own = given.get(name, {}).get(stage, {}) if isinstance(given, dict) else {}
            if isinstance(own, dict):  # another value is a problem that was reported
                on.setdefault(name, {})[stage] = typed.build(schema.Hardware, {**numbers, **own}, "on", [])


def _launcher(cluster: str) -> str:
    """The launcher of env/<cluster>.toml, or "" if the file is not valid: `load_cluster` reports that."""
    try:
        return str(typed.read_toml(CLUSTERS / f"{cluster}.toml", "cluster").get("launcher", "local"))
    except SftError:
        return ""


# --- overrides and keys -------------------------------------------------------------------------------------------


def _apply(
    data: dict[str, Any], overrides: typing.Sequence[str], cluster: str, problems: list[str]
) -> dict[str, tuple[str, Any]]:
    """Writes the overrides into the parsed TOML. Returns {dotted field: (text, the parsed value before)}."""
    taken: dict[str, tuple[str, Any]] = {}
    for override in overrides:
        name, sign, text = override.partition("=")
        path = locate(name, cluster, problems) if sign else None
        if path is None:
            if not sign:
                problems.append(f"override {override!r} is not field=value")
            continue
        *tables, last = path
        cls = schema.Hardware if tables[0] == "on" else schema.TABLES[tables[0]]
        at: Any = data
        for t in tables:
            at = at.setdefault(t, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            problems.append(f"override '{name}': [{'.'.join(tables)}] in the recipe is not a table")
            continue
        if ".".join(path) in taken:
            problems.append(f"override '{name}': given twice, as {taken['.'.join(path)][0]} and {text}")
            continue
        taken[".".join(path)] = (text, at.get(last))
        at[last] = typed.parse_value(text, hint_of(cls, last))
    return taken


def locate(name: str, cluster: str, problems: list[str]) -> tuple[str, ...] | None:
    """The place of an override: ('train', 'lr'), or ('on', 'local', 'train', 'processes'). None if there is a problem."""
    parts = tuple(name.split("."))
    fields = {t: list(names_of(c)) for t, c in schema.TABLES.items()}
    hardware = [f.name for f in dataclasses.fields(schema.Hardware)]
    if len(parts) == 1:
        homes = [t for t, names in fields.items() if name in names]
        if len(homes) == 1:
            return (homes[0], name)
        if len(homes) > 1:
            problems.append(
                f"override '{name}': several tables have it; next: write {' or '.join(f'{h}.{name}' for h in homes)}"
            )
        elif name in hardware:
            return ("on", cluster, typed.reading_stage(name), name)
        else:
            problems.append(
                f"override '{name}': no such field{typed.hint_for(name, sum(fields.values(), hardware), cluster)}"
            )
        return None
    if len(parts) == 2 and parts[1] in fields.get(parts[0], ()):
        return parts
    if len(parts) == 2 and parts[0] in schema.STAGES and parts[1] in hardware:
        return ("on", cluster, *parts)
    if len(parts) == 4 and parts[0] == "on" and parts[2] in schema.STAGES and parts[3] in hardware:
        return parts
    known = [f"{t}.{f}" for t, names in fields.items() for f in names]
    problems.append(f"override '{name}': no such field{typed.hint_for(name, known, cluster)}")
    return None


def _changing(taken: dict[str, tuple[str, Any]], file: Path) -> tuple[tuple[str, str], ...]:
    """The overrides that change a result: those of keyed fields with another value than the recipe's own."""
    order = [f"{t}.{n}" for t, c in schema.TABLES.items() for n, f in names_of(c).items() if f.metadata["key"]]
    kept = []
    for path in order:
        if path in taken:
            text, before = taken[path]
            table, name = path.split(".")
            cls = schema.TABLES[table]
            default = names_of(cls)[name].default
            hint = hint_of(cls, name)
            value = typed.convert(typed.parse_value(text, hint), hint, path, [])
            try:
                was = default if before is None else typed.convert(before, hint, path, [])
            except TypeError:
                was = None  # the recipe's own value has the wrong type, and is replaced
            if value != was:
                kept.append((path, _canonical(value)))
    return tuple(kept)


def _canonical(value: Any) -> str:
    """The same text for equal values, so that 1e-4 and 0.0001 name the same run."""
    if isinstance(value, tuple):
        return ",".join(_canonical(v) for v in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return format(Decimal(repr(value)).normalize(), "e")
    return str(value)


def _short(path: str) -> str:
    """`lr` if one table has the field, `train.seed` if several have it."""
    name = path.split(".")[-1]
    owners = sum(name in names_of(c) for c in schema.TABLES.values())
    return (name if owners == 1 else path).replace("_", "-")


def _label(path: str) -> str:
    """The last words of a path, and a hash of it: "train-step300-1f2e3d"."""
    words = [w for w in re.split(r"[^A-Za-z0-9.+-]+", path.partition("://")[2] or path) if w.strip(".")]
    label = "-".join(words[-3:]).replace("..", ".")[-40:].strip(".-")
    return f"{label}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def _file_safe(text: str) -> str:
    safe = re.fullmatch(r"[A-Za-z0-9.+-]{1,32}", text) and ".." not in text
    return text if safe else hashlib.sha256(text.encode()).hexdigest()[:8]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _in_key(f: dataclasses.Field[Any]) -> bool:
    return bool(f.metadata["key"] and not f.metadata["stage"])


def _keyed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value) if _in_key(f))
        return {name_of(f): _keyed(v) for f, v in fields if not (f.metadata["late"] and v == _default(f))}
    return [_keyed(v) for v in value] if isinstance(value, tuple) else value
