"""What of a model is trained, at which rate, and with which noise: freeze, train_only, lr_factors, weight_decays, neftune_alpha."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import test_context
import training
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.lora_step import RandomWeights
from sft.checkpoint.olmo_core import config_of_step
from sft.common.errors import SftError
from sft.model import memory
from sft.model.model import Transformer
from sft.model.noise import neftune, uniform
from sft.model.trained import trained_names
from sft.recipe import recipe
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train
from sft.runner import plan
from sft.training.optim import parameter_groups
from test_lora import train

TINY = PRESETS["olmo3-tiny"]


def moved(folder: Path) -> tuple[set[str], set[str], set[str]]:
    """Names of tensors that training changed, of those that it did not, and of those with moments."""
    step = folder / "train" / "step3"
    ended, first = DcpReader(step), RandomWeights(config_of_step(step / "config.json"), Train().seed)
    changed = {name for name in ended if not torch.equal(ended[name], first[name])}
    return changed, set(ended) - changed, {name.rpartition(".")[0] for name in DcpReader(step, "optim.state.")}


@pytest.mark.seconds
def test_frozen_parameters_stay_and_a_step_is_a_complete_model_all_the_same(folder: Path) -> None:
    said = train(folder, steps=3, freeze=("embeddings", "blocks.0-1"), neftune_alpha=5.0)
    changed, same, moments = moved(folder)
    assert same == {n for n in same | changed if n.startswith(("embeddings", "blocks.0.", "blocks.1."))}
    assert changed == moments
    assert "freeze: 'blocks.0-1' is 22 tensors" in said and "trained" in said
    assert "continuing" in train(folder, steps=3, freeze=("embeddings", "blocks.0-1"), neftune_alpha=5.0)


@pytest.mark.seconds
def test_only_the_named_parameters_are_trained_and_a_factor_of_zero_stops_one(folder: Path) -> None:
    train(folder, steps=3, train_only=("attention", "lm_head"), lr_factors={"lm_head": 0.0}, weight_decay=0.1)
    changed, _, moments = moved(folder)
    assert changed and all(".attention." in name for name in changed)
    assert moments - changed == {"lm_head.norm.weight", "lm_head.w_out.weight"}


def test_groups_have_the_last_matching_value_and_every_parameter_once() -> None:
    model = Transformer(replace(TINY, vocab_size=128))
    options = Train(weight_decay=0.1, weight_decays={"*norm": 0.0, "lm_head.norm": 0.2}, lr_factors={"blocks.0-1": 0.5})
    groups = parameter_groups(model, options)
    names = {id(p): n for n, p in model.named_parameters()}
    of = {names[id(p)]: (g["weight_decay"], g["lr_factor"]) for g in groups for p in g["params"]}
    assert len(of) == len(names) == sum(len(g["params"]) for g in groups)
    assert of["blocks.0.attention_norm.weight"] == (0.0, 0.5) and of["blocks.3.attention_norm.weight"] == (0.0, 1.0)
    assert of["lm_head.norm.weight"] == (0.2, 1.0) and of["embeddings.weight"] == (0.1, 1.0)
    assert [set(g) for g in parameter_groups(model, Train())] == [{"params", "weight_decay"}]


def test_noise_is_uniform_and_a_function_of_the_token_alone() -> None:
    tokens = torch.arange(3000) + (2 << 40)
    noise = uniform(tokens, 64, 7)
    assert abs(noise.mean()) < 0.01 and abs(noise.square().mean() - 1 / 3) < 0.01 and noise.abs().max() < 1
    assert abs(torch.corrcoef(noise[:, :2].T)[0, 1]) < 0.06 and abs(torch.corrcoef(noise[:2])[0, 1]) < 0.4
    assert torch.equal(uniform(tokens[1500:1510], 64, 7), noise[1500:1510])
    others = (uniform(tokens, 64, 8), uniform(tokens + (1 << 40), 64, 7), uniform(tokens, 64, 7 + (5 << 32)))
    assert all(not (other == noise).any(1).all() for other in others)
    scaled = neftune(tokens, torch.full((3000,), 100.0), 64, 5.0, 7)
    torch.testing.assert_close(scaled, noise * 5.0 / 80)


@pytest.mark.processes
def test_noise_and_frozen_parameters_give_the_same_gradient_however_the_work_is_divided(
    tmp_path: Path, dataset: Path
) -> None:
    fields: dict[str, Any] = {"neftune_alpha": 5.0, "freeze": ("embeddings", "blocks.0.feed_forward")}
    plans = {name: test_context.PLANS[name] for name in ("one rank", "two groups of two, two copies")}
    found = test_context.gradients(tmp_path, dataset, plans, fields)
    one, four = (found[name]["steps"] for name in plans)
    for step, wanted in one.items():
        assert "embeddings.weight" not in wanted
        for name, value in wanted.items():
            assert (four[step][name] - value).norm() / value.norm() < 2e-6, name


@pytest.mark.seconds
def test_noise_changes_training_and_not_validation(tmp_path: Path, dataset: Path) -> None:
    curves = []
    for number, alpha in enumerate((0.0, 5.0)):
        folder = training.run_folder(tmp_path / str(number), dataset)
        train(folder, steps=2, lr=1e-12, validate_every=2, neftune_alpha=alpha)
        curves.append(training.curve(folder))
    assert curves[0][0]["loss"] != curves[1][0]["loss"]
    assert curves[0][-1]["validation_loss"] == pytest.approx(curves[1][-1]["validation_loss"], abs=1e-6)


def test_the_plan_has_no_gradients_and_moments_of_frozen_parameters() -> None:
    config = PRESETS["olmo2-1b"]
    full = memory.plan(config, Train(), Hardware(), 1, 0).parts
    frozen = memory.plan(config, Train(freeze=("embeddings", "lm_head.w_out")), Hardware(), 1, 0).parts
    tables = 2 * config.vocab_size * config.d_model
    assert full["parameters"] == frozen["parameters"]
    assert full["gradients"] - frozen["gradients"] == 4 * tables
    assert memory.step_bytes(config, Train()) - memory.step_bytes(config, Train(freeze=("embeddings",))) == 4 * tables


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["freeze=embeddings", "train_only=attention"], "remove the other"),
        (["freeze=embeddings", "method=lora"], "method = 'lora' trains adapters alone"),
        (["lr_factors={embeddings = -1}"], "at least 0 is expected"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(SftError, match=message):
        recipe.load(plan.REPO / "recipes" / "smoke.toml", overrides)


def test_unknown_patterns_and_a_model_without_trained_parameters_are_refused() -> None:
    with pytest.raises(SftError, match="freeze: 'embedding' matches no parameter; did you mean 'embeddings'"):
        trained_names(TINY, Train(freeze=("embedding",)))
    with pytest.raises(SftError, match="nothing is left to train"):
        trained_names(TINY, Train(freeze=("*",)))
    config = recipe.load(plan.REPO / "recipes" / "smoke.toml").config("train")
    assert not {"freeze", "train_only", "neftune_alpha", "lr_factors", "weight_decays"} & set(config)
