"""recipes/tasks/format_*: the checks agree with IFEval's own where both have them, and every row can be obeyed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TASKS = Path(__file__).parents[1] / "recipes" / "tasks"


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, TASKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


checks = module("format_checks")
ROWS = [json.loads(line) for line in (TASKS / "format_following.jsonl").read_text().splitlines()]

REPLIES = [
    "The sky is blue.", "the sky is blue, and so is the sea.", "THE SKY IS BLUE.", "<<Sky>>\nIt is blue.\n\nP.S. It is high.",
    "* one\n* two\n* three", "- one\n- two", "1. one\n2. two", "Part 1\nfirst\nPart 2\nsecond", "*light* and *dark* and **grey**",
    "first *** second *** third", "*** first *** second ***", "one answer ****** another answer", "same ****** same", "****** one",
    '{"a": 1, "b": [2]}', '```json\n{"a": 1}\n```', "{not json}", '"The sky is blue."', '"', "My answer is yes.", "Dear [name], see [place].",
    "It was very blue. Really.", "everything is overly blue", "sky sky Sky", "quick queen", "That is all", 'It is blue. "That is all"',
    "word " * 60, "", "  ", "p. s. more", "no digits or signs", "two words\n\nHowever it goes on", "<< >>", "[]", "**",
]  # fmt: skip

IFEVAL: list[tuple[str, str, dict[str, Any]]] = [
    ("words_at_least 5", "length_constraints:number_words", {"num_words": 5, "relation": "at least"}),
    ("words_at_most 4", "length_constraints:number_words", {"num_words": 5, "relation": "less than"}),
    ("starred_paragraphs 2", "length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("starred_paragraphs 3", "length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ("bullets 2", "detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("bullets 3", "detectable_format:number_bullet_lists", {"num_bullets": 3}),
    ("json_object []", "detectable_format:json_format", {}),
    ('keywords ["sky", "blue"]', "keywords:existence", {"keywords": ["sky", "blue"]}),
    ('forbidden ["very", "really"]', "keywords:forbidden_words", {"forbidden_words": ["very", "really"]}),
    ('keyword_at_least "sky", 2', "keywords:frequency", {"keyword": "sky", "frequency": 2, "relation": "at least"}),
    ('letter_at_most "q", 1', "keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}),
    ("lowercase", "change_case:english_lowercase", {}),
    ("uppercase", "change_case:english_capital", {}),
    ("no_commas", "punctuation:no_comma", {}),
    ("title", "detectable_format:title", {}),
    ("highlights_at_least 2", "detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ('sections_at_least "Part", 2', "detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}),
    ("placeholders_at_least 2", "detectable_content:number_placeholders", {"num_placeholders": 2}),
    ("postscript", "detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("quoted", "startend:quotation", {}),
    ('ends_with "that is all"', "startend:end_checker", {"end_phrase": "that is all"}),
    ("two_answers", "combination:two_responses", {}),
]  # fmt: skip
# Where ours is stricter on purpose: dividers are no highlights.
STRICTER = {
    ("highlights_at_least 2", "first *** second *** third"),
    ("highlights_at_least 2", "*** first *** second ***"),
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """IFEval's instruction classes as lm-eval ships them; its language detection and downloads stay out of it."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: None)
    for name, content in (("langdetect", {"detect": lambda _: "en", "LangDetectException": ValueError}), ("immutabledict", {"immutabledict": dict})):  # fmt: skip
        fake = ModuleType(name)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
    from lm_eval.tasks.ifeval import instructions_registry

    return instructions_registry.INSTRUCTION_DICT


@pytest.mark.seconds
def test_checks_agree_with_ifevals_own(registry: Any) -> None:
    differ = []
    seen: dict[str, set[bool]] = {}
    for ours, theirs, arguments in IFEVAL:
        instruction = registry[theirs](theirs)
        instruction.build_description(**arguments)
        for reply in REPLIES:
            wanted = bool(reply.strip()) and bool(instruction.check_following(reply))
            found = checks.holds(ours, reply)
            seen.setdefault(ours, set()).add(found)
            if found != wanted and (ours, reply) not in STRICTER:
                differ.append((ours, reply, found, wanted))
    assert not differ
    assert all(found == {True, False} for found in seen.values()), seen  # every check passes and fails somewhere


