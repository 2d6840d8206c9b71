"""What the trainers call their options, which of these need nothing here, and the defaults that differ from ours.

The names of `OTHER_NAMES` (sft.recipe.other_names) are the rules' names. A trainer that nests its keys, or uses a name of its own,
has them in NAMES. A name that is in none of these tables is listed as not carried over.
"""

from __future__ import annotations

from typing import Any

SAME = {
    "lr": "train.lr",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "epochs": "train.epochs",
    "lora_rank": "train.lora_rank",
    "lora_alpha": "train.lora_alpha",
    "lora_dropout": "train.lora_dropout",
    "early_stopping_patience": "train.early_stopping_patience",
    "early_stopping_threshold": "train.early_stopping_threshold",
    "wandb_project": "train.wandb_project",
    "comet_project": "train.comet_project",
}
"""Names that mean here what they mean there."""

NAMES: dict[str, dict[str, str]] = {
    "axolotl": {
        "lr_scheduler_type": "lr_scheduler",
        "optim": "optimizer",
        "num_train_epochs": "num_epochs",
        "max_seq_length": "sequence_len",
        "per_device_train_batch_size": "micro_batch_size",
        "packing": "sample_packing",
        "model_name_or_path": "base_model",
        "model_revision": "revision_of_model",
        "tokenizer_name": "tokenizer_config",
        "adam_epsilon": "adam_epsilon",
        "add_tokens": "tokens",
        "use_rslora": "peft_use_rslora",
        "num_nodes": "num_nodes",
    },
    "trl": {"max_seq_length": "max_length"},
    "open-instruct": {"clip_grad": "clip_grad_norm", "lora_r": "lora_rank", "chat_template": "chat_template_name"},
    "torchtune": {
        "learning_rate": "optimizer.lr",
        "optim": "optimizer._component_",
        "weight_decay": "optimizer.weight_decay",
        "adam_betas": "optimizer.betas",
        "adam_epsilon": "optimizer.eps",
        "lr_scheduler_type": "lr_scheduler._component_",
        "warmup_steps": "lr_scheduler.num_warmup_steps",
        "num_train_epochs": "epochs",
        "max_seq_length": "tokenizer.max_seq_len",
        "per_device_train_batch_size": "batch_size",
        "packing": "dataset.packed",
        "max_grad_norm": "clip_grad_norm",
        "dtype": "dtype",
        "model_name_or_path": "checkpointer.checkpoint_dir",
        "tokenizer_name": "tokenizer.path",
        "lora_r": "model.lora_rank",
        "lora_alpha": "model.lora_alpha",
        "lora_dropout": "model.lora_dropout",
        "lora_target_modules": "model.lora_attn_modules",
        "logging_steps": "log_every_n_steps",
        "wandb_project": "metric_logger.project",
        "train_on_inputs": "dataset.train_on_input",
        "use_dora": "model.use_dora",
        "torch_compile": "compile",
    },
    "automodel": {
        "learning_rate": "optimizer.lr",
        "optim": "optimizer._target_",
        "weight_decay": "optimizer.weight_decay",
        "adam_betas": "optimizer.betas",
        "adam_epsilon": "optimizer.eps",
        "lr_scheduler_type": "lr_scheduler.lr_decay_style",
        "warmup_steps": "lr_scheduler.lr_warmup_steps",
        "min_lr": "lr_scheduler.min_lr",
        "num_train_epochs": "step_scheduler.num_epochs",
        "max_steps": "step_scheduler.max_steps",
        "global_rows": "step_scheduler.global_batch_size",
        "per_device_train_batch_size": "step_scheduler.local_batch_size",
        "save_steps": "step_scheduler.ckpt_every_steps",
        "eval_steps": "step_scheduler.val_every_steps",
        "max_seq_length": "dataset.seq_length",
        "packed_sequence_size": "packed_sequence.packed_sequence_size",
        "max_grad_norm": "clip_grad_norm.max_norm",
        "dtype": "model.torch_dtype",
        "model_name_or_path": "model.pretrained_model_name_or_path",
        "lora_r": "peft.dim",
        "lora_alpha": "peft.alpha",
        "lora_dropout": "peft.dropout",
        "lora_target_modules": "peft.target_modules",
        "lora_target_linear": "peft.match_all_linear",
        "use_dora": "peft.use_dora",
        "seed": "rng.seed",
        "chat_template": "dataset.chat_template",
        "wandb_project": "wandb.project",
        "context_parallel_size": "distributed.cp_size",
    },
    "olmo-core": {
        "learning_rate": "train_module.optim.lr",
        "weight_decay": "train_module.optim.weight_decay",
        "adam_betas": "train_module.optim.betas",
        "adam_epsilon": "train_module.optim.eps",
        "warmup_ratio": "train_module.scheduler.warmup_fraction",
        "alpha_f": "train_module.scheduler.alpha_f",
        "max_grad_norm": "train_module.max_grad_norm",
        "z_loss_multiplier": "train_module.z_loss_multiplier",
        "rank_microbatch_size": "train_module.rank_microbatch_size",
        "max_seq_length": "seq_len",
        "data_loader_seed": "data_loader.seed",
        "save_interval": "trainer.callbacks.checkpointer.save_interval",
        "ephemeral_save_interval": "trainer.callbacks.checkpointer.ephemeral_save_interval",
        "base_model": "base_checkpoint",
        "global_batch_tokens": "data_loader.global_batch_size",
        "num_train_epochs": "trainer.max_duration.value",
    },
}
"""{trainer: {name of the rules: its dotted key}}."""

