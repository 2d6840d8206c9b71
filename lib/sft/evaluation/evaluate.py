"""The evaluate stage: scores that can be believed, or none.

In:  convert's model/, the recipe's tasks (lm-eval task files under recipes/tasks or DATA), the validation split.
Out: results.json      every score with n, standard error and 95 % interval; how replies ended; hashes of tasks and template
     samples/          one JSONL per task: prompt, reply, how it ended, what it scored
     validation.jsonl  loss and labels of every held-out conversation

A task with no samples, failed items, empty replies, replies that do not stop or a score that is not finite is broken: the
stage fails and says so, and never records a 0. Finished tasks and finished answers are reused by the next attempt; what a
signal interrupted lies in samples/<task>.incomplete.jsonl of the work folder.
Run: make evaluate RECIPE=…, or python stages/evaluate.py runs/<run>.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.common.errors import SftError
from sft.evaluation.scores import generation_facts, headline, json_hash, problems_of, sample_rows, samples_hash, scores
from sft.evaluation.statistics import Z95
from sft.model.hf import read_json
from sft.recipe import inputs

if TYPE_CHECKING:
    from sft.evaluation.recorder import Recorder
    from sft.recipe.schema import Evaluate, Hardware
    from sft.runner.stage import Result, Stage
from sft.evaluation.files import SAY_EVERY, refuse_not_finite, write_json, write_lines

_THINK_END = {"none": None, "r1_style": "</think>"}


def evaluate(stage: Stage) -> Result:
    """The stage: every task, then the validation loss; broken tasks are told together at the end."""
    from sft.runner.stage import Result

    options = stage.recipe.evaluate
    if options.harness != "lm-eval":
        from sft.evaluation import collected

        return collected.collect(stage)
    folder = stage.folder("convert") / "model"
    tasks, data = find_tasks(options, stage.find, stage.recipe.file)
    go_offline(options, tasks, stage.out / "work")
    template = check_template(folder)
    model = open_model(folder, options, stage.hardware)
    stage.log(f"{folder} on {model.about['device']} ({model.about['backend']}), {len(options.tasks)} tasks")
    results, broken = run_tasks(model, options, tasks, data, stage.out, stage.log)
    if broken:
        raise SftError("broken tasks have no score:\n  " + "\n  ".join(broken.values()))
    report: dict[str, Any] = {"template_sha256": template, **model.about, "tasks": results}
    outputs = ["results.json", "samples"]
    validation = stage.folder("prepare") / "validation"
    if options.validation_documents and validation.is_dir():
        losses = stage.out / "validation.jsonl"
        seq_len = stage.recipe.train.seq_len
        model.log = stage.log
        v = report["validation"] = validation_loss(model, validation, options.validation_documents, seq_len, losses)
        stage.log(f"validation: loss {v['loss']:.4f} ± {v['stderr'] or math.nan:.4f} over {v['documents']} documents")
        outputs.append(losses.name)
    refuse_not_finite(report)
    write_json(stage.out / "results.json", report)
    (stage.out / "samples").mkdir(exist_ok=True)
    metrics: dict[str, Any] = {name: result["metrics"] for name, result in results.items()}
    if "validation" in report:
        metrics["validation"] = report["validation"]
    hashes = {name: {k: r[k] for k in ("task_sha256", "data_sha256", "samples_sha256")} for name, r in results.items()}
    metrics["asked"] = {"template_sha256": template, "tasks": hashes}
    return Result(outputs=outputs, metrics=metrics)


def _say(log: Callable[[str], None], name: str, text: str) -> None:
    log(f"{name}: {text}")


def find_tasks(options: Evaluate, find: Callable[[str, str], Path], file: str) -> tuple[Path, dict[str, Path | str]]:
    """The folder of tasks, and the data files that the recipe names (hub files as they are written). Raises SftError."""
    for name in options.tasks:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise SftError(f"{file}: [evaluate] tasks: {name!r} is not a task name")
    data = {
        name: path if inputs.is_remote(path) else find(path, f"[evaluate] data.{name}")
        for name, path in options.data.items()
    }
    return find(options.task_dir, "[evaluate] task_dir"), data


def open_model(folder: Path, options: Evaluate, hardware: Hardware, device: str = "") -> Recorder:
    """The export as the recipe asks for it. `device` = '' takes a GPU where there is one."""
    from sft.evaluation import backends

    if hardware.threads:
        import torch

        torch.set_num_threads(hardware.threads)
    return backends.open_model(
        folder,
        options.backend,
        batch_size=options.batch_size,
        max_length=options.max_length,
        think_end=_THINK_END[options.process_output],
        device=device,
        seed=options.seed,
        gpus=max(1, hardware.processes),
    )


def run_tasks(
    model: Recorder,
    options: Evaluate,
    tasks: Path,
    data: Mapping[str, Path | str],
    out: Path,
    log: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, str]]:
    """({task: result}, {broken task: why}) of every task of the recipe."""
    results: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for number, name in enumerate(options.tasks, 1):
        model.log = partial(_say, log, name)
        try:
            results[name] = one_task(model, name, options, tasks, data, out)
        except BrokenTask as error:
            broken[name] = str(error)
            log(f"{number}/{len(options.tasks)} {name}: BROKEN: {error}")
            continue
        log(f"{number}/{len(options.tasks)} {name}: {headline(results[name])}")
    return results, broken


class BrokenTask(SftError):
    """A task whose numbers would mislead."""


def go_offline(options: Evaluate, tasks: Path, work: Path) -> None:
    """Forbids the hub when every task is a local one; keeps what `datasets` caches inside the work folder.

    Must run before datasets or huggingface_hub are imported: they read these variables once.
    """
    (work / "datasets").mkdir(parents=True, exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # we have our own lines
    local = {m[1] for file in tasks.rglob("*.yaml") for m in re.finditer(r"^task:\s*([\w.-]+)", file.read_text(), re.M)}
    if set(options.tasks) <= local and not any(inputs.is_remote(path) for path in options.data.values()):
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            os.environ[name] = "1"


def check_template(folder: Path) -> str:
    """sha256 of the export's chat template. Raises SftError when there is none: prompts would be raw text."""
    file = folder / "chat_template.jinja"
    if not file.is_file():
        raise SftError(f"{file}: missing: a chat model cannot be scored on raw text; next: make convert again")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def one_task(
    model: Recorder, name: str, options: Evaluate, tasks: Path, data: Mapping[str, Path | str], out: Path
) -> dict[str, Any]:
    """The result of one task, reused from an earlier attempt that finished the very same one. Raises BrokenTask."""
    from sft.evaluation import harness
    from sft.evaluation.tasks import find

    work = out / "work"
    done, samples = work / f"{name}.json", out / "samples" / f"{name}.jsonl"
    began = time.monotonic()
    for folder in (work, samples.parent):
        folder.mkdir(parents=True, exist_ok=True)
    documents = 0
    unfinished = samples.with_suffix(".incomplete.jsonl")
    try:
        definition = find(name, tasks, data)
        hashes = definition.hashes()
        if done.is_file() and samples.is_file() and hashes.items() <= (finished := read_json(done)).items():
            model.log("finished by an earlier attempt")
            return finished
        kept = model.open_journal(work / f"{name}.replies.jsonl")
        if kept:
            model.log(f"{kept:,} answers of an earlier attempt are reused")
        task = definition.load(options.seed)
        documents = min(len(task.eval_docs), options.limit or len(task.eval_docs))
        raw = harness.run_task(model, task, limit=options.limit, seed=options.seed, system_prompt=options.system_prompt)
    except (SystemExit, KeyboardInterrupt):
        answered = incomplete_rows(model)
        write_lines(unfinished, answered)
        model.log(f"interrupted: {len(answered)} answers of {documents} documents are kept in {unfinished}")
        raise
    except Exception as error:  # lm-eval runs code of the task: what it raises is the task's fault, and no score
        if isinstance(error, SftError) or getattr(error, "errno", None):  # a full disk is not the task's fault
            raise
        trace = work / f"{name}.error.txt"
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        raise BrokenTask(f"{name}: {type(error).__name__}: {error}; the whole trace is in {trace}") from error
    rows = sample_rows(raw["samples"], model.replies)
    write_lines(samples, rows)
    unfinished.unlink(missing_ok=True)
    result = {
        "metrics": scores(raw),
        **generation_facts(rows),
        "num_fewshot": raw["config"].get("num_fewshot"),
        "samples_sha256": samples_hash(raw["samples"]),
        **hashes,
        "reused_replies": kept,
    }
    if problems := problems_of(result, rows, options, documents):
        raise BrokenTask(f"{name}: {'; '.join(problems)}; its samples are in {samples}")
    result["seconds"] = round(time.monotonic() - began, 1)
    write_json(done, result)
    return result


