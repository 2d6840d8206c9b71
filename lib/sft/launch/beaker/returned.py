"""Fetches what an experiment returned, once it has ended, and puts it in place of runs/<run>/<stage>."""

from __future__ import annotations

import shutil
from typing import IO

from beaker import Beaker
from beaker import beaker_pb2 as pb2

from sft.formats.elsewhere import Elsewhere
from sft.launch import results
from sft.launch.beaker import harnesses
from sft.launch.beaker.datasets import download_results
from sft.launch.job import WATCH, Job
from sft.runner import plan


def fetch(client: Beaker, workload: pb2.Workload, job: Job, out: IO[str]) -> int:
    """Fetches the results of an experiment that succeeded. Returns the stage's exit status. Raises SftError."""
    arrived = job.run / ".work" / f"{job.stage}-returned"
    shutil.rmtree(arrived, ignore_errors=True)
    arrived.mkdir(parents=True)
    tasks = sorted(workload.experiment.tasks, key=lambda t: t.system_details.replica_group_details.rank)
    is_harness, count = harnesses.is_harness(job), 0
    for task in tasks:
        latest = client.workload.get_latest_job(workload, task=task)
        if latest is not None:  # the files of a harness's tasks have the same names: a folder for each task
            target = arrived / harnesses.folder_of(task.name) if is_harness else arrived
            count += download_results(client, latest, target)
    if is_harness:
        return harnesses.record_scores(job, arrived)
    if job.stage == WATCH:
        names = results.accept_evaluations(arrived, job.run / "train")
        out.write(f"[beaker] {', '.join(names) or 'no evaluation'} fetched to {job.run / 'train'}\n")
        return 0
    elsewhere = Elsewhere.of(arrived)
    results.accept(arrived, job.run / job.stage, plan.states(job.place, job.recipe)[job.stage].key)
    left = len(elsewhere.outputs)
    out.write(f"[beaker] {count} files fetched to {job.run / job.stage}; {left} outputs stay in {elsewhere.where}\n")
    return 0
