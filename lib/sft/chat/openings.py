"""Where the model's own text begins in a message, under a Jinja template.

In: a conversation, the text that the template made of it, and which part of the text a message wrote. Out: the position behind the
header of the turn and behind what the generation prompt gives, and what the generation prompt gives that the template did not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sft.chat.probe import TemplateProbe
from sft.chat.rows import BadRow, Conversation
from sft.chat.spans import Graft, TurnRules, common_prefix
from sft.chat.special_tokens import SpecialTokens
from sft.chat.trace import Span, Trace

TAIL = 16
"""Characters at the end of a prompt that must agree where turns have no header."""
OTHER_HISTORY = ' and shows another history; history = "as-rendered" makes each turn a document behind its own prompt'


class Opening(NamedTuple):
    """Where the model's own text begins in a message."""

    at: int
    graft: Graft = Graft()
    """What the generation prompt gives and the template did not write."""
    lacks_prefix: bool = False
    """The answer is trained without the prefix that the generation prompt gives."""


class Openings:
    """Finds where messages open. `choice` is [prepare] generation_prefix: what becomes of a prefix that answers do not have."""

    def __init__(self, probe: TemplateProbe, rules: TurnRules, specials: SpecialTokens, choice: str) -> None:
        self.name, self.probe, self.rules, self.specials, self.choice = probe.name, probe, rules, specials, choice

    def of_other(self, conversation: Conversation, trace: Trace, index: int) -> Opening:
        """Where the text of a message that is not the assistant's begins: after the header of its turn."""
        start = trace.regions[index][0][0]
        header = self.probe.header(conversation, index)
        if header is None:
            raise BadRow("template", f"message {index} is not rendered with its content")
        if not trace.text.startswith(header, start):
            raise BadRow("template", f"message {index} does not begin with {header!r}")
        return Opening(start + len(header))

    def of_answer(self, conversation: Conversation, text: str, region: Span, index: int) -> Opening:
        """Where an answer begins: after what the generation prompt gives. No special token of a header is trained."""
        opening = self._find(conversation, text, region, index)
        written = text[opening.at : region[1]]
        special = self.specials.pattern.match(written.lstrip())
        first = next(
            (t for t in self.specials.pattern.findall(self.rules.header) if t not in self.rules.terminators), None
        )
        if special and special.group() == first:
            raise BadRow(
                "template", f"message {index} opens with {written[:40]!r}, which the prompt for it does not give"
            )
        return opening

    def _find(self, conversation: Conversation, text: str, region: Span, index: int) -> Opening:
        (start, end), header = region, self.rules.header
        at = start + len(header)
        special = self.specials.pattern.match(text, at, end)
        fits = text.startswith(header, start) and not (special and special.group() not in self.rules.terminators)
        if fits and index and conversation.messages[index - 1]["role"] == "user":
            return self._after_prefix(text, at, end, conversation.messages[index])
        # A turn that opens differently, for example after a tool's result: the prompt for this very turn shows where it begins.
        prompt = self.probe.prompt(conversation.messages[:index], conversation.tools)
        if prompt is not None and prompt.strip():
            bare = prompt.removesuffix(self.rules.generation_prefix)
            if text.startswith(bare) and len(bare) >= start and len(bare) < len(prompt):
                return self._after_prefix(text, len(bare), end, conversation.messages[index])
            if text.startswith(prompt) and len(prompt) >= start:
                return Opening(len(prompt))
        if text.startswith(header, start) and (
            prompt is None or not prompt.strip() or self._asks_for(prompt, text, at, start)
        ):
            return self._after_prefix(text, at, end, conversation.messages[index])
        raise BadRow(
            "template",
            f"message {index} opens with {text[start : start + 40]!r}, but the prompt for it ends in {(prompt or '')[-40:]!r}"
            + (OTHER_HISTORY if prompt and len(common_prefix([prompt, text])) < start else ""),
        )

    def _asks_for(self, prompt: str, text: str, at: int, start: int) -> bool:
        """Whether a prompt ends in the header that ends at `at`, where the prompt shows another history than the text."""
        if len(common_prefix([prompt, text])) >= start:
            return False
        bare = prompt.removesuffix(self.rules.generation_prefix)
        length = min(len(self.rules.header) or TAIL, len(bare), at)
        return bare[len(bare) - length :] == text[at - length : at]

    def _after_prefix(self, text: str, at: int, end: int, message: Mapping[str, Any]) -> Opening:
        """Where an answer begins. Its header ends at `at`. The opening also holds the text of the generation prompt that the template
        did not write."""
        prefix, choice = self.rules.generation_prefix, self.choice
        if not prefix:
            return Opening(at)
        if text.startswith(prefix, at):
            return Opening(at if choice == "answer" else at + len(prefix))
        graft = Graft() if choice == "rendered" else self._graft(text[at:end])
        if graft == ("", ""):
            return Opening(at, lacks_prefix=True)
        written = prefix.rstrip()
        if text.startswith(written, at):
            at += len(written) if choice != "answer" else 0
            return Opening(at, Graft(prefix[len(written) :]) if choice != "answer" else Graft())
        return Opening(at, graft if choice == "prompt" else Graft("", graft.untrained + graft.trained))

    def _graft(self, answer: str) -> Graft:
        """The generation prefix for an answer that the template wrote without it; empty when the two do not go together."""
        prefix, closing = self.rules.generation_prefix, self.rules.closing
        if answer.startswith(prefix.rstrip()):
            return Graft(prefix)
        if (first := prefix.strip().split("\n")[0]) and answer.startswith(first):
            return Graft()  # it thinks, where the prompt says that it does not
        return Graft(prefix, closing if closing.strip() not in answer else "")
