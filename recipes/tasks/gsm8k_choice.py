"""Choices of the gsm8k_choice task: a problem's own worked answer among those of three other problems."""

from __future__ import annotations

from datasets import Dataset

STRIDES = (101, 211, 307)  # far apart, so that no two problems share their wrong answers


def with_choices(problems: Dataset) -> Dataset:
    """Adds "choices" and "gold" to every problem; the same for every run, whatever the limit."""
    answers, count = problems["answer"], len(problems)

    def add(problem: dict[str, str], i: int) -> dict[str, object]:
        gold = i % 4
        choices = [answers[(i + stride) % count] for stride in STRIDES]
        choices.insert(gold, problem["answer"])
        return {"choices": choices, "gold": gold}

    return problems.map(add, with_indices=True)
