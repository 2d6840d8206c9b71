"""Recipes: TOML in, frozen dataclasses out. Every mistake is reported with file, field, value and the next command.

    recipe = load(Path("recipes/smoke.toml"), ["lr=1e-4"])
    recipe.train.lr, recipe.run, recipe.config("train")

The options are declared in `sft.recipe.schema`. Standard library only: the planner uses this while Make parses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.paths import REPO
from sft.recipe import chat_templates, other_names, presets, resolve, schema

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # a recipe or cluster; '_' separates a run's overrides
CLUSTERS = REPO / "env"
SUITES = REPO / "recipes" / "suites"
FEW_ROWS = 32  # an integer weight below this is taken for a multiple written without its ".0"
HARDWARE_FIELDS = {f.name: f for f in dataclasses.fields(schema.Hardware)}
FIELDS_OF_TABLES = {f.name for cls in schema.TABLES.values() for f in dataclasses.fields(cls)}
FIELDS = FIELDS_OF_TABLES | HARDWARE_FIELDS.keys()
MODEL = "convert.model"
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
        parts = [f"_{_short(path)}-{_file_safe(value)}" for path, value in self.overrides if path != MODEL]
        name = self.name + "".join(parts)
        name = name if len(name) <= 120 else f"{self.name}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return name + (self._other_model if MODEL in dict(self.overrides) else "")

    @property
    def _other_model(self) -> str:
        """The end of a run's name for [convert] model; that of the base is BASELINE."""
        model = self.convert.model
        if model and model == self.model.base:
            return BASELINE
        words = [w for w in re.split(r"[^A-Za-z0-9.+-]+", model.partition("://")[2] or model) if w.strip(".")]
        label = "-".join(words[-3:]).replace("..", ".")[-40:].strip(".-")
        return f"_model-{label}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"

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
    if not NAME.fullmatch(name):
        raise SftError(
            f"{file}: a recipe's name is lower-case letters, digits, '.' and '-', not {name!r}; next: rename the file"
        )
    data = read_toml(file, "recipe")
    problems: list[str] = []
    taken = _apply(data, overrides, cluster, problems)
    _add_suite(data, problems)
    _add_method(data, taken)
    for table in data:
        if table not in schema.TABLES and table != "on":
            problems.append(f"no table [{table}]{_did_you_mean(table, [*schema.TABLES, 'on'])}")
    values = {t: build(cls, data.get(t, {}), t, problems) for t, cls in schema.TABLES.items()}
    if values["evaluate"] is not None:
        values["evaluate"] = _with_task_options(values["evaluate"], problems)
    on = _hardware(data.get("on", {}), problems)
    if not problems:
        problems += _check(values, on)
    if problems:
        lines = "\n".join(f"{file}: {p}" for p in problems)
        raise SftError(f"{lines}\nnext: correct it, then `make show RECIPE={name}`; `make fields` lists every field")
    recipe = Recipe(name=name, file=str(file), on=on, **values)
    return dataclasses.replace(recipe, overrides=_changing(taken, file))


