"""How a task is asked: the recipe's options over the task's own, and their record in results.json.

In: lm-eval's task, [evaluate], the longest sequence of the model. Out: the task with these options set, and `Asking`.
"""

from __future__ import annotations

import jinja2
import jinja2.meta
from lm_eval.api.task import Task

from sft.chat.trace import GenerationTag
from sft.common.errors import SftError
from sft.evaluation import stops
from sft.evaluation.recorder import Recorder
from sft.evaluation.task_config import LIMITS
from sft.evaluation.workers import Budget
from sft.formats.results import Asking
from sft.recipe.schema import Evaluate

SWITCHES = ("enable_thinking", "thinking")
"""The variables by which chat templates turn thoughts on and off."""
OF_REPLIES = (
    "process_output",
    "max_reply_tokens",
    "temperature",
    "top_p",
    "samples",
    "max_thought_tokens",
    "min_stop_rate",
)
"""The fields of [evaluate.by_task.<task>] that mean something only where the model writes a reply."""
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
    multiturn = options.fewshot_as_multiturn if shots else None
    thinking = thinks(task, options)
    if task.OUTPUT_TYPE != "generate_until":
        _check_unused(task, options)
        return Asking(multiturn=multiturn, system_prompt=options.system_prompt or None)
    arguments = task.config.generation_kwargs
    named = [arguments.pop(name) for name in LIMITS if name in arguments]
    own = int(named[0]) if named else min(DEFAULT_REPLY, max_length // 2)
    reply = options.max_reply_tokens or own
    thought = options.max_thought_tokens if thinking or options.process_output != "none" else 0
    arguments["max_gen_toks"] = thought + reply
    if options.temperature == 0:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            arguments.pop(name, None)
        arguments["do_sample"] = False
    elif options.temperature > 0:
        arguments |= {"do_sample": True, "temperature": options.temperature}
    if options.top_p and options.temperature != 0:
        arguments["top_p"] = options.top_p
    sampled = bool(arguments.get("do_sample", arguments.get("temperature", 0) > 0))
    if sampled and not arguments.get("temperature", 0) > 0:
        raise SftError(
            f"task {task.config.task}: generation_kwargs: do_sample with temperature = {arguments.get('temperature', 'none, for which lm-eval takes 0')};"
            " next: correct the temperature in the task's file, or set [evaluate] temperature"
        )
    if options.samples > 1:
        _check_draws(task, options.samples, sampled)
    until = arguments["until"]
    return Asking(
        multiturn=multiturn,
        until=(until,) if isinstance(until, str) else tuple(until),
        max_reply_tokens=reply,
        temperature=float(arguments.get("temperature", 1.0)) if sampled else 0.0,
        top_p=float(arguments["top_p"]) if sampled and "top_p" in arguments else None,
        samples=options.samples,
        thinking=thinking,
        system_prompt=options.system_prompt or None,
        max_thought_tokens=thought or None,
    )


def thinks(task: Task, options: Evaluate) -> bool | None:
    """Whether the recipe turns thoughts on or off for a task; None leaves it to the template. Raises SftError."""
    own = options.thinking.get(task.config.task)
    if task.OUTPUT_TYPE == "generate_until":
        return options.thinking.get("*") if own is None else own
    if own:
        raise SftError(
            f"[evaluate] thinking.{task.config.task} = true: the task compares given texts, and the model writes nothing; next: remove it"
        )
    return own


def set_thinking(model: Recorder, options: Evaluate, asked: Asking) -> None:
    """Turns thoughts on or off in the model's prompts, and sets their budget. Raises SftError for a template without a switch."""
    model.think_end_token = stops.THINK_ENDS["r1_style" if asked.thinking else options.process_output]
    thought = asked.max_thought_tokens or 0
    model.budget = Budget(thought, (asked.max_reply_tokens or 0) if thought else 0)
    model.template_values = {k: v for k, v in model.template_values.items() if k not in SWITCHES}
    if asked.thinking is not None:
        model.template_values[switch(model.tokenizer.chat_template, asked.thinking)] = asked.thinking


def switch(template: str, is_on: bool) -> str:
    """The variable by which a chat template turns thoughts on and off. Raises SftError for a template without one."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", GenerationTag]).parse(template)
    reads = jinja2.meta.find_undeclared_variables(tree)
    found = next((name for name in SWITCHES if name in reads), None)
    if found is None:
        raise SftError(
            f"[evaluate] thinking: the chat template reads none of {', '.join(SWITCHES)}, so thoughts cannot be turned"
            f' {"on" if is_on else "off"}; next: remove thinking, and set process_output = "r1_style" if the model thinks'
        )
    return found


def _check_draws(task: Task, samples: int, sampled: bool) -> None:
    """Raises SftError for a task whose several replies would mean nothing or something else."""
    name = task.config.task
    if not sampled:
        raise SftError(
            f"[evaluate] samples = {samples}: task {name} is greedy, so all replies would be equal; next: temperature = 0.7, or samples = 1"
        )
    if task.config.repeats > 1:
        raise SftError(
            f"[evaluate] samples = {samples}: task {name} has repeats = {task.config.repeats} of its own; next: samples = 1"
        )


def _check_unused(task: Task, options: Evaluate) -> None:
    """Raises SftError for what the recipe says about the replies of a task that has none."""
    if unused := [name for name in OF_REPLIES if name in options.by_task.get(task.config.task, {})]:
        raise SftError(
            f"[evaluate.by_task.{task.config.task}] {', '.join(unused)}: the task compares given texts, and the model writes nothing; next: remove it"
        )


def _has_examples(task: Task) -> bool:
    """Whether few-shot examples come from elsewhere than the test questions."""
    config = task.fewshot_cfg
    return bool(config.split or config.samples or task.has_training_docs() or task.has_validation_docs())
