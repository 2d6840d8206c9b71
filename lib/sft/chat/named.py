"""Renders the named chat templates natively, about thirty times faster than their Jinja text.

In: a conversation. Out: runs of text, untrained and trained in turn. The texts are in `sft.recipe.chat_templates`; tests/test_chat.py
proves on random conversations that this renderer and the Jinja text write the same. Wording and layout are those of the published
templates of the same names. The published templates do not know a `tools` column or OpenAI `tool_calls`: these are written where
they write `functions` and `function_calls`. A message that a template would silently drop (a tool result under tulu) rejects
the row instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft.chat.calls import calls_text
from sft.chat.messages import renamed_roles
from sft.chat.rows import BadRow, Conversation, Message
from sft.chat.special_tokens import SpecialTokens
from sft.common.errors import SftError
from sft.recipe.chat_templates import TEMPLATES, TurnText

# The role that may have each field. `functions` may also be in a system message.
FIELD_ROLES = {"functions": "user", "function_calls": "assistant", "tool_calls": "assistant"}


class Turn(NamedTuple):
    """The texts of one role's turn (see `TurnText`) and the number of special tokens in them."""

    head: str
    stop: str
    gap: str
    last_stop: str
    last_gap: str
    specials: int
    last_specials: int


class NamedTemplate:
    """Renders conversations natively. `specials` is the tokenizer's list of special-token texts, `eos` its end-of-sequence token."""

    def __init__(self, name: str, eos: str, specials: Sequence[str]) -> None:
        text = TEMPLATES[name]
        self.needs_tools = False
        self.name, self.eos, self.specials = name, eos, SpecialTokens(specials)
        self.text = text.jinja
        for token in ("<|im_start|>", "<|im_end|>"):
            if token in self.text and token not in specials:
                raise SftError(
                    f"prepare.template: {name!r} ends turns with {token}, which the tokenizer does not have as a special token;"
                    " next: choose tulu or simple_chat, or a tokenizer that has it"
                )
        pattern = re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)) or "(?!)")

        def count(*parts: str) -> int:
            return sum(len(pattern.findall(part)) for part in parts)

        turns = text.turns(eos)
        # With "eos", every document ends in the only EOS that it holds, so readers that look for EOS find the documents.
        self.boundaries = "index" if any(_has_inner_eos(turn, eos) for turn in turns.values()) else "eos"
        if self.boundaries == "eos":
            turns = {role: _ending_in(turn, eos) for role, turn in turns.items()}
        self.eos_appended = turns["assistant"] != text.turns(eos)["assistant"]
        self.turns = {
            role: Turn(
                *turn,
                specials=count(turn.head, turn.stop, turn.gap),
                last_specials=count(turn.head, turn.last_stop, turn.last_gap),
            )
            for role, turn in turns.items()
        }
        default = text.default_system
        self.default_system = "" if default is None else f"<|im_start|>system\n{default.identity}{{}}<|im_end|>\n"
        self.default_without_tools = self.default_system.format(default.no_functions) if default else ""
        self.default_specials = count(self.default_without_tools)
        self.generation_prefix, self.answers_without_prefix = text.generation_prefix, 0
        self.between, self.lead, self.has_calls = text.between, text.lead, text.has_calls
        self.joins = bool(text.between or text.lead)
        self.strips_history = text.strips_history
        self.terminators = sorted({stop for stop in (turns["assistant"].stop, turns["assistant"].last_stop) if stop})

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """The runs of text, untrained and trained in turn (the first is untrained and may be empty), and the number of special
        tokens in the scaffold. Raises BadRow where the template has no place for something in the row."""
        messages, train, tools = conversation.messages, conversation.train, conversation.tools
        runs: list[str] = []
        scaffold, specials = self._opening(messages, tools)
        last = len(messages) - 1
        for index, message in enumerate(messages):
            role = message["role"]
            turn = self.turns.get(role)
            if turn is None:
                raise BadRow("template", f"message {index}: template {self.name} has no turn for role {role!r}")
            body: str = message["content"]
            if index != last:
                stop, gap, count = turn.stop, turn.gap, turn.specials
            else:
                stop, gap, count = turn.last_stop, turn.last_gap, turn.last_specials
            specials += count
            complete = True
            if len(message) != 2 or (tools and role == "system") or self.strips_history:
                body, stop, complete = self._body(message, index == last, stop, tools, index)
            if self.joins:
                if index:
                    scaffold += self.between
                if index or turn.head:
                    body = self.lead + body
            if not (train[index] and complete):
                scaffold += turn.head + body + stop + gap
                continue
            scaffold += turn.head
            if self.generation_prefix and role == "assistant":
                if body.startswith(self.generation_prefix):
                    # The prompt already contains it. A token that straddles its end is scaffold too.
                    scaffold, body = scaffold + self.generation_prefix, body.removeprefix(self.generation_prefix)
                else:
                    self.answers_without_prefix += 1
            runs += (scaffold, body + stop)
            scaffold = gap
        if scaffold:
            runs.append(scaffold)
        return runs, specials

    def renamed_roles(self) -> dict[str, str]:
        return renamed_roles(lambda role: role in self.turns)

    def field_of_thoughts(self) -> str:
        return ""

    def written_names(self) -> frozenset[tuple[str, str]]:
        return frozenset()

    def verbatim(self, conversation: Conversation) -> str:
        """What the Jinja text writes: `render` without the EOS that it may append."""
        text = "".join(self.render(conversation)[0])
        return text.removesuffix(self.eos) if self.eos_appended else text

    def _opening(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[str, int]:
        """The default system message, if one is needed, and its special tokens."""
        if not self.default_system and not tools:
            return "", 0
        has_system = messages[0]["role"] == "system" or any(message["role"] == "system" for message in messages)
        if self.default_system and not has_system:
            text = self.default_system.format(functions(tools)) if tools else self.default_without_tools
            return text, self.default_specials
        if tools and not self.has_calls:
            raise BadRow("template", f"template {self.name} has no place for tools")
        if tools and not has_system:
            raise BadRow("template", f"template {self.name} puts tools into the system message, and there is none")
        return "", 0

    def _body(
        self, message: Message, last: bool, stop: str, tools: list[dict[str, Any]] | None, index: int
    ) -> tuple[str, str, bool]:
        """The body and the stop of a message that has more than a role and a content, and whether the body has its thought.

        An answer without its thought is not trained: the model would learn to answer without one.
        """
        role, body = message["role"], message["content"]
        if self.has_calls and role == "system":
            offered = message.get("functions")
            if offered is not None:
                return f"{body} <functions>{offered}</functions>", "<|im_end|>", True
            return (body + functions(tools), "<|im_end|>", True) if tools else (body, stop, True)
        for field in message:
            if field in FIELD_ROLES and not (self.has_calls and role == FIELD_ROLES[field]):
                raise BadRow(
                    "template",
                    f"message {index}: template {self.name} has no place for {field} in messages of the {role}",
                )
        if role == "user" and "functions" in message:
            return f"{body}\n<functions>{message['functions']}</functions>", stop, True
        thinking = message.get("reasoning_content") or message.get("thinking")
        if thinking:
            if role != "assistant":
                raise BadRow("template", f"message {index}: thinking in a {role} message")
            body = f"<think>{thinking}</think>{body}"
        complete = True
        if self.strips_history and role == "assistant" and not last and "<think>" in body and "</think>" in body:
            complete = False
            body = body.split("</think>")[-1].lstrip("\n")
        if "function_calls" in message:
            body += f"<function_calls>{message['function_calls']}</function_calls>"
        elif "tool_calls" in message:
            body += f"<function_calls>{calls_text(message['tool_calls'])}</function_calls>"
        return body, stop, complete


def _has_inner_eos(turn: TurnText, eos: str) -> bool:
    """Whether the turn writes EOS anywhere but once, as the last stop of the conversation."""
    return any(eos in part for part in (turn.head, turn.stop, turn.gap, turn.last_gap)) or turn.last_stop.count(eos) > 1


def _ending_in(turn: TurnText, eos: str) -> TurnText:
    ends = (turn.last_stop + turn.last_gap).endswith(eos)
    return turn if ends else turn._replace(last_gap=turn.last_gap + eos)


def functions(tools: list[dict[str, Any]]) -> str:
    """How a template writes the tools on offer."""
    return f" <functions>{json.dumps(tools, ensure_ascii=False)}</functions>"
