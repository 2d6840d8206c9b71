"""Gated DeltaNet against a plain recurrence in fp64, against itself packed, and the calls of flash-linear-attention."""

from __future__ import annotations

import ast
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.common.errors import SftError
from sft.model import gated_delta
from sft.model.gated_delta import GatedDeltaNet, Row, gated_delta_rule, missing_kernels, mix, short_convolution
from sft.model.model import initial_values
from sft.recipe.architecture import GatedDelta, ModelConfig
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Train
from sft.training.optim import build_adamw

MIXER = GatedDelta(key_heads=2, value_heads=4, key_dim=6, value_dim=10)
TINY = ModelConfig(4, 32, 4, 4, 8, 48, 96, rope_layers=(False,), gated_delta=MIXER)


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The definition, one token after the other."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
    outs = []
    for t in range(len(q)):
        state = state * decay[t].exp()[:, None, None]
        predicted = torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - predicted))
        outs.append(torch.einsum("hkv,hk->hv", state, q[t]) / q.shape[2] ** 0.5)
    return torch.stack(outs)


def inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(length, 3, n, generator=g, dtype=torch.float64) for n in (6, 6, 10))
    decay = -torch.rand(length, 3, generator=g, dtype=torch.float64) * 3
    beta = torch.rand(length, 3, generator=g, dtype=torch.float64) * 2
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v, decay, beta))


@pytest.mark.parametrize("length", [1, 5, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_chunks_compute_the_recurrence_and_its_gradients(length: int, dtype: torch.dtype) -> None:
    ours, exact = inputs(length, dtype), inputs(length, torch.float64)
    found, wanted = gated_delta_rule(*ours), recurrence(*exact)
    tolerance = {"atol": 1e-10, "rtol": 1e-8} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-3}
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = (torch.autograd.grad((x * weights.to(x.dtype)).sum(), i) for x, i in ((found, ours), (wanted, exact)))
    for ours_, exact_ in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_.double(), exact_, **tolerance)


def test_a_strong_decay_and_a_long_document_stay_finite() -> None:
    q, k, v, decay, beta = inputs(300, torch.float32)
    found = gated_delta_rule(q, k, v, decay * 100, beta)
    assert found.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), (q, k, v, decay, beta)))


def test_a_convolution_is_conv1d_of_each_document() -> None:
    lengths, width = (1, 3, 9, 2), 4
    x, weight = torch.randn(sum(lengths), 6), torch.randn(6, width)
    positions = torch.cat([torch.arange(n) for n in lengths])[:, None]
    wanted = [
        F.silu(F.conv1d(F.pad(part.T[None], (width - 1, 0)), weight[:, None], groups=6))[0].T
        for part in x.split(lengths)
    ]
    torch.testing.assert_close(short_convolution(x, weight, positions), torch.cat(wanted))


