"""The local files that a recipe's tables name, which the planner hashes. Standard library only.

In:  a table, and `find`, which turns a relative path of the recipe into a file or folder.
Out: (relative path, file), in a fixed order. `gs://`, `s3://` and `hf://` sources are not listed: a commit in the name determines
     the content. Without a commit the planner cannot see a change; prepare warns and records in dataset.json what it read.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.common.files import check_pointer
from sft.common.paths import REMOTE
from sft.recipe import mounts
from sft.recipe.dataset_files import Choice, FileSelection, candidates, check_single, local_tree, select
from sft.recipe.schema import Convert, Evaluate, Model, Prepare, Source

SOURCES = "[prepare] sources"
SHIPPED_TEXTS = Path(__file__).resolve().parents[1] / "evaluation" / "plain_text.jsonl"
"""The texts of `[evaluate] plain_text = "shipped"`."""
OWN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
OTHER_TEMPLATES = "additional_chat_templates"
"""Where transformers saves a tokenizer's templates other than the default one."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a tokenizer folder that prepare reads. An export has fewer: `sft.export.tokenizer_files.PUBLISHED`."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


def is_remote(path: str) -> bool:
    return REMOTE.match(path) is not None


def is_elsewhere(path: str) -> bool:
    """Whether the planner does not look for a path: it is remote, or on a disk of the cluster."""
    return is_remote(path) or mounts.is_on_disk(path)


def own_template(template: str) -> str | None:
    """The name of one of the tokenizer's own templates: "default" for 'tokenizer', NAME for 'tokenizer:NAME'; None for others."""
    kind, _, name = template.partition(":")
    if kind != "tokenizer" or (name and not OWN_NAME.fullmatch(name)):
        return None
    return name or "default"


def tokenizer_files(prepare: Prepare) -> tuple[str, ...]:
    """The files of a tokenizer folder that prepare reads, if they are there."""
    name = own_template(prepare.template)
    return TOKENIZER_FILES if name in (None, "default") else (*TOKENIZER_FILES, f"{OTHER_TEMPLATES}/{name}.jinja")


def is_template_file(template: str) -> bool:
    """Whether the recipe names a template file under DATA, rather than 'tokenizer' or a named template."""
    return template.endswith(TEMPLATE_SUFFIXES)


def check_template_text(text: str, where: str) -> str:
    """The Jinja text of a template. Raises SftError for one that is empty or begins with a byte order mark."""
    if not text.strip():
        raise SftError(f"{where}: the template is empty; next: write the Jinja text, or name another template")
    if text.startswith("\ufeff"):
        raise SftError(
            f"{where}: the template begins with a byte order mark, which every conversation would begin with; next: save it"
            " as UTF-8 without one"
        )
    return text


def named_templates(value: Any, where: str) -> dict[str, str]:
    """The templates of a "chat_template" by name: a text is the default one. Raises SftError for another form, and a name twice."""
    if isinstance(value, str | None):
        return {} if value is None else {"default": value}
    pairs: list[Any] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) if isinstance(item, dict) else item for item in value]
    found: dict[str, str] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or not all(isinstance(part, str) for part in pair) or pair[0] in found:
            raise SftError(
                f"{where}: chat_template: {str(pair)[:80]}: expected templates, each with a name of its own; next: correct it"
            )
        found[pair[0]] = pair[1]
    if not found:
        raise SftError(
            f"{where}: chat_template = {str(value)[:80]}, expected a text or templates by name; next: correct it"
        )
    return found


def read_template(file: Path) -> str:
    """The Jinja text of a template file. Raises SftError for one that cannot be a template; its syntax is checked where jinja2 is."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SftError(f"{file}: not a text in UTF-8: {error}; next: name a Jinja file") from None
    try:
        import jinja2  # start-up: the planner runs without it
    except ModuleNotFoundError:
        return check_template_text(text, str(file))
    try:
        # {% generation %} is transformers' own
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise SftError(f"{file}: line {error.lineno}: {error.message}; next: correct the Jinja text") from None
    return check_template_text(text, str(file))


def choice(source: Source) -> Choice:
    """What a source says about its files."""
    return Choice(source.split, source.subset, source.ignore_files)


EVERY_SPLIT = Choice(None)
"""The files of [prepare] decontaminate: rows of all splits."""


def dataset_files(root: Path, path: str, wanted: Choice, what: str = SOURCES) -> tuple[dict[str, Path], FileSelection]:
    """({relative path: file}, the selection) of a local source: the file itself, or those of a folder in the order of their names.

    `what` names the table in messages. Raises SftError for a dataset that is not read completely.
    """
    if not root.is_dir():
        if not root.is_file():
            raise SftError(f"{what}: {path!r} is neither a file nor a folder; next: correct the path")
        check_single(path, wanted, f"{what}: {path!r}")
        return {path: root}, FileSelection((path,))
    chosen = select(local_tree(root, f"{what}: {path}"), wanted, f"{what}: {path}")
    return {f"{path.rstrip('/')}/{name}": root / name for name in chosen.files}, chosen


def _planned(root: Path, path: str, wanted: Choice, what: str = SOURCES) -> Iterator[tuple[str, Path]]:
    """The files on which a local source depends, as far as the planner can know. Raises SftError."""
    if not root.is_dir():
        found, _ = dataset_files(root, path, wanted, what)
    else:
        names = candidates(local_tree(root, f"{what}: {path}"), wanted, f"{what}: {path}")
        found = {f"{path.rstrip('/')}/{name}": root / name for name in names}
    for name, file in found.items():
        if (
            f"{path.rstrip('/')}/README.md" not in found
        ):  # with it the list has files of other splits, which may be missing
            check_pointer(file, f"{what}: {name}")
        yield name, file


def prepare_files(prepare: Prepare, find: Callable[[str], Path]) -> list[tuple[str, Path]]:
    """Every local file that prepare's result depends on, once: sources, evaluation files, tokenizer, template."""
    return list(dict(_prepare_files(prepare, find)).items())


