"""What inductor makes of a compiled block: one graph, and few kernels between its matrix products. Nothing is compiled or run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sft.model import model as modules
from sft.model.model import Block
from sft.recipe.presets import PRESETS

pytestmark = [pytest.mark.compile, pytest.mark.slow]

TOKENS = 32


@torch.library.custom_op("sft_tests::attention", mutates_args=())
def opaque(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In place of the fused kernel: one node of the graph, as on a GPU."""
    return q.clone()


@torch.library.custom_op("sft_tests::attention_backward", mutates_args=())
def opaque_backward(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gradient.clone(), gradient.clone(), gradient.clone()


opaque.register_fake(lambda q, k, v: torch.empty_like(q))
opaque_backward.register_fake(lambda g: (torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)))
opaque.register_autograd(lambda context, gradient: opaque_backward(gradient))


def kernels(preset: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernels beside products and attention: in the forward pass, in the backward pass."""
    # Here, and not in every process that collects tests: it takes a second.
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.utils import get_code

    monkeypatch.setattr(modules, "attention", lambda q, k, v, *_: opaque(q, k, v))
    found: list[int] = []

    def count(nodes: list[Any]) -> list[Any]:
        found.append(sum(not isinstance(n, ExternKernelSchedulerNode | NopKernelSchedulerNode) for n in nodes))
        return nodes

    config = replace(PRESETS[preset], d_model=64, n_heads=8, n_kv_heads=8, head_dim=8, intermediate_size=128)
    torch._dynamo.reset()
    block = torch.compile(Block(config, 0).bfloat16(), fullgraph=True)  # an error where the graph breaks
    x = torch.randn(TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(TOKENS, 1, 8)
    # A GPU's form of `cat` in the rotation, which this device has not by default; its own cache of kernels is left alone.
    scheduling = torch._inductor.config.patch(
        _post_fusion_custom_pass=count, force_pointwise_cat=True, fx_graph_cache=False, **{"cpp.vec_isa_ok": True}
    )
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False), scheduling:
        get_code(block, x, (table, table), torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)
    return found


@pytest.mark.parametrize(("preset", "forward", "backward"), [("olmo2-tiny", 4, 9), ("llama3-tiny", 4, 5)])
def test_norm_rotation_and_residual_are_fused(
    preset: str, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, OLMo 2: norms and rotations of q and k; norm and residual, twice; SwiGLU."""
    assert kernels(preset, monkeypatch) == [forward, backward]
