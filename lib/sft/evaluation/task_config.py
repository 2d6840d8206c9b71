"""What a task's own YAML may say: values that lm-eval would accept without a message, or refuse only after it has loaded the model.

In:  the YAML of a task, with the files that it includes. Out: SftError that names the file, the field and its value.
Tasks that lm-eval ships are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from lm_eval.config.task import TaskConfig
from transformers import GenerationConfig

from sft.common.errors import SftError
from sft.recipe.typed import did_you_mean

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that lm-eval reads for the longest reply, the first before the others."""
OF_VLLM = ("min_tokens", "presence_penalty", "frequency_penalty", "skip_special_tokens")
"""Sampling parameters of vLLM that transformers has not."""
OTHERS = {"max_length": "max_gen_toks, which does not count the prompt", "num_return_sequences": "repeats"}
"""Names of transformers that mean something else here, and what to write."""


def check_written_once(top: yaml.Node, file: Path) -> None:
    """Raises SftError for a mapping with one key twice: YAML readers take the last."""
    if isinstance(top, yaml.MappingNode):
        names = [key.value for key, _ in top.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise SftError(f"{file}: {twice[0]} is written {names.count(twice[0])} times; next: keep one of them")
    for value in top.value if isinstance(top, yaml.CollectionNode) else ():
        for node in value if isinstance(value, tuple) else (value,):
            check_written_once(node, file)


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises SftError for what a task's YAML says."""
    known = {field.name for field in fields(TaskConfig)} | {"task_list", "include"}
    _check_names(config, known, str(file))
    choice = ["doc_to_choice"] if config.get("output_type") == "multiple_choice" else []
    for name in ("doc_to_text", "doc_to_target", *choice):
        if config.get(name) is None and config.get("use_prompt") is None:
            raise SftError(f"{file}: {name} is missing; next: add it, a column or a Jinja text")
    files: Any = (config.get("dataset_kwargs") or {}).get("data_files")
    if files is not None and not (
        isinstance(files, dict) and files and all(isinstance(name, str) for name in files.values())
    ):
        raise SftError(
            f"{file}: dataset_kwargs.data_files = {files!r}: a table with one file for each split is read; next: data_files: {{test: name}}"
        )
    splits = files or {}
    for name in ("training_split", "validation_split", "test_split", "fewshot_split") if splits else ():
        if (split := config.get(name)) is not None and split not in splits:
            raise SftError(f"{file}: {name} = {split!r}: dataset_kwargs.data_files has {', '.join(map(repr, splits))}; next: correct one of them")  # fmt: skip
    _check_replies(config.get("generation_kwargs") or {}, f"{file}: generation_kwargs")
    repeats = config.get("repeats", 1)
    if type(repeats) is not int or repeats < 1:
        raise SftError(f"{file}: repeats = {repeats!r}, expected a whole number from 1 on; next: correct it")
    for name, key in (("metric_list", "metric"), ("filter_list", "name")):
        _check_entries(config.get(name), key, f"{file}: {name}")


def _check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise SftError(f"{where}: no field {name!r}{did_you_mean(str(name), known)}; next: correct or remove it")


def _check_replies(arguments: Mapping[str, Any], where: str) -> None:
    for name, instead in OTHERS.items():
        if name in arguments:
            raise SftError(f"{where}.{name} = {arguments[name]!r}: not read; next: write {instead}")
    own = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    _check_names(arguments, {*own, *LIMITS, *OF_VLLM, "until"}, where)
    until = arguments.get("until")
    for text in until if isinstance(until, list) else [] if until is None else [until]:
        if not isinstance(text, str) or not text:
            raise SftError(f"{where}.until = {until!r}: {text!r} is no text that can end a reply; next: correct it")
    for name in LIMITS:
        value = arguments.get(name, 1)
        if type(value) is not int or value < 1:
            raise SftError(f"{where}.{name} = {value!r}, expected a number of tokens from 1 on; next: correct it")


def _check_entries(entries: Any, key: str, where: str) -> None:
    """A list of metrics or filters: not empty, and each name once. lm-eval keeps the last of two."""
    if entries is None:
        return
    names = [entry.get(key) if isinstance(entry, dict) else None for entry in entries or ()]
    if not names or None in names:
        raise SftError(f"{where}: {entries!r}, expected a list of tables with {key!r}; next: correct or remove it")
    if twice := [name for name in names if names.count(name) > 1]:
        raise SftError(f"{where}: {twice[0]!r} is there {names.count(twice[0])} times, and lm-eval keeps one; next: give each a name of its own")  # fmt: skip
