"""Answers the requests of all tasks of a group in common batches, before each task is scored.

In:  the model, and the group's tasks as they are asked. Out: Answers, from which the tasks take theirs.
Every task is a call of lm-eval of its own here, so that a broken one leaves the others their scores. With batches of its own, too, a
group of many small tasks would leave most batches half empty. Replies that are sampled are left to their task: they depend on
what was sampled before them.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from sft.evaluation import asking
from sft.evaluation.recorder import Recorder
from sft.evaluation.scores import request_key
from sft.evaluation.workers import Budget
from sft.formats.results import Asking
from sft.recipe.schema import Evaluate


class Member(NamedTuple):
    """A task of a group with the recipe's options set in it, and their record."""

    task: Task
    options: Evaluate
    asked: Asking


class Kind(NamedTuple):
    """What the requests of one batch have in common. `arguments` is JSON; "" stands for a likelihood."""

    think_end: str | None
    budget: Budget
    arguments: str


def answer(model: Recorder, members: Sequence[Member]) -> None:
    """Computes what the model's journal lacks. Raises what a task's own code raises."""
    for kind, requests in _by_kind(model, members).items():
        model.think_end_token, model.budget = kind.think_end, kind.budget
        if kind.arguments:
            model.generate_until(requests)
        else:
            model.loglikelihood(requests)


def _by_kind(model: Recorder, members: Sequence[Member]) -> dict[Kind, list[Instance]]:
    """The requests of all tasks. One that several tasks make is there as often as the task that repeats it most needs it."""
    found: dict[Kind, list[Instance]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for member in members:
        if member.asked.temperature or (member.asked.samples or 1) > 1:
            continue
        asking.set_thinking(model, member.options, member.asked)
        own: Counter[str] = Counter()
        for request in _requests(model, member):
            key = request_key(request.args)
            own[key] += 1
            if own[key] > counts[key]:
                counts[key] += 1
                arguments = json.dumps(request.args[1], sort_keys=True) if _is_reply(request) else ""
                kind = Kind(model.think_end_token, model.budget, arguments) if arguments else Kind(None, Budget(), "")
                found[kind].append(request)
    return found


def _requests(model: Recorder, member: Member) -> Iterable[Instance]:
    """The requests that lm-eval will make for a task, each as often as it repeats it."""
    task, options = member.task, member.options
    random.seed(options.seed)
    np.random.seed(options.seed)
    task.set_fewshot_seed(seed=options.seed)
    settings: dict[str, Any] = {
        "limit": options.limit or None,
        "system_instruction": options.system_prompt or None,
        "apply_chat_template": True,
        "fewshot_as_multiturn": options.fewshot_as_multiturn,
        "chat_template": model.apply_chat_template,
    }
    task.build_all_requests(**settings)
    return [
        request
        for request in task.instances
        if _is_reply(request) or request.request_type == "loglikelihood"
        for _ in range(request.repeats or 1)
    ]


def _is_reply(request: Instance) -> bool:
    return bool(request.request_type == "generate_until")
