"""Continues a training from a bucket: each node fetches the files of a step that its own ranks read.

In:  the address of a run's steps in a bucket (sft.training.uploads), and what each rank reads of a step.
Out: `find_steps` sends what an earlier attempt left here, lists the whole steps and brings the records of earlier attempts.
     `bring_step` copies the newest one to the disks, every file compared with its sha256; a step's manifest comes last.

With as many ranks as wrote the step, a node fetches the shards of its own ranks and the small files. With another number it
fetches the shards that hold some of its ranks' values (sft.checkpoint.step_folder.files_read).

Rank 0 chooses the step, because the bucket may still change: an earlier attempt may still upload its last step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sft.checkpoint import step_folder
from sft.common.errors import SftError
from sft.formats import evaluations, manifest
from sft.formats import metrics as metrics_format
from sft.formats.elsewhere import UNLISTED
from sft.formats.metrics import read_attempts
from sft.formats.steps import BEST, Best
from sft.model.parallel import SharedError, World, transfer_s
from sft.storage.contract import size
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage
from sft.sync import fetch, parts
from sft.sync.send import send

FilesRead = Callable[[Path, Collection[str]], set[str]]
"""From a step's folder, with its small files, and the names in its manifest: those that this rank reads."""


@dataclass(frozen=True)
class StoredSteps:
    """The whole steps in a bucket as rank 0 saw them: `bytes` by number."""

    where: str
    bytes: dict[int, int]


def find_steps(out: Path, where: str, cache: Path, world: World, log: Callable[[str], None]) -> StoredSteps | None:
    """The whole steps in the bucket. Rank 0's disk gets the evaluations, the metrics, a log for each earlier attempt, and BEST
    with the small files of its step. None if the bucket has no step, and where it does not answer and every disk has the same
    whole step. Every rank calls this. Raises SharedError.

    Each machine first sends its part of the newest step that an earlier attempt has left on the disks.
    """
    left = None if world.local_rank else _newest_left(out)
    count = max(world.gather(sum(p.stat().st_size for p in left.rglob("*")) if left else 0))
    patient = world.with_own_group(transfer_s(count))
    beside = UNLISTED if world.is_rank0 else ()
    for problem in patient.on_all_ranks(lambda: _send_left(left, where, cache, beside) if left else ""):
        if problem:
            log(f"warning: {problem}")
    here = world.gather(_newest_whole(out))
    whole = bool(here[0]) and len(set(here)) == 1
    try:
        # What is here can be continued at once, so a bucket that is away is not waited for.
        steps = patient.on_rank0(lambda: _complete_steps(where, cache, wait=not whole))
    except SftError as error:
        if not whole:
            raise
        log(f"warning: the bucket did not answer, training continues from what is on this machine's disk: {error}")
        return None
    ranks = node_ranks(world)
    # The records come after the list: they are never older than its steps.
    world.on_rank0(lambda: _bring_records(steps, ranks, out, where, cache, log) if steps else None)
    return StoredSteps(where, steps) if steps else None


def bring_step(
    stored: StoredSteps, out: Path, cache: Path, world: World, log: Callable[[str], None], reads: FilesRead
) -> None:
    """Copies the newest step that every node can have: to each disk what its ranks read. Every rank calls this. Raises
    SharedError where there is none and this disk has no step either: training would begin again from its first weights."""
    where, ranks = stored.where, node_ranks(world)
    world = world.with_own_group(transfer_s(max(stored.bytes.values())))
    for number in sorted(stored.bytes, reverse=True):
        address, step = f"{where}/step{number}", out / f"step{number}"
        record, listed, problem = world.on_rank0(partial(_read_list, address, cache))
        node = _Node(address, step, record, listed, ranks, cache, log, leads=not world.local_rank)
        problem = problem or _first(world.on_all_ranks(node.bring_small))
        names = [] if problem else world.gather(_names_read(step, listed, reads))
        problem = problem or _first(why for _, why in names)
        mine = {name for rank in ranks for name in names[rank][0]} if not problem else set()
        brought = [] if problem else world.on_all_ranks(partial(node.bring_rest, mine))
        if problem := problem or _first(why for _, why in brought):
            log(f"warning: {address} is skipped: {problem}")
            continue
        written = len([name for name in listed if name.startswith("train/rank")])
        other = f" (written by {written} ranks, read by {world.size})" if written != world.size else ""
        most = max(count for count, _ in brought)
        log(
            f"step{number}: each node fetched what its ranks read{other}, at most {size(most)} of"
            f" {size(stored.bytes[number])}"
        )
        log(f"continuing from step {number} of {where}")
        return
    if not world.on_rank0(lambda: any((step / manifest.NAME).is_file() for _, step in step_folder.steps(out))):
        raise SharedError(
            f"{where}: it has {len(stored.bytes)} steps, and none could be fetched (the warnings above say why); training would"
            " begin again from its first weights; next: restore a step there, or move that folder away to train from the first step"
        )


def node_ranks(world: World) -> list[int]:
    """The ranks of this rank's node. Every rank calls this."""
    local = world.gather(world.local_rank)
    first = world.rank - world.local_rank
    end = next((rank for rank in range(first + 1, world.size) if local[rank] == 0), world.size)
    return list(range(first, end))


