"""The model against two independent implementations, and against itself packed, recomputed and compiled."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sft.checkpoint.olmo_core import step_config
from sft.formats.dataset import TokenIds
from sft.model import model as modules
from sft.model.attention import _fused as fused
from sft.model.hf import family, hf_config, shapes
from sft.model.memory import layer_modes
from sft.model.model import Block, Transformer, compile_blocks, initial_values, inverse_frequencies
from sft.model.parallel import World, shard
from sft.recipe.architecture import Llama3Rope, ModelConfig, Yarn
from sft.recipe.presets import PRESETS, SOURCES
from sft.recipe.resolve import resolve
from sft.recipe.schema import Model

TINY = ModelConfig(n_layers=4, d_model=48, n_heads=4, n_kv_heads=4, head_dim=12, intermediate_size=80, vocab_size=96)
QWEN = replace(TINY, rope_theta=1e6, prenorm=True, qk_norm="head")
LLAMA = replace(TINY, norm_eps=1e-5, prenorm=True, qk_norm="")
CONFIGS = {
    "olmo2": TINY,
    "olmo2 grouped": replace(TINY, n_kv_heads=2, rope_theta=8e6),
    "olmo3": replace(TINY, window=8, n_kv_heads=1),
    "olmo3 window above the length": replace(TINY, window=500),
    "olmo3 yarn": replace(TINY, window=8, n_kv_heads=2, rope_scaling=Yarn(factor=8.0, old_context=64)),
    "olmo3 head_dim": replace(TINY, window=16, head_dim=16, rope_scaling=Yarn(factor=2.0, old_context=32)),
    "olmo2 yarn": replace(TINY, rope_scaling=Yarn(factor=4.0, beta_fast=16.0, beta_slow=2.0, old_context=40)),
    "qwen3": replace(QWEN, n_kv_heads=2),
    "qwen3 tied, head_dim": replace(QWEN, head_dim=16, tied=True),
    "llama3": replace(LLAMA, n_kv_heads=1, rope_scaling=Llama3Rope(factor=8.0, old_context=64)),
    "llama3 tied, unscaled": replace(LLAMA, tied=True),
}


def build(config: ModelConfig, seed: int = 1) -> Transformer:
    """Weights far from symmetric: norms off one, projections wide enough that every part matters."""
    model = Transformer(config)
    g = torch.Generator().manual_seed(seed)
    values = {n: v + 0.1 * torch.randn(v.shape, generator=g) for n, v in initial_values(model, 0.02, seed)}
    model.load_state_dict(values)
    return model


def whole(model: Transformer) -> dict[str, Tensor]:
    """The weights as one who does not know that head and embedding are tied has them: both."""
    return {"lm_head.w_out.weight": model.embeddings.weight, **model.state_dict()}


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def packed(*documents: Tensor) -> dict[str, Any]:
    lengths = [len(d) for d in documents]
    return {
        "input_ids": torch.cat(documents),
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_len": max(lengths),
    }


def compare(model: Transformer, logits: Tensor, document: Tensor, theirs: dict[str, nn.Parameter]) -> None:
    """Logits, loss and every gradient; `theirs` = the oracle's parameters under our names."""
    ours, _ = model(**packed(document))
    torch.testing.assert_close(ours, logits, atol=2e-5, rtol=1e-4)
    labels = document[1:]
    wanted = F.cross_entropy(logits[:-1], labels)
    wanted.backward()
    rows = torch.arange(len(labels))
    loss, _ = model(**packed(document), target_rows=rows, target_ids=labels, loss_denominator=float(len(labels)))
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = theirs[name].grad
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name]
    model, document = build(config), ids(90)
    described = hf_config(config, vocab_size=config.vocab_size, max_position_embeddings=512, dtype="float32")
    oracle = AutoModelForCausalLM.from_config(described, attn_implementation="eager")
    theirs = family(config).theirs
    oracle.load_state_dict({theirs(n): v for n, v in whole(model).items()})
    logits = oracle(input_ids=document[None], use_cache=False).logits[0]
    parameters = dict(oracle.named_parameters())
    compare(model, logits, document, {n: parameters[theirs(n)] for n, _ in model.named_parameters()})


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_olmo_core_built_from_our_config_json(name: str) -> None:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    config = CONFIGS[name]
    model, document = build(config), ids(90)
    oracle = TransformerConfig.from_dict(step_config(config, TokenIds())["model"]).build(init_device="cpu")
    oracle.load_state_dict(whole(model))
    logits = oracle(document[None])[0]
    compare(model, logits, document, dict(oracle.named_parameters()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_document_gives_bitwise_what_it_gives_alone_in_a_row_of_the_same_length(name: str) -> None:
    """Logits, losses and every gradient, of documents longer and shorter than the window. Alone: the rest of the row is padding."""
    model = build(CONFIGS[name])
    documents = [ids(n, seed=n) for n in (33, 7, 64)]
    nothing = [torch.zeros(len(d), dtype=torch.long) for d in documents]
    for i, document in enumerate(documents):
        start = sum(map(len, documents[:i]))
        rows = torch.arange(start, start + len(document) - 1)
        found = []
        for row in (documents, [*nothing[:i], document, *nothing[i + 1 :]]):
            with torch.no_grad():
                logits, _ = model(**packed(*row))
            labels = {"target_rows": rows, "target_ids": document[1:], "loss_denominator": float(len(rows))}
            loss, losses = model(**packed(*row), **labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            found.append((logits[start : start + len(document)], loss, losses, *gradients, logits))
        *same, whole_rows = zip(*found, strict=True)
        assert all(torch.equal(together, alone) for together, alone in same)
        assert not torch.equal(*whole_rows)  # the neighbours did differ


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_document_gives_what_it_gives_in_a_row_of_its_own_length(name: str) -> None:
    """To rounding: products of matrices of another size may sum in another order (attention is bitwise there too: test_attention)."""
    model = build(CONFIGS[name])
    documents = [ids(n, seed=n) for n in (33, 7, 64)]
    with torch.no_grad():
        together, _ = model(**packed(*documents))
        alone = [model(**packed(d))[0] for d in documents]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_names_and_shapes_are_olmo_cores_and_parameters_are_counted() -> None:
    for config in CONFIGS.values():
        model = Transformer(config)
        found = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert found == shapes(config)
        assert sum(p.numel() for p in model.parameters()) == config.parameters


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("olmo2-1b", 1_484_916_736),
        ("olmo3-7b", 7_298_617_344),
        ("olmo3-32b", 32_234_279_936),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == count


def gradients(model: Transformer) -> list[Tensor]:
    documents = [ids(33, 1), ids(7, 2), ids(64, 3)]
    rows = torch.arange(0, 100, 3)
    labels = torch.cat(documents)[rows + 1]
    loss, _ = model(**packed(*documents), target_rows=rows, target_ids=labels, loss_denominator=float(len(rows)))
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("mode", ["selected", "full", "budget"])
@pytest.mark.parametrize("name", ["olmo3 yarn", "qwen3 tied, head_dim"])
def test_recomputed_activations_give_the_same_gradients(mode: str, name: str) -> None:
    model = build(CONFIGS[name])
    wanted = gradients(model)
    for block, layer in zip(model.blocks, layer_modes(len(model.blocks), mode, 0.5), strict=True):
        block.recompute = layer  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted, strict=True))


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selected", 0), ("full", 1)])
def test_selected_never_runs_the_fused_kernel_again(mode: str, again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += function is torch.ops.torch_attn._varlen_attn.default
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(modules, "attention", fused)
    with torch.device("meta"), Count() as count:
        block = Block(CONFIGS["olmo3"], 0).bfloat16()
        block.recompute = mode
        x, table = torch.empty(64, 48, dtype=torch.bfloat16, requires_grad=True), torch.empty(64, 1, 12)
        out = block(x, (table, table), torch.empty(64, dtype=torch.int32), 64)
        assert count.calls == 1
        out.sum().backward()
    assert count.calls == 1 + again


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    model = Transformer(TINY)
    first = dict(initial_values(model, 0.02, 5))
    deeper = dict(initial_values(Transformer(replace(TINY, n_layers=6)), 0.02, 5))
    assert all(torch.equal(value, deeper[name]) for name, value in first.items())
    assert not torch.equal(first["embeddings.weight"], dict(initial_values(model, 0.02, 6))["embeddings.weight"])
    matrix = first["blocks.0.feed_forward.w1.weight"]
    assert matrix.abs().max() <= 0.06
    assert matrix.std().item() == pytest.approx(0.02, rel=0.1)
    assert (first["lm_head.norm.weight"] == 1).all()


def test_the_fields_of_a_recipe_change_the_model_that_they_name() -> None:
    def resolved(preset: str, **fields: Any) -> ModelConfig:
        return resolve(Model(preset=preset, **fields))

    assert resolved("olmo3-7b").rope_scaling == Yarn(factor=8.0, old_context=8192)
    assert resolved("olmo3-7b", yarn_factor=4.0).rope_scaling == Yarn(factor=4.0)
    assert resolved("olmo3-7b", yarn_factor=0.0).rope_scaling is None
    assert resolved("olmo2-7b", yarn_factor=2.0).rope_scaling == Yarn(factor=2.0)
    # A factor of 2 turns the slowest dimension half as far in the old context, and the fastest just as far.
    old, new = (inverse_frequencies(128, 5e5, yarn, torch.device("cpu")) for yarn in (None, Yarn(factor=2.0)))
    assert (new[0] / old[0])[[0, -1]].tolist() == pytest.approx([1.0, 0.5])
    assert new[1] == pytest.approx(1.0693, abs=1e-4)
    assert resolved("olmo2-7b", rope_theta=8e6).rope_theta == 8e6
    assert resolved("olmo3-7b", window=0).windows == (0,) * 32
    assert resolved("olmo3-7b", window=100).windows[:4] == (100, 100, 100, 0)
    assert resolved("qwen3-8b", n_layers=2).prenorm and resolved("llama3.1-8b").rope_scaling == Llama3Rope()
    wide = resolved("olmo2-tiny", init_std=0.1, vocab_size=256)
    values = dict(initial_values(Transformer(wide), wide.init_std, 0))
    assert values["lm_head.w_out.weight"].std().item() == pytest.approx(0.0987, rel=0.02)  # cut at three deviations
    assert values["lm_head.w_out.weight"].abs().max() <= 0.3


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "context", "modes"), [("olmo3 yarn", 2, ("none", "selected", "full")), ("qwen3", 1, ("full",))]
)
def test_the_layer_that_cuda_runs_compiles_into_one_graph(
    name: str, context: int, modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has shapes and no values: the fused kernel's path traced forward and backward, fullgraph."""
    config = replace(CONFIGS[name], d_model=64, head_dim=16, n_kv_heads=2)
    monkeypatch.setattr(modules, "attention", fused)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=context)
    try:
        for mode in modes:
            torch._dynamo.reset()
            with torch.device("meta"):
                block = Block(config, 0).bfloat16()
                block.recompute = mode
                x = torch.empty(128, 64, dtype=torch.bfloat16, requires_grad=True)
                table = torch.empty(128, 1, 16)
                documents = [
                    (torch.empty(edges, dtype=torch.int32), longest) for longest, edges in ((128, 64), (64, 128))
                ]
            # Not inside `with torch.device`, whose own Python dynamo would trace for every operator: three times as long.
            if context > 1:
                block.attention.context = (dist.distributed_c10d._get_default_group().group_name, context)
            block.compile(fullgraph=True, backend="aot_eager")
            # Other documents do not break it either. Graphs for any size take half of the time, so one mode has them.
            for edges, longest in documents[: 1 + (mode == "selected")]:
                out = block(x, (table, table), edges, longest)
            out.sum().backward()
            assert out.shape == x.shape
            assert all(p.grad is not None for p in block.parameters())
    finally:
        dist.destroy_process_group()


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, as production has it on one GPU, and nothing compiled before."""
    torch._dynamo.reset()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.compile
def test_every_kind_of_block_compiles_for_every_shape(monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    """Windowed or not, what is recomputed, with gradients or without, other documents: more variants of one code object than
    dynamo's own limit allows, which is an error where graphs must be whole; a third shape needs no new ones."""
    monkeypatch.setattr(modules, "attention", fused)
    from torch._dynamo.testing import CompileCounter

    counter: Any = CompileCounter()
    monkeypatch.setattr(Block, "compile", partialmethod(nn.Module.compile, backend=counter), raising=False)
    with torch.device("meta"):
        model = Transformer(replace(CONFIGS["olmo3 yarn"], d_model=64, head_dim=16)).bfloat16()
        tokens = torch.empty(128, dtype=torch.long), torch.empty(128)
        documents = [
            (torch.empty(edges, dtype=torch.int32), longest) for longest, edges in ((128, 64), (64, 128), (32, 256))
        ]
    for block, mode in zip(model.blocks, ("none", "selected", "full", "none"), strict=True):
        block.recompute = mode  # type: ignore[union-attr]
    variants = []
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(model, torch.device("cuda"), "bf16")
        for document in documents:
            inputs = (*tokens, *document)
            model.hidden_states(*inputs)
            with torch.no_grad():
                model.hidden_states(*inputs)
            variants.append(counter.frame_count)
    assert 8 < variants[0] + 4 <= variants[1] == variants[2]


