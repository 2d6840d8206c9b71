"""Fixed conversations for the gate: as token ids in the trained template, and greedy replies to their questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sft.checkpoint.hf_folder import HfFolder
from sft.export.blocks import DTYPES
from sft.export.logits import streamed_hf_model
from sft.formats.gate import GreedyReply
from sft.recipe.architecture import ModelConfig

CHATS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("And how much is 17 plus 25?", "17 plus 25 is 42."),
    ("Name three primary colours.", "Red, yellow and blue."),
)
"""Pairs of a question and its answer."""
REPLY_TOKENS = 48
KEEP_BYTES = 1_000_000_000
"""Weights that stay in memory from one token of a reply to the next."""


def trained_chats(tokenizer: Any, template: str, config: ModelConfig) -> list[list[int]]:
    """Token ids of three conversations in the trained template: one longer than the window, one of three turns, one of one."""
    longest = config.window + 64 if config.window else 512
    turns, ids = 1, [0]
    while len(ids) < longest:
        ids = _render(tokenizer, template, turns)
        turns = max(turns + 1, round(turns * longest / len(ids)) + 1)
    return [ids, _render(tokenizer, template, 3), _render(tokenizer, template, 1)]


def _render(tokenizer: Any, template: str, turns: int) -> list[int]:
    messages = []
    for turn in range(turns):
        question, answer = CHATS[turn % len(CHATS)]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    made = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)
    return [int(i) for i in made["input_ids"]]


@torch.inference_mode()
def greedy_replies(
    exported: HfFolder, tokenizer: Any, config: ModelConfig, stops: Sequence[int], tokens: int = REPLY_TOKENS
) -> tuple[GreedyReply, ...]:
    """Greedy replies of at most `tokens` tokens to the questions, in the folder's own template. `stops` are the stop ids."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q, _ in CHATS
    ]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    # fp16 has no fast kernels on a CPU, and fp32 holds its values exactly.
    dtype = torch.float32 if exported.config["dtype"] == "float16" else DTYPES[exported.config["dtype"]]
    model = streamed_hf_model(exported, config, range(config.n_layers), dtype, KEEP_BYTES)
    replies = _generate(model, ids, stops, tokens)
    return tuple(
        GreedyReply(prompt, tokenizer.decode(reply, skip_special_tokens=True), len(reply), reply[-1] in stops)
        for prompt, reply in zip(prompts, replies, strict=True)
    )


def _generate(model: Any, prompts: Sequence[list[int]], stops: Sequence[int], tokens: int) -> list[list[int]]:
    """Greedy decoding of a batch of prompts, padded on the left. A reply ends with its first stop id or after `tokens` tokens."""
    from transformers import DynamicCache  # start-up: transformers takes a second

    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    step = torch.tensor([[stops[0]] * (longest - len(p)) + p for p in prompts])  # the mask hides the padding
    cache = DynamicCache(config=model.config)
    replies: list[list[int]] = [[] for _ in prompts]
    for _ in range(tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        out = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        for reply, token in zip(replies, step[:, 0].tolist(), strict=True):
            if not reply or reply[-1] not in stops:
                reply.append(token)
        if all(reply[-1] in stops for reply in replies):
            break
    return replies
