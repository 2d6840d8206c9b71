"""Published chat templates times 24 kinds of conversations, against transformers' rendering: how many cells are right.

In:  folders with .jinja files. `--fetch` first gets what llama-cpp-python, vLLM, TRL and axolotl carry from PyPI into .peers/templates;
     nothing is fetched otherwise. Out: a table of verdicts (see template_cells.py), and one JSON object on the last line.
Run: make bench-templates, or .venv/bin/python benchmarks/bench_templates.py [--fetch] [--history as-rendered] [--show wrong] [FOLDER…]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

from template_cells import cells

FOLDER = Path(__file__).resolve().parents[1] / ".peers" / "templates"
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
ARCHIVES = {
    "llama_cpp_python-0.3.36.tar.gz": ("/models/templates/",),
    "vllm-0.33.0.tar.gz": ("/examples/", "/transformers_utils/chat_templates/"),
    "trl-1.16.0-py3-none-any.whl": ("/chat_templates/",),
    "axolotl-0.19.0-py3-none-any.whl": ("/templates/",),
}
"""Archives, and the folders of their templates."""
NO_CHAT = ("/embed/", "/score/")
"""Folders of templates for models that do not chat."""
TIMEOUT_S = 300


def fetch() -> None:
    """Gets the archives from the index and keeps their .jinja files. pip would build a source archive only to learn its name."""
    for name, folders in ARCHIVES.items():
        package = name.split("-")[0].replace("_", "-")
        target = FOLDER / package
        if target.is_dir():
            continue
        data = download(package, name)
        partial = target.with_name(f"{package}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path, text in members(name, data):
            if any(folder in path for folder in folders) and not any(folder in path for folder in NO_CHAT):
                (partial / Path(path).name).write_bytes(text)
        partial.rename(target)


def download(package: str, name: str) -> bytes:
    """An archive of the index, with the sha256 that the index says. Raises SystemExit if it cannot be had."""
    page = f"{INDEX}/{package}/"
    try:
        with urllib.request.urlopen(page, timeout=TIMEOUT_S) as answer:
            links = re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"', answer.read().decode())
        found = next(((url, digest) for url, digest in links if url.endswith(f"/{name}")), None)
        if found is None:
            sys.exit(f"{page}: has no {name}; next: name another version in benchmarks/bench_templates.py")
        with urllib.request.urlopen(urllib.parse.urljoin(page, found[0]), timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read()
    except OSError as error:
        sys.exit(f"{page}: {error}; next: run it again, or without --fetch on a folder of .jinja files")
    if (digest := hashlib.sha256(data).hexdigest()) != found[1]:
        sys.exit(f"{name}: sha256 is {digest}, the index says {found[1]}; next: run it again")
    return data


def members(name: str, data: bytes) -> list[tuple[str, bytes]]:
    """The .jinja files of a wheel or a source archive."""
    if name.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            return [(path, wheel.read(path)) for path in wheel.namelist() if path.endswith(".jinja")]
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as source:
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
