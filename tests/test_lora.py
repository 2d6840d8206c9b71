"""LoRA: adapters on a frozen base, in training, in step folders, merged and in PEFT's format."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import peers
import test_context
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.lora_step import Merged, RandomWeights, adapter_of, open_step
from sft.checkpoint.olmo_core import config_of_step
from sft.common.errors import SftError
from sft.export.logits import Pack, native_logits
from sft.export.merge_gate import check_merge
from sft.export.peft_adapter import write_adapter
from sft.export.write import write_weights
from sft.model import hf, memory
from sft.model.flops import token_flops
from sft.model.noise import dropped, token_keys
from sft.model.quantised import dequantise, quantise, quantised_linear
from sft.model.trained import flops_change, lora_shapes, lora_targets, select
from sft.recipe import recipe
from sft.recipe.presets import PRESETS
from sft.recipe.schema import LORA_LR, Hardware, Train
from sft.runner import plan
from training import assert_same_bits, records, run_folder, tensors, train_here

LORA: dict[str, Any] = {"method": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "save_every": 6}
ONE_BLOCK = LORA | {"model_n_layers": 1}  # compiling another takes seconds on each rank
SEED = Train().seed
PEFT = ("peft", "0.21.2", "106ab6077ff72c54d21577f9af5970e34bac7582cb14209f7b2b511e322a4eae")
DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [70, 71, 72, 73]]


def train(folder: Path, status: int = 0, **fields: Any) -> str:
    """A training in this process. Returns what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train_here(folder, dict(fields)) == status, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("lora"), dataset)
    train(folder, **LORA)
    return folder


@pytest.fixture(scope="module")
def merged(trained: Path) -> Merged:
    step = trained / "train" / "step12"
    found = open_step(step, lambda: None, config_of_step(step / "config.json"), SEED)
    assert isinstance(found, Merged)
    return found


@pytest.mark.seconds
def test_only_adapters_are_trained_and_saved(trained: Path) -> None:
    step = trained / "train" / "step12"
    names = set(tensors(step))
    assert sum(not name.startswith("optim") for name in names) == 2 * 2 * 7
    assert all(".lora_" in name for name in names)
    assert records(trained)[-1].loss < records(trained)[0].loss - 0.1
    found = adapter_of(step)
    assert found is not None and found.base.startswith("sha256:") and found.scale == 2.0
    with pytest.raises(SftError, match="holds LoRA adapters and not the model"):
        DcpReader(step)


@pytest.mark.seconds
def test_a_resume_ends_in_the_same_bits_and_refuses_another_base(trained: Path, tmp_path: Path, dataset: Path) -> None:
    folder = run_folder(tmp_path / "again", dataset)
    shutil.copytree(trained / "train", folder / "train")
    shutil.rmtree(folder / "train" / "step12")
    said = train(folder, 1, **LORA, seed=7)
    assert "step6: its adapters were trained on another base" in said
    assert "adapters of" in train(folder, 1, **(LORA | {"lora_alpha": 9.0}))
    assert "continuing from" in train(folder, **LORA)
    assert_same_bits(folder / "train" / "step12", trained / "train" / "step12")


PLANS = {name: test_context.PLANS[name] for name in ("one rank, no accumulation", "two groups of two, two copies")} | {
    "two of one group, compiled": test_context.TWO_COMPILED
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, dict[str, Any]]:
    plans = PLANS | {"one rank": (1, {})}
    return test_context.gradients(tmp_path_factory.mktemp("found"), dataset, plans, ONE_BLOCK)


@pytest.mark.processes
@pytest.mark.parametrize("name", PLANS)
def test_the_gradient_is_the_same_however_the_work_is_divided(name: str, found: dict[str, dict[str, Any]]) -> None:
    for step, wanted in found["one rank"]["steps"].items():
        assert len(wanted) == 2 * 7 + 1
        for parameter, value in wanted.items():
            assert value.norm() > 0
            difference = (found[name]["steps"][step][parameter] - value).norm() / value.norm()
            assert difference < 5e-6, (step, parameter)


@pytest.mark.processes
def test_a_quantised_base_trains_on_any_number_of_ranks(tmp_path: Path, dataset: Path) -> None:
    pytest.importorskip("torchao")
    fields = ONE_BLOCK | {"base_dtype": "nf4"}
    plans: dict[str, Any] = {"one": (1, {}), "two": (2, {"context_degree": 2, "recompute": "full"})}
    found = test_context.gradients(tmp_path, dataset, plans, fields)
    for name, value in found["one"]["steps"][0].items():
        assert (found["two"]["steps"][0][name] - value).norm() / value.norm() < 5e-6, name


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.01), ("fp8", 0.05), ("nf4", 0.12)])
def test_a_quantised_matrix_gives_the_products_and_gradients_of_what_its_codes_stand_for(
    dtype: str, error: float
) -> None:
    pytest.importorskip("torchao")
    value = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    codes = quantise(value, dtype)
    stands_for = dequantise(codes, 64, torch.float32)
    assert 0 < (stands_for - value).norm() / value.norm() < error
    x = torch.randn(5, 64, requires_grad=True)
    out = quantised_linear(x, codes)
    out.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(out, x @ stands_for.T)
    torch.testing.assert_close(x.grad, 2 * out.detach() @ stands_for)


