"""The options of a cluster file and of [on.<cluster>.<stage>], and the names of launchers and stages: part of `sft.recipe.schema`.

Import them from there. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.recipe.options import REQUIRED, opt

LAUNCHERS = ("local", "slurm", "beaker", "sky")
"""Each is a module sft.launch.<name> and a script env/<name>.sh; see sft.launch.launcher."""
JOBS, SLURM, BEAKER, SKY = LAUNCHERS[1:], ("slurm",), ("beaker",), ("sky",)
TIMED = tuple(name for name in JOBS if name not in SKY)
"""Launchers whose scheduler limits the time of a job."""


@dataclass(frozen=True)
class Hardware:
    """[on.<cluster>.<stage>]: numbers that depend on the cluster and never change a result's key."""

    nodes: int = opt(1, "number of machines", min=1, stages=("train",))
    processes: int = opt(
        0, "processes per machine; 0 = one per GPU, or 1 without a GPU", min=0, stages=("train", "evaluate")
    )
    tensor_parallel: int = opt(1, "vllm: GPUs that hold one copy of the model", min=1, stages=("evaluate",))
    microbatch_tokens: int = opt(
        0, "tokens in a forward pass of one rank or context group; 0 = seq_len", min=0, stages=("train",)
    )
    threads: int = opt(
        0,
        "CPU threads or workers per process; 0 = the machine's cores divided among the processes",
        min=0,
        stages=("prepare", "train", "evaluate"),
    )
    cache_gb: int = opt(
        0,
        "limit of prepare's cache of encoded chunks in GB; the least recently used are deleted; 0 = no limit",
        min=0,
        stages=("prepare",),
    )
    shard_degree: int = opt(
        -1,
        "ranks that shard one copy of the weights (FSDP), replicated over the other ranks; 0 = all ranks; -1 = those of a node from two"
        " nodes on, where that needs no more recomputation, else all ranks",
        min=-1,
        stages=("train",),
    )
    prefetch_layers: int = opt(
        1,
        "layers whose weights are gathered ahead of the one that computes, forward and backward; more hide slow links and take memory",
        min=1,
        stages=("train",),
    )
    context_degree: int = opt(
        1,
        "ranks that divide the tokens of a microbatch (Ulysses), for packs too long for one GPU",
        min=1,
        stages=("train",),
    )
    keep_gathered: str = opt(
        "auto",
        "what a rank keeps over the microbatches of a step: none, a layer is gathered for each pass; weights, gathered once a step; gradients,"
        " also reduced once a step, which changes their rounding; auto = weights where they fit without more recomputation",
        choices=("auto", "none", "weights", "gradients"),
        stages=("train",),
    )
    recompute: str = opt(
        "auto",
        "activations recomputed in the backward pass; selected = all but attention's, budget = that in some layers, auto = the least that fits",
        choices=("none", "selected", "budget", "full", "auto"),
        stages=("train",),
    )
    recompute_budget: float = opt(
        0.5,
        "budget: fraction of the layers that keep all activations; the others keep attention's",
        min=0,
        max=1,
        stages=("train",),
    )
    compile: str = opt(
        "auto",
        "torch.compile for every block; auto = on CUDA in bf16, if there is a C compiler",
        choices=("auto", "always", "never"),
        stages=("train",),
    )
    hang_s: int = opt(
        0,
        "seconds without a finished step after which a training counts as hung and is run again; 0 = learnt from the run:"
        " 10 times its longest step, 600 at least",
        min=0,
        stages=("train",),
    )
    preflight: str = opt(
        "auto",
        "before a training, products, memory and links of all ranks are compared for some seconds; auto = with GPUs",
        choices=("auto", "always", "never"),
        stages=("train",),
    )
    gpus: int = opt(
        -1,
        "GPUs that a job requests on each machine; -1 = all for train, one for evaluate, otherwise none",
        min=-1,
        launchers=JOBS,
    )
    cpus: int = opt(
        0, "CPU cores that a job requests on each machine; 0 = the scheduler's default", min=0, launchers=JOBS
    )
    memory_gb: int = opt(
        0, "host memory that a job requests on each machine, in GB; 0 = the scheduler's default", min=0, launchers=JOBS
    )
    time: str = opt(
        "",
        "time limit of a job, in the scheduler's notation, e.g. 24:00:00; empty = the cluster's",
        launchers=TIMED,
    )
    gpu: str = opt(
        "",
        "GPU type that the doctor plans with, e.g. A100 80GB; empty = the cluster's, or what Beaker reports",
        launchers=JOBS,
        stages=("train",),
    )
    max_restarts: int = opt(
        2,
        "times that a training starts again from its last step after a process of it was killed, without a new step between",
        min=0,
        stages=("train",),
    )
    partition: str = opt("", "Slurm partition; empty = the cluster's", launchers=SLURM)
    account: str = opt("", "Slurm account; empty = the cluster's", launchers=SLURM)
    qos: str = opt("", "Slurm quality of service; empty = the cluster's", launchers=SLURM)
    constraint: str = opt("", "features that the nodes must have; empty = the cluster's", launchers=SLURM)
    gres: str = opt("", "form of the request for GPUs; empty = the cluster's", launchers=SLURM)
    sbatch: tuple[str, ...] = opt(
        (), "sbatch options in addition to the cluster's, which they override", launchers=SLURM
    )
    priority: str = opt("", "Beaker priority; empty = the cluster's", launchers=BEAKER)


