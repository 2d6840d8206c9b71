"""The modules that each version number stands for, and their recorded digests: make record-versions. See also format_shapes.py.

In:  the version numbers of the stages (sft.runner.plan.VERSIONS) and of prepare's caches, and the modules behind them.
Out: tests/versions.json, which tests/test_versions.py compares with the code.

A version number is part of a stage's key: raising it makes every run of that stage stale. It must rise when the same
options give other bytes. A digest covers a module's code without docstrings, comments, annotations, imports, log lines
and the texts of errors, so rewording trips nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import format_shapes
from sft.data import preparation
from sft.packing import packs
from sft.runner import plan
from test_layers import LIB, imports, modules

FILE = Path(__file__).with_name("versions.json")
ROOTS = {
    "prepare": "sft.data.prepare",
    "sync": "sft.sync.sync",
    "train": "sft.training.train",
    "convert": "sft.export.convert",
    "evaluate": "sft.evaluation.evaluate",
    "report": "sft.reporting.report",
    "ENCODING_VERSION": "sft.data.tokenize",
    "SCREENING_VERSION": "sft.data.decontaminate",
    "SKETCH_VERSION": "sft.data.near_duplicates",
    "PACKING_VERSION": "sft.packing.packs",
}
"""The module where each version's code starts. The version stands for it and for all that it imports, but for PLUMBING."""
WHERE = {
    "ENCODING_VERSION": "sft/data/preparation.py",
    "SCREENING_VERSION": "sft/data/preparation.py",
    "SKETCH_VERSION": "sft/data/preparation.py",
    "PACKING_VERSION": "sft/packing/packs.py",
}
"""The file of each version that is not in VERSIONS."""
PLUMBING = ("common", "runner", "storage", "launch")
"""Layers that move bytes and do not decide what they are."""
KEYED = (
    "sft.recipe.recipe",
    "sft.recipe.typed",
    "sft.recipe.schema",
    "sft.recipe.train_schema",
    "sft.recipe.cluster_schema",
    "sft.formats.record",
    "sft.formats.manifest",
    "sft.formats.run",
)
"""Modules whose effect on a result is in its key, or that only read and write."""
LOGGING = ("log", "print", "warn", "warning")


def numbers() -> dict[str, int]:
    """The version numbers as the code has them."""
    return {
        **plan.VERSIONS,
        "ENCODING_VERSION": preparation.ENCODING_VERSION,
        "SCREENING_VERSION": preparation.SCREENING_VERSION,
        "SKETCH_VERSION": preparation.SKETCH_VERSION,
        "PACKING_VERSION": packs.PACKING_VERSION,
    }


@functools.cache
def _graph() -> dict[str, set[str]]:
    files = modules(LIB)
    return {name: {target for target, _ in imports(file, set(files))} for name, file in files.items()}


def behind(root: str) -> set[str]:
    """The modules that a version stands for."""
    found: set[str] = set()
    open_ = [root]
    while open_:
        name = open_.pop()
        if name in found or name in KEYED or name.split(".")[1:2] in [[layer] for layer in PLUMBING]:
            continue
        found.add(name)
        open_ += _graph()[name] - {"sft"}
    return found


@functools.cache
def digest(source: str) -> str:
    """12 hex digits for what the code does, as far as the syntax tells."""
    return hashlib.sha256(json.dumps(_shape(ast.parse(source))).encode()).hexdigest()[:12]


def _shape(node: Any) -> Any:
    """A syntax tree as JSON, the same on every Python: empty fields are left out."""
    if isinstance(node, list):
        return [_shape(n) for n in node if not _is_prose(n)]
    if isinstance(node, ast.Raise):  # the kind of an error matters, not its text; a rejected row's reason is counted
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        reason = isinstance(error, ast.Name) and error.id == "BadRow" and isinstance(node.exc, ast.Call)
        return ["Raise", _shape(error), *([_shape(node.exc.args[0])] if reason else [])]
    if isinstance(node, ast.AST):
        ignored = ("annotation", "returns", "type_comment", "kind", "ctx")
        fields = [(name, _shape(value)) for name, value in ast.iter_fields(node) if name not in ignored]
        return [type(node).__name__, *(f for f in fields if f[1] not in (None, []))]
    return node if isinstance(node, str | int | float | bool | None) else repr(node)


def _is_prose(node: Any) -> bool:
    """Whether a statement is a docstring, an import or a log line."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    called = node.value.func if isinstance(node.value, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return name in LOGGING


def current() -> dict[str, Any]:
    """What versions.json says when it is up to date."""
    files = modules(LIB)
    names = sorted(set().union(*(behind(root) for root in ROOTS.values())))
    return {"versions": numbers(), "modules": {name: digest(files[name].read_text()) for name in names}}


def complaints(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each version whose code is not the recorded one."""
    lines = []
    for version, root in ROOTS.items():
        before, after = recorded["versions"].get(version), now["versions"][version]
        changed = sorted(n for n in behind(root) if recorded["modules"].get(n) != now["modules"][n])
        constant = (
            f"{version} in lib/{WHERE[version]}"
            if version in WHERE
            else f"VERSIONS[{version!r}] in lib/sft/runner/plan.py"
        )
        if changed and before == after:
            lines.append(
                f"{constant} = {after} stands for code that has changed: {', '.join(changed)}; next: if the same options"
                " now give other bytes, raise it; then, or if they give the same bytes: make record-versions"
            )
        elif changed or before != after:
            lines.append(f"{constant}: {before} -> {after}; next: make record-versions")
    return lines


def record() -> None:
    FILE.write_text(json.dumps(current(), indent=1) + "\n")
    print(
        f"{FILE}: recorded; commit it with the change, and say there why the bytes are the same or which runs are stale"
    )


if __name__ == "__main__":
    record()
    format_shapes.record()
