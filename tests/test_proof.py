"""The mask proof: eight published failures of SFT tools, each caught or impossible here, and masks against an independent oracle.

The oracle writes a conversation down by hand, character by character with its flag, and asks `tokenizers` for offsets. It shares
nothing with the code under test but the tokenizer.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from chat_samples import (
    ENDS_TURNS_IN_EOS,
    EOS,
    IM_END,
    SOURCE,
    any_text,
    chat,
    conversations,
    encoder,
    plain_text,
    text_of,
    tokenizer_folder,
    turns,
)
from sft.common.errors import SftError
from sft.data.tokenize import Encoder
from sft.recipe.chat_templates import HELPFUL, NO_FUNCTIONS, OLMO, TEMPLATES

MULTI = chat("What is 2+2?", "4", "And 3+3?", "6", "Thanks!\n", "You are welcome.")


folder = tokenizer_folder


@pytest.fixture(scope="module")
def encoders(folder: Path) -> dict[str, Encoder]:
    return {name: encoder(folder, name) for name in TEMPLATES}


def with_template(folder: Path, text: str) -> Encoder:
    return Encoder(
        folder, encoder(folder).prepare.__class__(tokenizer="t", sources=(SOURCE,), template="x.jinja"), None, text
    )


# Templates as they stand in published tokenizer folders: nothing in them says what is to be trained.
STOCK = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        IM_END,
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "olmo": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' + message['content'] }}"
        "{% if not loop.last %}{{ '<|im_end|>\\n' }}{% else %}{{ eos_token }}{% endif %}{% else %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}{% endfor %}",
        IM_END,
    ),
}


@pytest.fixture(scope="module")
def stock(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    made = tmp_path_factory.mktemp("stock")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>", "<bos>"])
    tokenizer.save(str(made / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<bos>"}))
    return {name: with_template(made, text) for name, (text, _) in STOCK.items()}


# --- eight published failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_turn_terminator_is_trained_after_every_turn_that_has_one(name: str, encoders: Any) -> None:
    """axolotl #3754: the token that ends a turn was never trained, so the model did not stop."""
    made = encoders[name]
    got = made.encode([MULTI], SOURCE)
    terminators = set(made.identity.terminator_ids)
    ends_turns = TEMPLATES[name].turns(EOS)["assistant"].stop  # the simple layouts end only the conversation
    answers = 3 if ends_turns else 1
    assert terminators and sum(number in terminators for number in got.ids[got.loss_mask].tolist()) == answers
    assert int(got.ids[got.loss_mask][-1]) in terminators


@pytest.mark.parametrize("name", STOCK)
def test_turn_terminator_that_is_not_eos_is_trained_with_stock_templates(name: str, stock: Any) -> None:
    """axolotl #3754, where it was met: a template whose turns end in another token than EOS."""
    made, stop = stock[name], STOCK[name][1]
    got = made.encode([MULTI], SOURCE)
    last = EOS if name == "olmo" else stop
    assert text_of(made, got, trained=True) == f"4{stop}6{stop}You are welcome.{last}"
    assert made.identity.terminator_ids == tuple(sorted({made.vocabulary.specials[token] for token in (stop, last)}))


