"""Uploads a folder with a manifest to a storage. The process may be killed at any moment: sft.training.uploads starts one per step.

    python -m sft.sync.send FOLDER WHERE CACHE [NAME …]

Out: the files that FOLDER/manifest.json lists, verified, in WHERE/<name of FOLDER>/; then the files NAME beside FOLDER, in WHERE
itself; then manifest.json. So the files beside are never older than the uploaded folder. Nothing is sent if the manifest is there.

The process ends when its standard input closes, so it does not outlive its parent. It leaves no partial file under a final name.
"""

from __future__ import annotations

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
    """Uploads the folder, unless its manifest is there already. `beside`: names of files in the parent folder."""
    record = (folder / manifest.NAME).read_bytes()
    storage = open_storage(f"{where}/{folder.name}", cache)
    if storage.read(manifest.NAME) == record:
        return
    transfer(listed_copies(record, str(folder)), LocalStorage(folder), storage, lambda _: None)
    top = open_storage(where, cache)
    for file in (folder.parent / name for name in beside):
        if file.is_file():
            top.write(file.name, file.read_bytes())
    storage.write(manifest.NAME, record)
    print(f"uploaded {folder.name} to {where}")


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
