"""lm-eval's tasks: finds one with its data, and hashes everything that decides how it is asked and scored.

In:  a task's name, a folder of task files, the recipe's data paths.
Out: lm-eval's Task, and hashes of its YAML with the files that it includes, of the modules of its functions with the modules
     that they import from beside them (or lm-eval's version, for a task that lm-eval ships), and of its local data files.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import lm_eval.tasks
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.evaluation.scores import json_hash
from sft.evaluation.task_config import check_config, check_written_once
from sft.storage.hub import reaching

SHIPPED = Path(lm_eval.tasks.__file__).resolve().parent
PACKAGE = f"{lm_eval.tasks.__name__}."
LM_EVAL = importlib.metadata.version("lm_eval")


class DefinitionHashes(NamedTuple):
    """sha256 (hex) of how a task is asked and scored, of its data files by split, and lm-eval's version."""

    task_sha256: str
    data_sha256: dict[str, str]
    lm_eval: str


@dataclass(frozen=True)
class TaskDefinition:
    """A task before its data are read. `data` is {split: data file} of a task in the folder."""

    name: str
    folder: Path
    manager: TaskManager
    data: dict[str, Path]
    loaded: Task | None = None
    """A member of a group, with the options that the group gives it."""

    @property
    def file(self) -> Path | None:
        """Its YAML; None for a task that another YAML defines inline."""
        entry = self.manager.task_index.get(self.name)
        return Path(entry.yaml_path).resolve() if entry and entry.yaml_path else None

    @property
    def is_own(self) -> bool:
        """Whether a file of the folder defines it, rather than lm-eval's."""
        return self.file is not None and not self.file.is_relative_to(SHIPPED)

    @property
    def is_group(self) -> bool:
        """Whether the name stands for several tasks: a group, which has scores of its own, or a tag, which has none."""
        return self.manager.task_index[self.name].kind in (Kind.GROUP, Kind.TAG)

    def expand(self) -> tuple[list[TaskDefinition], dict[str, Group]]:
        """(definitions of its tasks, its groups by name): itself and none for a single task. Loads the tasks of a group."""
        if not self.is_group:
            return [self], {}
        found = self.manager.load([self.name])
        return [replace(self, name=name, loaded=task) for name, task in found["tasks"].items()], found["groups"]

    def missing_resources(self) -> str:
        """The data of nltk that the task's code names and that are not installed; nltk would fetch them in the middle of a run."""
        hooks = _parts(self.file)[1] if self.file else []
        beside = {module for folder, hook in hooks for module in _beside(folder, hook)}
        sources = [module.read_text(encoding="utf-8") for module in _with_shipped(beside)]
        if not any("punkt_tab" in text for text in sources):
            return ""
        import nltk  # start-up: few tasks need it

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            return "punkt_tab"
        return ""

    def hashes(self) -> DefinitionHashes:
        """Raises SftError for a part outside of the folder: a change of it would go unnoticed."""
        if self.loaded is not None:
            return DefinitionHashes(
                json_hash({"config": self.loaded.config.to_dict(), "lm_eval": LM_EVAL}), {}, LM_EVAL
            )
        definition: dict[str, Any] = {"config": self.manager.task_index[self.name].cfg}
        if self.file is not None:
            files, hooks = _parts(self.file)
            names = {f"{folder}/{hook}": hook for folder, hook in hooks}
            definition["config"] = _portable(load_yaml(self.file, resolve_func=False), names)
        if self.file is None or self.file.is_relative_to(SHIPPED):
            definition["lm_eval"] = LM_EVAL
        else:
            beside = {module for folder, hook in hooks for module in _beside(folder, hook)}
            for part in (*files, *beside):
                if not part.is_relative_to(self.folder):
                    raise SftError(
                        f"{self.file}: {part} is outside of [evaluate] task_dir {self.folder}; next: copy it there"
                    )
            modules = beside | {module for folder, hook in hooks for module in _installed(folder, hook)}
            definition["modules"] = sorted((m.name, hash_file(m)) for m in modules)
        data = {split: hash_file(file) for split, file in self.data.items()}
        return DefinitionHashes(json_hash(definition), data, LM_EVAL)

    def load(self, seed: int) -> Task:
        """lm-eval's task with its data."""
        if self.loaded is not None:
            task = self.loaded
        elif self.data:
            config = load_yaml(str(self.file))
            config["dataset_kwargs"]["data_files"] = {split: str(file) for split, file in self.data.items()}
            if all(file.suffix == ".parquet" for file in self.data.values()):
                config["dataset_path"] = "parquet"
            task = ConfigurableTask(config=config)
        else:
            task = self.manager.load([self.name])["tasks"][self.name]
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
        if task.OUTPUT_TYPE == "generate_until" and not self._names_stop_strings():
            # lm-eval would add its few-shot delimiter, a blank line, which ends a chat model's reply after one paragraph.
            task.config.generation_kwargs["until"] = []
        return task

    def _names_stop_strings(self) -> bool:
        """Whether the task's own files say which strings end a reply."""
        entry = self.manager.task_index.get(self.name)
        config = (entry and entry.cfg) if self.file is None else load_yaml(self.file, resolve_func=False)
        return ((config or {}).get("generation_kwargs") or {}).get("until") is not None


