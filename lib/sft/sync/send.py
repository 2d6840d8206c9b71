"""Uploads a folder with a manifest to a storage. The process may be killed at any moment: sft.training.uploads starts one per step.

    python -m sft.sync.send FOLDER WHERE CACHE [NAME …]

Out: the files that FOLDER/manifest.json lists, verified, in WHERE/<name of FOLDER>/; then the files NAME beside FOLDER, in WHERE
itself; then manifest.json. So the files beside are never older than the uploaded folder. Nothing is sent if the manifest is there.

Where FOLDER has a part of the files, because other nodes have the others, each node runs this. It sends its part, then a list of
it, WHERE/parts/<name of FOLDER>-<16 hex of the manifest>/<16 hex of the list>. Whoever finds all files in the lists writes manifest.json.

The process ends when its standard input closes, so it does not outlive its parent. It leaves no partial file under a final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import click

from sft.common.errors import SftError
from sft.formats import manifest
from sft.runner.cli import program
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer
from sft.sync.fetch import listed_copies


def send(folder: Path, where: str, cache: Path, beside: Sequence[str]) -> None:
    """Uploads the folder's files, and its manifest once all that it lists are there. Does nothing if the manifest is there
    already. `beside`: names of files in the parent folder. Raises SftError."""
    record = (folder / manifest.NAME).read_bytes()
    storage = open_storage(f"{where}/{folder.name}", cache)
    if storage.read(manifest.NAME) == record:
        return
    listed = listed_copies(record, str(folder))
    here = [copy for copy in listed if (folder / copy.source).is_file()]
    transfer(here, LocalStorage(folder), storage, lambda _: None)
    top = open_storage(where, cache)
    for file in (folder.parent / name for name in beside):
        if file.is_file():
            top.write(file.name, file.read_bytes())
    if len(here) < len(listed):
        parts = f"{where}/parts/{folder.name}-{_digest(record)}"
        if not {copy.target for copy in listed} <= _arrived(parts, [copy.target for copy in here], cache):
            print(f"uploaded this node's part of {folder.name} to {where}")
            return
    storage.write(manifest.NAME, record)
    print(f"uploaded {folder.name} to {where}")


def _arrived(parts: str, mine: Sequence[str], cache: Path) -> set[str]:
    """Adds a list of files to those in the folder `parts`. Returns the files of all lists."""
    text = json.dumps(sorted(mine)).encode()
    open_storage(parts, cache).write(_digest(text), text)
    lists = open_storage(parts, cache)  # a new one, which sees what others have written meanwhile
    return {file for name in lists.list() for file in json.loads(lists.read(name) or b"[]")}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def end_with_parent() -> None:
    """Waits for the end of standard input, then ends the process."""
    os.read(0, 1)
    os._exit(1)


@program("send", "python -m sft.sync.send", signals=False)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("where")
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("beside", nargs=-1, metavar="[NAME]...")
def main(folder: Path, where: str, cache: Path, beside: tuple[str, ...]) -> None:
    """Copies FOLDER, which has a manifest, to WHERE, and the files NAME that are beside FOLDER."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        send(folder, where, cache, beside)
    except (SftError, OSError) as error:
        sys.exit(str(error))  # training puts this text into a message of its own


if __name__ == "__main__":
    sys.exit(main())
