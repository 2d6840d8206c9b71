"""Copies files between folders and buckets (gs://, s3://), every file verified (make cp SRC=… DST=…).

    python stages/cp.py SRC DST [--check] [--no-clobber] [--delete]

SRC is a file, a folder or a prefix of a bucket. A folder's content goes to DST/…, whether DST exists or not. A single file goes to
the name DST, or into DST when that ends in "/". Files named manifest.json are copied last. --check copies nothing and
reports what is missing or different. --no-clobber keeps files with other bytes and reports them. --delete then deletes from the
folder DST what SRC does not have, and prints each name (with --check it only prints them); without it nothing is ever deleted.
Exit status 0: every file is there and identical.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.common.paths import BUCKETS
from sft.runner.cli import program
from sft.storage.contract import FileCopy, Storage
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer


def split(where: str) -> tuple[str, str]:
    """(folder or prefix, name) of a single file. Raises SftError."""
    folder, _, name = where.rpartition("/")
    if not name or f"{folder}/" in BUCKETS:
        raise SftError(f"{where}: this is not the name of a file")
    return folder or ("/" if where.startswith("/") else "."), name


def plan(src: str, dst: str, cache: Path) -> tuple[Storage, Storage, list[FileCopy]]:
    """(source, target, copies). Raises SftError if SRC is not a file and has none."""
    if not src or not dst:
        raise SftError(f"SRC={src} DST={dst}: both are needed; next: make cp SRC=gs://bucket/prefix DST=folder")
    is_file = not src.endswith("/") and "/" in src[5:] if src.startswith(BUCKETS) else Path(src).is_file()
    if is_file:
        folder, name = split(src)
        source = open_storage(folder, cache)
        found = source.find(name)
        if found is not None:
            folder, target = (dst, name) if dst.endswith("/") else split(dst)
            return source, open_storage(folder, cache), [FileCopy(name, target, found.bytes, crc32c=found.crc32c)]
    source = open_storage(src, cache)
    listed = source.list()
    if not listed:
        raise SftError(f"{src}: no such file, and no files under it")
    copies = [FileCopy(n, n, f.bytes, crc32c=f.crc32c) for n, f in listed.items()]
    return source, open_storage(dst, cache), copies


def copy(src: str, dst: str, cache: Path, check: bool, clobber: bool, delete: bool) -> None:
    """Copies SRC to DST. Raises SftError for what could not be copied or, with `check`, differs."""
    source, target, copies = plan(src, dst, cache)
    if delete and source.where.rstrip("/") != str(Path(src) if "://" not in src else src.rstrip("/")):
        raise SftError(f"DELETE=1: {src} is a single file; next: name a folder or prefix")
    lists = [c for c in copies if c.source.rpartition("/")[2] == "manifest.json"]
    hashes = HashCache(cache)
    for group in ([c for c in copies if c not in lists], lists):
        if group:
            for done in transfer(group, source, target, log, check_only=check, clobber=clobber):
                if done.sums.sha256 and isinstance(target, LocalStorage):
                    hashes.note(target.path(done.copy.target), done.sums.sha256)
    if hashes.known and not check:
        with contextlib.suppress(OSError):  # the cache only saves reading the files again
            hashes.save()
    log(f"{len(copies)} files are identical in {src} and {dst}")
    if delete:
        delete_others(target, {c.target for c in copies}, dst, check)


def delete_others(target: Storage, names: set[str], dst: str, check: bool) -> None:
    """Deletes all files of the target but `names`, and prints each. check: only prints them."""
    others = sorted(set(target.list()) - names)
    for name in others:
        log(f"{'would remove' if check else 'removing'} {target.where}/{name}")
        if not check:
            target.remove(name)
    log(f"{len(others)} files {'would be' if check else 'were'} removed from {dst}")


def log(text: str) -> None:
    say(f"[cp] {text}")


@program("cp", "stages/cp.py")
@click.argument("src")
@click.argument("dst")
@click.option("--check", is_flag=True, help="Copy nothing; report what is missing or different.")
@click.option("--no-clobber", is_flag=True, help="Keep files in DST that have other bytes, and report them.")
@click.option("--delete", is_flag=True, help="Delete from DST what SRC does not have.")
@click.option("--cache", type=click.Path(path_type=Path), default="runs/.cache", help="State of unfinished uploads.")
def main(src: str, dst: str, check: bool, no_clobber: bool, delete: bool, cache: Path) -> None:
    """Copies files between folders and buckets (gs://, s3://), every file verified."""
    copy(src, dst, cache, check, not no_clobber, delete)


if __name__ == "__main__":
    sys.exit(main())
