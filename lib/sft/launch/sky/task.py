"""A stage's job as SkyPilot's task, built from the job and its cluster's file without asking anybody.

The task runs env/sky-job.sh on each node with a list of arguments. Names are checked against patterns. Values travel as quoted
words or variables. Secrets are only named: `sky jobs launch --secret NAME` reads the value from its own environment.

With a shared disk the job works in this repository. Without one it gets the code at its commit, and runs are in a bucket.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.common import paths
from sft.common.errors import SftError
from sft.common.process import AGAIN
from sft.formats import manifest
from sft.launch import code, far, names
from sft.launch.job import TOOLS, Job
from sft.recipe import schema
from sft.runner import plan

WORD = r"[A-Za-z0-9_.-]+"
NAMES = {
    "infra": r"[A-Za-z0-9_.:@*-]+(/[A-Za-z0-9_.:@*-]+)*",
    "image": r"[A-Za-z0-9_.:@/-]+",
    "queue": r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?",
    "volumes": rf"{WORD}:(/{WORD})+",
    "runs": rf"(gs|s3)://[a-z0-9_.-]+(/{WORD})*",
    "data": rf"(/{WORD})+(:(/{WORD})+)*",
    "sky": r"--[a-z][a-z-]*(=.*)?",
}
OWN_OPTIONS = ("--name", "--secret", "--env", "--detach-run", "--yes", "--async", "--num-nodes", "--workdir", "--gpus")
"""Options of `sky jobs launch` that this launcher sets itself."""
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
LONGEST_NAME = 60


def check_cluster(name: str, cluster: schema.Cluster) -> None:
    """Raises SftError listing every field of env/<name>.toml that SkyPilot or a job could not follow."""
    names.refuse(name, [*names.bad_names(cluster, NAMES), *_bad_variables(cluster), *_bad_values(cluster)])


def _bad_variables(cluster: schema.Cluster) -> Iterator[str]:
    for field in ("secrets", "optional_secrets"):
        for variable, source in getattr(cluster, field).items():
            if not re.fullmatch(_VARIABLE, variable) or not re.fullmatch(_VARIABLE, source):
                yield f"'{field}': {variable} = {source!r} is not VARIABLE = \"variable of the shell that runs make\""
    named = [*cluster.env, *cluster.secrets, *cluster.optional_secrets]
    yield from (f"'env' and the secrets set {v} twice" for v in dict.fromkeys(named) if named.count(v) > 1)


def _bad_values(cluster: schema.Cluster) -> Iterator[str]:
    if cluster.gpus_per_node and not cluster.gpu:
        yield "'gpu' is missing: SkyPilot asks for GPUs by their type, e.g. H100 (sky gpus list)"
    if not cluster.shared_disk and not far.in_bucket(cluster):
        yield (
            "'runs' is missing: jobs that do not see this disk keep runs in a bucket, gs://… or s3://…; or shared_disk = true, with a"
            " volume that this machine mounts at the same path"
        )
    if cluster.shared_disk:
        for field in ("runs", "install", "data"):
            if getattr(cluster, field):
                yield f"'{field}': for shared_disk = false only; with a shared disk a job works in this repository"
    taken = [text for text in cluster.sky if text.partition("=")[0] in OWN_OPTIONS]
    yield from (f"'sky': {text!r} is set by the launcher itself" for text in taken)


def name_of(job: Job) -> str:
    """The managed job's name. Its end names what is made and where, so that a lost submission is recognised."""
    where = str(job.run.absolute()) if job.cluster.shared_disk else far.stored_stage(job)
    mark = hashlib.sha256(f"{where}#{job.identity}".encode()).hexdigest()[:12]
    return f"{re.sub('[^a-zA-Z0-9]+', '-', f'sft-{job.name}')[:LONGEST_NAME].rstrip('-')}-{mark}"


def secrets(cluster: schema.Cluster) -> dict[str, str]:
    """The secrets of a job, {variable: variable of this environment}, without the optional ones that are not set here."""
    optional = {k: v for k, v in cluster.optional_secrets.items() if os.environ.get(v)}
    return {**cluster.secrets, **optional}


def options(cluster: schema.Cluster) -> list[str]:
    """The options of `sky jobs launch`. The value of a secret is in the environment of the process only."""
    named = [word for variable in secrets(cluster) for word in ("--secret", variable)]
    return ["--detach-run", "--yes", *named, *cluster.sky]


