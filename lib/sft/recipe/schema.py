"""Every option of a recipe and of a cluster file, once: its table, type, default, bounds and meaning.

`sft.recipe.recipe` checks a recipe's TOML against these dataclasses, and `make fields` prints them. An option declared with
`key=False` changes how or where a stage runs but not its result, so editing it makes nothing stale. Standard library only:
the planner reads this before the environment exists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from sft.recipe.options import REQUIRED, opt

ROLES = ("system", "developer", "user", "assistant", "tool", "environment", "function", "ipython")
COLUMNS = ("messages", "conversations", "prompt", "instruction", "completion", "input", "output", "tools", "system")
"""The roles of messages, and the names that columns of a row can have."""


@dataclass(frozen=True)
class Model:
    """[model]: the architecture, and the weights that training starts from."""

    preset: str = opt(
        "",
        "architecture of random weights, a name in sft.recipe.presets, e.g. olmo3-7b; the fields below override its numbers. With a base it is not needed, and must agree",
    )
    base: str = opt(
        "",
        "initial weights: a path under DATA, gs://… or hf://org/name[@revision]; its config.json is the architecture; empty = random",
    )
    base_tokenizer: str = opt(
        "same",
        "same: the base must have the data's tokenizer.json; unchecked: a base without tokenizer.json is a warning",
        choices=("same", "unchecked"),
        key=False,
    )
    n_layers: int | None = opt(None, "number of transformer blocks", min=1)
    d_model: int | None = opt(None, "width of the residual stream", min=1)
    n_heads: int | None = opt(None, "number of query heads", min=1)
    n_kv_heads: int | None = opt(None, "number of key/value heads (fewer than n_heads: grouped-query attention)", min=1)
    head_dim: int | None = opt(None, "width of one attention head", min=1)
    hidden: int | None = opt(None, "intermediate size of the MLP (SwiGLU)", min=1)
    vocab_size: int | None = opt(
        None, "embedding rows; default: the tokenizer's size padded to a multiple of 128", min=1
    )
    window: int | None = opt(
        None, "sliding attention window in tokens, including the token itself; 0 = full attention", min=0
    )
    rope_theta: float | None = opt(None, "base of the rotary embedding", above=0)
    yarn_factor: float | None = opt(None, "YaRN scaling factor of the full-attention layers; 0 = none", min=0)
    rope_scaling: dict[str, Any] | None = opt(
        None,
        'rotary scaling in transformers\' words, in place of the base\'s, e.g. {rope_type = "yarn", factor = 4.0, original_max_position_embeddings = 8192}; {rope_type = "default"} = none',
        late=True,
    )
    ignore_config: tuple[str, ...] = opt(
        (), "keys of the base's config.json that are known not to change what the model computes", late=True
    )
    init_std: float | None = opt(None, "standard deviation of random initial weights (truncated normal)", above=0)

    @property
    def names_scaling(self) -> bool:
        """Whether the recipe says itself how positions are scaled."""
        return self.rope_scaling is not None or self.yarn_factor is not None


@dataclass(frozen=True)
class Source:
    """[[prepare.sources]]: one dataset of the mix."""

    path: str = opt(
        REQUIRED,
        "a file of rows (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow) or a folder of them under DATA, gs://…, or"
        " hf://org/name[@revision]",
        selects=True,
    )
    weight: float | int = opt(
        1.0,
        "1.0 = every row once, 0.5 = half of the rows, 2.0 = every row twice; an integer = that many rows",
        above=0,
        selects=True,
    )
    split: str = opt("train", "split of the dataset, wherever it is stored; see docs/prepare.md", selects=True)
    subset: str = opt("", "configuration of a dataset whose README.md lists several", selects=True)
    ignore_files: tuple[str, ...] = opt(
        (), 'files of a folder that are left out, as patterns of their names: "notes.txt", "old/**"', selects=True
    )
    max_documents: int = opt(
        0, "largest number of documents from this source, after its weight; 0 = no limit", min=0, selects=True
    )
    max_tokens: int = opt(
        0, "largest number of tokens from this source, after its weight; 0 = no limit", min=0, selects=True
    )
    columns: dict[str, str] = opt(
        {}, 'renames columns, e.g. {prompt = "question", completion = "answer"}', choices=COLUMNS
    )
    ignore: tuple[str, ...] = opt(
        (), 'columns and message fields that are not read, e.g. ["rationale", "messages.annotation"]'
    )
    validation_group: str = opt(
        "",
        "column whose value keeps rows on one side of the validation split; empty = rows that begin with the same user message",
    )


@dataclass(frozen=True)
class Prepare:
    """[prepare]: chat data to token ids, label mask and document boundaries."""

    tokenizer: str = opt(REQUIRED, "tokenizer folder under DATA, or hf://org/name[@revision]")
    add_tokens: tuple[str, ...] = opt(
        (),
        'special tokens that the tokenizer gets in addition, e.g. ["<|tool|>"]; the embedding gets a row for each',
        late=True,
    )
    sources: tuple[Source, ...] = opt(
        REQUIRED, "the datasets of the mix, one [[prepare.sources]] table each", selects=True
    )
    template: str = opt(
        "tokenizer",
        "chat template: 'tokenizer' (the folder's own; tokenizer:NAME if it has several), a name (olmo, tulu, … in sft.recipe.chat_templates), or a .jinja, .jinja2 or .j2 file under DATA",
    )
    system: str = opt("", "system prompt for conversations that have none; empty = the template's own default")
    train_roles: tuple[str, ...] = opt(
        ("assistant",),
        "roles whose messages are trained; a message's own `train` or `weight` has priority",
        choices=ROLES,
    )
    train_turns: str = opt(
        "all", "train all such messages of a conversation, or only the last one", choices=("all", "last")
    )
    history: str = opt(
        "whole",
        "whole: a conversation is one document; as-rendered: each trained turn is a document of its own, whose history is what the template shows the model at inference",
        choices=("whole", "as-rendered"),
    )
    generation_prefix: str = opt(
        "prompt",
        "what only the generation prompt writes, such as <think>: untrained in the prompt, trained in the answer, or left as the template rendered it; for Jinja templates",
        choices=("prompt", "answer", "rendered"),
    )
    date: str = opt(
        "", "the day (YYYY-MM-DD) that a Jinja template writes where it asks for today's; empty = it asks for none"
    )
    template_variables: dict[str, str | int | float | bool] = opt(
        {}, 'variables of a Jinja template, e.g. { enable_thinking = false, reasoning_effort = "low" }'
    )
    thinking: str = opt(
        "keep",
        "keep or remove <think>…</think> in assistant turns before the last user turn",
        choices=("keep", "strip"),
    )
    special_text: str = opt(
        "text",
        "text of a special token inside content: stays plain text, becomes the token, or rejects the row",
        choices=("text", "token", "reject"),
    )
    empty_answers: str = opt(
        "train",
        "trained answers without text and without a call: train their end and count them, or reject the row",
        choices=("train", "reject"),
    )
    encoder: str = opt(
        "auto",
        "auto: gigatoken if it is installed and gives the same ids as tokenizers, otherwise tokenizers",
        choices=("auto", "gigatoken", "tokenizers"),
        key=False,
    )
    parity_sample: float = opt(
        0.001,
        "fraction of documents that tokenizers encodes as well, to compare with gigatoken",
        min=0,
        max=1,
        key=False,
    )
    seed: int = opt(42, "seed of the sampling and order of documents", min=0, selects=True)
    validation_fraction: float = opt(
        0.0,
        "fraction of conversations held out for validation, chosen by the hash of their group: see validation_group",
        min=0,
        max=0.5,
        selects=True,
    )
    deduplicate: bool = opt(
        False, "keep one of several conversations with the same tokens, over all sources", selects=True
    )
    near_duplicates: str = opt(
        "ignore",
        "conversations that nearly repeat an earlier one, over all sources: ignore, report how many, or drop them",
        choices=("ignore", "report", "drop"),
        selects=True,
    )
    near_duplicate_similarity: float = opt(
        0.8,
        "estimated share of equal 5-grams of words (Jaccard) that makes a near-duplicate",
        min=0.5,
        max=1,
        selects=True,
    )
    decontaminate: tuple[str, ...] = opt(
        (), "evaluation files under DATA; conversations that contain their texts are dropped", selects=True
    )
    decontaminate_ngram: int = opt(8, "words of an n-gram in the decontamination", min=2, selects=True)
    decontaminate_overlap: float = opt(
        0.5,
        "a conversation with this fraction of an evaluation text's n-grams contains the text",
        above=0,
        max=1,
        selects=True,
    )
    max_reject_fraction: float = opt(
        0.01, "the stage fails if a larger fraction of a source's rows is unusable", min=0, max=1, selects=True
    )


@dataclass(frozen=True)
class Sync:
    """[sync]: copies the dataset and the base weights to the cluster's storage."""


