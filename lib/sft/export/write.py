"""Writes a Hugging Face folder: weights as safetensors, configurations, tokenizer and chat template.

In:  weights by our names, the architecture, the facts of the tokenizer, its folder, the recipe's [convert].
Out: a folder that transformers and vLLM load. Memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sft.checkpoint.dcp_reader import Weights
from sft.common.errors import SftError
from sft.common.files import read_json, write_json
from sft.export.blocks import DTYPES, all_finite, row_blocks
from sft.export.stream import prefetched
from sft.export.tokenizer_files import copy_tokenizer_files
from sft.formats.dataset import TokenizerFacts
from sft.model import hf
from sft.recipe.architecture import ModelConfig
from sft.recipe.base_config import BaseFacts
from sft.recipe.resolve import DEFAULT_LENGTH
from sft.recipe.schema import Convert

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A chat model also ends its turn with these, if they are special tokens of the tokenizer.
_CHAT_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class _Entry:
    """A tensor of a shard: its exported name, our tensors that are its rows, its exported shape and size."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Trained:
    """A trained model, and what it was trained with."""

    weights: Weights
    config: ModelConfig
    facts: TokenizerFacts
    tokenizer: Path
    """The folder that training used. Its own template is the trained one."""
    base: BaseFacts | None = None
    """What the export keeps of a Hugging Face base."""


def export(trained: Trained, template: str, options: Convert, target: Path, log: Callable[[str], None] = print) -> int:
    """Writes the new folder `target` and returns the size of the weights in bytes. Raises SftError for an unusable checkpoint.

    `template` is the chat template of the exported folder.
    """
    config, facts, base = trained.config, trained.facts, trained.base
    vocab = exported_rows(config, facts, options, base)
    if vocab != facts.vocab_size:
        log(f"{vocab:,} rows of the vocabulary, as the base's table has; the tokenizer has {facts.vocab_size:,} ids")
    length = options.max_position_embeddings or DEFAULT_LENGTH
    target.mkdir(parents=True)
    size = write_weights(trained.weights, config, vocab, target, options.dtype, int(options.shard_gb * 1e9), log)
    stops = stop_ids(facts, trained.tokenizer)
    made = hf.hf_config(
        config,
        vocab_size=vocab,
        max_position_embeddings=length,
        dtype=options.dtype,
        bos_token_id=base.bos_token_id if base else None,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.pad_id,
    )
    write_json(target / "config.json", hf.config_json(made))
    generation = {
        "do_sample": False,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": facts.pad_id,
    }
    if base and base.bos_token_id is not None:
        generation["bos_token_id"] = base.bos_token_id
    write_json(target / "generation_config.json", generation)
    copy_tokenizer(trained.tokenizer, target, facts)
    file = target / "tokenizer_config.json"
    if file.is_file() and read_json(file).get("model_max_length") != length:
        write_json(file, {**read_json(file), "model_max_length": length})
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return size


def exported_rows(config: ModelConfig, facts: TokenizerFacts, options: Convert, base: BaseFacts | None) -> int:
    """Rows of the exported embedding: one for each id, or as many as the base's published table if that has more."""
    published = base.rows if base and options.vocabulary == "base" else None
    return min(config.vocab_size, max(facts.vocab_size, published or 0))


def stop_ids(facts: TokenizerFacts, tokenizer: Path) -> list[int]:
    """Ids that end a reply: the trained terminators, then end-of-text, then special tokens that end a turn. Raises SftError."""
    file = tokenizer / "tokenizer.json"
    special = {t.get("content"): t.get("id") for t in read_json(file).get("added_tokens", []) if t.get("special")}
    ids = list(facts.terminator_ids)
    if not ids:
        raise SftError(
            "dataset.json: terminator_ids: empty; the model was never trained to stop; next: make prepare again"
        )
    ids += [facts.eos_id] + [int(special[name]) for name in _CHAT_ENDS if name in special]
    return list(dict.fromkeys(ids))


