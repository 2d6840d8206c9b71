"""The doctor's check of evaluation tasks: names, packages and data, before training and not after it.

In:  [evaluate] of a recipe, its task files. Out: rows of the table.

Where every task is a file of the folder that makes its own documents, and is asked as it says, reading those files is enough: their
names, and the packages that their modules import. Other tasks (lm-eval's own, groups, and those with a data set or data files) are imported with their
data in the pinned environment (sft.evaluation.task_check), which takes some seconds and fills runs/.cache/datasets. What was
found right is remembered under runs/.cache/tasks by the text of the tasks, their data and the environment. Standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.common import paths
from sft.common.files import canonical, write_atomic
from sft.common.hashcache import HashCache
from sft.formats.record import to_json
from sft.launch.doctor.context import OK, RED, SKIPPED, Context, Row
from sft.recipe import inputs
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.schema import PER_TASK, Evaluate
from sft.runner import plan

PYTHON = paths.REPO / ".venv" / "bin" / "python"
TIMEOUT_S = 3600.0
"""A first check may download the data sets of many tasks."""


def tasks(context: Context) -> Iterator[Row]:
    """Every task can be imported, with its packages and its data."""
    options = context.recipe.evaluate
    if options.harness != "lm-eval":
        return
    what = f"{context.recipe.file}: [evaluate] task_dir"
    folder = inputs.task_folder(options, lambda path: paths.find(context.place.roots, path, what))
    own = inputs.own_tasks(folder)
    yield from _unread(options, folder)
    is_made_here = all(name in own and not _has_data(own[name]) for name in options.tasks)
    if is_made_here and not (options.num_fewshot > 0 or options.samples > 1 or options.thinking or options.by_task):
        yield from _static(context, folder)
        return
    done = context.place.cache / "tasks" / f"{_key(context)}.json"
    data = plan.task_data(context.place, context.recipe)
    is_done = done.is_file() and data.is_dir()
    if not is_done and not context.imports:
        yield Row(
            SKIPPED, "tasks", f"{', '.join(options.tasks)}: not imported", f"make doctor RECIPE={context.recipe.name}"
        )
        return
    if not is_done:
        problems = list(_imported(context, folder))
        if problems:
            yield from problems
            return
        for folder in (data, done.parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(done, canonical(list(options.tasks)))
    yield Row(OK, "tasks", f"{', '.join(options.tasks)}: imported with their data")


def _unread(options: Evaluate, folder: Path) -> Iterator[Row]:
    """A red row for every entry of `data` that no task file of the folder names."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.yaml"))
    names = set(re.findall(r"[\w.-]+", text))
    for name in options.data:
        if name not in names:
            yield Row(
                RED,
                "tasks",
                f"[evaluate] data.{name}: no task file of {folder} reads it",
                "correct the name, or remove it",
            )


def _asking(options: Evaluate) -> dict[str, Any]:
    """The fields that say how tasks are asked, where they differ from the defaults: a task may not allow them."""
    default = Evaluate()
    names = (*PER_TASK, "by_task", "thinking")
    return {name: getattr(options, name) for name in names if getattr(options, name) != getattr(default, name)}


def _template(context: Context) -> str:
    """The chat template of the evaluation, "" where only prepare or the model will say it."""
    recipe = context.recipe
    name = recipe.convert.eval_template or recipe.prepare.template
    if name in TEMPLATES:
        return TEMPLATES[name].jinja
    what = f"{recipe.file}: template"
    return paths.find(context.place.roots, name, what).read_text() if inputs.is_template_file(name) else ""


def _has_data(file: Path) -> bool:
    """Whether a task reads a data set or data files; an included file may say so."""
    return re.search(r"^(dataset_path|include):", file.read_text(encoding="utf-8"), re.M) is not None


def _static(context: Context, folder: Path) -> Iterator[Row]:
    """The packages that the modules of a folder import are installed, or lie beside it."""
    site = next(iter(sorted(PYTHON.parent.parent.glob("lib/python3*/site-packages"))), None)
    names = ", ".join(context.recipe.evaluate.tasks)
    if site is None:
        yield Row(SKIPPED, "tasks", f"{names}: packages are not checked, .venv is not there", "make setup")
        return
    for file in sorted(folder.rglob("*.py")):
        for package in _imports(file):
            here = (site / package, site / f"{package}.py", folder / f"{package}.py", file.parent / f"{package}.py")
            if package not in sys.stdlib_module_names and not any(p.exists() for p in here) and package != "sft":
                yield Row(RED, "tasks", f"{file} imports {package}, which is not installed",
                          f"make setup, or .venv/bin/python -m pip install {package}")  # fmt: skip
                return
    yield Row(OK, "tasks", f"{names}: in {folder}")


def _imports(file: Path) -> set[str]:
    """Packages that a module imports at its top. A file that Python cannot read has none: importing it says why."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return set()
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _key(context: Context) -> str:
    """Names what decides whether the tasks can be imported: their text, their data files, the environment."""
    options = context.recipe.evaluate
    files = to_json(plan.input_files(context.place, context.recipe, "evaluate", HashCache(context.place.cache)))
    asked = [
        list(options.tasks),
        sorted(options.data.items()),
        _asking(options),
        _template(context),
        files,
        plan.environment_digest(),
    ]
    return hashlib.sha256(canonical(asked)).hexdigest()[:32]


def _imported(context: Context, folder: Path) -> Iterator[Row]:
    """A red row for every task that cannot be imported with its data in the pinned environment."""
    if not PYTHON.is_file():
        yield Row(SKIPPED, "tasks", "not checked: .venv is not there", "make setup")
        return
    options, roots = context.recipe.evaluate, context.place.roots
    data = {
        name: path if inputs.is_remote(path) else str(paths.find(roots, path, f"{context.recipe.file}: [evaluate] data.{name}"))
        for name, path in options.data.items()
    }  # fmt: skip
    asked = {
        "tasks": list(options.tasks),
        "folder": str(folder),
        "data": data,
        "asking": _asking(options),
        "template": _template(context),
        "cache": str(plan.task_data(context.place, context.recipe)),
    }
    command = [str(PYTHON), "-m", "sft.evaluation.task_check", json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": str(paths.REPO / "lib"), "TQDM_DISABLE": "1"}
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=paths.REPO
        )
    except subprocess.TimeoutExpired:
        yield Row(RED, "tasks", f"importing them took more than {TIMEOUT_S:.0f} s", "make doctor again: it continues")
        return
    answered = set()
    for line in ran.stdout.splitlines():
        if line.startswith('{"task": '):
            found = json.loads(line)
            answered.add(found["task"])
            if "problem" in found:
                problem = found["problem"].removeprefix("[evaluate] tasks: ")
                yield Row(RED, "tasks", f"[evaluate] tasks: {found['task']}: {problem}", found["next"])
    if missing := [name for name in options.tasks if name not in answered]:
        end = " ".join(ran.stderr.split())[-300:]
        yield Row(
            RED, "tasks", f"{', '.join(missing)}: the check ended with status {ran.returncode}: {end}", "make setup"
        )
