"""Model, tokenizer, template and the datasets of the mix.

A name such as org/name is the hub's (hf://org/name); a path that begins with / or . or ends as a file does stays a path under DATA.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from sft.importing.config import Config, flag, number, whole, words
from sft.importing.draft import Draft
from sft.importing.options import put
from sft.recipe import chat_templates, inputs

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
_SLICE = re.compile(r"([\w.-]+)\[:(\d+)(%?)\]")
_WORDS = "the words around a prompt are those of the chat template, not the format's own"
_TORCHTUNE_DATA = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
    "chat_dataset": "",
    "instruct_dataset": "",
}
"""Components of torchtune whose rows prepare reads, and the dataset that each loads by default."""
_INSTRUCTIONS = (
    "alpaca",
    "gpteacher",
    "explainchoice",
    "alpaca_w_system",
    "alpaca_chat",
    "alpaca_dataset",
    "alpaca_cleaned_dataset",
)


def named(path: str) -> str:
    """A dataset or model by its name elsewhere, as a path here."""
    plain = path.removesuffix("/") if len(path) > 1 else path
    if inputs.is_remote(plain) or plain.startswith(("/", ".", "~", "$")) or plain.endswith(_FILES):
        return plain.removeprefix("./")
    return f"hf://{plain}" if _HUB.fullmatch(plain) else plain


def model(config: Config, draft: Draft) -> None:
    """[model] base and [prepare] tokenizer."""
    for name in ("model_name_or_path", "base_model", "model.config.pretrained_model_name_or_path"):
        if (value := config.get(name)) is not None:
            break
    else:
        return
    base, revision = named(str(value)), config.get("model_revision")
    if revision and revision != "main" and base.startswith("hf://"):
        base += f"@{revision}"
        config.use("model_revision", f"[model] base = {base}")
    if "$" in base:
        config.leave(name, "it is a variable of the shell; next: set [model] base")
        return
    put(config, draft, name, "model", "base", base)
    tokenizer = next((n for n in ("tokenizer_name_or_path", "tokenizer_name") if config.get(n) is not None), "")
    own = str(config.get(tokenizer)) if tokenizer else ""
    if own and (PurePosixPath(own).suffix in (".model", ".json", ".txt") or config.trainer == "torchtune"):
        config.use(tokenizer, f"[prepare] tokenizer = {base}: a folder with tokenizer.json, not one file of it")
        own = ""
    if own and "$" not in own:
        put(config, draft, tokenizer, "prepare", "tokenizer", named(own))
    else:
        draft.put("prepare", "tokenizer", base)


def template(config: Config, draft: Draft) -> None:
    """[prepare] template and what belongs to it."""
    for name in ("chat_template", "chat_template_name", "chat_template_path", "chat_template_jinja"):
        value = config.get(name)
        if value is None:
            continue
        text = str(value)
        if text in ("tokenizer_default", "tokenizer"):
            config.use(name, '[prepare] template = "tokenizer", the default')
        elif text in chat_templates.TEMPLATES or (text.endswith(inputs.TEMPLATE_SUFFIXES) and "\n" not in text):
            put(config, draft, name, "prepare", "template", text)
        elif name == "chat_template_path":
            config.leave(
                name, "template is a .jinja file or tokenizer:NAME; next: name the file in the tokenizer's folder"
            )
        else:
            shown = " ".join(text.split())
            config.leave(
                name,
                f"no named template {shown[:24]!r}, so the tokenizer's own is used; next: write it to a .jinja file and name that",
            )
    if (extra := config.get("add_tokens")) is not None:
        if draft.get("train", "method") == "lora":
            config.leave("add_tokens", "with method = 'lora' the embedding is frozen, so new tokens are refused")
        else:
            put(config, draft, "add_tokens", "prepare", "add_tokens", words(extra))
    for key in list(config.below("special_tokens")):
        if key != "special_tokens.pad_token" and config.get(key) is not None:
            config.leave(key, "the tokenizer's own special tokens and the template's stop token are used")
    for name in ("eot_tokens", "eos_token"):
        if config.get(name) is not None:
            config.leave(name, "an answer ends with the stop token that the template writes")
    for key in list(config.below("chat_template_kwargs")):
        value = config.get(key)
        variables = {**draft.tables.get("prepare", {}).get("template_variables", {}), key.rpartition(".")[2]: value}
        config.use(key, draft.put("prepare", "template_variables", variables))


def training_split(config: Config, draft: Draft) -> None:
    """validation_fraction, and whose messages are trained."""
    for name in ("val_set_size", "test_split_size"):
        value = number(config.get(name))
        if value is not None and 0 < value < 1:
            put(config, draft, name, "prepare", "validation_fraction", value)
        elif value:
            config.leave(name, "validation_fraction is a fraction of the conversations, not a number of them")
    if flag(config.get("dataset_exact_deduplication")):
        put(config, draft, "dataset_exact_deduplication", "prepare", "deduplicate", True)
    if flag(config.get("train_on_inputs")):
        config.leave(
            "train_on_inputs",
            'train_roles = ["system", "user", "assistant"] trains their texts; headers are never trained',
        )
    if (value := config.get("roles_to_train")) is not None:
        put(config, draft, "roles_to_train", "prepare", "train_roles", words(value))
    if flag(config.get("dataset.mask_history")):
        put(config, draft, "dataset.mask_history", "prepare", "train_turns", "last")


def datasets(config: Config, draft: Draft) -> None:
    """[[prepare.sources]] of every form."""
    _listed(config, draft)
    _mixer(config, draft)
    _single(config, draft)
    _component(config, draft)


def _listed(config: Config, draft: Draft) -> None:
    """axolotl's and TRL's `datasets`: a table for each."""
    n = 0
    while keys := list(config.below(f"datasets.{n}")):
        prefix = f"datasets.{n}"
        n += 1
        kind = config.get(f"{prefix}.type")
        kind = None if kind is None else str(kind).partition(":")[0].partition(".")[0]
        path = config.get(f"{prefix}.path")
        if kind not in (None, "chat_template", "sharegpt", *_INSTRUCTIONS) or config.get(
            f"{prefix}.type.field_instruction"
        ):
            for key in keys:
                config.leave(
                    key,
                    f"rows of type {kind or 'of its own'} are not read; next: rows with messages, prompt and completion, or instruction",
                )
            continue
        source: dict[str, Any] = {"path": named(str(path))}
        if kind in _INSTRUCTIONS:
            config.leave(f"{prefix}.type", f"its rows are read; {_WORDS}")
        elif kind:
            config.use(f"{prefix}.type", "prepare reads these rows")
        _split(config, f"{prefix}.split", source)
        _files(config, prefix, source)
        for name in ("name", "subset"):
            if (subset := config.get(f"{prefix}.{name}")) is not None:
                source["subset"] = str(subset)
                config.use(f"{prefix}.{name}", "subset of the source")
        if (share := number(config.get(f"{prefix}.fraction"))) is not None:
            source["weight"] = share
            config.use(f"{prefix}.fraction", f"weight = {share}")
        _columns(config, prefix, source)
        config.use(f"{prefix}.path", f"[[prepare.sources]] path = {source['path']}")
        draft.sources.append(source)
    for key in list(config.below("pretraining_dataset")):
        config.leave(key, "plain text is not read: rows are conversations")


def _files(config: Config, prefix: str, source: dict[str, Any]) -> None:
    value = config.get(f"{prefix}.data_files")
    if value is None:
        return
    files = words(value)
    if len(files) == 1 and source["path"] in ("json", "csv", "parquet", "hf://json"):
        source["path"] = named(files[0])
        config.use(f"{prefix}.data_files", f"path = {source['path']}")
    elif len(files) == 1:
        source["path"] = f"{source['path']}/{files[0]}"
        config.use(f"{prefix}.data_files", f"path = {source['path']}")
    else:
        config.leave(
            f"{prefix}.data_files", "a source is one file or a folder: write a [[prepare.sources]] table for each file"
        )


def _split(config: Config, name: str, source: dict[str, Any]) -> None:
    value = config.get(name)
    if value is None:
        return
    text = str(value)
    if cut := _SLICE.fullmatch(text):
        source["split"] = cut[1]
        if cut[3]:
            source["weight"] = float(cut[2]) / 100
            config.leave(
                name, f"split = {cut[1]!r} and weight = {source['weight']}: a sample of it, not its first rows"
            )
        else:
            source["max_documents"] = int(cut[2])
            config.leave(name, f"split = {cut[1]!r} and max_documents = {cut[2]}: a sample of it, not its first rows")
    elif re.fullmatch(r"[\w.-]+", text):
        source["split"] = text
        config.use(name, f"split = {text!r}")
    else:
        config.leave(name, "a split is one name; next: set split and weight of the source")


def _columns(config: Config, prefix: str, source: dict[str, Any]) -> None:
    """Names of columns and of message fields. `from` and `value`, `role` and `content` are read as they are."""
    columns: dict[str, str] = {}
    for name, ours in (("field_messages", "messages"), ("field_instruction", "instruction"), ("field_input", "input"), ("field_output", "output"),
                       ("field_tools", "tools"), ("field_system", "system")):  # fmt: skip
        if (value := config.get(f"{prefix}.{name}")) is None:
            continue
        if value not in (ours, "messages", "conversations"):
            columns[ours] = str(value)
        config.use(
            f"{prefix}.{name}",
            f"columns = {{ {ours} = {value!r} }}" if ours in columns else "prepare reads this column",
        )
    for name, known in (("role", ("role", "from")), ("content", ("content", "value"))):
        for key in (f"{prefix}.message_property_mappings.{name}", f"{prefix}.message_field_{name}"):
            if (value := config.get(key)) in known:
                config.use(key, "prepare reads this field of a message")
            elif value is not None:
                config.leave(key, f"a message's {name} is in {' or '.join(known)}; next: rename it in the rows")
    if columns:
        source["columns"] = columns


def _mixer(config: Config, draft: Draft) -> None:
    """open-instruct's list of names and amounts: 1.0 is the whole, 1000 a number of rows."""
    for name in ("dataset_mixer_list", "mixer_list"):
        if (value := config.get(name)) is None:
            continue
        items = words(value) if isinstance(value, list) else str(value).split()
        if len(items) % 2 or any(number(a) is None for a in items[1::2]):
            config.leave(name, "pairs of a dataset and an amount are expected; next: write [[prepare.sources]] tables")
            continue
        for path, amount in zip(items[::2], items[1::2], strict=True):
            _add_mixed(draft, path, amount)
        config.use(name, f"{len(items) // 2} [[prepare.sources]]")
    for key in list(config.below("dataset_mixer")):
        path = key.removeprefix("dataset_mixer.")
        if number(config.get(key)) is not None and path != key:
            _add_mixed(draft, path, str(config.get(key)))
            config.use(key, "[[prepare.sources]]")
    splits = config.get("dataset_mixer_list_splits")
    if splits is not None and (names := words(splits)) and (len(names) == 1 or len(names) == len(draft.sources)):
        for i, source in enumerate(draft.sources):
            if (split := names[i] if len(names) > 1 else names[0]) != "train":
                source["split"] = split
        config.use("dataset_mixer_list_splits", "split of the sources")


