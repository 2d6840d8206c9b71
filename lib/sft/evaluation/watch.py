"""Evaluates the checkpoints of a run while training keeps them, in a process or job of its own.

In:  runs/<run>/train/stepN (kept ones, with a manifest), the recipe's [convert] and [evaluate].
Out: train/evaluations.jsonl, one record per step: scores with n, error and interval, held-out loss, reasons of broken tasks;
     train/BEST names the best step by `[evaluate] best`.

A step is converted with the fast gate, scored and recorded. Its samples stay in .work/watch-stepN-…. A step that is due for
evaluation is kept until it has been scored or marked as unscorable (sft.training.evaluations.held). Where `every` > 0, training
on this machine starts this process and closes its standard input when no more steps come; a launcher submits it as a job beside
training's. By hand: make watch RECIPE=…
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sft.checkpoint import olmo_core, step_folder
from sft.checkpoint.lora_step import open_step
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.evaluation import evaluate
from sft.evaluation.plain_text import plain_text_loss
from sft.evaluation.scores import check_finite, json_hash
from sft.evaluation.validation import validation_loss
from sft.export import convert, gate, write
from sft.formats import evaluations, manifest
from sft.formats.dataset import DatasetInfo
from sft.formats.evaluations import Evaluation
from sft.formats.identity import read_identity
from sft.formats.record import to_json
from sft.recipe import inputs
from sft.recipe.recipe import Recipe
from sft.recipe.schema import Evaluate
from sft.runner import plan
from sft.runner.plan import Place
from sft.runner.stage import Stage
from sft.sync import parts, task_data
from sft.training.evaluations import DueStep, chosen
from sft.training.uploads import destination

PAUSE = 5.0
"""Seconds between two scans of the folder."""


def watch(stage: Stage, ended: Callable[[], bool], pause: float = PAUSE) -> None:
    """Evaluates the steps that are due until `ended` says that no more come. `stage` is the training stage, as a follower.

    Raises SftError at the end when a step has no scores.
    """
    while read_identity(stage.out) != stage.identity:
        if ended():
            raise SftError(f"{stage.out}: not trained from this recipe; next: make train RECIPE={stage.recipe.name}")
        time.sleep(pause)
    for name in ("model", "whole"):  # of an attempt that was killed
        for folder in (stage.run / ".work").glob(f"watch-step*/{name}"):
            shutil.rmtree(folder, ignore_errors=True)
    failed: dict[tuple[int, str], str] = {}  # name of the folder by step and digest
    while True:
        last = ended()  # asked first, so that the next round finds a step that is saved after this
        waiting = [d for d in due(stage.out, stage.place, stage.recipe, last) if (d.step, d.digest) not in failed]
        # After training all steps have been sent, or never will be.
        step = next((d for d in waiting if last or is_here(stage, d)), None)
        if step and not try_step(stage, step):  # one step a round: newer ones may be due first
            failed[step.step, step.digest] = step.folder.name
        if not waiting and last:
            break
        if not step:
            time.sleep(pause)
    if trained(stage)():  # retention kept some steps only for their evaluation
        for doomed in step_folder.prune(stage.out, stage.recipe.train.keep):
            shutil.rmtree(doomed, ignore_errors=True)
    if failed:
        raise SftError(
            f"{len(failed)} steps have no scores: {', '.join(failed.values())}; next: fix the errors above, then make watch"
            f" RECIPE={stage.recipe.name}"
        )


def is_here(stage: Stage, due: DueStep) -> bool:
    """Whether a step can be read: this disk has all of it, or the bucket has what other nodes have written."""
    try:
        if not parts.is_part(due.folder):
            return True
    except (SftError, OSError):  # damaged, which the evaluation reports
        return True
    with contextlib.suppress(SftError, OSError):  # the bucket does not answer; the next round asks again
        return parts.is_sent(due.folder, steps_address(stage), stage.cache, wait=False)
    return False


def steps_address(stage: Stage) -> str:
    """The address of this run's steps in a bucket, or ""."""
    return destination(stage.storage, stage.recipe.run, stage.identity)


def due(train: Path, place: Place, recipe: Recipe, last: bool = False) -> list[DueStep]:
    """Kept steps that have no scores of the recipe's settings yet, among those that `[evaluate] every` selects.

    With `last`, the newest step is among them.
    """
    wanted = settings(place, recipe)
    done = {(e.step, e.checkpoint) for e in evaluations.read(train) if e.settings == wanted and e.failed is None}
    return [d for d in chosen(train, recipe.evaluate.every, last) if (d.step, d.digest) not in done]


def settings(place: Place, recipe: Recipe) -> str:
    """Hash (16 hex digits) of what makes scores comparable: options that change results, the limit, tasks and their data."""
    cache, tables = HashCache(place.cache), ("convert", "evaluate")
    files = [to_json(plan.input_files(place, recipe, table, cache)) for table in tables]
    return json_hash([*map(recipe.config, tables), recipe.evaluate.every_limit, files])[:16]


def try_step(stage: Stage, step: DueStep) -> bool:
    """Evaluates a step. An error is logged and recorded, and must not end the evaluation of other steps: returns False."""
    try:
        evaluate_step(stage, step)
    except (SftError, OSError, RuntimeError, ValueError) as error:
        reason = str(error) if isinstance(error, SftError) else repr(error)
        stage.log(f"{step.folder.name} has no scores: {reason}")
        record(stage, Evaluation(step=step.step, checkpoint=step.digest, settings=settings(stage.place, stage.recipe),
                                 tasks={}, failed=reason))  # fmt: skip
        return False
    return True


