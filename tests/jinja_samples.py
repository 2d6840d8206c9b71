"""Jinja templates that write texts in different ways: `TEXTS`."""

from __future__ import annotations

from chat_samples import EOS, SPECIALS
from sft.chat.named import NamedTemplate

THINKER = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.open and message.role == 'user' and not message.content.startswith('[result]') %}
        {%- set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and thought %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {{- content.lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{{- '}</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ('tool', 'environment') %}
        {{- '<|im_start|>user\\n[result]' + (message.content | trim) + '<|im_end|>\\n' }}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TURNS = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + BODY + '<|im_end|>\\n' }}{% endfor %}"
TURNS += "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
NAMED = {name: NamedTemplate(name, EOS, SPECIALS).text for name in ("olmo", "chatml", "tulu", "simple_chat")}
TEXTS = {
    "thinker": THINKER,
    "names of tools": THINKER.replace("{{ tool | tojson }}", "{{ tool.function.name }}{{ tool | tojson }}"),
    **NAMED,
    "trims": TURNS.replace("BODY", "(m.content | trim)"),
    "as json": TURNS.replace("BODY", "(m.content | tojson if m.role == 'user' else m.content)"),
    "a macro": "{%- macro said(m) %}{{ m.content.strip() }}{% endmacro %}" + TURNS.replace("BODY", "said(m)"),
}
