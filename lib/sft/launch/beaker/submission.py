"""Submits a stage as a Beaker experiment: uploads what it needs, builds its specification, creates it under a free name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from beaker import Beaker, BeakerConstraints, BeakerExperimentSpec
from beaker import beaker_pb2 as pb2
from beaker.exceptions import BeakerExperimentConflict, BeakerWorkloadNotFound, HTTPError, RequestException

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.common.strings import first_names
from sft.formats import manifest
from sft.launch import code, far
from sft.launch.beaker import harnesses, hosts, specification
from sft.launch.beaker.datasets import DatasetUploads
from sft.launch.beaker.requirements import secret_name
from sft.launch.beaker.states import has_ended
from sft.launch.job import Job
from sft.runner import plan

ATTEMPTS = 20  # names that are tried, where experiments of the earlier ones have ended
INPUT_BYTES = 32 << 30  # a larger earlier stage is not uploaded with a job


def submit(client: Beaker, job: Job, uploads: DatasetUploads) -> str:
    """Submits the job and returns the experiment's id. Raises SftError, or what the client raises."""
    workspace = client.workspace.get(job.cluster.workspace)
    user = specification.user()
    spec = _upload_and_specify(job, user, uploads, workspace)
    if found := hosts.allowed(client, job):  # a list of hosts takes the place of that of clusters
        say(f"[{job.stage}] on one or more of {len(found)} hosts: {first_names(found)}")
        for task in spec.tasks:
            task.constraints = BeakerConstraints(hostname=list(found))
    _name_secrets(client, spec, workspace)
    for attempt in range(ATTEMPTS):
        if id := _create(client, spec, specification.name_of(job, attempt), user, workspace):
            return id
    raise SftError(f"{ATTEMPTS} experiments named {specification.name_of(job)} have ended without a result; next: read the log"
                   f" of the last one, then give the run another name: make new FROM={job.recipe.name} RECIPE=…")  # fmt: skip


def _upload_and_specify(job: Job, user: str, uploads: DatasetUploads, workspace: pb2.Workspace) -> BeakerExperimentSpec:
    """Uploads the code and the earlier stages that the job needs, or a harness's model. Returns the specification."""
    if spec := harnesses.harness_experiment(job, user):
        for dataset, path in harnesses.model_of(job, user).uploads.items():
            uploads.upload(dataset, path, workspace)
        return spec
    shipped = code.describe(plan.REPO, job.cluster.code)
    if shipped.dataset:
        with tempfile.TemporaryDirectory(prefix="olmo-sft-") as folder:
            archive = Path(folder)
            uploads.upload(shipped.dataset, lambda: code.archive(plan.REPO, shipped, archive), workspace)
    if shipped.edits:  # it stays here when the archive is deleted from Beaker
        write_atomic(job.folder / f"{job.stage}.diff", code.edits(plan.REPO))
    for stage, (dataset, path) in far.inputs_of(job).items():
        size = sum(o.bytes for o in manifest.load(path / manifest.NAME).outputs)
        if size > INPUT_BYTES:
            raise SftError(f"{path}: {size:,} bytes are too many to upload with a job; next: remove its manifest"
                           f" and make {stage} RECIPE={job.recipe.name} CLUSTER={job.place.cluster}")  # fmt: skip
        uploads.upload(dataset, path, workspace)
    return specification.experiment(job, shipped, user)


def _name_secrets(client: Beaker, spec: BeakerExperimentSpec, workspace: pb2.Workspace) -> None:
    """Gives the secrets in the specification the workspace's spelling, and leaves out those that it does not have: optional ones,
    since the others were checked."""
    for task in spec.tasks:
        kept = []
        for variable in task.env_vars or []:
            if variable.secret:
                variable.secret = secret_name(client, variable.secret, workspace)
                if variable.secret is None:
                    continue
            kept.append(variable)
        task.env_vars = kept


def _create(client: Beaker, spec: BeakerExperimentSpec, name: str, user: str, workspace: pb2.Workspace) -> str | None:
    """Creates the experiment and returns its id. Returns None if an earlier attempt that has ended has the name.

    A request without an answer may have created the experiment. An active experiment with the same name and description is
    then taken for it. Raises SftError if another active experiment has the name. Raises what the client raises.
    """
    try:
        return str(client.experiment.create(spec=spec, name=name, workspace=workspace).experiment.id)
    except (BeakerExperimentConflict, RequestException) as e:
        if isinstance(e, HTTPError) or (taken := _find(client, f"{user}/{name}")) is None:
            raise
        if has_ended(taken):
            return None
        if isinstance(e, RequestException) and taken.experiment.description == spec.description:
            return str(taken.experiment.id)
        raise SftError(
            f"the experiment {name} exists already and has not ended: {client.workload.url(taken)};"
            f" it was submitted elsewhere; next: wait for it, or beaker experiment stop {taken.experiment.id}"
        ) from None


def _find(client: Beaker, name: str) -> pb2.Workload | None:
    try:
        return client.workload.get(name)
    except BeakerWorkloadNotFound:
        return None
