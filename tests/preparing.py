"""Parts that the tests of prepare share: a stage as its code sees it, made-up conversations, contents of a folder."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import REPO
from sft.common import paths
from sft.common.files import hash_file
from sft.recipe import schema
from sft.recipe.schema import Prepare, Source

TOKENIZER = "smoke/tokenizer"
OPTIONS = {"tokenizer": TOKENIZER, "template": "olmo", "max_reject_fraction": 0.5}


def stage(root: Path, threads: int = 1, out: str = "out", cache: str = "cache", **options: Any) -> Any:
    """What the stage's code sees of its runner."""
    table = Prepare(**{"sources": (Source(path="rows.jsonl"),), **OPTIONS, **options})
    (root / out).mkdir(exist_ok=True, parents=True)
    said: list[str] = []
    return SimpleNamespace(
        recipe=SimpleNamespace(prepare=table), hardware=schema.Hardware(threads=threads), out=root / out, cache=root / cache,
        find=lambda path, what="": paths.find([root, REPO / "recipes"], path, "recipe"), log=said.append, said=said,
        sha256=hash_file,
    )  # fmt: skip


def conversation(i: int) -> dict[str, Any]:
    rng = random.Random(i)
    turns = [("system", f"You keep zoo number {i}.")] if i % 3 == 0 else []
    for _ in range(rng.randint(1, 4)):
        turns += [
            ("user", f"Which animal is {rng.randint(0, 999)}?"),
            ("assistant", f"The {rng.choice(['lynx', 'ibis', 'tapir'])} 🦊 of {i}."),
        ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