def test_template_that_hides_its_terminator_from_the_mask_is_refused(folder: Path) -> None:
    """axolotl #3754, the template's fault."""
    hidden = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(SftError, match="ends before the terminator"):
        with_template(folder, hidden)
    with pytest.raises(SftError, match="never learn to stop"):
        with_template(folder, "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_scaffold_is_never_trained(name: str, encoders: Any) -> None:
    """prime-rl #2492: role headers and newlines between turns were trained."""
    made = encoders[name]
    spoken = text_of(made, made.encode([MULTI], SOURCE), trained=True)
    for token in (EOS, IM_END):
        spoken = spoken.replace(token, "")
    assert spoken.replace(" ", "") == "46Youarewelcome."


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_multi_turn_row_is_dropped(name: str, encoders: Any) -> None:
    """prime-rl #2470: every row with two or more turns was dropped, because a prefix of it renders differently."""
    thinking = chat("a", "<think>\n1\n</think>\n\nb", "c", "<think>\n2\n</think>\n\nd")
    rows = [MULTI, thinking, chat("a", "b"), MULTI]
    got = encoders[name].encode(rows, SOURCE)
    assert got.rejects == [] and got.rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_is_never_all_ones(name: str, encoders: Any) -> None:
    """Megatron-Bridge #3359: without generation markers in the template everything was trained."""
    made = encoders[name]
    got = made.encode([MULTI, chat("only a question", "x")], SOURCE)
    assert (got.num_targets < got.lengths // 2).all() and (got.num_targets > 0).all()
    spoken = text_of(made, got, 0, trained=True) + text_of(made, got, 1, trained=True)
    assert not any(text in spoken for text in ("What", "Thanks", "question", "OLMo"))


@pytest.mark.parametrize("name", STOCK)
def test_mask_is_never_all_ones_with_stock_templates(name: str, stock: Any) -> None:
    """Megatron-Bridge #3359, where it was met: templates without generation markers."""
    made = stock[name]
    assert "generation %}" not in made.template.text
    got = made.encode([MULTI, chat("only a question", "x")], SOURCE)
    assert (got.num_targets < got.lengths // 2).all() and got.rejects == []
    spoken = text_of(made, got, 0, trained=True) + text_of(made, got, 1, trained=True)
    scaffold = ("What", "Thanks", "question", "user", "model", "assistant", "start", "\n")
    assert not any(text in spoken for text in scaffold)


@pytest.mark.parametrize("name", STOCK)
def test_mask_is_never_all_zeros_with_stock_templates(name: str, stock: Any) -> None:
    """marin #7237, where it was met: without generation markers transformers' assistant mask is all zeros."""
    made = stock[name]
    silent = [dict(m, train=False) for m in MULTI["messages"]]
    got = made.encode([{"messages": silent}, MULTI, chat("a", "b")], SOURCE)
    assert [(bad.row, bad.reason) for bad in got.rejects] == [(0, "nothing_to_train")]
    assert got.rows.tolist() == [1, 2]
    assert got.num_targets.tolist() == [int(part.sum()) for part in np.split(got.loss_mask, [got.lengths[0]])]
    assert text_of(made, got, 0, trained=True).startswith("4") and text_of(made, got, 1, trained=True).startswith("b")


def test_mask_is_never_all_zeros(encoders: Any) -> None:
    """marin #7237: rows whose mask came out empty were trained on as nothing. Here each is a counted reject."""
    silent = [dict(m, train=False) for m in MULTI["messages"]]
    rows = [{"messages": silent}, MULTI, {"messages": turns(("user", "a"))}, {"prompt": "a", "completion": "b"}]
    for made in encoders.values():
        got = made.encode(rows, SOURCE)
        assert [(bad.row, bad.reason) for bad in got.rejects] == [(0, "nothing_to_train"), (2, "nothing_to_train")]
        assert got.num_targets.tolist() == [
            int(mask.sum()) for mask in (got.loss_mask[: got.lengths[0]], got.loss_mask[got.lengths[0] :])
        ]
        assert (got.num_targets > 0).all()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("olmo")])
def test_olmo_templates_take_multi_turn_conversations(name: str, encoders: Any) -> None:
    """open-instruct #1800: the last turn ends in EOS and the others in <|im_end|>, so a prefix of the conversation is no prefix of
    its rendering, and label spans could not be computed."""
    made = encoders[name]
    got = made.encode([MULTI], SOURCE)
    assert text_of(made, got, trained=True) == f"4{IM_END}6{IM_END}You are welcome.{EOS}"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ENDS_TURNS_IN_EOS])
def test_readers_that_look_for_eos_find_exactly_the_documents(name: str, encoders: Any) -> None:
    """OLMo-core #594: EOS is taken for a document boundary, so an EOS inside a conversation cuts it to pieces."""
    made = encoders[name]
    rows = [MULTI, chat(f"What is {EOS}?", f"It is {EOS}, the end."), chat("a", "b", "c")]
    got = made.encode(rows, SOURCE)
    assert made.identity.boundaries == "eos"
    found = [position + 1 for position, number in enumerate(got.ids.tolist()) if number == made.identity.eos_id]
    assert found == got.lengths.cumsum().tolist()