ADAMW = {"adam_betas": [0.9, 0.999], "adam_epsilon": 1e-8}
DEFAULTS: dict[str, dict[str, Any]] = {
    "axolotl": {
        **ADAMW, "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "max_grad_norm": 1.0, "weight_decay": 0.0,
        "max_seq_length": 512, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "lora_dropout": 0.0, "seed": 42,
    },
    "trl": {
        **ADAMW, "learning_rate": 2e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "max_grad_norm": 1.0,
        "weight_decay": 0.0, "max_seq_length": 1024, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "lora_r": 16,
        "lora_alpha": 32, "lora_dropout": 0.05, "seed": 42,
    },
    "open-instruct": {
        **ADAMW, "learning_rate": 2e-5, "num_train_epochs": 2, "lr_scheduler_type": "linear", "warmup_ratio": 0.03, "weight_decay": 0.0,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "seed": 42,
    },
    "torchtune": {
        **ADAMW, "weight_decay": 0.01, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "lora_dropout": 0.0,
    },
    "automodel": {
        **ADAMW, "weight_decay": 0.01, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1.0, "num_train_epochs": 10.0,
        "global_rows": 32, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0,
    },
    "olmo-core": {},
}  # fmt: skip
"""What each trainer does where its configuration is silent. The recipe says it where ours is another value. OLMo-core's SFT script has
ours. axolotl's warm-up is at most 100 steps, and its limit is not in a recipe."""