@dataclass(frozen=True)
class Train:
    """[train]: packing, optimization, checkpoints. The defaults are those of the ancestor's SFT script."""

    seq_len: int = opt(16384, "tokens of a pack", min=2)
    global_batch_tokens: int = opt(1_048_576, "tokens of one optimizer step, over all ranks and microbatches", min=2)
    epochs: float = opt(3.0, "passes over the data; ignored if steps is set", above=0)
    steps: int = opt(0, "optimizer steps; 0 = from epochs", min=0)
    long_documents: str = opt(
        "truncate", "treatment of a document longer than seq_len", choices=("truncate", "drop", "split")
    )
    method: str = opt(
        "full",
        "full = every weight is trained; lora = low-rank adapters on a frozen base (arXiv 2106.09685)",
        choices=("full", "lora"),
        late=True,
    )
    lora_rank: int = opt(32, "lora: rank of every adapter", min=1, late=True)
    lora_alpha: float = opt(32.0, "lora: an adapter is multiplied by lora_alpha / lora_rank", above=0, late=True)
    lora_rslora: bool = opt(
        False, "lora: divide lora_alpha by the square root of the rank (arXiv 2312.03732)", late=True
    )
    lora_dropout: float = opt(
        0.0,
        "lora: share of an adapter's inputs that are dropped in training; a function of the token",
        min=0,
        max=0.9,
        late=True,
    )
    lora_targets: tuple[str, ...] = opt(
        (),
        'lora: matrices that get an adapter, e.g. ["attention", "feed_forward.w2", "blocks.0-7"]; empty = all in the blocks',
        late=True,
    )
    base_dtype: str = opt(
        "compute",
        "lora: how the frozen matrices of the blocks are stored: compute = as `precision` says; int8, fp8 and nf4 (QLoRA, arXiv 2305.14314) need torchao",
        choices=("compute", "int8", "fp8", "nf4"),
        late=True,
    )
    freeze: tuple[str, ...] = opt(
        (), 'parameters that stay as they are, by parts of their names, e.g. ["embeddings", "blocks.0-7"]', late=True
    )
    train_only: tuple[str, ...] = opt(
        (), 'parameters that are trained while all others stay as they are, e.g. ["attention"]; empty = all', late=True
    )
    neftune_alpha: float = opt(
        0.0,
        "NEFTune: uniform noise on the embeddings, of this / sqrt(tokens of the document x d_model); 0 = none",
        min=0,
        late=True,
    )
    lr: float = opt(8e-5, "peak learning rate; with method = 'lora' the default is ten times as high", above=0)
    schedule: str = opt(
        "linear",
        "learning rate after warm-up; wsd stays at lr and decays at the end",
        choices=("linear", "cosine", "wsd", "constant"),
    )
    decay_fraction: float = opt(0.1, "wsd: fraction of the steps in the decay", above=0, max=1)
    decay_shape: str = opt(
        "linear", "wsd: shape of the decay; sqrt falls fast at first", choices=("linear", "cosine", "sqrt")
    )
    final_lr_fraction: float = opt(0.0, "learning rate at the end of the decay, as a fraction of lr", min=0, max=1)
    warmup_fraction: float = opt(0.03, "fraction of the steps in the warm-up from 0 to lr", min=0, max=1)
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's betas, below 1", min=0, max=0.999999)
    eps: float = opt(1e-8, "AdamW's epsilon", above=0)
    optimizer: str = opt(
        "adamw", "adamw8bit stores its moments in 8 bits (needs torchao)", choices=("adamw", "adamw8bit")
    )
    gradients: str = opt("fp32", "dtype of stored gradients; they are reduced in fp32", choices=("fp32", "bf16"))
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay", min=0)
    lr_factors: dict[str, float | int] = opt(
        {},
        'factors on the learning rate, by parts of parameters\' names, e.g. { embeddings = 0.1, "blocks.0-7" = 0.5 }; the last match counts',
        min=0,
        late=True,
    )
    weight_decays: dict[str, float | int] = opt(
        {},
        'weight decay of some parameters in place of weight_decay, e.g. { "*norm" = 0.0, bias = 0.0, embeddings = 0.0 }; the last match counts',
        min=0,
        late=True,
    )
    max_grad_norm: float = opt(1.0, "clip the global gradient norm to this; 0 = no clipping", min=0)
    z_loss: float = opt(
        0.0, "coefficient of the z-loss, the mean squared log-partition of trained tokens; 0 = none", min=0
    )
    skip_sigmas: float = opt(
        6.0,
        "skip a step whose loss or gradient norm is this many standard deviations above the last 128 steps; 0 = never",
        min=0,
    )
    max_skipped: int = opt(10, "training stops after this many skipped steps in a row", min=1, key=False)
    precision: str = opt(
        "bf16", "compute dtype; parameters, reductions and the loss stay fp32", choices=("bf16", "fp32")
    )
    deterministic: bool = opt(False, "bitwise reproducible on the same GPUs, but slower; a CPU always is", key=False)
    seed: int = opt(33333, "seed of random initial weights", min=0)
    data_seed: int = opt(34521, "seed of the order of packs", min=0)
    order: str = opt(
        "shuffled",
        "order of packs; olmo-core = the order of its loader, for comparisons",
        choices=("shuffled", "olmo-core"),
    )
    epoch_tail: str = opt(
        "next",
        "an epoch's incomplete last batch: next = filled from the next epoch, drop = dropped (always for order olmo-core)",
        choices=("next", "drop"),
    )
    save_every: int = opt(1000, "steps between permanent checkpoints; the last step is always saved", min=1, key=False)
    ephemeral_every: int = opt(
        500, "steps between ephemeral checkpoints, which the next checkpoint replaces; 0 = none", min=0, key=False
    )
    keep: int = opt(
        0,
        "number of newest permanent checkpoints to keep; 0 = all; those that LATEST and BEST name are always kept",
        min=0,
        key=False,
    )
    best_metric: str = opt(
        "validation_loss",
        "BEST names the saved step with the lowest validation loss; with [evaluate] every, the one with the best score",
        choices=("validation_loss", "none"),
        key=False,
    )
    async_save: bool = opt(
        True, "write checkpoints in the background, from a copy in host memory; false = training waits", key=False
    )
    validate_every: int = opt(
        100, "steps between evaluations of the validation loss; 0 = only at the end", min=0, key=False
    )
    validate_start: bool = opt(
        True, "measure the validation loss of the starting weights as well, before the first step", key=False
    )
    log_every: int = opt(1, "steps between records in metrics.jsonl and lines on the terminal", min=1, key=False)
    wandb_project: str = opt("", "Weights & Biases project; offline without an API key; empty = off", key=False)
    tensorboard: bool = opt(False, "write TensorBoard event files to train/tensorboard/", key=False)
    comet_project: str = opt("", "Comet project; offline without an API key; empty = off", key=False)


