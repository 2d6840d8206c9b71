"""Real tokenizers of other model families: the ids and masks that `tokenizers` gives, by the fast encoder."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peers
from chat_samples import SOURCE
from sft.data.normalization import Normalizer
from sft.data.offset_encoder import targets_of
from sft.data.tokenize import Encoded, Encoder
from sft.recipe.schema import Prepare
from sft.sources.blocks import LineBlock

TEMPLATE = (
    "{% for m in messages %}{{ START + m['role'] + '\n' + m['content'] + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant\n' }}{% endif %}"
)
TURN_TOKENS = {
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "gptoss": ("<|start|>", "<|end|>"),
    "deepseek_v3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "mistral_nemo": ("[INST]", "</s>"),
}
"""Special tokens that begin and end a turn here. The Qwen tokenizers have ChatML's."""
SPACE, COMPOSED, DECOMPOSED = "\u2581", "caf\u00e9 \u1e69", "cafe\u0301 s\u0323\u0307"
TEXTS = [
    "It's 1234567 apples,  isn't it?\n\n\n  def f(x):\n\treturn x**2\r\n", f"{COMPOSED} — übergroß, русский, 日本語、한국어",
    f"{DECOMPOSED} e\u0301e\u0301", "\u0338 begins with a mark", "ends in e", "\u212b \u2126 \uf900 singletons", f"a{SPACE}b {SPACE}{SPACE}{SPACE}c",
    "<0x0A> is text", "👩‍👩‍👧‍👦 🦊", " leading", "trailing ", "\u1112\u1161\u11ab jamo", "x" * 300, "\u00a0\u3000wide",
]  # fmt: skip


@functools.cache
def made(name: str, template_dir: Path, engine: str = "auto") -> Encoder:
    start, end = TURN_TOKENS.get(name, ("<|im_start|>", "<|im_end|>"))
    file = template_dir / f"{name}.jinja"
    file.write_text(TEMPLATE.replace("START", json.dumps(start)).replace("END", json.dumps(end)))
    table = Prepare(tokenizer="t", sources=(SOURCE,), template=file.name, encoder=engine, parity_sample=0)
    return Encoder(peers.tokenizer(name), table, lambda path: file)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("templates")


def rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    made = []
    for text in TEXTS:
        turns = [("user", text), ("assistant", rng.choice(TEXTS)), ("user", rng.choice(TEXTS)), ("assistant", text)]
        made.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return made


def documents(encoded: Encoded) -> list[tuple[list[int], list[bool]]]:
    ends = np.cumsum(encoded.lengths).tolist()
    return [
        (encoded.ids[start:end].tolist(), encoded.loss_mask[start:end].tolist())
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.TOKENIZERS)
def test_ids_and_masks_are_those_of_tokenizers_offsets(name: str, templates: Path) -> None:
    encoder = made(name, templates)
    assert encoder.vocabulary.byte_level and encoder.engine.name == "gigatoken"
    got = encoder.encode(rows(), SOURCE)
    assert not got.rejects
    for row, (ids, mask) in zip(rows(), documents(got), strict=True):
        runs, _ = encoder.template.render(encoder.reader(SOURCE).read(row))
        encoding = encoder.vocabulary.tokenizer.encode("".join(runs), add_special_tokens=False)
        targets, *_ = targets_of(encoding, runs)
        assert ids == encoding.ids
        assert mask == targets.tolist()
    assert got.proof["documents_proven"] == got.proof["documents"] == len(TEXTS)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.slow
def test_texts_that_the_tokenizer_changes_are_counted(name: str, templates: Path) -> None:
    encoder = made(name, templates)
    changed = sum(
        any(encoder.vocabulary.normalizer.changes(message["content"]) for message in row["messages"]) for row in rows()
    )
    assert 0 < changed < len(TEXTS)
    assert encoder.encode(rows(), SOURCE).proof["normalized_documents"] == changed


@pytest.mark.compile
def test_plain_rows_and_other_rows_give_the_same(templates: Path) -> None:
    folder = peers.tokenizer("qwen3")
    encoder = Encoder(folder, Prepare(tokenizer="t", sources=(SOURCE,), template="chatml"))
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows())
    plain, odd = encoder.encode_plain(LineBlock.of(lines), SOURCE)
    assert plain is not None
    slow = documents(encoder.encode(rows(), SOURCE))
    normalizer = encoder.vocabulary.normalizer
    assert odd == [i for i, row in enumerate(rows()) if any(normalizer.changes(m["content"]) for m in row["messages"])]
    assert documents(plain) == [slow[row] for row in plain.rows.tolist()]


@pytest.mark.seconds
def test_added_tokens_stand_between_texts_that_are_normalized(templates: Path) -> None:
    """A tokenizer takes "</think>" out before it composes ">" with the mark that follows."""
    encoder = made("qwen3", templates)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "</think>\u0338 e\u0301"}]
    got = encoder.encode([{"messages": messages}], SOURCE)
    assert not got.rejects
    assert encoder.vocabulary.decode(got.ids).decode().endswith("assistant\n</think>\u0338 \u00e9<|im_end|>")


def test_a_space_before_each_text_depends_on_the_text_before_it() -> None:
    steps = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    assert Normalizer.of({"normalizer": {"type": "Sequence", "normalizers": steps}}) is None
    assert Normalizer.of({"normalizer": {"type": "Sequence", "normalizers": steps[1:]}}) == Normalizer(
        marks_spaces=True
    )
    assert Normalizer.of({"normalizer": {"type": "NFKC"}}) is None
    assert Normalizer.of({"normalizer": {"type": "Sequence", "normalizers": []}}) == Normalizer.of({}) == Normalizer()


@pytest.mark.slow
def test_the_bytes_of_a_token_are_what_it_decodes_to(templates: Path) -> None:
    vocabulary = made("gemma3", templates).vocabulary
    assert vocabulary.token_bytes[vocabulary.tokenizer.token_to_id("<0x0A>")] == b"\n"
    assert vocabulary.token_bytes[vocabulary.tokenizer.token_to_id("\u2581the")] == b" the"
