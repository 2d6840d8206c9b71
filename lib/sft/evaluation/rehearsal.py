"""Writes a task's prompts and scores stand-ins for its replies, without a model.

In:  lm-eval's task with its data, and its definition. Out: nothing, or SftError, or Fails with the exception of a step.

What does not depend on the model's replies must work. Code of the task may refuse a stand-in and accept the model's reply.
"""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.api.task import ConfigurableTask, Task

from sft.common.columns import cut
from sft.common.errors import SftError
from sft.evaluation.tasks import SHIPPED, TaskDefinition

REPLIES = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
"""An answer of lm-eval's form to each kind of request, except for a text."""


class Fails(Exception):
    """A step of a task raised `error`; `what` names the step."""

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(what, error)
        self.what, self.error = what, error


def check(task: Task, definition: TaskDefinition) -> None:
    """Raises SftError or Fails for a task that cannot be asked or scored, or whose scores are the same for every model."""
    if not len(task.eval_docs):
        return
    is_own = definition.is_own and isinstance(task, ConfigurableTask)
    if is_own:
        _check_metrics(task, f"{definition.file}: metric_list")
        _check_documents(task, str(definition.file))
    try:
        task.build_all_requests(
            limit=1, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=_written, tokenizer_name="none"
        )
    except Exception as error:
        raise Fails("its first prompt cannot be written", error) from error
    _check_scoring(task, definition, is_own)


def _written(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """A conversation as a text, where the chat template is not known yet."""
    return json.dumps(messages)


def _check_metrics(task: ConfigurableTask, where: str) -> None:
    if not task.config.process_results and type(task).process_results is ConfigurableTask.process_results:
        for name, function in task._metric_fn_list.items():
            if function is None:
                raise SftError(f"{where}: no metric {name!r}; next: one of {', '.join(METRIC_REGISTRY)}")
    for name, function in task._aggregation_list.items():
        if function is None:
            raise SftError(
                f"{where}: {name}: no such aggregation; next: one of {', '.join(map(str, AGGREGATION_REGISTRY))}"
            )


def _check_documents(task: ConfigurableTask, where: str) -> None:
    """Raises SftError for documents that all ask the same, and for targets that no answer can have."""
    config, documents = task.config, list(task.eval_docs)
    target = config.doc_to_target
    is_constant = isinstance(target, str) and target.isidentifier() and target not in task.features
    if is_constant and not config.process_results and config.doc_to_choice is None and task.OUTPUT_TYPE != "loglikelihood_rolling":  # fmt: skip
        raise SftError(
            f"{where}: doc_to_target: {target}: no column of the documents ({', '.join(task.features)}), so it would be the right"
            f" answer to all of them; next: correct it, or write \"{{{{'{target}'}}}}\""
        )
    asked: set[str] = set()
    most = 0 if task.OUTPUT_TYPE == "multiple_choice" and not config.process_results else 2
    for number, document in enumerate(documents):
        choices = None if config.doc_to_choice is None else task.doc_to_choice(document)
        compared = task.doc_to_target(document) if task.OUTPUT_TYPE.startswith("loglikelihood") else choices
        asked.add(json.dumps([task.doc_to_text(document), compared], default=str))
        if choices is None or task.OUTPUT_TYPE != "multiple_choice" or config.process_results:
            continue
        most = max(most, len(choices))
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        for one in gold if isinstance(gold, list) else [gold]:
            if not (one in choices if isinstance(one, str) else isinstance(one, int) and 0 <= one < len(choices)):
                raise SftError(
                    f"{where}: document {number}: doc_to_target gives {one!r}, and the choices are {cut(json.dumps(choices, ensure_ascii=False, default=str), 200)}:"
                    " no answer would be right; next: correct doc_to_target, doc_to_choice or the data"
                )
    if most < 2:
        raise SftError(f"{where}: doc_to_choice gives {most} choices, so every answer would be right; next: correct it")
    if len(documents) > 1 and len(asked) == 1 and any(d != documents[0] for d in documents):
        raise SftError(
            f"{where}: all {len(documents)} documents give the same prompt, {cut(str(task.doc_to_text(documents[0])), 80)!r}; the columns are"
            f" {', '.join(task.features)}; next: correct doc_to_text"
        )


def _check_scoring(task: Task, definition: TaskDefinition, is_own: bool) -> None:
    """Scores stand-ins for the reply to the first document, a number and the right answer, and takes their mean."""
    document = next(iter(task.eval_docs))
    found: list[Any] = []
    failed: list[BaseException] = []
    for text in ("1", _right_answer(task, document)):
        try:
            found += _scored(task, document, text)
        except Exception as error:
            # Lacking packages and data fail again. nltk raises a bare LookupError.
            if isinstance(error, (ImportError, OSError)) or type(error) is LookupError:
                raise Fails("", error) from error
            if _is_of_task(error, definition):
                return
            failed.append(error)
    if not found:
        raise Fails("no reply can be scored", failed[0]) from failed[0]
    if not is_own:
        return
    _check_scores(task, found, str(definition.file))
    for name, function in task.aggregation().items():
        try:
            if values := [scores[name] for scores in found if name in scores]:
                function(values)
        except Exception as error:
            raise Fails(
                f"metric_list: {name}: the scores {cut(repr(values), 80)} cannot be aggregated", error
            ) from error


def _scored(task: Task, document: Any, text: str) -> list[Any]:
    """The scores of a reply as each filter finds it."""
    requests = copy.deepcopy(task.instances)
    for request in requests:
        request.resps = [REPLIES.get(request.request_type, text)]
    instances, task._instances = task.instances, requests
    try:
        task.apply_filters()
    finally:
        task._instances = instances
    return [
        task.process_results(document, [request.filtered_resps[name] for request in requests])
        for name in requests[0].filtered_resps
    ]


def _check_scores(task: ConfigurableTask, scored: Sequence[Any], where: str) -> None:
    named = [entry["metric"] for entry in task.config.metric_list or () if isinstance(entry["metric"], str)]
    for scores in scored:
        if not isinstance(scores, Mapping):
            raise SftError(f"{where}: process_results gives {scores!r}, expected {{metric: score}}; next: correct it")
        if lacks := [name for name in named if name not in scores and name != "bypass"]:
            raise SftError(
                f"{where}: metric_list: {lacks[0]!r} is no score of this task, which has {', '.join(map(str, scores)) or 'none'}; next:"
                " correct metric_list or process_results"
            )


def _right_answer(task: Task, document: Any) -> str:
    target = task.doc_to_target(document)
    return str(target[0] if isinstance(target, list) and target else target)


def _is_of_task(error: BaseException, definition: TaskDefinition) -> bool:
    """Whether an exception passed through code of the task, rather than through lm-eval's alone."""
    files = {Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)}
    return any(file.is_relative_to(definition.folder) or file.is_relative_to(SHIPPED) for file in files)
