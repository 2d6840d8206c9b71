"""The structure of lib/sft: one direction of imports, no circles. docs/structure.md explains the layers."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parents[1] / "lib"
LAYERS = (
    "common", "formats", "recipe", "storage", "runner", "importing", "chat", "model", "checkpoint", "sync", "sources", "data", "packing", "export",
    "training", "evaluation", "launch", "reporting", "__main__", "api", "command",
)  # fmt: skip
"""From the bottom to the top: a module imports from its own folder and from the folders before it."""
SUBFOLDERS = {"sft.data.fast": {"sft.data.compiled", "sft.data.batch"}}
"""A folder and its sub-folder do not import each other. Exceptions: sub-folder -> the modules of its folder that it imports."""
REASON = "start-up"
"""An import inside a function has a comment with this word: it saves start-up time of the planner or of a stage."""


def modules(lib: Path) -> dict[str, Path]:
    """{dotted name: file} of all modules of the package sft under `lib`."""
    found = {}
    for file in (lib / "sft").rglob("*.py"):
        parts = file.relative_to(lib).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@functools.cache
def statements(text: str) -> tuple[tuple[ast.Import | ast.ImportFrom, bool], ...]:
    """(import, whether it is inside a function) for every import in a text of Python."""
    found: list[tuple[ast.Import | ast.ImportFrom, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append((node, inside))
        elif isinstance(
            node, (ast.stmt, ast.Module, ast.excepthandler, ast.match_case)
        ):  # an expression imports nothing
            inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for child in ast.iter_child_nodes(node):
                visit(child, inside)

    visit(ast.parse(text), False)
    return tuple(found)


def imports(file: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """(module of sft, line) of every import in a file, also inside functions and under TYPE_CHECKING."""
    for node, _ in statements(file.read_text()):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name in known)
        else:
            above = file.parts[: len(file.parts) - node.level] if node.level else ()
            package = ".".join(above[above.index("sft") :]) if "sft" in above else ""
            module = ".".join(filter(None, [package, node.module]))
            for a in node.names:
                full = f"{module}.{a.name}"
                if full in known or module in known:
                    yield (full if full in known else module), node.lineno


def arrows_back(lib: Path) -> list[str]:
    """One line for every import from a higher layer."""
    found, names = modules(lib), set(modules(lib))
    lines = []
    for name, file in sorted(found.items()):
        layer = name.split(".")[1] if "." in name else ""
        for target, line in imports(file, names):
            above = target.split(".")[1] if "." in target else ""
            if layer and above and LAYERS.index(above) > LAYERS.index(layer):
                lines.append(f"{file.relative_to(lib)}:{line}: {layer} imports {target}, which is in a higher layer")
    return lines


def circles(lib: Path) -> list[str]:
    """The modules that import themselves through others."""
    found = modules(lib)
    graph = {name: {t for t, _ in imports(file, set(found)) if t != name} for name, file in found.items()}
    while free := [n for n in graph if not graph[n] & graph.keys() or not any(n in graph[m] for m in graph)]:
        for name in free:
            del graph[name]
    return sorted(graph)


def mutual(lib: Path) -> list[str]:
    """One line for every import of a sub-folder from its folder, where the folder imports the sub-folder too."""
    found, names = modules(lib), set(modules(lib))
    packages = {name for name, file in found.items() if file.name == "__init__.py"}
    arrows = [
        (name if name in packages else name.rpartition(".")[0], target, f"{file.relative_to(lib)}:{line}")
        for name, file in found.items()
        for target, line in imports(file, names)
    ]

    def folder(module: str) -> str:
        return module if module in packages else module.rpartition(".")[0]

    down = {(folder(target).rpartition(".")[0], folder(target)) for above, target, _ in arrows
            if above == folder(target).rpartition(".")[0]}  # fmt: skip
    return sorted(
        {
            f"{where}: {below} imports {target}, and {above} imports {below}"
            for above, below in down
            for name, target, where in arrows
            if name == below and folder(target) == above and target not in SUBFOLDERS.get(below, set())
        }
    )


def unexplained(lib: Path) -> list[str]:
    """Imports inside functions without a comment that says why."""
    lines = []
    for name, file in sorted(modules(lib).items()):
        text = file.read_text()
        for node, inside in statements(text):
            before = text.splitlines()[node.lineno - 2 : node.end_lineno]
            if inside and not any(REASON in line.partition("#")[2] for line in before):
                lines.append(f"{name}:{node.lineno}: an import inside a function without a comment '# {REASON}: …'")
    return sorted(lines)


def test_every_folder_has_its_place_in_the_order():
    folders = {p.name for p in (LIB / "sft").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(LAYERS) - {"__main__", "api", "command"}


@pytest.mark.seconds
def test_no_module_imports_from_a_higher_layer():
    assert arrows_back(LIB) == []


def test_no_circle_of_modules():
    assert circles(LIB) == []


def test_a_folder_and_its_subfolder_do_not_import_each_other():
    assert mutual(LIB) == []


def test_an_import_inside_a_function_says_what_it_saves():
    assert unexplained(LIB) == []


def test_a_relative_import_is_an_arrow_too(small):
    (small / "sft/common/a.py").write_text("from ..recipe import c\n")
    assert len(arrows_back(small)) == 1 and circles(small) == ["sft.common.a", "sft.common.b", "sft.recipe.c"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A package of two layers."""
    for name, text in {
        "common/a.py": "",
        "common/b.py": "from sft.common import a\n",
        "recipe/c.py": "from sft.common.b import x\n",
    }.items():
        (tmp_path / "sft" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sft" / name).write_text(text)
    return tmp_path


def test_an_arrow_from_a_subfolder_to_its_folder_is_found_where_the_folder_imports_it(small):
    (small / "sft/common/__init__.py").write_text("")
    (small / "sft/common/part").mkdir()
    (small / "sft/common/part/__init__.py").write_text("")
    (small / "sft/common/part/d.py").write_text("from sft.common import a\n")
    assert mutual(small) == []  # one direction is fine
    (small / "sft/common/b.py").write_text("from sft.common.part import d\n")
    line = "sft/common/part/d.py:1: sft.common.part imports sft.common.a, and sft.common imports sft.common.part"
    assert mutual(small) == [line] and circles(small) == []


def test_an_arrow_back_is_found_also_inside_a_function(small):
    assert arrows_back(small) == [] and circles(small) == []
    (small / "sft/common/a.py").write_text("def f():\n    from sft.recipe import c\n")
    assert len(arrows_back(small)) == 1 and circles(small) == ["sft.common.a", "sft.common.b", "sft.recipe.c"]
    (small / "sft/common/a.py").write_text("def f():\n    from sft.common import b\n")
    assert arrows_back(small) == [] and circles(small) == ["sft.common.a", "sft.common.b"]
    (small / "sft/recipe/c.py").write_text("def f():\n    import json  # start-up: it takes time\n")
    assert unexplained(small) == ["sft.common.a:2: an import inside a function without a comment '# start-up: …'"]


def test_no_module_needs_a_package_of_an_extra_to_be_imported() -> None:
    """An import under `try` may fail, and one inside a function comes later. Another one would break `pip install .`."""
    extras = tomllib.loads((LIB.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split(r"[^\w-]", line)[0].replace("-", "_") for lines in extras.values() for line in lines}
    assert {"orjson", "torchao", "tensorboard"} <= packages
    needed = {
        f"{file.relative_to(LIB)}: {name}"
        for file in modules(LIB).values()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.partition(".")[0] in packages
    }
    assert {one for one in needed if "vllm_model.py: vllm" not in one} == set()  # imported for `backend = "vllm"` alone
