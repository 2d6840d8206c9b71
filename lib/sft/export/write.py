"""TODO sft.export.write"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.checkpoint.dcp_reader import Weights
from sft.common.errors import SftError
from sft.export.stream import prefetched
from sft.formats.dataset import TokenizerFacts
from sft.model import hf
from sft.recipe.presets import ModelConfig

if TYPE_CHECKING:
    from sft.recipe.schema import Convert
from sft.export.rows import DTYPES, TOKENIZER_FILES, finite, pieces, write_json

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A chat model also ends its turn on these where the tokenizer has them as special tokens.
_CHAT_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class _Entry:
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
    """Writes the whole folder `target`; returns the bytes of the weights. Raises SftError for an unusable checkpoint.

    `template` is the chat template that the folder carries; the tokenizer's own must be the one trained with.
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
    """Ids that end a reply: the trained terminators first, then end-of-text and the ends of turns that are special tokens."""
    file = tokenizer / "tokenizer.json"
    special = {t.get("content"): t.get("id") for t in hf.read_json(file).get("added_tokens", []) if t.get("special")}
    ids = list(facts.terminator_ids)
    if not ids:
        raise SftError(
            "dataset.json: terminator_ids: empty; the model was never trained to stop; next: make prepare again"
        )
    ids += [facts.eos_id] + [int(special[name]) for name in _CHAT_ENDS if name in special]
    return list(dict.fromkeys(ids))


def copy_tokenizer(source: Path, target: Path, facts: TokenizerFacts) -> None:
    """Copies the tokenizer as it was trained with, byte for byte, after checking that it is that one."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
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
            raise SftError(f"{file}: sha256 {found}, dataset.json has {wanted}: not what the model was trained with")


def write_weights(
    weights: Weights,
    config: ModelConfig,
    vocab: int,
    target: Path,
    dtype: str,
    shard_bytes: int,
    log: Callable[[str], None] = print,
) -> int:
    """Writes model*.safetensors and the index, a piece of a tensor at a time; returns the bytes of the tensors.

    Checks on the way that every tensor is there once, with its shape, and finite before and after the cast; rows beyond
    the tokenizer's are read and checked, and left out.
    """
    kind = hf.family(config)
    padded, cut = hf.shapes(config), hf.shapes(config, vocab)
    hf.check_shapes(
        {name: weights.shape(name) for name in hf.without_tied_head(weights, config)}, padded, "the checkpoint"
    )
    width = DTYPES[dtype].itemsize
    shards: list[list[_Entry]] = [[]]
    for name, shape in cut.items():
        size = torch.Size(shape).numel() * width
        if shards[-1] and sum(e.bytes for e in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(_Entry(name, shape, size))
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
            file.write(_header(shard, kind, dtype))
            places = [(entry, *piece) for entry in shard for piece in pieces(padded[entry.name])]
            read = (partial(weights.rows, entry.name, start, stop) for entry, start, stop in places)
            for (entry, start, _), exact in zip(places, prefetched(read), strict=True):
                file.write(_cast(exact, entry, start, dtype).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        weight_map |= {kind.theirs(entry.name): name for entry in shard}
        done += sum(entry.bytes for entry in shard)
        log(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / "model.safetensors.index.json", index)
    return total


def _cast(exact: torch.Tensor, entry: _Entry, start: int, dtype: str) -> torch.Tensor:
    """Rows of a tensor, from `start` on, in the export's dtype, those beyond the entry's left out. Refuses NaN and infinity."""
    made = exact[: max(0, entry.shape[0] - start)].to(DTYPES[dtype])
    if not finite(exact) or (dtype != "float32" and not finite(made)):
        why = (
            f"too large for {dtype}; next: export as bfloat16"
            if finite(exact)
            else "the checkpoint is damaged or diverged; next: see metrics.jsonl, and convert an earlier step"
        )
        raise SftError(f"the checkpoint: {entry.name}: NaN or infinity from row {start} on: {why}")
    return made


def _header(entries: list[_Entry], kind: hf.Family, dtype: str) -> bytes:
    """The head of a safetensors file: length, then JSON with dtype, shape and byte range of every tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[kind.theirs(entry.name)] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.bytes],
        }
        start += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8
    return len(text).to_bytes(8, "little") + text
