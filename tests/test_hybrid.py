"""Olmo Hybrid through the stages: trained on two ranks in bf16, killed and continued; converted both ways, beside OLMo-core's
converter and transformers; counted by its planner and its FLOPs."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import bases
import tiny_export
import training
from sft.checkpoint import olmo_core
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.export import olmo_core_steps
from sft.formats.dataset import TokenIds
from sft.model import hf, memory, utilisation
from sft.model.flops import head_flops, token_flops
from sft.model.gated_delta import GatedDeltaNet
from sft.model.model import Transformer, initial_values
from sft.recipe.architecture import GatedDelta, ModelConfig
from sft.recipe.base_config import find_family, read_base, read_hf_config
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Convert, Hardware, Train
from sft.training.optim import build_adamw

SEVEN = PRESETS["olmo-hybrid-7b"]
TINY = replace(
    PRESETS["olmo-hybrid-tiny"], d_model=48, n_heads=6, n_kv_heads=6, head_dim=8, intermediate_size=64, vocab_size=384,
    gated_delta=GatedDelta(key_heads=6, value_heads=6, key_dim=4, value_dim=8),
)  # fmt: skip


def quiet(_: str) -> None:
    pass


def weights(config: ModelConfig) -> tiny_export.Held:
    return tiny_export.Held(initial_values(Transformer(config), 0.2, 0))


# --- training


@pytest.mark.processes
def test_a_hybrid_that_is_killed_ends_in_the_bits_of_one_that_is_not(tmp_path: Path, dataset: Path) -> None:
    """bf16 on two ranks, one of which recomputes: weights, moments, and every step's numbers."""
    fields: dict[str, Any] = {
        "config": replace(TINY, vocab_size=training.VOCAB + 8, n_layers=2, gated_delta=replace(TINY.gated_delta, layers=(True, False))),
        "ranks": 2, "precision": "bf16", "steps": 5, "validate_every": 5, "ephemeral_every": 2, "hardware": {"microbatch_tokens": 128, "recompute": "budget", "recompute_budget": 0.5},
    }  # fmt: skip
    whole, killed = (training.run_folder(tmp_path / name, dataset) for name in ("whole", "killed"))
    training.train(whole, **fields)
    fault = {"kind": "kill", "at": "sft.checkpoint.step_folder.mark_latest", "call": 2, "thread": "saving"}
    training.train(killed, status=-signal.SIGKILL, fault=fault, **fields)
    assert training.last_step(killed) < 5
    assert "continuing from" in training.train(killed, **fields)
    training.assert_same_bits(killed / "train" / "step5", whole / "train" / "step5")
    assert training.curve(killed) == training.curve(whole)
    moments = DcpReader(whole / "train" / "step5", "optim.state.")
    assert moments["blocks.0.attention.A_log.exp_avg"].abs().max() > 0


def test_eight_bit_moments_are_those_of_matrices_alone() -> None:
    wide = replace(TINY, d_model=256, n_layers=4)
    optimizer = build_adamw(model := Transformer(wide), Train(optimizer="adamw8bit", weight_decay=0.1))
    small = {n for n, p in model.named_parameters() if optimizer.state[p]["exp_avg"].dtype == torch.float32}
    kinds = {n.partition(".attention.")[2] for n in small if n.startswith("blocks.0.attention.")}
    vectors = {"A_log", "dt_bias", "o_norm.weight", *(f"{part}_conv1d.weight" for part in "qkv")}
    assert kinds == vectors | {"w_out.weight"}  # 48 channels in a row, which 256 does not divide
    free = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in free} == {n for n in small if n.endswith(hf.DECAYS)}


# --- conversion


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid as transformers saves it, with a tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base")
    facts = tiny_export.tokenizer(folder)
    described = hf.hf_config(TINY, vocab_size=facts.vocab_size, max_position_embeddings=512, dtype="float32",
                             eos_token_id=facts.eos_id, pad_token_id=facts.pad_id)  # fmt: skip
    made = AutoModelForCausalLM.from_config(described)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.endswith(hf.DECAYS):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    return folder


