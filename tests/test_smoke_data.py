"""The smoke recipe's data: reproducible, small, and tasks that ask what training rows do not repeat."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer

from conftest import REPO

SMOKE, TASKS = REPO / "recipes" / "smoke", REPO / "recipes" / "tasks"


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return rows(SMOKE / "train.jsonl")


def test_generating_again_makes_the_shipped_bytes(tmp_path: Path) -> None:
    load(SMOKE / "make.py").main(tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(made) == 5
    for name in made:
        assert (tmp_path / name).read_bytes() == (REPO / "recipes" / name).read_bytes(), name


def test_conversations_have_system_prompts_tools_and_several_turns(train: list[dict[str, Any]]) -> None:
    assert (SMOKE / "train.jsonl").stat().st_size <= 500_000
    with_system = [r for r in train if r["messages"][0]["role"] == "system"]
    with_tools = [r for r in train if "tools" in r]
    assert len(train) // 2 < len(with_system) < len(train) and len(with_tools) == len(train) // 2
    assert all(sum(m["role"] == "user" for m in r["messages"]) >= 3 for r in train)
    assert len({json.dumps(r["messages"]) for r in train}) == len(train)


def test_tool_calls_name_a_declared_tool_and_are_answered(train: list[dict[str, Any]]) -> None:
    for row in train:
        declared = {t["function"]["name"]: t["function"]["parameters"]["properties"] for t in row.get("tools", [])}
        called = [c for m in row["messages"] for c in m.get("tool_calls", [])]
        answered = [m["tool_call_id"] for m in row["messages"] if m["role"] == "tool"]
        assert [c["id"] for c in called] == answered and bool(called) == bool(declared)
        for call in called:
            assert set(json.loads(call["function"]["arguments"])) == set(declared[call["function"]["name"]])


def test_task_questions_are_held_out_but_their_facts_and_phrasings_are_trained(train: list[dict[str, Any]]) -> None:
    made = load(SMOKE / "make.py")
    asked = {m["content"] for r in train for m in r["messages"] if m["role"] == "user"}
    said = {m["content"] for r in train for m in r["messages"] if m["role"] == "assistant"}
    generate, choice = rows(TASKS / "smoke_generate.jsonl"), rows(TASKS / "smoke_choice.jsonl")
    facts = len(made.ANIMALS) * len(made.QUESTIONS)
    held_out = {r["question"] for r in generate + choice}
    assert len(generate) == len(choice) == facts and len(held_out) == 2 * facts
    assert not held_out & asked
    assert {r["answer"] for r in generate} <= said
    assert {r["choices"][r["answer"]] for r in choice} == {r["answer"] for r in generate}
    # Every phrasing is asked in training, about other animals.
    patterns = {q for questions in made.QUESTIONS.values() for q in questions}
    assert patterns <= {q.replace(a, "{animal}") for q in asked for a in made.ANIMALS if a in q}


def test_choices_are_four_different_answers_and_no_position_gives_them_away() -> None:
    choice = rows(TASKS / "smoke_choice.jsonl")
    assert all(len(set(r["choices"])) == 4 for r in choice)
    counts = [sum(r["answer"] == i for r in choice) for i in range(4)]
    assert max(counts) / len(choice) < 0.4, counts


def test_the_tokenizer_is_dolma2_in_small_with_special_tokens_last(train: list[dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_file(str(SMOKE / "tokenizer" / "tokenizer.json"))
    made = load(SMOKE / "make.py")
    size = tokenizer.get_vocab_size()
    assert size == made.VOCABULARY
    assert [tokenizer.token_to_id(s) for s in made.SPECIALS] == list(range(size - len(made.SPECIALS), size))
    for text in ("Über naïve\n\n 12345 don't\t…", *(m["content"] for m in train[2]["messages"])):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    lengths = [sum(len(tokenizer.encode(m["content"]).ids) for m in r["messages"]) for r in train]
    assert min(lengths) > 30 and max(lengths) < 250, (min(lengths), max(lengths))


def test_the_split_pattern_is_that_of_dolma2(shared_data: Path) -> None:
    dolma2 = json.loads((shared_data / "dolma2-tokenizer" / "tokenizer.json").read_bytes())
    ours = json.loads((SMOKE / "tokenizer" / "tokenizer.json").read_bytes())
    assert ours["pre_tokenizer"]["pretokenizers"][0] == dolma2["pre_tokenizer"]["pretokenizers"][0]


@pytest.mark.parametrize("task", ["smoke_generate", "smoke_choice"])
def test_lm_eval_builds_the_tasks_offline_from_any_folder(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.chdir(tmp_path)
    manager = lm_tasks.TaskManager(include_path=str(TASKS), include_defaults=False)
    loaded = manager.load([task])
    built = loaded.get("tasks", loaded)[task]
    docs = list(built.test_docs())
    assert len(docs) == 48
    target = built.doc_to_target(docs[0])
    assert target == docs[0]["answer"]
    assert built.doc_to_text(docs[0]) == docs[0]["question"]
