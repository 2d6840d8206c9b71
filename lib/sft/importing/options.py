"""The options whose values are worked out: batch, schedule, optimizer, precision, adapters, intervals, trackers.

Each function reads the names of the rules from a Config, sets fields of a Draft, and says what became of each key. What is only
another word for a field of ours is not here: `plain_options` reads it from the table of other trainers' names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sft.importing.config import Config, flag, number, whole, words
from sft.importing.draft import Draft
from sft.importing.names import IDLE, OFF, SAME
from sft.recipe import other_names, schema
from sft.recipe.families import PROJECTIONS
from sft.recipe.options import hint_of

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "wsd": "wsd",
    "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": "cosine",
}
ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "paged_adamw_32bit", "paged_adamw",
         "torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW")  # fmt: skip
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit", "torchao.optim.AdamW8bit",
              "bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes.optim.AdamW8bit")  # fmt: skip
MATRICES = {theirs.rpartition(".")[2]: ours for ours, theirs in PROJECTIONS.items()}
"""{"q_proj": "attention.w_q"}: the matrices of a block by transformers' names."""
TORCHTUNE = {"output_proj": "o_proj"}
KERNELS = ("LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin")
TRACKERS = {"wandb": "wandb_project", "comet_ml": "comet_project", "trackio": "trackio_project"}


def put(config: Config, draft: Draft, name: str, table: str, field: str, value: Any, note: str = "") -> bool:
    """Sets a field from a key. A value that the field cannot have leaves the key, and so does one where another key has set the field."""
    before = draft.tables.get(table, {}).get(field)
    try:
        what = draft.put(table, field, value, note)
        if before is not None and draft.tables[table][field] != before:
            draft.tables[table][field] = before
            raise ValueError(f"another key has set it to {before!r}")
    except ValueError as error:
        config.leave(name, f"'{field}' in [{table}] cannot have it: {error}")
        return False
    config.use(name, what + (f" ({note})" if note else ""))
    return True


def batch(config: Config, draft: Draft, cluster: str, gpus: int) -> None:
    """seq_len, global_batch_tokens and microbatch_tokens. `gpus`: how many train; 0 = as the configuration says, else one."""
    length = whole(config.get("max_seq_length"))
    packed = whole(config.get("packed_sequence_size"))
    for name, found in (("packed_sequence_size", packed), ("max_seq_length", length)):
        if found and (name == "packed_sequence_size" or not packed):
            put(config, draft, name, "train", "seq_len", found)
    if packed and length:
        config.skip("max_seq_length", "the packs have the length of packed_sequence_size")
    seq_len = int(draft.get("train", "seq_len"))
    if not (length or packed):
        config.added["[train] seq_len"] = f"no length is stated: {seq_len}, the default"
    stated = _processes(config)
    ranks = gpus or stated or 1
    if not (gpus or stated):
        config.added["GPUs"] = "the number is not stated: 1 is assumed, which decides the batch; next: GPUS=n"
    rows, accumulation = (
        whole(config.get("per_device_train_batch_size")),
        whole(config.get("gradient_accumulation_steps")),
    )
    in_all = whole(config.get("global_rows"))
    tokens = (in_all or (rows or 1) * (accumulation or 1) * ranks) * seq_len
    how = (
        f"{in_all} rows"
        if in_all
        else f"{rows or 1} row{'s' * ((rows or 1) > 1)} x {accumulation or 1} x {ranks} GPU{'s' * (ranks > 1)}"
    )
    if (tokens_stated := whole(config.get("global_batch_tokens"))) is not None:
        put(config, draft, "global_batch_tokens", "train", "global_batch_tokens", tokens_stated)
    if config.trainer == "olmo-core":  # its batch does not depend on the number of GPUs, and its default is ours
        config.added.pop("GPUs", None)
        return
    note = f"{how} x {seq_len} tokens"
    what = draft.put("train", "global_batch_tokens", tokens, note)
    for name in ("global_rows", "per_device_train_batch_size", "gradient_accumulation_steps"):
        config.use(name, f"{what} ({note})")
    if rows and not tokens % (rows * seq_len):
        draft.put(
            f"on.{cluster}.train", "microbatch_tokens", rows * seq_len, f"{rows} row{'s' * (rows > 1)} of one GPU"
        )


