"""A folder as a storage (sft.storage.contract): complete files or none, durable renames, no links followed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.common.paths import check_relative
from sft.storage.checksums import CHUNK, Checksums, checksums_of
from sft.storage.contract import FileCopy, FileInfo, Meter, check

PARTIAL = ".part"
"""Suffix of a file that is being written."""
RESUMABLE_PARTIAL = ".more.part"
"""Suffix of a file that another attempt will resume."""


class LocalStorage:
    """A folder, also one on a mounted shared file system."""

    threads = 8

    def __init__(self, root: Path):
        self.root = root
        self.where = str(root)
        self._made_folders: set[Path] = set()
        self._renamed_in: set[Path] = set()

    def path(self, name: str) -> Path:
        """The path of a file. Raises SftError for a name or a link that could leave the root."""
        path = self.root
        for part in check_relative(name, self.where).split("/"):
            path = path / part
            if path.is_symlink():
                raise SftError(f"{path}: a link; links are not followed; next: put the file itself there")
        return path

    def list(self) -> dict[str, FileInfo]:
        if self.root.is_symlink() or not self.root.is_dir():
            raise SftError(f"{self.root}: not a folder; next: correct the path")
        found: dict[str, FileInfo] = {}
        refused: list[str] = []

        def unreadable(error: OSError) -> None:
            refused.append(f"{error.filename}: {error.strerror}")

        for folder, folders, files in os.walk(self.root, onerror=unreadable):
            for name in (*folders, *files):
                path = Path(folder, name)
                info = path.lstat()
                if stat.S_ISREG(info.st_mode) and not is_partial(name):
                    relative = path.relative_to(self.root).as_posix()
                    found[check_relative(relative, self.where)] = FileInfo(info.st_size)
                elif not stat.S_ISDIR(info.st_mode) and not is_partial(name):
                    refused.append(f"{path}: {'a link' if path.is_symlink() else 'not a regular file'}")
        if refused:
            raise SftError(
                "\n".join(refused) + "\nonly regular files are copied; next: remove these or copy what they name"
            )
        return dict(sorted(found.items()))

    def check_access(self, write: bool, needed: int = 0) -> None:
        if not write:
            if not os.access(self.root, os.R_OK | os.X_OK):
                raise SftError(f"{self.root}: cannot be read; next: correct its permissions")
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as e:
            raise SftError(
                f"{self.root}: cannot be written ({e.strerror}); next: correct the storage root or its permissions"
            ) from e
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise SftError(f"{self.root}: {needed:,} bytes are needed, {free:,} are free; next: free space there")

    def same(self, name: str, sums: Callable[[], Checksums], expected: FileCopy) -> bool:
        found = self.find(name)
        if found is None or found.bytes != expected.bytes:
            return False
        if expected.sha256 or expected.crc32c is None:
            return checksums_of(self.path(name)).sha256 == (expected.sha256 or sums().sha256)
        return checksums_of(self.path(name), crc=True).crc32c == expected.crc32c

    def put(self, file: Path, name: str, expected: FileCopy, meter: Meter, deferred: bool = False) -> Checksums:
        with self.receive(name, deferred=deferred) as partial:
            written = copy_file(file, partial, meter)
            check(written, expected, str(file))
        return written

    def finish_deferred(self) -> dict[str, str]:
        """Makes the deferred renames durable, with one sync for each folder."""
        renamed_in, self._renamed_in = self._renamed_in, set()
        for folder in renamed_in:
            sync_folder(folder)
        return {}

    def get(self, name: str, file: Path, expected: FileCopy, meter: Meter) -> Checksums:
        written = copy_file(self.path(name), file, meter)
        check(written, expected, str(self.path(name)))
        return written

    def find(self, name: str) -> FileInfo | None:
        path = self.path(name)
        return FileInfo(path.stat().st_size) if path.is_file() else None

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self.path(name).read_bytes()
        return None

    def write(self, name: str, data: bytes) -> None:
        with self.receive(name) as partial, partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def remove(self, name: str) -> None:
        path = self.path(name)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)

    @contextlib.contextmanager
    def receive(self, name: str, resume_key: str = "", deferred: bool = False) -> Iterator[Path]:
        """A temporary file beside the final one. It is renamed if the body succeeds and deleted if it fails.

        With `resume_key` (a checksum of the content) the temporary name depends on the content, and the file stays after a
        failure, so that another attempt can resume it. deferred: `finish_deferred` makes the rename durable.
        """
        final = self.path(name)
        folder = final.parent
        if folder not in self._made_folders:
            make_folders(folder)
            self._made_folders.add(folder)
        suffix = resume_key + RESUMABLE_PARTIAL if resume_key else uuid.uuid4().hex + PARTIAL
        partial = folder / f".{final.name[:100]}.{suffix}"
        try:
            yield partial
            os.replace(partial, final)
        except BaseException:
            if not resume_key:
                partial.unlink(missing_ok=True)
            raise
        self._renamed_in.add(folder) if deferred else sync_folder(folder)

    def sweep(self) -> None:
        """Deletes temporary files of killed processes, except those that can be resumed. The caller holds the root's lock."""
        for path in self.root.rglob(f".*{PARTIAL}"):
            if is_partial(path.name) and not path.name.endswith(RESUMABLE_PARTIAL) and not path.is_symlink():
                path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path, meter: Meter) -> Checksums:
    """Copies to the new file `target`, flushes it to the disk and reads it back. Returns the checksums of the source."""
    h = hashlib.sha256()
    count = 0
    # O_NOFOLLOW: the source may have been replaced by a link since it was listed.
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f, target.open("xb") as out:
        while chunk := f.read(CHUNK):
            meter.add(len(chunk))
            h.update(chunk)
            out.write(chunk)
            count += len(chunk)
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):  # so that the file is read back from the disk and not from memory
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = Checksums(count, h.hexdigest())
    if checksums_of(target) != written:
        raise SftError(f"{target}: reading it back gave other bytes than were written; next: check that disk")
    return written


def is_partial(name: str) -> bool:
    """Whether this is the name of a temporary file of this storage."""
    return name.startswith(".") and name.endswith(PARTIAL)


def make_folders(folder: Path) -> None:
    """Like mkdir -p; the new folders survive a power failure."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
