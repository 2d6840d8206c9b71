"""The texts of the named chat templates: olmo and its variants, tulu, zephyr, chatml, simple_chat.

Each template is defined twice: as Jinja text, which is exported with the model, and as a table of turns, which
`sft.chat.named` renders without Jinja. tests/test_chat.py proves that both write the same. The planner reads this module to check
a template's name and to put `digest` into prepare's key, so it uses the standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sft.common.files import canonical


class TurnText(NamedTuple):
    """How one role's turn is written: head, content, stop, gap. `stop` ends the turn and is trained with it; `gap` is scaffold.

    The last turn of a conversation ends with `last_stop` and `last_gap` instead.
    """

    head: str
    stop: str
    gap: str
    last_stop: str
    last_gap: str


class DefaultSystem(NamedTuple):
    """The system message that a template writes where a conversation has none."""

    identity: str
    no_functions: str
    """Follows the identity unless the row has tools."""


@dataclass(frozen=True)
class TemplateText:
    """One named template: its Jinja text, and the same layout as a table of turns."""

    jinja: str
    turns: Callable[[str], dict[str, TurnText]]
    """From the text of the end-of-sequence token to the turns, by role."""
    between: str = ""
    """Written between two messages, before the head of the second."""
    lead: str = ""
    """What the model emits before the content, because it follows the head without a token boundary."""
    has_calls: bool = False
    """Whether `functions`, `function_calls`, `tool_calls` and tools have a place in it."""
    generation_prefix: str = ""
    """What the generation prompt writes after the assistant's head, such as <think>."""
    default_system: DefaultSystem | None = None
    strips_history: bool = False
    """Whether thinking is removed from all answers except a last one."""

    @property
    def digest(self) -> str:
        """Hex digest of all that the template writes. It changes when the text or a rule of the layout changes."""
        facts = [self.jinja, self.turns("<eos>"), self.between, self.lead, self.has_calls, self.generation_prefix]
        return hashlib.sha256(canonical([*facts, self.default_system, self.strips_history])).hexdigest()


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


def im_turns(
    assistant_last_stop: str, assistant_last_gap: str = "", no_functions: str = "", tool: str = "environment"
) -> dict[str, TurnText]:
    """Turns between <|im_start|> and <|im_end|>."""

    def turn(name: str, suffix: str = "") -> TurnText:
        return TurnText(f"<|im_start|>{name}\n", f"{suffix}<|im_end|>", "\n", f"{suffix}<|im_end|>", "\n")

    turns = {"system": turn("system", no_functions), "user": turn("user")}
    turns["assistant"] = turn("assistant")._replace(last_stop=assistant_last_stop, last_gap=assistant_last_gap)
    return turns | dict.fromkeys(("environment", "tool", "function", "ipython"), turn(tool))


def fill(text: str, **values: str) -> str:
    """Replaces the words in capitals."""
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def olmo(identity: str, suffix: str, prompt: str = "", strips_history: bool = False) -> TemplateText:
    text = fill(
        CALLS + CONTENT + DEFAULT_SYSTEM + IM_TURNS,
        STRIP_HISTORY=STRIP_HISTORY if strips_history else "",
        ASSISTANT_STOP="eos_token if last else '<|im_end|>\\n'",
        IDENTITY=identity,
        SUFFIX=suffix,
        NO_FUNCTIONS=NO_FUNCTIONS,
        PROMPT=prompt,
    )
    return TemplateText(
        text,
        lambda eos: im_turns(eos, no_functions=NO_FUNCTIONS),
        has_calls=True,
        generation_prefix=prompt,
        default_system=DefaultSystem(identity, suffix),
        strips_history=strips_history,
    )


def chatml() -> TemplateText:
    text = fill(
        CALLS + CONTENT + IM_TURNS, STRIP_HISTORY="", ASSISTANT_STOP="'<|im_end|>\\n'", NO_FUNCTIONS="", PROMPT=""
    )
    text = text.replace("environment\\n", "tool\\n")
    return TemplateText(text, lambda eos: im_turns("<|im_end|>", "\n", tool="tool"), has_calls=True)


def tulu(prompt: str = "") -> TemplateText:
    def turns(eos: str) -> dict[str, TurnText]:
        table = {role: TurnText(f"<|{role}|>\n", "", "\n", "", "\n") for role in ("system", "user")}
        return table | {"assistant": TurnText("<|assistant|>\n", eos, "\n", eos, "")}

    return TemplateText(fill(TULU_JINJA, PROMPT=prompt), turns, generation_prefix=prompt)


def zephyr() -> TemplateText:
    roles = ("system", "user", "assistant")
    return TemplateText(
        ZEPHYR_JINJA, lambda eos: {role: TurnText(f"<|{role}|>\n", eos, "\n", eos, "\n") for role in roles}
    )


def simple(between: str, named: bool) -> TemplateText:
    """`Role: content` or bare contents. A space joins the word after it into one token, so it belongs to the answer."""
    head = "message['role'].capitalize() + ': '" if named else "''"
    escaped = between.replace("\n", "\\n")
    prompt = "" if between == " " else escaped + ("Assistant:" if named else "")
    roles = ("system", "developer", "user", "assistant", "tool", "environment", "function", "ipython")
    return TemplateText(
        fill(SIMPLE_JINJA, BETWEEN=escaped, HEAD=head, PROMPT=prompt),
        lambda eos: {role: TurnText(f"{role.capitalize()}:" if named else "", "", "", eos, "") for role in roles},
        between="" if between == " " else between,
        lead=" " if named or between == " " else "",
    )


TEMPLATES: dict[str, TemplateText] = {
    "olmo": olmo(OLMO, NO_FUNCTIONS),
    "olmo_thinker": olmo(HELPFUL, "", prompt="<think>"),
    "olmo_thinker_no_think_7b": olmo(OLMO_7B, ""),
    "olmo_thinker_no_think_sft_tokenization": olmo(HELPFUL, ""),
    "olmo_thinker_remove_intermediate_thinking": olmo(HELPFUL, "", prompt="<think>", strips_history=True),
    "chatml": chatml(),
    "tulu": tulu(),
    "tulu_thinker": tulu("<think>"),
    "zephyr": zephyr(),
    "simple_chat": simple("\n\n", named=True),
    "simple_concat_with_space": simple(" ", named=False),
    "simple_concat_with_new_line": simple("\n", named=False),
}
