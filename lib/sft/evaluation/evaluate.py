"""The evaluate stage: scores that can be believed, or none.

In:  convert's model/ (or the model that [convert] model names), the recipe's tasks (lm-eval task files under recipes/tasks or DATA), the validation split.
Out: results.json      every score with n, standard error and 95 % interval; how replies ended; hashes of tasks and template
     samples/          one JSONL file per task: prompt, reply, how it ended, its scores
     validation.jsonl  loss of every held-out conversation
     plain_text.jsonl  loss of every text that is no chat

A task is broken when it has no samples, failed items, empty replies, replies that do not stop, or a score that is not finite.
Then the stage fails and lists the reasons; it never records a 0. The next attempt reuses finished tasks and answers. After a
signal, samples/<task>.incomplete.jsonl in the work folder has the answers so far.
Run: make evaluate RECIPE=…, or python stages/evaluate.py runs/<run>.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.common.machine import OFFLINE, cores, visible_gpus
from sft.evaluation import collected, stops
from sft.evaluation.plain_text import plain_text_loss
from sft.evaluation.scores import (
    check_finite,
    generation,
    problems_of,
    sample_records,
    samples_hash,
    scores,
    summary,
)
from sft.evaluation.validation import validation_loss
from sft.evaluation.workers import Worker
from sft.formats import results as results_format
from sft.formats.lines import to_lines
from sft.formats.results import Asking, GroupResult, Results, TaskResult
from sft.formats.samples import UnscoredReply
from sft.recipe import inputs
from sft.recipe.schema import Evaluate, Hardware
from sft.runner.processes import evaluation_backend, requested_gpus
from sft.runner.stage import Result, Stage
from sft.sync import task_data

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from sft.evaluation.answers import Answers
    from sft.evaluation.recorder import Recorder  # imports torch and lm-eval
    from sft.evaluation.tasks import DefinitionHashes, TaskDefinition


def evaluate(stage: Stage) -> Result:
    """The stage: every task, then the validation loss. Raises SftError that lists all broken tasks at the end."""
    options = stage.recipe.evaluate
    if options.harness != "lm-eval":
        return collected.collect(stage)
    if not stage.recipe.convert.model:
        return score(stage, stage.folder("convert") / "model", stage.out, stage.hardware)
    from sft.export.other_model import assemble  # start-up: torch takes two seconds

    work = stage.out / "work"
    files, commit = assemble(stage, work / "model")
    result = score(stage, work / "model", stage.out, stage.hardware)
    shutil.rmtree(work)
    return Result([*result.outputs, *files], {**result.metrics, **({"model_commit": commit} if commit else {})})


def score(stage: Stage, folder: Path, out: Path, hardware: Hardware) -> Result:
    """Scores the model in a folder and writes the files of the stage to `out`. Raises SftError that lists all broken tasks."""
    options = stage.recipe.evaluate
    require_gpus(stage, hardware)
    tasks, data = find_tasks(options, stage.find, stage.recipe.file)
    go_offline(options, tasks, out / "work", task_data.bring(stage.place, stage.recipe, stage.cluster, stage.log))
    template = check_template(folder)
    model = open_model(folder, options, hardware, stage.recipe.prepare.date)
    count = 1 + len(model.workers)
    stage.log(
        f"{folder} on {model.about.device} ({model.about.backend}, {model.choice.reason}), {len(options.tasks)} tasks"
        + (f", {count} processes" if count > 1 else "")
    )
    scored = run_tasks(model, options, tasks, data, out, stage.log)
    if scored.broken:
        raise SftError("broken tasks have no score:\n  " + "\n  ".join(scored.broken.values()))
    outputs = [
        results_format.NAME,
        *(r.samples or f"{results_format.SAMPLES}/{n}.jsonl" for n, r in scored.results.items()),
    ]
    loss = None
    validation = stage.folder("prepare") / "validation"
    if options.validation_documents and validation.is_dir():
        file = out / results_format.VALIDATION
        model.log = stage.log
        loss = validation_loss(model, validation, options.validation_documents, stage.recipe.train.seq_len, file)
        stage.log(f"validation: loss {loss.loss:.4f} ± {loss.stderr or math.nan:.4f} over {loss.documents} documents")
        outputs.append(file.name)
    text_loss = None
    if texts := inputs.plain_text(options, lambda path: stage.find(path, "[evaluate] plain_text")):
        text_loss = plain_text_loss(model, texts, out / results_format.PLAIN_TEXT)
        stage.log(
            f"plain text: loss {text_loss.loss:.4f}, perplexity {text_loss.perplexity:.2f} over {text_loss.documents} texts"
        )
        outputs.append(results_format.PLAIN_TEXT)
    results = Results(template_sha256=template, **model.about._asdict(), backend_reason=model.choice.reason, processes=count, tasks=scored.results,
                      groups=scored.groups or None, validation=loss, plain_text=text_loss)  # fmt: skip
    check_finite(results)
    results.write(out / results_format.NAME)
    (out / results_format.SAMPLES).mkdir(exist_ok=True)
    return Result(outputs=outputs, metrics=results.metrics.to_value())


def find_tasks(options: Evaluate, find: Callable[[str, str], Path], file: str) -> tuple[Path, dict[str, Path | str]]:
    """The folder of tasks, and the data files that the recipe names (hub files as they are written). Raises SftError."""
    for name in options.tasks:
        if not inputs.TASK.fullmatch(name):
            raise SftError(f"{file}: [evaluate] tasks: {name!r} is not a task name; next: correct it")
    data = {
        name: path if inputs.is_remote(path) else find(path, f"[evaluate] data.{name}")
        for name, path in options.data.items()
    }
    return inputs.task_folder(options, lambda path: find(path, "[evaluate] task_dir")), data


def go_offline(options: Evaluate, tasks: Path, work: Path, fetched: Path | None = None) -> None:
    """Forbids the hub when every task is a local one; keeps the cache of `datasets` inside the work folder.

    Data sets of the hub are kept in `fetched`, where they are found again without the hub. What came there from the cluster's storage
    is complete, so the hub is not asked.

    Must run before datasets or huggingface_hub are imported: they read these variables once.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # our own log lines report progress
    local = {m[1] for file in tasks.rglob("*.yaml") for m in re.finditer(r"^task:\s*([\w.-]+)", file.read_text(), re.M)}
    is_local = set(options.tasks) <= local and not any(inputs.is_remote(path) for path in options.data.values())
    cache = work / "datasets" if is_local or fetched is None else fetched
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    if any(inputs.is_remote(path) for path in options.data.values()):
        os.environ["HF_HUB_CACHE"] = str(cache / "hub")
    if is_local or (cache / task_data.BROUGHT).is_file():
        os.environ |= dict.fromkeys(OFFLINE, "1")


