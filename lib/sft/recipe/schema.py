"""Every option of a recipe and of a cluster file, once: its table, type, default, bounds and meaning.

Standard library only, because the planner reads it before the environment exists. A recipe's TOML is checked against
these dataclasses by `sft.recipe.recipe`; `make fields` prints them. An option declared with `key=False` changes how or where
a stage runs but not what it makes, so that editing it restages nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REQUIRED: Any = object()
ROLES = ("system", "developer", "user", "assistant", "tool", "environment", "function", "ipython")
COLUMNS = ("messages", "conversations", "prompt", "instruction", "completion", "input", "output", "tools", "system")
"""Who speaks in a message, and what the columns of a row are called."""


def opt(
    default: Any,
    doc: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    key: bool = True,
    launchers: tuple[str, ...] = (),
) -> Any:
    """Declares a field. `min`/`max` are inclusive bounds, `above` an exclusive lower bound; `choices` of a table are its keys;
    `launchers`: those that read it (empty = all), under the others it is refused."""
    metadata = {
        "doc": doc,
        "min": min,
        "max": max,
        "above": above,
        "choices": choices,
        "key": key,
        "launchers": launchers,
    }
    if default is REQUIRED:
        return field(metadata={**metadata, "required": True}, default=None)
    if isinstance(default, dict):
        return field(metadata=metadata, default_factory=lambda: dict(default))
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    """[model]: the architecture and the weights training starts from."""

    preset: str = opt(REQUIRED, "named geometry from sft.recipe.presets, e.g. olmo3-7b; every field below overrides it")
    base: str = opt("", "weights to start from: a path under DATA, gs://… or hf://org/name[@revision]; empty = random")
    base_tokenizer: str = opt(
        "same",
        "same: the base's tokenizer.json must be the data's; unchecked: a base without one is told as a warning",
        choices=("same", "unchecked"),
        key=False,
    )
    n_layers: int | None = opt(None, "transformer blocks", min=1)
    d_model: int | None = opt(None, "width of the residual stream", min=1)
    n_heads: int | None = opt(None, "query heads", min=1)
    n_kv_heads: int | None = opt(None, "key/value heads (grouped-query attention when fewer than n_heads)", min=1)
    head_dim: int | None = opt(None, "width of one head", min=1)
    hidden: int | None = opt(None, "width of the SwiGLU", min=1)
    vocab_size: int | None = opt(
        None, "embedding rows; default: the tokenizer's size padded to a multiple of 128", min=1
    )
    window: int | None = opt(None, "sliding window in tokens, the token itself included; 0 = full attention", min=0)
    rope_theta: float | None = opt(None, "rotary base", above=0)
    yarn_factor: float | None = opt(None, "YaRN scaling of the full-attention layers; 0 = none", min=0)
    init_std: float | None = opt(
        None, "standard deviation of the truncated normal that random weights are drawn from", above=0
    )


@dataclass(frozen=True)
class Source:
    """[[prepare.sources]]: one dataset of the mix."""

    path: str = opt(
        REQUIRED, "a .jsonl, .json or .parquet file or a folder of them under DATA, gs://…, or hf://org/name[@revision]"
    )
    weight: float | int = opt(
        1.0, "1.0 = once; 0.5 samples half, 2.0 repeats twice; an integer is a number of rows", above=0
    )
    split: str = opt("train", "split of a Hugging Face dataset")
    subset: str = opt("", "configuration of a Hugging Face dataset that has several")
    max_documents: int = opt(0, "cap on what this source gives, after its weight; 0 = none", min=0)
    max_tokens: int = opt(0, "cap in tokens on what this source gives, after its weight; 0 = none", min=0)
    columns: dict[str, str] = opt(
        {}, 'renames columns, e.g. {prompt = "question", completion = "answer"}', choices=COLUMNS
    )


@dataclass(frozen=True)
class Prepare:
    """[prepare]: chat data to token ids, label mask and document boundaries."""

    tokenizer: str = opt(REQUIRED, "tokenizer folder under DATA, or hf://org/name[@revision]")
    sources: tuple[Source, ...] = opt(REQUIRED, "the mix, one [[prepare.sources]] table each")
    template: str = opt(
        "tokenizer",
        "chat template: 'tokenizer' (the folder's own), a name (olmo, tulu, … in sft.chat.named), or a .jinja file under DATA",
    )
    system: str = opt("", "system prompt for conversations that have none; empty = the template's own default")
    train_roles: tuple[str, ...] = opt(
        ("assistant",), "roles whose messages are trained; a message's own train or weight flag wins", choices=ROLES
    )
    train_turns: str = opt(
        "all", "all trained messages of a conversation, or the last of them only", choices=("all", "last")
    )
    thinking: str = opt(
        "keep", "<think>…</think> in assistant turns before the last user turn", choices=("keep", "strip")
    )
    special_text: str = opt(
        "text",
        "special-token text inside content: stays plain text, becomes the token, or rejects the row",
        choices=("text", "token", "reject"),
    )
    encoder: str = opt(
        "auto",
        "gigatoken where importable and equal to tokenizers, or tokenizers",
        choices=("auto", "gigatoken", "tokenizers"),
        key=False,
    )
    parity_sample: float = opt(
        0.001, "share of documents that tokenizers encodes too, to be equal to gigatoken's", min=0, max=1, key=False
    )
    seed: int = opt(42, "seed of sampling and of the order of documents", min=0)
    validation_fraction: float = opt(
        0.0, "share of conversations held out, chosen by the hash of their content", min=0, max=0.5
    )
    deduplicate: bool = opt(False, "keep one of the conversations whose tokens are the same, over all sources")
    decontaminate: tuple[str, ...] = opt(
        (), "evaluation files under DATA; conversations that repeat their texts are dropped"
    )
    decontaminate_ngram: int = opt(8, "words in an n-gram of the decontamination", min=2)
    decontaminate_overlap: float = opt(
        0.5, "share of an evaluation text's n-grams that makes a conversation a copy", above=0, max=1
    )
    max_reject_fraction: float = opt(
        0.01, "share of a source's rows that may be unusable before the stage fails", min=0, max=1
    )


@dataclass(frozen=True)
class Sync:
    """[sync]: puts the dataset and the base weights where the cluster reads."""


@dataclass(frozen=True)
class Train:
    """[train]: packing, optimisation, checkpoints. Defaults are the ancestor's SFT script's."""

    seq_len: int = opt(16384, "tokens in a pack", min=2)
    global_batch_tokens: int = opt(1_048_576, "tokens in one optimizer step, over all ranks and microbatches", min=2)
    epochs: float = opt(3.0, "passes over the data; ignored when steps is set", above=0)
    steps: int = opt(0, "optimizer steps; 0 = from epochs", min=0)
    long_documents: str = opt(
        "truncate", "what happens to a document longer than seq_len", choices=("truncate", "drop", "split")
    )
    lr: float = opt(8e-5, "peak learning rate", above=0)
    schedule: str = opt(
        "linear",
        "decay after warm-up; 'wsd' stays at lr and decays at the end",
        choices=("linear", "cosine", "wsd", "constant"),
    )
    decay_fraction: float = opt(0.1, "wsd: share of the steps that decay", above=0, max=1)
    decay_shape: str = opt(
        "linear", "wsd: shape of the decay; 'sqrt' falls fast at first", choices=("linear", "cosine", "sqrt")
    )
    final_lr_fraction: float = opt(0.0, "where the decay ends, as a share of lr", min=0, max=1)
    warmup_fraction: float = opt(0.03, "share of the steps that warm up from 0 to lr", min=0, max=1)
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's decay rates, below 1", min=0, max=0.999999)
    eps: float = opt(1e-8, "AdamW's epsilon", above=0)
    optimizer: str = opt(
        "adamw", "'adamw8bit' keeps its moments in 8 bits (needs torchao)", choices=("adamw", "adamw8bit")
    )
    gradients: str = opt(
        "fp32", "dtype in which gradients wait for the update; they are reduced in fp32", choices=("fp32", "bf16")
    )
    weight_decay: float = opt(0.0, "AdamW's decoupled decay", min=0)
    max_grad_norm: float = opt(1.0, "clip the global gradient norm to this; 0 = do not clip", min=0)
    z_loss: float = opt(0.0, "weight of the squared log-partition of every trained token; 0 = none", min=0)
    skip_sigmas: float = opt(
        6.0, "skip a step whose loss or gradient norm is this many deviations above the last 128; 0 = never", min=0
    )
    max_skipped: int = opt(
        10, "steps skipped in a row, as spikes or not finite, before training stops", min=1, key=False
    )
    precision: str = opt(
        "bf16", "compute dtype; parameters, reductions and the loss stay fp32", choices=("bf16", "fp32")
    )
    deterministic: bool = opt(
        False, "the same bytes again on the same GPUs, at a loss of speed; a CPU gives them anyway", key=False
    )
    seed: int = opt(33333, "seed of random weights", min=0)
    data_seed: int = opt(34521, "seed of the order of packs", min=0)
    order: str = opt(
        "shuffled", "order of packs; 'olmo-core' is its loader's, for comparisons", choices=("shuffled", "olmo-core")
    )
    epoch_tail: str = opt(
        "next",
        "an epoch's incomplete last batch: filled up from the next epoch, or dropped (as olmo-core's order always does)",
        choices=("next", "drop"),
    )
    save_every: int = opt(1000, "steps between permanent checkpoints; the last step is always saved", min=1, key=False)
    ephemeral_every: int = opt(500, "steps between checkpoints that the next one replaces; 0 = none", min=0, key=False)
    keep: int = opt(
        0, "permanent checkpoints kept, the newest; 0 = all; never removed: what LATEST or BEST names", min=0, key=False
    )
    best_metric: str = opt(
        "validation_loss",
        "what BEST follows: the lowest validation loss of a saved step, unless [evaluate] every lets a score name it",
        choices=("validation_loss", "none"),
        key=False,
    )
    async_save: bool = opt(
        True, "write checkpoints beside training, from a copy in host memory; false = training waits", key=False
    )
    validate_every: int = opt(
        100, "steps between passes over the validation split; 0 = at the end only", min=0, key=False
    )
    log_every: int = opt(1, "steps between lines in metrics.jsonl and on the terminal", min=1, key=False)
    wandb_project: str = opt("", "Weights & Biases project; offline without a key; empty = off", key=False)
    tensorboard: bool = opt(False, "TensorBoard event files in train/tensorboard/", key=False)
    comet_project: str = opt("", "Comet project; offline without a key; empty = off", key=False)


@dataclass(frozen=True)
class Convert:
    """[convert]: a checkpoint to a Hugging Face folder, proven equal."""

    dtype: str = opt("bfloat16", "dtype of the exported weights", choices=("bfloat16", "float16", "float32"))
    max_position_embeddings: int = opt(65536, "longest input that the exported config declares, in tokens", min=1)
    shard_gb: float = opt(5.0, "largest safetensors file, in GB", above=0)
    eval_template: str = opt(
        "",
        "chat template that the export carries: a name (olmo_thinker starts replies with <think>) or a .jinja file under DATA; empty = the trained one",
    )
    gate: str = opt(
        "full",
        "proof before publishing: 'full' runs every layer and greedy chats, 'fast' a sample of four layers (for large models)",
        choices=("full", "fast"),
    )


@dataclass(frozen=True)
class Evaluate:
    """[evaluate]: tasks and how they are run."""

    tasks: tuple[str, ...] = opt(
        REQUIRED, "names of lm-eval tasks from task_dir or from lm-eval itself, or tasks and suites of another harness"
    )
    harness: str = opt(
        "lm-eval",
        "lm-eval as this stage's own command, or AI2's on Beaker: olmo-eval, or the older oe-eval",
        choices=("lm-eval", "olmo-eval", "oe-eval"),
    )
    location: str = opt(
        "",
        "AI2's harnesses: the model instead of the run's export: a path on a mount, gs://…, org/name, beaker://dataset",
    )
    model_name: str = opt("", "oe-eval: the model's name in its records; empty = the run's name", key=False)
    task_dir: str = opt("tasks", "folder of lm-eval task files under DATA or recipes/")
    limit: int = opt(0, "documents per task; 0 = all", min=0)
    data: dict[str, str] = opt(
        {},
        "data files for tasks that ship none, by the name that their data_files use: paths under DATA or hf://org/name[@revision]/file",
    )
    backend: str = opt(
        "hf", "what runs the model: transformers, or vLLM (GPU; the extra 'vllm')", choices=("hf", "vllm")
    )
    batch_size: int = opt(0, "sequences at once; 0 = as many as memory and time allow", min=0, key=False)
    seed: int = opt(1234, "seed of few-shot choice and sampling", min=0)
    system_prompt: str = opt("", "system message before every conversation; empty = the task's own description, if any")
    process_output: str = opt(
        "none", "'r1_style' removes everything up to </think> before scoring", choices=("none", "r1_style")
    )
    max_length: int = opt(0, "longest prompt plus reply in tokens; 0 = the export's max_position_embeddings", min=0)
    min_stop_rate: float = opt(0.5, "a task is broken when a smaller share of its replies ends by itself", min=0, max=1)
    max_empty_fraction: float = opt(0.1, "a task is broken when a larger share of its replies is empty", min=0, max=1)
    validation_documents: int = opt(
        256, "held-out conversations whose loss is measured, the first ones; 0 = none", min=0
    )
    every: int = opt(
        0, "during training, evaluate the first kept step at or after every so many; 0 = none", min=0, key=False
    )
    every_limit: int = opt(0, "documents per task of these evaluations; 0 = limit", min=0, key=False)
    every_device: str = opt("cpu", "device of these evaluations: cpu, or cuda:N for a GPU of its own", key=False)
    best: str = opt(
        "",
        "score of these evaluations that BEST follows: 'task/metric' or 'validation/loss'; empty = the first task's first metric",
        key=False,
    )


LAUNCHERS = ("local", "slurm", "beaker")
"""Each is a module sft.launch.<name> and a script env/<name>.sh; see sft.launch.launcher."""
JOBS, SLURM, BEAKER = LAUNCHERS[1:], ("slurm",), ("beaker",)


@dataclass(frozen=True)
class Hardware:
    """[on.<cluster>.<stage>]: numbers that differ between clusters and never change a result's key."""

    nodes: int = opt(1, "machines", min=1)
    processes: int = opt(0, "processes per machine; 0 = one per GPU, or 1 without a GPU", min=0)
    microbatch_tokens: int = opt(0, "tokens in one forward pass of one rank or context group; 0 = seq_len", min=0)
    threads: int = opt(0, "CPU threads or workers per process; 0 = the machine's cores shared out", min=0)
    cache_gb: int = opt(
        0,
        "GB of encoded chunks that prepare keeps for other runs; those not needed for longest go; 0 = all stay",
        min=0,
    )
    shard_degree: int = opt(
        0, "ranks that share one copy of the weights, which the others replicate; 0 = all of them", min=0
    )
    context_degree: int = opt(
        1, "ranks that share the tokens of one microbatch (Ulysses): for packs too long for one GPU", min=1
    )
    recompute: str = opt(
        "auto",
        "activations made anew in the backward pass; 'selected' keeps attention's, 'budget' keeps all of some layers, 'auto' takes what fits",
        choices=("none", "selected", "budget", "full", "auto"),
    )
    recompute_budget: float = opt(
        0.5,
        "share of the layers that keep all activations when recompute is 'budget'; the others keep attention's",
        min=0,
        max=1,
    )
    compile: str = opt(
        "auto",
        "torch.compile for every block; 'auto' on CUDA in bf16, where there is a C compiler",
        choices=("auto", "always", "never"),
    )
    gpus: int = opt(
        -1,
        "GPUs a job asks for on each machine; -1 = all for train, one for evaluate, else none",
        min=-1,
        launchers=JOBS,
    )
    cpus: int = opt(0, "CPU cores a job asks for on each machine; 0 = what the scheduler gives", min=0, launchers=JOBS)
    memory_gb: int = opt(
        0, "host memory a job asks for on each machine, in GB; 0 = what the scheduler gives", min=0, launchers=JOBS
    )
    time: str = opt(
        "",
        "longest duration of a job, as the scheduler writes it, e.g. 24:00:00; empty = the cluster's",
        launchers=JOBS,
    )
    gpu: str = opt(
        "",
        "type of the GPUs that the doctor plans with, e.g. A100 80GB; empty = the cluster's, or what Beaker tells",
        launchers=JOBS,
    )
    partition: str = opt("", "Slurm partition; empty = the cluster's", launchers=SLURM)
    priority: str = opt("", "Beaker priority; empty = the cluster's", launchers=BEAKER)