def test_loose_scores_are_ifevals(registry: Any) -> None:
    from lm_eval.tasks.ifeval import utils

    for reply in ("Sure!\nthe sky\nHope it helps!", "**the sky**", "*the*\nsky is\n*blue*", "THE\nsky", "Sky"):
        example = utils.InputExample(0, ["change_case:english_lowercase", "length_constraints:number_words"], "",
                                     [{}, {"num_words": 3, "relation": "less than"}])  # fmt: skip
        doc = {"checks": ["lowercase", "words_at_most 2"]}
        found = checks.process_results(doc, [reply])
        strict = utils.test_instruction_following_strict(example, reply)
        loose = utils.test_instruction_following_loose(example, reply)
        assert (found["strict"], found["loose"]) == (strict.follow_all_instructions, loose.follow_all_instructions)
        assert found["strict_share"] == sum(strict.follow_instruction_list) / 2
        assert found["loose_share"] == sum(loose.follow_instruction_list) / 2


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("sentences 2", "It is 3.5 m high. Is it?", "It is. It is not. Or is it?"),
        ("paragraphs 2", "one\n\ntwo\n", "one\ntwo"),
        ('paragraph_starts 2, "However"', "One.\n\nHowever, two.", "However, one.\n\nTwo."),
        ("lines 2", "a\n\nb", "a\nb\nc"),
        ("numbered 2", "1. a\n2) b", "1. a\n3. b"),
        ('json_object ["a", "b"]', '{"b": 1, "a": null}', '{"a": 1}'),
        ('json_object ["a"]', '```JSON\n{"a": 1}\n```', '["a"]'),
        ("capital_words_at_most 1", "NASA is not Esa", "NASA and ESA"),
        ("no_digits", "one", "1"),
        ('starts_with "To begin with"', " to begin with, this", "This, to begin with"),
        ('one_of ["My answer is yes.", "My answer is no."]', "my answer is yes", "Well, my answer is yes."),
        ("title", "<<a>>", "<a>"),
        ("bullets 1", "• one", "one"),
    ],
)
def test_checks_of_our_own(check: str, good: str, bad: str) -> None:
    assert checks.holds(check, good) and not checks.holds(check, bad) and not checks.holds(check, " ")


def test_the_rows_are_what_their_script_makes_and_every_check_occurs() -> None:
    assert module("format_rows").rows() == ROWS and len(ROWS) == 120
    used = {c.split(" ")[0] for row in ROWS for c in row["checks"]}
    assert used == set(checks.CHECKS)


def obedient(asked: list[str]) -> str:
    """A reply that obeys a row's instructions, as a person would write one: what is asked for, in one pass."""
    wanted = {name: json.loads(f"[{rest}]") for name, _, rest in (c.partition(" ") for c in asked)}

    def given(name: str, default: Any = 0) -> Any:
        return wanted[name][0] if wanted.get(name) else default

    if sections := wanted.get("sections_at_least"):
        wanted["sections_at_least"] = sections[1:]
    if "json_object" in wanted:
        return json.dumps(dict.fromkeys(given("json_object"), "x"))
    if "two_answers" in wanted:
        return "one ****** two"
    if "one_of" in wanted:
        return str(given("one_of")[0])
    if "paragraph_starts" in wanted:
        return "One.\n\nHowever, two."
    words = ["so", "it", "goes"] * (given("words_at_least") // 3 + 1)
    for name in ("keywords", "keyword_at_least"):
        word = given(name, "")
        words += [word[0] if isinstance(word, list) else word] * 2 if word else []
    words += ["*bright*"] * given("highlights_at_least") + ["[name]"] * given("placeholders_at_least")
    parts = (
        max(
            given(n)
            for n in (
                "sentences",
                "paragraphs",
                "starred_paragraphs",
                "bullets",
                "numbered",
                "sections_at_least",
                "lines",
            )
        )
        or 1
    )
    size = -(-len(words) // parts)
    pieces = [" ".join(words[i * size : (i + 1) * size]) or "so" for i in range(parts)]
    start = f"{given('starts_with', '')} ".lstrip()
    end = f" {given('ends_with', '')}".rstrip()
    if "numbered" in wanted:
        pieces = [f"{i}. {p}" for i, p in enumerate(pieces, 1)]
    elif "bullets" in wanted:
        pieces = [f"- {p}" for p in pieces]
    elif "sections_at_least" in wanted:
        pieces = [f"Part {i}\n{p}" for i, p in enumerate(pieces, 1)]
    elif "sentences" in wanted:
        pieces = [f"{p}." for p in pieces]
    joint = "\n***\n" if "starred_paragraphs" in wanted else " " if "sentences" in wanted else "\n" if "bullets" in wanted or "numbered" in wanted else "\n\n"  # fmt: skip
    text = start + joint.join(pieces) + end
    if "title" in wanted:
        text = f"<<name>>\n{text}" if "sentences" not in wanted else text
    if "postscript" in wanted:
        text += "\nP.S. so"
    if "uppercase" in wanted:
        text = text.upper()
    if "lowercase" in wanted:
        text = text.lower()
    return f'"{text}"' if "quoted" in wanted else text


@pytest.mark.parametrize("number", range(120))
def test_every_row_can_be_obeyed_and_not_by_silence_or_by_any_reply(number: int) -> None:
    asked = ROWS[number]["checks"]
    scores = checks.process_results(ROWS[number], [obedient(asked)])
    assert scores == dict.fromkeys(("strict", "loose", "strict_share", "loose_share"), 1.0), obedient(asked)
    assert checks.process_results(ROWS[number], [""])["loose_share"] == 0