def _processes(config: Config) -> int:
    """GPUs that the configuration or its launcher states, over all machines."""
    each = next((n for name in ("launcher.nproc_per_node", "launcher.num_processes", "launcher.gpus", "launch.num_gpus", "num_gpus")
                 if (n := whole(config.get(name)))), 0)  # fmt: skip
    machines = next((n for name in ("launcher.nnodes", "launcher.num_nodes", "launcher.num_machines", "num_nodes")
                     if (n := whole(config.get(name)))), 1)  # fmt: skip
    total = (
        each if config.get("launcher.num_processes") and not config.get("launcher.nproc_per_node") else each * machines
    )
    for name in ("nproc_per_node", "num_processes", "gpus", "nnodes", "num_nodes", "num_machines"):
        for key in (f"launcher.{name}", name, f"launch.{name}"):
            if config.get(key) is not None:
                config.use(
                    key, f"{total} GPUs, which decide the batch; set nodes and processes in [on.<cluster>.train]"
                )
    if config.get("launch.num_gpus") is not None:
        config.use("launch.num_gpus", f"{total} GPUs; set them in [on.<cluster>.train]")
    return total


def packing(config: Config) -> None:
    """Documents are always packed: only training without packing differs."""
    if (value := config.get("packing")) is None:
        return
    if flag(value) is False:
        config.leave("packing", "documents are always packed here, so that a batch has more of them")
    else:
        config.skip("packing", "documents are always packed")


def length_of_training(config: Config, draft: Draft) -> None:
    """epochs or steps."""
    per_epoch = whole(config.get("max_steps_per_epoch"))
    epochs = number(config.get("num_train_epochs"))
    steps = whole(config.get("max_steps")) or whole(config.get("max_train_steps"))
    if per_epoch and epochs:
        put(config, draft, "max_steps_per_epoch", "train", "steps", int(per_epoch * epochs))
    for name in ("max_steps", "max_train_steps"):
        if (found := whole(config.get(name))) is not None and found > 0:
            put(config, draft, name, "train", "steps", found)
        elif found is not None:
            config.skip(name, "it is off")
    if epochs is not None and not (steps and steps > 0):
        put(config, draft, "num_train_epochs", "train", "epochs", epochs)
    elif epochs is not None:
        config.skip("num_train_epochs", "the number of steps decides")


def schedule(config: Config, draft: Draft) -> None:
    """schedule, warmup_fraction, final_lr_fraction and decay_fraction."""
    name = config.get("lr_scheduler_type")
    ours = SCHEDULES.get(str(name))
    if name is not None and ours is None:
        config.leave("lr_scheduler_type", f"schedule is linear, cosine, wsd or constant, not {name}")
    elif name is not None:
        put(config, draft, "lr_scheduler_type", "train", "schedule", ours)
    _warmup(config, draft, constant=str(name) == "constant")
    least, peak = number(config.get("min_lr")), number(draft.get("train", "lr"))
    if least is not None and peak:
        put(config, draft, "min_lr", "train", "final_lr_fraction", least / peak)
    for key in list(config.below("lr_scheduler_kwargs")):
        last = key.rpartition(".")[2]
        value = number(config.get(key))
        steps = draft.get("train", "steps")
        if last in ("min_lr_rate", "min_lr_ratio") and value is not None:
            put(config, draft, key, "train", "final_lr_fraction", value)
        elif last == "min_lr" and value is not None and peak:
            put(config, draft, key, "train", "final_lr_fraction", value / peak)
        elif last == "num_decay_steps" and value and steps:
            put(config, draft, key, "train", "decay_fraction", value / steps)


def _warmup(config: Config, draft: Draft, constant: bool) -> None:
    steps = number(config.get("warmup_steps"))
    ratio = number(config.get("warmup_ratio"))
    if steps is not None and (ratio is None or steps):
        in_all = draft.get("train", "steps")
        if steps < 1 or in_all:
            fraction = steps if steps < 1 else min(1.0, round(steps / in_all, 6))
            put(config, draft, "warmup_steps", "train", "warmup_fraction", fraction)
        else:
            config.leave(
                "warmup_steps",
                f"warmup_fraction is a fraction of the steps: make steps prints how many there are; set it to {steps:g} / that",
            )
        if ratio is not None:
            config.skip("warmup_ratio", "warmup_steps decides")
        return
    config.skip("warmup_steps", "warmup_ratio decides")
    if ratio is not None:
        put(config, draft, "warmup_ratio", "train", "warmup_fraction", 0.0 if constant else ratio)