@dataclass(frozen=True)
class Convert:
    """[convert]: a checkpoint to a Hugging Face folder, proven equal."""

    dtype: str = opt("bfloat16", "dtype of the exported weights", choices=("bfloat16", "float16", "float32"))
    max_position_embeddings: int | None = opt(
        None, "longest input that the exported config states, in tokens; default: the base's, or 65536", min=1
    )
    vocabulary: str = opt(
        "base",
        "rows of the exported embedding: base = as many as the base's published table, if that has more than the tokenizer; tokenizer = one for each id",
        choices=("base", "tokenizer"),
        late=True,
    )
    shard_gb: float = opt(5.0, "largest safetensors file, in GB", above=0)
    eval_template: str = opt(
        "",
        "chat template of the export: a name (olmo_thinker starts replies with <think>) or a .jinja, .jinja2 or .j2 file under DATA; empty = the trained one; model = that of [convert] model",
    )
    gate: str = opt(
        "full",
        "proof before publishing: full = every layer and greedy replies, fast = a sample of four layers (for large models)",
        choices=("full", "fast"),
    )
    model: str = opt(
        "",
        "another model than this run's training, to export and score (make … MODEL=): runs/<run>[/train/step<N>], a step or Hugging Face folder under DATA or on a mount, gs://… or hf://org/name[@revision]; empty = train",
        late=True,
    )