def find(name: str, folder: Path, data: Mapping[str, Path | str]) -> TaskDefinition:
    """A task by name, from the folder or else from lm-eval. Its data_files are looked up in `data`, then in the folder.

    Raises SftError for an unknown task and for data that the recipe does not name.
    """
    folder = folder.resolve()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if name not in manager.all_tasks:
        manager = _all_tasks(folder)
    entry = manager.task_index.get(name)
    if entry is None:
        why = ""
        names_it = re.compile(rf"^task:\s*[\"']?{re.escape(name)}\b", re.MULTILINE)
        for own in sorted(folder.rglob("*.yaml")):
            if own != folder / f"{name}.yaml" and not names_it.search(own.read_text(encoding="utf-8")):
                continue
            try:
                why = f"; {own} names {load_yaml(own, resolve_func=False).get('task')!r}"
            except (OSError, ValueError, yaml.YAMLError) as error:  # lm-eval skips such a file
                why = f"; {own}: {error}"
        shipped = (paths.REPO / "recipes" / folder.name / f"{name}.yaml").resolve()
        if shipped.is_file() and shipped.parent != folder:
            raise SftError(
                f"[evaluate] tasks: {name!r} is in {shipped.parent}, other tasks of the recipe are in {folder}, and a recipe has one task_dir; next: copy {shipped.name} and the files it names into {folder}, or write a second recipe"
            )
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}? similar names: {', '.join(near)}" if near else ""
        raise SftError(
            f"[evaluate] tasks: no task {name!r} in {folder} or lm-eval{hint}{why}; next: correct the name, or add the task's file to [evaluate] task_dir"
        )
    files: dict[str, str] = {}
    if entry.yaml_path and not (file := Path(entry.yaml_path).resolve()).is_relative_to(SHIPPED):
        for part in _parts(file)[0]:
            if not part.is_relative_to(SHIPPED):
                check_written_once(yaml.compose(part.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), part)
        config = load_yaml(file, resolve_func=False)
        if entry.kind is Kind.TASK and "task_list" not in config:
            check_config(config, file)
        files = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    return TaskDefinition(
        name, folder, manager, {split: _data_file(name, f, folder, data) for split, f in files.items()}
    )


@functools.cache
def _all_tasks(folder: Path) -> TaskManager:
    """With lm-eval's own tasks: it takes half a minute to read their thousands of files."""
    return TaskManager(include_path=str(folder))


def _parts(file: Path, seen: frozenset[Path] = frozenset()) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(the YAML and those that it includes, (folder, name) of each of their functions), without running anything."""
    files, hooks = [file], []

    def walk(node: Any) -> Iterator[Any]:
        if isinstance(node, (list, tuple)):
            for child in node:
                yield from walk(child)
        elif isinstance(node, yaml.Node):
            yield node
            yield from walk(node.value)

    top = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for node in walk(top):
        if node.tag == "!function":
            hooks.append((file.parent, node.value))
    for key, value in top.value:
        for included in walk(value) if key.value == "include" else ():
            if (
                isinstance(included, yaml.ScalarNode)
                and (other := (file.parent / included.value).resolve()) not in seen
            ):
                more = _parts(other, seen | {file})
                files, hooks = files + more[0], hooks + more[1]
    return files, hooks


def _beside(folder: Path, hook: str) -> set[Path]:
    """The module of a function that is beside its YAML, and the modules that it imports from there, also inside functions."""
    file = _module(folder, hook)
    if not file.is_file():
        return set()
    finder = ModuleFinder(path=[str(file.parent)])
    finder.run_script(str(file))
    found = [getattr(module, "__file__", None) for module in finder.modules.values()]
    return {Path(name).resolve() for name in found if name}


def _with_shipped(modules: Iterable[Path]) -> set[Path]:
    """The modules, and those of lm-eval's tasks that they import: IFEval's functions import the rest of it by such names."""
    found, waiting = set(), list(modules)
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            shipped = [name.removeprefix(PACKAGE) for name in names if name.startswith(PACKAGE)]
            candidates = [SHIPPED / f"{name.replace('.', '/')}.py" for name in shipped]
            waiting += [candidate for candidate in candidates if candidate.is_file()]
    return found


def _installed(folder: Path, hook: str) -> set[Path]:
    """The module of a function that comes from an installed package."""
    spec = None if _module(folder, hook).is_file() else importlib.util.find_spec(hook.rpartition(".")[0])
    return {Path(spec.origin)} if spec and spec.origin else set()


def _module(folder: Path, hook: str) -> Path:
    return (folder / (hook.rpartition(".")[0].replace(".", "/") + ".py")).resolve()


def _portable(value: Any, names: Mapping[str, str]) -> Any:
    """A configuration with its functions named as in the YAML, without this machine's folders."""
    if isinstance(value, dict):
        return {str(k): _portable(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def _data_file(task: str, name: str, folder: Path, data: Mapping[str, Path | str]) -> Path:
    if name in data:
        path = data[name]
        return path if isinstance(path, Path) else hub_file(path, f"[evaluate] data.{name}")
    beside = folder / name
    if beside.is_file() and beside.resolve().is_relative_to(folder):
        return beside
    raise SftError(
        f'[evaluate] data: task {task} needs the file {name!r}; next: add {name} = "path under DATA" (or'
        ' "hf://org/dataset/file") to [evaluate] data'
    )


def hub_file(path: str, what: str) -> Path:
    """A file of a dataset on the hub: hf://org/name[@revision]/path. Raises SftError."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)", path)
    if not match:
        raise SftError(f"{what}: {path!r} is not hf://org/name[@revision]/file; next: correct it")
    name, revision, file = match.groups()
    with reaching(what):
        return Path(huggingface_hub.hf_hub_download(name, file, repo_type="dataset", revision=revision))