def optimizer(config: Config, draft: Draft) -> None:
    """optimizer and its betas."""
    name = config.get("optim")
    if name is not None:
        if str(name) in ADAMW:
            put(config, draft, "optim", "train", "optimizer", "adamw")
        elif str(name) in ADAMW_8BIT:
            put(
                config,
                draft,
                "optim",
                "train",
                "optimizer",
                "adamw8bit",
                "torchao's 8-bit form, needs the extra lowbit",
            )
        else:
            config.leave("optim", f"optimizer is adamw or adamw8bit, not {name}")
    if flag(config.get("use_8bit_optimizer")):
        put(config, draft, "use_8bit_optimizer", "train", "optimizer", "adamw8bit")
    first, second = number(config.get("adam_beta1")), number(config.get("adam_beta2"))
    if first is not None or second is not None:
        betas = [first if first is not None else 0.9, second if second is not None else 0.999]
        if put(config, draft, "adam_beta1" if first is not None else "adam_beta2", "train", "betas", betas):
            config.use("adam_beta2", f"[train] betas = {betas}")
    elif (pair := config.get("adam_betas")) is not None:
        put(config, draft, "adam_betas", "train", "betas", [number(b) or 0.0 for b in words(str(pair).strip("[]()"))])


def precision(config: Config, draft: Draft) -> None:
    """precision. Weights are always fp32; this is the compute dtype."""
    for name in ("fp16", "float16"):
        if flag(config.get(name)):
            config.leave(name, "there is no fp16: precision is bf16 or fp32, and the recipe has bf16")
    for name in ("bf16", "bfloat16"):
        value = config.get(name)
        if value is not None and (flag(value) or value in ("auto", "full")):
            put(config, draft, name, "train", "precision", "bf16")
        elif value is not None and not any(
            config.has(n) and flag(config.values[config.key(n)]) for n in ("fp16", "float16")
        ):
            put(config, draft, name, "train", "precision", "fp32")
        else:
            config.skip(name, "fp16 decides")
    value = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    for name in ("dtype", "torch_dtype"):
        if not config.get(name):
            continue
        if config.trainer == "trl" or value == "auto":
            config.skip(name, "weights are kept in fp32 and computed with in [train] precision")
        elif value in ("bf16", "bfloat16", "fp32", "float32"):
            put(config, draft, name, "train", "precision", "bf16" if value.startswith("b") else "fp32")
        else:
            config.leave(name, f"precision is bf16 or fp32, not {value}")


def adapters(config: Config, draft: Draft) -> None:
    """method, base_dtype and the fields of LoRA."""
    kind = config.get("adapter")
    component = str(config.get("model._component_") or "").rpartition(".")[2]
    chosen = {
        "adapter": str(kind) if kind else "",
        "use_peft": "lora" if flag(config.get("use_peft")) else "",
        "use_lora": "lora" if flag(config.get("use_lora")) else "",
        "use_qlora": "qlora" if flag(config.get("use_qlora")) else "",
        "model._component_": next((k for k in ("qlora", "lora") if component.startswith(f"{k}_")), ""),
        "peft._target_": "lora" if config.get("peft._target_") else "",
    }
    found = {name: value for name, value in chosen.items() if value}
    lora = any(value in ("lora", "qlora") for value in found.values())
    for name, value in found.items():
        if value in ("lora", "qlora"):
            put(config, draft, name, "train", "method", "lora")
        else:
            config.leave(name, f"method is full or lora, not {value}")
    four = flag(config.get("load_in_4bit")) or flag(config.get("model.quantize_base")) or "qlora" in found.values()
    eight = flag(config.get("load_in_8bit"))
    for name, dtype, asked in (
        ("load_in_4bit", "nf4", four),
        ("model.quantize_base", "nf4", four),
        ("load_in_8bit", "int8", eight),
    ):
        if not flag(config.get(name)):
            continue
        if lora and asked:
            put(config, draft, name, "train", "base_dtype", dtype)
        else:
            config.leave(name, "a quantised base needs an adapter: method = 'lora'")
    if lora and four:
        draft.put("train", "base_dtype", "nf4")
    kind_of = config.get("bnb_4bit_quant_type")
    if kind_of == "nf4" or (kind_of and not four):
        config.skip("bnb_4bit_quant_type", "nf4 is the form of a base of 4 bits")
    own = ("lora_r", "lora_rank", "peft_r", "lora_alpha", "lora_dropout", "peft_lora_dropout", "use_rslora", "peft_use_rslora", "lora_target_linear", "lora_target_modules")  # fmt: skip
    if not lora:
        for name in own:
            config.skip(name, "no adapter is trained")
        return
    targets(config, draft)


