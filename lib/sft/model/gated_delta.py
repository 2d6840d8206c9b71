"""Gated DeltaNet over packed documents (arXiv 2412.06464), the mixer of most layers of a hybrid.

In:  hidden states [T, d] of documents one after the other, and the document edges.
Out: [T, d]. Each head has a state S [key dim, value dim], which is zero before a document's first token:

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(key dim)

Queries, keys and values pass through a causal convolution of a few tokens and SiLU; queries and keys then have length 1.
The decay g = -exp(A_log) softplus(a + dt_bias) and the step size beta = 2 sigmoid(b) are fp32 in every precision. The
output is normalised per head and multiplied by SiLU of a gate.

On CUDA in bf16, flash-linear-attention computes the convolution and the rule; elsewhere PyTorch does, document by document,
so that a packed document gives bitwise the same result as the document alone. Parameter names are OLMo-core's.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.common.errors import SftError
from sft.model.context import gather_heads, gather_parts, rank_in
from sft.recipe.architecture import GatedDelta, ModelConfig

CHUNK = 64  # tokens of a document that are computed at once
NORM_EPS = 1e-6  # of the length of queries and keys, as in flash-linear-attention
FLA = "flash-linear-attention"


class Row(NamedTuple):
    """What the rule reads of a row of documents, for some of the heads: queries, keys and values before the convolution
    [T, channels], log decay and step size [T, value heads] in fp32, and the convolutions' weights [channels, width]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor


class Convolution(nn.Module):
    """The weights of a depthwise convolution, in Conv1d's shape."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))


class GatedNorm(nn.Module):
    """RMS norm of a head's values times SiLU of the gate, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * h * F.silu(gate.float())).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """`context`: (name of the process group, number of ranks) that share this row of tokens. Each has some of the
    heads."""

    def __init__(self, config: ModelConfig, mixer: GatedDelta) -> None:
        super().__init__()
        self.mixer = mixer
        self.context: tuple[str, int] | None = None
        linear = functools.partial(nn.Linear, config.d_model, bias=False)
        self.w_q, self.w_k, self.w_v = linear(mixer.keys), linear(mixer.keys), linear(mixer.values)
        self.w_a, self.w_b = linear(mixer.value_heads), linear(mixer.value_heads)
        self.A_log = nn.Parameter(torch.zeros(mixer.value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(mixer.value_heads))
        self.q_conv1d = Convolution(mixer.keys, mixer.conv_width)
        self.k_conv1d = Convolution(mixer.keys, mixer.conv_width)
        self.v_conv1d = Convolution(mixer.values, mixer.conv_width)
        self.w_g = linear(mixer.values)
        self.o_norm = GatedNorm(mixer.value_dim, mixer.norm_eps)
        self.w_out = nn.Linear(mixer.values, config.d_model, bias=False)

    def replicated(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The two vectors that every rank keeps whole in fp32 (sft.model.parallel). In bf16, half a step of `dt_bias` near
        -5 changes a decay by 1.6 %."""
        return self.A_log, self.dt_bias

    def forward(self, x_TD: Tensor, rotary: object, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """The same arguments as attention's; a recurrence needs no positions and no longest document."""
        decay = -self.A_log.float().exp() * F.softplus(self.w_a(x_TD).float() + self.dt_bias.float())
        beta = self.w_b(x_TD).float().sigmoid() * (2 if self.mixer.negative_eigenvalues else 1)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        w_q, w_k, w_v = (module.weight.squeeze(1) for module in convolutions)
        row = Row(self.w_q(x_TD), self.w_k(x_TD), self.w_v(x_TD), decay, beta, w_q, w_k, w_v)
        if self.context:
            row = _own_heads(row, *self.context)
        out = mix(row, cu_seqlens, self.mixer)
        if self.context:
            out = gather_heads(out, *self.context)
        gate = self.w_g(x_TD).view(len(x_TD), -1, self.mixer.value_dim)
        projected: Tensor = self.w_out(self.o_norm(out, gate).flatten(1))
        return projected


def _own_heads(row: Row, group: str, ranks: int) -> Row:
    """The complete row for this rank's heads, from this rank's tokens for all heads."""
    q, k, v = gather_parts((row.q, row.k, row.v), group, ranks)
    decay, beta = gather_parts((row.decay, row.beta), group, ranks)
    rank = rank_in(group)
    w_q, w_k, w_v = (weight.chunk(ranks)[rank] for weight in (row.w_q, row.w_k, row.w_v))
    return Row(q, k, v, decay, beta, w_q, w_k, w_v)


def mix(row: Row, cu_seqlens: Tensor, mixer: GatedDelta) -> Tensor:
    """Convolutions and rule: [T, value heads of this row, value dim]."""
    fused = row.q.is_cuda and row.q.dtype in (torch.bfloat16, torch.float16)
    return (_mix_fused if fused else _mix_by_document)(row, cu_seqlens, mixer)


def missing_kernels(config: ModelConfig) -> str:
    """Why a GPU cannot train this model in bf16; empty if it can."""
    if config.gated_delta is None or importlib.util.find_spec("fla") is not None:
        return ""
    return (
        f"[model] Gated DeltaNet layers need the package {FLA} on a GPU, which is not installed;"
        " next: pip install -e '.[hybrid]'"
    )


def _heads(x: Tensor, dim: int, heads: int) -> Tensor:
    """[T, channels] to [T, heads, dim]; a key head is repeated for the value heads that use it."""
    x = x.view(len(x), -1, dim)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


# --- flash-linear-attention


def _fused(row: Row, cu_seqlens: Tensor, mixer: GatedDelta) -> Tensor:
    try:
        from fla.modules.convolution import causal_conv1d  # start-up: imports triton, and only GPUs have it
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise SftError(
            f"[model] Gated DeltaNet layers need the package {FLA} on a GPU ({error}); next: pip install -e '.[hybrid]'"
        ) from error
    edges = _document_edges(cu_seqlens)
    q, k, v = (
        causal_conv1d(x=x[None], weight=weight, bias=None, activation="silu", cu_seqlens=edges)[0][0]
        for x, weight in ((row.q, row.w_q), (row.k, row.w_k), (row.v, row.w_v))
    )
    heads = row.decay.shape[1]
    out, _ = chunk_gated_delta_rule(
        q=_heads(q, mixer.key_dim, heads)[None],
        k=_heads(k, mixer.key_dim, heads)[None],
        v=_heads(v, mixer.value_dim, heads)[None],
        g=row.decay[None],
        beta=row.beta[None],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=edges,
    )
    found: Tensor = out[0]
    return found


_LAST_EDGES: list[tuple[Tensor, int, Tensor]] = []


def _document_edges(cu_seqlens: Tensor) -> Tensor:
    """The edges without the empty documents that pad them. All layers of a microbatch get the same tensor: the kernels
    derive their tables of chunks once for each."""
    for tensor, version, known in _LAST_EDGES:
        if tensor is cu_seqlens and tensor._version == version:
            return known
    edges: Tensor = torch.unique_consecutive(cu_seqlens)
    _LAST_EDGES[:] = [(cu_seqlens, cu_seqlens._version, edges)]
    return edges


# --- PyTorch


def _by_document(row: Row, cu_seqlens: Tensor, mixer: GatedDelta) -> Tensor:
    positions = _positions(cu_seqlens, len(row.q))
    heads = row.decay.shape[1]
    q, k, v = (
        _heads(short_convolution(x, weight, positions), dim, heads)
        for x, weight, dim in (
            (row.q, row.w_q, mixer.key_dim),
            (row.k, row.w_k, mixer.key_dim),
            (row.v, row.w_v, mixer.value_dim),
        )
    )
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    parts = zip(*(x.split(lengths) for x in (q, k, v, row.decay, row.beta)), strict=True)
    return torch.cat([gated_delta_rule(*part) for part in parts])


# A loop over documents is not traced: its number of iterations changes with every row.
_mix_fused: Callable[[Row, Tensor, GatedDelta], Tensor] = torch.compiler.disable(_fused)
_mix_by_document: Callable[[Row, Tensor, GatedDelta], Tensor] = torch.compiler.disable(_by_document)


def _positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The position of every token in its document [T, 1]."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=tokens)
    return (torch.arange(tokens, device=cu_seqlens.device) - starts)[:, None]


def short_convolution(x_TC: Tensor, weight_CW: Tensor, positions_T1: Tensor) -> Tensor:
    """SiLU of the sum over a token and those before it in its document, each channel with its own weights. The last
    weight is the token's own."""
    x, weight = x_TC.float(), weight_CW.float()
    total = x * weight[:, -1]
    for back in range(1, weight.shape[1]):
        earlier = F.pad(x, (0, 0, back, 0))[: len(x)]
        total = total + torch.where(positions_T1 >= back, earlier, 0) * weight[:, -1 - back]
    return F.silu(total).to(x_TC.dtype)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The rule over one document: q, k [L, H, K], v [L, H, V], decay and beta [L, H], to [L, H, V].

    Within a chunk, let b be the running sum of the decay and u_t the vector that token t adds to the state (in place of
    its value). Then (1 + A) u = beta (v - exp(b) k S), with A_ts = beta_t exp(b_t - b_s) k_t k_s for s < t, where S is the
    state before the chunk. One triangular system gives u for all tokens of a chunk; the state passes from chunk to chunk.
    """
    length, heads, key_dim = q.shape
    dtype = q.dtype
    size = min(CHUNK, length)
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v, b, beta = (_chunks(x.to(exact), size) for x in (q, k, v, decay[..., None], beta[..., None]))
    q, k = _unit(q) * key_dim**-0.5, _unit(k)
    b = b.cumsum(-2)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (b - b.mT).masked_fill(~causal, -math.inf).exp()  # the decay from token s to token t
    system = beta * (k @ k.mT) * between
    read = torch.cat((beta * v, beta * b.exp() * k), dim=-1)
    own, of_state = torch.linalg.solve_triangular(system, read, upper=False, unitriangular=True).split(
        (v.shape[-1], key_dim), dim=-1
    )
    within, q = (q @ k.mT) * between, q * b.exp()
    k, left = k * (b[..., -1:, :] - b).exp(), b[..., -1:, :].exp()
    state = q.new_zeros(heads, key_dim, v.shape[-1])
    outs = []
    for i in range(q.shape[1]):
        added = own[:, i] - of_state[:, i] @ state
        outs.append(q[:, i] @ state + within[:, i] @ added)
        state = state * left[:, i] + k[:, i].mT @ added
    return torch.cat(outs, dim=1)[:, :length].transpose(0, 1).to(dtype)


def _chunks(x: Tensor, size: int) -> Tensor:
    """[L, H, D] to [H, chunks, size, D]; the last chunk is filled with zeros, which change no state."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -len(x) % size))
    return padded.view(-1, size, *x.shape[1:]).permute(2, 0, 1, 3)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def initial_vector(name: str, size: int, generator: torch.Generator) -> Tensor | None:
    """Initial values of `A_log` and `dt_bias`, as OLMo-core draws them: decays between 0 and 16, and steps between 0.001
    and 0.1 evenly by their logarithm. None for another parameter."""
    if name.endswith(".A_log"):
        return torch.empty(size).uniform_(0, 16, generator=generator).log()
    if name.endswith(".dt_bias"):
        low, high = math.log(0.001), math.log(0.1)
        step = torch.empty(size).uniform_(low, high, generator=generator).exp().clamp(min=1e-4)
        return step + torch.log(-torch.expm1(-step))  # softplus turns it into the step again
    return None
