"""Copies a folder with a list of its files to a storage root. The list is written last: its presence means that every file was verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sft.common.errors import SftError
from sft.formats.manifest import Output
from sft.storage.contract import FileCopy, size
from sft.storage.local import LocalStorage
from sft.storage.localise import same_files, writer_lock
from sft.storage.transfer import open_storage, transfer


@dataclass(frozen=True)
class FolderCopier:
    """Copies folders with a list of their files to a storage root, or only compares them."""

    root: str
    cache: Path
    log: Callable[[str], None]
    check_only: bool = False

    def copy(
        self,
        source: LocalStorage,
        name: str,
        listed: Sequence[Output],
        list_bytes: bytes,
        list_name: str,
        beside: LocalStorage | None = None,
    ) -> list[Output]:
        """Copies the listed files to <root>/<name>, then writes the list. Returns the files with paths relative to the root.

        Listed files that `source` does not have are in `beside`.
        """
        top, target = open_storage(self.root, self.cache), open_storage(f"{self.root}/{name}", self.cache)
        own = set(source.list()) if beside else {o.path for o in listed}
        copies = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in listed]
        parts = [(source, [c for c in copies if c.source in own])]
        if beside:
            parts.append((beside, [c for c in copies if c.source not in own]))
        self.log(f"{target.where}: {len(copies)} files, {size(sum(c.bytes for c in copies))}")
        if self.check_only:
            if not same_files(top.read(list_name), list_bytes):
                raise SftError(
                    f"{self.root}/{list_name} is missing or damaged: the copy is not complete; next: make sync"
                )
            for place, files in parts:
                transfer(files, place, target, self.log, check_only=True)
        else:
            with writer_lock(top, name):
                found = top.read(list_name)
                if found is not None and not same_files(found, list_bytes):
                    top.remove(list_name)  # it is damaged: no list may be present before the files are verified
                for place, files in parts:
                    transfer(files, place, target, self.log)
                if not same_files(found, list_bytes):
                    top.write(list_name, list_bytes)
        return [replace(o, path=f"{name}/{o.path}") for o in listed]
