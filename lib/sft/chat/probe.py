"""Observes a Jinja chat template: renders conversations and reports which message wrote what. It judges nothing.

In: the Jinja text. Out: `TemplateProbe.trace` renders a conversation; the other methods render small made-up conversations to find
out what the template does with turns, tool calls and fields. `sft.chat.template` decides what follows from the observations.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from sft.chat.bounds import OutOfTime, bounded
from sft.chat.fields import RESULT_ROLES
from sft.chat.rows import BadRow, Conversation, Message
from sft.chat.spans import common_prefix
from sft.chat.special_tokens import BLOCK_SIZE, PRIVATE_BLOCKS, SpecialTokens
from sft.chat.trace import GenerationTag, Span, Trace, TraceEvent, add_trace, event, has_generation, read_trace
from sft.common.errors import SftError
from sft.common.strings import strings
from sft.recipe.schema import ROLES

CALLED = "qjzxnamed"  # the name of a made-up function: letters only, as a template may write Python's repr of a call
FIELD = "qjzxfield"  # a made-up value of a field, or the name of another made-up function
SAID = "qjzxsaid"  # a made-up content
THOUGHT = "qjzxthought"  # a made-up thought
ANSWER = "qjzxanswer"
CALL_ID, OTHER_ID = "call00001", "call00002"
NAMED = "qjzxspeaker"
"""The made-up name of a message."""
MOST_LATE = 3
"""Renderings in a row that may take too long before the template is refused."""
Tools = list[dict[str, Any]]
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
"""Variables of a template that only the conversation or the program sets."""


class Way(NamedTuple):
    """How a template is rendered so that it tells the messages apart."""

    needs_tools: bool = False
    """It fails without tools."""
    content_as_parts: bool = False
    """It takes contents as lists of parts."""
    last_after_loop: bool = False
    """It writes a last answer after its loop over the messages."""
    from_prefixes: bool = False
    """Trace events do not tell the messages apart, so shorter conversations do."""


WAYS = (
    Way(),
    Way(needs_tools=True),
    Way(content_as_parts=True),
    Way(last_after_loop=True),
    Way(from_prefixes=True),
    Way(needs_tools=True, from_prefixes=True),
)
"""In the order in which they are tried."""


class TwoTurns(NamedTuple):
    """A conversation of two questions and answers (messages 1 and 3), and what asking for an answer adds to a question."""

    trace: Trace
    contents: list[str]
    """The content of each message: one private-use character, so that it can be found in the text."""
    asked: tuple[str, str]
    """The first question alone, without and with the generation prompt."""
    eos: str
    fault: int
    """The first answer that is not written once; 0 without one."""


def environment() -> jinja2.Environment:
    """The settings that Hugging Face renders with."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = to_json
    return env


@functools.lru_cache(maxsize=128)
def compiled(name: str, text: str) -> tuple[CodeType, frozenset[str], bool]:
    """A template with trace events, the variables that it reads, and whether it has {% generation %} blocks. Jinja compiles a long one in half a
    second, and a process may read it several times."""
    env = environment()
    tree = env.parse(text)
    reads = frozenset(node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "load")
    has_blocks = has_generation(tree)
    add_trace(tree)
    tree.set_environment(env)
    return env.compile(tree, name=name), reads, has_blocks


