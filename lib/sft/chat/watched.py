"""A Jinja template that is watched: does what it writes depend on a text only by writing it?

In: the Jinja text, and conversations in which stand-ins (private-use characters) take the place of texts. Out: what the template writes, as
`TemplateProbe` does, or `Depends` when the template looks at a text in a way that another text could answer differently. These are
allowed, because they give the same for every text without white space at its ends and without the constants in `constants`:

    writing it, joining it to other texts, trim and strip, asking for its type or its truth, tojson
    asking for a constant: 'x' in text, text == 'x', text.startswith('x'), text.split('x'); the constant joins `constants`

Everything that Jinja does with a value is a filter, a test, a call, a comparison, an item, a loop or an operator; each is watched.
"""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox

from sft.chat.probe import TemplateProbe, environment, to_json
from sft.chat.trace import GenerationTag, add_trace

FIRST, COUNT = 0xF8000, 0x1000
"""Stand-ins of texts, in order."""
OBJECT = FIRST + COUNT
"""Likewise the keys of objects that stand for others."""
VALUE, JSON = chr(OBJECT + COUNT), chr(OBJECT + COUNT + 1)
"""The value of such a key, and what comes before the stand-in of a text that is written as JSON."""
ANY = re.compile(f"[{chr(FIRST)}-{JSON}]")
TEXT = re.compile(f"[{chr(FIRST)}-{chr(OBJECT - 1)}]")
TYPE_TESTS = frozenset(
    ("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence", "string", "true",
     "undefined")
)  # fmt: skip
SAME_TEXT = frozenset(("string", "safe", "default", "d", "trim", "tojson"))
"""Filters that may be given a text."""
OF_CONTAINERS = frozenset(
    ("list", "length", "count", "first", "last", "selectattr", "rejectattr", "select", "reject", "map", "join", "reverse", "tojson", "default", "d")
)  # fmt: skip
"""Filters that may be given lists and objects."""
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge,
    "in": lambda item, items: item in items, "notin": lambda item, items: item not in items,
}  # fmt: skip
COMPARING_TESTS = {"eq": "eq", "equalto": "eq", "==": "eq", "ne": "ne", "!=": "ne", "in": "in"}
SEARCHES = frozenset(("split", "rsplit", "startswith", "endswith", "partition", "rpartition"))
STRIPS = frozenset(("strip", "lstrip", "rstrip"))
SCALARS = (str, int, float, bool, type(None), jinja2.Undefined)


class Depends(Exception):
    """What the template writes depends on a text in another way."""


class NewConstant(Exception):
    """The template asks a text for a constant that was not among `constants` and now is."""


class StandIn(dict[str, Any]):
    """An object that stands for another. A template may only write it as JSON."""

    def __init__(self, index: int) -> None:
        super().__init__({chr(OBJECT + index): VALUE})


def holds(value: Any) -> bool:
    """Whether a value is a text with stand-ins, or an object that is one."""
    return isinstance(value, StandIn) or (isinstance(value, str) and ANY.search(value) is not None)


def tojson_text(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """`to_json` of a value with stand-ins. Raises Depends for other layouts of JSON."""
    text = to_json(value)
    if ANY.search(text) is None:
        return to_json(value, ensure_ascii, indent, **options)
    if ensure_ascii or indent is not None or options or JSON in text:
        raise Depends("tojson with options")
    return TEXT.sub(lambda found: JSON + found.group(), text)


class Watch:
    """Records what a template asks of values. `constants`: the constants that it searches texts for."""

    def __init__(self) -> None:
        self.constants: list[str] = []

    def ask_for(self, constant: Any) -> None:
        """Raises NewConstant for a constant that texts are not yet searched for. Raises Depends for a value that is not a constant."""
        if type(constant) is not str or holds(constant):
            raise Depends("a comparison of texts")
        rest = constant
        for known in self.constants:
            rest = rest.replace(known, "")
        if not constant:
            return
        if not constant.strip():
            raise Depends("white space inside a text")
        if rest.strip():
            self.constants.append(constant.strip())
            raise NewConstant

    def compare(self, operators: Sequence[str], first: Any, *others: Any) -> Any:
        """The value of a comparison like 1 < x < 2."""
        result: Any = True
        for name, other in zip(operators, others, strict=True):
            self.check_comparison(name, first, other)
            result = COMPARISONS[name](first, other)
            if not result:
                return result
            first = other
        return result

    def check_comparison(self, name: str, left: Any, right: Any) -> None:
        if isinstance(left, (dict, list, tuple)) and ((left and right) or name in ("in", "notin")):
            raise Depends("a comparison of messages")
        if not holds(left) and not holds(right):
            return
        if name in ("in", "notin"):
            if holds(left):
                if not isinstance(right, (list, tuple)):
                    raise Depends("a text inside a text")
                for item in right:
                    self.ask_for(item)
            elif isinstance(right, StandIn):
                raise Depends("a key of an object")
            else:
                self.ask_for(left)
            return
        if name not in ("eq", "ne"):
            raise Depends("an order of texts")
        one, other = (left, right) if holds(left) else (right, left)
        if isinstance(one, StandIn):
            raise Depends("a comparison of objects")
        if not isinstance(other, (int, float, type(None), jinja2.Undefined)):
            self.ask_for(other)

    def test(self, name: str, values: Sequence[Any]) -> None:
        if name in TYPE_TESTS or not any(map(holds, values)):
            return
        if name not in COMPARING_TESTS:
            raise Depends(f"the test {name}")
        self.check_comparison(COMPARING_TESTS[name], *values)

    def filter(self, name: str, values: Sequence[Any]) -> None:
        if any(map(holds, values)):
            only_space = name != "trim" or all(not str(v).strip() for v in values[1:] if v is not None)
            if name not in SAME_TEXT or isinstance(values[0], StandIn) != (name == "tojson") or not only_space:
                is_json = name in ("tojson", "default", "d")
                if not (is_json and isinstance(values[0], (StandIn, str))):
                    raise Depends(f"the filter {name}")
        elif name not in OF_CONTAINERS and not all(isinstance(value, SCALARS) for value in values):
            raise Depends(f"the filter {name} of a list")

    def call(self, function: Any, arguments: Sequence[Any]) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, StandIn):
            raise Depends("an item of an object")
        if not holds(owner) and not any(map(holds, arguments)):
            return
        if isinstance(owner, str):
            if holds(owner) and name in SEARCHES:
                self.ask_for(arguments[0] if arguments else " ")
            elif (
                not (holds(owner) and name in STRIPS and all(not str(a or "").strip() for a in arguments))
                and name != "join"
            ):
                raise Depends(f"the method {name}")
        elif (
            function not in (jinja2.utils.Namespace, dict)
            and not isinstance(function, jinja2.runtime.Macro)
            and not (isinstance(owner, (list, dict)) and name in ("append", "get"))
        ):
            raise Depends(f"a call of {name}")

    def loop(self, items: Any) -> Any:
        """Looks at what a loop goes over, or a slice is of."""
        if holds(items):
            raise Depends("a loop over a text")
        return items


class WatchedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of a template, watched."""

    intercepted_binops = frozenset(("-", "*", "/", "//", "%", "**"))

    def __init__(self, source: jinja2.Environment, watch: Watch) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
        self.watch = watch
        self.globals.update({**source.globals, "sft_compare": watch.compare, "sft_loop": watch.loop})
        self.own = [function for name, function in self.globals.items() if name.startswith("sft_")]
        self.filters.update({**source.filters, "tojson": tojson_text})
        for table, look in ((self.filters, watch.filter), (self.tests, watch.test)):
            for name, function in list(table.items()):
                table[name] = self._watched(name, function, look)

    def _watched(self, name: str, function: Any, look: Callable[[str, Sequence[Any]], None]) -> Any:
        """The filter or test, with `look` before it."""
        skipped = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            look(name, [*arguments[skipped:], *options.values()])
            return function(*arguments, **options)

        return watched

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj not in __self.own:
            named = [
                value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")
            ]  # Jinja's own
            __self.watch.call(__obj, [*args, *named])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if holds(left) or holds(right):
            raise Depends(f"the operator {operator}")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if holds(obj) or holds(argument):
            raise Depends("an item of a text or of an object")
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, StandIn):
            raise Depends("an item of an object")
        return super().getattr(obj, attribute)


def watch_probe(probe: TemplateProbe, watch: Watch) -> TemplateProbe:
    """The probe of the same template, watched. Its methods raise Depends and NewConstant too."""
    source = probe.template.environment
    env = WatchedEnvironment(source, watch)
    made = copy.copy(probe)
    made.template = jinja2.Template.from_code(env, _compiled(probe.name, probe.jinja), env.make_globals(None))
    made.passes_on = (Depends, NewConstant)
    return made


@functools.lru_cache(maxsize=128)
def _compiled(name: str, text: str) -> CodeType:
    env = WatchedEnvironment(environment(), Watch())
    tree = env.parse(text)
    _watch_nodes(tree)
    add_trace(tree)
    tree.set_environment(env)
    return env.compile(tree, name=name)


def _watch_nodes(node: nodes.Node) -> None:
    """Replaces comparisons and what loops go over by calls of `sft_compare` and `sft_loop`."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_watched_node(item) if isinstance(item, nodes.Node) else item for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _watched_node(value))


def _watched_node(node: nodes.Node) -> nodes.Node:
    _watch_nodes(node)
    if isinstance(node, nodes.Compare):
        operators: nodes.Expr = nodes.Const(tuple(operand.op for operand in node.ops))
        return _call("sft_compare", [operators, node.expr, *(operand.expr for operand in node.ops)], node.lineno)
    if isinstance(node, nodes.For):
        node.iter = _call("sft_loop", [node.iter], node.lineno)
    if isinstance(node, nodes.Getitem) and isinstance(
        node.arg, nodes.Slice
    ):  # Jinja slices without asking the environment
        node.node = _call("sft_loop", [node.node], node.lineno)
    return node


def _call(function: str, arguments: list[Any], line: int) -> nodes.Call:
    return nodes.Call(nodes.Name(function, "load"), arguments, [], None, None, lineno=line)
