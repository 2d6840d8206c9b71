"""The convert stage as a whole: a trained step to a published folder, with another template for evaluation and a card."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import made_data
import published
import tiny_export
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.export import convert, olmo_core_steps, write
from sft.formats import manifest
from sft.formats.gate import GateRecord
from sft.recipe import recipe
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Convert
from sft.runner import plan

CONFIG = replace(PRESETS["olmo3-tiny"], vocab_size=384)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with prepare's facts and a step of train."""
    run = tmp_path_factory.mktemp("stage") / "smoke"
    facts = tiny_export.tokenizer(run / "train" / "tokenizer")
    (run / "prepare").mkdir()
    info = made_data.dataset_info(facts, [made_data.source_summary("zoo.jsonl", 48, 4800, 1200)])
    info.write(run / "prepare" / "dataset.json")
    options = types.SimpleNamespace(dtype="float32", max_position_embeddings=64, shard_gb=1.0)
    weights = tiny_export.weights(CONFIG)
    made: Any = options
    model = write.Trained(weights, CONFIG, facts, run / "train" / "tokenizer")
    write.export(model, tiny_export.TEMPLATE, made, run / "hf", lambda _: None)
    olmo_core_steps.to_core(str(run / "hf"), str(run / "train" / "step7"), run / "cache", lambda _: None)
    published.publish(run / "train", [], metrics=published.train_metrics(7).to_value())
    return run


def stage(run: Path, out: Path, *overrides: str) -> Any:
    said: list[str] = []
    return types.SimpleNamespace(
        run=run,
        out=out,
        recipe=recipe.load(plan.REPO / "recipes" / "smoke.toml", list(overrides)),
        folder=lambda upstream: run / upstream,
        find=lambda path, what="": run / path,
        log=said.append,
        said=said,
    )


@pytest.mark.seconds
def test_a_trained_step_becomes_a_folder_with_its_proof_and_card(trained: Path, tmp_path: Path) -> None:
    s = stage(trained, tmp_path)
    result = convert.convert(s)
    assert set(result.outputs) == {"model", "gate.json"} and result.metrics["step"] == 7
    folder = tmp_path / "model"
    assert (folder / "chat_template.jinja").read_text() == tiny_export.TEMPLATE
    assert read_json(folder / "config.json")["max_position_embeddings"] == 4096
    assert result.metrics["template"]["name"] == "as trained"
    card = (folder / "README.md").read_text()
    assert (
        "| `zoo.jsonl` | 48 | 4,800 | 1,200 |" in card and 'preset = "olmo3-tiny"' in card and "## Scores" not in card
    )
    assert (tmp_path / "gate.json").is_file() and any("greedy replies stop" in line for line in s.said)


@pytest.mark.seconds
def test_an_evaluation_template_is_carried_and_recorded_and_the_gate_still_runs_the_trained_one(
    trained: Path, tmp_path: Path
) -> None:
    result = convert.convert(stage(trained, tmp_path, "eval_template=olmo_thinker"))
    text = (tmp_path / "model" / "chat_template.jinja").read_text()
    assert text == TEMPLATES["olmo_thinker"].jinja
    assert result.metrics["template"]["name"] == "olmo_thinker"
    chats = GateRecord.read(tmp_path / "gate.json").chats
    assert chats and all(chat.prompt.endswith("<|im_start|>assistant\n<think>") for chat in chats)
    plain = convert.convert(stage(trained, tmp_path / "plain"))
    assert plain.metrics["gate"]["max_logit"] == result.metrics["gate"]["max_logit"]  # the same text went through both


def test_an_evaluation_template_may_be_a_file(trained: Path, tmp_path: Path) -> None:
    (trained / "mine.jinja").write_text(tiny_export.TEMPLATE.replace("assistant\n", "assistant\n<think>\n"))
    convert.convert(stage(trained, tmp_path, "eval_template=mine.jinja", "gate=fast"))
    assert "<think>" in (tmp_path / "model" / "chat_template.jinja").read_text()


def test_an_unknown_evaluation_template_is_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SftError, match=r"eval_template = 'olmo_thinkre': none of .*olmo_thinker.*; next: "):
        convert.convert(stage(trained, tmp_path, "eval_template=olmo_thinkre"))
    assert not list(tmp_path.iterdir())


def test_a_step_that_train_names_and_that_is_gone_is_refused(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    (run / "train").mkdir(parents=True)
    published.publish(run / "train", [], metrics=published.train_metrics(9).to_value())
    with pytest.raises(SftError, match=r"step9: no checkpoint"):
        convert.final_step(run / "train")


def test_the_best_step_is_exported_where_the_recipe_says_so_and_verified(tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    for number in (4, 9):
        step = run / "train" / f"step{number}"
        (step / "model_and_optim").mkdir(parents=True)
        for name in ("model_and_optim/.metadata", "train/rank0.pt", "config.json", ".metadata.json"):
            (step / name).parent.mkdir(exist_ok=True)
            (step / name).write_text("{}")
        files = ["model_and_optim/.metadata", "train/rank0.pt", "config.json", ".metadata.json"]
        manifest.StepManifest(manifest.StepManifest.SCHEMA, number, manifest.describe(step, files)).write(
            step / manifest.NAME
        )
    published.publish(run / "train", ["step9"], metrics=published.train_metrics(9).to_value())
    final, best = Convert(), Convert(checkpoint="best")
    with pytest.raises(SftError, match="BEST: names no step"):
        convert.chosen_step(run / "train", best)
    (run / "train" / "BEST").write_text("step4\nvalidation_loss 0.5\n")
    assert convert.chosen_step(run / "train", final).name == "step9"
    assert convert.chosen_step(run / "train", best).name == "step4"
    (run / "train/step4/config.json").write_text("[]")  # train's manifest does not list this step
    with pytest.raises(
        SftError, match=r"BEST names step4: .*config.json has sha256 .*; next: restore it, or checkpoint"
    ):
        convert.chosen_step(run / "train", best)