PER_TASK = (
    "num_fewshot", "fewshot_as_multiturn", "system_prompt", "process_output", "max_reply_tokens", "temperature", "top_p",
    "samples", "max_thought_tokens", "min_stop_rate",
)  # fmt: skip
"""The fields of [evaluate] that [evaluate.by_task.<task>] can set for one task. `thinking` names its tasks itself."""


@dataclass(frozen=True)
class Evaluate:
    """[evaluate]: the tasks, and how they run."""

    tasks: tuple[str, ...] = opt(
        REQUIRED, "names of lm-eval tasks from task_dir or from lm-eval itself, or tasks and suites of another harness"
    )
    suite: str = opt(
        "",
        "a file recipes/suites/<name>.toml, whose fields this table has unless it sets them itself: quick, olmo3, tulu3-dev, safety, reasoning",
        key=False,
    )
    harness: str = opt(
        "lm-eval",
        "lm-eval, which this stage runs itself, or AI2's harnesses on Beaker: olmo-eval, or the older oe-eval",
        choices=("lm-eval", "olmo-eval", "oe-eval"),
    )
    location: str = opt(
        "",
        "AI2's harnesses: another model than the run's export: a path on a mount, gs://…, org/name, beaker://dataset",
    )
    model_name: str = opt("", "oe-eval: the model's name in its records; empty = the run's name", key=False)
    task_dir: str = opt("tasks", "folder of lm-eval task files under DATA or recipes/")
    limit: int = opt(0, "documents per task; 0 = all", min=0)
    data: dict[str, str] = opt(
        {},
        "data files of tasks, by the name that their data_files use: paths under DATA or hf://org/name[@revision]/file",
    )
    backend: str = opt(
        "auto",
        "hf = transformers; vllm = vLLM (needs the extra 'vllm'); server = a running server with OpenAI's API (vllm serve, SGLang, …), see base_url; auto = vllm where a GPU is planned and vLLM is installed, otherwise hf",
        choices=("auto", "hf", "vllm", "server"),
        hints={"sglang": "; SGLang: start its server, and write backend = 'server' with its base_url"},
    )
    base_url: str = opt(
        "", "server: the address of its completions, e.g. http://127.0.0.1:8000/v1/completions", key=False
    )
    served_model: str = opt(
        "",
        "server: the model's name there; empty = the one that has the export's folder as its name or root",
        key=False,
    )
    batch_size: int = opt(0, "sequences in a batch; 0 = as many as memory and time allow", min=0, key=False)
    seed: int = opt(1234, "seed of few-shot examples and sampling", min=0)
    system_prompt: str = opt("", "system message before every conversation; empty = the task's own description, if any")
    process_output: str = opt(
        "none", "r1_style removes everything up to </think> before scoring", choices=("none", "r1_style")
    )
    max_length: int = opt(0, "longest prompt plus reply in tokens; 0 = the export's max_position_embeddings", min=0)
    num_fewshot: int = opt(-1, "worked examples before each question; -1 = the task's own number", min=-1)
    fewshot_as_multiturn: bool = opt(True, "worked examples are turns of the conversation, not one message")
    max_reply_tokens: int = opt(0, "longest reply in tokens; 0 = the task's own limit, or 1024 if it names none", min=0)
    temperature: float = opt(-1.0, "sampling temperature; 0 = greedy; -1 = the task's own", min=-1)
    top_p: float = opt(
        0.0, "sample from the likeliest tokens with this sum of probabilities; 0 = the task's own", min=0, max=1
    )
    samples: int = opt(
        1,
        "replies to each question of a sampling task: scores are their means, with pass@k where a reply is right or wrong",
        min=1,
    )
    thinking: dict[str, bool] = opt(
        {},
        'whether the model thinks before it replies, by task, "*" = every other one, e.g. { "*" = false, aime24 = true }; empty = as the template does',
    )
    max_thought_tokens: int = opt(
        0, "longest thought in tokens, beside max_reply_tokens for the answer; 0 = one limit for both", min=0
    )
    by_task: dict[str, dict[str, Any]] = opt(
        {},
        "[evaluate.by_task.<task>]: values for one task or group of `tasks`, of the fields " + ", ".join(PER_TASK),
        late=True,
    )
    min_stop_rate: float = opt(
        0.95,
        "a task is broken if a smaller fraction of its replies stops by itself; the others are cut by length",
        min=0,
        max=1,
    )
    max_empty_fraction: float = opt(0.1, "a task is broken if a larger fraction of its replies is empty", min=0, max=1)
    validation_documents: int = opt(256, "number of held-out conversations whose loss is measured; 0 = none", min=0)
    plain_text: str = opt(
        "shipped",
        "texts that are no chat, whose perplexity shows what training made the model forget: shipped = 32 short ones of this project; or a JSONL file under DATA or recipes/ with `text` and perhaps `kind`; empty = none",
        late=True,
    )
    every: int = opt(
        0, "during training, evaluate the first kept step at or after each multiple of this; 0 = none", min=0, key=False
    )
    every_limit: int = opt(0, "documents per task in evaluations during training; 0 = limit", min=0, key=False)
    every_device: str = opt(
        "cpu", "device of evaluations during training: cpu, or cuda:N for a GPU of their own", key=False
    )
    best: str = opt(
        "",
        "score by which BEST is chosen during training: task/metric or validation/loss; empty = the first task's first metric",
        key=False,
    )

    def for_task(self, named: str, task: str = "") -> Evaluate:
        """The options of a task. `named` is the entry of `tasks` that it comes from; a group's `task` has another name."""
        thinking = self.thinking
        if named in thinking and task:
            thinking = {**thinking, task: thinking[named]}
        return replace(self, **{"thinking": thinking, **self.by_task.get(named, {})})


