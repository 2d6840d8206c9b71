"""Marks in what a Jinja template writes: which message, and which {% generation %} block, wrote which piece of the text.

In: a parsed template. Out: the same with calls of `sft_message`, `sft_loop_end`, `sft_generation` and `sft_endgeneration` in it,
which write an empty `Mark` each. `sft.chat.template` supplies them and reads the marks.
"""

from __future__ import annotations

from typing import Any

import jinja2.ext
import jinja2.nodes as nodes


class Mark(str):
    """An empty piece of output that says where in the stream a message or a generation block begins or ends."""

    __slots__ = ("message", "what")
    what: str
    message: int

    def __str__(self) -> str:
        return self  # str() around every output must not lose what this piece marks


def mark(what: str, message: int = -1) -> Mark:
    piece = Mark("")
    piece.what, piece.message = what, message
    return piece


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: its body between two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def output(name: str) -> nodes.Output:
            return nodes.Output([nodes.Call(nodes.Name(name, "load"), [], [], None, None)], lineno=line)

        return [output("sft_generation"), nodes.Scope(body, lineno=line), output("sft_endgeneration")]


def mark_loops(node: nodes.Node) -> None:
    """Puts a mark at the top of every outermost loop's body and one after the loop. Which loops go over messages shows when
    they run: sft_message looks at the loop variable. Loops inside loops look ahead or list tool calls, they are left alone."""
    for field, value in node.iter_fields():
        if not isinstance(value, list):
            if isinstance(value, nodes.Node) and not isinstance(value, (nodes.Macro, nodes.CallBlock)):
                mark_loops(value)
            continue
        changed: list[Any] = []
        for child in value:
            changed.append(child)
            if isinstance(child, nodes.For):
                names = [name.name for name in child.target.find_all(nodes.Name)]
                if isinstance(child.target, nodes.Name):
                    names = [child.target.name]
                begin = nodes.Call(
                    nodes.Name("sft_message", "load"), [nodes.Name(name, "load") for name in names], [], None, None
                )
                end = nodes.Call(nodes.Name("sft_loop_end", "load"), [], [], None, None)
                child.body.insert(0, nodes.Output([begin], lineno=child.lineno))
                changed.append(nodes.Output([end], lineno=child.lineno))
            elif isinstance(child, nodes.Node) and not isinstance(child, (nodes.Macro, nodes.CallBlock)):
                mark_loops(child)
        setattr(node, field, changed)
