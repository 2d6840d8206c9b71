"""Fetches the small files of a stage that a job has left in the bucket, and puts them in place of runs/<run>/<stage>."""

from __future__ import annotations

import shutil
from typing import IO

from sft.common.columns import say
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import NAME, UNLISTED, Elsewhere
from sft.launch import far, results
from sft.launch.job import Job
from sft.runner import plan
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer
from sft.sync.fetch import listed_copies


def fetch(job: Job, out: IO[str]) -> None:
    """Fetches the results of a job that succeeded. Raises SftError where the bucket has none, or others than the recipe wants."""
    address = far.stored_stage(job)
    source = open_storage(address, job.place.cache)
    text = source.read(manifest.NAME)
    if text is None:
        raise SftError(
            f"{address}/{manifest.NAME}: not found, but the job succeeded; next: read its log, make {job.stage} again"
        )
    arrived = job.run / ".work" / f"{job.stage}-returned"
    shutil.rmtree(arrived, ignore_errors=True)
    arrived.mkdir(parents=True)
    (arrived / manifest.NAME).write_bytes(text)
    outputs = manifest.load(arrived / manifest.NAME).outputs
    small = results.small_outputs(outputs)
    files = [f for f in listed_copies(text, address) if f.target in small]
    transfer(files, source, LocalStorage(arrived), lambda line: say(f"[sky] {line}", out))
    for name in UNLISTED:
        if (data := source.read(name)) is not None:
            (arrived / name).write_bytes(data)
    left = tuple(o.path for o in outputs if o.path not in small)
    Elsewhere(address, left).write(arrived / NAME)
    results.accept(arrived, job.run / job.stage, plan.states(job.place, job.recipe)[job.stage].key)
    say(f"[sky] {len(files)} files fetched to {job.run / job.stage}; {len(left)} outputs stay in {address}", out)
