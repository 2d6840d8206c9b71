"""Runs one lm-eval task in this process.

In:  a model (sft.evaluation.backends) and a task (sft.evaluation.tasks). Out: lm-eval's own metrics and samples; the model's
`answers` hold the facts about every reply. Importing it takes seconds: lm-eval does.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers.utils.logging import disable_progress_bar

from sft.evaluation.draws import combined
from sft.evaluation.recorder import Recorder
from sft.evaluation.scores import LmEvalOutput

logging.getLogger("lm_eval").setLevel(logging.ERROR)
disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
RESAMPLINGS = 1000
"""Bootstrap samples behind the standard error of a metric without a formula for it."""


def run_task(
    model: Recorder, task: Task, *, limit: int, seed: int, system_prompt: str, multiturn: bool = True, draws: int = 1
) -> LmEvalOutput:
    """Answers and scores the first `limit` documents of a task, 0 = all, with `draws` sampled replies each."""
    outputs = []
    for model.draw in range(draws):
        model.draws = draws
        task.set_fewshot_seed(seed=seed)  # every draw has the same examples
        outputs.append(_run_once(model, task, limit, seed, system_prompt, multiturn))
    model.draw, model.draws = 0, 1
    return combined(outputs)


def _run_once(model: Recorder, task: Task, limit: int, seed: int, system_prompt: str, multiturn: bool) -> LmEvalOutput:
    random.seed(seed)
    np.random.seed(seed)
    model.sampling_seed = seed + model.answers.reused
    model.seed_sampling(model.sampling_seed)  # what an earlier attempt sampled must not come again
    name = task.config.task
    found: Any = evaluate(
        lm=model,
        task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=limit or None,
        bootstrap_iters=RESAMPLINGS,
        log_samples=True,
        system_instruction=system_prompt or None,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
    )
    return LmEvalOutput(
        results=found["results"][name],
        samples=found["samples"][name],
        config=task.dump_config(),
        higher_is_better=found["higher_is_better"].get(name, {}),
    )
