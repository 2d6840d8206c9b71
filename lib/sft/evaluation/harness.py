"""lm-eval in-process, with what it leaves out: how each reply ended, answers that survive a kill, batches by memory, progress.

In:  a Hugging Face folder, a task (see tasks.py). Out: `run_task` gives lm-eval's own metrics and
samples; the model's `replies` hold the facts about every reply. Imported late: lm-eval takes seconds to import.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers.utils.logging import disable_progress_bar

from sft.evaluation.hf_model import Model

logging.getLogger("lm_eval").setLevel(logging.ERROR)
disable_progress_bar()


def run_task(
    model: Model, task: Task, *, limit: int, seed: int, system_prompt: str, bootstrap: int = 1000
) -> dict[str, Any]:
    """lm-eval's results of one task: {"results", "samples", "config", "higher_is_better"}."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    name = task.config.task
    found: Any = evaluate(
        lm=model,
        task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=limit or None,
        bootstrap_iters=bootstrap,
        log_samples=True,
        system_instruction=system_prompt or None,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return {
        "results": found["results"][name],
        "samples": found["samples"][name],
        "config": task.dump_config(),
        "higher_is_better": found["higher_is_better"].get(name, {}),
    }
