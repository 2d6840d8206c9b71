"""Steps whose files are on the disks of several nodes. A bucket has all of them once every node has sent its own.

In:  a step folder that lists all files in its manifest and has some of them; the address of the run's steps in the bucket.
Out: `bring` copies chosen files, each compared with its sha256. `joined` makes a folder with the files of both places.

The step folder itself is only read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.manifest import Output, StepManifest
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer
from sft.sync.fetch import listed_copies


def missing_files(step: Path) -> list[Output]:
    """The files of a step that are not on this disk. Raises SftError or OSError where its manifest cannot be read."""
    return [o for o in StepManifest.read(step / manifest.NAME).outputs if not (step / o.path).is_file()]


def is_part(step: Path) -> bool:
    """Whether this disk has only some of the files of a step: those of its node's ranks."""
    return bool(missing_files(step))


def is_sent(step: Path, where: str, cache: Path, wait: bool = True) -> bool:
    """Whether the bucket has all files of this step: its manifest is written last. `where`: the address of the run's steps, or
    "". wait=False: raises SftError at once where the bucket does not answer."""
    if not where:
        return False
    found = open_storage(f"{where}/{step.name}", cache, wait).read(manifest.NAME)
    return found == (step / manifest.NAME).read_bytes()


def bring(
    record: bytes, names: Collection[str], source: str, target: Path, cache: Path, log: Callable[[str], None]
) -> int:
    """Copies the files `names` of a step from the address `source` to the folder `target`, and returns their bytes. Files that
    are there are kept if they are the same. `record`: the step's manifest. Raises SftError with the files that failed."""
    copies = [copy for copy in listed_copies(record, source) if copy.source in names]
    if copies:
        transfer(copies, open_storage(source, cache), LocalStorage(target), log)
    return sum(copy.bytes for copy in copies)


@contextlib.contextmanager
def joined(step: Path, where: str, work: Path, cache: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """A folder with the weights of a step: `step` itself if it is whole, or `work`/stepN, removed at the end, with links to its
    files and copies of those that only the bucket has. The states of other nodes' ranks (train/) stay there: nothing but a
    resume reads them. Raises SftError for files that differ from the manifest, and where the bucket does not have the step.
    """
    outputs = StepManifest.read(step / manifest.NAME).outputs
    absent = {o.path for o in missing_files(step)}
    if broken := manifest.broken_outputs(step, [o for o in outputs if o.path not in absent]):
        raise SftError("; ".join(broken))
    if not absent:
        yield step
        return
    if not is_sent(step, where, cache):
        raise SftError(
            f"{step}: {len(absent)} of its files are on other nodes, and {where or 'no bucket'} does not have the whole step;"
            " next: make watch, after training has sent it"
        )
    whole = work / step.name
    shutil.rmtree(whole, ignore_errors=True)
    try:
        for output in outputs:
            if output.path not in absent:
                (whole / output.path).parent.mkdir(parents=True, exist_ok=True)
                os.link(step / output.path, whole / output.path)
        names = {name for name in absent if not name.startswith("train/")}
        record = (step / manifest.NAME).read_bytes()
        bring(record, names, f"{where}/{step.name}", whole, cache, log)
        (whole / manifest.NAME).write_bytes(record)
        yield whole
    finally:
        shutil.rmtree(whole, ignore_errors=True)
