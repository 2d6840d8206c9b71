"""The named chat templates: olmo and its variants, tulu, zephyr, chatml, simple_chat.

Each is stated twice: as Jinja text, which is exported with the model, and as a table of turns that `NamedTemplate` renders
natively, about thirty times faster. tests/test_chat.py proves the two equal on random conversations. The wording and
layout are those of the published templates of the same names; a `tools` column and OpenAI `tool_calls`, which the published
ones do not know, are put where they put `functions` and `function_calls`. A message that a template would drop without a
word (a tool result under tulu) rejects the row instead.
"""

from __future__ import annotations

import re

from sft.chat.rows import BadRow, Conversation
from sft.common.errors import SftError
from sft.recipe.chat_templates import DEFAULTS, FAMILIES, PLACES, Turn, calls, functions


class NamedTemplate:
    """Renders conversations natively. `specials` is the tokenizer's list of special-token texts, `eos` its end of document."""

    def __init__(self, name: str, eos: str, specials: list[str]) -> None:
        family = FAMILIES[name]
        self.name, self.eos, self.family = name, eos, family
        self.text = family.jinja
        pattern = re.compile("|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)) or "(?!)")
        for marker in ("<|im_start|>", "<|im_end|>"):
            if marker in self.text and marker not in specials:
                raise SftError(
                    f"prepare.template: {name!r} ends turns with {marker}, which the tokenizer does not have as a special token;"
                    " next: choose tulu or simple_chat, or a tokenizer that has it"
                )

        def count(*texts: str) -> int:
            return sum(len(pattern.findall(text)) for text in texts)

        raw = family.turns(eos)
        inner = any(eos in part for head, stop, gap, _, _ in raw.values() for part in (head, stop, gap)) or any(
            eos in gap for _, _, _, _, gap in raw.values()
        )
        # "eos": every document ends in the only EOS it holds, so that readers who look for EOS find the documents.
        self.boundaries = "index" if inner or any(stop.count(eos) > 1 for _, _, _, stop, _ in raw.values()) else "eos"
        self.turns: dict[str, Turn] = {}
        for role, (head, stop, gap, last_stop, last_gap) in raw.items():
            if self.boundaries == "eos" and not (last_stop + last_gap).endswith(eos):
                last_gap += eos
            turn = (head, stop, gap, last_stop, last_gap)
            self.turns[role] = Turn(
                *turn, specials=count(head, stop, gap), last_specials=count(head, last_stop, last_gap)
            )
        self.eos_appended = self.boundaries == "eos" and not (raw["assistant"][3] + raw["assistant"][4]).endswith(eos)
        identity = DEFAULTS.get(name)
        self.default = "" if identity is None else f"<|im_start|>system\n{identity[0]}{{}}<|im_end|>\n"
        self.default_plain = self.default.format(identity[1]) if identity else ""
        self.default_specials = count(self.default_plain)
        self.given, self.unprompted = family.given, 0
        self.joins = bool(family.between or family.lead)
        self.strips_history = "if not last and '<think>'" in self.text
        assistant = self.turns["assistant"]
        self.terminators = sorted({stop for stop in (assistant.stop, assistant.last_stop) if stop})

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """The rendering as runs of text, untrained and trained in turn (the first untrained, possibly empty), and the number
        of special tokens in its scaffold."""
        messages, train, tools = conversation.messages, conversation.train, conversation.tools
        turns, between = self.turns, self.family.between
        runs: list[str] = []
        pending, specials = "", 0
        if self.default and messages[0]["role"] != "system" and not any(m["role"] == "system" for m in messages):
            pending = self.default_plain if not tools else self.default.format(functions(tools))
            specials = self.default_specials
        elif tools and not self.family.calls:
            raise BadRow("template", f"template {self.name} has no place for tools")
        elif tools and not any(message["role"] == "system" for message in messages):
            raise BadRow("template", f"template {self.name} puts tools into the system message, and there is none")
        last = len(messages) - 1
        for index, message in enumerate(messages):
            role = message["role"]
            turn = turns.get(role)
            if turn is None:
                raise BadRow("template", f"message {index}: template {self.name} has no turn for role {role!r}")
            body = message["content"]
            stop = turn.stop if index != last else turn.last_stop
            if len(message) != 2 or (tools and role == "system") or self.strips_history:
                body, stop = self._body(message, index == last, stop, tools, index)
            if index != last:
                gap = turn.gap
                specials += turn.specials
            else:
                gap = turn.last_gap
                specials += turn.last_specials
            if self.joins:
                if index:
                    pending += between
                if index or turn.head:
                    body = self.family.lead + body
            if train[index]:
                pending += turn.head
                if self.given and role == "assistant":
                    if body.startswith(self.given):
                        # The prompt already says it. Where it ends inside a token, that token is scaffold too.
                        pending, body = pending + self.given, body[len(self.given) :]
                    else:
                        self.unprompted += 1
                runs += (pending, body + stop)
                pending = gap
            else:
                pending += turn.head + body + stop + gap
        if pending:
            runs.append(pending)
        return runs, specials

    def _body(self, message: dict, last: bool, stop: str, tools: list[dict] | None, index: int) -> tuple[str, str]:
        """Content and stop of a message with more than a role and a content."""
        role, body = message["role"], message["content"]
        if self.family.calls and role == "system":
            offered = message.get("functions")
            if offered is not None:
                return f"{body} <functions>{offered}</functions>", "<|im_end|>"
            return (body + functions(tools), "<|im_end|>") if tools else (body, stop)
        for field in message:
            if field in PLACES and not (self.family.calls and role == PLACES[field]):
                raise BadRow(
                    "template", f"message {index}: template {self.name} has no place for {field} in a {role} message"
                )
        if role == "user" and "functions" in message:
            return f"{body}\n<functions>{message['functions']}</functions>", stop
        thinking = message.get("reasoning_content") or message.get("thinking")
        if thinking:
            if role != "assistant":
                raise BadRow("template", f"message {index}: thinking in a {role} message")
            body = f"<think>{thinking}</think>{body}"
        if self.strips_history and role == "assistant" and not last and "<think>" in body and "</think>" in body:
            body = body.split("</think>")[-1].lstrip("\n")
        if "function_calls" in message:
            body += f"<function_calls>{message['function_calls']}</function_calls>"
        elif "tool_calls" in message:
            body += f"<function_calls>{calls(message['tool_calls'])}</function_calls>"
        return body, stop
