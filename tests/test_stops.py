"""sft.evaluation.stops: where a reply ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sft.evaluation import stops

WORDS = ["It", " is", ".\n", "\nQ", ":", " <think>", "</think>"]


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[t] for t in tokens)


@pytest.mark.parametrize(
    ("tokens", "strings", "kept"),
    [
        ([0, 1, 2, 3, 4], ("\n\n",), 4),  # two tokens hold the stop string together
        ([0, 1, 2], ("\n\n",), None),
        ([0, 1, 2], (), None),
        ([0, 1, 2, 4], (":", "is"), 2),  # the first of several
        ([], ("x",), None),
    ],
)
def test_a_reply_ends_behind_the_token_that_completes_a_stop_string(
    tokens: list[int], strings: Sequence[str], kept: int | None
) -> None:
    cut = stops.cut_at_stop(tokens, decode, strings)
    assert cut == (None if kept is None else tokens[:kept])


def test_a_stop_string_inside_a_thought_does_not_end_the_reply() -> None:
    assert stops.cut_at_stop([5, 0, 6, 1], decode, ("It",), "</think>") is None
    assert stops.cut_at_stop([5, 0, 6, 0, 1], decode, ("It",), "</think>") == [5, 0, 6, 0]


def test_long_replies_are_cut_with_few_decodings() -> None:
    calls: list[int] = []

    def counting(tokens: Sequence[int]) -> str:
        calls.append(len(tokens))
        return "".join(map(chr, tokens))

    tokens = [ord("a")] * 1500 + [ord("!")] + [ord("b")] * 2500
    assert stops.cut_at_stop(tokens, counting, ("!",)) == tokens[:1501] and len(calls) <= 14


def test_a_reply_is_inside_a_thought_that_it_or_its_prompt_opened() -> None:
    assert stops.thinks("Who?", " <think>so", "</think>") and stops.thinks("Who?<think>\n", "so", "</think>")
    assert not stops.thinks("Who?", "Paris", "</think>")