def test_rotary_tables_stay_fp32_where_the_model_computes_in_bf16(monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    """A cosine in bf16 has two or three digits: far positions would run into one another."""
    seen = set()

    def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        seen.add((x.dtype, *(table.dtype for table in rotary)))
        return original(x, rotary)

    original = modules.rotate
    monkeypatch.setattr(modules, "rotate", rotate)
    model = shard(build(CONFIGS["olmo3 yarn"]), World(0, 1, 0, torch.device("cpu")), "bf16")
    logits, hidden = model(**packed(ids(40)))
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}
    assert logits.dtype == hidden.dtype == torch.bfloat16


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")


@pytest.mark.seconds
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("device", "compiled"),
    [
        ("cpu", False),
        pytest.param("cuda", False, marks=[pytest.mark.gpu, NO_GPU]),
        pytest.param("cuda", True, marks=[pytest.mark.gpu, NO_GPU]),
    ],
)
def test_sharded_bf16_follows_fp32_on_the_host(name: str, device: str, compiled: bool, group: None) -> None:
    config = replace(CONFIGS[name], d_model=64, head_dim=32)  # the fused kernel wants heads of a multiple of 8
    wanted = gradients(build(config))
    world = World(0, 1, 0, torch.device(device))
    model: nn.Module = build(config).to(device)
    if compiled:
        compile_blocks(model, world.device, "bf16")
    model = shard(model, world, "bf16")
    documents = [ids(33, 1), ids(7, 2), ids(64, 3)]
    rows = torch.arange(0, 100, 3)
    labels = torch.cat(documents)[rows + 1]
    batch = packed(*documents) | {"target_rows": rows, "target_ids": labels, "loss_denominator": float(len(rows))}
    loss, _ = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    loss.backward()
    for parameter, b in zip(model.parameters(), wanted, strict=True):
        assert isinstance(parameter.grad, DTensor)
        a = parameter.grad.full_tensor().cpu()
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_olmo_hybrid_s_preset_has_the_figures_of_transformers_class_and_of_its_count() -> None:
    from transformers import OlmoHybridConfig

    from sft.recipe.base_config import read_hf_config

    theirs = OlmoHybridConfig(rope_parameters={"rope_theta": None}, architectures=["OlmoHybridForCausalLM"]).to_dict()
    assert read_hf_config(theirs, "").config == PRESETS["olmo-hybrid-7b"]
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    described = step_config(PRESETS["olmo-hybrid-7b"], TokenIds())["model"]
    assert TransformerConfig.from_dict(described).num_params == PRESETS["olmo-hybrid-7b"].parameters


