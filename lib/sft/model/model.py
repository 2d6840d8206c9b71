"""Every family of sft.recipe.families on packed tokens, with OLMo-core's parameter names.

In:  token ids [T] of documents one after the other, positions [T] that restart at 0 in each document, and the document
     edges.
Out: hidden states [T, d], or the loss of the rows with a target.

There is no batch dimension: a pack is one long row, and only attention needs to know where documents end. OLMo's block
has the norms after attention and SwiGLU, h = x + norm(attn(x)), out = h + norm(ff(h)), and an RMS norm over the full
query and key projections before they are split into heads. The other families have the norms before: x + attn(norm(x)).
Biases, windows, layers without positions and tied heads are fields of ModelConfig. A hybrid has Gated DeltaNet layers
(sft.model.gated_delta) between those with attention, with the norms before.
The keys of `state_dict()` are those of an OLMo-core checkpoint, so saving needs no conversion and Hugging Face only
other names (sft.model.hf).

The ranks of a context group have consecutive parts of the row. Attention exchanges heads for tokens between them
(sft.model.context), and the document edges are those of the complete row.
"""

from __future__ import annotations

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

from sft.common.errors import SftError
from sft.model.attention import attention
from sft.model.context import gather_heads, receive_tokens, send_tokens
from sft.model.gated_delta import GatedDeltaNet, initial_vector
from sft.model.loss import cross_entropy
from sft.model.noise import named_generator
from sft.recipe.architecture import DynamicRope, LinearRope, Llama3Rope, LongRope, ModelConfig, RopeScaling, Yarn

Rotary = tuple[Tensor, Tensor]  # cos and sin, fp32 [T, 1, rotated dimensions of a head]


