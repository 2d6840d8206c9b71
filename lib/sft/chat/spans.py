"""Which characters of a rendering the model learns to emit. Pure functions of a text and of the rules of its template.

In: a rendered text, the stretch that a message wrote, and `TurnRules`. Out: the spans that are trained, and `to_runs`, the text cut
into runs, untrained and trained in turn. The generation prefix is scaffold, and the first terminator ends what is trained: a
message with more text after its terminator, or without one, rejects the row.

    text    <|im_start|>assistant\n<think>hm</think>Hello.<|im_end|>\n
    region  ^ everything that the message wrote                       ^
    header  ^^^^^^^^^^^^^^^^^^^^^^^ prefix ^^^^^^^                    gap: the newline
    trained                                hm</think>Hello.<|im_end|>
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft.chat.rows import Message
from sft.chat.special_tokens import SpecialTokens
from sft.chat.trace import Span
from sft.chat.words import missing_text


@dataclass(frozen=True)
class TurnRules:
    """How a template writes an assistant's turn, as the probe of two turns showed it."""

    header: str
    """Opens the turn; the generation prompt ends with the same text, so it is scaffold. "" when there is no generation prompt."""
    generation_prefix: str
    """What the generation prompt writes after the header, such as <think>."""
    terminator: str | None
    """The special token that ends a turn before the last one; None when the template writes none."""
    last_terminator: str
    """The special token that ends the last turn."""
    terminators: tuple[str, ...]
    """The special tokens that may end a turn, the one of a turn of tool calls included."""
    gap: str
    """What follows an answer in a turn without a terminator."""
    eos: str
    """The tokenizer's end-of-sequence token. It may follow a terminator."""
    last_gap: str = ""
    """What follows a last answer that the template leaves without a terminator."""
    closing: str = ""
    """What closes the thinking that the generation prefix opens; "" when it opens none, or the template writes no thinking."""
    from_next: bool = False
    """The next message writes the terminator: GLM's answers end with the token that opens the next role."""
    appended: str = ""
    """The terminator of a last answer that the template leaves without one."""
    appended_to_calls: str = ""
    """The same for a last turn that calls tools."""
    prompt_differs: bool = False
    """The prompt for the first answer is not what the template writes before that answer, so documents begin with the prompt."""


def answer_end(
    text: str, opening: int, region: Span, rules: TurnRules, specials: SpecialTokens, message: Message
) -> int | None:
    """The end of the first terminator that follows the whole message. Returns None if its region has no such terminator."""
    for chain in specials.chain.finditer(text, opening, region[1]):
        found = list(specials.pattern.finditer(text, chain.start(), chain.end()))
        ends = [token.end() for token in found if token.group() in rules.terminators]
        if not ends:
            continue
        of_eos = [token.end() for token in found if token.group() == rules.eos and token.end() >= ends[0]]
        end = of_eos[0] if of_eos else chain.end()
        if missing_text(text[opening:end], message) is None:
            return end
        if not specials.pattern.sub("", text[opening:end]).strip():
            return None  # the model would stop before it says anything
    return None


def other_end(text: str, opening: int, end: int, rules: TurnRules, specials: SpecialTokens, message: Message) -> int:
    """The end of what is trained of a message that is not the assistant's: any special token may end it."""
    for chain in specials.chain.finditer(text, opening, end):
        if missing_text(text[opening : chain.end()], message) is None:
            return chain.end()
    return before_gap(text, opening, end, rules.gap)


def before_gap(text: str, start: int, end: int, gap: str) -> int:
    """The end of text[start:end] without the gap between turns."""
    return end - len(gap) if gap and text.endswith(gap, start, end) else end


def common_prefix(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
    first, last = min(texts), max(texts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(char for char, _ in same)


class Graft(NamedTuple):
    """Text that a document has beside what the template wrote: before a trained span, or after the last one."""

    untrained: str = ""
    trained: str = ""


def to_runs(text: str, spans: Sequence[Span], grafts: Mapping[int, Graft] | None = None) -> list[str] | None:
    """The text as runs, untrained and trained in turn, the first untrained; None when the spans are not in ascending order.

    `grafts`: text that is inserted where a span starts.
    """
    runs: list[str] = []
    position = 0
    for start, end in spans:
        if start < position:
            return None
        untrained, trained = (grafts or {}).get(start, ("", ""))
        runs += (text[position:start] + untrained, trained + text[start:end])
        position = end
    if position < len(text):
        runs.append(text[position:])
    return runs