_MEMORY = "[on.<cluster>.train] recompute, shard_degree and compile are chosen by what fits"
_KERNELS = "attention, loss and optimizer have fused kernels here"
_FILES = "a run is in RUNS=folder (default runs), and prepare has a cache of its own"
_HUB = "make push-hub sends the export"
_PACKED = "documents are always packed and never padded"
_CODE = "the base's config.json decides the class; no code of the hub runs"
_LOADER = "prepare and the loader choose threads and workers"
IDLE: dict[str, str] = {
    **dict.fromkeys((
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "enable_activation_checkpointing", "enable_activation_offloading",
        "activation_checkpointing", "activation_offloading", "fsdp", "fsdp_config", "fsdp_version", "deepspeed", "use_deepspeed",
        "deepspeed_config_file", "deepspeed_multinode_launcher", "torch_compile", "compile", "low_cpu_mem_usage", "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_timeout", "optimizer_in_bwd", "use_cpu", "device_map", "memory_efficient_fsdp_wrap",
        "fsdp_cpu_offload", "ac_mode", "ac_option", "custom_sharded_layers", "distributed", "dist_env", "dp_shard_size", "dp_replicate_size",
        "auto_find_batch_size", "torch_empty_cache_steps", "tiled_mlp", "compile_model", "gpu_memory_limit", "lora_on_cpu", "bnb_config_kwargs",
        "use_bnb_nested_quant", "bnb_4bit_quant_storage", "accelerator_config", "torch_compile_backend", "torch_compile_mode", "device",
        "sequential_offloading", "low_memory_offload_pages", "activation_checkpoint",
    ), _MEMORY),
    **dict.fromkeys((
        "flash_attention", "flash_attn", "use_flash_attn", "attn_implementation", "sdp_attention", "xformers_attention", "eager_attention",
        "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp", "flex_attention", "flex_attn_compile_kwargs", "liger_rope",
        "liger_rms_norm", "liger_glu_activation", "liger_layer_norm", "liger_fused_linear_cross_entropy", "liger_cross_entropy",
        "liger_rms_norm_gated", "use_liger_kernel", "liger_kernel_config", "use_liger", "cut_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel",
        "lora_o_kernel", "lora_embedding_kernel", "use_kernels", "fused_attn_kernel", "tf32", "fused_optimizer", "optimizer.fused",
        "optimizer.foreach", "peft.use_triton", "peft.use_memory_efficient_lora", "lora_fan_in_fan_out", "use_reentrant",
        "distributed.sequence_parallel", "model.use_liger_kernel", "model.attn_implementation", "model.backend",
    ), _KERNELS),
    **dict.fromkeys((
        "output_dir", "dataset_prepared_path", "logging_dir", "logging_first_step", "overwrite_cache", "overwrite_output_dir", "run_name",
        "exp_name", "wandb_name", "wandb_run_id", "checkpointer.output_dir", "checkpointer.recipe_checkpoint", "checkpointer.checkpoint_files",
        "checkpointer.model_type", "checkpointer._component_", "metric_logger.log_dir", "metric_logger.output_dir", "dataset_cache_mode",
        "dataset_local_cache_dir", "dataset_skip_cache", "dataset_mix_dir", "do_not_randomize_output_dir", "checkpoint.checkpoint_dir",
        "checkpoint.enabled", "checkpoint.model_save_format", "checkpoint.save_consolidated", "checkpoint.dequantize_base_checkpoint",
        "save_safetensors", "save_adapter_weights_only", "save_first_step", "save_only_model", "safe_serialization", "wandb.name", "wandb.save_dir",
        "command", "recipe", "dataset_config_hash", "do_train", "do_eval", "do_predict", "checkpoint.save_dir",
    ), _FILES),
    **dict.fromkeys((
        "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "hf_use_auth_token",
        "hf_entity", "hf_repo_id", "hf_repo_revision", "hf_repo_url", "save_to_hub", "hf_metadata_dataset", "try_auto_save_to_beaker",
        "try_launch_beaker_eval_jobs", "gs_bucket_path",
    ), _HUB),
    **dict.fromkeys((
        "pad_to_sequence_len", "group_by_length", "eval_sample_packing", "pad_to_multiple_of", "padding_free", "eval_packing",
        "packing_strategy", "sample_packing_group_size", "sample_packing_bin_size", "length_column_name", "pad_token", "special_tokens.pad_token",
        "dataset.padding", "packed_sequence.split_across_pack", "padding", "dataset.packed_sequence_size",
    ), _PACKED),
    **dict.fromkeys((
        "model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model", "tokenizer_use_fast",
        "tokenizer_legacy", "use_slow_tokenizer", "trust_remote_code", "model._component_", "tokenizer._component_", "tokenizer.merges_file",
        "model._target_", "model.trust_remote_code", "strict", "remove_unused_columns", "config_name", "lora_task_type",
        "skip_prepare_dataset", "dataset_kwargs", "ignore_bias_buffers", "base_model_config", "label_names", "rng._target_", "rng.ranked",
        "dataset.tokenizer", "tokenizer", "peft._target_",
    ), _CODE),
    **dict.fromkeys((
        "dataset_processes", "dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_drop_last", "dataloader",
        "dataloader_num_proc", "dataset_streaming",
    ), _LOADER),
    **dict.fromkeys((
        "local_rank", "launcher.mixed_precision", "launcher.machine_rank", "launcher.main_process_ip", "launcher.main_process_port",
        "launcher.node_rank", "launcher.master_addr", "launcher.master_port", "launcher.rdzv_backend", "launcher.standalone",
        "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "debug", "profiler", "log_peak_memory_stats", "ci",
        "include_tokens_per_second", "include_num_input_tokens_seen", "skip_memory_metrics", "report_to_tensorboard", "optimizer.master_weights",
        "launcher.word_0", "launcher.word_1", "launcher.word_2", "launcher.word_3", "launcher.word_4", "launcher.word_5", "launcher.word_6",
        "launcher.config_file", "launcher.use_deepspeed", "launcher.deepspeed_config_file", "launcher.deepspeed_multinode_launcher", "timeout",
        "step_scheduler.gc_every_steps", "wandb_watch", "wandb_log_model", "metric_logger._component_", "use_wandb",
    ), "how processes start and what they print is the cluster's file and the launcher"),
}  # fmt: skip
"""{option, or a table of options: why it needs nothing here}. A dotted name counts with its table's name as well."""

