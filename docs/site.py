"""Pages of the reference that the site has beside docs/*.md: commands from the Makefile, fields from the schema. MkDocs calls it.

In: lib/sft/recipe/schema.py and the Makefile. Out: reference/commands.md, recipe.md and cluster.md, in memory alone.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "lib"))

from sft.recipe import schema  # noqa: E402
from sft.recipe.edit import to_toml  # noqa: E402
from sft.recipe.options import name_of  # noqa: E402

RECIPE = (*((f"[{name}]", cls) for name, cls in schema.TABLES.items()), ("[[prepare.sources]]", schema.Source),
          ("[on.<cluster>.<stage>]", schema.Hardware))  # fmt: skip
CLUSTER = (("env/<cluster>.toml", schema.Cluster),)


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to those of docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """{path in the site: Markdown}."""
    return {
        "reference/commands.md": commands(),
        "reference/recipe.md": fields("Fields of recipes", RECIPE),
        "reference/cluster.md": fields("Fields of cluster files", CLUSTER),
    }


def commands() -> str:
    """A table for each part of `make help`."""
    lines = [
        "# Commands",
        "",
        "What `make help` prints. The installed command takes the same words: `sft train --recipe x`.",
        "",
    ]
    for line in (REPO / "Makefile").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines += [
                "",
                f"## {line[3:].partition(',')[0].partition('.')[0]}",
                "",
                f"{line[3:]}.",
                "",
                "| command | what it does |",
                "| --- | --- |",
            ]
        elif match := re.match(r"([a-z][a-z %-]*):.*?## (.*)", line):
            lines.append(f"| `make {match[1].strip()}` | {cell(match[2])} |")
    return "\n".join(lines) + "\n"


def fields(title: str, tables: Any) -> str:
    """A section for each table of TOML. A star marks fields that change a result."""
    lines = [
        f"# {title}",
        "",
        "What `make fields` prints. A star marks a field that changes a result: an edit of it makes stages stale.",
        "",
    ]
    for name, cls in tables:
        lines += ["", f"## `{name}`", ""]
        lines += (
            ["| field | default | meaning |", "| --- | --- | --- |"]
            if dataclasses.fields(cls)
            else ["It has no fields."]
        )
        for f in dataclasses.fields(cls):
            star = " ★" if f.metadata["key"] and cls not in (schema.Hardware, schema.Cluster) else ""
            readers = ", ".join((*f.metadata["launchers"], *f.metadata["stages"]))
            choices = f" One of {', '.join(f'`{c}`' for c in f.metadata['choices'])}." if f.metadata["choices"] else ""
            text = f"{cell(f.metadata['doc'])}.{choices}" + (f" Read by {readers}." if readers else "")
            lines.append(f"| `{name_of(f)}`{star} | {default(f)} | {text} |")
    return "\n".join(lines) + "\n"


def default(f: dataclasses.Field[Any]) -> str:
    if f.metadata.get("required"):
        return "required"
    value = f.default if f.default is not dataclasses.MISSING else {}
    return "the model's" if value is None else f"`{cell(to_toml(value))}`"


def cell(text: str) -> str:
    """A text inside a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
