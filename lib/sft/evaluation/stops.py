"""Where a generated reply ends: stop strings, thoughts, and replies that repeat themselves. Standard library only.

In: token ids of a reply and a function that decodes them. Out: the tokens that remain, and what ended the reply.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

THINK_ENDS = {"none": None, "r1_style": "</think>"}
"""The text that ends a thought, by `[evaluate] process_output`. Only what follows it is scored."""
Decode = Callable[[Sequence[int]], str]


def cut_at_stop(
    tokens: Sequence[int], decode: Decode, stops: Sequence[str], think_end: str | None = None
) -> list[int] | None:
    """The tokens up to and including the one that completes a stop string; None when the text holds no stop string.

    With `think_end`, only the text behind it counts: a stop string inside a thought does not end the reply.

    More tokens never remove a stop string from the text, so a bisection finds the shortest prefix that holds one in
    log2(tokens) decodings. Example: of the tokens "It", " is", ".\\n", "\\nQ", ":" the first four complete the stop string
    "\\n\\n", and the fifth is dropped.
    """

    def has_stop(length: int) -> bool:
        text = decode(tokens[:length])
        answer = text.partition(think_end)[2] if think_end else text
        return any(stop in answer for stop in stops)

    if not stops or not has_stop(len(tokens)):
        return None
    return list(tokens[: bisect_left(range(len(tokens)), True, key=has_stop)])


def thinks(prompt: str, reply: str, think_end: str) -> bool:
    """Whether a reply without `think_end` is inside a thought: it, or the end of its prompt, opens one.

    `think_end` is "</think>", and "<think>" opens the thought.
    """
    think_start = think_end.replace("/", "")
    return reply.lstrip().startswith(think_start) or prompt.rstrip().endswith(think_start)


def repeats(tokens: Sequence[int]) -> bool:
    """Whether a reply repeats itself: it has at least 16 4-grams, and fewer than half of them are distinct."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(grams) >= 16 and len(set(grams)) < len(grams) / 2