LORA_LR = 10 * Train.lr
"""The learning rate of method "lora" if the recipe sets none: about ten times that of full finetuning is the best one over
models and data sets ("LoRA Without Regret", Thinking Machines 2025, thinkingmachines.ai/blog/lora)."""
LORA_FIELDS = tuple(f.name for f in fields(Train) if f.name.startswith("lora_") or f.name == "base_dtype")

LAUNCHERS = ("local", "slurm", "beaker")
"""Each is a module sft.launch.<name> and a script env/<name>.sh; see sft.launch.launcher."""
JOBS, SLURM, BEAKER = LAUNCHERS[1:], ("slurm",), ("beaker",)


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
        0,
        "ranks that shard one copy of the weights (FSDP), replicated over the other ranks; 0 = all ranks",
        min=0,
        stages=("train",),
    )
    context_degree: int = opt(
        1,
        "ranks that divide the tokens of a microbatch (Ulysses), for packs too long for one GPU",
        min=1,
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
        launchers=JOBS,
    )
    gpu: str = opt(
        "",
        "GPU type that the doctor plans with, e.g. A100 80GB; empty = the cluster's, or what Beaker reports",
        launchers=JOBS,
        stages=("train",),
    )
    partition: str = opt("", "Slurm partition; empty = the cluster's", launchers=SLURM)
    priority: str = opt("", "Beaker priority; empty = the cluster's", launchers=BEAKER)