def _add_suite(data: dict[str, Any], problems: list[str]) -> None:
    """Gives [evaluate] the fields of its suite that it does not set itself."""
    table = data.get("evaluate")
    name = table.get("suite") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(name, str) or not name:
        return
    known = sorted(f.stem for f in SUITES.glob("*.toml"))
    if name not in known:
        hint = _did_you_mean(name, known) or f"; there are: {', '.join(known)}"
        problems.append(f"'suite' in [evaluate] = {name!r}: no such file in {SUITES}{hint}")
        return
    suite = read_toml(SUITES / f"{name}.toml", "suite")
    fields = {f.name for f in dataclasses.fields(schema.Evaluate)} - {"suite"}
    for field in suite:
        if field not in fields:
            problems.append(
                f"{SUITES / name}.toml: no field {field!r} in [evaluate]{_did_you_mean(field, sorted(fields))}"
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
        if task not in evaluate.tasks:
            problems.append(f"[evaluate.by_task.{task}]: no such entry in 'tasks'{_did_you_mean(task, evaluate.tasks)}")
        found[task] = {}
        for name, value in options.items():
            if name not in schema.PER_TASK:
                hint = (
                    f"; write thinking = {{ {task} = true }} in [evaluate]"
                    if name == "thinking"
                    else _did_you_mean(name, schema.PER_TASK)
                )
                problems.append(
                    f"'{name}' {where}: not a field of one task{hint}; there are: {', '.join(schema.PER_TASK)}"
                )
                continue
            try:
                found[task][name] = _convert(value, hints[name], f"evaluate.by_task.{task}.{name}", problems)
                _bounds(found[task][name], fields[name].metadata)
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


def unread(cls: type, present: typing.Iterable[str], launcher: str, where: str = "") -> list[str]:
    """One line for each launcher of fields that this launcher does not read."""
    names: dict[tuple[str, ...], list[str]] = {}
    for f in dataclasses.fields(cls):
        if f.name in present and launcher not in (f.metadata["launchers"] or schema.LAUNCHERS):
            names.setdefault(f.metadata["launchers"], []).append(f"'{f.name}'")
    return [
        f"{', '.join(fields)}{where}: for launcher = {' or '.join(map(repr, readers))} only, and this is {launcher!r}; remove it"
        for readers, fields in names.items()
    ]


def find(folder: Path, name: str, what: str) -> Path:
    """The TOML file of a recipe or cluster, by its name. Raises SftError with similar names."""
    file = folder / f"{name}.toml"
    if name.endswith(".toml"):
        raise SftError(
            f"{what} {name!r}: give its name without .toml; did you mean '{Path(name).stem}'? next: correct the name"
        )
    if not NAME.fullmatch(name):
        raise SftError(f"{what} {name!r}: names are lower-case letters, digits, '.' and '-'; next: correct the name")
    if not file.is_file():
        names = sorted(p.stem for p in folder.glob("*.toml"))
        hint = _did_you_mean(name, names) or f"; there are: {', '.join(names)};"
        raise SftError(f"{file}: no such {what}{hint} next: correct the name, or write this file")
    return file


def from_run(run: str) -> str:
    """The recipe's name in a run's name. Raises SftError for a name that no run can have."""
    if not RUN.fullmatch(run) or ".." in run:
        raise SftError(f"{run!r} is not a run's name: <recipe>[_<field>-<value>…]")
    return run.split("_")[0]


def read_toml(file: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SftError(f"{file}: no such {what}; next: correct the name, or write this file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SftError(f"{file}: not valid TOML: {e}; next: correct that line") from None


def _hint(name: str, known: typing.Iterable[str], cluster: str = "<cluster>") -> str:
    """What a name that is no field here probably means: another trainer's name for one, or one that is spelled like it."""
    if name in HARDWARE_FIELDS:
        return f"; it belongs to [on.<cluster>.{_reader(name)}]"
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    answer = "" if close else other_names.answer(name, cluster)
    return f"; {answer}" if answer else _did_you_mean(name, known)


def _reader(hardware: str) -> str:
    """The stage that a number of [on.<cluster>.<stage>] belongs to where none is named."""
    stages = HARDWARE_FIELDS[hardware].metadata["stages"]
    return "train" if not stages or "train" in stages else str(stages[0])


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


# --- typed construction -------------------------------------------------------------------------------------------


def build(cls: type, data: Any, table: str, problems: list[str]) -> Any:
    where = f" in [{table}]" if table else ""
    if not isinstance(data, dict):
        problems.append(f"[{table}] must be a table, not {data!r}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in data.items():
        if name not in fields:
            home = next((t for t, c in schema.TABLES.items() if name in {f.name for f in dataclasses.fields(c)}), None)
            hint = f"; it belongs to [{home}]" if home else _hint(name, fields)
            problems.append(f"no field '{name}'{where}{hint}")
            continue
        try:
            values[name] = _convert(value, hints[name], f"{table}.{name}".lstrip("."), problems)
            _bounds(values[name], fields[name].metadata)
        except (TypeError, ValueError) as e:
            problems.append(f"'{name}'{where} = {value!r}: {e}")
    for name, f in fields.items():
        if f.metadata.get("required") and values.get(name) == ():
            problems.append(f"'{name}'{where} is empty: at least one is needed")
        if f.metadata.get("required") and name not in data:
            problems.append(f"'{name}'{where} is missing: {f.metadata['doc']}")
    return cls(**values)


_KINDS = {(str,): "strings", (bool,): "true or false"}


def _convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """A TOML value as the type that the schema declares. Raises TypeError naming the expected type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        exact = [a for a in options if type(value) is a]
        return _convert(value, exact[0] if exact else options[0], where, problems)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError("a list is expected")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise TypeError(f"{len(args)} values are expected")
        kinds = args if args[-1] is not Ellipsis else (args[0],) * len(value)
        return tuple(
            _convert(v, k, f"{where}.{i}", problems) for i, (v, k) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is dict and typing.get_origin(args[1]) is dict:
        if not isinstance(value, dict):
            raise TypeError("a table of tables is expected")
        return {k: _convert(v, args[1], f"{where}.{k}", problems) for k, v in value.items()}
    if origin is dict and args[1] is Any:
        if not isinstance(value, dict):
            raise TypeError("a table is expected")
        return dict(value)
    if origin is dict:
        kinds = typing.get_args(args[1]) or (args[1],)
        if not isinstance(value, dict) or not all(type(v) in kinds for v in value.values()):
            what = _KINDS.get(kinds, "strings, numbers and true or false")
            raise TypeError(f"a table of {what} is expected")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, problems)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise TypeError(f"{names.get(hint, hint)} is expected, not a {type(value).__name__}")
    return value


def _bounds(value: Any, rule: typing.Mapping[str, Any]) -> None:
    for v in value if isinstance(value, (tuple, dict)) else (value,):
        if isinstance(v, dict):
            continue
        if rule["choices"] and v not in rule["choices"]:
            hint = rule["hints"].get(v) or _did_you_mean(str(v), rule["choices"])
            raise ValueError(f"one of {', '.join(rule['choices'])} is expected{hint}")
        if isinstance(v, str) and "\0" in v:
            raise ValueError("a NUL character is not allowed")
        if not isinstance(v, int | float) or isinstance(v, bool):
            continue
        if v != v or v in (float("inf"), float("-inf")):
            raise ValueError("a finite number is expected")
        if rule["min"] is not None and v < rule["min"]:
            raise ValueError(f"at least {rule['min']} is expected")
        if rule["max"] is not None and v > rule["max"]:
            raise ValueError(f"at most {rule['max']} is expected")
        if rule["above"] is not None and v <= rule["above"]:
            raise ValueError(f"more than {rule['above']} is expected")


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
            hint = _did_you_mean(cluster, names) or f"; there are: {', '.join(names)};"
            problems.append(
                f"[on.{cluster}]: no such cluster{hint} next: correct the name, or write env/{cluster}.toml"
            )
        for stage, numbers in stages.items():
            if stage not in schema.STAGES:
                problems.append(f"no stage '{stage}' in [on.{cluster}]{_did_you_mean(stage, schema.STAGES)}")
                continue
            on[cluster][stage] = build(schema.Hardware, numbers, f"on.{cluster}.{stage}", problems)
            if isinstance(numbers, dict) and (launcher := _launcher(cluster)):
                problems += unread(schema.Hardware, numbers, launcher, f" in [on.{cluster}.{stage}]")
            problems += [
                f"'{name}' in [on.{cluster}.{stage}]: {stage} does not read it, only {' and '.join(readers)}; remove it"
                for name in numbers
                if name in HARDWARE_FIELDS
                and (readers := HARDWARE_FIELDS[name].metadata["stages"])
                and stage not in readers
            ]
    return on


def _launcher(cluster: str) -> str:
    """The launcher of env/<cluster>.toml, or "" if the file is not valid: `load_cluster` reports that."""
    try:
        return str(read_toml(CLUSTERS / f"{cluster}.toml", "cluster").get("launcher", "local"))
    except SftError:
        return ""


def _check_rendering(prepare: schema.Prepare) -> list[str]:
    """Options that only Jinja templates read, and the form of a date."""
    problems = []
    if prepare.date and not _is_date(prepare.date):
        problems.append(f"'date' in [prepare] = {prepare.date!r}: a day is expected, e.g. \"2026-07-01\"")
    if prepare.template in chat_templates.TEMPLATES:
        default = schema.Prepare(tokenizer="", sources=())
        problems += [
            f"'{name}' in [prepare]: the named template {prepare.template!r} does not read it; remove it"
            for name in ("date", "template_variables", "generation_prefix")
            if getattr(prepare, name) != getattr(default, name)
        ]
    return problems


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _check(values: dict[str, Any], on: dict[str, dict[str, schema.Hardware]]) -> list[str]:
    """Checks that need more than one field."""
    problems = []
    model, train = values["model"], values["train"]
    problems += _check_rendering(values["prepare"])
    problems += _check_groups(values["prepare"])
    for source in values["prepare"].sources:
        if isinstance(source.weight, int) and source.weight < FEW_ROWS:
            n = source.weight
            problems.append(f"'weight' of {source.path} in [[prepare.sources]] = {n} would be {n} row{'s' * (n > 1)} in all: an integer"
                            f" is a number of rows; write {n}.0 for the whole source {n} times, or max_documents = {n}")  # fmt: skip
    if not model.preset:
        if not model.base:
            problems.append(f"'preset' in [model] is missing: random weights need one (presets: {', '.join(presets.PRESETS)});"
                            " weights of a base need only 'base'")  # fmt: skip
    elif model.preset not in presets.PRESETS:
        problems.append(f"'preset' in [model] = {model.preset!r}{_did_you_mean(model.preset, presets.PRESETS)}"
                        f" (presets: {', '.join(presets.PRESETS)})")  # fmt: skip
    else:
        try:
            resolve.resolve(model)
        except SftError as e:
            problems.append(str(e))
    if train.global_batch_tokens % train.seq_len:
        low = train.global_batch_tokens // train.seq_len * train.seq_len
        near = f"{low or train.seq_len} or {low + train.seq_len}"
        problems.append(f"'global_batch_tokens' in [train] = {train.global_batch_tokens} is not a multiple of 'seq_len' ="
                        f" {train.seq_len}; try {near}")  # fmt: skip
    if train.schedule == "wsd" and train.warmup_fraction + train.decay_fraction > 1:
        problems.append(f"'warmup_fraction' {train.warmup_fraction:g} and 'decay_fraction' {train.decay_fraction:g} in [train] are more"
                        " than the whole run: lower one of them")  # fmt: skip
    problems += _check_other_model(values["convert"], values["evaluate"])
    problems += _check_method(train, values["prepare"])
    return [*problems, *_check_evaluate(values["evaluate"]), *_check_hardware(train, on)]


def _check_other_model(convert: schema.Convert, evaluate: schema.Evaluate) -> list[str]:
    """[convert] model, and the option that only it has."""
    if not convert.model:
        own = "'eval_template' in [convert] = 'model': there is no [convert] model; leave it empty for the trained template"
        return [own] if convert.eval_template == "model" else []
    if evaluate.harness != "lm-eval":
        return [
            f"'model' in [convert]: harness = {evaluate.harness!r} takes another model by [evaluate] location; set that"
        ]
    return []


def _check_method(train: schema.Train, prepare: schema.Prepare) -> list[str]:
    """Options that only LoRA reads, those that it cannot train with, and bounds of tables."""
    default = schema.Train()
    for field in ("lr_factors", "weight_decays"):
        for pattern, value in getattr(train, field).items():
            if not 0 <= value < float("inf"):
                return [f"'{field}' in [train]: {pattern} = {value}: at least 0 is expected"]
    if train.freeze and train.train_only:
        return ["'freeze' and 'train_only' in [train]: one of them says what is trained; remove the other"]
    if train.method != "lora":
        return [
            f"'{name}' in [train] = {getattr(train, name)!r}: for method = 'lora' only, and this is {train.method!r}; remove it"
            for name in schema.LORA_FIELDS
            if getattr(train, name) != getattr(default, name)
        ]
    if chosen := [name for name in ("freeze", "train_only") if getattr(train, name)]:
        return [
            f"'{chosen[0]}' in [train]: method = 'lora' trains adapters alone; say with lora_targets which matrices get one"
        ]
    if prepare.add_tokens:
        return [
            f"'add_tokens' in [prepare] = {list(prepare.add_tokens)!r}: their rows of the embedding would stay as they are with"
            " method = 'lora'; use method = 'full', or remove them"
        ]
    return []


def _check_groups(prepare: schema.Prepare) -> list[str]:
    """Groups of one kind only: the same conversation in two sources has another group in each where only one of them names a column."""
    if not prepare.validation_fraction or len({bool(source.validation_group) for source in prepare.sources}) < 2:
        return []
    without = ", ".join(source.path for source in prepare.sources if not source.validation_group)
    return [
        f"'validation_group' is set in some of [[prepare.sources]] and not in {without}: the same conversation could be trained and held out; set"
        " it in all or in none"
    ]


def _check_evaluate(evaluate: schema.Evaluate) -> list[str]:
    problems = []
    task, _, metric = evaluate.best.partition("/")
    if evaluate.best and not (metric and task in evaluate.tasks) and evaluate.best != "validation/loss":
        problems.append(f"'best' in [evaluate] = {evaluate.best!r}: 'validation/loss', or 'task/metric' of one of"
                        f" {', '.join(evaluate.tasks)}")  # fmt: skip
    if evaluate.every and evaluate.harness != "lm-eval":
        problems.append(
            f"'every' in [evaluate] = {evaluate.every}: evaluating during training needs harness = 'lm-eval'"
        )
    for task in evaluate.thinking:
        if task != "*" and task not in evaluate.tasks:
            problems.append(
                f"'thinking' in [evaluate]: no task {task!r} among {', '.join(evaluate.tasks)}, and it is not '*'"
            )
    problems += _check_asking(evaluate, "[evaluate]")
    for task in evaluate.by_task:
        problems += _check_asking(evaluate.for_task(task), f"[evaluate.by_task.{task}]")
    problems += _check_server(evaluate)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", evaluate.every_device):
        problems.append(f"'every_device' in [evaluate] = {evaluate.every_device!r}: cpu, or a GPU such as cuda:1")
    if evaluate.every and evaluate.backend == "vllm" and evaluate.every_device == "cpu":
        problems.append("'every_device' in [evaluate] = 'cpu': backend = 'vllm' needs a GPU of its own, such as cuda:1")
    return problems


def _check_server(evaluate: schema.Evaluate) -> list[str]:
    """The fields of backend = "server"."""
    named = [name for name in ("base_url", "served_model") if getattr(evaluate, name)]
    if evaluate.backend != "server":
        return [f"'{name}' in [evaluate]: only backend = 'server' reads it; remove it" for name in named]
    url, example = evaluate.base_url, "http://127.0.0.1:8000/v1/completions"
    if not url:
        return [
            f"'base_url' in [evaluate] is missing: backend = 'server' needs the address of the server, e.g. {example}"
        ]
    if url.endswith("/chat/completions"):
        return [
            f"'base_url' in [evaluate] = {url!r}: the server would write prompts with a template of its own, and has no likelihoods there; write"
            f" {url.removesuffix('/chat/completions')}/completions"
        ]
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?/completions", url):
        return [f"'base_url' in [evaluate] = {url!r}: an address such as {example} is expected"]
    return []


def _check_asking(options: schema.Evaluate, table: str) -> list[str]:
    """How tasks are asked: [evaluate], or what counts for one task."""
    problems = []
    thoughts = options.process_output != "none" or any(options.thinking.values())
    if options.max_thought_tokens and not thoughts:
        problems.append(
            f"'max_thought_tokens' in {table} = {options.max_thought_tokens}: no task has thoughts; set thinking = {{ \"*\" = true }}"
            " or process_output = 'r1_style'"
        )
    if options.samples > 1 and options.temperature == 0:
        problems.append(
            f"'samples' in {table} = {options.samples}: temperature = 0 gives as many equal replies; set one above 0"
        )
    return problems


def _check_hardware(train: schema.Train, on: dict[str, dict[str, schema.Hardware]]) -> list[str]:
    problems = []
    for cluster, stages in on.items():
        h = stages.get("train")
        if h is None:
            continue
        micro = h.microbatch_tokens or train.seq_len
        ranks = h.nodes * max(1, h.processes)
        groups = max(1, ranks // h.context_degree)
        if h.nodes > 1 and cluster == "local":
            problems.append(f"'nodes' in [on.local.train] = {h.nodes}: 'local' is one machine")
        if micro % train.seq_len:
            problems.append(
                f"'microbatch_tokens' in [on.{cluster}.train] = {micro} is not a multiple of 'seq_len' = {train.seq_len}"
            )
        elif train.global_batch_tokens % (micro * groups):
            who = "ranks" if h.context_degree == 1 else f"groups of {h.context_degree} ranks"
            problems.append(
                f"'global_batch_tokens' in [train] = {train.global_batch_tokens} is not a multiple of {groups} {who} x"
                f" microbatch_tokens {micro} = {micro * groups} on [on.{cluster}.train]; change one of them"
            )
    return problems


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
        at[last] = parse_value(text, typing.get_type_hints(cls)[last])
    return taken


def locate(name: str, cluster: str, problems: list[str]) -> tuple[str, ...] | None:
    """The place of an override: ('train', 'lr'), or ('on', 'local', 'train', 'processes'). None if there is a problem."""
    parts = tuple(name.split("."))
    fields = {t: [f.name for f in dataclasses.fields(c)] for t, c in schema.TABLES.items()}
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
            return ("on", cluster, _reader(name), name)
        else:
            problems.append(f"override '{name}': no such field{_hint(name, sum(fields.values(), hardware), cluster)}")
        return None
    if len(parts) == 2 and parts[1] in fields.get(parts[0], ()):
        return parts
    if len(parts) == 2 and parts[0] in schema.STAGES and parts[1] in hardware:
        return ("on", cluster, *parts)
    if len(parts) == 4 and parts[0] == "on" and parts[2] in schema.STAGES and parts[3] in hardware:
        return parts
    known = [f"{t}.{f}" for t, names in fields.items() for f in names]
    problems.append(f"override '{name}': no such field{_hint(name, known, cluster)}")
    return None


def parse_value(text: str, hint: Any) -> Any:
    """A command-line value as a TOML value. Strings need no quotes, and lists may be separated by commas."""
    if typing.get_origin(hint) is tuple and not text.startswith("["):
        kind = typing.get_args(hint)[0]
        return [parse_value(t, kind) for t in text.split(",")]
    if hint is str:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def _changing(taken: dict[str, tuple[str, Any]], file: Path) -> tuple[tuple[str, str], ...]:
    """The overrides that change a result: those of keyed fields with another value than the recipe's own."""
    order = [f"{t}.{f.name}" for t, c in schema.TABLES.items() for f in dataclasses.fields(c) if f.metadata["key"]]
    kept = []
    for path in order:
        if path in taken:
            text, before = taken[path]
            table, name = path.split(".")
            cls = schema.TABLES[table]
            default = next(f for f in dataclasses.fields(cls) if f.name == name).default
            hint = typing.get_type_hints(cls)[name]
            value = _convert(parse_value(text, hint), hint, path, [])
            try:
                was = default if before is None else _convert(before, hint, path, [])
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
    owners = sum(name in {f.name for f in dataclasses.fields(c)} for c in schema.TABLES.values())
    return (name if owners == 1 else path).replace("_", "-")


def _file_safe(text: str) -> str:
    safe = re.fullmatch(r"[A-Za-z0-9.+-]{1,32}", text) and ".." not in text
    return text if safe else hashlib.sha256(text.encode()).hexdigest()[:8]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _keyed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.metadata["key"])
        return {f.name: _keyed(v) for f, v in fields if not (f.metadata["late"] and v == _default(f))}
    return [_keyed(v) for v in value] if isinstance(value, tuple) else value