def check_template(folder: Path) -> str:
    """sha256 (hex) of the model's chat template. Raises SftError without one: prompts would be raw text."""
    file = folder / "chat_template.jinja"
    if not file.is_file():
        raise SftError(f"{file}: missing: a chat model cannot be scored on raw text; next: make convert again")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def require_gpus(stage: Stage, hardware: Hardware) -> None:
    """Raises SftError where a GPU is planned or visible and torch cannot use it."""
    requested = requested_gpus("evaluate", hardware, stage.cluster)
    if requested or visible_gpus():
        from sft.model.gpus import check_gpus  # start-up: torch takes two seconds

        check_gpus(requested, stage.cluster, f"env/{stage.place.cluster}.toml")


def open_model(folder: Path, options: Evaluate, hardware: Hardware, date: str, device: str = "") -> Recorder:
    """The model with the recipe's backend, and the day that its template writes. `device` = '' takes a GPU if there is one."""
    from sft.evaluation import backends  # start-up: lm-eval takes seconds, and go_offline must run before it

    found = [] if device == "cpu" else visible_gpus()
    choice = evaluation_backend(options.backend, len(found), importlib.util.find_spec("vllm") is not None)
    per_process = hardware.tensor_parallel if choice.backend == "vllm" else 1
    count = 1 if device or choice.backend == "server" else hardware.processes or max(1, len(found) // per_process)
    if found and count * per_process > len(found):
        raise SftError(
            f"[on.<cluster>.evaluate] processes = {count} x tensor_parallel = {per_process}: {len(found)} GPUs are visible; next: lower one of them"
        )
    threads = hardware.threads or (max(1, cores() // count) if count > 1 else 0)
    opener = partial(
        backends.open_model,
        folder,
        choice.backend,
        batch_size=options.batch_size,
        max_length=options.max_length,
        think_end=stops.THINK_ENDS[options.process_output],
        device=device,
        gpus=per_process,
        base_url=options.base_url,
        served_model=options.served_model,
    )
    workers = []
    for number in range(1, count):
        gpus = ",".join(found[number * per_process : (number + 1) * per_process]) if found else None
        workers.append(Worker(number, partial(opener, seed=options.seed + number), threads, gpus))
    if threads:
        import torch  # start-up: torch takes two seconds

        torch.set_num_threads(threads)
    model = opener(seed=options.seed)
    model.date, model.workers, model.choice = date, workers, choice
    return model


class TaskScores(NamedTuple):
    """What became of the tasks of a recipe: results and reasons of broken ones by task, and scores of groups."""

    results: dict[str, TaskResult]
    broken: dict[str, str]
    groups: dict[str, GroupResult]


def run_tasks(
    model: Recorder,
    options: Evaluate,
    tasks: Path,
    data: Mapping[str, Path | str],
    out: Path,
    log: Callable[[str], None],
) -> TaskScores:
    """Every task of the recipe, and every task of its groups."""
    from sft.evaluation.groups import group_results  # start-up: lm-eval takes seconds

    results: dict[str, TaskResult] = {}
    broken: dict[str, str] = {}
    wanted, groups = _expand(options.tasks, tasks, data, broken)
    loaded, ahead = _answer_groups(model, options, wanted, tasks, data, out, log)
    for number, (name, (named, definition)) in enumerate(wanted.items(), 1):
        model.log = partial(_log_task, log, name)
        try:
            found = loaded.get(name) or load_task(
                model, name, options.for_task(named, name), tasks, data, out, definition
            )
            results[name] = found if isinstance(found, TaskResult) else score_task(model, found, ahead.get(named))
        except BrokenTask as error:
            broken[name] = str(error)
            log(f"{number}/{len(wanted)} {name}: BROKEN: {error}")
            continue
        log(f"{number}/{len(wanted)} {name}: {summary(results[name])}")
    scores = group_results(groups, results)
    for name, group in scores.items():
        metric, score = next(iter(group.metrics.items()))
        log(f"{name}: {metric} {score.value:.3f} over {len(group.tasks)} tasks, n {score.n}")
    return TaskScores(results, broken, scores)


def _expand(
    names: Sequence[str], folder: Path, data: Mapping[str, Path | str], broken: dict[str, str]
) -> tuple[dict[str, tuple[str, TaskDefinition | None]], dict[str, Group]]:
    """(tasks by name; groups). A task has the recipe's name for it, and its definition if it is a group's member.

    A group that cannot be loaded goes to `broken`.
    """
    from sft.evaluation import tasks as lm_eval_tasks  # start-up: lm-eval takes seconds

    wanted: dict[str, tuple[str, TaskDefinition | None]] = {}
    groups: dict[str, Group] = {}
    for name in names:
        members: list[tuple[str, TaskDefinition | None]] = [(name, None)]
        try:
            definition = lm_eval_tasks.find(name, folder, data)
            if definition.is_group:
                expanded, found = definition.expand()
                members = [(d.name, d) for d in expanded]
                groups |= found
        except Exception as error:
            if isinstance(error, SftError) or getattr(error, "errno", None):
                raise
            broken[name] = f"{name}: {type(error).__name__}: {error}"
            continue
        for member, of_group in members:
            if member in wanted:
                raise SftError(f"[evaluate] tasks: {member} is named twice, by itself or by a group; next: remove one")
            wanted[member] = name, of_group
    return wanted, groups


def _answer_groups(
    model: Recorder,
    options: Evaluate,
    wanted: Mapping[str, tuple[str, TaskDefinition | None]],
    tasks: Path,
    data: Mapping[str, Path | str],
    out: Path,
    log: Callable[[str], None],
) -> tuple[dict[str, LoadedTask | TaskResult], dict[str, Answers]]:
    """(the tasks of groups that could be loaded, answers by the recipe's name of the group). See sft.evaluation.ahead."""
    from sft.evaluation import ahead  # start-up: lm-eval takes seconds

    loaded: dict[str, LoadedTask | TaskResult] = {}
    answers: dict[str, Answers] = {}
    for group in dict.fromkeys(named for named, definition in wanted.values() if definition is not None):
        model.log = partial(_log_task, log, group)
        members = []
        for name, (named, definition) in wanted.items():
            if named == group:
                with contextlib.suppress(BrokenTask):  # its own turn says so
                    found = loaded[name] = load_task(
                        model, name, options.for_task(named, name), tasks, data, out, definition
                    )
                    if isinstance(found, LoadedTask):
                        members.append(found)
        files = TaskFiles(out, group)
        if reused := model.open_journal(files.journal):
            model.log(f"{reused:,} answers of an earlier attempt are reused")
        try:
            documents = sum(task.documents for task in members)
            with _broken_by_error(group, files.trace), _keep_answers(model, files.incomplete, documents):
                ahead.answer(model, [ahead.Member(m.task, m.options, m.asked) for m in members])
        except BrokenTask as error:
            log(f"each task is answered by itself: {error}")
        files.incomplete.unlink(missing_ok=True)
        answers[group] = model.answers
    return loaded, answers


def _log_task(log: Callable[[str], None], name: str, text: str) -> None:
    log(f"{name}: {text}")


class BrokenTask(SftError):
    """A task whose scores would mislead."""


class TaskFiles:
    """The files of one task in the work folder."""

    def __init__(self, out: Path, name: str) -> None:
        work, samples = out / "work", out / results_format.SAMPLES
        self.result = work / f"{name}.json"  # there when the task is finished
        self.journal = work / f"{name}.replies.jsonl"
        self.trace = work / f"{name}.error.txt"
        self.samples = samples / f"{name}.jsonl"
        self.incomplete = samples / f"{name}.incomplete.jsonl"
        for folder in (work, samples):
            folder.mkdir(parents=True, exist_ok=True)

    def finished(self, hashes: DefinitionHashes) -> TaskResult | None:
        """The result of an earlier attempt at this very task."""
        if not (self.result.is_file() and self.samples.is_file()):
            return None
        found = TaskResult.read(self.result)
        same = (found.task_sha256, found.data_sha256, found.lm_eval) == hashes
        return found if same else None


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data, and with the recipe's options set in it."""

    name: str
    options: Evaluate
    files: TaskFiles
    hashes: DefinitionHashes
    task: Task
    asked: Asking

    @property
    def documents(self) -> int:
        """How many of its questions are asked."""
        return min(len(self.task.eval_docs), self.options.limit or len(self.task.eval_docs))


def run_task(
    model: Recorder, name: str, options: Evaluate, tasks: Path, data: Mapping[str, Path | str], out: Path
) -> TaskResult:
    """The result of one task, or that of an earlier attempt. Raises as `load_task` and `score_task`."""
    found = load_task(model, name, options, tasks, data, out)
    return found if isinstance(found, TaskResult) else score_task(model, found)


def load_task(
    model: Recorder,
    name: str,
    options: Evaluate,
    tasks: Path,
    data: Mapping[str, Path | str],
    out: Path,
    definition: TaskDefinition | None = None,
) -> LoadedTask | TaskResult:
    """A task, or its result by an earlier attempt. Raises BrokenTask, and SftError for what is not the task's fault."""
    from sft.evaluation import asking  # start-up: lm-eval takes seconds, and go_offline must run before it
    from sft.evaluation import tasks as lm_eval_tasks  # start-up: the same

    files = TaskFiles(out, name)
    with _broken_by_error(name, files.trace):
        definition = definition or lm_eval_tasks.find(name, tasks, data)
        hashes = definition.hashes()
        if finished := files.finished(hashes):
            model.log("finished by an earlier attempt")
            return finished
        task = definition.load(options.seed)
        return LoadedTask(name, options, files, hashes, task, asking.ask(task, options, model.max_length))


def score_task(model: Recorder, loaded: LoadedTask, ahead: Answers | None = None) -> TaskResult:
    """Answers and scores a task. `ahead`: answers to requests of its group. Raises as `load_task`."""
    from sft.evaluation import asking, harness  # start-up: lm-eval takes seconds, and go_offline must run before it

    began = time.monotonic()
    name, options, files, task, asked = loaded.name, loaded.options, loaded.files, loaded.task, loaded.asked
    with _broken_by_error(name, files.trace):
        if reused := model.open_journal(files.journal, ahead):
            model.log(f"{reused:,} answers of an earlier attempt are reused")
        asking.set_thinking(model, options, asked)
        with _keep_answers(model, files.incomplete, loaded.documents):
            output = harness.run_task(
                model,
                task,
                limit=options.limit,
                seed=options.seed,
                system_prompt=options.system_prompt,
                multiturn=options.fewshot_as_multiturn,
                draws=asked.samples or 1,
            )
    if ahead:
        reused += len({key for key, _ in model.requested} & ahead.earlier)
    samples = sample_records(output.samples, model.answers.replies)
    write_atomic(files.samples, to_lines(samples))
    files.incomplete.unlink(missing_ok=True)
    result = TaskResult(
        metrics=scores(output),
        generation=generation(samples),
        num_fewshot=output.config.get("num_fewshot"),
        asking=asked,
        samples_sha256=samples_hash(output.samples),
        **loaded.hashes._asdict(),
        reused_replies=reused,
    )
    if problems := problems_of(result, samples, options, loaded.documents):
        raise BrokenTask(f"{name}: {'; '.join(problems)}; its samples are in {files.samples}")
    result = replace(result, seconds=round(time.monotonic() - began, 1))
    result.write(files.result)
    return result


@contextlib.contextmanager
def _broken_by_error(name: str, trace: Path) -> Iterator[None]:
    """Raises BrokenTask for an exception of the task's own code, which lm-eval runs, and writes its trace to a file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SftError) or getattr(error, "errno", None):  # a full disk is not the task's fault
            raise
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        raise BrokenTask(f"{name}: {type(error).__name__}: {error}; the complete trace is in {trace}") from error


@contextlib.contextmanager
def _keep_answers(model: Recorder, file: Path, documents: int) -> Iterator[None]:
    """Writes the answers so far to a file when a signal interrupts the task."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        prompts = dict(model.requested)
        unscored = [UnscoredReply(prompts[key], a) for key in prompts for a in model.answers.of(key)]
        write_atomic(file, to_lines(unscored))
        model.log(f"interrupted: {len(unscored)} answers of {documents} documents are kept in {file}")
        raise