class TemplateProbe:
    """One compiled template. `has_generation`: it has {% generation %} blocks. Raises jinja2.TemplateError for a wrong text.

    `date` (YYYY-MM-DD) is the day that the template gets when it asks for today. `tokens`: all texts that are one token.
    """

    def __init__(
        self, name: str, text: str, variables: Mapping[str, Any], tokens: SpecialTokens, date: str = ""
    ) -> None:
        self.name, self.jinja, self.variables, self.tokens = name, text, dict(variables), tokens
        self.eos = str(self.variables.get("eos_token", ""))
        self.index_of: dict[int, int] = {}  # id of each message that is rendered now -> its index
        self.late = [0]  # renderings in a row that took too long; shared by copies of the probe
        self.begun = [-1]  # the last message that the template has begun; shared by copies of the probe
        self.arguments_as_text = False  # the template takes the arguments of a call as JSON text
        self.way = Way()
        self.answer = ANSWER
        self.passes_on: tuple[type[Exception], ...] = ()  # errors that are not the template's
        env = environment()
        env.globals.update(
            raise_exception=raise_exception,
            sft_message=self._begin_message,
            sft_loop_end=lambda: event("end"),
            sft_generation=lambda: event("generation"),
            sft_endgeneration=lambda: event("endgeneration"),
        )
        self.asked_for_day = [False]  # shared by copies of the probe
        day = datetime.datetime.fromisoformat(date) if date else None
        env.globals["strftime_now"] = day.strftime if day else self._refuse_day
        code, self.reads, self.has_generation = compiled(name, text)
        self.template = jinja2.Template.from_code(env, code, env.make_globals(None))

    def _refuse_day(self, _: str) -> NoReturn:
        self.asked_for_day[0] = True
        raise jinja2.TemplateError("it writes today's date (strftime_now), and [prepare] date is not set")

    def asks_for_day(self) -> bool:
        """Whether the template asks for the day in a plain conversation, with or without tools."""
        for tools in (None, made_up_tools()):
            self.prompt([{"role": "user", "content": "q"}], tools)
        return self.asked_for_day[0]

    def with_variables(self, variables: Mapping[str, Any]) -> TemplateProbe:
        """The same template with more variables."""
        made = copy.copy(self)
        made.variables = {**self.variables, **variables}
        return made

    def _begin_message(self, *loop_variables: Any) -> TraceEvent | str:
        for variable in loop_variables:
            index = self.index_of.get(id(variable), -1)
            if index >= 0:
                self.begun[0] = index
                return event("message", index)
        return ""

    def segments(self, messages: Sequence[Message], tools: Tools | None = None, prompt: bool = False) -> list[str]:
        """What the template writes, in segments, with trace events between them. Raises BadRow when the template fails."""
        messages = [with_thoughts(message) for message in messages]
        if self.arguments_as_text:
            messages = [with_text_arguments(message) for message in messages]
        if self.way.content_as_parts:
            messages = [with_parts(message) for message in messages]
        self.index_of.clear()
        self.index_of.update({id(message): index for index, message in enumerate(messages)})
        self.begun[0] = -1
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        context = self.template.new_context({**self.variables, **variables})
        try:
            with bounded():
                found = list(self.template.root_render_func(context))
            self.late[0] = 0
            return found
        except self.passes_on:
            raise
        except OutOfTime as error:
            self.late[0] += 1
            if self.late[0] == MOST_LATE:
                raise SftError(f"prepare.template: {self.name}: {error}; next: correct the Jinja text") from None
            raise BadRow("template", f"template {self.name}: {error}") from None
        except Exception as error:  # Jinja text is a program: it can fail in any way, out of memory included
            where = f"template {self.name}" + (f", message {self.begun[0]}" if self.begun[0] >= 0 else "")
            raise BadRow("template", f"{where}: {type(error).__name__}: {error}") from None

    def text(self, messages: Sequence[Message], tools: Tools | None = None, prompt: bool = False) -> str:
        return "".join(self.segments(messages, tools, prompt))

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> str | None:
        """The prompt for an answer to these messages. Returns None if the template cannot write it."""
        try:
            return self.text(messages, tools, prompt=True)
        except BadRow:
            return None

    def trace(self, messages: Sequence[Message], tools: Tools | None = None) -> Trace:
        trace = read_trace(self.segments(messages, tools))
        if self.way.last_after_loop and messages[-1]["role"] == "assistant":
            trace = with_last(trace, len(messages) - 1)
        return self._trace_by_prefixes(trace, messages, tools) if self.way.from_prefixes else trace

    def _trace_by_prefixes(self, trace: Trace, messages: Sequence[Message], tools: Tools | None) -> Trace:
        """The trace of a template that is rendered once for each prefix. A message's region is the text that it adds."""
        text, position = trace.text, 0
        regions: dict[int, list[Span]] = {}
        for index in range(len(messages)):
            end = len(text)
            if index + 1 < len(messages):
                until = self.text(messages[: index + 1], tools)
                end = self.tokens.edge(text, len(common_prefix([until, text])))
            if end > position:
                regions[index] = [(position, end)]
                position = end
        blocks = {
            index: [block for found in trace.blocks.values() for block in found if start <= block[0] < end]
            for index, [(start, end)] in regions.items()
        }
        return Trace(text, regions, {index: found for index, found in blocks.items() if found})

    def two_turns(self) -> TwoTurns:
        """What the template makes of a plain conversation. Chooses how messages are separated, how contents are given, and whether
        tools are needed. Raises BadRow when it fails."""
        contents = [chr(PRIVATE_BLOCKS[0] + BLOCK_SIZE + index) for index in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        trace, fault = self._trace_plain(messages, contents)
        if fault:
            return TwoTurns(trace, contents, ("", ""), self.eos, fault)
        asked = self.text(messages[:1], self._tools()), self.text(messages[:1], self._tools(), prompt=True)
        return TwoTurns(trace, contents, asked, self.eos, fault)

    def foreign_text(self, turns: TwoTurns) -> tuple[str, int] | None:
        """(role of a message, number of an answer in its conversation) where the template writes the message's text inside of the answer.

        Made-up results of tools have rules of their own (`sft.chat.checks`): some templates write them into the turn of the call.
        """
        roles = ("system", "user", "assistant", "user", "assistant")
        contents = [chr(PRIVATE_BLOCKS[0] + BLOCK_SIZE + 4), *turns.contents]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        traces = [(turns.trace, 1)]
        with contextlib.suppress(BadRow):  # a template without a system message
            traces.append((self.trace(messages, self._tools()), 0))
        for trace, first in traces:
            for answer in (2, 4):
                written = trace.region_text(answer - first)
                for other in range(first, 5):
                    if other != answer and any(form in written for form in _forms(contents[other])):
                        return roles[other], answer - first
        return None

    def _trace_plain(self, messages: Sequence[Message], contents: Sequence[str]) -> tuple[Trace, int]:
        """The trace of a plain conversation, and the answer that is not written once. Tries the ways to render one after the other."""
        failed: BadRow | None = None
        seen: list[tuple[Trace, int]] = []
        for self.way in WAYS:
            if self.way.needs_tools and failed is None:
                continue
            try:
                trace = self.trace(messages, self._tools())
            except BadRow as error:
                failed = failed or error
                continue
            seen.append((trace, _not_written_once(trace, contents)))
            if not seen[-1][1]:
                return seen[-1]
        self.way = Way()
        if not seen:
            assert failed is not None
            raise failed
        return seen[0]

    def _tools(self) -> Tools | None:
        """Tools for made-up conversations, where the template needs them."""
        return made_up_tools() if self.way.needs_tools else None

    def turn_of_calls(self) -> tuple[str, str]:
        """What a turn that only calls a tool writes, and what follows it; both "" when the template has no place for tool calls.

        Decides how the template takes the arguments of calls.
        """
        found: dict[bool, tuple[str, str]] = {}
        for self.arguments_as_text in (False, True):
            try:
                trace = self.trace(_conversation_of_calls(), self._tools())
            except BadRow:
                continue
            if CALLED in (written := trace.region_text(1)):
                found[self.arguments_as_text] = written.split(SAID)[0], trace.text[trace.regions[1][0][1] :]
        # A template that wants text writes an object as Python writes it, with single quotes.
        clean = [as_text for as_text, (written, _) in found.items() if "{'" not in written]
        self.arguments_as_text = (clean or list(found) or [False])[0]
        return found.get(self.arguments_as_text, ("", ""))

    def last_turn_of_calls(self) -> str:
        """What a turn that only calls a tool writes at the end of a conversation; "" when the template fails."""
        try:
            trace = self.trace(_conversation_of_calls()[:2], self._tools())
        except BadRow:
            return ""
        start = trace.regions[1][0][0] if trace.regions.get(1) else len(trace.text)
        return trace.region_text(1) if CALLED in trace.text[start:] else ""

    def turn_of_thinking(self) -> str:
        """What an answer with thinking writes; "" when the template fails or has no place for it."""
        question: Message = {"role": "user", "content": "q"}
        answer: Message = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
        try:
            return self.trace([question, answer], self._tools()).region_text(1)
        except BadRow:
            return ""

    def conversations(self) -> Iterator[tuple[list[Message], Trace]]:
        """Made-up conversations with a system message, calls, results and thinking, where the template can render them."""
        question: Message = {"role": "user", "content": "q"}
        system: Message = {"role": "system", "content": "s"}
        answer: Message = {"role": "assistant", "content": "a", "reasoning_content": "r"}
        plain: list[Message] = [question, {"role": "assistant", "content": "a"}]
        with_calls = _conversation_of_calls()
        for messages in ([system, question, answer], with_calls, [*plain, *plain]):
            try:
                yield messages, self.trace(messages, self._tools())
            except BadRow:
                continue

    def writes_tools(self, with_system: bool) -> bool:
        """Whether the template writes a `tools` column, in a conversation with or without a system message."""
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        if with_system:
            messages = [{"role": "system", "content": SAID}, *messages]
        return self._writes(messages, made_up_tools(), [CALLED, *([SAID] if with_system else [])])

    def writes_field(self, field: str, role: str, with_content: bool, with_tools: bool = False) -> bool:
        """Whether the template writes a field of a message of this role, and the content beside it."""
        value: Any = [tool_call(FIELD)] if field == "tool_calls" else FIELD
        carrier: Message = {"role": role, "content": SAID if with_content else "", field: value}
        question: Message = {"role": "user", "content": "q"}
        answer: Message = {"role": "assistant", "content": "a"}
        if role == "system":
            messages = [carrier, question, answer]
        elif role == "assistant":
            messages = [question, carrier]
        else:
            messages = [question, carrier, answer]
        tools = made_up_tools() if with_tools else self._tools()
        return self._writes(messages, tools, [FIELD, *([SAID] if with_content else [])])

    def written_names(self) -> frozenset[tuple[str, str]]:
        """(field, role) of the names and ids that the template writes: `name` and `tool_call_id` of messages, `id` of calls."""
        question: Message = {"role": "user", "content": "q"}
        answer: Message = {"role": "assistant", "content": "a"}
        called = _conversation_of_calls()
        found = set()
        for role in ROLES:
            for field, text in (("name", NAMED), ("tool_call_id", OTHER_ID)):
                if role == "assistant":
                    messages = [question, {**answer, field: text}]
                elif role == "system":
                    messages = [{"role": role, "content": "s", field: text}, question, answer]
                elif role == "user":
                    messages = [{**question, field: text}, answer]
                else:
                    messages = [*called[:2], {**called[2], "role": role, field: text}, *called[3:]]
                if self._writes(messages, self._tools(), [text]):
                    found.add((field, role))
        call: Message = {"role": "assistant", "content": "", "tool_calls": [tool_call()]}
        if self._writes([question, call], self._tools(), [CALL_ID]):
            found.add(("id", "assistant"))
        return frozenset(found)

    def writes_two_calls(self, with_content: bool, with_tools: bool = False) -> bool:
        """Whether the template writes both of two calls in one message."""
        calls = [tool_call(FIELD + "a"), tool_call(FIELD + "b")]
        carrier: Message = {"role": "assistant", "content": SAID if with_content else "", "tool_calls": calls}
        tools = made_up_tools() if with_tools else self._tools()
        return self._writes([{"role": "user", "content": "q"}, carrier], tools, [FIELD + "a", FIELD + "b"])

    def writes_role(self, role: str) -> bool:
        """Whether the template writes a message of this role: the first one, or the result of a call."""
        question, call, result, answer = _conversation_of_calls()
        messages = [question, call, {**result, "role": role}, answer]
        if role not in RESULT_ROLES:
            messages = [{"role": role, "content": SAID}, question, answer]
        try:
            return SAID in self.text(messages, self._tools() if role in RESULT_ROLES else None)
        except BadRow:
            return False

    def _writes(self, messages: Sequence[Message], tools: Tools | None, texts: Sequence[str]) -> bool:
        try:
            written = self.text(messages, tools)
        except BadRow:
            return True  # the template may need more than this conversation has: the row itself will show
        return all(text in written for text in texts)

    def header(self, conversation: Conversation, index: int) -> str | None:
        """The text before the content of a message. Returns None if the template does not write the content.

        Replaces the content with an unused private-use character and looks for that.
        """
        content, messages = self.replace_content(conversation, index)
        written = self.trace(messages, conversation.tools).region_text(index)
        return written[: written.index(content)] if content in written else None

    def writes_content(self, conversation: Conversation, index: int) -> bool:
        """Whether the rendering of a conversation contains the content of a message."""
        content, messages = self.replace_content(conversation, index)
        return content in self.text(messages, conversation.tools)

    def replace_content(self, conversation: Conversation, index: int) -> tuple[str, list[Message]]:
        """A private-use character that the conversation does not contain, and its messages with that content in one of them."""
        present = "".join(strings([conversation.messages, conversation.tools], keys=True))
        content = next(
            chr(code) for code in range(PRIVATE_BLOCKS[1] + BLOCK_SIZE, 0x110000) if chr(code) not in present
        )
        messages = [dict(message) for message in conversation.messages]
        messages[index]["content"] = content
        return content, messages


def _forms(content: str) -> tuple[str, ...]:
    """How a template may write a text: as it is, as JSON with escapes, as Python writes a text, and its bytes."""
    return content, json.dumps(content)[1:-1], repr(content)[1:-1], repr(content.encode())[2:-1]


def _not_written_once(trace: Trace, contents: Sequence[str]) -> int:
    """The first of the two answers that is not written once; 0 when both are."""
    for index in (1, 3):
        if len(trace.regions.get(index, [])) != 1 or trace.region_text(index).count(contents[index]) != 1:
            return index
    return 0


def _conversation_of_calls() -> list[Message]:
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [tool_call()]},
        {"role": "tool", "content": SAID, "name": CALLED, "tool_call_id": CALL_ID},
        {"role": "assistant", "content": "a"},
    ]