class RMSNorm(nn.Module):
    """RMS norm in fp32. The weight is applied before the result is cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * h).to(x.dtype)


class Attention(nn.Module):
    """`context`: (name of the process group, number of ranks) that share this row of tokens."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.window = config.layer_window(layer)
        self.context: tuple[str, int] | None = None
        self.w_q = nn.Linear(config.d_model, q, bias=config.qkv_bias)
        self.w_k = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.w_v = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.w_out = nn.Linear(q, config.d_model, bias=config.out_bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(q if full else config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(kv if full else config.head_dim, config.norm_eps)

    def forward(self, x_TD: Tensor, rotary: Rotary | None, cu_seqlens: Tensor, max_len: int) -> Tensor:
        q = self.sent(rotate(self.heads(self.w_q(x_TD), self.q_norm), rotary))
        k = self.sent(rotate(self.heads(self.w_k(x_TD), self.k_norm), rotary))
        v = self.sent(self.heads(self.w_v(x_TD), None))
        if self.context:
            q, k, v = (receive_tokens(x, self.context[0]) for x in (q, k, v))
        out = attention(q, k, v, cu_seqlens, max_len, self.window)
        if self.context:
            out = gather_heads(out, *self.context)
        projected: Tensor = self.w_out(out.reshape(len(x_TD), -1))
        return projected

    def sent(self, x_THD: Tensor) -> Tensor:
        """Under way to the ranks of the context group, while the next projection computes; the same tensor without a group."""
        return send_tokens(x_THD, *self.context) if self.context else x_THD

    def heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[T, heads * head_dim] to [T, heads, head_dim]. The norm is over as many values as it has weights."""
        if norm is not None:
            x = norm(x.view(len(x), -1, norm.size))
        return x.view(len(x), -1, self.head_dim)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.intermediate_size, bias=config.mlp_bias)
        self.w2 = nn.Linear(config.intermediate_size, config.d_model, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.d_model, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer. `recompute` is what the backward pass computes again instead of keeping: see `recompute_options`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mixer = config.layer_mixer(layer)
        self.attention = GatedDeltaNet(config, mixer) if mixer else Attention(config, layer)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.prenorm = config.is_prenorm(layer)
        self.recompute = "none"

    def forward(self, x: Tensor, rotary: Rotary | None, cu_seqlens: Tensor, max_len: int) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.layer(x, rotary, cu_seqlens, max_len)
        out: Tensor = checkpoint(
            self.layer, x, rotary, cu_seqlens, max_len, use_reentrant=False, **recompute_options(self.recompute)
        )
        return out

    # `checkpoint` wraps a method and not the module, so that parameter names stay OLMo-core's and FSDP's hooks run
    # outside.
    def layer(self, x: Tensor, rotary: Rotary | None, cu_seqlens: Tensor, max_len: int) -> Tensor:
        if self.prenorm:
            h: Tensor = x + self.attention(self.attention_norm(x), rotary, cu_seqlens, max_len)
            out: Tensor = h + self.feed_forward(self.feed_forward_norm(h))
            return out
        h = x + self.attention_norm(self.attention(x, rotary, cu_seqlens, max_len))
        out = h + self.feed_forward_norm(self.feed_forward(h))
        return out


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

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int, noise_TD: Tensor | None = None
    ) -> Tensor:
        """[T] ids to [T, d], before the final norm. `noise_TD` is added to the embeddings."""
        x: Tensor = self.embeddings(input_ids)
        if noise_TD is not None:
            x = x + noise_TD.to(x.dtype)
        # OLMo 3's YaRN applies to full-attention layers only: windowed layers attend to no distance that they were not
        # trained on.
        tables: dict[RopeScaling | None, Rotary] = {}
        for layer, block in enumerate(self.blocks):
            rotary = None
            if self.config.has_positions(layer):
                scaling = self.config.layer_scaling(layer)
                if scaling not in tables:
                    tables[scaling] = rotary_table(self.config, scaling, positions, cu_seqlens)
                rotary = tables[scaling]
            x = block(x, rotary, cu_seqlens, max_len)
        return x

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        target_rows: Tensor | None = None,
        target_ids: Tensor | None = None,
        loss_denominator: float = 1.0,
        z_loss: float = 0.0,
        noise_TD: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, losses by target row), or (logits [T, V], hidden [T, d]) without targets. `row_weights`: of the target rows.

        The output matrix is read here, in the root's forward, because FSDP gathers it only while this runs.
        """
        x = self.hidden_states(input_ids, positions, cu_seqlens, max_len, noise_TD)
        head = (self.lm_head.w_out or self.embeddings).weight
        if target_rows is None or target_ids is None:
            h = self.lm_head.norm(x)
            return F.linear(h, head), h
        h = self.lm_head.norm(x.index_select(0, target_rows))
        compiled = self.compiled_loss
        return cross_entropy(h, head, target_ids, loss_denominator, z_loss, compiled=compiled, row_weights=row_weights)


def rotate(x_THD: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotary embedding in fp32, in the convention that rotates the first half of a head against the second. Dimensions of
    a head beyond the table's stay as they are; None rotates nothing."""
    if rotary is None:
        return x_THD
    cos, sin = rotary
    size = cos.shape[-1]
    x = x_THD.float()
    rotated, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    low, high = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-high, low), dim=-1) * sin
    return (rotated if rest is None else torch.cat((rotated, rest), dim=-1)).to(x_THD.dtype)


def rotary_table(config: ModelConfig, scaling: RopeScaling | None, positions: Tensor, cu_seqlens: Tensor) -> Rotary:
    """cos and sin for positions [T]."""
    dim, device = config.rotated, positions.device
    if isinstance(scaling, DynamicRope | LongRope):
        frequencies, scale = frequencies_by_length(dim, config.rope_theta, scaling, positions, cu_seqlens)
    else:
        frequencies, scale = inverse_frequencies(dim, config.rope_theta, scaling, device)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos() * scale, angles.sin() * scale


def frequencies_by_length(
    dim: int, theta: float, scaling: DynamicRope | LongRope, positions: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, float]:
    """Angles per position [T, dim / 2] that depend on the length of a token's document, and the factor on sin and cos.

    A document has the frequencies that it has alone, whatever else is in its pack. Raises SftError for a row that several
    ranks share, as a rank does not know where its part begins.
    """
    lengths = cu_seqlens.diff().long()
    by_token = torch.repeat_interleave(lengths, lengths)
    if len(by_token) != len(positions):
        raise SftError(
            f"{type(scaling).__name__} depends on the length of documents: {len(positions)} tokens on a rank, {len(by_token)}"
            " in its row; next: context_degree = 1"
        )
    base = theta ** (torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    if isinstance(scaling, LongRope):
        short, long = (torch.tensor(f, device=positions.device) for f in (scaling.short, scaling.long))
        is_long = (by_token > scaling.old_context)[:, None]
        return torch.where(is_long, 1.0 / (long * base), 1.0 / (short * base)), scaling.attention
    longest = by_token.clamp(min=scaling.old_context).double()
    growth = scaling.factor * longest / scaling.old_context - (scaling.factor - 1)
    grown = (theta * growth ** (dim / (dim - 2)))[:, None]
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    return (1.0 / grown**exponents).float(), 1.0


@lru_cache(maxsize=16)
def inverse_frequencies(
    dim: int, theta: float, scaling: LinearRope | Yarn | Llama3Rope | None, device: torch.device
) -> tuple[Tensor, float]:
    """Angle per position [dim / 2], and the factor on sin and cos.

    YaRN (arXiv 2309.00071) divides the frequency of dimensions that turn less than `beta_slow` times within the old
    context by `factor`, keeps those that turn more than `beta_fast` times, and interpolates over the dimensions between
    them. Llama 3.1 interpolates over the number of turns.
    """
    with torch.inference_mode(False):
        base = 1.0 / (theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim))
        if scaling is None:
            return base, 1.0
        if isinstance(scaling, LinearRope):
            return base / scaling.factor, 1.0
        if isinstance(scaling, Llama3Rope):
            turns = scaling.old_context * base / (2 * math.pi)
            keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
            return (1 - keep) * base / scaling.factor + keep * base, 1.0

        def dimension(times: float) -> float:
            """The dimension that turns this many times within the old context."""
            return dim * math.log(scaling.old_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = torch.arange(dim // 2, device=device, dtype=torch.float32)
        ramp = ((ramp - low) / ((high - low) or 1e-3)).clamp(0, 1)
        return base / scaling.factor * ramp + base * (1 - ramp), scaling.attention_factor


def compile_blocks(model: nn.Module, device: torch.device, precision: str) -> None:
    """torch.compile for every block; call it before `shard`. With the fused kernel (CUDA in bf16) a block with
    attention is one graph. Elsewhere attention's loop over documents is not part of the graphs, and a Gated DeltaNet's
    kernels never are. On CUDA the loss is compiled too.

    All blocks share the code of `Block.forward`. Its variants (windowed or not, what is recomputed, with or without
    gradients, document edges of one size or of any) therefore count together against dynamo's limit, which is 8 by
    default.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    model.compiled_loss = device.type == "cuda"  # type: ignore[assignment]
    for block in model.get_submodule("blocks").children():
        whole = device.type == "cuda" and precision != "fp32" and isinstance(block.attention, Attention)
        block.compile(fullgraph=whole)


def missing_compiler() -> str:
    """What torch.compile needs for a GPU and this machine does not have; empty if nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return "" if os.path.exists(header) else header


def recompute_options(mode: str) -> dict[str, Any]:
    """'full' recomputes the layer. 'selected' keeps the attention kernel's output, which costs most to recompute."""
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
    """(name, complete fp32 tensor) for every parameter, one at a time: ones for norms, zeros for biases, `initial_vector`
    for a Gated DeltaNet's decays, else a truncated normal.

    Every tensor has its own generator, seeded by (seed, name). The weights depend neither on the number of ranks nor on
    the order in which they are made.
    """
    for name, parameter in model.named_parameters():
        yield name, initial_value(name, tuple(parameter.shape), std, seed)


def initial_value(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """The complete initial tensor of a parameter."""
    value = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    generator = named_generator(seed, name)
    if (vector := initial_vector(name, value.numel(), generator)) is not None:
        return vector
    if value.dim() > 1:
        nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)
    return value
