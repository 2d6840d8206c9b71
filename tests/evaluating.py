"""Two small tasks and an export for them, for the tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_export
from sft.common import machine
from sft.evaluation import evaluate
from sft.export import write
from sft.formats.results import TaskResult
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Convert, Evaluate
from tiny_export import OLMO3

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
REPLY = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["ZZZ"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ANYTHING = Evaluate(tasks=("capitals",), min_stop_rate=0, max_empty_fraction=1, batch_size=3)


def make_place(root: Path, stops: str = '"ZZZ"', choices: int = 12, config: ModelConfig = OLMO3) -> SimpleNamespace:
    """A tiny export, two tasks (replies that end at `stops`, `choices` questions of three answers), and the model as lm-eval holds it."""
    tasks = root / "tasks"
    tasks.mkdir()
    (tasks / "colours.yaml").write_text(CHOICE)
    (tasks / "capitals.yaml").write_text(REPLY.replace('"ZZZ"', stops))
    rows = [{"question": f"Name {i}", "choices": ["red", "yellow", f"b{i}"], "gold": i % 3} for i in range(choices)]
    (root / "colours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"question": f"What is the capital of {c}?", "answer": "Paris"} for c in ("France", "Rome", "A", "B", "C")]
    (tasks / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = tiny_export.tokenizer(root / "tokenizer")
    weights = tiny_export.weights(config)
    options = Convert(dtype="float32", max_position_embeddings=512)
    trained = write.Trained(weights, config, facts, root / "tokenizer")
    write.export(trained, tiny_export.TEMPLATE, options, root / "model", lambda _: None)
    from sft.evaluation.hf_model import HfModel

    model = HfModel(root / "model", batch_size=4, max_length=0, think_end=None)
    return SimpleNamespace(
        root=root, tasks=tasks, data={"colours": root / "colours.jsonl"}, model=model, weights=weights
    )


@pytest.fixture(scope="module")
def plain_place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`make_place` without options. A test module names it: place = plain_place."""
    return make_place(tmp_path_factory.mktemp("evaluate"))


def run(place: SimpleNamespace, name: str, out: Path, options: Evaluate = ANYTHING) -> TaskResult:
    return evaluate.run_task(place.model, name, options, place.tasks, place.data, out)


def load(name: str, tasks: Path, data: dict[str, Any], seed: int = 1) -> Any:
    """lm-eval's task."""
    from sft.evaluation.tasks import find

    return find(name, tasks, data).load(seed)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def forget_hub_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsets what `evaluate.go_offline` sets, and sets it back after the test."""
    for name in machine.OFFLINE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("HF_DATASETS_CACHE", "TOKENIZERS_PARALLELISM", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