STAGES = ("prepare", "sync", "train", "convert", "evaluate")
UPSTREAM = {"prepare": (), "sync": ("prepare",), "train": ("sync",), "convert": ("train",), "evaluate": ("convert",)}


@dataclass(frozen=True)
class Cluster:
    """env/<cluster>.toml: a cluster where stages run."""

    storage: str = opt(
        REQUIRED,
        "root of the data that training reads: a folder or gs://…; {runs} = the folder of runs, {user} = the user's name",
    )
    launcher: str = opt(
        "local",
        "how a stage starts: on this machine, or as a job of a scheduler",
        choices=LAUNCHERS,
    )
    stages: tuple[str, ...] = opt(STAGES, "stages that run there; the others run on this machine", choices=STAGES)
    runs: str = opt("", "path of the folder of runs in jobs; empty = the same as here")
    shared_disk: bool = opt(True, "jobs see this machine's repository and folder of runs", launchers=JOBS)
    gpu: str = opt("", "GPU type, e.g. H100; empty = any")
    gpu_memory_gb: float = opt(0.0, "memory of one GPU in GB; 0 = unknown", min=0)
    gpu_tflops: float = opt(0.0, "dense bf16 peak of one GPU in TFLOP/s; 0 = unknown", min=0)
    gpus_per_node: int = opt(0, "GPUs of one machine; 0 = none, or those found if stages run on this machine", min=0)
    time: str = opt(
        "", "time limit of a job, in the scheduler's notation; empty = the scheduler's default", launchers=JOBS
    )
    partition: str = opt("", "Slurm partition; empty = Slurm's default", launchers=SLURM)
    account: str = opt("", "Slurm account; empty = the user's default", launchers=SLURM)
    qos: str = opt("", "Slurm quality of service; empty = the account's default", launchers=SLURM)
    sbatch: tuple[str, ...] = opt((), 'more sbatch options, e.g. ["--constraint=ib", "--exclusive"]', launchers=SLURM)
    notice_s: int = opt(
        120,
        "seconds before a Slurm job's time limit at which training saves and the job is requeued",
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
        "", "time for which a Beaker job cannot be preempted, e.g. 1h; empty = none", launchers=BEAKER
    )
    image: str = opt("", "Beaker image, user/name", launchers=BEAKER)
    install: tuple[str, ...] = opt(
        (), "shell lines that prepare the repository's environment in a new container", launchers=BEAKER
    )
    mounts: tuple[str, ...] = opt(
        (),
        "Weka buckets and their mount points in jobs, e.g. oe-training-default:/weka/oe-training-default",
        launchers=BEAKER,
    )
    env: dict[str, str] = opt({}, 'environment variables of jobs, e.g. {NCCL_SOCKET_IFNAME = "ib"}')
    data: str = opt("", "DATA in jobs: folders separated by ':'", launchers=BEAKER)
    code: str = opt(
        "git",
        "how a Beaker job gets the code: git = a pushed commit, dataset = an archive of HEAD",
        choices=("git", "dataset"),
        launchers=BEAKER,
    )
    retries: int = opt(0, "how often Beaker restarts a failed task", min=0, launchers=BEAKER)
    evaluate_image: str = opt(
        "", "Beaker image of AI2's evaluation harnesses, for [evaluate] harness", launchers=BEAKER
    )
    evaluate_install: tuple[str, ...] = opt((), "shell lines that install the harness in that image", launchers=BEAKER)
    evaluate_harness: str = opt(
        "olmo-eval",
        "the harness of evaluate_image and evaluate_install; the other one is refused",
        choices=("olmo-eval", "oe-eval"),
        launchers=BEAKER,
    )
    evaluate_secrets: dict[str, str] = opt({}, "secrets of the harnesses, in addition to `secrets`", launchers=BEAKER)
    optional_secrets: dict[str, str] = opt(
        {}, "like `secrets`, but those that the workspace does not have are omitted", launchers=BEAKER
    )
    secrets: dict[str, str] = opt(
        {},
        "secrets of the workspace by environment variable, e.g. {HF_TOKEN = \"HF_TOKEN\"}; '{user}' is the user's name",
        launchers=BEAKER,
    )


OWN = ("account", "partition", "qos", "time", "workspace", "budget", "priority", "preemptible", "clusters", "image")
"""Fields of a cluster that a user can set in env/mine/<cluster>.toml, or as SFT_ACCOUNT and so on in the environment."""

TABLES: dict[str, type] = {
    "model": Model,
    "prepare": Prepare,
    "sync": Sync,
    "train": Train,
    "convert": Convert,
    "evaluate": Evaluate,
}
