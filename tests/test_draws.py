"""Several replies to each question, thoughts that are turned on and off, and their budget."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluating import ANYTHING, lines, load, plain_place, run
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.evaluation.draws import combined, pass_at
from sft.evaluation.scores import LmEvalOutput
from sft.recipe.schema import Evaluate
from test_replies import ask as replies_to
from test_replies import scripted

place = plain_place
SAMPLED = replace(ANYTHING, samples=4, temperature=1.0)


@pytest.mark.parametrize(("n", "right"), [(4, 0), (4, 1), (5, 2), (6, 6)])
def test_pass_at_k_counts_every_choice_of_k_replies(n: int, right: int) -> None:
    replies = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(replies, k))
        assert pass_at(k, n, right) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_the_error_of_a_mean_is_over_questions_and_replies() -> None:
    right = [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]  # [draw][question]
    outputs = [
        LmEvalOutput(
            {"acc,none": statistics.fmean(draw), "acc_stderr,none": 0.1},
            [{"filter": "none", "metrics": ["acc"], "acc": v, "resps": [["x"]], "filtered_resps": ["x"]} for v in draw],
            {},
            {"acc": True},
        )
        for draw in right
    ]
    found = combined(outputs)
    means = [0.5, 0.5, 0.0]
    assert found.results["acc,none"] == pytest.approx(1 / 3)
    assert found.results["acc_stderr,none"] == pytest.approx(statistics.stdev(means) / 3**0.5)
    assert found.results["acc_pass@4,none"] == pytest.approx(2 / 3)
    assert found.results["acc_pass@2,none"] == pytest.approx((5 / 6 + 5 / 6 + 0) / 3)
    assert [len(s["resps"][0]) for s in found.samples] == [4, 4, 4]


@pytest.mark.seconds
def test_every_question_has_as_many_replies_as_asked_and_the_mean_of_their_scores(
    place: SimpleNamespace, tmp_path: Path
) -> None:
    result = run(place, "capitals", tmp_path / "a", SAMPLED)
    samples = lines(tmp_path / "a/samples/capitals.jsonl")
    assert result.asking and (result.asking.samples, result.asking.temperature) == (4, 1.0)
    assert [len(s["replies"]) for s in samples] == [4] * 5 and result.generation and result.generation.n == 20
    assert all(len(s["ended_by"]) == len(s["of_replies"]["exact_match"]) == 4 for s in samples)
    assert all(s["scores"]["exact_match"] == statistics.fmean(s["of_replies"]["exact_match"]) for s in samples)
    assert set(result.metrics) == {"exact_match", "exact_match_pass@2", "exact_match_pass@4"}
    assert result.primary[0] == "exact_match" and len({r for s in samples for r in s["replies"]}) > 5
    # a killed attempt keeps what it sampled, and samples something else for the rest
    kept = (tmp_path / "a/work/capitals.replies.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b/work").mkdir(parents=True)
    (tmp_path / "b/work/capitals.replies.jsonl").write_text("".join(kept[:7]))
    again = run(place, "capitals", tmp_path / "b", SAMPLED)
    journal = (tmp_path / "b/work/capitals.replies.jsonl").read_text().splitlines(keepends=True)
    assert again.reused_replies == 7 and len(journal) == 20 and journal[:7] == kept[:7]


def test_several_equal_replies_are_refused(place: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SftError, match="samples = 4: task capitals is greedy, so all replies would be equal; next:"):
        run(place, "capitals", tmp_path, replace(ANYTHING, samples=4))


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"


def test_thoughts_are_turned_on_and_off_by_task(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = place.model.tokenizer
    with pytest.raises(SftError, match="the chat template reads none of enable_thinking, thinking"):
        run(place, "capitals", tmp_path / "x", replace(ANYTHING, thinking={"capitals": False}))
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + SWITCH)
    for value, ends in ((False, True), (True, False)):
        result = run(place, "capitals", tmp_path / str(value), replace(ANYTHING, thinking={"*": value}))
        prompts = [s["prompt"] for s in lines(tmp_path / str(value) / "samples/capitals.jsonl")]
        assert result.asking and result.asking.thinking is value
        assert all(p.endswith("<think></think>") is ends for p in prompts)
        assert place.model.think_end_token == ("</think>" if value else None)
    run(place, "capitals", tmp_path / "off")
    assert "enable_thinking" not in place.model.template_values and place.model.think_end_token is None


def test_a_task_that_writes_nothing_has_no_thoughts(place: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SftError, match="colours = true: the task compares given texts"):
        run(place, "colours", tmp_path, replace(ANYTHING, tasks=("colours",), thinking={"colours": True}))


def test_thoughts_and_answers_have_their_own_budgets(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.evaluation.recorder import Budget

    replies = [
        "<think>a</think> Paris",
        "<think>a long, long way to go</think> Paris",
        "<think>a</think> Paris is the capital",
    ]
    model = scripted(place, monkeypatch, "</think>", replies)
    lengths = [len(model.tokenizer.encode(r, add_special_tokens=False)) for r in replies]
    thought = len(model.tokenizer.encode("<think>a</think>", add_special_tokens=False))
    model.budget = Budget(thought + 1, lengths[0] - thought)
    texts, entries = replies_to(model, ["bbb", "ccc", "ddd"])
    assert [e.ended_by for e in entries] == ["terminator", "unclosed thought", "length"]
    assert [t.strip() for t in texts[:2]] == ["Paris", ""] and entries[2].tokens == lengths[0]
    assert entries[0].thought == "<think>a" and (entries[1].thought or "").startswith("<think>a long")


def test_a_budget_of_thoughts_adds_to_that_of_the_answer(place: SimpleNamespace) -> None:
    from sft.evaluation.asking import ask

    options = Evaluate(tasks=("capitals",), process_output="r1_style", max_thought_tokens=300, max_reply_tokens=40)
    task = load("capitals", place.tasks, place.data)
    asked = ask(task, options, 4096)
    assert (asked.max_reply_tokens, asked.max_thought_tokens) == (40, 300)
    assert task.config.generation_kwargs["max_gen_toks"] == 340


def test_the_day_is_prepares_and_never_todays(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = place.model
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ strftime_now('%d %B %Y') }}{{ messages[0].content }}")
    chat = [{"role": "user", "content": "!"}]
    monkeypatch.setattr(model, "date", "2026-07-01")
    assert model.apply_chat_template(chat) == "01 July 2026!"
    monkeypatch.setattr(model, "date", "")
    with pytest.raises(ValueError, match=r"of user: it writes today's date.*set \[prepare\] date"):
        model.apply_chat_template(chat)


def test_a_system_message_that_the_template_refuses_is_not_left_out(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(place.model.tokenizer, "chat_template", refuses)
    with pytest.raises(evaluate.BrokenTask, match="refuses a conversation of system, user: no system role"):
        run(place, "capitals", tmp_path, replace(ANYTHING, system_prompt="Be brief."))
