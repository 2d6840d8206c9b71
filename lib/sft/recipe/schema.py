"""Every option of a recipe and of a cluster file, once: its table, type, default, bounds and meaning.

The options of [train] are declared in `train_schema.py`, those of clusters and hardware in `cluster_schema.py`. Import all of them
from here. `sft.recipe.recipe` checks a recipe's TOML against these dataclasses, and `make fields` prints them. An option declared
with `key=False` changes how or where a stage runs but not its result, so editing it makes nothing stale. Standard library only:
the planner reads this before the environment exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sft.recipe.cluster_schema import BEAKER, JOBS, LAUNCHERS, OWN, SKY, SLURM, STAGES, UPSTREAM, Cluster, Hardware
from sft.recipe.options import REQUIRED, opt
from sft.recipe.train_schema import LORA_FIELDS, LORA_LR, STATE_FIELDS, Train

__all__ = [
    "BEAKER",
    "COLUMNS",
    "JOBS",
    "LAUNCHERS",
    "LORA_FIELDS",
    "LORA_LR",
    "OWN",
    "PER_TASK",
    "ROLES",
    "SKY",
    "SLURM",
    "STAGES",
    "STATE_FIELDS",
    "TABLES",
    "UPSTREAM",
    "Cluster",
    "Convert",
    "Evaluate",
    "Hardware",
    "Model",
    "Prepare",
    "Source",
    "Sync",
    "Train",
]

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
        "initial weights: a path under DATA, gs://…, s3://… or hf://org/name[@revision]; its config.json is the architecture; empty = random",
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
        'rotary scaling in transformers\' words, instead of the base\'s, e.g. {rope_type = "yarn", factor = 4.0, original_max_position_embeddings = 8192}; {rope_type = "default"} = none',
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
        "a file of rows (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow) or a folder of them under DATA, gs://…, s3://…, or"
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
    loss_weight: float = opt(
        1.0,
        "training multiplies the loss of this source's trained tokens by it; see docs/loss.md",
        above=0,
        selects=True,
        stage="train",
    )
    columns: dict[str, str] = opt(
        {}, 'renames columns, e.g. {prompt = "question", completion = "answer"}', choices=COLUMNS
    )
    ignore: tuple[str, ...] = opt(
        (), 'columns and message fields that are not read, e.g. ["rationale", "messages.annotation"]'
    )
    quoted_texts: str = opt(
        "refuse",
        "a column whose every text is a JSON string in quotes: refuse the source, or keep the quotes",
        choices=("refuse", "keep"),
        selects=True,
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
    seed: int = opt(42, "seed of the sampling and order of documents", min=0, max=2**63 - 1, selects=True)
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
    checkpoint: str = opt(
        "final",
        "step of the training to export: final = its last one, best = the one that train/BEST names",
        choices=("final", "best"),
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
        "another model than this run's training, to export and score (make … MODEL=): runs/<run>[/train/step<N>], a step or Hugging Face folder under DATA or on a mount, gs://…, s3://… or hf://org/name[@revision]; empty = train",
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
        "AI2's harnesses: another model than the run's export: a path on a mount, gs://…, s3://…, org/name[@revision], beaker://dataset",
    )
    model_name: str = opt("", "oe-eval: the model's name in its records; empty = the run's name", key=False)
    stop_sequences: tuple[str, ...] = opt((), "oe-eval: texts that end a reply, beside the task's own", late=True)
    datalake: bool = opt(True, "oe-eval: push the scores to AI2's datalake, as open-instruct does", key=False)
    datalake_tags: dict[str, str] = opt(
        {}, 'oe-eval: tags of the scores in the datalake, e.g. {run_id = "…", step = "100"}', key=False
    )
    hf_save_dir: str = opt(
        "",
        "oe-eval: also store the results in a dataset of the hub: org/name//folder (open-instruct's --upload_to_hf)",
        key=False,
    )
    wandb_run_path: str = opt("", "oe-eval: also store the scores in this W&B run: entity/project/run_id", key=False)
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
    seed: int = opt(1234, "seed of few-shot examples and sampling", min=0, max=2**32 - 1)
    system_prompt: str = opt("", "system message before every conversation; empty = the task's own description, if any")
    process_output: str = opt(
        "none",
        "r1_style removes everything up to </think> before scoring; oe-eval: r1_style unless set",
        choices=("none", "r1_style"),
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


TABLES: dict[str, type] = {
    "model": Model,
    "prepare": Prepare,
    "sync": Sync,
    "train": Train,
    "convert": Convert,
    "evaluate": Evaluate,
}