STAGES = ("prepare", "sync", "train", "convert", "evaluate")
UPSTREAM = {"prepare": (), "sync": ("prepare",), "train": ("sync",), "convert": ("train",), "evaluate": ("convert",)}


@dataclass(frozen=True)
class Cluster:
    """env/<cluster>.toml: a cluster where stages run."""

    storage: str = opt(
        REQUIRED,
        "root of the data that training reads: a folder, gs://… or s3://…; {runs} = the folder of runs, {user} = the user's name",
    )
    storage_wait_s: int = opt(
        0,
        "seconds that a stage waits for a bucket that is away, after the first 5 minutes; 0 = the stage then fails",
        min=0,
    )
    launcher: str = opt(
        "local",
        "how a stage starts: on this machine, or as a job of a scheduler",
        choices=LAUNCHERS,
    )
    stages: tuple[str, ...] = opt(STAGES, "stages that run there; the others run on this machine", choices=STAGES)
    on: dict[str, dict[str, Any]] = opt(
        {},
        "[on.<stage>]: numbers of one stage, of the fields of a recipe's [on.<cluster>.<stage>], which come first",
        choices=STAGES,
    )
    runs: str = opt("", "path of the folder of runs in jobs; empty = the same as here")
    shared_disk: bool = opt(True, "jobs see this machine's repository and folder of runs", launchers=JOBS)
    gpu: str = opt("", "GPU type, e.g. H100; empty = any")
    gpu_memory_gb: float = opt(0.0, "memory of one GPU in GB; 0 = unknown", min=0)
    gpu_tflops: float = opt(0.0, "dense bf16 peak of one GPU in TFLOP/s; 0 = unknown", min=0)
    gpus_per_node: int = opt(0, "GPUs of one machine; 0 = none, or those found if stages run on this machine", min=0)
    time: str = opt(
        "", "time limit of a job, in the scheduler's notation; empty = the scheduler's default", launchers=TIMED
    )
    partition: str = opt("", "Slurm partition; empty = Slurm's default", launchers=SLURM)
    account: str = opt("", "Slurm account; empty = the user's default", launchers=SLURM)
    qos: str = opt("", "Slurm quality of service; empty = the account's default", launchers=SLURM)
    constraint: str = opt(
        "", "features that the nodes must have, in Slurm's notation, e.g. gpu&hbm80g", launchers=SLURM
    )
    gres: str = opt(
        "",
        "form of the request for GPUs, e.g. gpu:a100 for --gres=gpu:a100:4; empty = --gpus-per-node",
        launchers=SLURM,
    )
    cores_per_node: int = opt(
        0,
        "CPU cores of a node with GPUs that jobs may use; a job with some of the GPUs gets its share",
        min=0,
        launchers=SLURM,
    )
    memory_gb_per_node: int = opt(
        0,
        "host memory of a node with GPUs that jobs may use, in GB; 0 = Slurm's default for the cores",
        min=0,
        launchers=SLURM,
    )
    sbatch: tuple[str, ...] = opt((), 'more sbatch options, e.g. ["--mail-type=END", "--exclusive"]', launchers=SLURM)
    srun: tuple[str, ...] = opt(
        (), 'more srun options, e.g. ["--container-image=image.sqsh"] for pyxis', launchers=SLURM
    )
    prologue: tuple[str, ...] = opt(
        (),
        'shell lines of a job before everything else, e.g. ["module load rocm"]; one that fails ends the job',
        launchers=SLURM,
    )
    wrap: tuple[str, ...] = opt(
        (),
        'words before the command on each node, e.g. ["apptainer", "exec", "--nv", "$HOME/image.sif"]; $NAME is expanded in the job',
        launchers=SLURM,
    )
    scratch: str = opt(
        "",
        "folder on each node's own disk, for copies of the environment and the dataset, e.g. /tmp or $TMPDIR; empty = none",
        launchers=SLURM,
    )
    notice_s: int = opt(
        120,
        "seconds before a Slurm job's time limit at which training saves and the job is requeued",
        min=1,
        launchers=SLURM,
    )
    clusters: tuple[str, ...] = opt((), 'Beaker clusters a job may run on, e.g. ["ai2/jupiter"]', launchers=BEAKER)
    workspace: str = opt("", "Beaker workspace, org/name; a job needs one", launchers=BEAKER)
    budget: str = opt("", "Beaker budget, org/name; empty = the workspace's", launchers=BEAKER)
    priority: str = opt(
        "normal", "Beaker priority", choices=("low", "normal", "high", "urgent", "immediate"), launchers=BEAKER
    )
    preemptible: bool = opt(True, "a Beaker job may be preempted; it saves and resumes", launchers=BEAKER)
    min_runtime: str = opt(
        "", "time for which a Beaker job cannot be preempted, e.g. 1h; empty = none", launchers=BEAKER
    )
    image: str = opt(
        "",
        "image of jobs: on Beaker user/name, for SkyPilot its image_id, e.g. docker:ubuntu:24.04",
        launchers=BEAKER + SKY,
    )
    install: tuple[str, ...] = opt(
        (),
        "shell lines that prepare the repository's environment in a new container or machine",
        launchers=BEAKER + SKY,
    )
    mounts: tuple[str, ...] = opt(
        (),
        "Weka buckets and their mount points in jobs, e.g. oe-training-default:/weka/oe-training-default",
        launchers=BEAKER,
    )
    tcpxo: str = opt(
        "",
        "folder of Google's GPUDirect-TCPXO on each node: jobs with GPUs set NCCL up with it and use the host's network, and the"
        " ranks of several nodes follow the topology; empty = none",
        launchers=BEAKER,
    )
    google_zone: str = opt(
        "",
        "project/zone of the nodes on Google Cloud: a job of several nodes gets hosts of one block; empty = Beaker chooses",
        launchers=BEAKER,
    )
    infra: tuple[str, ...] = opt(
        (),
        'where SkyPilot may run a job, in its notation: ["k8s/my-context"], ["ssh/my-pool"], ["runpod", "aws/us-east-1"]; the'
        " cheapest with room is taken; empty = wherever it may",
        launchers=SKY,
    )
    use_spot: bool = opt(False, "SkyPilot rents spot machines; a preempted training goes on on others", launchers=SKY)
    disk_gb: int = opt(0, "disk of each machine that SkyPilot rents, in GB; 0 = its default", min=0, launchers=SKY)
    volumes: tuple[str, ...] = opt(
        (), "SkyPilot's volumes and their mount points in jobs, e.g. my-volume:/mnt/data", launchers=SKY
    )
    queue: str = opt("", "Kueue's local queue, for jobs of SkyPilot on Kubernetes; empty = none", launchers=SKY)
    sky: tuple[str, ...] = opt((), 'more options of sky jobs launch, e.g. ["--network-tier=best"]', launchers=SKY)
    torch: str = opt(
        "",
        "build of torch that set-up installs for this cluster, e.g. 2.13.0+cu129; image = the one that"
        " its image or module has; empty = PyPI's where make runs on a GPU, otherwise one for the CPU",
    )
    python: str = opt("", "Python that set-up makes the environment from, e.g. python3.12; empty = PYTHON of make")
    internet: bool = opt(
        True, "jobs reach the internet; false = what one would fetch is refused before it is submitted", launchers=SLURM
    )
    on_event: str = opt(
        "",
        "command or webhook address to call when a job starts, ends, fails or is requeued; empty = none",
        launchers=SLURM,
    )
    env: dict[str, str] = opt({}, 'environment variables of jobs, e.g. {NCCL_SOCKET_IFNAME = "ib"}')
    data: str = opt("", "DATA in jobs: folders separated by ':'", launchers=BEAKER + SKY)
    code: str = opt(
        "git",
        "how a job gets the code: git = a pushed commit, dataset = an archive of HEAD",
        choices=("git", "dataset"),
        launchers=BEAKER + SKY,
    )
    retries: int = opt(0, "how often a failed job is started again", min=0, launchers=BEAKER + SKY)
    evaluate_image: str = opt(
        "", "Beaker image of AI2's evaluation harnesses, for [evaluate] harness", launchers=BEAKER
    )
    evaluate_install: tuple[str, ...] = opt((), "shell lines that install the harness in that image", launchers=BEAKER)
    evaluate_retries: int = opt(
        2, "how often Beaker restarts a failed task of an evaluation harness", min=0, launchers=BEAKER
    )
    evaluate_harness: str = opt(
        "olmo-eval",
        "the harness of evaluate_image and evaluate_install; the other one is refused",
        choices=("olmo-eval", "oe-eval"),
        launchers=BEAKER,
    )
    evaluate_secrets: dict[str, str] = opt({}, "secrets of the harnesses, in addition to `secrets`", launchers=BEAKER)
    optional_secrets: dict[str, str] = opt(
        {}, "like `secrets`, but those that are missing are omitted", launchers=BEAKER + SKY
    )
    secrets: dict[str, str] = opt(
        {},
        "secrets of jobs by environment variable, e.g. {HF_TOKEN = \"HF_TOKEN\"}: on Beaker the workspace's, '{user}' being the"
        " user's name; for SkyPilot a variable of the shell that runs make",
        launchers=BEAKER + SKY,
    )


OWN = (
    "account",
    "partition",
    "qos",
    "constraint",
    "time",
    "workspace",
    "budget",
    "priority",
    "preemptible",
    "clusters",
    "image",
    "on_event",
)
"""Fields of a cluster that a user can set in env/mine/<cluster>.toml, or as SFT_ACCOUNT and so on in the environment."""
