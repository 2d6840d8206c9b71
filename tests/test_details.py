"""axolotl's `train_detail`: characters in ranges are trained, tokens that an edge cuts are not, and a range that cannot be placed is a reject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import EOS, IM_END, SOURCE, both_ways, encoder, text_of, tokenizer_folder
from sft.chat.details import read_details
from sft.chat.rows import BadRow
from sft.sources.blocks import LineBlock

folder = tokenizer_folder
TEXT = "Well, it is 12345 apples!!"


def detail(begin: int, end: int, train: bool = True) -> dict[str, Any]:
    return {"begin_offset": begin, "end_offset": end, "train": train}


def row(details: Any, content: str = TEXT, **more: Any) -> dict[str, Any]:
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}
    return {"messages": [question, {**answer, "train_detail": details}], **more}


def trained(made: Any, value: Any) -> str:
    encoded = made.encode([value], SOURCE)
    assert not encoded.rejects, encoded.rejects
    return text_of(made, encoded, trained=True)


def rejected(made: Any, value: Any) -> str:
    (reject,) = made.encode([value], SOURCE).rejects
    return f"{reject.reason}: {reject.detail}"


@pytest.mark.parametrize("name", ["olmo", "chatml", "tulu"])
def test_only_the_characters_of_trained_ranges_and_the_end_are_trained(folder: Path, name: str) -> None:
    made = encoder(folder, name)
    end = IM_END if name == "chatml" else EOS
    assert trained(made, row([detail(0, 4, False), detail(5, 10)])) == " it is" + end
    assert trained(made, row(json.dumps([detail(0, 24)]))) == TEXT[:24] + end
    assert trained(made, row([detail(0, 25)])) == trained(made, row([])) == TEXT + end
    assert trained(made, row(None, train_detail=[None, [detail(5, 10)]])) == " it is" + end
    assert trained(made, row([detail(5, 10)], system="S")) == " it is" + end


def test_a_question_can_have_ranges_and_each_turn_of_as_rendered_its_own(folder: Path) -> None:
    asked = [{"role": "user", "content": TEXT, "train_detail": [detail(5, 10)]}, *row([detail(0, 4)])["messages"][1:]]
    assert trained(encoder(folder), {"messages": asked}).startswith(" it is")
    made = encoder(folder, history="as-rendered")
    value = {"messages": [*row([detail(5, 10)])["messages"], *row([detail(0, 4)])["messages"]]}
    encoded = made.encode([value], SOURCE)
    assert [text_of(made, encoded, i, trained=True) for i in (0, 1)] == [" it is" + EOS, "Well," + EOS]


JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ FILTER }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "found"),
    [("m.content | trim", " it is"), ("m.content | replace('apples', 'pears')", None), ("m.content | upper", None)],
)
def test_a_template_may_trim_a_content_and_not_change_it(folder: Path, written: str, found: str | None) -> None:
    (folder.parent / "t.jinja").write_text(JINJA.replace("FILTER", written))
    made = encoder(folder, "t.jinja", lambda path: folder.parent / path)
    value = row([detail(7, 12), detail(0, 1)], f"  {TEXT}\n")
    if found is None:
        assert "leaves out" in rejected(made, value) or "does not write the content as it is" in rejected(made, value)
    else:
        value["messages"][1]["train_detail"].pop()
        assert trained(made, value) == found + IM_END


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ([detail(5, 26)], "the range 5 to 26 is not inside the 26 characters"),
        ([detail(-1, 3)], "not inside"),
        ([detail(4, 3)], "not inside"),
        ([detail(0, 5), detail(5, 9, False)], "two ranges disagree about characters 5 to 9"),
        ([{"begin_offset": 0, "end_offset": 3}], "a range has exactly begin_offset, end_offset, train"),
        ([{**detail(0, 3), "x": 1}], "a range has exactly"),
        ([detail(0, 3, 2)], "train is true or false"),  # type: ignore[arg-type]
        ([{**detail(0, 3), "end_offset": 3.5}], "offsets are integers"),
        ({"a": 1}, "is dict, not a list of ranges"),
        ("[", "not JSON"),
        ([detail(1, 2)], "the trained range 'el' has no whole token"),
        ([detail(0, 25, False)], "nothing_to_train"),
    ],
)  # fmt: skip
def test_ranges_that_cannot_be_read_or_placed_reject_the_row(folder: Path, details: Any, reason: str) -> None:
    assert reason in rejected(encoder(folder), row(details))


def test_a_flag_that_disagrees_with_the_ranges_rejects_the_row(folder: Path) -> None:
    made = encoder(folder)
    value = row([detail(0, 4)])
    value["messages"][1]["train"] = False
    assert "train_detail and another flag disagree" in rejected(made, value)
    assert "disagree" in rejected(made, row([detail(0, 4)], train_detail=[None, [detail(0, 5)]]))
    assert "1 flags for 2 messages" in rejected(made, row(None, train_detail=[[detail(0, 4)]]))
    thought = row([detail(0, 7)], "<think>x</think>y")
    thought["messages"] += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert 'thinking = "strip" changes the content' in rejected(encoder(folder, thinking="strip"), thought)


def test_the_trained_spans_are_merged_and_in_order() -> None:
    ranges = [detail(6, 7), detail(0, 1), detail(2, 3), detail(4, 5, False)]
    assert read_details(ranges, 0, "0123456789") == ((0, 4), (6, 8))
    with pytest.raises(BadRow, match="not inside the 0 characters"):
        read_details([detail(0, 0)], 0, "")


pieces = st.lists(
    st.sampled_from(["apple", " it", "é", "👩‍👩‍👧‍👦", "12345", EOS, "  ", "\n", "x"]), min_size=1, max_size=8
)


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(words=pieces, edges=st.lists(st.integers(0, 40), min_size=2, max_size=6, unique=True))
def test_a_token_is_trained_when_all_its_bytes_are(folder: Path, words: list[str], edges: list[int]) -> None:
    made = encoder(folder)
    content = "".join(words)
    edges = sorted({min(edge, len(content)) for edge in edges})
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    value = row([detail(a, b - 1) for a, b in spans], content)
    encoded = made.encode([value], SOURCE)
    if not spans or encoded.rejects:
        return
    trained_bytes = [any(a <= at < b for a, b in spans) for at, char in enumerate(content) for _ in char.encode()]
    whole = text_of(made, encoded).encode()
    header = b"<|im_start|>assistant\n"
    start = whole.rindex(header) + len(header)
    at = 0
    for token, is_trained in zip(encoded.ids, encoded.loss_mask.tolist(), strict=True):
        length = len(made.vocabulary.decode(np.array([token])))
        inside = range(max(at, start), min(at + length, start + len(content.encode())))
        expected = at >= start and all(trained_bytes[place - start] for place in inside)
        assert is_trained == expected, (token, at)
        at += length


@pytest.mark.compile
def test_compiled_code_leaves_such_rows_to_python(folder: Path) -> None:
    lines = "".join(
        json.dumps(value) + "\n" for value in (row([detail(5, 10)]), row(None, train_detail=[None, [detail(5, 10)]]))
    )
    compiled, python, plain = both_ways(encoder(folder), LineBlock.of(lines.encode()))
    assert compiled == python and plain == 0