def made_up_tools() -> Tools:
    parameters = {"type": "object", "properties": {"x": {"type": "integer", "description": "n"}}, "required": ["x"]}
    return [{"type": "function", "function": {"name": CALLED, "description": "d", "parameters": parameters}}]


def with_thoughts(message: Message) -> Message:
    """A message with its thoughts under the two names that templates read, as transformers gives it to them."""
    thought = message.get("reasoning_content") or message.get("thinking")
    return {**message, "thinking": thought, "reasoning_content": thought} if thought else message


def with_parts(message: Message) -> Message:
    """A message with its content as a list of one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def with_last(trace: Trace, last: int) -> Trace:
    """The trace with all that follows the other messages as the part of the last message, if the loop did not write it."""
    if last in trace.regions or not trace.regions:
        return trace
    end = max(end for regions in trace.regions.values() for _, end in regions)
    inside = [block for block in trace.blocks.get(-1, []) if block[0] >= end]
    blocks = {**trace.blocks, last: inside} if inside else trace.blocks
    return Trace(trace.text, {**trace.regions, last: [(end, len(trace.text))]}, blocks)


def with_text_arguments(message: Message) -> Message:
    """A message whose calls have their arguments as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": to_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def tool_call(name: str = CALLED) -> dict[str, Any]:
    return {"type": "function", "id": CALL_ID, "function": {"name": name, "arguments": {"x": 1}}}


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's tojson as Hugging Face defines it: it escapes neither HTML nor other scripts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
