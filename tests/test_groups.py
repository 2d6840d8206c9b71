"""The validation split by group: rows that belong together are on one side, whatever reads them and wherever they are."""

from __future__ import annotations

import json
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_samples import SOURCE, encoder, tokenizer_folder
from preparing import stage, write_rows
from sft.common.errors import SftError
from sft.data import prepare
from sft.data.batch import conversation_hashes, group_key, group_span
from sft.data.chunks import group_text, group_value, set_groups
from sft.data.dataset import Dataset
from sft.data.fast.turns import find_groups
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.schema import Source
from sft.sources.blocks import LineBlock

folder = tokenizer_folder


def turns(*texts: str, system: str = "") -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system else said


def chains(count: int = 60) -> list[dict[str, Any]]:
    """Conversations exported as rows of 1, 2 and 3 turns; every second one with a system message."""
    return [
        {"messages": turns(*(f"c{c} {w}{t}" for t in range(length) for w in "qa"), system="Be brief." * (c % 2)), "thread": f"t{c % 7}"}
        for c in range(count) for length in (1, 2, 3)
    ]  # fmt: skip


def sides(out: Any, key: str) -> tuple[set[str], set[str]]:
    """The words that begin with `key` in the training and in the validation split."""
    from sft.data.vocabulary import Vocabulary

    vocabulary = Vocabulary(out / "data" / "tokenizer")
    found = []
    for split in ("data", "validation"):
        texts = " ".join(vocabulary.decode(ids).decode() for ids, _ in Dataset.open(out / split))
        found.append({word for word in texts.replace("<", " ").split() if word.startswith(key) and word[1:].isdigit()})
    return found[0], found[1]


@pytest.mark.parametrize("layout", ["plain", "prompt", "jinja"])
def test_rows_that_begin_with_the_same_user_message_stay_on_one_side(tmp_path, layout):
    rows = [{"messages": r["messages"]} for r in chains()]
    if layout == "prompt":
        rows = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.jinja").write_text(TEMPLATES["tulu"].jinja)
    s = stage(tmp_path, validation_fraction=0.3, **({"template": "own.jinja"} if layout == "jinja" else {}))
    prepare.prepare(s)
    trained, held = sides(s.out, "c")
    assert not trained & held and len(trained) + len(held) == 60 and 5 < len(held) < 35
    names = [f"c{c}" for c in range(60)]
    assert held == {n for n in names if n in held_out_names(names)}


def held_out_names(names: list[str]) -> set[str]:
    from sft.data.mix import held_out

    hashes = np.array([conversation_hashes(turns(f"{n} q0", "x"))[1] for n in names], dtype=np.uint64)
    return {n for n, held in zip(names, held_out(hashes, 0.3), strict=True) if held}


def test_a_column_that_the_recipe_names_is_the_group_over_all_sources(tmp_path):
    for name, part in (("a", chains()[::2]), ("b", chains()[1::2])):
        write_rows(
            tmp_path / f"{name}.jsonl",
            [{**r, "messages": turns(f"{r['thread']} {i}", "x")} for i, r in enumerate(part)],
        )
    rows = (tmp_path / "a.jsonl").read_text() + json.dumps({"messages": turns("no thread", "x")}) + "\n"
    (tmp_path / "a.jsonl").write_text(rows)
    both = tuple(Source(path=f"{name}.jsonl", validation_group="thread") for name in "ab")
    s = stage(tmp_path, validation_fraction=0.3, sources=both)
    prepare.prepare(s)
    trained, held = sides(s.out, "t")
    assert not trained & held and len(trained) + len(held) == 7 and held
    assert [json.loads(line)["reason"] for line in (s.out / "rejects.jsonl").read_text().splitlines()] == ["no_group"]


def test_the_group_is_the_first_user_message_and_not_the_system_message():
    def group(messages: list[dict[str, str]], system: str = "") -> int:
        return conversation_hashes(messages, system)[1]

    one = group(turns("q", "a"))
    assert one == group(turns("q", "b", "q2", "c", system="S")) == group(turns("q", "a", system="S"), "S")
    assert one != group(turns("q2", "a")) and one != group([{"role": "assistant", "content": "q"}])
    assert group(turns("", "a")) != group(turns("", "b"))
    assert one == group(turns(" q\r\n", "a")) and group(turns(" ", "a")) != group(turns(" ", "b"))