def generated(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids: Tensor = model.generate(torch.tensor([[5, 9, 17, 30]]), max_new_tokens=12, do_sample=False)
    return ids[0].tolist()


@pytest.mark.seconds
def test_a_folder_of_transformers_goes_to_a_step_and_back(exported: Path, tmp_path: Path) -> None:
    """The same tensors, config and greedy tokens. Both directions compare logits with transformers' on the way."""
    from transformers import AutoConfig

    cache, step, again = tmp_path / "cache", tmp_path / "step0", tmp_path / "again"
    olmo_core_steps.to_core(str(exported), str(step), cache, quiet)
    found = olmo_core.config_of_step(step / "config.json")
    assert replace(found, init_std=TINY.init_std) == TINY
    options = Convert(dtype="float32", max_position_embeddings=512)
    report = olmo_core_steps.to_hf(str(step), str(again), options, "", "tokenizer", cache, quiet)
    assert report.logits.max_difference < 1e-4 * report.logits.max_logit
    base, made = HfFolder(exported), HfFolder(again)
    assert set(base) == set(made) and all(torch.equal(base[name], made[name]) for name in base)
    assert generated(again) == generated(exported)
    configs = [AutoConfig.from_pretrained(at).to_dict() for at in (exported, again)]
    assert {k for k in configs[0] if configs[0][k] != configs[1].get(k)} <= {"_name_or_path", "transformers_version"}


def olmo_core_model(config: ModelConfig, patch: pytest.MonkeyPatch, device: str = "cpu") -> Any:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    bases.give_olmo_core_kernels(patch)
    described = olmo_core.step_config(config, TokenIds())["model"]
    return TransformerConfig.from_dict(described).build(init_device=device)


@pytest.mark.seconds
def test_a_folder_of_olmo_cores_converter_is_read_and_has_our_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the mixer's output `out_proj` and `norm`, where the published folders have `o_proj` and `o_norm`."""
    model = olmo_core_model(TINY, monkeypatch)
    from olmo_core.nn.hf import save_hf_hybrid_model

    mine = weights(TINY)
    save_hf_hybrid_model(tmp_path, dict(mine), model, vocab_size=300, max_sequence_length=512)
    assert "out_proj" in (tmp_path / "model.safetensors").read_bytes()[:20_000].decode("latin-1")
    folder, base = HfFolder(tmp_path), read_base(tmp_path)
    assert base is not None and replace(base.config, vocab_size=384) == TINY
    folder.check(TINY)
    assert all(torch.equal(folder[name], mine[name][:300] if name in hf.VOCAB_ROWS else mine[name]) for name in mine)


def test_the_config_of_an_export_has_every_key_of_olmo_cores_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """That converter's keys and values are those of the published config.json of Olmo-Hybrid-7B (open-instruct #1822)."""
    model = olmo_core_model(SEVEN, monkeypatch, "meta")
    from olmo_core.nn.hf import get_hybrid_hf_config, get_hybrid_layer_types

    theirs = get_hybrid_hf_config(model, get_hybrid_layer_types(model), max_seq_len=65536)
    ids = {"bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277}
    made = hf.hf_config(SEVEN, vocab_size=100352, max_position_embeddings=65536, dtype="float32", **ids)
    ours = hf.config_json(made)
    theirs |= ids | {"rope_parameters": {"rope_theta": theirs.pop("rope_theta")}}  # as it is published since
    assert theirs == {key: ours[key] for key in theirs}
    assert read_hf_config(ours, "").config == read_hf_config(theirs, "").config == SEVEN


ODD: dict[str, dict[str, Any]] = {
    "three heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "five heads of values": {"num_attention_heads": 3, "num_key_value_heads": 1, "linear_num_key_heads": 1,
                             "linear_num_value_heads": 5, "linear_key_head_dim": 7, "linear_value_head_dim": 3},
    "attention first": {"layer_types": ["full_attention", "full_attention", "linear_attention", "full_attention"]},
    "attention in the middle": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    "a convolution of one token": {"linear_conv_kernel_dim": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_documents_of_any_length_compute_what_transformers_computes_alone(name: str) -> None:
    """Shorter than the convolution, longer than two chunks of the rule, and a row that is padded after them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = bases.SIZES | {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": None}, **ODD[name]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("olmo_hybrid", **json.loads(json.dumps(sizes)))
        )
    described = theirs.config.to_dict()
    family, base = find_family(described, ""), read_hf_config(described, "")
    model = Transformer(base.config)
    for key, value in theirs.state_dict().items():
        parts = [model.get_parameter(part) for part in family.parts(key)]
        for part, rows in zip(parts, value.split([len(p) for p in parts]), strict=True):
            part.data.copy_(rows)
    lengths = (1, 3, 130, 2)
    documents = [torch.randint(5, bases.ROWS, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    padding = torch.full((8,), 4)
    ids, edges = torch.cat([*documents, padding]), torch.tensor([0, *lengths, len(padding), 0, 0]).cumsum(0).int()
    positions = torch.cat([torch.arange(len(d)) for d in (*documents, padding)])
    with torch.no_grad():
        found, _ = model(ids, positions, edges, max(lengths))
        wanted = torch.cat([theirs(input_ids=d[None], use_cache=False).logits[0] for d in documents])
    torch.testing.assert_close(found[: sum(lengths)], wanted, atol=2e-5, rtol=1e-4)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"] * 4}, "layer_types: .*each at least once"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types: .*each at least once"),
        (
            {"layer_types": ["linear_attention", "sliding_attention"] * 2},
            "layer_types: .*4 of full_attention and linear",
        ),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types: .*4 of full_attention and linear"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads: 5, expected a multiple of linear_num_key_heads, 4"),
        ({"linear_use_gate": False}, "linear_use_gate: False, not supported"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim: 0, expected a whole number of at least 1"),
        ({"sliding_window": 16}, "sliding_window: 16"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu', only 'silu' is supported"),
    ],
)
def test_a_hybrid_that_would_compute_something_else_is_refused(changes: dict[str, Any], words: str) -> None:
    rope = {"rope_parameters": {"rope_theta": None}}
    with pytest.raises(SftError, match=f"b/config.json: .*{words}"):
        read_hf_config(
            {**bases.SIZES, "model_type": "olmo_hybrid", "num_key_value_heads": 4, **rope, **changes}, "b/config.json"
        )


def test_a_folder_without_a_convolution_is_refused_by_the_name_of_the_tensor(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = load_file(exported / "model.safetensors")
    missing = next(name for name in values if "conv1d" in name)
    save_file({n: v for n, v in values.items() if n != missing}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(SftError, match=r"tensors missing, the first is blocks\.0\.attention\.\w_conv1d\.weight"):
        HfFolder(tmp_path).check(
            replace(TINY, vocab_size=json.loads((tmp_path / "config.json").read_text())["vocab_size"])
        )


# --- plans


def test_the_planner_counts_every_value_of_the_7b() -> None:
    """Against torch's own parameters, as FSDP2 cuts them, and the decays, which every rank has whole."""
    with torch.device("meta"):
        parameters = dict(Transformer(SEVEN).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == SEVEN.parameters == 7_430_870_688
    for ranks in (8, 7):
        owned = sum(p.numel() if n.endswith(hf.DECAYS) else p.chunk(ranks)[0].numel() for n, p in parameters.items())
        parts = memory.plan(SEVEN, Train(), Hardware(), ranks, 0).parts
        assert (parts["parameters"], parts["gradients"], parts["optimizer state"]) == (4 * owned, 4 * owned, 8 * owned)


def test_the_flops_of_a_hybrid_are_those_that_torch_counts_and_the_state_s() -> None:
    """Matrices as torch counts them in a step; convolutions and states as their definition multiplies them."""
    model = Transformer(TINY)
    model.load_state_dict(weights(TINY))
    tokens, rows = 96, 32
    edges, positions = torch.tensor([0, 60, 96], dtype=torch.int32), torch.cat([torch.arange(60), torch.arange(36)])
    matrices = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head.w_out:
            matrices += 2 * module.in_features * module.out_features
    with FlopCounterMode(display=False) as counter:
        model.hidden_states(torch.randint(0, 384, (tokens,)), positions, edges, 60)
    counted = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm")) == matrices * tokens
    mixers = [module.mixer for module in model.modules() if isinstance(module, GatedDeltaNet)]
    # Per token and head: the state decays, k reads it, an outer product is added, q reads it; each a multiply-add per cell.
    recurrent = sum(
        2 * (4 * m.value_heads * m.key_dim * m.value_dim + m.conv_width * (2 * m.keys + m.values)) for m in mixers
    )
    assert token_flops(TINY) == matrices + recurrent and len(mixers) == 3
    attended = utilisation.mean_attended([60, 36])
    found = utilisation.flops_per_token(TINY, attended, trained_fraction=rows / tokens)
    attention = 4 * 6 * 8 * (60 * 61 / 2 + 36 * 37 / 2) / tokens  # one layer: scores and values, of 6 heads of 8
    assert found == pytest.approx(3 * (matrices + recurrent + attention + head_flops(TINY) * rows / tokens))
