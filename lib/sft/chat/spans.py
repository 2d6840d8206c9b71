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
from collections.abc import Sequence
from dataclasses import dataclass

from sft.chat.rows import BadRow
from sft.chat.special_tokens import SpecialTokens
from sft.chat.trace import Span


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


def answer_spans(
    text: str,
    blocks: Sequence[Span],
    after_header: int,
    rules: TurnRules,
    specials: SpecialTokens,
    last: bool,
    index: int,
) -> list[Span]:
    """The trained spans of an assistant's message.

    `blocks`: its generation blocks, or the text after its header; `after_header`: where the header ends; `last`: whether the message
    ends the conversation. Raises BadRow when it has no terminator, or text after it.
    """
    blocks, prefix = list(blocks), rules.generation_prefix
    first = blocks[0][0]
    if prefix and first == after_header and text.startswith(prefix, first):
        # The prompt already contains it. A token that straddles its end is scaffold too.
        blocks[0] = (first + len(prefix), max(first + len(prefix), blocks[0][1]))
    for start, end in blocks[:-1]:
        if any(terminator in text[start:end] for terminator in rules.terminators):
            raise BadRow("template", f"message {index}: a generation block follows the terminator")
    start, end = blocks[-1]
    trained_end = find_end(text, start, end, rules, specials, rules.terminators, index)
    if trained_end is None:
        demanded = rules.last_terminator if last else rules.terminator
        if demanded is not None:
            raise BadRow("template", f"message {index} ends without {demanded}: {text[start:end][-40:]!r}")
        trained_end = before_gap(text, start, end, rules.gap)
    return [*blocks[:-1], (start, trained_end)]


def other_spans(text: str, blocks: Sequence[Span], rules: TurnRules, specials: SpecialTokens, index: int) -> list[Span]:
    """The trained spans of a message that is not the assistant's: any special token may end it."""
    spans = []
    for start, end in blocks:
        trained_end = find_end(text, start, end, rules, specials, specials.texts, index)
        spans.append((start, before_gap(text, start, end, rules.gap) if trained_end is None else trained_end))
    return spans


def find_end(
    text: str, start: int, end: int, rules: TurnRules, specials: SpecialTokens, terminators: Sequence[str], index: int
) -> int | None:
    """The end of the first terminator in text[start:end] and of the special tokens directly after it; None without a terminator.

    Raises BadRow when text other than white space or EOS follows it.
    """
    for chain in specials.chain.finditer(text, start, end):
        if not any(token in terminators for token in specials.pattern.findall(chain.group())):
            continue
        rest = text[chain.end() : end].strip()
        if rest.removeprefix(rules.eos):
            raise BadRow("template", f"message {index}: {rest[:40]!r} follows the terminator")
        return chain.end()
    return None


def before_gap(text: str, start: int, end: int, gap: str) -> int:
    """The end of text[start:end] without the gap between turns."""
    return end - len(gap) if gap and text.endswith(gap, start, end) else end


def common_prefix(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
    first, last = min(texts), max(texts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(char for char, _ in same)


def to_runs(text: str, spans: Sequence[Span]) -> list[str] | None:
    """The text as runs, untrained and trained in turn, the first untrained; None when the spans are not in ascending order."""
    runs: list[str] = []
    position = 0
    for start, end in spans:
        if start < position:
            return None
        runs += (text[position:start], text[start:end])
        position = end
    if position < len(text):
        runs.append(text[position:])
    return runs