def targets(config: Config, draft: Draft) -> None:
    """lora_targets: the matrices of a block by transformers' names."""
    listed = config.get("lora_target_modules")
    every = flag(config.get("lora_target_linear")) or listed == "all-linear" or listed == ["all-linear"]
    if every:
        for name in ("lora_target_linear", "lora_target_modules"):
            config.use(name, "[train] lora_targets is empty: all matrices of the blocks")
        return
    if listed is None:
        config.skip("lora_target_linear", "it is off")
        config.added["[train] lora_targets"] = (
            "all matrices of the blocks get an adapter; elsewhere a default of the library decides"
        )
        return
    names = (
        [TORCHTUNE.get(n, n) for n in (n.rpartition(".")[2].lstrip("*") for n in words(listed))]
        if isinstance(listed, list)
        else []
    )
    if config.trainer == "torchtune":
        names += ["gate_proj", "down_proj", "up_proj"] if flag(config.get("model.apply_lora_to_mlp")) else []
        config.use("model.apply_lora_to_mlp", "[train] lora_targets")
    unknown = [n for n in names if n not in MATRICES]
    if unknown or not names:
        config.leave(
            "lora_target_modules",
            f"not matrices of a block by transformers' names: {', '.join(unknown) or listed}; all get an adapter",
        )
        return
    config.skip("lora_target_linear", "lora_target_modules decides")
    wanted = [] if set(names) >= set(MATRICES) else [MATRICES[n] for n in dict.fromkeys(names)]
    put(config, draft, "lora_target_modules", "train", "lora_targets", wanted, "" if wanted else "all of them")


def intervals(config: Config, draft: Draft) -> None:
    """save_every, validate_every: numbers of steps. Fractions of the steps need their number."""
    strategies = {
        "save_strategy": "save_every",
        "eval_strategy": "validate_every",
        "evaluation_strategy": "validate_every",
    }
    for name, field in strategies.items():
        value = config.get(name)
        if value in ("steps", True):
            config.skip(name, f"{field} is in steps")
        elif value == "no":
            config.leave(
                name, f"the last step is always {'saved' if field == 'save_every' else 'measured'}; {field} is in steps"
            )
        elif value is not None:
            config.leave(name, f"{field} is in steps: make steps prints how many an epoch has")
    for name, field in (
        ("save_steps", "save_every"),
        ("eval_steps", "validate_every"),
        ("checkpointing_steps", "save_every"),
    ):
        value, steps = number(config.get(name)), draft.get("train", "steps")
        if value is None:
            continue
        if 0 < value < 1 and steps:
            put(config, draft, name, "train", field, max(1, round(value * steps)))
        elif 0 < value < 1:
            config.leave(name, f"{field} is in steps, not a fraction of them: make steps prints how many there are")
        else:
            put(config, draft, name, "train", field, value)
    for name, field in (("saves_per_epoch", "save_every"), ("evals_per_epoch", "validate_every")):
        if (value := config.get(name)) is not None:
            config.leave(
                name, f"{field} is in steps: make steps prints how many an epoch has; set it to that / {value}"
            )
    last = whole(config.get("keep_last_n_checkpoints"))
    if last is not None and last < 0:
        config.skip("keep_last_n_checkpoints", "all are kept")


def trackers(config: Config, draft: Draft, run: str) -> None:
    """wandb_project and its like. Without a project's name the recipe's is taken."""
    wanted = config.get("report_to")
    project = config.get("wandb_project") or config.get("wandb_project_name") or run
    for name in words(wanted) if wanted is not None else []:
        if name == "tensorboard":
            put(config, draft, "report_to", "train", "tensorboard", True)
        elif name in TRACKERS:
            put(config, draft, "report_to", "train", TRACKERS[name], project)
        elif name == "none":
            config.skip("report_to", "it is off")
        else:
            config.leave(
                "report_to", f"there are wandb_project, comet_project, trackio_project and tensorboard, not {name}"
            )
    if flag(config.get("with_tracking")):
        put(config, draft, "with_tracking", "train", "wandb_project", project)
    elif config.get("with_tracking") is not None:
        config.skip("with_tracking", "it is off")
    if flag(config.get("use_tensorboard")):
        put(config, draft, "use_tensorboard", "train", "tensorboard", True)


