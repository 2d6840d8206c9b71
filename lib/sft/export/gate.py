"""The gate: what an export must pass before it is published.

In:  the export's folder, the checkpoint that it was made from, the architecture, prepare's dataset.json.
Out: `GateRecord` (gate.json), which lists what was compared; SftError at the first check that fails.

1. Tensors: the names and shapes are those of transformers' model for this config.json. Every tensor is there once, finite, and
   equal to the checkpoint's after the cast.
2. Tokenizer: AutoTokenizer gives the ids of the training data for the canary texts, and the trained template and special ids.
   generate() stops on every trained terminator.
3. Logits: the training code's model agrees with transformers on packed conversations, the first longer than the sliding window
   (sft.export.logits).
4. LoRA: the merged weights give the logits of the base with separate adapters (sft.export.merge_gate).
5. Greedy replies to fixed questions (sft.export.chats). They are reported only: an undertrained model may not stop.

`gate = "fast"` compares the logits over a sample of four layers (`sample_layers`), does not measure the cost of rounding, and
generates no replies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.chat.loaded_tokenizer import check_canaries, remedy
from sft.checkpoint.dcp_reader import Weights
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.lora_step import Merged
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.export.blocks import DTYPES, all_finite, row_blocks
from sft.export.chats import greedy_replies, trained_chats
from sft.export.logits import compare_logits, meta_hf_model, sample_layers
from sft.export.merge_gate import check_merge
from sft.export.stream import prefetched
from sft.formats.dataset import TokenizerFacts
from sft.formats.gate import GateRecord, GreedyReply, TensorCheck, TokenizerCheck
from sft.model import hf
from sft.recipe.architecture import ModelConfig
from sft.recipe.base_config import find_family
from sft.recipe.schema import Convert

AGAIN = "next: make convert again"


def check(
    folder: Path,
    weights: Weights,
    config: ModelConfig,
    facts: TokenizerFacts,
    template: str,
    options: Convert,
    log: Callable[[str], None] = print,
) -> GateRecord:
    """Runs the gate and returns its record. `template` is the chat template that the model was trained with.

    Raises SftError at the first check that fails.
    """
    fast = options.gate == "fast"
    exported = HfFolder(folder)
    tensors = check_tensors(exported, weights, config, DTYPES[options.dtype])
    log(f"gate: {tensors.count} tensors complete, finite and equal to the checkpoint")
    tokenizer = check_exported_tokenizer(folder, facts)
    stops = check_generation(folder, facts)
    layers = sample_layers(config.n_layers) if fast else list(range(config.n_layers))
    logits = compare_logits(exported, weights, config, trained_chats(tokenizer, template, config), layers)
    which = "all" if len(layers) == config.n_layers else "layers " + ", ".join(map(str, layers))
    log(
        f"gate: logits of {logits.rows} positions agree to {logits.max_difference:.1e} of {logits.max_logit:.1f}"
        f" over {which} of {config.n_layers} layers, {logits.tokens} packed tokens, window {config.window}"
    )
    replies: tuple[GreedyReply, ...] | None = None
    if not fast:
        replies = greedy_replies(exported, tokenizer, config, stops)
        stopped = sum(reply.stopped for reply in replies)
        log(
            f"gate: {stopped} of {len(replies)} greedy replies stop by themselves; the first: {replies[0].reply[:80]!r}"
        )
    exported.close()
    merge = None
    if isinstance(weights, Merged):
        merge = check_merge(weights, trained_chats(tokenizer, template, config), layers, str(folder))
        log(
            f"gate: merged and unmerged logits agree to {merge.max_difference:.1e} of {merge.max_logit:.1f},"
            f" {merge.matrices} matrices with adapters"
        )
    about_tokenizer = TokenizerCheck(len(facts.tokenizer.canaries), tuple(stops))
    return replace(GateRecord.of(options.gate, tensors, about_tokenizer, logits, replies), merge=merge)


def check_tensors(exported: HfFolder, weights: Weights, config: ModelConfig, dtype: torch.dtype) -> TensorCheck:
    """Checks names, shapes and values of all tensors against transformers' model and the checkpoint. Raises SftError.

    The checkpoint's values are cast to `dtype`; rows beyond the tokenizer's vocabulary are not exported.
    """
    parameters = meta_hf_model(exported.config).named_parameters()  # lists a tied head once
    theirs = {k: tuple(v.shape) for k, v in parameters}
    rows = int(exported.config["vocab_size"])
    hf.check_shapes(hf.class_shapes(config, rows), theirs, f"{exported.path / 'config.json'}: transformers' model")
    wanted = hf.shapes(config, rows)
    hf.check_shapes({name: exported.shape(name) for name in exported}, wanted, str(exported.path))

    def read(name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return exported.rows(name, start, stop), weights.rows(name, start, stop)

    blocks = [(name, *block) for name, shape in wanted.items() for block in row_blocks(shape)]
    for (name, start, _), (found, exact) in zip(blocks, prefetched(partial(read, *b) for b in blocks), strict=True):
        if found.dtype != dtype or not torch.equal(found, exact.to(dtype)):
            raise SftError(f"{exported.path}: {name}: not the checkpoint's values in {dtype}; {AGAIN}")
        if not all_finite(found):
            raise SftError(f"{exported.path}: {name}: NaN or infinity from row {start} on; {AGAIN}")
    size = sum(torch.Size(shape).numel() for shape in wanted.values()) * dtype.itemsize
    return TensorCheck(len(wanted), size, str(dtype).removeprefix("torch."))


def check_exported_tokenizer(folder: Path, facts: TokenizerFacts) -> Any:
    """Loads the tokenizer with transformers and compares its ids with prepare's, and its template with the folder's.

    Returns the tokenizer. Raises SftError.
    """
    from transformers import AutoTokenizer  # start-up: transformers takes a second

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    kind = find_family(read_json(folder / "config.json"), str(folder / "config.json"))
    check_canaries(tokenizer, facts.tokenizer.canaries, str(folder / "tokenizer.json"), remedy(kind))
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if tokenizer.chat_template != template:
        raise SftError(
            f"{folder / 'chat_template.jinja'}: AutoTokenizer loads another template; next: remove the one in tokenizer_config.json"
        )
    for name, found, expected in (
        ("eos_token", tokenizer.eos_token_id, facts.eos_id),
        ("pad_token", tokenizer.pad_token_id, facts.pad_id),
    ):
        if found != expected:
            raise SftError(
                f"{folder / 'tokenizer_config.json'}: {name} has id {found}, dataset.json has {expected}; {AGAIN}"
            )
    return tokenizer


def check_generation(folder: Path, facts: TokenizerFacts) -> list[int]:
    """Checks that generate() stops on every trained terminator, and the special ids in config.json. Raises SftError.

    Returns the ids on which generate() stops.
    """
    from transformers import AutoConfig, GenerationConfig  # start-up: transformers takes a second

    generation = GenerationConfig.from_pretrained(folder)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if missing := [i for i in facts.terminator_ids if i not in stops]:
        raise SftError(
            f"{folder / 'generation_config.json'}: eos_token_id: {stops} does not include the trained terminator {missing}; {AGAIN}"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, found, wanted in (
        ("eos_id", config.eos_token_id, facts.eos_id),
        ("pad_id", config.pad_token_id, facts.pad_id),
    ):
        if found != wanted:
            raise SftError(f"{folder / 'config.json'}: {name}: {found}, dataset.json has {wanted}; {AGAIN}")
    return [int(i) for i in stops]
