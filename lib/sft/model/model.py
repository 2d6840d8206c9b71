"""OLMo 2 and 3, Qwen 3 and Llama 3 on packed tokens, with OLMo-core's parameter names.

In:  token ids [T] of documents laid end to end, positions [T] that restart at 0 in each, and the document edges.
Out: hidden states [T, d], or the loss of the labelled rows.

There is no batch dimension: a pack is one long row and attention alone knows where documents end. OLMo's block is the
reordered-norm one, h = x + norm(attn(x)), out = h + norm(ff(h)), with an RMS norm over the whole query and key projections
before they are cut into heads; the others norm before, x + attn(norm(x)). `state_dict()` keys are those of an OLMo-core
checkpoint, so saving is a plain write and Hugging Face is a rename (sft.model.hf).

The ranks of a context group hold consecutive parts of the row: only attention, which exchanges heads for tokens
(sft.model.context), and the document edges know of the whole.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sft.model.attention import attention
from sft.model.context import gather_heads, gather_tokens
from sft.model.loss import labelled_loss
from sft.recipe.presets import Llama3Rope, ModelConfig, Yarn

Rotary = tuple[Tensor, Tensor]  # cos, sin: fp32 [T, 1, head_dim]


class RMSNorm(nn.Module):
    """RMS norm in fp32, the weight applied before casting back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * h).to(x.dtype)


class Attention(nn.Module):
    """`context` names the ranks that hold the other parts of this row of tokens: (process group, how many)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.window = config.layer_window(layer)
        self.context: tuple[str, int] | None = None
        self.w_q = nn.Linear(config.d_model, q, bias=False)
        self.w_k = nn.Linear(config.d_model, kv, bias=False)
        self.w_v = nn.Linear(config.d_model, kv, bias=False)
        self.w_out = nn.Linear(q, config.d_model, bias=False)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            whole = config.qk_norm == "full"
            self.q_norm = RMSNorm(q if whole else config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(kv if whole else config.head_dim, config.norm_eps)

    def forward(self, x_TD: Tensor, rotary: Rotary, cu_seqlens: Tensor, max_len: int) -> Tensor:
        q = rotate(self.heads(self.w_q(x_TD), self.q_norm), rotary)
        k = rotate(self.heads(self.w_k(x_TD), self.k_norm), rotary)
        v = self.heads(self.w_v(x_TD), None)
        if self.context:
            q, k, v = gather_tokens(q, k, v, *self.context)
        out = attention(q, k, v, cu_seqlens, max_len, self.window)
        if self.context:
            out = gather_heads(out, *self.context)
        return self.w_out(out.reshape(len(x_TD), -1))

    def heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[T, heads * head_dim] to [T, heads, head_dim], normalised over as many values as the norm has weights."""
        if norm is not None:
            x = norm(x.view(len(x), -1, norm.size))
        return x.view(len(x), -1, self.head_dim)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer. `recompute` says what the backward pass makes anew instead of keeping: see `recompute_options`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.prenorm = config.prenorm
        self.recompute = "none"

    def forward(self, x: Tensor, rotary: Rotary, cu_seqlens: Tensor, max_len: int) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.layer(x, rotary, cu_seqlens, max_len)
        return checkpoint(
            self.layer, x, rotary, cu_seqlens, max_len, use_reentrant=False, **recompute_options(self.recompute)
        )

    # The checkpoint wraps a method and not the module, so that parameter names stay OLMo-core's and FSDP's hooks outside.
    def layer(self, x: Tensor, rotary: Rotary, cu_seqlens: Tensor, max_len: int) -> Tensor:
        if self.prenorm:
            h = x + self.attention(self.attention_norm(x), rotary, cu_seqlens, max_len)
            return h + self.feed_forward(self.feed_forward_norm(h))
        h = x + self.attention_norm(self.attention(x, rotary, cu_seqlens, max_len))
        return h + self.feed_forward_norm(self.feed_forward(h))