@pytest.mark.parametrize("other", [1.0, "1", " 1 ", Decimal(1), Decimal("1.0")])
def test_a_number_is_the_same_group_however_a_file_has_it(other: Any) -> None:
    assert group_text(other) == group_text(1)


def test_a_group_may_be_a_field_inside_a_column() -> None:
    row = {"meta": {"thread": {"id": 7}}, "a.b": 3}
    assert [group_value(row, name) for name in ("meta.thread.id", "a.b", "meta.x.id", "meta.thread.id.x", "x")] == [
        7, 3, None, None, None,
    ]  # fmt: skip


def test_the_field_of_the_group_is_read_and_the_others_beside_it_are_not(tmp_path: Path) -> None:
    row = {"messages": turns("q", "a"), "info": {"thread": {"key": "7"}}}
    source = Source(path="a.jsonl", validation_group="info.thread.key")
    write_rows(tmp_path / "a.jsonl", [row])
    prepare.prepare(stage(tmp_path, sources=(source,)))
    write_rows(tmp_path / "a.jsonl", [{**row, "info": {**row["info"], "note": "lost"}}])
    with pytest.raises(SftError, match=r"info \(1 of 1 rows\)"):
        prepare.prepare(stage(tmp_path, sources=(source,)))


def test_values_that_are_no_group_and_values_of_any_kind() -> None:
    assert [group_text(value) for value in (None, "", " ", float("nan"))] == [""] * 4
    found = [group_text(v) for v in (0, 1.5, True, [1], {"a": 1}, 2**63, float("inf"), Decimal("-inf"), "é")]
    assert len(set(found)) == len(found) and all(found)


ROLE_TEXTS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.sampled_from(["", "user", "x\0user\0y", "user\0", "ä", " \v\t", "\n a b\r\f"])),
    min_size=1, max_size=4,
)  # fmt: skip


@pytest.mark.compile
@given(st.lists(ROLE_TEXTS, min_size=1, max_size=4))
def test_compiled_code_finds_the_same_groups(documents):
    texts = ["\0".join(part for turn in document for part in turn).encode() for document in documents]
    ends = np.cumsum([len(text) for text in texts])
    hashed = np.frombuffer(bytearray(b"".join(texts)), dtype=np.uint8)
    spans = find_groups(hashed, ends, np.empty((3, len(texts)), dtype=np.int64))
    found = [bytes(hashed[a:b]) for a, b, _ in spans.T]
    assert found == [text[slice(*group_span(text))] for text in texts]
    assert all(changes or group_key(text) == text for text, changes in zip(found, spans[2], strict=True))


SPELLINGS = {
    "composed": "é ㄱ\uac00 one\ntwo",
    "decomposed": unicodedata.normalize("NFD", "é ㄱ\uac00 one\ntwo"),
    "Windows": "é ㄱ\uac00 one\r\ntwo",
    "wide spaces around it": "\u3000é ㄱ\uac00 one\ntwo\u00a0",
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_a_message_is_the_same_group_however_it_is_spelled(folder: Path, text: str) -> None:
    rows = [{"messages": turns(t, "a")} for t in (SPELLINGS["composed"], text, "é ㄱ\uac00 one two", "one")]
    made = encoder(folder)
    block = LineBlock.of("".join(json.dumps(row) + "\n" for row in rows).encode())
    plain, odd = made.encode_plain(block, SOURCE)
    python = made.encode(rows, SOURCE)
    assert not odd and plain is not None
    assert plain.groups.tolist() == python.groups.tolist()
    assert python.groups[0] == python.groups[1] != python.groups[2] and len(set(python.groups.tolist())) == 3
    batch = LineBlock.of("".join(json.dumps({"g": t}) + "\n" for t in (SPELLINGS["composed"], text)).encode()).batch()
    assert len(set(set_groups(batch, "g").tolist())) == 1


def test_half_of_a_surrogate_pair_has_a_group() -> None:
    assert conversation_hashes(turns("\ud83e", "a"))[1] != conversation_hashes(turns("\ud83f", "a"))[1]
