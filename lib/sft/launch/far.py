"""A run whose jobs do not see this machine's disks: where the cluster keeps it, and what a job brings along.

`runs` of the cluster's file is a folder on a mount of jobs, or a bucket where no disk outlives a job (sft.launch.bucket_runs).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from sft.common import paths
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Manifest
from sft.formats.remote import SyncMetrics
from sft.launch.job import TOOLS, WATCH, Job, SubmittedJob
from sft.recipe import schema
from sft.runner import references


def in_bucket(cluster: schema.Cluster) -> bool:
    """Whether runs are stored in a bucket, because no disk outlives a job; see sft.launch.bucket_runs."""
    return cluster.runs.startswith(paths.BUCKETS)


def remote_run(job: Job) -> str:
    """The run's folder as jobs see it: the stored one, or a folder on the job's own disk where runs are in a bucket."""
    return f"runs/{job.run.name}" if in_bucket(job.cluster) else stored_run(job)


def stored_run(job: Job) -> str:
    """Where the cluster stores the run."""
    return f"{paths.for_user(job.cluster.runs)}/{job.run.name}"


def stored_stage(job: Job) -> str:
    """Where the cluster stores the stage's folder. In a bucket each result has a folder of its own."""
    name = f"{stored_run(job)}/{job.stage}"
    return f"{name}/{job.identity[:16]}" if in_bucket(job.cluster) else name


def remote_command(job: Job) -> list[str]:
    """The stage's command with the run's folder and DATA as jobs see them. Raises SftError for a DATA that they cannot see."""
    words = [remote_run(job) if word == str(job.run) else word for word in job.command]
    if job.stage in TOOLS:
        return words
    if "--data" in words:
        if not job.cluster.data:
            raise SftError(
                f"DATA={words[words.index('--data') + 1]}: a folder of this machine, which jobs on {job.place.cluster} do not"
                f' see; next: name the folder that they see: data = "/…" in env/{job.place.cluster}.toml'
            )
        words[words.index("--data") + 1] = paths.for_user(job.cluster.data)
    elif job.cluster.data:
        words += ["--data", paths.for_user(job.cluster.data)]
    return words


class InputDataset(NamedTuple):
    """An earlier stage's folder on this machine, and the Beaker dataset that it is uploaded as."""

    dataset: str
    folder: Path


def inputs_of(job: Job) -> dict[str, InputDataset]:
    """The earlier stages that were made on this machine and are uploaded with the job, {stage: dataset}.

    Raises SftError for one whose outputs are on a third machine.
    """
    found: dict[str, InputDataset] = {}
    if job.stage == WATCH:
        return found  # the training job has them
    for stage in job.earlier:
        folder = job.run / stage
        try:
            made = manifest.load(folder / manifest.NAME)
        except (FileNotFoundError, SftError):
            continue  # the planner reports a stale upstream
        elsewhere = Elsewhere.of(folder)
        where = elsewhere.where
        if in_bucket(job.cluster):
            if _bucket_address(job, stage, made, where):
                continue
        elif f"{stored_run(job)}/{stage}" in (where, str(folder.absolute())) or reference_of(job, stage):
            continue
        if elsewhere.outputs:
            raise SftError(
                f"{folder}: its outputs are in {where}, which jobs on {job.place.cluster} cannot read; next: remove"
                f" {folder / manifest.NAME} and make {stage} RECIPE={job.recipe.name} CLUSTER={job.place.cluster}"
            )
        found[stage] = InputDataset(f"olmo-sft-{stage}-{made.digest[:16]}", folder)
    return found


def reference_of(job: Job, stage: str) -> str:
    """Another run's folder on the cluster's disk that holds an earlier stage of this run, or ""."""
    where = Elsewhere.of(job.run / stage).where
    stored = paths.for_user(job.cluster.runs).rstrip("/")
    same = where == f"{stored}/{references.owner(job.run / stage)}/{stage}" and where != f"{stored_run(job)}/{stage}"
    return where if stored and same and not in_bucket(job.cluster) else ""


def _bucket_address(job: Job, stage: str, made: Manifest, where: str) -> str:
    """The address in a bucket of an earlier stage, or "" where no bucket has it.

    It is the stage's own, `where`, or for prepare that of the dataset that sync made from it.
    """
    if where.startswith(paths.BUCKETS):
        return where
    if stage != "prepare":
        return ""
    try:
        file = job.run / "sync" / manifest.NAME
        synced = SyncMetrics.of(manifest.load(file), str(file)).dataset
    except (FileNotFoundError, SftError):
        return ""
    storage = job.place.storage(job.cluster).rstrip("/")
    same = synced == f"{storage}/datasets/{made.digest[:16]}" and storage.startswith(paths.BUCKETS)
    return synced if same else ""


def addresses(job: Job) -> dict[str, str]:
    """The earlier stages that a job reads from a bucket, {stage: gs://…}. Those of `inputs_of` are uploaded with it."""
    found = {}
    for stage in job.earlier if in_bucket(job.cluster) else ():
        folder = job.run / stage
        with contextlib.suppress(FileNotFoundError, SftError):
            made = manifest.load(folder / manifest.NAME)
            if address := _bucket_address(job, stage, made, Elsewhere.of(folder).where):
                found[stage] = address
    return found


def submitted_job(folder: Path, id: str, address: str) -> Job:
    """The job that runs/<run>/.jobs, `folder`, records under the id `id`; `address` says where its results are.

    Raises SftError when there is none, or when the recipe or its inputs have changed since.
    """
    found = next((j for j in map(SubmittedJob.load, sorted(folder.glob("*.json"))) if j and j.id == id), None)
    if found is None:
        raise SftError(f"{folder}: no record names {id}; next: make the stage again")
    job = Job.parse([str(folder.parent), found.stage, *found.record.command])
    if job.identity != found.record.identity:
        raise SftError(
            f"{found.file}: the recipe or its inputs changed since the job was submitted; its results are at"
            f" {address}; next: restore the recipe, or remove {found.file} and make {job.stage} again"
        )
    return job