def incomplete_rows(model: Recorder) -> list[dict[str, Any]]:
    """What a task that was interrupted has been answered so far, marked as such."""
    return [
        {"incomplete": True, "prompt": prompt, **{k: v for k, v in entry.items() if k != "key"}}
        for key, prompt in dict(model.asked).items()
        for entry in model.replies.get(key, ())
    ]


def validation_loss(
    model: Recorder, folder: Path, limit: int, seq_len: int, file: Path | None = None
) -> dict[str, Any]:
    """Mean loss of a trained token over held-out conversations, its standard error over conversations, perplexity,
    and the 95 % intervals of both where there are two conversations or more.

    Writes {"item", "loss", "labels"} of every conversation to `file`; `item` names its ids and its mask.
    """
    from sft.data.dataset import Dataset

    dataset = Dataset.open(folder)
    longest = min(seq_len, model.max_length - 1)  # vLLM wants to add a token: the same cut for every backend
    documents = []
    for part, start, length in dataset.documents[["part", "start", "length"]][:limit].tolist():
        end = start + min(length, longest)
        documents.append((dataset.ids(part)[start:end].tolist(), dataset.mask(part)[start:end].tolist()))
    found, told = [], time.monotonic()
    for document, loss in zip(documents, model.losses(documents), strict=True):
        found.append((document, loss))
        if time.monotonic() - told > SAY_EVERY:
            told = time.monotonic()
            model.log(f"{len(found):,}/{len(documents):,} held-out conversations")
    losses = [loss for _, loss in found if loss[1]]
    if not losses:
        raise SftError(f"{folder}: no trained token in the first {limit} documents; next: make prepare again")
    if file:
        write_lines(file, [{"item": json_hash(d)[:16], "loss": x, "labels": n} for d, (x, n) in found if n])
    tokens = sum(n for _, n in losses)
    mean = sum(loss for loss, _ in losses) / tokens
    spread = sum((loss - mean * n) ** 2 for loss, n in losses)
    count = len(losses)
    stderr = math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else None
    result = {
        "loss": mean,
        "stderr": stderr,
        "perplexity": math.exp(min(mean, 700.0)),
        "documents": count,
        "labels": tokens,
    }
    if stderr is not None:
        low, high = mean - Z95 * stderr, mean + Z95 * stderr
        result |= {"low": low, "high": high}
        result |= {"perplexity_low": math.exp(min(low, 700.0)), "perplexity_high": math.exp(min(high, 700.0))}
    return result
