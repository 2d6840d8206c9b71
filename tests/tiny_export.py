"""A tiny tokenizer with a chat template, tiny weights, and dataset.json's facts about them, made on the spot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from sft.formats.dataset import TemplateFacts, TokenizerFacts, TokenizerFile
from sft.recipe.architecture import ModelConfig, Yarn
from sft.recipe.presets import PRESETS

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLMO2 = replace(
    PRESETS["olmo2-tiny"], n_layers=2, d_model=64, n_kv_heads=2, head_dim=16, intermediate_size=96, vocab_size=384
)
OLMO3 = replace(OLMO2, n_layers=5, window=48, rope_theta=8e6, rope_scaling=Yarn(old_context=64))
QWEN3 = replace(
    PRESETS["qwen3-tiny"], n_layers=2, d_model=64, head_dim=16, intermediate_size=96, vocab_size=384
)  # tied
LLAMA3 = replace(PRESETS["llama3-tiny"], n_layers=2, d_model=64, head_dim=16, intermediate_size=96, vocab_size=384)
_LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "And how much is 17 plus 25? 17 plus 25 is 42. Name three primary colours. Red, yellow and blue.",
    "user assistant system",
]


def tokenizer(folder: Path, size: int = 300) -> TokenizerFacts:
    """Writes a byte-level BPE tokenizer folder; returns dataset.json's facts about it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_LINES, trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "pad_token": special[3]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": False}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    canaries = {
        text: tuple(made.encode(text, add_special_tokens=False).ids) for text in ("Paris 42\n", "<|im_start|>user\nhé")
    }
    return TokenizerFacts(
        vocab_size=made.get_vocab_size(),
        eos_id=0,
        pad_id=3,
        terminator_ids=(2,),
        boundaries="index",
        eos_appended=False,
        tokenizer=TokenizerFile(sha256(folder / "tokenizer.json"), canaries),
        template=TemplateFacts("test", sha256(folder / "chat_template.jinja")),
    )


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Held(dict[str, torch.Tensor]):
    """Tensors in memory, read as those of a checkpoint are."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self[name][start:stop]


def weights(config: ModelConfig, seed: int = 0) -> Held:
    """Random fp32 weights, far enough from their initial values that every tensor matters."""
    from sft.model.hf import shapes

    generator = torch.Generator().manual_seed(seed)
    made = Held()
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        made[name] = 1 + 0.2 * noise if len(shape) == 1 else noise * (0.5 if "embed" in name else 0.12)
    return made
