"""TODO sft.recipe.recipe.chat_templates"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """How one role is laid out: head, content, stop (what ends the turn and is trained with it), gap (scaffold).
    The `last_` pair ends the conversation."""

    head: str
    stop: str
    gap: str
    last_stop: str
    last_gap: str
    specials: int = 0
    last_specials: int = 0


@dataclass(frozen=True)
class Family:
    """Templates that share one layout. `turns(eos)` gives role -> (head, stop, gap, last_stop, last_gap)."""

    jinja: str
    turns: Callable[[str], dict[str, tuple[str, str, str, str, str]]]
    between: str = ""
    lead: str = ""  # what the model emits in front of the content, as it follows the head without a token boundary
    calls: bool = False
    given: str = ""  # what the generation prompt writes behind the assistant's head


CALLS = """\
{%- macro calls_of(message) -%}
    {%- if message.get('function_calls') is not none -%}
        {{- '<function_calls>' + message['function_calls'] + '</function_calls>' -}}
    {%- elif message.get('tool_calls') -%}
        {{- '<function_calls>' -}}
        {%- for call in message['tool_calls'] -%}
            {{- '\\n' if not loop.first else '' -}}
            {{- call['function']['name'] + '(' -}}
            {%- for name, value in call['function']['arguments'].items() -%}
                {{- (', ' if not loop.first else '') + name + '=' + (value | tojson) -}}
            {%- endfor -%}
            {{- ')' -}}
        {%- endfor -%}
        {{- '</function_calls>' -}}
    {%- endif -%}
{%- endmacro -%}
"""
CONTENT = """\
{%- macro content_of(message) -%}
    {%- set thinking = message.get('reasoning_content') or message.get('thinking') -%}
    {{- ('<think>' + thinking + '</think>' if thinking else '') + (message.get('content') or '') -}}
{%- endmacro -%}
"""
IM_TURNS = """\
{%- for message in messages -%}
    {%- set last = loop.last -%}
    {%- if message['role'] == 'system' -%}
        {{- '<|im_start|>system\\n' + message['content'] -}}
        {%- if message.get('functions') is not none -%}
            {{- ' <functions>' + message['functions'] + '</functions>' -}}
        {%- elif tools -%}
            {{- ' <functions>' + (tools | tojson) + '</functions>' -}}
        {%- else -%}
            {{- 'NO_FUNCTIONS' -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<|im_start|>user\\n' + message['content'] -}}
        {%- if message.get('functions') is not none -%}
            {{- '\\n<functions>' + message['functions'] + '</functions>' -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- set content = content_of(message) -%}
        STRIP_HISTORY
        {{- content -}}
        {{- calls_of(message) -}}
        {{- ASSISTANT_STOP -}}
    {%- else -%}
        {{- '<|im_start|>environment\\n' + message['content'] + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\nPROMPT' -}}
{%- endif -%}
"""
DEFAULT_SYSTEM = """\
{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}
    {{- '<|im_start|>system\\nIDENTITY' + (' <functions>' + (tools | tojson) + '</functions>' if tools else 'SUFFIX') -}}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
"""
STRIP_HISTORY = """\
{%- if not last and '<think>' in content and '</think>' in content -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}"""
NO_FUNCTIONS = " You do not currently have access to any functions. <functions></functions>"
OLMO = (
    "You are OLMo, a helpful function-calling AI assistant built by Ai2. Your date cutoff is November 2024, and your model"
    " weights are available at https://huggingface.co/allenai."
)
OLMO_7B = (
    "You are Olmo, a helpful AI assistant built by Ai2. Your date cutoff is December 2024, and your model weights are available"
    " at https://huggingface.co/allenai."
)
# Where fields other than role and content are written; functions of a system message are handled apart.
PLACES = {"functions": "user", "function_calls": "assistant", "tool_calls": "assistant"}
HELPFUL = "You are a helpful AI assistant."
TULU_JINJA = (
    CONTENT
    + """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>\\n' -}}
        {{- content_of(message) -}}
        {{- eos_token + ('' if loop.last else '\\n') -}}
    {%- elif message['role'] in ('system', 'user') -%}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\nPROMPT' -}}
{%- endif -%}
"""
)
ZEPHYR_JINJA = (
    CONTENT
    + """\
{%- for message in messages -%}
    {%- if message['role'] in ('system', 'user', 'assistant') -%}
        {{- '<|' + message['role'] + '|>\\n' -}}
        {{- content_of(message) -}}
        {{- eos_token + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
)
SIMPLE_JINJA = (
    CONTENT
    + """\
{%- for message in messages -%}
    {{- 'BETWEEN' if not loop.first else '' -}}
    {{- HEAD -}}
    {{- content_of(message) -}}
    {{- eos_token if loop.last and not add_generation_prompt else '' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'PROMPT' -}}
{%- endif -%}
"""
)


def im_turns(eos: str, assistant_last: str, assistant_last_gap: str, no_functions: str) -> dict:
    def turn(name: str, suffix: str = "") -> tuple[str, str, str, str, str]:
        return (f"<|im_start|>{name}\n", f"{suffix}<|im_end|>", "\n", f"{suffix}<|im_end|>", "\n")

    turns = {"system": turn("system", no_functions), "user": turn("user")}
    turns["assistant"] = ("<|im_start|>assistant\n", "<|im_end|>", "\n", assistant_last, assistant_last_gap)
    return turns | dict.fromkeys(("environment", "tool", "function", "ipython"), turn("environment"))


def olmo(identity: str, suffix: str, prompt: str = "", strip_history: bool = False) -> Family:
    text = CALLS + CONTENT + DEFAULT_SYSTEM + IM_TURNS
    for name, value in (
        ("STRIP_HISTORY", STRIP_HISTORY if strip_history else ""),
        ("ASSISTANT_STOP", "eos_token if last else '<|im_end|>\\n'"),
        ("IDENTITY", identity),
        ("SUFFIX", suffix),
        ("NO_FUNCTIONS", NO_FUNCTIONS),
        ("PROMPT", prompt),
    ):
        text = text.replace(name, value)
    return Family(text, lambda eos: im_turns(eos, eos, "", NO_FUNCTIONS), calls=True, given=prompt)


def chatml() -> Family:
    text = CALLS + CONTENT + IM_TURNS
    for name, value in (
        ("STRIP_HISTORY", ""),
        ("ASSISTANT_STOP", "'<|im_end|>\\n'"),
        ("NO_FUNCTIONS", ""),
        ("PROMPT", ""),
        ("environment\\n", "tool\\n"),
    ):
        text = text.replace(name, value)

    def turns(eos: str) -> dict:
        table = im_turns(eos, "<|im_end|>", "\n", "")
        tool = ("<|im_start|>tool\n", "<|im_end|>", "\n", "<|im_end|>", "\n")
        return table | dict.fromkeys(("environment", "tool", "function", "ipython"), tool)

    return Family(text, turns, calls=True)


def tulu(prompt: str = "") -> Family:
    def turns(eos: str) -> dict:
        table = {role: (f"<|{role}|>\n", "", "\n", "", "\n") for role in ("system", "user")}
        return table | {"assistant": ("<|assistant|>\n", eos, "\n", eos, "")}

    return Family(TULU_JINJA.replace("PROMPT", prompt), turns, given=prompt)


def zephyr() -> Family:
    roles = ("system", "user", "assistant")
    return Family(ZEPHYR_JINJA, lambda eos: {role: (f"<|{role}|>\n", eos, "\n", eos, "\n") for role in roles})


def simple(between: str, named: bool) -> Family:
    """`Role: content` or bare contents. A space joins the word after it into one token, so it belongs to the answer."""
    head = "message['role'].capitalize() + ': '" if named else "''"
    escaped = between.replace("\n", "\\n")
    prompt = "" if between == " " else escaped + ("Assistant:" if named else "")
    text = SIMPLE_JINJA.replace("BETWEEN", escaped).replace("HEAD", head).replace("PROMPT", prompt)
    roles = ("system", "developer", "user", "assistant", "tool", "environment", "function", "ipython")
    return Family(
        text,
        lambda eos: {role: (f"{role.capitalize()}:" if named else "", "", "", eos, "") for role in roles},
        between="" if between == " " else between,
        lead=" " if named or between == " " else "",
    )


FAMILIES: dict[str, Family] = {
    "olmo": olmo(OLMO, NO_FUNCTIONS),
    "olmo_thinker": olmo(OLMO, NO_FUNCTIONS, prompt="<think>"),
    "olmo_thinker_no_think_7b": olmo(OLMO_7B, ""),
    "olmo_thinker_no_think_sft_tokenization": olmo(HELPFUL, ""),
    "olmo_thinker_remove_intermediate_thinking": olmo(HELPFUL, "", prompt="<think>", strip_history=True),
    "chatml": chatml(),
    "tulu": tulu(),
    "tulu_thinker": tulu("<think>"),
    "zephyr": zephyr(),
    "simple_chat": simple("\n\n", named=True),
    "simple_concat_with_space": simple(" ", named=False),
    "simple_concat_with_new_line": simple("\n", named=False),
}
DEFAULTS = {
    "olmo": (OLMO, NO_FUNCTIONS),
    "olmo_thinker": (OLMO, NO_FUNCTIONS),
    "olmo_thinker_no_think_7b": (OLMO_7B, ""),
    "olmo_thinker_no_think_sft_tokenization": (HELPFUL, ""),
    "olmo_thinker_remove_intermediate_thinking": (HELPFUL, ""),
}


def functions(tools: list[dict]) -> str:
    return f" <functions>{json.dumps(tools, ensure_ascii=False)}</functions>"


def calls(tool_calls: list[dict]) -> str:
    lines = []
    for call in tool_calls:
        arguments = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["function"]["arguments"].items()
        )
        lines.append(f"{call['function']['name']}({arguments})")
    return "\n".join(lines)
