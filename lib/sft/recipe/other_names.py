"""What other trainers call our fields: TRL and transformers, axolotl, torchtune, NeMo Automodel, open-instruct, LLaMA-Factory, OLMo-core.

    answer("learning_rate", "local")     ->  "here it is 'lr' in [train]"
    answer("workspace", "ai2-jupiter")   ->  "it is a field of env/ai2-jupiter.toml, not of a recipe"
    answer("nonsense", "local")          ->  ""

For other names the planner suggests the field with the nearest spelling. Standard library only: the planner uses this while Make parses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sft.recipe import schema
from sft.recipe.options import names_of

_BATCH = "tokens of one optimizer step = rows of a GPU x accumulation x GPUs x seq_len"
_DORA = (
    ": DoRA (arXiv 2402.09353) is not supported: its norms of W + B A read every matrix once more in each forward pass"
)
_PACKED = "documents are always packed, and attention stays inside each of them"

OTHER_NAMES: dict[str, str] = {
    # The optimizer and its schedule
    "learning_rate": "train.lr",
    "max_learning_rate": "train.lr",
    "max_lr": "train.lr",
    "peak_lr": "train.lr",
    "min_lr": "train.final_lr_fraction: the learning rate at the end as a fraction of lr",
    "min_lr_rate": "train.final_lr_fraction",
    "cosine_min_lr_ratio": "train.final_lr_fraction",
    "alpha_f": "train.final_lr_fraction",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "lr_decay_style": "train.schedule",
    "scheduler": "train.schedule",
    "num_warmup_steps": "train.warmup_fraction: a fraction of the steps",
    "warmup_steps": "train.warmup_fraction: a fraction of the steps",
    "lr_warmup_steps": "train.warmup_fraction: a fraction of the steps",
    "warmup_ratio": "train.warmup_fraction",
    "decay_steps": "train.decay_fraction: a fraction of the steps",
    "adam_beta1": "train.betas: both of them, e.g. betas=0.9,0.95",
    "adam_beta2": "train.betas: both of them, e.g. betas=0.9,0.95",
    "adam_betas": "train.betas",
    "adam_epsilon": "train.eps",
    "adam_eps": "train.eps",
    "optim": "train.optimizer",
    "optimizer_type": "train.optimizer",
    "wd": "train.weight_decay",
    "gradient_clipping": "train.max_grad_norm",
    "gradient_clip_val": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "z_loss_multiplier": "train.z_loss",
    # Length and batch
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "max_steps_per_epoch": "train.steps",
    "train_iters": "train.steps",
    "max_duration": "train.epochs or train.steps",
    "max_seq_length": "train.seq_len",
    "max_seq_len": "train.seq_len",
    "sequence_len": "train.seq_len",
    "sequence_length": "train.seq_len",
    "seq_length": "train.seq_len",
    "cutoff_len": "train.seq_len",
    "block_size": "train.seq_len",
    "max_length": "train.seq_len: the tokens of a pack",
    "packed_sequence_size": "train.seq_len",
    "per_device_train_batch_size": f"train.global_batch_tokens: {_BATCH}",
    "train_batch_size": f"train.global_batch_tokens: {_BATCH}",
    "batch_size": f"train.global_batch_tokens: {_BATCH}",
    "global_batch_size": f"train.global_batch_tokens: {_BATCH}",
    "gradient_accumulation_steps": f"train.global_batch_tokens: {_BATCH}; the accumulation follows",
    "grad_accum": f"train.global_batch_tokens: {_BATCH}; the accumulation follows",
    "micro_batch_size": "on.train.microbatch_tokens: tokens of one forward pass",
    "local_batch_size": "on.train.microbatch_tokens: tokens of one forward pass",
    "rank_microbatch_size": "on.train.microbatch_tokens",
    "packing": f": {_PACKED}",
    "sample_packing": f": {_PACKED}",
    "packed": f": {_PACKED}",
    "group_by_length": f": {_PACKED}",
    "pad_to_sequence_len": f": {_PACKED}",
    "shuffle": "train.data_seed: the order is always shuffled, by this seed",
    "shuffle_seed": "train.data_seed",
    "data_loader_seed": "train.data_seed",
    "dataset_shuffle_seed": "prepare.seed or train.data_seed",
    "init_seed": "train.seed",
    # The model
    "model_name_or_path": "model.base",
    "pretrained_model_name_or_path": "model.base",
    "model_name": "model.base",
    "base_model": "model.base",
    "model_path": "model.base",
    "checkpointer": "model.base",
    "checkpoint_dir": "model.base",
    "load_path": "model.base",
    "model_id": "model.base",
    "rope_theta_scaling": "model.rope_scaling",
    "model_max_length": "convert.max_position_embeddings: the longest input that the export states",
    "max_sequence_length": "convert.max_position_embeddings: the longest input that the export states",
    "resize_token_embeddings": "prepare.add_tokens: the embedding grows with them",
    "attn_implementation": ": attention is PyTorch's varlen kernel on GPUs; there is nothing to choose",
    "flash_attention": ": attention is PyTorch's varlen kernel on GPUs; there is nothing to choose",
    "use_flash_attn": ": attention is PyTorch's varlen kernel on GPUs; there is nothing to choose",
    "bf16": 'train.precision: "bf16", "fp8" or "fp32"',
    "fp16": 'train.precision: "bf16", "fp8" or "fp32"',
    "fp8": 'train.precision: "fp8"',
    "float8": 'train.precision: "fp8"',
    "torch_dtype": 'train.precision: "bf16" or "fp32"; the export has [convert] dtype',
    "load_in_4bit": 'train.base_dtype: "nf4", with method = "lora"',
    "load_in_8bit": 'train.base_dtype: "int8", with method = "lora"',
    "use_peft": 'train.method: "lora"',
    "adapter": 'train.method: "lora"',
    "finetuning_type": 'train.method: "full" or "lora"',
    "lora_r": "train.lora_rank",
    "peft_r": "train.lora_rank",
    "lora_target_modules": "train.lora_targets: names such as attention.w_q; empty = all matrices of the blocks",
    "adapter_dropout": "train.lora_dropout",
    "peft_lora_dropout": "train.lora_dropout",
    "lora_target_linear": "train.lora_targets: empty = all matrices of the blocks",
    "use_rslora": "train.lora_rslora",
    "peft_use_rslora": "train.lora_rslora",
    "lora_dora": _DORA,
    "use_dora": _DORA,
    "peft_use_dora": _DORA,
    "neftune_noise_alpha": "train.neftune_alpha",
    "noisy_embedding_alpha": "train.neftune_alpha",
    "freeze_trainable_layers": "train.freeze",
    "freeze_params": "train.freeze",
    "unfrozen_parameters": "train.train_only",
    "group_overrides": "train.weight_decays or train.lr_factors",
    # Data
    "dataset_name": "prepare.sources: one [[prepare.sources]] table for each, in the recipe's file",
    "dataset_mixer_list": "prepare.sources: one [[prepare.sources]] table for each, with its weight",
    "dataset_mixer": "prepare.sources: one [[prepare.sources]] table for each, with its weight",
    "datasets": "prepare.sources: one [[prepare.sources]] table for each, in the recipe's file",
    "dataset": "prepare.sources: one [[prepare.sources]] table for each, in the recipe's file",
    "dataset_path": "prepare.sources: one [[prepare.sources]] table for each, in the recipe's file",
    "train_file": "prepare.sources: one [[prepare.sources]] table for each, in the recipe's file",
    "dataset_text_field": "prepare.sources: its columns = { … } renames columns",
    "chat_template": "prepare.template",
    "chat_template_name": "prepare.template",
    "chat_template_path": "prepare.template",
    "tokenizer_name_or_path": "prepare.tokenizer",
    "tokenizer_name": "prepare.tokenizer",
    "tokenizer_path": "prepare.tokenizer",
    "special_tokens": "prepare.add_tokens",
    "added_tokens": "prepare.add_tokens",
    "new_system_prompt": "prepare.system",
    "default_system": "prepare.system",
    "train_on_inputs": "prepare.train_roles: the roles whose messages are trained",
    "train_on_input": "prepare.train_roles: the roles whose messages are trained",
    "roles_to_train": "prepare.train_roles",
    "assistant_only_loss": 'prepare.train_roles: the default, ["assistant"], trains the answers alone',
    "completion_only_loss": 'prepare.train_roles: the default, ["assistant"], trains the answers alone',
    "train_on_responses_only": 'prepare.train_roles: the default, ["assistant"], trains the answers alone',
    "mask_history": 'prepare.train_turns: "last" trains the last answer alone',
    "val_set_size": "prepare.validation_fraction",
    "test_size": "prepare.validation_fraction",
    "eval_split_ratio": "prepare.validation_fraction",
    "val_size": "prepare.validation_fraction",
    "dedup": "prepare.deduplicate",
    "max_samples": "prepare.sources: its max_documents, in the recipe's file",
    "max_train_samples": "prepare.sources: its max_documents, in the recipe's file",
    "preprocessing_num_workers": "on.prepare.threads",
    "dataset_num_proc": "on.prepare.threads",
    "dataset_processes": "on.prepare.threads",
    # Saving, logging, validation
    "save_steps": "train.save_every",
    "saves_per_epoch": "train.save_every: in steps",
    "save_interval": "train.save_every",
    "checkpointing_steps": "train.save_every",
    "ckpt_every_steps": "train.save_every",
    "ephemeral_save_interval": "train.ephemeral_every",
    "save_total_limit": "train.keep",
    "keep_last_n_checkpoints": "train.keep",
    "logging_steps": "train.log_every",
    "log_every_n_steps": "train.log_every",
    "log_interval": "train.log_every",
    "eval_steps": "train.validate_every: steps between losses of the validation split; scores during training: every",
    "evals_per_epoch": "train.validate_every: in steps",
    "val_every_steps": "train.validate_every",
    "run_valid_every_n_steps": "train.validate_every",
    "report_to": "train.wandb_project or train.comet_project or train.trackio_project or train.tensorboard",
    "with_tracking": "train.wandb_project or train.comet_project or train.trackio_project or train.tensorboard",
    "wandb_project_name": "train.wandb_project",
    "wandb_name": ": a tracker's run has the name of the run's folder",
    "run_name": ": a run is named by its recipe and its overrides",
    "exp_name": ": a run is named by its recipe and its overrides",
    "output_dir": ": a run is in RUNS=folder (default runs), under its recipe's name",
    "save_folder": ": a run is in RUNS=folder (default runs), under its recipe's name",
    "resume_from_checkpoint": "train.continue: a step of another run; the same make goes on with its own run by itself",
    "auto_resume_from_checkpoints": ": the same make goes on from the last valid checkpoint by itself",
    "load_trainer_state": "train.continue: a step of another run, with its optimizer state",
    "load_best_model_at_end": 'convert.checkpoint: "best" exports the step that train/BEST names',
    "metric_for_best_model": "train.best_metric or evaluate.best",
    "save_top_k": "train.keep or train.save_best_only",
    "save_strategy": "train.save_every or train.save_best_only or train.save_every_minutes",
    "save_interval_minutes": "train.save_every_minutes",
    "early_stopping": "train.early_stopping_patience: in validations",
    "early_stopping_steps": "train.early_stopping_patience: in validations",
    "early_stopping_min_delta": "train.early_stopping_threshold",
    "min_delta": "train.early_stopping_threshold",
    "max_time": "train.max_minutes",
    "max_train_time": "train.max_minutes",
    "eval_on_start": "train.validate_start",
    # Hardware
    "gradient_checkpointing": 'on.train.recompute: "auto" recomputes the least that fits',
    "enable_activation_checkpointing": 'on.train.recompute: "auto" recomputes the least that fits',
    "activation_checkpointing": 'on.train.recompute: "auto" recomputes the least that fits',
    "torch_compile": "on.train.compile",
    "num_gpus": "on.train.processes",
    "nproc_per_node": "on.train.processes",
    "num_processes": "on.train.processes",
    "gpus_per_task": "on.train.gpus",
    "num_nodes": "on.train.nodes",
    "nnodes": "on.train.nodes",
    "context_parallel_size": "on.train.context_degree",
    "sequence_parallel_degree": "on.train.context_degree",
    "cp_size": "on.train.context_degree",
    "dp_shard": "on.train.shard_degree",
    "dp_size": "on.train.shard_degree",
    "fsdp": "on.train.shard_degree: weights are always sharded, over all ranks or this many",
    "deepspeed": "on.train.shard_degree: weights are always sharded, over all ranks or this many",
    # Evaluation
    "tasks_list": "evaluate.tasks",
    "num_shots": "evaluate.num_fewshot",
    "max_gen_toks": "evaluate.max_reply_tokens",
    "max_new_tokens": "evaluate.max_reply_tokens",
    "apply_chat_template": ": the export's template is always used",
    "system_instruction": "evaluate.system_prompt",
    "oe_eval_task_suite": "evaluate.tasks",
    "oe_eval_max_length": "evaluate.max_length",
}
"""Other name: our field as `table.field`, `on.<stage>.<field>` for [on.<cluster>.<stage>], or several with " or "; then, after a
colon, what differs. An empty field: there is nothing to set."""


def answer(name: str, cluster: str) -> str:
    """Where a name that is no field of ours belongs, as the end of a sentence; empty for a name that is not in the tables."""
    plain = name.lower().lstrip("-").replace("-", "_")
    last = plain.rpartition(".")[2]
    for word in (plain, last):
        if word in OTHER_NAMES:
            return translated(word)
        if word in {f.name for f in dataclasses.fields(schema.Cluster)} and "." not in plain:
            return f"it is a field of env/{cluster}.toml, not of a recipe"
    homes = [t for t, cls in schema.TABLES.items() if last in names_of(cls)]
    return f"here it is {_places((t, last) for t in homes)}" if homes and last != plain else ""


def translated(word: str) -> str:
    """ "here it is 'lr' in [train]" for a word of OTHER_NAMES."""
    field, _, note = OTHER_NAMES[word].partition(":")
    homes = [(table, name) for table, _, name in (part.rpartition(".") for part in field.split(" or ") if part)]
    places = _places(homes)
    return (f"here it is {places}" if places else "there is no such field") + (f" ({note.strip()})" if note else "")


def _places(homes: Iterable[tuple[str, str]]) -> str:
    return " or ".join(f"'{name}' in {_table(table)}" for table, name in homes)


def _table(name: str) -> str:
    return f"[on.<cluster>.{name[3:]}]" if name.startswith("on.") else f"[{name}]"