@pytest.mark.seconds
def test_adapters_stay_fp32_where_the_frozen_base_is_bf16(tmp_path: Path, dataset: Path) -> None:
    said = train(run_folder(tmp_path / "bf16", dataset), **LORA, precision="bf16", base_dtype="int8", steps=2)
    assert "parameters, frozen; 4,096 in 14 adapters of rank 4" in said
    found = tensors(tmp_path / "bf16" / "train" / "step2")
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.processes
def test_dropout_is_the_same_however_the_work_is_divided(tmp_path: Path, dataset: Path) -> None:
    plans = {"one rank": (1, {}), "two of one group, compiled": test_context.TWO_COMPILED}
    found = test_context.gradients(tmp_path, dataset, plans, ONE_BLOCK | {"lora_dropout": 0.3})
    one, two = (found[name]["steps"] for name in plans)
    for step, wanted in one.items():
        for name, value in wanted.items():
            assert (two[step][name] - value).norm() / value.norm() < 5e-6, name


@pytest.mark.seconds
def test_dropout_changes_training_and_neither_the_first_loss_nor_validation(
    trained: Path, tmp_path: Path, dataset: Path
) -> None:
    folder = run_folder(tmp_path / "dropout", dataset)
    train(folder, **LORA, lora_dropout=0.5, steps=1, validate_every=1)
    plain = run_folder(tmp_path / "plain", dataset)
    train(plain, **LORA, steps=1, validate_every=1)
    ours, theirs = records(folder)[0], records(plain)[0]
    assert ours.loss == theirs.loss  # B is zero
    assert abs(ours.grad_norm - theirs.grad_norm) > 0.01 * theirs.grad_norm


def test_dropout_drops_its_share_and_differs_by_token_column_and_place() -> None:
    keys = token_keys(torch.arange(2000), 3)
    first = dropped(torch.ones(2000, 32), keys, torch.tensor(0), 0.25)
    assert abs((first == 0).float().mean() - 0.25) < 0.01 and first.max() == pytest.approx(1 / 0.75)
    other = dropped(torch.ones(2000, 32), keys, torch.tensor(1), 0.25)
    assert abs(((first == 0) & (other == 0)).float().mean() - 0.0625) < 0.01
    assert torch.equal(dropped(torch.ones(5, 32), keys[100:105], torch.tensor(0), 0.25), first[100:105])


def test_the_flops_of_lora_leave_out_the_gradients_of_frozen_matrices() -> None:
    config = PRESETS["olmo2-7b"]
    assert flops_change(config, Train()) == 0
    change = flops_change(config, Train(method="lora", lora_rank=1))
    assert change == pytest.approx(-token_flops(config), rel=0.01)