@dataclass
class _Node:
    """What a node fetches of the step at `address`. `record`: the step's manifest, which lists the files `listed`. The methods
    return the problem, or ""; only the rank that leads fetches."""

    address: str
    step: Path
    record: bytes
    listed: Sequence[str]
    ranks: Sequence[int]
    cache: Path
    log: Callable[[str], None]
    leads: bool = True

    def bring_small(self) -> str:
        """All but the shards and the states of other nodes' ranks."""
        there = LocalStorage(self.step).read(manifest.NAME) if self.leads else None
        if there is not None and there != self.record:
            return f"{self.step} has another manifest; next: move that folder away"
        return self._bring(_small(self.listed, self.ranks))[1]

    def bring_rest(self, names: Collection[str]) -> tuple[int, str]:
        """The files `names`, then the manifest. Returns also the bytes of the files."""
        count, problem = self._bring(names)
        if self.leads and not problem:
            LocalStorage(self.step).write(manifest.NAME, self.record)
        return count, problem

    def _bring(self, names: Collection[str]) -> tuple[int, str]:
        if not self.leads:
            return 0, ""
        try:
            return parts.bring(self.record, names, self.address, self.step, self.cache, self.log), ""
        except (SftError, OSError) as error:
            return 0, str(error)


def _read_list(address: str, cache: Path) -> tuple[bytes, list[str], str]:
    """(the manifest of a step in the bucket, the files that it lists, the problem or "")."""
    try:
        if (record := open_storage(address, cache).read(manifest.NAME)) is None:
            return b"", [], "its manifest was removed"
        return record, [copy.source for copy in fetch.listed_copies(record, address)], ""
    except SftError as error:
        return b"", [], str(error)


def _names_read(step: Path, listed: Sequence[str], reads: FilesRead) -> tuple[list[str], str]:
    """(the files that this rank reads, the problem or "")."""
    try:
        return sorted(reads(step, listed)), ""
    except (SftError, OSError) as error:
        return [], str(error)


def _small(names: Iterable[str], ranks: Sequence[int]) -> set[str]:
    """The files of a step without shards, and of the states of ranks those of `ranks`; rank 0's for ranks that it does not have."""
    states = {f"train/rank{rank}.pt" for rank in (0, *ranks)}
    return {n for n in names if n in states or not (n.startswith("train/") or n.endswith(".distcp"))}


def _first(problems: Iterable[str]) -> str:
    return next(filter(None, problems), "")


def _newest_left(out: Path) -> Path | None:
    """The newest finished step on this disk, if other nodes have some of its files; otherwise None."""
    done = [step for _, step in step_folder.steps(out) if (step / manifest.NAME).is_file()] if out.is_dir() else []
    return done[-1] if done and parts.is_part(done[-1]) else None


def _send_left(step: Path, where: str, cache: Path, beside: Sequence[str]) -> str:
    """Sends a step, or the part of it that this disk has. Returns the problem, or ""."""
    try:
        send(step, where, cache, beside)
    except (SftError, OSError) as error:
        return f"{step.name} of an earlier attempt could not be sent: {error}"
    return ""


def _newest_whole(out: Path) -> int:
    """The number of the newest step that this disk has whole, by the names in its manifest; 0 without one."""
    found = step_folder.steps(out) if out.is_dir() else []
    return max((n for n, step in found if (step / manifest.NAME).is_file() and not parts.is_part(step)), default=0)


def _complete_steps(where: str, cache: Path, wait: bool = True) -> dict[int, int]:
    """{number: bytes} of the steps with a manifest."""
    files = open_storage(where, cache, wait).list()
    found = [m for name in files if (m := fetch.STEP_MANIFEST.fullmatch(name))]
    return {int(m[1]): sum(f.bytes for name, f in files.items() if name.startswith(f"step{m[1]}/")) for m in found}


def _bring_records(
    steps: Collection[int], ranks: Sequence[int], out: Path, where: str, cache: Path, log: Callable[[str], None]
) -> None:
    """Copies BEST with the small files of its step, the evaluations and the metrics, and writes a log for each earlier attempt,
    so that this attempt gets the next number."""
    bucket, target = open_storage(where, cache), LocalStorage(out)
    data = bucket.read(BEST) or b""
    if (best := Best.from_bytes(data)) and best.step in steps:
        address = f"{where}/step{best.step}"
        record, listed, problem = _read_list(address, cache)
        node = _Node(address, out / f"step{best.step}", record, listed, ranks, cache, log)
        if problem := problem or node.bring_small() or node.bring_rest(())[1]:
            log(f"warning: BEST names step {best.step}, which could not be fetched: {problem}")
        else:
            target.write(BEST, data)
    for name in (evaluations.NAME, metrics_format.NAME):
        if (text := bucket.read(name)) is not None:
            target.write(name, text)
    for header in read_attempts(out / metrics_format.NAME):
        name = f"logs/attempt-{header.attempt:03}-rank0.log"
        target.write(name, b"This attempt ran as a job of its own, which has its log.\n")