def _prepare_files(prepare: Prepare, find: Callable[[str], Path]) -> Iterator[tuple[str, Path]]:
    for source in prepare.sources:
        if not is_elsewhere(source.path):
            yield from _planned(find(source.path), source.path, choice(source))
    for path in prepare.decontaminate:
        if not is_remote(path):
            yield from _planned(find(path), path, EVERY_SPLIT, "[prepare] decontaminate")
    if not is_elsewhere(prepare.tokenizer):
        folder = find(prepare.tokenizer)
        for name in tokenizer_files(prepare):
            if (folder / name).is_file():
                yield f"{prepare.tokenizer.rstrip('/')}/{name}", folder / name
    if is_template_file(prepare.template):
        yield prepare.template, find(prepare.template)


def base_files(model: Model, find: Callable[[str], Path]) -> list[tuple[str, Path]]:
    """The files of a base under DATA. A base on the hub, in a bucket or on a disk of the cluster is identified by its name."""
    if not model.base or is_elsewhere(model.base):
        return []
    folder = find(model.base)
    return [(f"{model.base}/{p.relative_to(folder).as_posix()}", p) for p in sorted(folder.rglob("*")) if p.is_file()]


def convert_files(convert: Convert, find: Callable[[str], Path]) -> list[tuple[str, Path]]:
    """The evaluation template, if it is a file."""
    return [(convert.eval_template, find(convert.eval_template))] if is_template_file(convert.eval_template) else []


TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""A task of lm-eval. Its name becomes the name of a file."""


def own_tasks(folder: Path) -> dict[str, Path]:
    """{task: YAML} of the tasks that a folder defines."""
    found = {}
    for file in sorted(folder.rglob("*.yaml")):
        for match in re.finditer(r"^task:\s*([\w.-]+)\s*$", file.read_text(encoding="utf-8"), re.M):
            found[match[1]] = file
    return found


def task_folder(evaluate: Evaluate, find: Callable[[str], Path]) -> Path:
    """The folder that has the recipe's tasks: `task_dir` of DATA, or that of recipes/ if DATA's defines none of them and a file there
    has the name of one. Raises SftError if there is no such folder."""
    folder = find(evaluate.task_dir)
    if own_tasks(folder).keys().isdisjoint(evaluate.tasks):
        for task in evaluate.tasks:
            with contextlib.suppress(SftError):
                return find(f"{evaluate.task_dir.rstrip('/')}/{task}.yaml").parent
    return folder


def check_tasks(evaluate: Evaluate, find: Callable[[str], Path], file: str) -> None:
    """Raises SftError for what is no name of a task, and for an unknown task that resembles one of task_dir. Other unknown names may be
    lm-eval's own tasks."""
    if evaluate.harness != "lm-eval":
        return
    for task in evaluate.tasks:
        if not TASK.fullmatch(task):
            raise SftError(f"{file}: [evaluate] tasks: {task!r} is not a task name; next: correct it")
    local = sorted(p.stem for p in task_folder(evaluate, find).glob("*.yaml"))
    for task in evaluate.tasks:
        if task not in local and (near := difflib.get_close_matches(task, local, n=1, cutoff=0.85)):
            raise SftError(
                f"{file}: 'tasks' in [evaluate] = {task!r}: no such task; did you mean '{near[0]}'? next: correct the name"
            )


def plain_text(evaluate: Evaluate, find: Callable[[str], Path]) -> Path | None:
    """The file of texts that are no chat, or None where the recipe wants none."""
    return (
        SHIPPED_TEXTS
        if evaluate.plain_text == "shipped"
        else find(evaluate.plain_text)
        if evaluate.plain_text
        else None
    )


def evaluate_files(evaluate: Evaluate, find: Callable[[str], Path]) -> list[tuple[str, Path]]:
    """The task files and their data files. Harnesses other than lm-eval have their own."""
    if evaluate.harness != "lm-eval":
        return []
    folder = task_folder(evaluate, find)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    named = [(f"{evaluate.task_dir.rstrip('/')}/{p.relative_to(folder).as_posix()}", p) for p in files]
    named += [(path, find(path)) for path in evaluate.data.values() if not is_remote(path)]
    named += [(texts.name, texts)] if (texts := plain_text(evaluate, find)) else []
    for name, file in named:
        if file.is_dir():
            raise SftError(
                f"[evaluate] data and plain_text: {name!r}: a file is expected, not the folder {file}; next: name a file in it"
            )
    return [
        (name, p) for name, p in named if not any(part.startswith((".", "__pycache__")) for part in name.split("/"))
    ]