def test_the_codes_stand_for_what_torchao_says() -> None:
    workflows = "torchao.quantization.quantize_.workflows"
    nf4 = pytest.importorskip(f"{workflows}.nf4.nf4_tensor")
    quantisation = pytest.importorskip("torchao.quantization")
    value = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    theirs = {
        "nf4": nf4.to_nf4(value, 64, 32).get_original_weight(),
        "int8": quantisation.Int8Tensor.from_hp(value, granularity=quantisation.PerRow()).dequantize(),
        "fp8": quantisation.Float8Tensor.from_hp(value, granularity=quantisation.PerRow()).dequantize(),
    }
    for dtype, wanted in theirs.items():
        torch.testing.assert_close(dequantise(quantise(value, dtype), 128, torch.float32), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.seconds
def test_merged_weights_give_the_logits_of_base_and_adapter_apart(merged: Merged) -> None:
    config = merged.config
    found = check_merge(merged, DOCUMENTS, range(config.n_layers), "test")
    assert found.matrices == 14 and found.max_difference < 1e-5 * found.max_logit
    pack = Pack.of(DOCUMENTS)
    base = native_logits(config, RandomWeights(config, SEED), pack, range(config.n_layers))
    change = (native_logits(config, merged, pack, range(config.n_layers)) - base).abs().max()
    assert change > 0.01 * found.max_logit  # training changed the model, and the comparison saw it


def test_a_merge_that_is_not_the_trained_model_is_refused(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Merged.pair
    monkeypatch.setattr(Merged, "pair", lambda self, name: (pair(self, name)[0], -pair(self, name)[1]))
    monkeypatch.setattr(merged, "_made", ("", torch.empty(0)))
    with pytest.raises(SftError, match="not the one that was trained"):
        check_merge(merged, DOCUMENTS, range(merged.config.n_layers), "test")


def test_a_quantised_base_is_merged_as_training_computed_with_it(merged: Merged) -> None:
    pytest.importorskip("torchao")
    name = merged.targets[0]
    coarse = Merged.__new__(Merged)
    coarse.__dict__.update(
        merged.__dict__, adapter=replace(merged.adapter, base_dtype="nf4"), _made=("", torch.empty(0))
    )
    a, b = merged.pair(name)
    codes = dequantise(quantise(merged.base.rows(name, 0, 32).float(), "nf4"), 32, torch.float32)
    torch.testing.assert_close(coarse[name], codes + 2.0 * b @ a)


@pytest.mark.seconds
@pytest.mark.parametrize("targets", [(), ("attention", "feed_forward.w2"), ("blocks.1",)])
def test_peft_loads_the_adapter_to_the_same_logits(
    targets: tuple[str, ...], merged: Merged, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(peers.pypi_package(*PEFT))
    peft = importlib.import_module("peft")
    from transformers import AutoModelForCausalLM

    config = merged.config
    kept = lora_targets(config, Train(method="lora", lora_targets=targets))
    part = Merged.__new__(Merged)
    part.__dict__.update(merged.__dict__, targets=kept, _made=("", torch.empty(0)))
    (tmp_path / "base").mkdir()
    write_weights(
        RandomWeights(config, SEED), config, config.vocab_size, tmp_path / "base", "float32", 10**9, lambda _: None
    )
    made = hf.hf_config(config, vocab_size=config.vocab_size, max_position_embeddings=512, dtype="float32")
    (tmp_path / "base" / "config.json").write_text(json.dumps(hf.config_json(made)))
    assert write_adapter(part, "hf://org/name@abc", tmp_path / "adapter") == ""
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/name" and written["revision"] == "abc"
    assert (written["target_modules"][0] in ("down_proj", "k_proj")) == (targets != ("blocks.1",))
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    ids = torch.tensor(DOCUMENTS[:1])
    theirs = model(input_ids=ids).logits[0]
    ours = native_logits(config, part, Pack.of(DOCUMENTS[:1]), range(config.n_layers))
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-4)


def test_a_hybrids_adapters_are_on_all_of_its_projections() -> None:
    names = lora_targets(PRESETS["olmo-hybrid-tiny"], Train(method="lora"))
    assert "blocks.0.attention.w_g.weight" in names and "blocks.3.attention.w_q.weight" in names
    assert not any("conv1d" in name or "norm" in name for name in names)


def test_patterns_name_parts_of_parameters_and_unknown_ones_are_refused_with_a_suggestion() -> None:
    names = list(hf.shapes(PRESETS["olmo2-7b"]))
    assert len(select(["blocks.0-7"], names, "x")) == 8 * 11
    assert len(select(["attention.w_q"], names, "x")) == len(select(["w_q"], names, "x")) == 32
    assert select(["embeddings", "lm_head.w_out"], names, "x") == ["embeddings.weight", "lm_head.w_out.weight"]
    assert len(select(["*norm"], names, "x")) == 4 * 32 + 1
    with pytest.raises(
        SftError, match=r"lora_targets: 'attention.q_proj' matches no parameter; did you mean 'attention.w_q'"
    ):
        select(["attention.q_proj"], names, "lora_targets")


def smoke(*overrides: str) -> recipe.Recipe:
    return recipe.load(plan.REPO / "recipes" / "olmo2-7b.toml", overrides)


def test_the_default_rate_of_lora_is_ten_times_as_high_and_the_key_of_other_runs_has_no_new_field() -> None:
    assert not any("lora" in name or name in ("method", "base_dtype") for name in smoke().config("train"))
    ours = recipe.load(plan.REPO / "recipes" / "smoke.toml", ["method=lora"])
    assert ours.config("train")["method"] == "lora" and ours.train.lr == 3e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora_rank=8"], "for method = 'lora' only, and this is 'full'"),
        (["method=lora", "add_tokens=<|tool|>"], "would stay as they are with method = 'lora'"),
        (["method=lore"], "did you mean 'lora'"),
        (["method=lora", "base_dtype=nf8"], "did you mean 'nf4'"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(SftError, match=message):
        smoke(*overrides)


def test_the_plan_holds_moments_and_gradients_of_adapters_alone_and_7b_fits_24_gb() -> None:
    options = Train(seq_len=4096, method="lora", base_dtype="nf4")
    for preset, limit in (("olmo3-7b", 24), ("olmo3-32b", 80)):
        found = memory.plan(PRESETS[preset], options, Hardware(recompute="full"), 1, limit)
        count = sum(rows * columns for rows, columns in lora_shapes(PRESETS[preset], options).values())
        assert found.fits and found.parts["optimizer state"] == 8 * count and found.parts["gradients"] == 4 * count
    assert 10 * Train().lr == LORA_LR
    small = memory.step_bytes(PRESETS["olmo3-7b"], replace(options, lora_rank=8))
    assert small < 300e6 < memory.step_bytes(PRESETS["olmo3-7b"], Train())