def plugins(config: Config) -> None:
    """axolotl's: those that only bring kernels need nothing here."""
    names = [name.rpartition(".")[2] for name in words(config.get("plugins") or [])]
    others = [name for name in names if name not in KERNELS]
    if others:
        config.leave("plugins", f"there are no plugins: {', '.join(others)}")
    else:
        config.skip("plugins", IDLE["use_liger_kernel"])


def olmo_core(config: Config, draft: Draft, run: str) -> None:
    """The options of OLMo-core's SFT script that have no name elsewhere."""
    if config.trainer != "olmo-core":
        return
    if (name := config.get("model_name")) is not None:
        put(config, draft, "model_name", "model", "preset", name)
    for tracker in ("wandb", "comet"):
        key = f"trainer.callbacks.{tracker}.enabled"
        if flag(config.get(key)):
            put(config, draft, key, "train", f"{tracker}_project", run)
    config.skip("visualize", "make preview prints conversations with their trained tokens")
    if config.get("cluster") is not None:
        config.leave("cluster", "CLUSTER= names a file of env/: make train CLUSTER=ai2-jupiter")
    if config.get("dataset_path") is not None and draft.sources:
        config.skip("dataset_path", "training reads the run's own dataset")


def seeds(config: Config, draft: Draft) -> None:
    """One seed there is two here: of new weights and of the order of the data."""
    value = whole(config.get("seed"))
    if value is not None and put(config, draft, "seed", "train", "data_seed", value):
        draft.put("train", "seed", value)


def plain_options(config: Config, draft: Draft, cluster: str) -> None:
    """The rest: other words for fields of ours, what needs nothing here, and what is unknown, each with its reason."""
    theirs = {key: name for name, key in config.names.items()}
    rest = replace(config, names={})  # the same keys, by their own names alone
    for key in rest.open:
        if rest.get(key) is None:
            rest.skip(key, "it is empty")
            continue
        name = theirs.get(key, key)
        if _is_off(rest.get(key), key, name):
            rest.skip(key, "it asks for what happens here anyway")
        elif reason := _idle(key, name):
            rest.skip(key, reason)
        elif place := SAME.get(name) or _same(name):
            table, _, field = place.rpartition(".")
            put(
                rest,
                draft,
                key,
                f"on.{cluster}.{table[3:]}" if table.startswith("on.") else table,
                field,
                rest.get(key),
            )
        else:
            _explain(rest, key, name, cluster)


def _explain(config: Config, key: str, name: str, cluster: str) -> None:
    """Why a key is not carried over, from the table of other trainers' names."""
    word = name if name in other_names.OTHER_NAMES else name.rpartition(".")[2]
    entry = other_names.OTHER_NAMES.get(word, "")
    if entry.startswith(":") and config.get(key) is not False:
        config.skip(key, other_names.translated(word))
    elif entry:
        config.leave(key, other_names.translated(word))
    else:
        own = "an option of the launcher: docs/launch.md" if key.startswith("launcher.") else "there is no such field"
        config.leave(key, other_names.answer(name, cluster) or own)


def _same(name: str) -> str:
    """ "train.lr" for a name whose values mean the same in one field of ours. Texts and lists seldom do: they have rules, or are left."""
    entry = other_names.OTHER_NAMES.get(name, "")
    if not entry or ":" in entry or " or " in entry:
        return ""
    table, _, field = entry.rpartition(".")
    cls = schema.Hardware if table.startswith("on.") else schema.TABLES[table]
    return entry if hint_of(cls, field) in (int, float, bool) or field.endswith("_project") else ""


def _is_off(value: Any, key: str, name: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = flag(value)
    return isinstance(value, bool | int | float | str) and any(value in OFF.get(n, ()) for n in (key, name))


def _idle(key: str, name: str) -> str:
    """Why an option, or the table that it is in, needs nothing here; "" where it is not known to."""
    parts = key.split(".")
    heads = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next((IDLE[word] for word in (name, *heads) if word in IDLE), "")
