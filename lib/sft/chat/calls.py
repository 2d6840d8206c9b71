"""Tool calls and tools of a row, in the shapes that templates read.

In: the values of `tool_calls`, `function_call` and of the column of tools, as a dataset has them. Out: OpenAI's objects, with the
arguments of a call as an object. A null property of an object is an absent property, because columnar files fill every object with
nulls for the properties of all others; a property that the tool's schema requires keeps its null. Text that holds JSON is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sft.chat.fields import RESULT_ROLES
from sft.chat.values import BadRow, drop_nulls, is_empty, kind, parse, parse_each, to_json
from sft.recipe.row_fields import CALL_FIELDS, FUNCTION_FIELDS


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of each tool's arguments, by the tool's name."""
    functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools]
    return {str(f.get("name")): f.get("parameters", f.get("input_schema")) for f in functions}


def read_tool_calls(calls: Any, index: int, schemas: Mapping[str, Any]) -> list[dict[str, Any]]:
    """OpenAI tool calls with their arguments as an object: templates iterate over them. `schemas` are those of `parameters_of`."""
    if isinstance(calls, str):
        calls = parse(calls, "bad_tool_calls", f"message {index}: tool_calls is text that is not JSON")
        if calls is None:
            return []
    if not isinstance(calls, (list, tuple)):
        raise BadRow("bad_tool_calls", f"message {index}: tool_calls is {kind(calls)}, not a list")
    calls = parse_each(calls, "bad_tool_calls", f"message {index}: call {{}}")
    return [read_tool_call(call, index, schemas) for call in calls]


def read_tool_call(call: Any, index: int, schemas: Mapping[str, Any]) -> dict[str, Any]:
    """One call. Raises BadRow, also when a name or arguments beside the `function` object are not those in it."""
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("bad_tool_calls", f"message {index}: a call without a function name")
    where = f"message {index}: arguments of {function['name'][:40]}"
    arguments = read_arguments(function.get("arguments"), where, schemas.get(function["name"]))
    if function is not call:
        if not is_empty(call.get("name")) and call["name"] != function["name"]:
            raise BadRow("disagree", f"message {index}: the name of a call and of its function differ")
        beside = call.get("arguments")
        if not is_empty(beside) and read_arguments(beside, where, schemas.get(function["name"])) != arguments:
            raise BadRow("disagree", f"{where}, of the call and of its function, differ")
    call_id, call_type = call.get("id"), call.get("type")
    if not isinstance(call_id, (str, type(None))) or call_type not in (None, "", "function"):
        raise BadRow("bad_tool_calls", f"message {index}: a call with the id {call_id!r} and the type {call_type!r}")
    call_id = {"id": call_id} if call_id else {}
    return {**call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_arguments(arguments: Any, where: str, schema: Any) -> dict[str, Any]:
    """The arguments of a call, which may be JSON text. Without any they are an empty object. Raises BadRow."""
    if isinstance(arguments, str):
        arguments = parse(arguments or "{}", "bad_tool_calls", f"{where} are not JSON")
    elif isinstance(arguments, Mapping):
        arguments = drop_nulls(arguments, schema)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRow("bad_tool_calls", f"{where} are {kind(arguments)}")
    to_json(arguments, where)
    return dict(arguments)


def read_spoken(call: Any, index: int, schemas: Mapping[str, Any]) -> dict[str, Any] | None:
    """A call that is the content of a message; None for a value that is no call. Llama writes `parameters` for `arguments`, others `input`.

    Nothing counts the fields of such a call. It raises BadRow for a field that is not read.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    if function is not call:
        check_read(call, CALL_FIELDS, index)
    elif used := [name for name in ("arguments", "parameters", "input") if not is_empty(call.get(name))]:
        if len(used) > 1:
            raise BadRow("disagree", f"message {index}: a call has {' and '.join(used)}")
        call = function = {
            **{name: value for name, value in call.items() if name != used[0]},
            "arguments": call[used[0]],
        }
    check_read(function, FUNCTION_FIELDS if function is not call else CALL_FIELDS, index)
    return read_tool_call(call, index, schemas)


def check_read(value: Mapping[str, Any], read: Collection[str], index: int) -> None:
    """Raises BadRow when a field of a call in the content holds something, and nothing reads it."""
    for name, held in value.items():
        if name not in read and not is_empty(held):
            raise BadRow("bad_tool_calls", f"message {index}: nothing reads the field {name[:40]!r} of its call")


def read_tools(tools: Any, column: str) -> list[dict[str, Any]] | None:
    """A column of tools as a list of objects; None when it offers no tools. OpenAI's older `functions` become tools."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = parse(tools, "bad_tools", f"the {column} column holds text that is not JSON")
    elif tools is not None:
        tools = drop_nulls(tools)
    if tools is None:
        return None
    if isinstance(tools, (list, tuple)):
        tools = parse_each(tools, "bad_tools", f"tool {{}} of the {column} column")
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("bad_tools", f"the {column} column holds {kind(tools)}, not a list of objects")
    to_json(tools, f"the {column} column")
    if column == "functions":
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return [dict(tool) for tool in tools] or None


def check_results(messages: Sequence[Mapping[str, Any]], names_are_written: bool) -> None:
    """Raises BadRow when results follow calls in another order, by their ids, or by their names if they have no ids.

    For templates that write no ids. The model then sees only the order, or the names if the template writes them and they differ.
    """
    calls: list[Mapping[str, Any]] = []
    place = 0
    for index, message in enumerate(messages):
        if "tool_calls" in message:
            calls, place = [*(() if place else calls), *message["tool_calls"]], 0
        elif message["role"] not in RESULT_ROLES:
            calls, place = [], 0
        elif calls:
            names = [call["function"]["name"] for call in calls]
            is_named = names_are_written and names.count(message.get("name", "")) == 1
            found, known = message.get("tool_call_id"), [call.get("id") for call in calls]
            if found is None or found not in known:
                found, known = message.get("name"), names
            if found in known and known[place : place + 1] != [found] and not is_named:
                raise BadRow(
                    "order_of_results",
                    f"message {index} is the result of the call {str(found)[:40]!r}, but the result of another call is expected here, and the template"
                    " writes no ids; next: put the results in the order of the calls",
                )
            place += 1


def calls_text(tool_calls: Sequence[Mapping[str, Any]]) -> str:
    """OpenAI tool calls as `name(argument=value, …)`, one a line, as the named templates write them."""
    lines = []
    for call in tool_calls:
        arguments = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["function"]["arguments"].items()
        )
        lines.append(f"{call['function']['name']}({arguments})")
    return "\n".join(lines)
