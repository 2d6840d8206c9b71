"""Random conversations under random templates: exactly the words of trained messages are trained."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import EOS
from made_templates import AS_RENDERED, LOOP, PLAIN, READ, jinja
from sft.chat.rows import BadRow
from sft.common.errors import SftError
from sft.data.render import trained_turns, until

words = st.text(st.sampled_from("abcdefgh é\n"), min_size=1, max_size=8).filter(lambda text: bool(text.strip()))


@st.composite
def small_templates(draw: Any) -> str:
    """A template with a random header, end, order of parts, and habits."""
    start = draw(st.sampled_from(["<|im_start|>", "<|bom|>", "### "]))
    gap = draw(st.sampled_from(["\\n", "", " "]))
    end = draw(st.sampled_from(["<|im_end|>", "<|end|>", EOS]))
    content = draw(st.sampled_from(["m.content", "m.content | trim", "m.content | tojson"]))
    thought = draw(
        st.sampled_from(
            [
                "",
                "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}",
                "{% if m.reasoning_content and loop.last %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}",
            ]
        )
    )
    prefix = draw(st.sampled_from(["", "<think>", "<think>\\n", "<think>\\n\\n</think>\\n"])) if thought else ""
    skipped = draw(st.sampled_from(["", "", "system", "user"]))
    where = f"{{% if m.role != '{skipped}' %}}" if skipped else "{% if true %}"
    body = f"{where}{{{{ '{start}' + m.role + '\\n' }}}}{thought}{{{{ {content} }}}}{{{{ '{end}{gap}' }}}}{{% endif %}}"
    wrapped = LOOP.replace("BODY", body)
    if draw(st.booleans()):
        wrapped = "{% macro all(messages) %}" + wrapped + "{% endmacro %}{{ all(messages) }}"
    return wrapped + f"{{% if add_generation_prompt %}}{{{{ '{start}assistant\\n{prefix}' }}}}{{% endif %}}"


@st.composite
def marked_rows(draw: Any) -> dict[str, Any]:
    """Messages whose words begin with the message's number, so that every word says whose it is."""

    def marked(index: int, kind: str) -> str:
        text = draw(words)
        return re.sub(r"\S+", lambda found: f"{kind}{index}{found.group()}", text)

    messages: list[dict[str, Any]] = []
    roles = draw(st.sampled_from([("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2, ("system", "user", "assistant", "user", "assistant")]))  # fmt: skip
    for index, role in enumerate(roles):
        messages.append({"role": role, "content": marked(index, "C")})
        if role == "assistant":
            if draw(st.booleans()):
                messages[-1]["reasoning_content"] = marked(index, "R")
            if draw(st.integers(0, 3)) == 0:
                messages[-1]["train"] = draw(st.booleans())
    return {"messages": messages}


@settings(max_examples=60, deadline=None)
@given(text=small_templates(), row=marked_rows(), as_rendered=st.booleans())
def test_exactly_the_words_of_trained_messages_are_trained(text: str, row: dict[str, Any], as_rendered: bool) -> None:
    """Or the template is refused, or the row rejected. No special token of a prompt is trained."""
    try:
        template = jinja(text, AS_RENDERED if as_rendered else PLAIN)
        conversation = READ(row)
        turns_of = trained_turns(conversation)
        parts = (
            [(until(conversation, turn), [turn]) for turn in turns_of] if as_rendered else [(conversation, turns_of)]
        )
        rendered = [(template.render(part)[0], turns, part) for part, turns in parts]
    except (SftError, BadRow):
        return

    def said(value: str) -> set[str]:
        return set(
            re.findall(
                r"[CR]\d[^\W\d]+", json.dumps(value, ensure_ascii=False).replace("\\n", " ").replace("\\\\n", " ")
            )
        )

    for runs, turns_here, part in rendered:
        assert "\x00" not in "".join(runs)
        inside, outside = said("\n".join(runs[1::2])), said("\n".join(runs[::2]))
        mine = set().union(
            *(
                said(part.messages[turn]["content"] + "\n" + part.messages[turn].get("reasoning_content", ""))
                for turn in turns_here
            )
        )
        others = set().union(
            *(said(message["content"]) for index, message in enumerate(part.messages) if index not in turns_here)
        )
        assert inside == mine and others <= outside and not outside & mine
        for run in runs[1::2]:
            assert not re.match(r"\s*(<\|im_start\|>|<\|bom\|>|### )", run)
            assert re.search(r"(<\|im_end\|>|<\|end\|>|<\|endoftext\|>)$", run)
