"""A folder as a storage of `sft.storage.contract`: whole files or none, no link followed, durable renames."""

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
from sft.storage.contract import CHUNK, Checksums, FileCopy, FileInfo, Meter, check, hash_file

PART = ".part"  # ends the name of a file that is still being written
MORE = ".more.part"  # and of one that another process continues


class LocalStorage:
    """A folder, also one on a mounted shared file system."""

    threads = 8

    def __init__(self, root: Path):
        self.root = root
        self.where = str(root)
        self._made: set[Path] = set()
        self._renamed: set[Path] = set()

    def path(self, name: str) -> Path:
        """The file of a name. Raises SftError for a name or a link that could leave the root."""
        path = self.root
        for part in check_relative(name, self.where).split("/"):
            path = path / part
            if path.is_symlink():
                raise SftError(f"{path}: a link; links are not followed; next: put the file itself there")
        return path

    def list(self) -> dict[str, FileInfo]:
        if self.root.is_symlink() or not self.root.is_dir():
            raise SftError(f"{self.root}: not a folder")
        found: dict[str, FileInfo] = {}
        refused: list[str] = []

        def unreadable(error: OSError) -> None:
            refused.append(f"{error.filename}: {error.strerror}")

        for folder, folders, files in os.walk(self.root, onerror=unreadable):
            for name in (*folders, *files):
                path = Path(folder, name)
                info = path.lstat()
                if stat.S_ISREG(info.st_mode) and not is_part(name):
                    relative = path.relative_to(self.root).as_posix()
                    found[check_relative(relative, self.where)] = FileInfo(info.st_size)
                elif not stat.S_ISDIR(info.st_mode) and not is_part(name):
                    refused.append(f"{path}: {'a link' if path.is_symlink() else 'not a regular file'}")
        if refused:
            raise SftError(
                "\n".join(refused) + "\nonly regular files are copied; next: remove these or copy what they name"
            )
        return dict(sorted(found.items()))

    def check_access(self, write: bool, needed: int = 0) -> None:
        if not write:
            if not os.access(self.root, os.R_OK | os.X_OK):
                raise SftError(f"{self.root}: cannot be read")
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
            return hash_file(self.path(name)).sha256 == (expected.sha256 or sums().sha256)
        return hash_file(self.path(name), crc=True).crc32c == expected.crc32c

    def put(self, file: Path, name: str, expected: FileCopy, meter: Meter, soon: bool = False) -> Checksums:
        with self.receive(name, soon=soon) as part:
            written = copy_file(file, part, meter)
            check(written, expected, str(file))
        return written

    def settle(self) -> dict[str, str]:
        """Makes the renames durable, each folder's at once."""
        renamed, self._renamed = self._renamed, set()
        for folder in renamed:
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
        with self.receive(name) as part, part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def remove(self, name: str) -> None:
        path = self.path(name)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)

    @contextlib.contextmanager
    def receive(self, name: str, content: str = "", soon: bool = False) -> Iterator[Path]:
        """A temporary name beside the final one; renamed when the body ends well, removed when it does not.

        With `content` (a checksum) the temporary file is that content's own and stays, so that another attempt continues it.
        soon: `settle` makes the rename durable.
        """
        final = self.path(name)
        folder = final.parent
        if folder not in self._made:
            make_folders(folder)
            self._made.add(folder)
        part = folder / f".{final.name[:100]}.{content + MORE if content else uuid.uuid4().hex + PART}"
        try:
            yield part
            os.replace(part, final)
        except BaseException:
            if not content:
                part.unlink(missing_ok=True)
            raise
        self._renamed.add(folder) if soon else sync_folder(folder)

    def sweep(self) -> None:
        """Removes what killed runs left unfinished and nobody continues. The caller holds this root's lock."""
        for path in self.root.rglob(f".*{PART}"):
            if is_part(path.name) and not path.name.endswith(MORE) and not path.is_symlink():
                path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path, meter: Meter) -> Checksums:
    """Copies to the new file `target`, flushes it to the disk and reads it back. Returns what the source's bytes were."""
    h = hashlib.sha256()
    count = 0
    # A link put in the place of the source after it was listed is not followed either.
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f, target.open("xb") as out:
        while chunk := f.read(CHUNK):
            meter.add(len(chunk))
            h.update(chunk)
            out.write(chunk)
            count += len(chunk)
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):  # read back from the disk rather than from memory
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = Checksums(count, h.hexdigest())
    found = hash_file(target)
    if found != written:
        raise SftError(f"{target} was read back with other bytes than were written; next: check that disk")
    return written


def is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(PART)


def make_folders(folder: Path) -> None:
    """mkdir -p whose new entries survive a power cut."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