OFF: dict[str, tuple[Any, ...]] = {
    "label_smoothing_factor": (0,), "label_smoothing": (0,), "full_determinism": (False,), "average_tokens_across_devices": (True,),
    "gradient_accumulation_kwargs": (), "use_lora": (False,), "use_peft": (False,), "use_qlora": (False,), "use_8bit_optimizer": (False,),
    "load_in_4bit": (False,), "load_in_8bit": (False,), "fp16": (False,), "float16": (False,), "half": (False,), "bf16_full_eval": (False,),
    "fp16_full_eval": (False,), "prediction_loss_only": (False,), "load_best_model_at_end": (False,), "restore_callback_states_from_checkpoint": (False,),
    "ignore_data_skip": (False,), "eval_delay": (0,), "batch_eval_metrics": (False,), "eval_do_concat_batches": (True,), "eval_use_gather_object": (False,),
    "use_cache": (False,), "save_on_each_node": (False,), "enable_jit_checkpoint": (False,), "logging_nan_inf_filter": (True, False),
    "dataloader_in_order": (True,), "train_sampling_strategy": ("random",), "shuffle": (True,), "shuffle_merged_datasets": (True,),
    "dataloader.shuffle": (True,), "resume_from_checkpoint": (False,), "load_balancing_loss": (False,), "cache_dataset_only": (False,),
    "train_on_inputs": (False,), "dataset.train_on_input": (False,), "completion_only_loss": (True,), "assistant_only_loss": (True,),
    "logging_strategy": ("steps",), "eval_on_start": (True,), "use_dora": (False,), "peft_use_dora": (False,), "model.use_dora": (False,),
    "peft.use_dora": (False,), "use_rslora": (False,), "model_revision": ("main",), "truncation_mode": ("keep_start",), "loss_type": ("nll",),
    "dataset.truncation": (True, "longest_first", "do_not_truncate"), "val_set_size": (0,), "lora_modules_to_save": ([],),
    "model.apply_lora_to_output": (False,), "streaming": (False,), "distributed.tp_size": (1,), "distributed.pp_size": (1,),
    "distributed.cp_size": (1,), "distributed.ep_size": (1,), "tensor_parallel_size": (1,), "context_parallel_size": (1,), "tensor_parallel_dim": (1,),
    "dataset.answer_only_loss_mask": (True,), "loraplus_lr_ratio": (0,), "packed_sequence_size": (0,), "dataset_exact_deduplication": (False,),
    "hub_private_repo": (False,), "overwrite_cache": (False,), "reward_model": (False,), "process_reward_model": (False,), "early_stopping_patience": (0,),
}  # fmt: skip
"""{option: values with which it asks for what happens here anyway}."""
