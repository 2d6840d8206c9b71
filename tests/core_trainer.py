"""OLMo-core's own trainer, on the CPU with FSDP: two steps of a tiny model, for steps that nobody here wrote.

main(folder): <name>/<ranks>/config.json in it describes a model; step2 is written beside it
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import SkipStepAdamWConfig
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment, teardown_training_environment
from olmo_core.train.callbacks import CheckpointerCallback, ConfigSaverCallback
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig

import training


def train(folder: Path) -> int:
    """One rank's part of a run."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    described = json.loads((folder / "config.json").read_text())
    tokenizer = TokenizerConfig.from_dict(described["dataset"]["tokenizer"])
    tokens, model = folder.parent / "tokens.npy", TransformerConfig.from_dict(described["model"])
    prepare_training_environment(seed=0, backend="gloo" if ranks > 1 else None)
    parallel = TransformerDataParallelConfig(name=DataParallelType.fsdp, param_dtype=DType.float32)
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=64,
        max_sequence_length=64,
        optim=SkipStepAdamWConfig(lr=1e-2),
        dp_config=parallel if ranks > 1 else None,
    ).build(model.build(init_device="meta"))
    data = NumpyFSLDatasetConfig(
        paths=[str(tokens)], tokenizer=tokenizer, sequence_length=64, work_dir=str(folder / "work")
    ).build()
    loader = NumpyDataLoaderConfig(global_batch_size=256, seed=0).build(data, dp_process_group=module.dp_process_group)
    trainer = TrainerConfig(
        save_folder=str(folder),
        work_dir=str(folder / "work"),
        save_overwrite=True,
        max_duration=Duration.steps(2),
        callbacks={
            "checkpointer": CheckpointerCallback(save_interval=2, pre_train_checkpoint=False, save_async=False),
            "config_saver": ConfigSaverCallback(),
        },
    ).build(module, loader)
    trainer.callbacks["config_saver"].config = {  # as their scripts write it
        "model": model.as_config_dict(),
        "dataset": {"tokenizer": tokenizer.as_config_dict()},
    }
    trainer.fit()
    teardown_training_environment()
    return 0


def main(root: Path) -> None:
    """In a process of its own, whose words go to <root>.log."""
    with root.with_suffix(".log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for model in sorted(root.iterdir()):
        rows = json.loads(next(model.glob("*/config.json")).read_text())["dataset"]["tokenizer"]["vocab_size"]
        np.random.default_rng(0).integers(4, rows, 2048).astype(np.uint16).tofile(model / "tokens.npy")
        for folder in sorted(p for p in model.iterdir() if p.is_dir()):
            # A process each, also alone: the process group ends with it.
            if child := os.fork():
                if status := os.waitpid(child, 0)[1]:
                    sys.exit(f"{folder}: {status}")
                continue
            os._exit(training.fork(int(folder.name), lambda folder=folder: train(folder)))
