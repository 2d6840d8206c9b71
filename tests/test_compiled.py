"""sft.data.align finds what a slow reading of the rules finds; sft.data.compiled writes numbers as Python does."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.align import Alignment, VocabularyTable, align
from sft.data.compiled import NO_TARGET, TRAINED, WORD, compiled, words_of

pytestmark = pytest.mark.compile

LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 23, 24, 25, 40]
SPECIAL, EOS = len(LENGTHS), len(LENGTHS) + 1
BYTES = [bytes((7 * i + k) % 251 for k in range(n)) for i, n in enumerate(LENGTHS)] + [b"<|special|>", b"<|end|>"]
SIZES = np.array(list(map(len, BYTES)), dtype=np.uint16)
WORDS = np.frombuffer(b"".join(token[:WORD].ljust(WORD, b"\0") for token in BYTES), dtype="<u8")
SPELLED = np.frombuffer(bytearray(b"".join(BYTES) + bytes(WORD)), dtype=np.uint8)
IS_SPECIAL = np.array([False] * len(LENGTHS) + [True, True])
TABLE = VocabularyTable(
    WORDS, SIZES, (np.cumsum(SIZES) - SIZES).astype(np.uint32), words_of(SPELLED), np.uint32(SPECIAL), IS_SPECIAL, np.uint32(EOS)
)  # fmt: skip
FIELDS = [name for name in Alignment._fields if name != "ids"]


def follow(ids: list[int], text: bytes, documents: list[list[int]]) -> dict[str, list[int]] | None:
    """`documents`: where the runs of each end in the text."""
    first_run = np.cumsum([0, *map(len, documents)])
    run_ends = np.array([end for ends in documents for end in ends])
    padded = np.frombuffer(bytearray(text) + bytes(WORD), dtype=np.uint8)
    found = align(TABLE, np.array(ids, dtype=np.uint32), padded, first_run, run_ends)
    return found and {name: column.tolist() for name, column in found._asdict().items() if name != "ids"}


def slowly(ids: list[int], documents: list[list[int]]) -> dict[str, list[int]]:
    """The rules: a token is trained when all its bytes lie in one odd run, and it is not the first of its document."""
    made: dict[str, list[int]] = {name: [] for name in FIELDS}
    at = token = 0
    for edges in documents:
        made["offsets"].append(token)
        begins, trained, inside, merged = [0, *edges[:-1]], [], 0, 0
        begins[0] = at
        start = token
        while at < edges[-1]:
            number, end = ids[token], at + len(BYTES[ids[token]])
            run = next((r for r, (a, b) in enumerate(zip(begins, edges, strict=True)) if a <= at and end <= b), None)
            inside += sum(at < edge < end for edge in edges)
            merged += sum(at < edge < end for edge in edges[::2])  # where an untrained run ends
            if run is not None and run % 2 and token > start:
                trained.append(number)
                number |= int(TRAINED)
            made["tokens"].append(number)
            at, token = end, token + 1
        here = ids[start:token]
        made["num_targets"].append(len(trained))
        made["num_specials"].append(sum(i >= SPECIAL for i in here))
        made["num_straddling"].append(inside)
        made["num_merged"].append(merged)
        made["last_target"].append(trained[-1] if trained else int(NO_TARGET))
        made["eos_counts"].append(here.count(EOS) + (int(TRAINED) if here and here[-1] == EOS else 0))
    made["offsets"].append(token)
    return made


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], bytes, list[list[int]]]:
    ids, documents, at = [], [], 0
    for _ in range(draw(st.integers(1, 4))):
        mine = draw(st.lists(st.integers(0, len(BYTES) - 1), min_size=1, max_size=12))
        size = sum(len(BYTES[i]) for i in mine)
        edges = sorted(draw(st.lists(st.integers(0, size), max_size=5)))
        documents.append([at + edge for edge in [*edges, size]])
        ids += mine
        at += size
    return ids, b"".join(BYTES[i] for i in ids), documents


@settings(max_examples=400, deadline=None)
@given(batches())
def test_the_alignment_follows_the_rules(batch: tuple[list[int], bytes, list[list[int]]]) -> None:
    ids, text, documents = batch
    assert follow(ids, text, documents) == slowly(ids, documents)


def test_one_changed_byte_anywhere_is_found() -> None:
    ids = list(range(len(BYTES))) * 2
    text = b"".join(BYTES[i] for i in ids)
    documents = [[40, len(text)]]
    assert follow(ids, text, documents)
    for at in range(len(text)):
        changed = bytearray(text)
        changed[at] ^= 1
        assert not follow(ids, bytes(changed), documents), at


@pytest.mark.parametrize(
    ("ids", "documents"),
    [
        ([0, 1], [[1, 2]]),  # the last token goes beyond the document
        ([0, 1, 2], [[1, 3]]),  # a token is left over
        ([0], [[1, 3]]),  # one is missing
        ([0, 1, 2], [[2], [6]]),  # one lies across the edge of two documents
    ],
)
def test_ids_that_end_elsewhere_than_their_document_are_refused(ids: list[int], documents: list[list[int]]) -> None:
    text = b"".join(BYTES[i] for i in [0, 1, 2])[: documents[-1][-1]]
    assert not follow(ids, text, documents)


@pytest.mark.parametrize("empty", [np.zeros(WORD, dtype=np.uint8), np.frombuffer(bytes(WORD), dtype=np.uint8)])
def test_an_empty_text_is_no_array_of_another_type(empty: np.ndarray) -> None:
    longer = np.concatenate([empty, empty])
    longer.flags.writeable = empty.flags.writeable
    assert numba.typeof(words_of(empty)) == numba.typeof(words_of(longer))


@compiled
def add(total: int, one: int) -> int:
    return total + one


@compiled
def add_up(count: int) -> int:
    total = 0
    for _ in range(count):
        total = add(total, 1)
    return add(total, 2)


def test_a_function_is_compiled_once_whatever_constants_it_is_given() -> None:
    assert add_up(3) == 5
    assert len(add.signatures) <= 1  # none where what was compiled is read from the cache
