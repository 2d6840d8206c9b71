"""Evaluates the checkpoints of a run as training keeps them, in a process or job of its own.

In:  runs/<run>/train/stepN (kept ones, with a manifest), the recipe's [convert] and [evaluate].
Out: train/evaluations.jsonl, one record per step: scores with n, error and interval, held-out loss, broken tasks with why;
     train/BEST names the best step by `[evaluate] best`.

A step is converted with the fast gate, scored and recorded; its samples stay in .work/watch-stepN-…. Training removes no
step that is due before it has its record (`held`). Where `every` > 0, training on this machine starts this itself and closes
its standard input when no more steps come; a launcher submits it as a job beside training's. By hand: make watch RECIPE=…
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.common.hashcache import HashCache
from sft.evaluation.scores import json_hash
from sft.formats import manifest
from sft.formats.dataset import DatasetInfo
from sft.formats.manifest import StepManifest
from sft.runner import plan

if TYPE_CHECKING:
    from sft.recipe.recipe import Recipe
    from sft.recipe.schema import Evaluate
    from sft.runner.plan import Place
    from sft.runner.stage import Stage
from sft.training.evaluations import NAME, chosen, records

PAUSE = 5.0  # seconds between looks at the folder


def watch(stage: Stage, ended: Callable[[], bool], pause: float = PAUSE) -> None:
    """Evaluates what is due until `ended` says that no more steps come. `stage` is the training stage, as a follower."""
    from sft.checkpoint import step_folder

    mark = stage.out / ".identity"
    while not mark.is_file() or mark.read_text() != stage.identity:
        if ended():
            raise SftError(f"{stage.out}: not trained from this recipe; next: make train RECIPE={stage.recipe.name}")
        time.sleep(pause)
    for folder in (stage.run / ".work").glob("watch-step*/model"):  # of an attempt that was killed
        shutil.rmtree(folder, ignore_errors=True)
    failed: dict[tuple[str, str], str] = {}  # by step and the digest of its manifest
    while True:
        last = ended()  # before looking: a step that is saved in between is found in the next round
        waiting = [d for d in due(stage.out, stage.place, stage.recipe, last) if (d[0].name, d[1]) not in failed]
        for step, digest in waiting[:1]:  # one, then a look whether it is still the first
            try:
                evaluate_step(stage, step, digest)
            except (SftError, OSError, RuntimeError, ValueError) as error:  # must not end the others' evaluation
                why = str(error) if isinstance(error, SftError) else repr(error)
                failed[step.name, digest] = step.name
                stage.log(f"{step.name} has no scores: {why}")
                record(stage, step, digest, {"tasks": {}, "broken": {}, "failed": why})
        if not waiting and last:
            break
        if not waiting:
            time.sleep(pause)
    if trained(stage)():  # what was held for this
        for doomed in step_folder.prune(stage.out, stage.recipe.train.keep):
            shutil.rmtree(doomed, ignore_errors=True)
    if failed:
        raise SftError(
            f"{len(failed)} steps have no scores: {', '.join(failed.values())}; next: mend the above, then make watch RECIPE={stage.recipe.name}"
        )


def due(train: Path, place: Place, recipe: Recipe, last: bool = False) -> list[tuple[Path, str]]:
    """(folder, digest of its manifest) of kept steps that are to be evaluated and are not yet: the first at or after each multiple of `every`, and the newest
    when it is the last one."""
    wanted = asked(place, recipe)
    done = {(r["step"], r["checkpoint"]) for r in records(train) if r["asked"] == wanted and "failed" not in r}
    return [(folder, digest) for number, folder, digest in chosen(train, recipe.evaluate.every, last)
            if (number, digest) not in done]  # fmt: skip


def asked(place: Place, recipe: Recipe) -> str:
    """Names what makes scores comparable: options that change results, the limit during training, tasks and their data."""
    cache, tables = HashCache(place.cache), ("convert", "evaluate")
    files = [plan.input_files(place, recipe, table, cache) for table in tables]
    return json_hash([*map(recipe.config, tables), recipe.evaluate.every_limit, files])[:16]


def evaluate_step(stage: Stage, step: Path, digest: str) -> None:
    """Converts, scores and records one step. Raises SftError when there is nothing to be scored."""
    from sft.evaluation import evaluate, files

    began = time.monotonic()
    options = stage.recipe.evaluate
    options = dataclasses.replace(options, limit=options.every_limit or options.limit)
    out = stage.run / ".work" / f"watch-{step.name}-{digest[:8]}-{asked(stage.place, stage.recipe)[:8]}"
    model_folder = out / "model"
    if broken := manifest.broken_outputs(step, StepManifest.read(step / manifest.NAME).outputs):
        raise SftError("; ".join(broken))
    tasks, data = evaluate.find_tasks(options, stage.find, stage.recipe.file)
    evaluate.go_offline(options, tasks, out / "work")
    export(stage, step, model_folder)
    template = evaluate.check_template(model_folder)
    hardware = stage.recipe.hardware(stage.place.cluster, "evaluate")
    model = evaluate.open_model(model_folder, options, hardware, options.every_device.partition(":")[0])
    results, broken_tasks = evaluate.run_tasks(model, options, tasks, data, out, stage.log)
    found: dict[str, Any] = {
        "template_sha256": template,
        "tasks": {name: result["metrics"] for name, result in results.items()},
        "broken": broken_tasks,
    }
    validation = stage.dataset / "validation"
    if options.validation_documents and validation.is_dir():
        found["validation"] = evaluate.validation_loss(
            model, validation, options.validation_documents, stage.recipe.train.seq_len
        )
    files.refuse_not_finite(found)
    found["seconds"] = round(time.monotonic() - began, 1)
    told = f"{step.name}: evaluated in {found['seconds']:.0f} s"
    if best := score(found, options):
        from sft.checkpoint.step_folder import mark_best

        told += f", {best[0]} {best[1]:.4f}"
        if not (step / manifest.NAME).is_file():  # training was not told of `every`
            told += "; train.keep has removed it meanwhile, so BEST cannot name it"
        elif mark_best(stage.out, int(step.name.removeprefix("step")), *best):
            told += ", the best so far"
    record(stage, step, digest, found)
    for folder in (model_folder, out / "work"):
        shutil.rmtree(folder, ignore_errors=True)
    stage.log(told)


def record(stage: Stage, step: Path, digest: str, found: Mapping[str, Any]) -> None:
    """Writes what was found of a step in place of what was known of it. From now on retention may remove the step."""
    number = int(step.name.removeprefix("step"))
    line = {"step": number, "checkpoint": digest, "asked": asked(stage.place, stage.recipe), **found}
    lines = sorted([*(r for r in records(stage.out) if r["step"] != number), line], key=lambda r: int(r["step"]))
    write_atomic(stage.out / NAME, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines).encode())


def score(record: Mapping[str, Any], options: Evaluate) -> tuple[str, float, bool] | None:
    """(name, value, whether higher is better) of `[evaluate] best`; None where that task is broken or has no direction."""
    task, _, metric = (options.best or options.tasks[0]).partition("/")
    if task == "validation":
        return ("validation/loss", record["validation"]["loss"], False) if "validation" in record else None
    scores = record["tasks"].get(task, {})
    metric = metric or next(iter(scores), "")
    found = scores.get(metric, {})
    if found.get("higher_is_better") is None:
        return None
    return f"{task}/{metric}", found["value"], found["higher_is_better"]


def export(stage: Stage, step: Path, target: Path) -> None:
    """The step as a Hugging Face folder that has passed the fast gate."""
    from sft.checkpoint.dcp_reader import DcpReader
    from sft.export import convert, gate, write

    facts = DatasetInfo.of(stage.dataset).facts
    options = dataclasses.replace(stage.recipe.convert, gate="fast")
    config = convert.model_config(stage.recipe.model, facts.vocab_size, step)
    tokenizer = stage.out / "tokenizer"
    trained = (tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    template = convert.evaluation_template(options.eval_template, stage.find) or trained

    def quiet(_: str) -> None:
        pass

    weights = DcpReader(step)
    try:
        write.export(weights, config, facts, tokenizer, target, options, template, quiet)
        gate.check(target, weights, config, facts, trained, options, quiet)
    finally:
        weights.close()


def end_of_input() -> Callable[[], bool]:
    """Says whether standard input has been closed, which training does when it is done, and the system when it is killed."""
    closed = threading.Event()

    def read() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock Python could not get at its end
            pass
        closed.set()

    threading.Thread(target=read, daemon=True).start()
    return closed.is_set


def trained(stage: Stage) -> Callable[[], bool]:
    """Says whether the training stage has been published."""

    def done() -> bool:
        try:
            return bool(manifest.load(stage.out / manifest.NAME).key == stage.key)
        except (FileNotFoundError, SftError):
            return False

    return done