def evaluate_step(stage: Stage, step: DueStep) -> None:
    """Converts, scores and records one step. Raises SftError when it cannot be scored."""
    began = time.monotonic()
    options = stage.recipe.evaluate
    options = dataclasses.replace(options, limit=options.every_limit or options.limit)
    wanted = settings(stage.place, stage.recipe)
    out = stage.run / ".work" / f"watch-{step.folder.name}-{step.digest[:8]}-{wanted[:8]}"
    model_folder = out / "model"
    tasks, data = evaluate.find_tasks(options, stage.find, stage.recipe.file)
    fetched = task_data.bring(stage.place, stage.recipe, stage.cluster, stage.log)
    evaluate.go_offline(options, tasks, out / "work", fetched)
    with parts.joined(step.folder, steps_address(stage), out / "whole", stage.cache, stage.log) as whole:
        export(stage, whole, model_folder)
    template = evaluate.check_template(model_folder)
    hardware = stage.recipe.hardware(stage.place.cluster, "evaluate")
    model = evaluate.open_model(
        model_folder, options, hardware, stage.recipe.prepare.date, options.every_device.partition(":")[0]
    )
    results, broken_tasks, groups = evaluate.run_tasks(model, options, tasks, data, out, stage.log)
    loss, validation = None, stage.dataset / "validation"
    if options.validation_documents and validation.is_dir():
        loss = validation_loss(model, validation, options.validation_documents, stage.recipe.train.seq_len)
    text_loss = None
    if texts := inputs.plain_text(options, lambda path: stage.find(path, "[evaluate] plain_text")):
        text_loss = plain_text_loss(model, texts)
    evaluation = Evaluation(
        step=step.step, checkpoint=step.digest, settings=wanted, template_sha256=template, plain_text=text_loss,
        tasks={n: g.metrics for n, g in groups.items()} | {n: r.metrics for n, r in results.items()}, broken=broken_tasks, validation=loss,
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip
    check_finite(evaluation)
    best = mark_best(stage, step, evaluation, options)
    record(stage, evaluation)
    for folder in (model_folder, out / "work", out / "whole"):
        shutil.rmtree(folder, ignore_errors=True)
    stage.log(f"{step.folder.name}: evaluated in {evaluation.seconds:.0f} s{best}")


def mark_best(stage: Stage, step: DueStep, evaluation: Evaluation, options: Evaluate) -> str:
    """Names the step in BEST if its score is the best so far. Returns what the log line says about it."""
    score = best_score(evaluation, options)
    if score is None:
        return ""
    text = f", {score[0]} {score[1]:.4f}"
    if not (step.folder / manifest.NAME).is_file():  # training did not know of `every`
        return text + "; train.keep has already removed the step, so BEST cannot name it"
    return text + (", the best so far" if step_folder.mark_best(stage.out, step.step, *score) else "")


def record(stage: Stage, evaluation: Evaluation) -> None:
    """Writes an evaluation in place of an earlier one of its step. From now on retention may remove the step."""
    others = [e for e in evaluations.read(stage.out) if e.step != evaluation.step]
    evaluations.write(stage.out, [*others, evaluation])


def best_score(evaluation: Evaluation, options: Evaluate) -> tuple[str, float, bool] | None:
    """(name, value, higher is better) of `[evaluate] best`. None when its task is broken or its metric has no direction."""
    task, _, metric = (options.best or options.tasks[0]).partition("/")
    if task == "validation":
        loss = evaluation.validation
        return ("validation/loss", loss.loss, False) if loss else None
    metrics = evaluation.tasks.get(task, {})
    metric = metric or next(iter(metrics), "")
    score = metrics.get(metric)
    if score is None or score.higher_is_better is None:
        return None
    return f"{task}/{metric}", score.value, score.higher_is_better


def export(stage: Stage, step: Path, target: Path) -> None:
    """Writes the step as a Hugging Face folder and checks it with the fast gate."""
    facts = DatasetInfo.of(stage.dataset).facts
    options = dataclasses.replace(stage.recipe.convert, gate="fast")
    config = convert.trained_config(stage.recipe.model, facts.vocab_size, step)
    base_facts = olmo_core.base_facts(step / "config.json")
    options, _ = convert.with_length(
        options, config, base_facts, stage.recipe.train.seq_len, extended=stage.recipe.model.names_scaling
    )
    tokenizer = stage.out / "tokenizer"
    trained_template = (tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    template = convert.evaluation_template(options.eval_template, stage.find) or trained_template

    def quiet(_: str) -> None:
        pass

    weights = open_step(step, lambda: stage.base, config, stage.recipe.train.seed, stage.sha256)
    try:
        write.export(write.Trained(weights, config, facts, tokenizer, base_facts), template, options, target, quiet)
        gate.check(target, weights, config, facts, trained_template, options, quiet)
    finally:
        weights.close()


def end_of_input() -> Callable[[], bool]:
    """A function that returns whether standard input is closed. Training closes it at its end, the system when training is killed."""
    closed = threading.Event()

    def read() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would block the end of Python
            pass
        closed.set()

    threading.Thread(target=read, daemon=True).start()
    return closed.is_set


def trained(stage: Stage) -> Callable[[], bool]:
    """A function that returns whether the training stage has been published."""

    def published() -> bool:
        try:
            return bool(manifest.load(stage.out / manifest.NAME).key == stage.key)
        except (FileNotFoundError, SftError):
            return False

    return published
