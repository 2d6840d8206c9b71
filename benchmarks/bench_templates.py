"""Published chat templates times 24 kinds of conversations, against transformers' rendering: how many cells are right.

In:  folders with .jinja files. `--fetch` first gets what llama-cpp-python, vLLM, TRL and axolotl carry from PyPI into .peers/templates;
     nothing is fetched otherwise. Out: a table of verdicts (see template_cells.py), and one JSON object on the last line.
Run: make bench-templates, or .venv/bin/python benchmarks/bench_templates.py [--fetch] [--history as-rendered] [--show wrong] [FOLDER…]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

from template_cells import cells

FOLDER = Path(__file__).resolve().parents[1] / ".peers" / "templates"
ARCHIVES = {
    "llama-cpp-python==0.3.36": "models/templates/",
    "trl==1.16.0": "chat_templates/",
    "axolotl==0.19.0": "templates/",
}
"""Packages, and the part of the paths of their templates."""
SOURCES = ("llama-cpp-python==0.3.36",)
"""Packages whose templates are only in the source archive."""


def fetch() -> None:
    """Gets the packages with pip and keeps their .jinja files."""
    for package, where in ARCHIVES.items():
        folder = FOLDER / package.split("==")[0]
        if folder.is_dir():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            form = "--no-binary" if package in SOURCES else "--only-binary"
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                form,
                ":all:",
                "-d",
                scratch,
                package,
            ]
            subprocess.run(command, check=True)
            archive = next(Path(scratch).iterdir())
            folder.mkdir(parents=True)
            for name, data in members(archive):
                if where in name and name.endswith(".jinja"):
                    (folder / Path(name).name).write_bytes(data)


def members(archive: Path) -> list[tuple[str, bytes]]:
    """The .jinja files of a wheel or a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [(name, wheel.read(name)) for name in wheel.namelist() if name.endswith(".jinja")]
    found = []
    with tarfile.open(archive) as source:
        for member in source:
            if member.name.endswith(".jinja") and (file := source.extractfile(member)) is not None:
                found.append((member.name, file.read()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[FOLDER])
    parser.add_argument("--fetch", action="store_true")
    parser.add_argument("--history", default="whole", choices=("whole", "as-rendered"))
    parser.add_argument("--show", default="", help="lists the cells with this verdict")
    args = parser.parse_args()
    if args.fetch:
        fetch()
    texts = {
        path: path.read_text(encoding="utf-8") for folder in args.folders for path in sorted(folder.rglob("*.jinja"))
    }
    different = {text: path for path, text in reversed(texts.items()) if "messages" in text}
    if not different:
        print(f"skipped: no .jinja files in {', '.join(map(str, args.folders))}; next: run it with --fetch")
        return
    counts: Counter[str] = Counter()
    templates: dict[str, set[str]] = {}
    began = time.process_time()
    for text, path in sorted(different.items(), key=lambda item: item[1]):
        name = f"{path.parent.name}/{path.stem}"
        for cell in cells(name, text, {"history": args.history}):
            counts[cell.verdict] += 1
            templates.setdefault(cell.verdict, set()).add(name)
            if cell.verdict == args.show:
                print(f"{name} · {cell.kind} · {cell.why}")
    print(
        f"{len(different)} templates, {counts.total()} cells, history {args.history}, {time.process_time() - began:.0f} s of CPU time"
    )
    for verdict, count in counts.most_common():
        print(f"{count:6} {verdict:9} in {len(templates[verdict])} templates")
    print(json.dumps({"bench": "templates", "history": args.history, "templates": len(different), **counts}))


if __name__ == "__main__":
    main()
