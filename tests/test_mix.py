"""The mix: weights count as the ancestor's, choices follow from digests, nothing contaminated or double gets in."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.common.errors import SftError
from sft.data.decontaminate import Screen, words
from sft.data.mix import Mixed, Pool, Selection, cap, choose, first_copies, held_out, mix, wanted
from sft.recipe.schema import Source


def pool(names, lengths=None, excluded=(), fraction=0.0) -> Pool:
    """`names` stand for the tokens, the conversation and the group of each document. `fraction` of the groups are held out."""
    digests = [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in names]
    made = Pool.empty(len(digests), deduplicate=True)
    made.digests[:] = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    made.lengths[:] = 10 if lengths is None else lengths
    made.conversations[:] = made.digests[:, 0]
    made.excluded[list(excluded)] = True
    made.held[:] = held_out(made.conversations, fraction)
    made.held_digests = made.digests[made.held, 0]
    return made


def by_number(chosen: Selection, values: list[Any]) -> Any:
    found = np.empty(len(chosen), dtype=np.int64)
    found[chosen.numbers] = np.concatenate(values)
    return found


def index_of(chosen: Selection) -> Any:
    """[documents] The place in its pool of each, by number."""
    return by_number(chosen, list(chosen.index_of))


def source_of(chosen: Selection) -> Any:
    """[documents] The source of each, by number."""
    return by_number(chosen, [np.full(len(index), source) for source, index in enumerate(chosen.index_of)])


def taken(mixed: Mixed, source: int = 0) -> list[int]:
    return sorted(index_of(mixed.data)[source_of(mixed.data) == source].tolist())


@pytest.mark.parametrize(
    ("weight", "count"),
    [(1.0, 100), (0.5, 50), (0.29, 29), (2.0, 200), (1.5, 150), (7, 7), (1, 1), (250, 250), (0.001, 0)],
)
def test_a_fraction_samples_a_multiple_repeats_and_an_integer_is_a_row_count(weight, count):
    assert wanted(weight, 100) == count


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.7, 2.0, 3.2, 7, 250])
def test_every_document_appears_equally_often_but_for_the_remainder(weight):
    mixed = mix([pool(range(100))], [Source(path="a", weight=weight)], seed=1)
    times = np.bincount(index_of(mixed.data), minlength=100)
    assert times.sum() == wanted(weight, 100)
    assert times.max() - times.min() <= 1


def test_a_larger_weight_keeps_what_a_smaller_one_took():
    small, large = (set(taken(mix([pool(range(500))], [Source(path="a", weight=w)], seed=3))) for w in (0.3, 0.6))
    assert small < large


def test_the_same_seed_gives_the_same_order_and_another_seed_another():
    sources = [Source(path="a"), Source(path="b", weight=0.5)]
    pools = [pool(range(200)), pool(range(1000, 1200))]
    a, b, c = (mix(pools, sources, seed=s).data for s in (1, 1, 2))
    assert np.array_equal(index_of(a), index_of(b)) and np.array_equal(source_of(a), source_of(b))
    assert not np.array_equal(index_of(a), index_of(c))
    assert len(a) == 300


def test_sampling_does_not_depend_on_the_order_of_the_rows():
    names = list(range(300))
    one = mix([pool(names)], [Source(path="a", weight=0.4)], seed=5)
    other = mix([pool(names[::-1])], [Source(path="a", weight=0.4)], seed=5)
    assert {names[i] for i in taken(one)} == {names[::-1][i] for i in taken(other)}


@given(st.integers(1, 300), st.integers(0, 900), st.integers(0, 10))
def test_choose_gives_exactly_what_is_asked_for(n, count, seed):
    ranks = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**63, n).astype(np.uint64)
    chosen = choose(ranks, count)
    assert len(chosen) == count
    assert (np.diff(chosen) >= 0).all()
    assert np.ptp(np.bincount(chosen, minlength=n)) <= 1


def test_caps_cut_documents_and_tokens_and_prefer_first_copies():
    ranks = np.arange(10, dtype=np.uint64)
    lengths = np.full(10, 100, dtype=np.int64)
    chosen = choose(ranks, 20)
    assert cap(chosen, ranks, lengths, 10, 0).tolist() == list(range(10))
    assert cap(chosen, ranks, lengths, 0, 350).tolist() == [0, 1, 2]
    assert cap(chosen, ranks, lengths, 0, 0).tolist() == chosen.tolist()
    once = choose(ranks, 10)
    lengths[:4] = [100, 900, 50, 300]
    assert cap(once, ranks, lengths, 0, 400).tolist() == [
        0,
        2,
        4,
        5,
    ]  # 900 and 300 do not fit, what is behind them does
    assert cap(once, ranks, lengths, 0, 49).tolist() == []
    mixed = mix([pool(range(100))], [Source(path="a", weight=2.0, max_documents=30)], seed=1)
    assert len(set(taken(mixed))) == len(taken(mixed)) == 30


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 400))
def test_a_cap_on_tokens_takes_every_document_that_still_fits(lengths, room):
    left, expected = room, []
    for i, length in enumerate(lengths):
        if length <= left:
            left -= length
            expected.append(i)
    ranks = np.arange(len(lengths), dtype=np.uint64)
    if room:
        assert cap(choose(ranks, len(ranks)), ranks, np.array(lengths), 0, room).tolist() == expected


def test_exact_duplicates_go_over_all_sources_and_the_first_stays():
    mixed = mix([pool([1, 2, 1, 3]), pool([3, 4, 4])], [Source(path="a"), Source(path="b")], seed=1, deduplicate=True)
    assert taken(mixed, 0) == [0, 1, 3] and taken(mixed, 1) == [1]
    assert [r.duplicates for r in mixed.report] == [1, 2]
    assert first_copies(pool([5, 5, 5]).digests).tolist() == [True, False, False]


def test_the_same_source_named_twice_is_not_a_duplicate_unless_asked():
    mixed = mix([pool(range(10))] * 2, [Source(path="a"), Source(path="a", weight=0.5)], seed=1)
    assert len(mixed.data) == 15


def test_validation_is_stable_when_the_data_grows_and_never_trained():
    before, after = range(1000), range(3000)
    sources = [Source(path="a")]
    small = mix([pool(before, fraction=0.1)], sources, seed=1)
    large = mix([pool(after, fraction=0.1)], sources, seed=99)
    held_small, held_large = set(index_of(small.validation).tolist()), set(index_of(large.validation).tolist())
    assert held_small == {i for i in held_large if i < 1000}
    assert not held_large & set(index_of(large.data).tolist())
    assert 50 < len(held_small) < 150


def test_copies_of_a_held_out_conversation_are_not_trained():
    mixed = mix([pool([i % 50 for i in range(200)], fraction=0.3)], [Source(path="a", weight=3.0)], seed=1)
    assert not {i % 50 for i in index_of(mixed.data).tolist()} & {i % 50 for i in index_of(mixed.validation).tolist()}


def test_a_larger_fraction_holds_out_what_a_smaller_one_held():
    said = pool(range(2000)).conversations
    assert (held_out(said, 0.05) <= held_out(said, 0.2)).all()
    assert not held_out(said, 0.0).any()


@pytest.mark.parametrize("weight", [0.5, 7, 3.0])
def test_validation_does_not_depend_on_how_many_documents_there_are(weight):
    small, large = (
        set(index_of(mix([pool(range(n), fraction=0.2)], [Source(path="a", weight=weight)], seed=n).validation))
        for n in (1000, 2000)
    )
    assert small == {i for i in large if i < 1000} and len(small) > 50


def test_a_conversation_is_in_validation_once_over_all_sources():
    pools = [pool([i % 100 for i in range(300)], fraction=0.3), pool(range(150), fraction=0.3)]
    mixed = mix(pools, [Source(path="a", weight=2.0), Source(path="b")], seed=1)
    said = [
        pools[s].conversations[i] for s, i in zip(source_of(mixed.validation), index_of(mixed.validation), strict=True)
    ]
    assert len(said) == len(set(said)) > 25


def test_conversations_that_differ_in_calls_thoughts_or_masks_are_all_in_validation():
    """Their roles and contents are the same, their tokens are not."""
    other = pool(range(200), fraction=1.0)
    other.conversations[:] = np.arange(200, dtype=np.uint64) // 10
    other.held = held_out(other.conversations, 0.3)
    other.held_digests = other.digests[other.held, 0]
    entry = mix([other], [Source(path="a")], seed=1).report[0]
    assert entry.validation == entry.held_out > 20 and entry.held_out + entry.available == 200
    copies = mix([pool([i % 50 for i in range(200)], fraction=0.3)], [Source(path="a")], seed=1).report[0]
    assert copies.validation + copies.validation_copies == copies.held_out == 4 * copies.validation


def test_contaminated_documents_are_in_no_split():
    mixed = mix([pool(range(100), excluded=range(0, 100, 2), fraction=0.2)], [Source(path="a")], seed=1)
    assert all(i % 2 for i in [*index_of(mixed.data).tolist(), *index_of(mixed.validation).tolist()])
    assert mixed.report[0].contaminated == 50


def test_a_mix_without_documents_is_an_error():
    with pytest.raises(
        SftError,
        match=r"no document is left to train on: a: found 100, available 100, taken 0 \(weight 0.001\); next: ",
    ):
        mix([pool(range(100))], [Source(path="a", weight=0.001)], seed=1)


QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def screen(*texts: str, n: int = 8, overlap: float = 0.5) -> Screen:
    return Screen([(f"eval:{i}", {"question": t, "answer": "72"}) for i, t in enumerate(texts)], n, overlap)


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        (QUESTION, True),
        ("Please solve:\n" + QUESTION.upper().replace(",", ";") + " Thanks!", True),
        (QUESTION.replace("in", "\uff49\uff4e"), True),  # full-width letters are the same letters
        ("Natalia sold clips to 48 of her friends.", False),  # one n-gram of twelve
        ("Weng earns $12 an hour for babysitting and then she sold half as many clips", False),
        ("", False),
    ],
)
def test_a_conversation_that_repeats_an_evaluation_text_is_found(text, hit):
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}
    assert screen("something else entirely that is long enough to count", QUESTION).hits([row]).tolist() == [
        1 if hit else -1
    ]


def test_evaluation_texts_shorter_than_an_ngram_are_matched_whole():
    s = screen("Where do grey otters sleep?", n=8)
    found = s.hits(
        [["So, where do GREY otters sleep at night"], ["where do otters sleep"], ["Where do grey", "otters sleep"]]
    )
    assert found.tolist() == [0, -1, 0] and s.too_short == 1


def test_instructions_that_many_rows_share_are_not_looked_for():
    task = "Answer the following question with a single word and nothing else at all please."
    rows = [
        (str(i), {"task": task, "question": f"What is the exact height of tower number {i} in metres"})
        for i in range(30)
    ]
    s = Screen(rows, 8, 0.5)
    assert s.shared == 30 and len(s.texts) == 30
    assert s.hits([[task], ["What is the exact height of tower number 7 in metres"]]).tolist() == [-1, 7]


def test_very_short_evaluation_texts_are_counted_not_matched():
    s = screen("too short", "yes")
    assert s.texts == [] and s.too_short == 4
    assert s.hits([{"a": "too short"}]).tolist() == [-1]


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=30).map(" ".join), max_size=4),
    st.lists(st.sampled_from("abcdefgh"), max_size=40),
)
def test_the_screen_agrees_with_comparing_sets_of_ngrams(texts, conversation):
    n, overlap = 3, 0.4
    s = Screen([(str(i), t) for i, t in enumerate(texts)], n, overlap)

    def grams(text: str) -> set[tuple[str, ...]]:
        w = words(text)
        return {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}

    found = grams(" ".join(conversation))
    expected = any(g and len(g & found) / len(g) >= overlap for g in map(grams, texts))
    assert bool(s.hits([{"x": " ".join(conversation)}])[0] >= 0) == expected