def copy_tokenizer(source: Path, target: Path, facts: TokenizerFacts) -> None:
    """Copies the tokenizer byte for byte. Raises SftError if it is not the one that the model was trained with."""
    copy_tokenizer_files(source, target)
    for name, wanted in (
        ("tokenizer.json", facts.tokenizer.sha256),
        ("chat_template.jinja", facts.template.sha256),
    ):
        file = source / name
        if not file.is_file():
            raise SftError(
                f"{file}: missing; the export needs what the model was trained with; next: make prepare again"
            )
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != wanted.removeprefix("sha256:"):
            raise SftError(
                f"{file}: sha256 {found}, dataset.json has {wanted}: not what the model was trained with; next: make train again"
            )


def write_weights(
    weights: Weights,
    config: ModelConfig,
    vocab: int,
    target: Path,
    dtype: str,
    shard_bytes: int,
    log: Callable[[str], None] = print,
) -> int:
    """Writes model*.safetensors and the index. Returns the size of the tensors in bytes.

    Checks that every tensor is there once, with its shape, and finite before and after the cast. Rows beyond the tokenizer's
    `vocab` ids are read and checked, but not written. Raises SftError.
    """
    padded = hf.shapes(config)
    hf.check_shapes(
        {name: weights.shape(name) for name in hf.without_tied_head(weights, config)}, padded, "the checkpoint"
    )
    shards = _plan_shards(hf.exported_parts(config, vocab), DTYPES[dtype].itemsize, shard_bytes)
    total = sum(e.bytes for shard in shards for e in shard)
    free = shutil.disk_usage(target).free
    if free < total * 1.02:
        raise SftError(
            f"{target}: the weights need {total:,} bytes, {free:,} are free; next: free space and run it again"
        )
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (target / name).open("wb") as file:
            file.write(_header(shard, dtype))
            _write_tensors(file, shard, weights, padded, dtype)
            file.flush()
            os.fsync(file.fileno())
        weight_map |= {entry.name: name for entry in shard}
        done += sum(entry.bytes for entry in shard)
        log(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / "model.safetensors.index.json", index)
    return total


def _plan_shards(
    tensors: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]], width: int, shard_bytes: int
) -> list[list[_Entry]]:
    """Tensors in their order, in shards of at most `shard_bytes`. A larger tensor has a shard of its own. width: bytes per value."""
    shards: list[list[_Entry]] = [[]]
    for name, parts in tensors.items():
        shape = (sum(part[0] for _, part in parts), *parts[0][1][1:])
        size = torch.Size(shape).numel() * width
        if shards[-1] and sum(e.bytes for e in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(_Entry(name, tuple(parts), shape, size))
    return shards


def _write_tensors(
    file: BinaryIO, shard: Sequence[_Entry], weights: Weights, padded: Mapping[str, tuple[int, ...]], dtype: str
) -> None:
    """Writes the tensors of a shard block by block; a thread reads the next blocks. `padded` are the checkpoint's shapes."""
    parts = [part for entry in shard for part in entry.parts]
    blocks = [(name, shape[0], *block) for name, shape in parts for block in row_blocks(padded[name])]
    read = (partial(weights.rows, name, start, stop) for name, _, start, stop in blocks)
    for (name, rows, start, _), exact in zip(blocks, prefetched(read), strict=True):
        file.write(_cast(exact, name, rows, start, dtype).view(torch.uint8).numpy().data)


def _cast(exact: torch.Tensor, name: str, rows: int, start: int, dtype: str) -> torch.Tensor:
    """A block of rows, which starts at row `start`, in the export's dtype, without rows beyond `rows`.

    Raises SftError for NaN and infinity, also in rows that are left out.
    """
    made = exact[: max(0, rows - start)].to(DTYPES[dtype])
    if not all_finite(exact) or (dtype != "float32" and not all_finite(made)):
        why = (
            f"too large for {dtype}; next: export as bfloat16"
            if all_finite(exact)
            else "the checkpoint is damaged or training diverged; next: see metrics.jsonl, and convert an earlier step"
        )
        raise SftError(f"the checkpoint: {name}: NaN or infinity from row {start} on: {why}")
    return made


def _header(entries: Sequence[_Entry], dtype: str) -> bytes:
    """The header of a safetensors file: its length (8 bytes), then JSON with dtype, shape and byte range of every tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.bytes],
        }
        start += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