@pytest.mark.parametrize("name", ["tulu", "tulu_thinker", "zephyr"])
def test_templates_with_eos_inside_say_that_their_data_needs_an_index(name: str, encoders: Any, folder: Path) -> None:
    """torchtitan #3130: the same mistake with templates that end every turn in EOS. The data says so before anyone packs it."""
    made = encoders[name]
    got = made.encode([MULTI, MULTI], SOURCE)
    assert made.identity.boundaries == "index"
    assert len(got.lengths) == 2 < (got.ids == made.identity.eos_id).sum()
    # The same holds when the template is not known by name.
    assert with_template(folder, TEMPLATES[name].jinja).identity.boundaries == "index"


# --- masks against the oracle -----------------------------------------------------------------------------------------


def oracle(made: Encoder, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Ids and mask of a text given in parts, by `tokenizers` and its offsets. The text is cut before every answer."""
    ids: list[int] = []
    mask: list[bool] = []
    starts = [index for index, (_, flag) in enumerate(parts) if flag]
    for start, stop in itertools.pairwise([0, *starts, len(parts)]):
        group = parts[start:stop]
        flags = [flag for part, flag in group for _ in part]
        encoding = made.vocabulary.tokenizer.encode("".join(part for part, _ in group), add_special_tokens=False)
        # Tokens of one character's bytes share its offsets; a token is trained when all its characters are.
        ids += encoding.ids
        mask += [all(flags[a:b]) and b > a for a, b in encoding.offsets]
    return ids, mask


def olmo_parts(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    if messages[0]["role"] != "system":
        parts.append((f"<|im_start|>system\n{OLMO}{NO_FUNCTIONS}<|im_end|>\n", False))
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role != "assistant":
            suffix = NO_FUNCTIONS if role == "system" else ""
            parts.append((f"<|im_start|>{role}\n{content}{suffix}<|im_end|>\n", False))
            continue
        trained = message.get("train", True)
        last = index == len(messages) - 1
        parts.append(("<|im_start|>assistant\n", False))
        parts.append((content + (EOS if last else IM_END), trained))
        parts.append(("" if last else "\n", False))
    return parts


def tulu_parts(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    for index, message in enumerate(messages):
        parts.append((f"<|{message['role']}|>\n", False))
        if message["role"] == "assistant":
            parts.append((message["content"] + EOS, message.get("train", True)))
            parts.append(("" if index == len(messages) - 1 else "\n", False))
        else:
            parts.append((message["content"] + "\n", False))
    return parts


@pytest.mark.seconds
@settings(max_examples=150, deadline=None)
@given(row=conversations(text=plain_text), layout=st.sampled_from(["olmo", "tulu"]))
def test_masks_equal_the_oracle_on_random_conversations(encoders: Any, row: dict[str, Any], layout: str) -> None:
    made = encoders[layout]
    got = made.encode([row], SOURCE)
    ids, mask = oracle(made, (olmo_parts if layout == "olmo" else tulu_parts)(row["messages"]))
    if not any(mask):
        assert [bad.reason for bad in got.rejects] == ["nothing_to_train"]
        return
    assert got.ids.tolist() == ids
    assert got.loss_mask.tolist() == mask


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(conversations(text=any_text, roles=True, tools=True), min_size=1, max_size=5),
    name=st.sampled_from(list(TEMPLATES)),
)
def test_every_document_keeps_the_promises_whatever_the_content(
    encoders: Any, rows: list[dict[str, Any]], name: str
) -> None:
    made = encoders[name]
    got = made.encode(rows, SOURCE)
    assert sorted([*got.rows.tolist(), *(bad.row for bad in got.rejects)]) == list(range(len(rows)))
    assert len(got.ids) == len(got.loss_mask) == got.lengths.sum() and got.loss_mask.sum() == got.num_targets.sum()
    starts = got.lengths.cumsum() - got.lengths
    assert not got.loss_mask[starts].any() and (got.num_targets > 0).all()
    if made.identity.boundaries == "eos":
        assert ((got.ids == made.identity.eos_id).nonzero()[0] == starts + got.lengths - 1).all()
    for document, row in enumerate(got.rows.tolist()):
        text = text_of(made, got, document)
        for message in rows[row]["messages"]:
            assert message["content"] in text or "</think>" in message["content"]


def test_helpful_is_the_default_system_prompt_of_the_sft_template(encoders: Any) -> None:
    made = encoders["olmo_thinker_no_think_sft_tokenization"]
    assert text_of(made, made.encode([MULTI], SOURCE)).startswith(f"<|im_start|>system\n{HELPFUL}<|im_end|>\n")
