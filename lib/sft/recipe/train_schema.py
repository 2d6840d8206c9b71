"""The options of [train]: part of `sft.recipe.schema`.

Import them from there. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sft.recipe.options import opt


@dataclass(frozen=True)
class Train:
    """[train]: packing, optimization, checkpoints. The defaults are those of the ancestor's SFT script."""

    seq_len: int = opt(16384, "tokens of a pack", min=2)
    global_batch_tokens: int = opt(1_048_576, "tokens of one optimizer step, over all ranks and microbatches", min=2)
    epochs: float = opt(3.0, "passes over the data; ignored if steps is set", above=0, max=10_000)
    steps: int = opt(0, "optimizer steps; 0 = from epochs", min=0, max=10**9)
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
    continue_from: str = opt(
        "",
        'go on from a step of another run with its optimizer state and data position, e.g. "runs/x/train/step300"',
        name="continue",
        late=True,
    )
    continue_schedule: str = opt(
        "recipe",
        "continue: learning rate from there; recipe = `schedule` over all steps; rewarmed = warm-up and `schedule` over the remaining steps;"
        " constant = the rate of that step; decayed = from the rate of that step to final_lr_fraction of it, in `decay_shape`",
        choices=("recipe", "constant", "rewarmed", "decayed"),
        late=True,
    )
    lr: float = opt(8e-5, "peak learning rate; with method = 'lora' the default is ten times as high", above=0, max=10)
    schedule: str = opt(
        "linear",
        "learning rate after warm-up; wsd stays at lr and decays at the end",
        choices=("linear", "cosine", "wsd", "constant"),
    )
    decay_fraction: float = opt(0.1, "wsd: fraction of the steps in the decay", above=0, max=1)
    decay_shape: str = opt(
        "linear",
        "wsd, and continue_schedule = 'decayed': shape of the decay; sqrt falls fast at first",
        choices=("linear", "cosine", "sqrt"),
    )
    final_lr_fraction: float = opt(0.0, "learning rate at the end of the decay, as a fraction of lr", min=0, max=1)
    warmup_fraction: float = opt(0.03, "fraction of the steps in the warm-up from 0 to lr", min=0, max=1)
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's betas, below 1", min=0, max=0.999999)
    eps: float = opt(1e-8, "AdamW's epsilon", above=0)
    optimizer: str = opt(
        "adamw", "adamw8bit stores its moments in 8 bits (needs torchao)", choices=("adamw", "adamw8bit")
    )
    gradients: str = opt("fp32", "dtype of stored gradients; they are reduced in fp32", choices=("fp32", "bf16"))
    weights: str = opt(
        "fp32",
        "dtype of stored weights; bf16 rounds an update up or down at random, by a hash, so that small ones count (arXiv 2010.06192)",
        choices=("fp32", "bf16"),
        late=True,
    )
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay", min=0)
    lr_factors: dict[str, float | int] = opt(
        {},
        'factors on the learning rate, by parts of parameters\' names, e.g. { embeddings = 0.1, "blocks.0-7" = 0.5 }; the last match counts',
        min=0,
        late=True,
    )
    weight_decays: dict[str, float | int] = opt(
        {},
        'weight decay of some parameters instead of weight_decay, e.g. { "*norm" = 0.0, bias = 0.0, embeddings = 0.0 }; the last match counts',
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
        "bf16",
        "compute dtype; reductions and the loss stay fp32, and parameters are stored as `weights` says; fp8 = bf16, and products of"
        " the blocks' matrices in 8-bit floats with a scale for each row (needs torchao, and an H100 or newer)",
        choices=("bf16", "fp8", "fp32"),
    )
    deterministic: bool = opt(False, "bitwise reproducible on the same GPUs, but slower; a CPU always is", key=False)
    seed: int = opt(33333, "seed of random initial weights", min=0, max=2**63 - 1)
    data_seed: int = opt(34521, "seed of the order of packs", min=0, max=2**63 - 1)
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
    save_best_only: bool = opt(
        False,
        "save a step whose validation loss is the lowest so far, and keep only the steps that LATEST and BEST name",
        key=False,
    )
    save_every_minutes: float = opt(
        0.0, "minutes between ephemeral checkpoints, besides those by steps; 0 = none", min=0, key=False
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
    early_stopping_patience: int = opt(
        0,
        "training ends after this many validations in a row (of validate_every) without a lower loss; 0 = never",
        min=0,
        late=True,
    )
    early_stopping_threshold: float = opt(
        0.0, "early stopping: how much lower than the lowest loss before a validation loss must be", min=0, late=True
    )
    max_minutes: float = opt(
        0.0,
        "training ends after this many minutes over all attempts; it goes on if raised; 0 = no limit",
        min=0,
        key=False,
    )
    log_every: int = opt(1, "steps between records in metrics.jsonl and lines on the terminal", min=1, key=False)
    telemetry_every: int = opt(
        0,
        "steps between records of gradient norms and update-to-weight ratios by group of layers; 0 = none",
        min=0,
        key=False,
    )
    replay_every: int = opt(
        0,
        "steps between comparisons of a microbatch that two ranks compute, which find faulty hardware; 0 = none",
        min=0,
        key=False,
    )
    wandb_project: str = opt("", "Weights & Biases project; offline without an API key; empty = off", key=False)
    tensorboard: bool = opt(False, "write TensorBoard event files to train/tensorboard/", key=False)
    comet_project: str = opt("", "Comet project; offline without an API key; empty = off", key=False)
    trackio_project: str = opt("", "trackio project, in train/trackio/ on this machine; empty = off", key=False)


LORA_LR = 10 * Train.lr
"""The learning rate of method "lora" if the recipe sets none: about ten times that of full finetuning is the best one over
models and data sets ("LoRA Without Regret", Thinking Machines 2025, thinkingmachines.ai/blog/lora)."""
STATE_FIELDS = (
    "method", "optimizer", "gradients", "weights", "precision", "freeze", "train_only", "lora_rank", "lora_alpha", "lora_rslora",
    "lora_targets", "base_dtype",
)  # fmt: skip
"""The fields that decide which state the optimizer has. A run that continues another one has the same values."""
LORA_FIELDS = tuple(f.name for f in fields(Train) if f.name.startswith("lora_") or f.name == "base_dtype")