def _add_mixed(draft: Draft, path: str, amount: str) -> None:
    source: dict[str, Any] = {"path": named(path)}
    value = float(amount)
    if "." in amount or value < 1:
        source["weight"] = value
    elif value < 32:
        source["max_documents"] = int(value)
    else:
        source["weight"] = int(value)
    draft.sources.append(source)


def _single(config: Config, draft: Draft) -> None:
    """TRL's dataset_name and open-instruct's dataset_name or train_file."""
    for name in ("dataset_name", "train_file"):
        if (value := config.get(name)) is None or isinstance(value, list):
            continue
        source: dict[str, Any] = {"path": named(str(value))}
        for key in ("dataset_config", "dataset_config_name"):
            if (subset := config.get(key)) is not None:
                source["subset"] = str(subset)
                config.use(key, "subset of the source")
        _split(config, "dataset_train_split", source)
        if (most := whole(config.get("max_train_samples"))) is not None:
            source["max_documents"] = most
            config.use("max_train_samples", f"max_documents = {most}")
        config.use(name, f"[[prepare.sources]] path = {source['path']}")
        draft.sources.append(source)


def _component(config: Config, draft: Draft) -> None:
    """torchtune's and Automodel's one dataset, whose class says what its rows are."""
    kind = str(config.get("dataset._component_") or config.get("dataset._target_") or "").rpartition(".")[2]
    if not kind:
        return
    path = next(
        (
            str(v)
            for n in ("source", "path_or_dataset_id", "dataset_name")
            if (v := config.get(f"dataset.{n}")) is not None
        ),
        "",
    )
    known = {**_TORCHTUNE_DATA, "ChatDataset": "", "ColumnMappedTextInstructionDataset": ""}
    if kind not in known or not (path or known[kind]):
        for key in list(config.below("dataset")):
            if config.get(key) is not None and key.rpartition(".")[2] not in ("packed", "seq_length", "train_on_input"):
                config.leave(
                    key, f"rows of {kind} are not read as they are; next: write a [[prepare.sources]] table for them"
                )
        return
    source: dict[str, Any] = {"path": named(path or known[kind])}
    instructions = kind in _INSTRUCTIONS
    for name in ("_component_", "_target_"):
        end = config.leave if instructions else config.use
        end(
            f"dataset.{name}",
            f"its rows are read; {_WORDS}" if instructions else f"[[prepare.sources]] path = {source['path']}",
        )
    for name in ("source", "path_or_dataset_id", "dataset_name"):
        config.use(f"dataset.{name}", f"[[prepare.sources]] path = {source['path']}")
    _files(config, "dataset", source)
    _split(config, "dataset.split", source)
    if (most := whole(config.get("dataset.limit_dataset_samples"))) is not None:
        source["max_documents"] = most
        config.use("dataset.limit_dataset_samples", f"max_documents = {most}: a sample, not the first rows")
    if (subset := config.get("dataset.name")) is not None:
        source["subset"] = str(subset)
        config.use("dataset.name", "subset of the source")
    columns: dict[str, str] = {}
    for table in ("column_map", "column_mapping"):
        for theirs, ours in (
            ("question", "prompt"),
            ("answer", "completion"),
            ("input", "prompt"),
            ("output", "completion"),
            ("context", "system"),
        ):
            key = f"dataset.{table}.{theirs}"
            if (value := config.get(key)) is None:
                continue
            if theirs == "context":
                config.leave(key, "a context before a question has no column; next: put it into the prompt")
                continue
            columns[ours] = str(value)
            config.use(key, f"columns = {{ {ours} = {value!r} }}")
    if (column := config.get("dataset.conversation_column")) is not None:
        if column not in ("messages", "conversations"):
            columns["messages"] = str(column)
        config.use("dataset.conversation_column", "the column of messages")
    if config.get("dataset.conversation_style") in ("sharegpt", "openai"):
        config.use("dataset.conversation_style", "prepare reads these rows")
    if columns:
        source["columns"] = columns
    draft.sources.append(source)
