"""A stage's job as the specification of a Beaker experiment, built from the job and its cluster's file without asking Beaker.

One task runs env/beaker-job.sh with a list of arguments; several nodes are replicas with a leader. Names are checked
against patterns. Values travel as arguments or variables and are never part of a shell line. Secrets are only named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from beaker import BeakerExperimentSpec, BeakerTaskSpec

from sft.common import paths
from sft.common.errors import SftError
from sft.launch import code, far, names
from sft.launch.job import TOOLS, Job
from sft.recipe import recipe, schema
from sft.runner import plan

SCRIPT = plan.REPO / "env" / "beaker-job.sh"
RESULTS, CODE, INPUTS = "/results", "/sft-code", "/sft-inputs"
START_TIMEOUT = "90m"  # the replicas of a task wait this long for each other
SHARED_MEMORY = "10GiB"  # Docker's default of 64 MB is too small for NCCL and for data workers
NAMES = {
    "clusters": r"[A-Za-z0-9_-]+/[A-Za-z0-9_.-]+",
    "workspace": r"[A-Za-z0-9_-]+/[A-Za-z0-9_.-]+",
    "budget": r"[A-Za-z0-9_-]+/[A-Za-z0-9_.-]+",
    "image": r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+",
    "evaluate_image": r"([A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+",
    "mounts": r"[A-Za-z0-9_.-]+:(/[A-Za-z0-9_.-]+)+",
    "runs": r"(/[A-Za-z0-9_.-]+|(gs|s3)://[a-z0-9_.-]+)(/[A-Za-z0-9_.-]+)*",
    "tcpxo": r"(/[A-Za-z0-9_.-]+)+",
    "google_zone": r"[a-z0-9-]+/[a-z0-9-]+",
    "data": r"(/[A-Za-z0-9_.-]+)+(:(/[A-Za-z0-9_.-]+)+)*",
}
_VARIABLE, _SECRET = r"[A-Za-z_][A-Za-z0-9_]*", r"[A-Za-z0-9_.-]+"


def duration(value: str) -> str:
    """A duration in seconds as Beaker reads it, "86400s", from 24h, 1h30m, 24:00:00 or 1-00:00:00. Raises SftError.

    Beaker's client would read "24:00:00" as 24 seconds.
    """
    go = re.fullmatch(r"()(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value)
    match = go or re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value)
    if not value or not match:
        raise SftError(f"{value!r} is not a duration; next: write it as 24h, 1h30m, 24:00:00 or 1-00:00:00")
    days, hours, minutes, seconds = (int(n or 0) for n in match.groups())
    return f"{((24 * days + hours) * 60 + minutes) * 60 + seconds}s"


def check_cluster(name: str, cluster: schema.Cluster) -> None:
    """Raises SftError listing every field of env/<name>.toml that Beaker would refuse."""
    names.refuse(name, [*names.bad_names(cluster, NAMES), *_bad_values(cluster), *_bad_variables(cluster)])


def _bad_values(cluster: schema.Cluster) -> Iterator[str]:
    for field in ("time", "min_runtime"):
        try:
            duration(getattr(cluster, field) or "0s")
        except SftError as e:
            yield f"'{field}' = {str(e).partition('; next: ')[0]}"
    for field in ("clusters", "workspace", "image", "runs"):
        if not getattr(cluster, field):
            yield f"'{field}' is missing: a Beaker job needs it"
    if not cluster.preemptible and not (cluster.min_runtime or cluster.time):
        yield "'preemptible' = false needs 'time' or 'min_runtime': how long a job must not be interrupted"
    mounted = [m.partition(":")[2] for m in cluster.mounts]
    runs = paths.for_user(cluster.runs)
    if runs and not far.in_bucket(cluster) and not any(runs == m or runs.startswith(m + "/") for m in mounted):
        yield f"'runs' = {runs!r} is on none of the mounts ({', '.join(mounted) or 'none'}): it would be lost with the job"


def _bad_variables(cluster: schema.Cluster) -> Iterator[str]:
    for field in ("secrets", "optional_secrets", "evaluate_secrets"):
        for variable, secret in getattr(cluster, field).items():
            if not re.fullmatch(_VARIABLE, variable) or not re.fullmatch(_SECRET, paths.for_user(secret)):
                yield f"'{field}': {variable} = {secret!r} is not VARIABLE = \"name of a secret\""
    yield from (f"'env': {v!r} is not a variable's name" for v in cluster.env if not re.fullmatch(_VARIABLE, v))
    named = [*cluster.env, *cluster.secrets, *cluster.optional_secrets]
    yield from (f"'env' and the secrets set {v} twice" for v in dict.fromkeys(named) if named.count(v) > 1)


def check_time(r: recipe.Recipe, cluster: str, stage: str) -> None:
    """Raises SftError for an [on.<cluster>.<stage>] time that Beaker would misread."""
    try:
        duration(r.hardware(cluster, stage).time or "0s")
    except SftError as e:
        raise SftError(f"{r.file}: [on.{cluster}.{stage}] time = {e}") from None


def name_of(job: Job, attempt: int = 0) -> str:
    """The experiment's name. It names the run, the stage and what it makes, so that two machines cannot submit the same twice."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.name)[:90]
    return f"{name}-{job.identity[:10]}" + (f"-{attempt}" if attempt else "")