def mixer_of(config: ModelConfig = TINY, seed: int = 0) -> GatedDeltaNet:
    assert config.gated_delta
    made = GatedDeltaNet(config, config.gated_delta)
    g = torch.Generator().manual_seed(seed)
    made.load_state_dict({n: 0.3 * torch.randn(v.shape, generator=g) for n, v in made.state_dict().items()})
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_packed_document_is_bitwise_itself_alone_in_a_row_of_the_same_length(dtype: torch.dtype) -> None:
    """Outputs and gradients. The edges are padded with empty documents, as the loader pads them."""
    mixer = mixer_of().to(dtype)
    lengths = (70, 3, 33)
    x = torch.randn(sum(lengths), TINY.d_model, generator=torch.Generator().manual_seed(1)).to(dtype)
    edges = torch.tensor([0, *lengths, 0, 0]).cumsum(0).int()
    for i, length in enumerate(lengths):
        start = sum(lengths[:i])
        alone = torch.zeros_like(x)
        alone[start : start + length] = x[start : start + length]
        found = []
        for row in (x, alone):
            out = mixer(row, None, edges, max(lengths))[start : start + length]
            found.append((out, *torch.autograd.grad(out.float().square().sum(), list(mixer.parameters()))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_decays_and_step_sizes_are_fp32_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Row] = []
    monkeypatch.setattr(gated_delta, "mix", lambda row, edges, mixer: seen.append(row) or mix(row, edges, mixer))
    mixer_of().bfloat16()(torch.randn(9, 32).bfloat16(), None, torch.tensor([0, 9], dtype=torch.int32), 9)
    [row] = seen
    assert row.decay.dtype == row.beta.dtype == torch.float32 and row.q.dtype == torch.bfloat16
    assert (row.decay < 0).all() and (row.beta.min() > 0) and (1 < row.beta.max() < 2)


def test_sharded_in_bf16_the_gates_are_computed_from_fp32_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP casts what it shards to bf16, which would change a decay by up to 1.6 %."""
    from sft.model.model import Transformer
    from sft.model.parallel import World, shard

    seen: list[Tensor] = []  # no weights: their memory is FSDP's, and free after the forward pass

    def watched(row: Row, *rest: Any) -> Tensor:
        assert row.q.dtype == torch.bfloat16
        seen.append(row.decay.detach().clone())
        return mix(row, *rest)

    monkeypatch.setattr(gated_delta, "mix", watched)
    model = Transformer(replace(TINY, n_layers=2, vocab_size=16))
    model.load_state_dict(dict(initial_values(model, 0.02, 0)))
    mixer = model.blocks[0].attention
    torch.nn.init.zeros_(mixer.w_a.weight)  # type: ignore[union-attr,arg-type]
    wanted = -mixer.A_log.detach().exp() * F.softplus(mixer.dt_bias.detach())  # type: ignore[union-attr,operator,arg-type]
    try:
        sharded = shard(model, World(0, 1, 0, torch.device("cpu")), "bf16")
        sharded(torch.tensor([1, 2, 3]), torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), 3)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert torch.equal(seen[0], wanted.expand(3, -1))


def test_initial_decays_are_those_that_olmo_core_draws() -> None:
    from sft.model.model import Transformer

    wide = replace(TINY, n_layers=2, gated_delta=GatedDelta(500, 500, 2, 4))
    values = dict(initial_values(Transformer(wide), 0.02, 1))
    rate, step = values["blocks.0.attention.A_log"].exp(), F.softplus(values["blocks.0.attention.dt_bias"])
    assert 0 < rate.min() < 1 and 15 < rate.max() < 16
    assert 0.001 <= step.min() < 0.002 and 0.05 < step.max() <= 0.1 + 1e-6
    assert step.log().mean().exp().item() == pytest.approx(0.01, rel=0.2)
    assert not torch.equal(values["blocks.0.attention.A_log"], values["blocks.1.attention.A_log"])


def test_decays_have_no_weight_decay_and_every_group_has_the_rate() -> None:
    from sft.model.model import Transformer

    model = Transformer(TINY)
    for optimizer in ("adamw", "adamw8bit"):
        groups = build_adamw(model, Train(lr=1e-3, weight_decay=0.1, optimizer=optimizer)).param_groups
        names = {id(p): n for n, p in model.named_parameters()}
        free = {names[id(p)].rsplit(".", 1)[1] for p in groups[1]["params"]}
        assert free == {"A_log", "dt_bias"} and groups[1]["weight_decay"] == 0.0 and len(groups[1]["params"]) == 6
        assert groups[0]["weight_decay"] == 0.1 and len(groups[0]["params"]) + 6 == len(names)
    dense = Transformer(replace(TINY, gated_delta=None))
    assert len(build_adamw(dense, Train()).param_groups) == 1


# --- flash-linear-attention, played by the plain version


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package with the signatures of flash-linear-attention 0.5, and the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def causal_conv1d(
        x: Tensor, weight: Tensor, bias: None, activation: str, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        calls.append({"x": x, "weight": weight, "activation": activation, "cu_seqlens": cu_seqlens})
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[:, None]
        return short_convolution(x[0], weight, positions)[None], None

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm_in_kernel: bool, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        assert use_qk_l2norm_in_kernel and q.shape[:3] == k.shape[:3] == v.shape[:3] == (*g.shape,) == (*beta.shape,)
        calls.append({"cu_seqlens": cu_seqlens, "g": g})
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x[0].split(lengths) for x in (q, k, v, g, beta)), strict=True)
        return torch.cat([gated_delta_rule(*part) for part in parts])[None], None

    for name, attributes in (
        ("fla", {}),
        ("fla.modules", {}),
        ("fla.modules.convolution", {"causal_conv1d": causal_conv1d}),
        ("fla.ops", {}),
        ("fla.ops.gated_delta_rule", {"chunk_gated_delta_rule": chunk_gated_delta_rule}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def row_of(tokens: int) -> Row:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, n, generator=g) for n in (MIXER.keys, MIXER.keys, MIXER.values))
    decay, beta = -torch.rand(tokens, 4, generator=g), 2 * torch.rand(tokens, 4, generator=g)
    weights = [torch.randn(n, 4, generator=g) for n in (MIXER.keys, MIXER.keys, MIXER.values)]
    return Row(q, k, v, decay, beta, *weights)


def test_the_gpu_s_kernels_get_the_row_and_edges_without_empty_documents(fla: list[dict[str, Any]]) -> None:
    row, edges = row_of(20), torch.tensor([0, 7, 8, 20, 20, 20], dtype=torch.int32)
    found = [gated_delta._mix_fused(row, edges, MIXER) for _ in range(2)]
    assert torch.equal(found[0], mix(row, edges, MIXER)) and torch.equal(found[0], found[1])
    assert fla[0]["activation"] == "silu" and fla[0]["weight"].shape == (MIXER.keys, 4)
    assert fla[0]["cu_seqlens"].tolist() == [0, 7, 8, 20]
    # One tensor for all layers: the kernels' tables of chunks are made once for it.
    assert len({id(call["cu_seqlens"]) for call in fla}) == 1
    edges[1] = 6
    gated_delta._mix_fused(row, edges, MIXER)
    assert fla[-1]["cu_seqlens"].tolist() == [0, 6, 8, 20]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")


def test_the_installed_kernels_take_the_arguments_that_they_get(fla: list[dict[str, Any]]) -> None:
    """By their source, which needs no Triton: flash-linear-attention imports only where there is a GPU."""
    folders = [Path(entry) / "fla" for entry in sys.path if (Path(entry) / "fla" / "ops").is_dir()]
    if not folders:
        pytest.skip("flash-linear-attention is not installed (extra 'hybrid')")
    sources = {
        "causal_conv1d": (folders[0] / "modules" / "conv" / "causal_conv1d.py", {"x", "weight", "bias", "activation"}),
        "chunk_gated_delta_rule": (
            folders[0] / "ops" / "gated_delta_rule" / "chunk.py",
            {"q", "k", "v", "g", "beta", "use_qk_l2norm_in_kernel"},
        ),
    }
    for name, (file, given) in sources.items():
        [function] = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name]
        assert {*given, "cu_seqlens"} <= {a.arg for a in function.args.args}


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("lengths", [(1, 3, 70, 130), (64, 128), (257,)], ids=str)
def test_on_a_gpu_the_kernels_compute_what_pytorch_does(lengths: tuple[int, ...]) -> None:
    """In bf16, outputs and gradients of packed documents, also of those that are shorter than the convolution."""
    config = replace(TINY, d_model=128, gated_delta=GatedDelta(key_heads=2, value_heads=2, key_dim=32, value_dim=64))
    mixer = mixer_of(config).cuda().bfloat16()
    x = torch.randn(sum(lengths), 128, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    edges = torch.tensor([0, *lengths, 0]).cumsum(0).int().cuda()
    found = []
    for exact in (False, True):
        used = mixer.float() if exact else mixer
        out = used(x.float() if exact else x, None, edges, max(lengths))
        gradients = torch.autograd.grad(out.float().square().sum(), list(used.parameters()))
        found.append([y.float() for y in (out, *gradients)])
    for fused, plain in zip(*found, strict=True):
        assert F.cosine_similarity(fused.flatten(), plain.flatten(), dim=0) > 0.99


@pytest.mark.gpu
@NO_GPU
def test_on_a_gpu_a_packed_document_does_not_see_its_neighbours() -> None:
    config = replace(TINY, d_model=128, gated_delta=GatedDelta(key_heads=2, value_heads=2, key_dim=32, value_dim=64))
    mixer = mixer_of(config).cuda().bfloat16()
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    edges = torch.tensor([0, 3, 70, 200], dtype=torch.int32).cuda()
    other = x.clone()
    other[:3], other[70:] = 0, 0
    assert torch.equal(mixer(x, None, edges, 130)[3:70], mixer(other, None, edges, 130)[3:70])


def test_a_gpu_without_the_kernels_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "next: pip install" in missing_kernels(PRESETS["olmo-hybrid-7b"])
    assert missing_kernels(PRESETS["olmo3-7b"]) == ""
    with pytest.raises(SftError, match=r"need the package flash-linear-attention on a GPU .* next: pip install"):
        gated_delta._mix_fused(row_of(4), torch.tensor([0, 4], dtype=torch.int32), MIXER)