STAGES = ("prepare", "sync", "train", "convert", "evaluate")
UPSTREAM = {"prepare": (), "sync": ("prepare",), "train": ("sync",), "convert": ("train",), "evaluate": ("convert",)}


@dataclass(frozen=True)
class Cluster:
    """env/<cluster>.toml: facts about a place where stages run."""

    storage: str = opt(
        REQUIRED,
        "root that training reads from: a folder or gs://…; '{runs}' is the folder of runs, '{user}' the user's name",
    )
    launcher: str = opt(
        "local",
        "what starts a stage there: this machine, or a job of a scheduler",
        choices=LAUNCHERS,
    )
    stages: tuple[str, ...] = opt(STAGES, "stages that run there; the others run on this machine", choices=STAGES)
    runs: str = opt("", "folder of runs as jobs see it; empty = the same path as here")
    shared_disk: bool = opt(True, "jobs see this machine's repository and folder of runs", launchers=JOBS)
    gpu: str = opt("", "type of the GPUs, e.g. H100; empty = whatever the scheduler has")
    gpu_memory_gb: float = opt(0.0, "memory of one GPU in GB; 0 = unknown", min=0)
    gpu_tflops: float = opt(0.0, "dense bf16 peak of one GPU in TFLOP/s; 0 = unknown", min=0)
    gpus_per_node: int = opt(0, "GPUs of one machine; 0 = none, or those found when stages run on this machine", min=0)
    time: str = opt(
        "", "longest duration of a job, as the scheduler writes it; empty = the scheduler's default", launchers=JOBS
    )
    partition: str = opt("", "Slurm partition; empty = Slurm's default", launchers=SLURM)
    account: str = opt("", "Slurm account; empty = the user's default", launchers=SLURM)
    qos: str = opt("", "Slurm quality of service; empty = the account's default", launchers=SLURM)
    sbatch: tuple[str, ...] = opt(
        (), 'more options of sbatch, e.g. ["--constraint=ib", "--exclusive"]', launchers=SLURM
    )
    notice_s: int = opt(
        120,
        "seconds before a Slurm job's time is up at which training saves and asks for a new turn",
        min=1,
        launchers=SLURM,
    )
    clusters: tuple[str, ...] = opt((), 'Beaker clusters a job may run on, e.g. ["ai2/jupiter"]', launchers=BEAKER)
    workspace: str = opt("", "Beaker workspace, org/name; empty = the user's default", launchers=BEAKER)
    budget: str = opt("", "Beaker budget, org/name", launchers=BEAKER)
    priority: str = opt(
        "normal", "Beaker priority", choices=("low", "normal", "high", "urgent", "immediate"), launchers=BEAKER
    )
    preemptible: bool = opt(True, "a Beaker job may be preempted; it saves and resumes", launchers=BEAKER)
    min_runtime: str = opt(
        "", "time a Beaker job runs before it may be preempted, e.g. 1h; empty = none", launchers=BEAKER
    )
    image: str = opt("", "Beaker image, user/name", launchers=BEAKER)
    install: tuple[str, ...] = opt(
        (), "commands that prepare the repository's environment in a fresh container", launchers=BEAKER
    )
    mounts: tuple[str, ...] = opt(
        (), "Weka buckets and where jobs see them, e.g. oe-training-default:/weka/oe-training-default", launchers=BEAKER
    )
    env: dict[str, str] = opt({}, 'environment variables of jobs, e.g. {NCCL_SOCKET_IFNAME = "ib"}')
    data: str = opt("", "DATA as jobs see it, folders separated by ':'", launchers=BEAKER)
    code: str = opt(
        "git",
        "how a Beaker job gets the code: a pushed commit, or an archive of HEAD",
        choices=("git", "dataset"),
        launchers=BEAKER,
    )
    retries: int = opt(0, "times Beaker starts a failed task again by itself", min=0, launchers=BEAKER)
    evaluate_image: str = opt(
        "", "Beaker image of AI2's evaluation harnesses, for [evaluate] harness", launchers=BEAKER
    )
    evaluate_install: tuple[str, ...] = opt((), "shell lines that bring the harness into that image", launchers=BEAKER)
    evaluate_harness: str = opt(
        "olmo-eval",
        "the harness that these two bring; the other is refused",
        choices=("olmo-eval", "oe-eval"),
        launchers=BEAKER,
    )
    evaluate_secrets: dict[str, str] = opt({}, "secrets of harnesses, besides `secrets`", launchers=BEAKER)
    optional_secrets: dict[str, str] = opt(
        {}, "like `secrets`, but those that the workspace lacks are left out", launchers=BEAKER
    )
    secrets: dict[str, str] = opt(
        {},
        "secrets of the workspace by environment variable, e.g. {HF_TOKEN = \"HF_TOKEN\"}; '{user}' is the user's name",
        launchers=BEAKER,
    )


TABLES: dict[str, type] = {
    "model": Model,
    "prepare": Prepare,
    "sync": Sync,
    "train": Train,
    "convert": Convert,
    "evaluate": Evaluate,
}