# The functions of OLMo-core 3.0.0 that describe the published models, and what they leave out.
OLMO_CORE = {
    "olmo2-1b": ("olmo2_1B_v2", {}), "olmo2-7b": ("olmo2_7B", {}), "olmo2-13b": ("olmo2_13B", {}),
    "olmo2-32b": ("olmo2_32B", {}), "olmo3-7b": ("olmo3_7B", {"rope_scaling"}), "olmo3-32b": ("olmo3_32B", {"rope_scaling"}),
    "qwen3-0.6b": ("qwen3_0_6B", {}), "qwen3-1.7b": ("qwen3_1_7B", {}), "qwen3-4b": ("qwen3_4B", {}),
    "qwen3-8b": ("qwen3_8B", {}), "llama3.1-8b": ("llama3_8B", {"rope_scaling"}),
    "llama3.2-1b": ("llama3_1B", {"rope_scaling", "tied"}),
}  # fmt: skip


def test_a_preset_has_the_figures_of_olmo_cores_description_and_a_source() -> None:
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    from sft.recipe import core_config
    from sft.recipe.architecture import differing_fields

    assert {name for name in PRESETS if not name.endswith("-tiny")} == set(SOURCES)
    assert set(SOURCES) - {"olmo-hybrid-7b"} == set(OLMO_CORE)  # OLMo-core has no function for it
    for name, (function, left_out) in OLMO_CORE.items():
        described = getattr(TransformerConfig, function)(vocab_size=PRESETS[name].vocab_size).as_config_dict()
        found = core_config.read({"model": described}, name)
        assert set(differing_fields(found, PRESETS[name])) == set(left_out), name
