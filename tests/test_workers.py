"""Several processes answer disjoint parts of the requests: scores, replies and losses are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluating import ANYTHING, lines, plain_place
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.evaluation.workers import deal
from sft.formats.lines import read_lines
from sft.formats.samples import Answer, Reply
from sft.recipe.schema import Hardware
from sft.runner.processes import evaluation_backend

place = plain_place
OPTIONS = replace(ANYTHING, tasks=("capitals", "colours"), batch_size=1)
DOCUMENTS = [([5, 6, 7, i], [False, True, True, True]) for i in range(8, 13)]


def scored(place: SimpleNamespace, out: Path, processes: int) -> tuple[Any, Any]:
    model = evaluate.open_model(place.root / "model", OPTIONS, Hardware(processes=processes, threads=1), "")
    assert len(model.workers) == processes - 1
    found = evaluate.run_tasks(model, OPTIONS, place.tasks, place.data, out, print)
    losses = list(model.losses(DOCUMENTS))
    for worker in model.workers:
        worker.close()
    return found, losses


@pytest.mark.slow
def test_two_processes_give_the_scores_replies_and_losses_of_one(place: SimpleNamespace, tmp_path: Path) -> None:
    (one, losses), (two, of_two) = scored(place, tmp_path / "one", 1), scored(place, tmp_path / "two", 2)
    assert one.results.keys() == two.results.keys() and not one.broken and not two.broken
    for task, result in one.results.items():
        assert two.results[task].metrics == result.metrics
        assert two.results[task].generation == result.generation
        assert lines(tmp_path / f"two/samples/{task}.jsonl") == lines(tmp_path / f"one/samples/{task}.jsonl")
    assert of_two == losses
    answers = [a.answer for a in read_lines(Answer, tmp_path / "two/work/capitals.replies.jsonl")]
    assert len(answers) == 5 and all(isinstance(a, Reply) for a in answers)  # one journal has the answers of both


def test_an_error_of_a_worker_ends_the_evaluation_with_its_reason(place: SimpleNamespace) -> None:
    model = place.model
    model.workers = [SimpleNamespace(send=lambda _: None, receive=Failing().receive)]
    try:
        with pytest.raises(SftError, match="worker 1 of the evaluation: no room"):
            list(model.losses(DOCUMENTS))
    finally:
        model.workers = []


class Failing:
    """What a worker does whose process sent an error."""

    def receive(self, add: Any, *, wait: bool) -> None:
        from sft.evaluation.workers import Worker

        end = SimpleNamespace(recv=lambda: ("failed", "no room"), poll=lambda: True)
        Worker.receive(SimpleNamespace(number=1, connection=end), add, wait=wait)  # type: ignore[arg-type]


def test_items_are_dealt_longest_first_and_in_turn() -> None:
    assert deal(["a", "dddd", "bb", "ccc"], 2, len) == [["dddd", "bb"], ["ccc", "a"]]
    assert deal(["a", "dddd"], 1, len) == [["a", "dddd"]]
    assert deal([], 2, len) == [[], []]


@pytest.mark.parametrize(
    ("backend", "gpus", "has_vllm", "chosen", "reason"),
    [
        ("auto", 0, True, "hf", "no GPU"),
        ("auto", 8, True, "vllm", "vLLM is installed"),
        ("auto", 8, False, "hf", "vLLM is not installed"),
        ("vllm", 0, False, "vllm", "named by the recipe"),
        ("hf", 8, True, "hf", "named by the recipe"),
    ],
)
def test_the_backend_is_chosen_from_the_plan_and_the_environment(
    backend: str, gpus: int, has_vllm: bool, chosen: str, reason: str
) -> None:
    found = evaluation_backend(backend, gpus, has_vllm)
    assert found.backend == chosen and reason in found.reason


def test_more_copies_than_gpus_are_refused(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "visible_gpus", lambda: ["GPU-a", "GPU-b"])
    with pytest.raises(SftError, match="processes = 3 x tensor_parallel = 1: 2 GPUs are visible"):
        evaluate.open_model(place.root / "model", replace(OPTIONS, backend="hf"), Hardware(processes=3), "")