def task(job: Job, shipped: code.Code | None, workdir: Path) -> dict[str, Any]:
    """The task. `shipped` is the code, None with a shared disk; `workdir` is the folder of an archive's files.

    Raises SftError for a cluster's file or a path that cannot work.
    """
    check_cluster(job.place.cluster, job.cluster)
    made: dict[str, Any] = {"name": name_of(job), "num_nodes": job.nodes, "resources": resources(job)}
    cluster = job.cluster
    if shipped is not None:
        git = {"url": shipped.repository, "ref": shipped.commit}
        made["workdir"] = git if shipped.repository else str(workdir)
    if cluster.volumes:
        made["volumes"] = {path: volume for volume, _, path in (text.partition(":") for text in cluster.volumes)}
    made["envs"] = variables(job, shipped)
    if shipped is not None and cluster.install:
        made["setup"] = "\n".join(["set -euo pipefail", *cluster.install, ""])
    made["run"] = script(job)
    if cluster.queue:
        made["config"] = {"kubernetes": {"kueue": {"local_queue_name": cluster.queue}}}
    return made


def resources(job: Job) -> dict[str, Any]:
    """What a job asks for on each node, and what is run again. Exit status 75 says that training has saved."""
    cluster, hardware = job.cluster, job.hardware
    kind = (hardware.gpu or cluster.gpu).replace(" ", "-")
    if job.gpus and not kind:
        raise SftError(f"[on.{job.place.cluster}.{job.stage}] gpus = {job.gpus}: SkyPilot asks for GPUs by their type; next:"
                       f" gpu = \"…\" in env/{job.place.cluster}.toml, a name of sky gpus list")  # fmt: skip
    found: dict[str, Any] = {
        "accelerators": f"{kind}:{job.gpus}" if job.gpus else None,
        "cpus": f"{hardware.cpus}+" if hardware.cpus else None,
        "memory": f"{hardware.memory_gb}+" if hardware.memory_gb else None,
        "use_spot": cluster.use_spot or None,
        "image_id": cluster.image or None,
        "disk_size": cluster.disk_gb or None,
        "job_recovery": {"max_restarts_on_errors": cluster.retries, "recover_on_exit_codes": [AGAIN]},
    }
    if len(cluster.infra) == 1:
        found["infra"] = cluster.infra[0]
    elif cluster.infra:
        found["any_of"] = [{"infra": infra} for infra in cluster.infra]
    return {name: value for name, value in found.items() if value is not None}


def variables(job: Job, shipped: code.Code | None) -> dict[str, str]:
    """The variables of a job that are no secrets."""
    found = {k: paths.for_user(v) for k, v in job.cluster.env.items()}
    found |= {k: v for k, v in (("TORCH", job.cluster.torch), ("PYTHON", job.cluster.python)) if v}
    # SFT_WATCH: no other job evaluates the checkpoints, since a job has no `sky` to ask how the training is.
    found |= {"SFT_JOB": "sky", "SFT_USER": paths.for_user("{user}"), "SFT_WATCH": "1"}
    if job.nodes > 1:  # two jobs may share a host and its network, so the port depends on what the job makes
        found["SFT_PORT"] = str(20000 + int(job.identity[:8], 16) % 10000)
    if shipped is None:
        return found
    found["SFT_COMMIT"] = shipped.commit
    if shipped.edits:
        found["SFT_EDITS"] = shipped.edits
    if job.stage not in TOOLS:
        found |= {f"SFT_INPUT_{stage}": address for stage, address in far.addresses(job).items()}
        found |= {f"SFT_INPUT_{stage}": address for stage, (address, _) in uploads(job).items()}
        found["SFT_STAGE_ADDRESS"] = far.stored_stage(job)
    return found


def uploads(job: Job) -> dict[str, tuple[str, Path]]:
    """The earlier stages that are only on this machine, {stage: (their address in the bucket, their folder)}. Raises SftError."""
    found = {}
    for stage, (_, folder) in far.inputs_of(job).items() if not job.cluster.shared_disk else ():
        digest = manifest.load(folder / manifest.NAME).digest[:16]
        found[stage] = (f"{far.stored_run(job)}/{stage}/{digest}", folder)
    return found


def script(job: Job) -> str:
    """The lines that run on each node."""
    if job.cluster.shared_disk:
        run, command, place = str(job.run), job.command, [f"cd {shlex.quote(str(plan.REPO))}"]
    else:
        run, command, place = far.remote_run(job), far.remote_command(job), []
    return "\n".join(["set -euo pipefail", *place, f"exec env/sky-job.sh {shlex.join([run, job.stage, *command])}", ""])


def text(made: dict[str, Any]) -> str:
    """The task as YAML, as `sky jobs launch` reads it."""
    import yaml  # start-up: the doctor loads launchers without the environment

    def represent(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    dumper: Any = type("Dumper", (yaml.SafeDumper,), {})  # of our own: representers are added to a class
    dumper.add_representer(str, represent)
    return str(yaml.dump(made, Dumper=dumper, sort_keys=False, width=120, allow_unicode=True))
