"""Rules of a recipe that need more than one field. `check` returns a line for each one that is broken.

Types and bounds of single fields are those of `sft.recipe.schema`, and `sft.recipe.typed` checks them.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from typing import Any

from sft.common.errors import SftError
from sft.recipe import chat_templates, presets, resolve, schema
from sft.recipe.typed import did_you_mean

FEW_ROWS = 32  # an integer weight below this is taken for a multiple written without its ".0"


def check(values: dict[str, Any], on: dict[str, dict[str, schema.Hardware]]) -> list[str]:
    """Checks that need more than one field."""
    problems = []
    model, train = values["model"], values["train"]
    problems += _check_rendering(values["prepare"])
    problems += _check_groups(values["prepare"])
    for source in values["prepare"].sources:
        if isinstance(source.weight, int) and source.weight < FEW_ROWS:
            n = source.weight
            problems.append(f"'weight' of {source.path} in [[prepare.sources]] = {n} would be {n} row{'s' * (n > 1)} in all: an integer"
                            f" is a number of rows; write {n}.0 for the whole source {n} times, or max_documents = {n}")  # fmt: skip
    if not model.preset:
        if not model.base:
            problems.append(f"'preset' in [model] is missing: random weights need one (presets: {', '.join(presets.PRESETS)});"
                            " weights of a base need only 'base'")  # fmt: skip
    elif model.preset not in presets.PRESETS:
        problems.append(f"'preset' in [model] = {model.preset!r}{did_you_mean(model.preset, presets.PRESETS)}"
                        f" (presets: {', '.join(presets.PRESETS)})")  # fmt: skip
    else:
        try:
            resolve.resolve(model)
        except SftError as e:
            problems.append(str(e))
    if train.global_batch_tokens % train.seq_len:
        low = train.global_batch_tokens // train.seq_len * train.seq_len
        near = f"{low or train.seq_len} or {low + train.seq_len}"
        problems.append(f"'global_batch_tokens' in [train] = {train.global_batch_tokens} is not a multiple of 'seq_len' ="
                        f" {train.seq_len}; try {near}")  # fmt: skip
    if train.schedule == "wsd" and train.warmup_fraction + train.decay_fraction > 1:
        problems.append(f"'warmup_fraction' {train.warmup_fraction:g} and 'decay_fraction' {train.decay_fraction:g} in [train] are more"
                        " than the whole run: lower one of them")  # fmt: skip
    problems += _check_other_model(values["convert"], values["evaluate"])
    problems += _check_method(train, values["prepare"])
    problems += _check_stopping(train, values["prepare"], values["evaluate"])
    problems += _check_best(values)
    return [*problems, *_check_evaluate(values["evaluate"]), *_check_hardware(train, on)]


def _check_rendering(prepare: schema.Prepare) -> list[str]:
    """Options that only Jinja templates read, and the form of a date."""
    problems = []
    if prepare.date and not _is_date(prepare.date):
        problems.append(f"'date' in [prepare] = {prepare.date!r}: a day is expected, e.g. \"2026-07-01\"")
    if prepare.template in chat_templates.TEMPLATES:
        default = schema.Prepare(tokenizer="", sources=())
        problems += [
            f"'{name}' in [prepare]: the named template {prepare.template!r} does not read it; remove it"
            for name in ("date", "template_variables", "generation_prefix")
            if getattr(prepare, name) != getattr(default, name)
        ]
    return problems


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _check_groups(prepare: schema.Prepare) -> list[str]:
    """Groups of one kind only: the same conversation in two sources has another group in each where only one of them names a column."""
    if not prepare.validation_fraction or len({bool(source.validation_group) for source in prepare.sources}) < 2:
        return []
    without = ", ".join(source.path for source in prepare.sources if not source.validation_group)
    return [
        f"'validation_group' is set in some of [[prepare.sources]] and not in {without}: the same conversation could be trained and held out; set"
        " it in all or in none"
    ]


def _check_other_model(convert: schema.Convert, evaluate: schema.Evaluate) -> list[str]:
    """[convert] model, and the option that only it has."""
    if not convert.model:
        own = "'eval_template' in [convert] = 'model': there is no [convert] model; leave it empty for the trained template"
        return [own] if convert.eval_template == "model" else []
    if evaluate.harness != "lm-eval":
        return [
            f"'model' in [convert]: harness = {evaluate.harness!r} takes another model by [evaluate] location; set that"
        ]
    return []


def _check_method(train: schema.Train, prepare: schema.Prepare) -> list[str]:
    """Options that only LoRA reads, those that it cannot train with, and bounds of tables."""
    default = schema.Train()
    for field in ("lr_factors", "weight_decays"):
        for pattern, value in getattr(train, field).items():
            if not 0 <= value < float("inf"):
                return [f"'{field}' in [train]: {pattern} = {value}: at least 0 is expected"]
    if train.precision == "fp8" and train.method == "lora":
        return [
            "'precision' in [train] = 'fp8': method = 'lora' trains no matrix of the blocks; next: precision = 'bf16', and base_dtype ="
            " 'fp8' stores the frozen base in 8 bits"
        ]
    if train.weights == "bf16" and (problem := _needs_for_bf16_weights(train)):
        return [problem]
    if train.freeze and train.train_only:
        return ["'freeze' and 'train_only' in [train]: one of them says what is trained; remove the other"]
    if train.method != "lora":
        return [
            f"'{name}' in [train] = {getattr(train, name)!r}: for method = 'lora' only, and this is {train.method!r}; remove it"
            for name in schema.LORA_FIELDS
            if getattr(train, name) != getattr(default, name)
        ]
    if chosen := [name for name in ("freeze", "train_only") if getattr(train, name)]:
        return [
            f"'{chosen[0]}' in [train]: method = 'lora' trains adapters alone; say with lora_targets which matrices get one"
        ]
    if prepare.add_tokens:
        return [
            f"'add_tokens' in [prepare] = {list(prepare.add_tokens)!r}: their rows of the embedding would stay as they are with"
            " method = 'lora'; use method = 'full', or remove them"
        ]
    return []


def _needs_for_bf16_weights(train: schema.Train) -> str:
    """What weights = "bf16" needs beside it and does not have; empty if nothing."""
    if train.method == "lora":
        return "'weights' in [train] = 'bf16': method = 'lora' stores the frozen base as base_dtype says, and adapters in fp32; remove it"
    for name, possible in (("precision", ("bf16", "fp8")), ("gradients", ("bf16",))):
        if getattr(train, name) not in possible:
            wanted = " or ".join(map(repr, possible))
            return f"'weights' in [train] = 'bf16' needs {name} = {wanted}, and it is {getattr(train, name)!r}; set it, or weights = 'fp32'"
    return ""


def _check_stopping(train: schema.Train, prepare: schema.Prepare, evaluate: schema.Evaluate) -> list[str]:
    """Options that need a validation split, or another option."""
    held_out = "set [prepare] validation_fraction, e.g. 0.01"
    problems = []
    if train.continue_schedule != "recipe" and not train.continue_from:
        problems.append(
            f"'continue_schedule' in [train] = {train.continue_schedule!r}: only a run with 'continue' reads it; remove it"
        )
    if train.early_stopping_threshold and not train.early_stopping_patience:
        problems.append(
            "'early_stopping_threshold' in [train]: only early_stopping_patience reads it; set that, or remove it"
        )
    for field in ("early_stopping_patience", "save_best_only"):
        if not getattr(train, field):
            continue
        if not prepare.validation_fraction:
            problems.append(f"'{field}' in [train]: there is no validation split, so no validation loss; {held_out}")
        elif not train.validate_every:
            problems.append(
                f"'{field}' in [train]: validate_every = 0 measures the loss only at the end; set it, e.g. to 100"
            )
    if train.save_best_only and train.keep:
        problems.append(
            f"'save_best_only' and 'keep' in [train] = {train.keep}: both say which checkpoints stay; remove one"
        )
    if train.save_best_only and (train.best_metric == "none" or evaluate.every):
        why = "[evaluate] every chooses BEST by a score" if evaluate.every else "best_metric = 'none'"
        problems.append(f"'save_best_only' in [train] follows the validation loss, and {why}; remove one of them")
    return problems


def _check_best(values: dict[str, Any]) -> list[str]:
    """[convert] checkpoint = "best" needs something that chooses BEST."""
    convert, train, evaluate = values["convert"], values["train"], values["evaluate"]
    if convert.checkpoint != "best":
        return []
    if convert.model:
        return ["'checkpoint' in [convert] = 'best': this run exports [convert] model and trains nothing; remove it"]
    if evaluate.every or (train.best_metric == "validation_loss" and values["prepare"].validation_fraction):
        return []
    return [
        "'checkpoint' in [convert] = 'best': nothing chooses the best step; set [prepare] validation_fraction, e.g. 0.01, with"
        " best_metric = 'validation_loss', or [evaluate] every"
    ]


def _check_evaluate(evaluate: schema.Evaluate) -> list[str]:
    problems = []
    task, _, metric = evaluate.best.partition("/")
    if evaluate.best and not (metric and task in evaluate.tasks) and evaluate.best != "validation/loss":
        problems.append(f"'best' in [evaluate] = {evaluate.best!r}: 'validation/loss', or 'task/metric' of one of"
                        f" {', '.join(evaluate.tasks)}")  # fmt: skip
    if evaluate.every and evaluate.harness != "lm-eval":
        problems.append(
            f"'every' in [evaluate] = {evaluate.every}: evaluating during training needs harness = 'lm-eval'"
        )
    problems += _check_oe_eval(evaluate)
    for task in evaluate.thinking:
        if task != "*" and task not in evaluate.tasks:
            problems.append(
                f"'thinking' in [evaluate]: no task {task!r} among {', '.join(evaluate.tasks)}, and it is not '*'"
            )
    twice = sorted(task for task, times in Counter(evaluate.tasks).items() if times > 1)
    problems += [f"'tasks' in [evaluate]: {task!r} is there twice; remove one" for task in twice]
    problems += _check_asking(evaluate, "[evaluate]")
    for task in evaluate.by_task:
        problems += _check_asking(evaluate.for_task(task), f"[evaluate.by_task.{task}]")
    problems += _check_server(evaluate)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", evaluate.every_device):
        problems.append(f"'every_device' in [evaluate] = {evaluate.every_device!r}: cpu, or a GPU such as cuda:1")
    if evaluate.every and evaluate.backend == "vllm" and evaluate.every_device == "cpu":
        problems.append("'every_device' in [evaluate] = 'cpu': backend = 'vllm' needs a GPU of its own, such as cuda:1")
    return problems


def _check_oe_eval(evaluate: schema.Evaluate) -> list[str]:
    """The fields that only oe-eval reads; the tags are one word of its command line."""
    if evaluate.harness != "oe-eval":
        only = {"stop_sequences": (), "datalake": True, "datalake_tags": {}, "hf_save_dir": "", "wandb_run_path": ""}
        given = [name for name, default in only.items() if getattr(evaluate, name) != default]
        return [f"'{name}' in [evaluate]: only harness = 'oe-eval' reads it; remove it" for name in given]
    words = [word for pair in evaluate.datalake_tags.items() for word in pair if not re.fullmatch(r"[^\s,=]+", word)]
    problems = [
        f"'datalake_tags' in [evaluate]: {word!r} is not a word without spaces, ',' and '='; change it"
        for word in words
    ]
    for name, pattern, form in (
        ("hf_save_dir", r"[\w.-]+/[\w.-]+(//[\w./-]+)?", "org/name//folder"),
        ("wandb_run_path", r"[\w.-]+/[\w.-]+/[\w.-]+", "entity/project/run_id"),
    ):
        if (value := getattr(evaluate, name)) and not re.fullmatch(pattern, value):
            problems.append(f"'{name}' in [evaluate] = {value!r}: {form} is expected; change it")
    if evaluate.datalake_tags and not evaluate.datalake:
        problems.append("'datalake_tags' in [evaluate]: datalake = false pushes nothing; remove one of them")
    return problems


def _check_server(evaluate: schema.Evaluate) -> list[str]:
    """The fields of backend = "server"."""
    named = [name for name in ("base_url", "served_model") if getattr(evaluate, name)]
    if evaluate.backend != "server":
        return [f"'{name}' in [evaluate]: only backend = 'server' reads it; remove it" for name in named]
    url, example = evaluate.base_url, "http://127.0.0.1:8000/v1/completions"
    if not url:
        return [
            f"'base_url' in [evaluate] is missing: backend = 'server' needs the address of the server, e.g. {example}"
        ]
    if url.endswith("/chat/completions"):
        return [
            f"'base_url' in [evaluate] = {url!r}: the server would write prompts with a template of its own, and has no likelihoods there; write"
            f" {url.removesuffix('/chat/completions')}/completions"
        ]
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?/completions", url):
        return [f"'base_url' in [evaluate] = {url!r}: an address such as {example} is expected"]
    return []


def _check_asking(options: schema.Evaluate, table: str) -> list[str]:
    """How tasks are asked: [evaluate], or what counts for one task."""
    problems = []
    thoughts = options.process_output != "none" or any(options.thinking.values())
    if options.max_thought_tokens and not thoughts:
        problems.append(
            f"'max_thought_tokens' in {table} = {options.max_thought_tokens}: no task has thoughts; set thinking = {{ \"*\" = true }}"
            " or process_output = 'r1_style'"
        )
    if -1 < options.temperature < 0:
        problems.append(f"'temperature' in {table} = {options.temperature}: at least 0, or -1 for the task's own")
    if options.top_p and options.temperature == 0:
        problems.append(f"'top_p' in {table} = {options.top_p}: temperature = 0 samples nothing; remove one of them")
    reply = options.max_reply_tokens + options.max_thought_tokens
    if options.max_length and reply >= options.max_length:
        problems.append(
            f"'max_length' in {table} = {options.max_length}: a reply of {reply} tokens leaves no room for a prompt; raise it"
        )
    if options.samples > 1 and options.temperature == 0:
        problems.append(
            f"'samples' in {table} = {options.samples}: temperature = 0 gives as many equal replies; set one above 0"
        )
    return problems


def _check_hardware(train: schema.Train, on: dict[str, dict[str, schema.Hardware]]) -> list[str]:
    problems = []
    for cluster, stages in on.items():
        h = stages.get("train")
        if h is None:
            continue
        micro = h.microbatch_tokens or train.seq_len
        ranks = h.nodes * max(1, h.processes)
        groups = max(1, ranks // h.context_degree)
        if h.nodes > 1 and cluster == "local":
            problems.append(f"'nodes' in [on.local.train] = {h.nodes}: 'local' is one machine")
        if micro % train.seq_len:
            problems.append(
                f"'microbatch_tokens' in [on.{cluster}.train] = {micro} is not a multiple of 'seq_len' = {train.seq_len}"
            )
        elif train.global_batch_tokens % (micro * groups):
            who = "ranks" if h.context_degree == 1 else f"groups of {h.context_degree} ranks"
            problems.append(
                f"'global_batch_tokens' in [train] = {train.global_batch_tokens} is not a multiple of {groups} {who} x"
                f" microbatch_tokens {micro} = {micro * groups} on [on.{cluster}.train]; change one of them"
            )
    return problems
