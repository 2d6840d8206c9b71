"""make delete and make archive: a run leaves the folder of runs, and stages that other runs refer to stay. Standard library only.

plan = removal(Path("runs/x"))         what would be handed over and what would go
delete(plan)                           deletes the folder
archive(plan, Path("/backup/x.tar"))   packs it first, verified; then deletes it
"""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from sft.common.errors import SftError
from sft.formats import job
from sft.formats.job import JobRecord
from sft.recipe import schema
from sft.runner import continuation, models, references
from sft.runner.listing import is_running, size_text


@dataclass(frozen=True)
class Removal:
    """A run's folder, the links of other runs to its stages, and the bytes that become free."""

    run: Path
    referrers: dict[str, list[Path]]
    size: int

    def lines(self) -> list[str]:
        """What is done, one fact per line."""
        kept = [
            f"{stage} stays: it moves to {links[0].parent.name}, which refers to it"
            + (
                f", as {', '.join(link.parent.name for link in links[1:])} do{'es' * (len(links) == 2)}"
                if links[1:]
                else ""
            )
            for stage, links in self.referrers.items()
        ]
        return [*kept, f"{self.run}: {size_text(self.size)}"]


def removal(run: Path) -> Removal:
    """What removing a run means. Raises SftError while a stage of it runs, a job is not reported, or another run scores it or
    goes on from it."""
    if busy := [s for s in (*schema.STAGES, "report") if is_running(run, s)]:
        raise SftError(f"{run}: {', '.join(busy)} is running; next: stop it, or wait for it")
    for file in sorted((run / job.FOLDER).glob("*.json")):
        try:
            record = JobRecord.read(file)
        except (OSError, SftError):
            continue
        if not record.ended:
            raise SftError(
                f"{file}: the end of job {record.job} was not reported; next: make cancel or make collect, then this again"
            )
    if scorers := models.scored_by(run):
        raise SftError(
            f"{run}: {', '.join(scorers)} scored it (MODEL=), and no make reaches {'that' if len(scorers) == 1 else 'those'} without it;"
            f" next: make delete RUN={scorers[0]} first"
        )
    if successors := continuation.continued_by(run):
        raise SftError(
            f"{run}: {', '.join(successors)} go{'es' * (len(successors) == 1)} on from a step of it ([train] continue), and no make reaches"
            f" {'that' if len(successors) == 1 else 'those'} without it; next: make delete RUN={successors[0]} first"
        )
    links = references.referrers(run)
    stay = [run / stage for stage in links]
    files = (Path(folder) / name for folder, _, names in os.walk(run) for name in names)
    size = sum(f.lstat().st_size for f in files if not any(f.is_relative_to(s) for s in stay))
    return Removal(run, links, size)


def delete(plan: Removal) -> None:
    """Hands the stages over that others refer to, and deletes the folder."""
    hand_over(plan)
    gone = plan.run.with_name(f".deleted-{plan.run.name}-{os.getpid()}")
    os.rename(plan.run, gone)  # at once: half a run never looks like one
    shutil.rmtree(gone)


def archive(plan: Removal, target: Path) -> None:
    """Packs the run into a new tar file, reads it back, and deletes the run. Raises SftError where the file exists."""
    if target.exists():
        raise SftError(f"{target}: exists already; next: choose another DST=")
    if not target.name.endswith((".tar", ".tar.gz", ".tar.xz")):
        raise SftError(f"DST={target}: the name of a .tar, .tar.gz or .tar.xz file is expected; next: correct it")
    work = target.with_name(f".{target.name}.part")
    compression = target.suffix.removeprefix(".").replace("tar", "")
    with tarfile.open(work, f"w:{compression}", dereference=True) as packed:  # type: ignore[call-overload]
        packed.add(plan.run, plan.run.name, filter=lambda m: None if m.name.endswith(".lock") else m)
    with tarfile.open(work) as packed:
        for member in packed:
            if member.isfile() and (stream := packed.extractfile(member)) is not None:
                while stream.read(1 << 20):
                    pass  # a damaged block raises
    os.rename(work, target)
    delete(plan)


def hand_over(plan: Removal) -> None:
    """Moves each stage that other runs refer to into the first of them; the others then refer to that."""
    for stage, (first, *others) in plan.referrers.items():
        first.unlink()
        os.rename(plan.run / stage, first)
        for link in others:
            references.refer(link.parent, stage, first)
