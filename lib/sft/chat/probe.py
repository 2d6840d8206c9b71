"""Observes a Jinja chat template: renders conversations and reports which message wrote what. It judges nothing.

In: the Jinja text. Out: `TemplateProbe.trace` renders a conversation; the other methods render small made-up conversations to find
out what the template does with turns, tool calls and fields. `sft.chat.template` decides what follows from the observations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from sft.chat.rows import BadRow, Conversation, Message
from sft.chat.special_tokens import BLOCK_SIZE, PRIVATE_BLOCKS
from sft.chat.trace import Generation, Trace, TraceEvent, add_trace, event, has_generation, read_trace
from sft.common.strings import strings

CALLED = "qjzxnamed"  # the name of a made-up function: letters only, as a template may write Python's repr of a call
SAID = "qjzxsaid"  # a made-up content
CALL_ID = "call00001"
Tools = list[dict[str, Any]]


class TwoTurns(NamedTuple):
    """A conversation of two questions and answers (messages 1 and 3), and what asking for an answer adds to a question."""

    trace: Trace
    contents: list[str]
    """The content of each message: one private-use character, so that it can be found in the text."""
    asked: tuple[str, str]
    """The first question alone, without and with the generation prompt."""


class TemplateProbe:
    """One compiled template. `has_generation`: it has {% generation %} blocks. Raises jinja2.TemplateError for a wrong text."""

    def __init__(self, name: str, text: str, variables: Mapping[str, str]) -> None:
        self.name, self.variables = name, dict(variables)
        self.index_of: dict[int, int] = {}  # id of each message that is rendered now -> its index
        self.message = -1  # the last message that the template has begun
        # The settings that Hugging Face renders with. strftime_now stays undefined: data must not depend on the day.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = to_json
        env.globals.update(
            raise_exception=raise_exception,
            sft_message=self._begin_message,
            sft_loop_end=lambda: event("end"),
            sft_generation=lambda: event("generation"),
            sft_endgeneration=lambda: event("endgeneration"),
        )
        tree = env.parse(text)
        self.has_generation = has_generation(tree)
        add_trace(tree)
        tree.set_environment(env)
        code = env.compile(tree, name=name)
        self.template = jinja2.Template.from_code(env, code, env.make_globals(None))

    def _begin_message(self, *loop_variables: Any) -> TraceEvent | str:
        for variable in loop_variables:
            index = self.index_of.get(id(variable), -1)
            if index >= 0:
                self.message = index
                return event("message", index)
        return ""

    def pieces(self, messages: Sequence[Message], tools: Tools | None = None, prompt: bool = False) -> list[str]:
        """What the template writes, in pieces, with trace events between them. Raises BadRow when the template fails."""
        self.index_of = {id(message): index for index, message in enumerate(messages)}
        self.message = -1
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        context = self.template.new_context({**self.variables, **variables})
        try:
            return list(self.template.root_render_func(context))
        except Exception as error:  # Jinja text is a program: it can fail in any way, out of memory included
            where = f"template {self.name}" + (f", message {self.message}" if self.message >= 0 else "")
            raise BadRow("template", f"{where}: {type(error).__name__}: {error}") from None

    def text(self, messages: Sequence[Message], tools: Tools | None = None, prompt: bool = False) -> str:
        return "".join(self.pieces(messages, tools, prompt))

    def trace(self, messages: Sequence[Message], tools: Tools | None = None) -> Trace:
        return read_trace(self.pieces(messages, tools))

    def two_turns(self) -> TwoTurns:
        """What the template makes of a plain conversation. Raises BadRow when it fails."""
        contents = [chr(PRIVATE_BLOCKS[0] + BLOCK_SIZE + index) for index in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        asked = self.text(messages[:1]), self.text(messages[:1], prompt=True)
        return TwoTurns(self.trace(messages), contents, asked)

    def turn_of_calls(self) -> str:
        """What a turn that only calls a tool writes; "" when the template has no place for tool calls."""
        messages: list[Message] = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [tool_call()]},
            {"role": "tool", "content": "r", "name": CALLED, "tool_call_id": CALL_ID},
            {"role": "assistant", "content": "a"},
        ]
        try:
            written = self.trace(messages).region_text(1)
        except BadRow:
            return ""
        return written if CALLED in written else ""

    def writes_tools(self, with_system: bool) -> bool:
        """Whether the template writes a `tools` column, in a conversation with or without a system message."""
        tools = [{"type": "function", "function": {"name": CALLED, "description": "d", "parameters": {}}}]
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        if with_system:
            messages = [{"role": "system", "content": SAID}, *messages]
        return self._writes(messages, tools, [CALLED, *([SAID] if with_system else [])])

    def writes_field(self, field: str, role: str, with_content: bool) -> bool:
        """Whether the template writes a field of a message of this role, and the content beside it."""
        value: Any = [tool_call()] if field == "tool_calls" else CALLED
        carrier: Message = {"role": role, "content": SAID if with_content else "", field: value}
        question: Message = {"role": "user", "content": "q"}
        answer: Message = {"role": "assistant", "content": "a"}
        if role == "system":
            messages = [carrier, question, answer]
        elif role == "assistant":
            messages = [question, carrier]
        else:
            messages = [question, carrier, answer]
        return self._writes(messages, None, [CALLED, *([SAID] if with_content else [])])

    def writes_role(self, role: str) -> bool:
        """Whether the template writes a first message of this role."""
        opening: list[Message] = [{"role": role, "content": SAID}]
        try:
            return SAID in self.text(
                [*opening, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
            )
        except BadRow:
            return False

    def _writes(self, messages: Sequence[Message], tools: Tools | None, texts: Sequence[str]) -> bool:
        try:
            written = self.text(messages, tools)
        except BadRow:
            return True  # the template may need more than this conversation has: the row itself will show
        return all(text in written for text in texts)

    def header(self, conversation: Conversation, index: int) -> str:
        """The text before the content of a message, found by replacing the content with an unused private-use character."""
        present = "".join(strings([conversation.messages, conversation.tools], keys=True))
        content = next(
            chr(code) for code in range(PRIVATE_BLOCKS[1] + BLOCK_SIZE, 0x110000) if chr(code) not in present
        )
        messages = [dict(message) for message in conversation.messages]
        messages[index]["content"] = content
        written = self.trace(messages, conversation.tools).region_text(index)
        if content not in written:
            raise BadRow("template", f"message {index} is not rendered with its content")
        return written[: written.index(content)]


def tool_call() -> dict[str, Any]:
    return {"type": "function", "id": CALL_ID, "function": {"name": CALLED, "arguments": {"x": 1}}}


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's tojson as Hugging Face defines it: it escapes neither HTML nor other scripts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