class LMHead(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.w_out = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled_loss = False
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.lm_head = LMHead(config)

    def hidden_states(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """[T] ids to [T, d], before the head's norm."""
        x = self.embeddings(input_ids)
        # YaRN stretches the full-attention layers only; windowed ones never look further than they were trained to.
        plain = rotary_table(self.config, self.config.llama3_rope, positions)
        yarn = self.config.yarn
        stretched = rotary_table(self.config, yarn, positions) if yarn else plain
        for block, window in zip(self.blocks, self.config.windows, strict=True):
            x = block(x, plain if window else stretched, cu_seqlens, max_len)
        return x

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        label_rows: Tensor | None = None,
        label_ids: Tensor | None = None,
        loss_denominator: float = 1.0,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(loss, losses by label row), or (logits [T, V], hidden [T, d]) without labels.

        The head's weight is read here, inside the root's forward, because FSDP has it whole only while this runs.
        """
        x = self.hidden_states(input_ids, positions, cu_seqlens, max_len)
        head = (self.lm_head.w_out or self.embeddings).weight
        if label_rows is None or label_ids is None:
            h = self.lm_head.norm(x)
            return F.linear(h, head), h
        h = self.lm_head.norm(x.index_select(0, label_rows))
        return labelled_loss(h, head, label_ids, loss_denominator, z_loss, compiled=self.compiled_loss)


def rotate(x_THD: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding, halves convention, in fp32."""
    cos, sin = rotary
    x = x_THD.float()
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x_THD.dtype)


def rotary_table(config: ModelConfig, scaling: Yarn | Llama3Rope | None, positions: Tensor) -> Rotary:
    frequencies, scale = inverse_frequencies(config.head_dim, config.rope_theta, scaling, positions.device)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos() * scale, angles.sin() * scale


@lru_cache(maxsize=16)
def inverse_frequencies(
    dim: int, theta: float, scaling: Yarn | Llama3Rope | None, device: torch.device
) -> tuple[Tensor, float]:
    """Angle per position [dim / 2] and the factor on sin and cos. YaRN (arXiv 2309.00071) slows the dimensions that turn
    less than `beta_slow` times within the old context by `factor`, keeps those above `beta_fast`, and ramps in between over
    dimensions; Llama 3.1 ramps over the number of turns."""
    with torch.inference_mode(False):
        base = 1.0 / (theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim))
        if scaling is None:
            return base, 1.0
        if isinstance(scaling, Llama3Rope):
            turns = scaling.old_context * base / (2 * math.pi)
            kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
            return (1 - kept) * base / scaling.factor + kept * base, 1.0

        def turning(times: float) -> float:
            return dim * math.log(scaling.old_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(turning(scaling.beta_fast)), 0)
        high = min(math.ceil(turning(scaling.beta_slow)), dim - 1)
        ramp = torch.arange(dim // 2, device=device, dtype=torch.float32)
        ramp = ((ramp - low) / max(high - low, 1e-3)).clamp(0, 1)
        return base / scaling.factor * ramp + base * (1 - ramp), scaling.attention_factor


def compile_blocks(model: nn.Module, device: torch.device, precision: str) -> None:
    """torch.compile for every block, before `shard`: one graph a block where the fused kernel runs (CUDA in bf16); elsewhere
    attention's loop over documents stays outside the graphs. On CUDA the loss is compiled, too.

    All blocks share the code of `Block.forward`, so its variants (windowed or not, what is recomputed, with gradients or
    without, document edges of one size or of any) count together against dynamo's limit, which is 8.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    model.compiled_loss = device.type == "cuda"  # type: ignore[assignment]
    for block in model.get_submodule("blocks").children():
        block.compile(fullgraph=device.type == "cuda" and precision == "bf16")


def missing_compiler() -> str:
    """What torch.compile needs for a GPU and does not find on this machine; empty where it finds all."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return "" if os.path.exists(header) else header


def recompute_options(mode: str) -> dict[str, Any]:
    """'full' recomputes the whole layer; 'selected' keeps the attention kernel's output, the costliest thing to redo."""
    if mode == "full":
        return {}
    keep = {torch.ops.torch_attn._varlen_attn.default} if hasattr(torch.ops.torch_attn, "_varlen_attn") else set()
    keep |= {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    }

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    return {"context_fn": partial(create_selective_checkpoint_contexts, policy)}


def initial_values(model: nn.Module, std: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) for every parameter, one at a time: ones for norms, else a truncated normal.

    Every tensor has its own generator, seeded by (seed, name): the weights depend on neither the number of ranks nor on
    the order in which they are made.
    """
    for name, parameter in model.named_parameters():
        value = torch.ones(parameter.shape)
        if parameter.dim() > 1:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)
        yield name, value
