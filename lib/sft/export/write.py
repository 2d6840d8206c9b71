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
from sft.recipe.presets import ModelConfig
from sft.recipe.schema import Convert

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A chat model also ends its turn with these, if they are special tokens of the tokenizer.
_CHAT_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class _Entry:
    """A tensor of a shard: our name, its exported shape and size."""

    name: str
    shape: tuple[int, ...]
    bytes: int


def export(
    weights: Weights,
    config: ModelConfig,
    facts: TokenizerFacts,
    tokenizer: Path,
    target: Path,
    options: Convert,
    template: str,
    log: Callable[[str], None] = print,
) -> int:
    """Writes the new folder `target` and returns the size of the weights in bytes. Raises SftError for an unusable checkpoint.

    `template` is the chat template of the exported folder. `tokenizer` is the folder that the model was trained with; its own
    template must be the trained one.
    """
    vocab = facts.vocab_size
    target.mkdir(parents=True)
    size = write_weights(weights, config, vocab, target, options.dtype, int(options.shard_gb * 1e9), log)
    stops = stop_ids(facts, tokenizer)
    made = hf.hf_config(
        config,
        vocab_size=vocab,
        max_position_embeddings=options.max_position_embeddings,
        dtype=options.dtype,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.pad_id,
    )
    write_json(target / "config.json", hf.config_json(made))
    generation = {
        "do_sample": False,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": facts.pad_id,
    }
    write_json(target / "generation_config.json", generation)
    copy_tokenizer(tokenizer, target, facts)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return size


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
    family = hf.family(config)
    padded = hf.shapes(config)
    hf.check_shapes(
        {name: weights.shape(name) for name in hf.without_tied_head(weights, config)}, padded, "the checkpoint"
    )
    shards = _plan_shards(hf.shapes(config, vocab), DTYPES[dtype].itemsize, shard_bytes)
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
            file.write(_header(shard, family, dtype))
            _write_tensors(file, shard, weights, padded, dtype)
            file.flush()
            os.fsync(file.fileno())
        weight_map |= {family.theirs(entry.name): name for entry in shard}
        done += sum(entry.bytes for entry in shard)
        log(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / "model.safetensors.index.json", index)
    return total


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], width: int, shard_bytes: int) -> list[list[_Entry]]:
    """Tensors in their order, in shards of at most `shard_bytes`. A larger tensor has a shard of its own. width: bytes per value."""
    shards: list[list[_Entry]] = [[]]
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * width
        if shards[-1] and sum(e.bytes for e in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(_Entry(name, shape, size))
    return shards


def _write_tensors(
    file: BinaryIO, shard: Sequence[_Entry], weights: Weights, padded: Mapping[str, tuple[int, ...]], dtype: str
) -> None:
    """Writes the tensors of a shard block by block; a thread reads the next blocks. `padded` are the checkpoint's shapes."""
    blocks = [(entry, *block) for entry in shard for block in row_blocks(padded[entry.name])]
    read = (partial(weights.rows, entry.name, start, stop) for entry, start, stop in blocks)
    for (entry, start, _), exact in zip(blocks, prefetched(read), strict=True):
        file.write(_cast(exact, entry, start, dtype).view(torch.uint8).numpy().data)


def _cast(exact: torch.Tensor, entry: _Entry, start: int, dtype: str) -> torch.Tensor:
    """A block of rows, which starts at row `start`, in the export's dtype, without rows beyond the entry's.

    Raises SftError for NaN and infinity, also in rows that are left out.
    """
    made = exact[: max(0, entry.shape[0] - start)].to(DTYPES[dtype])
    if not all_finite(exact) or (dtype != "float32" and not all_finite(made)):
        why = (
            f"too large for {dtype}; next: export as bfloat16"
            if all_finite(exact)
            else "the checkpoint is damaged or training diverged; next: see metrics.jsonl, and convert an earlier step"
        )
        raise SftError(f"the checkpoint: {entry.name}: NaN or infinity from row {start} on: {why}")
    return made


def _header(entries: Sequence[_Entry], family: hf.Family, dtype: str) -> bytes:
    """The header of a safetensors file: its length (8 bytes), then JSON with dtype, shape and byte range of every tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[family.theirs(entry.name)] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.bytes],
        }
        start += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
