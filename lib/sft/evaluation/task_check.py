"""Imports the tasks of a recipe and reads their data, as the evaluation will: before training, not after it.

    python -m sft.evaluation.task_check '{"tasks": ["ifeval"], "folder": "recipes/tasks", "data": {}, "asking": {"num_fewshot": 3}, "template": "",
        "cache": "runs/.cache/datasets"}'

Out: one JSON object a line for each task: {"task": "ifeval", "documents": 541}, or {"task": …, "problem": …, "next": …}.
Data sets of the hub stay in `cache`, where an evaluation without internet finds them. The doctor runs this in the pinned
environment (sft.launch.doctor.tasks).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from sft.common.errors import SftError
from sft.recipe.schema import Evaluate
from sft.runner.cli import program

OTHER_NAMES = {"pkg_resources": "'setuptools<81'", "sklearn": "scikit-learn"}
"""Packages that PyPI knows by another name, of those that lm-eval's tasks import."""
FIELDS = ("process_docs", "doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_prefix", "process_results")
"""Fields of a task's YAML that lm-eval reads in a function of the same name."""
LONG = 1 << 20
"""For a model whose context is not known yet."""


class Problem(NamedTuple):
    """Why a task cannot run, and the next step."""

    problem: str
    next: str


NO_DOCUMENTS = Problem("it has no documents", "correct the task")


def parse_question(context: click.Context, parameter: click.Parameter, text: str) -> dict[str, Any]:
    try:
        question = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"it is not JSON: {error}") from None
    missing = {"tasks", "folder", "data", "cache"}.difference(question if isinstance(question, dict) else ())
    if missing:
        raise click.BadParameter(f"{', '.join(sorted(missing))} is missing")
    return dict(question)


@program("evaluate", "python -m sft.evaluation.task_check", signals=False)
@click.argument("asked", metavar="JSON", callback=parse_question)
def main(asked: dict[str, Any]) -> None:
    """Checks every task and prints a line for each."""
    Path(asked["cache"]).mkdir(parents=True, exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = asked["cache"]  # before `datasets` is imported, which reads it once
    if any("://" in path for path in asked["data"].values()):
        os.environ["HF_HUB_CACHE"] = str(Path(asked["cache"]) / "hub")  # the same for files of the hub
    data = {name: path if "://" in path else Path(path) for name, path in asked["data"].items()}
    options, template = Evaluate(**asked.get("asking", {})), asked.get("template", "")
    for name in asked["tasks"]:
        found = check(name, Path(asked["folder"]), data, options, template)
        facts = found._asdict() if isinstance(found, Problem) else {"documents": found}
        print(json.dumps({"task": name, **facts}), flush=True)


def check(
    name: str, folder: Path, data: Mapping[str, Path | str], options: Evaluate | None = None, template: str = ""
) -> int | Problem:
    """The number of documents of a task or of all tasks of a group, or why it cannot run.

    `options` say how it is asked. `template` is the chat template, "" where it is not known yet.
    """
    from sft.evaluation import asking, rehearsal, tasks  # start-up: lm-eval reads the variables that main sets

    file = None
    try:
        documents = 0
        found = tasks.find(name, folder, data)
        file = found.file if found.is_own else None
        for definition in found.expand()[0]:
            file = definition.file if definition.is_own else None
            if missing := definition.missing_resources():
                return Problem(
                    f"nltk's {missing} is not here", f".venv/bin/python -m nltk.downloader -d .venv/nltk_data {missing}"
                )
            task = definition.load(seed=0)
            documents += len(task.eval_docs)
            asked = asking.ask(task, (options or Evaluate()).for_task(name, definition.name), LONG)
            if template and asked.thinking is not None:
                asking.switch(template, asked.thinking)
            try:
                rehearsal.check(task, definition)
            except rehearsal.Fails as fails:
                return explain(fails.error, file, fails.what)
        return documents if documents else NO_DOCUMENTS
    except SftError as error:
        problem, _, step = str(error).rpartition("; next: ")
        return Problem(problem or step, step)
    except Exception as error:  # the task's own code, and what the hub client raises
        return explain(error, file)


def explain(error: BaseException, file: Path | None = None, what: str = "") -> Problem:
    """The problem behind an exception of a task's code or of the hub client, and the next step.

    `file` is the task's YAML, and `what` failed.
    """
    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    if "out of bounds for size 0" in str(error):  # lm-eval reads the first document
        return NO_DOCUMENTS
    for one in chain:
        if isinstance(one, ModuleNotFoundError) and f"Cannot import module '{one.name}'" in str(error):
            return Problem(f"{error}: there is no {one.name}.py beside it", "correct !function, or write the module")
        if isinstance(one, ModuleNotFoundError):
            package = (one.name or str(one)).partition(".")[0]
            install = f".venv/bin/python -m pip install {OTHER_NAMES.get(package, package)}"
            return Problem(f"it needs the package {package}", f"make setup, or {install}")
    names = {type(one).__name__ for one in chain}
    text = " ".join(str(chain[0]).split())[:300]
    if "GatedRepoError" in names or "gated" in text.lower():
        return Problem(f"its data set is gated: {text}", "accept its terms on the hub, and set HF_TOKEN")
    if names & {"ConnectError", "ConnectionError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return Problem(
            f"its data set cannot be reached: {text}",
            "run make doctor once where the hub can be reached: data sets stay in runs/.cache/datasets",
        )
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "FileNotFoundError"}:
        return Problem(f"its data set is not there: {text}", "correct the task's dataset_path, or set HF_TOKEN")
    fields = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.name in FIELDS]
    parts = (str(file or ""), what, *fields[-1:], f"{type(error).__name__}: {text}")
    return Problem(": ".join(filter(None, parts)), "correct the task, or remove it from [evaluate] tasks")


if __name__ == "__main__":
    sys.exit(main())
