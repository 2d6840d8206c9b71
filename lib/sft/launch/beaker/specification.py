"""A stage's job as the specification of a Beaker experiment, built from the job and its cluster's file without asking Beaker.

One task runs env/beaker-job.sh with a list of arguments; several nodes are replicas with a leader. Names are checked
against patterns. Values travel as arguments or variables and are never part of a shell line. Secrets are only named.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from beaker import BeakerExperimentSpec, BeakerTaskSpec

from sft.common import paths
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Manifest
from sft.formats.remote import SyncMetrics
from sft.launch.beaker import code
from sft.launch.job import TOOLS, WATCH, Job
from sft.recipe import recipe, schema
from sft.runner import plan, references

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
    "runs": r"(/[A-Za-z0-9_.-]+|gs://[a-z0-9_.-]+)(/[A-Za-z0-9_.-]+)*",
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
    problems = [*_bad_names(cluster), *_bad_values(cluster), *_bad_variables(cluster)]
    if problems:
        raise SftError("\n".join(f"env/{name}.toml: {p}" for p in problems) + f"\nnext: correct env/{name}.toml")


def _bad_names(cluster: schema.Cluster) -> Iterator[str]:
    for field, pattern in NAMES.items():
        value = getattr(cluster, field)
        for text in value if isinstance(value, tuple) else [value] * bool(value):
            if not re.fullmatch(pattern, paths.for_user(text)) or ".." in text:
                yield f"'{field}' = {text!r} is not of the form {pattern}"


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
    if runs and not in_bucket(cluster) and not any(runs == m or runs.startswith(m + "/") for m in mounted):
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


def in_bucket(cluster: schema.Cluster) -> bool:
    """Whether runs are stored in a bucket, because no disk outlives a job; see sft.launch.beaker.bucket_runs."""
    return cluster.runs.startswith("gs://")


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
    if where.startswith("gs://"):
        return where
    if stage != "prepare":
        return ""
    try:
        file = job.run / "sync" / manifest.NAME
        synced = SyncMetrics.of(manifest.load(file), str(file)).dataset
    except (FileNotFoundError, SftError):
        return ""
    storage = job.place.storage(job.cluster).rstrip("/")
    same = synced == f"{storage}/datasets/{made.digest[:16]}" and storage.startswith("gs://")
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
    elif in_bucket(job.cluster):
        variables |= {f"SFT_INPUT_{stage}": address for stage, address in addresses(job).items()}
        variables["SFT_STAGE_ADDRESS"] = stored_stage(job)
    for stage in job.earlier:
        if reference := reference_of(job, stage):
            variables[f"SFT_REFERENCE_{stage}"] = reference
    for stage, (dataset, _) in inputs_of(job).items():
        variables[f"SFT_INPUT_{stage}"] = f"{INPUTS}/{stage}"
        mounts[f"{INPUTS}/{stage}"] = f"{user}/{dataset}"
    install = job.cluster.install
    made = task(job, job.stage, variables, mounts)
    made.command = ["bash", "-c", SCRIPT.read_text(encoding="utf-8"), SCRIPT.name]
    made.arguments = [remote_run(job), job.stage, str(len(install)), *install, *remote_command(job)]
    return wrap(job, [made])


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


def wrap(job: Job, tasks: list[BeakerTaskSpec]) -> BeakerExperimentSpec:
    """The experiment of these tasks. Its description names what is made, so that a lost submission is recognised."""
    spec = BeakerExperimentSpec(
        budget=job.cluster.budget or None,
        tasks=tasks,
        description=f"olmo-sft {job.stage} of {job.run.name} {job.identity}",
    )
    return spec.with_retries(job.cluster.retries) if job.cluster.retries else spec


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
