"""Template traces: which message, and which {% generation %} block, wrote which part of a rendering.

In: a parsed Jinja template. `add_trace` inserts calls of `sft_message`, `sft_loop_end`, `sft_generation` and `sft_endgeneration`.
Each call writes an empty `TraceEvent` into the output. Out: `read_trace` turns the segments of a rendering into a `Trace`.
`sft.chat.probe` defines the four functions and renders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2.ext
import jinja2.nodes as nodes
import jinja2.parser

Span = tuple[int, int]
"""Start and end in a text."""


class TraceEvent(str):
    """An empty segment of output that marks where a message or a generation block begins or ends."""

    __slots__ = ("kind", "message")
    kind: str
    message: int

    def __str__(self) -> str:
        return self  # Jinja calls str() on every output, which must not lose the event


def event(kind: str, message: int = -1) -> TraceEvent:
    made = TraceEvent("")
    made.kind, made.message = kind, message
    return made


class Trace(NamedTuple):
    """A rendering, and which part of it each message wrote."""

    text: str
    regions: dict[int, list[Span]]
    """The stretches that each message wrote, by the message's index."""
    blocks: dict[int, list[Span]]
    """The generation blocks of each message; those outside the loop over the messages have the index -1."""

    def region_text(self, message: int) -> str:
        """What a message wrote first, or "" when it wrote nothing."""
        return self.text[slice(*self.regions[message][0])] if self.regions.get(message) else ""


def read_trace(segments: Sequence[str]) -> Trace:
    """The trace of a rendering, from its segments: text and events in the order in which the template wrote them."""
    position, current, start = 0, -1, 0
    regions: dict[int, list[Span]] = {}
    blocks: dict[int, list[Span]] = {}
    opened: list[int] = []

    def close_region() -> None:
        if current >= 0 and position > start:
            regions.setdefault(current, []).append((start, position))

    for segment in segments:
        if type(segment) is not TraceEvent:
            position += len(segment)
        elif segment.kind == "generation":
            opened.append(position)
        elif segment.kind == "endgeneration":
            blocks.setdefault(current, []).append((opened.pop(), position))
        else:
            close_region()
            current, start = segment.message, position
    close_region()
    return Trace("".join(segments), regions, blocks)


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: its body between two trace events."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_output("sft_generation", line), nodes.Scope(body, lineno=line), _output("sft_endgeneration", line)]


def has_generation(tree: nodes.Template) -> bool:
    """Whether a parsed template has {% generation %} blocks."""
    return "sft_generation" in {node.name for node in tree.find_all(nodes.Name)}


def add_trace(node: nodes.Node) -> None:
    """Inserts an event at the top of every outermost loop's body, and one after the loop.

    Which of the loops go over the messages is seen when they run: `sft_message` looks at the loop variables. Loops inside loops
    look ahead or list tool calls, so they get no events.
    """
    for field, value in node.iter_fields():
        if not isinstance(value, list):
            if isinstance(value, nodes.Node):
                _add_trace_below(value)
            continue
        changed: list[Any] = []
        for child in value:
            changed.append(child)
            if isinstance(child, nodes.For):
                target = child.target
                names = [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))
                child.body.insert(0, _output("sft_message", child.lineno, [name.name for name in names]))
                changed.append(_output("sft_loop_end", child.lineno))
            elif isinstance(child, nodes.Node):
                _add_trace_below(child)
        setattr(node, field, changed)


def _add_trace_below(node: nodes.Node) -> None:
    # A macro returns its output as one text, which no longer says which message wrote what.
    if not isinstance(node, (nodes.Macro, nodes.CallBlock)):
        add_trace(node)


def _output(function: str, line: int, arguments: Sequence[str] = ()) -> nodes.Output:
    """{{ function(arguments) }}"""
    loaded: list[nodes.Expr] = [nodes.Name(name, "load") for name in arguments]
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), loaded, [], None, None)], lineno=line)
