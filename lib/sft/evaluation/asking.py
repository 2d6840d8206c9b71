"""How a task is asked: the recipe's options over the task's own, and their record in results.json.

In: lm-eval's task, [evaluate], the longest sequence of the model. Out: the task with these options set, and `Asking`.
"""

from __future__ import annotations

from lm_eval.api.task import Task

from sft.common.errors import SftError
from sft.formats.results import Asking
from sft.recipe.schema import Evaluate

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that lm-eval reads for the longest reply, the first before the others."""
DEFAULT_REPLY = 1024
"""Tokens of the longest reply for a task that names no limit. lm-eval would take 256, which cuts answers of chat models."""


def ask(task: Task, options: Evaluate, max_length: int) -> Asking:
    """Sets the recipe's options in a task and returns how it is asked. Raises SftError for examples that the task has not."""
    if options.num_fewshot >= 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    shots = task.get_config("num_fewshot")
    if shots and not _has_examples(task):
        raise SftError(
            f"[evaluate] num_fewshot = {shots}: task {task.config.task} has no examples apart from its test questions;"
            " next: name a fewshot_split in the task's file, or num_fewshot = 0"
        )
    if task.OUTPUT_TYPE != "generate_until":
        return Asking(multiturn=options.fewshot_as_multiturn if shots else None)
    arguments = task.config.generation_kwargs
    named = [arguments.pop(name) for name in LIMITS if name in arguments]
    own = int(named[0]) if named else min(DEFAULT_REPLY, max_length // 2)
    arguments["max_gen_toks"] = options.max_reply_tokens or own
    if options.temperature == 0:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            arguments.pop(name, None)
        arguments["do_sample"] = False
    elif options.temperature > 0:
        arguments |= {"do_sample": True, "temperature": options.temperature}
    if options.top_p and options.temperature != 0:
        arguments["top_p"] = options.top_p
    sampled = bool(arguments.get("do_sample", arguments.get("temperature", 0) > 0))
    until = arguments["until"]
    return Asking(
        multiturn=options.fewshot_as_multiturn if shots else None,
        until=(until,) if isinstance(until, str) else tuple(until),
        max_reply_tokens=arguments["max_gen_toks"],
        temperature=float(arguments.get("temperature", 1.0)) if sampled else 0.0,
        top_p=float(arguments["top_p"]) if sampled and "top_p" in arguments else None,
    )


def _has_examples(task: Task) -> bool:
    """Whether few-shot examples come from elsewhere than the test questions."""
    config = task.fewshot_cfg
    return bool(config.split or config.samples or task.has_training_docs() or task.has_validation_docs())