def experiment(job: Job, shipped: code.Code, user: str) -> BeakerExperimentSpec:
    """The experiment of a stage's job. Raises SftError for a cluster's file or a path that cannot work."""
    check_cluster(job.place.cluster, job.cluster)
    # Two jobs may share a host and its network, so the port depends on the job's identity.
    variables = {"SFT_PORT": str(20000 + int(job.identity[:8], 16) % 10000)} if job.nodes > 1 else {}
    variables |= {"SFT_JOB": "beaker", "SFT_USER": user, "SFT_COMMIT": shipped.commit, "SFT_RESULTS": RESULTS}
    variables |= {
        k: v for k, v in (("TORCH", job.cluster.torch), ("PYTHON", job.cluster.python)) if v
    }  # env/setup.sh reads them
    mounts = {}
    if shipped.edits:
        variables["SFT_EDITS"] = shipped.edits
    if shipped.dataset:
        variables["SFT_CODE"] = CODE
        mounts[CODE] = f"{user}/{shipped.dataset}"
    else:
        variables["SFT_REPOSITORY"] = shipped.repository
    if job.stage in TOOLS:
        variables["SFT_TOOL"] = "1"  # it leaves its result where it was told to, and nothing to fetch
    elif far.in_bucket(job.cluster):
        variables |= {f"SFT_INPUT_{stage}": address for stage, address in far.addresses(job).items()}
        variables["SFT_STAGE_ADDRESS"] = far.stored_stage(job)
    if job.cluster.storage_wait_s:  # before the stage runs, its inputs are fetched
        variables[paths.STORAGE_WAIT] = str(job.cluster.storage_wait_s)
    for stage in job.earlier:
        if reference := far.reference_of(job, stage):
            variables[f"SFT_REFERENCE_{stage}"] = reference
    for stage, (dataset, _) in far.inputs_of(job).items():
        variables[f"SFT_INPUT_{stage}"] = f"{INPUTS}/{stage}"
        mounts[f"{INPUTS}/{stage}"] = f"{user}/{dataset}"
    if job.cluster.tcpxo and job.gpus:
        variables["SFT_TCPXO"] = job.cluster.tcpxo
    install = job.cluster.install
    made = task(job, job.stage, variables, mounts)
    # TCPXO's names of interfaces are the host's, and NCCL reads them on one node, too.
    made.host_networking = made.host_networking or "SFT_TCPXO" in variables
    made.command = ["bash", "-c", SCRIPT.read_text(encoding="utf-8"), SCRIPT.name]
    made.arguments = [far.remote_run(job), job.stage, str(len(install)), *install, *far.remote_command(job)]
    return wrap(job, [made], job.cluster.retries + restarts_of(job))


def restarts_of(job: Job) -> int:
    """How often Beaker starts a training again that was killed or asks to be run again, beside `retries`."""
    return job.hardware.max_restarts if job.stage == "train" else 0


def task(
    job: Job, name: str, variables: Mapping[str, str], datasets: Mapping[str, str], gpus: int | None = None
) -> BeakerTaskSpec:
    """A Beaker task without its command: its resources, variables, secrets and mounts. `datasets`: {path: dataset}."""
    cluster, hardware = job.cluster, job.hardware
    check_time(job.recipe, job.place.cluster, job.stage)
    time = duration(hardware.time or cluster.time or "0s")
    gpus = job.gpus if gpus is None else gpus
    resources = {"gpu_count": gpus or None, "cpu_count": hardware.cpus or None,
                 "memory": f"{hardware.memory_gb}GiB" if hardware.memory_gb else None,
                 "shared_memory": SHARED_MEMORY if gpus else None}  # fmt: skip
    replicas: dict[str, Any] = {"replicas": job.nodes, "leader_selection": True, "host_networking": True, "propagate_failure": True,
                "propagate_preemption": True, "synchronized_start_timeout": START_TIMEOUT} if job.nodes > 1 else {}  # fmt: skip
    made = BeakerTaskSpec.new(
        re.sub(r"[^A-Za-z0-9_.-]", "-", name),
        beaker_image=cluster.image,
        cluster=list(cluster.clusters),
        result_path=RESULTS,
        priority=hardware.priority or cluster.priority,
        min_runtime=duration(cluster.min_runtime or "0s") if cluster.min_runtime or cluster.preemptible else time,
        auto_resume=cluster.preemptible,
        timeout=time if hardware.time or cluster.time else None,
        **replicas,
    ).with_resources(**{k: v for k, v in resources.items() if v is not None})
    for variable, value in {**cluster.env, **variables}.items():
        made = made.with_env_var(variable, value=paths.for_user(value))
    for variable, secret in {**cluster.secrets, **cluster.optional_secrets}.items():
        made = made.with_env_var(variable, secret=paths.for_user(secret))
    for mount in cluster.mounts:
        bucket, _, path = mount.partition(":")
        made = made.with_dataset(path, weka=bucket)
    for path, dataset in datasets.items():
        made = made.with_dataset(path, beaker=dataset)
    return made


def wrap(job: Job, tasks: list[BeakerTaskSpec], retries: int) -> BeakerExperimentSpec:
    """The experiment of these tasks. Its description names what is made, so that a lost submission is recognised."""
    spec = BeakerExperimentSpec(
        budget=job.cluster.budget or None,
        tasks=tasks,
        description=f"olmo-sft {job.stage} of {job.run.name} {job.identity}",
    )
    return spec.with_retries(retries) if retries else spec


def text(spec: BeakerExperimentSpec) -> str:
    """The specification as YAML, as `beaker experiment create` reads it."""

    def represent(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    dumper: Any = type("Dumper", (yaml.SafeDumper,), {})  # of our own: representers are added to a class
    dumper.add_representer(str, represent)
    return str(yaml.dump(spec.to_json(), Dumper=dumper, sort_keys=False, width=120, allow_unicode=True))


def user() -> str:
    """The name that '{user}' stands for: SFT_USER, else the login name. Raises SftError for one that no account can have."""
    name = paths.for_user("{user}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise SftError(f"{name!r} is not the name of a Beaker account; next: SFT_USER=<your account> make …")
    return name
