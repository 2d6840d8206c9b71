"""Suites give a recipe its tasks; a baseline is scored like a run, without a training."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_export
from evaluating import plain_place
from sft.common.errors import SftError
from sft.evaluation import baseline
from sft.recipe import recipe

REPO = Path(__file__).resolve().parents[1]
SUITES = sorted((REPO / "recipes/suites").glob("*.toml"))
place = plain_place


@pytest.mark.parametrize("file", SUITES, ids=lambda f: f.stem)
def test_every_suite_is_a_valid_evaluate_table(file: Path) -> None:
    loaded = recipe.load(REPO / "recipes/olmo3-7b.toml", overrides=[f"suite={file.stem}"])
    suite = tomllib.loads(file.read_text())
    assert loaded.evaluate.suite == file.stem
    for name, value in suite.items():
        if name != "tasks":  # the recipe names its own
            assert getattr(loaded.evaluate, name) == value


def test_a_recipes_own_fields_win_over_its_suite_and_the_key_holds_the_fields(tmp_path: Path) -> None:
    text = (REPO / "recipes/smoke.toml").read_text()
    file = tmp_path / "mine.toml"
    line = next(line for line in text.splitlines() if line.startswith("tasks = "))
    file.write_text(text.replace(line, 'suite = "quick"\nlimit = 5'))
    loaded = recipe.load(file)
    assert (loaded.evaluate.tasks, loaded.evaluate.limit, loaded.evaluate.max_reply_tokens) == (
        ("format_following",),
        5,
        256,
    )
    assert "suite" not in loaded.config("evaluate") and loaded.config("evaluate")["tasks"] == ["format_following"]
    file.write_text(text.replace(line, 'suite = "quik"'))
    with pytest.raises(SftError, match=r"'suite' in \[evaluate\] = 'quik': no such file in .*did you mean 'quick'"):
        recipe.load(file)


def prepared(tmp_path: Path, place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, vocab: int = 300) -> Path:
    facts = tiny_export.tokenizer(tmp_path / "prepare/data/tokenizer", vocab)
    monkeypatch.setattr(baseline.DatasetInfo, "of", lambda _: SimpleNamespace(facts=facts))
    return tmp_path / "prepare"


def test_a_baseline_has_trainings_tokenizer_template_and_terminators(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    baseline.assemble(place.root / "model", prepared(tmp_path, place, monkeypatch), folder, "")
    theirs: Any = json.loads((place.root / "model/generation_config.json").read_text())
    assert sorted(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == sorted(
        theirs["eos_token_id"]
    )
    assert (folder / "chat_template.jinja").read_text() == tiny_export.TEMPLATE
    from sft.evaluation.hf_model import HfModel

    model = HfModel(folder, batch_size=4, max_length=0, think_end=None)
    documents = [([5, 6, 7, 8], [False, True, True, True])]
    assert list(model.losses(documents)) == list(place.model.losses(documents))
    baseline.assemble(place.root / "model", tmp_path / "prepare", folder, "{{ 1 }}")
    assert (folder / "chat_template.jinja").read_text() == "{{ 1 }}"


def test_a_model_that_cannot_be_a_baseline_is_refused(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = prepared(tmp_path, place, monkeypatch)
    (tmp_path / "step").mkdir()
    with pytest.raises(SftError, match=r"no Hugging Face model .*; next: make to-hf SRC="):
        baseline.assemble(tmp_path / "step", at, tmp_path / "model", "")
    source = tmp_path / "small"
    source.mkdir()
    (source / "model.safetensors").touch()
    (source / "config.json").write_text('{"vocab_size": 200}')
    with pytest.raises(SftError, match=r"vocab_size = 200, and the tokenizer of training has \d+ ids"):
        baseline.assemble(source, at, tmp_path / "model", "")
