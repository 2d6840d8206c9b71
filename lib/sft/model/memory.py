"""Estimates the GPU memory of a training run before a GPU is asked for, and the cheapest recomputation that fits.

In:  the architecture, [train], the hardware numbers, the number of GPUs and the memory of one. No torch.
Out: a `Plan`: bytes per GPU by part at the moment that needs most, and what every layer keeps for the backward pass.

Parameters, gradients and optimizer state are exact, as FSDP2 shards them (by rows of the first dimension). Activations
are the tensors that autograd keeps of this model's operations (`activation_bytes`); `tests/test_memory.py` compares
them with what torch keeps. FSDP2's buffers are those of its all-gather and reduce-scatter of one layer, with the next
`prefetch_layers` layers gathered ahead. GB = 10^9 bytes.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from dataclasses import dataclass, replace

from sft.common.errors import SftError
from sft.model import hf
from sft.model.fp8 import fp8_matrices
from sft.model.hf import DECAYS, shapes
from sft.model.trained import LORA_A, Shapes, frozen_shapes, lora_shapes, lora_targets, trained_shapes
from sft.recipe.architecture import GatedDelta, ModelConfig
from sft.recipe.schema import Hardware, Train

LOSS_CHUNK = 1024  # rows with a target whose logits are in memory at once
RULE_CHUNK = 64  # tokens of a chunk of the gated delta rule, whose products every token of it keeps
QUANTISED_BLOCK = 256  # values of 8-bit optimizer state that share one fp32 scale
SHARE = 0.92
"""The part of a GPU's memory that a plan may use. The allocator loses some of the rest to fragments (expandable segments keep
them small), and CUDA reports less memory than it has."""
# Assumed, not computed: CUDA's context with the workspaces of cuBLAS, and the buffers of one NCCL communicator.
CONTEXT = 0.8e9
COMMUNICATOR = 0.5e9
LIBRARIES = "CUDA and NCCL"
RETRY_SHARE = 0.9
"""After an out-of-memory error, the next plan needs at most this part of the bytes of the one that failed."""


@dataclass(frozen=True)
class Plan:
    parts: dict[str, int]  # bytes per GPU at the peak
    total: int
    fits: bool
    recompute: str  # 'none', 'selected', 'budget' or 'full'; 'auto' is resolved
    recompute_budget: float
    limit: int  # bytes of a GPU, of which a plan may use SHARE; 0 = not known
    keep_gathered: str = "none"  # 'none', 'weights' or 'gradients'; 'auto' is resolved
    shard_degree: int = 0  # ranks that share one copy of the weights; 0 = all; the default is resolved

    @property
    def mode(self) -> str:
        """The recomputation in words."""
        kept = f", {self.recompute_budget:.0%} of the layers keep all activations"
        return self.recompute + (kept if self.recompute == "budget" else "")

    def gathering(self, ranks: int) -> str:
        """How the weights come to the products, in words."""
        if self.keep_gathered == "none":
            return "gathered layer by layer for each pass"
        if ranks == 1:
            return "copied to the compute dtype once a step"
        return "gathered once a step" + ("; gradients are reduced once" if self.keep_gathered == "gradients" else "")

    def sharding(self, ranks: int) -> str:
        """The copies of the weights, in words; empty where all ranks share one."""
        if not 0 < self.shard_degree < ranks:
            return ""
        return f"; {ranks // self.shard_degree} copies, each over {self.shard_degree} ranks, whose gradients are summed once a step"

    def table(self) -> list[tuple[str, str]]:
        """(part, GB) rows to print, the total and the limit last."""
        rows = [(name, f"{size / 1e9:9.2f} GB") for name, size in self.parts.items()]
        limit = (
            f" of {SHARE * self.limit / 1e9:.1f} GB ({SHARE:.0%} of {self.limit / 1e9:.0f} GB)" if self.limit else ""
        )
        verdict = "" if self.fits else ": DOES NOT FIT"
        rows.append(("total", f"{self.total / 1e9:9.2f} GB{limit} per GPU{verdict}"))
        shared = f"{self.shard_degree} ranks" if self.shard_degree else "all ranks"
        choices = {
            "recomputation": self.mode,
            "kept over microbatches": self.keep_gathered,
            "weights shared by": shared,
        }
        return [*rows, *choices.items()]


def layer_modes(layers: int, recompute: str, budget: float) -> tuple[str, ...]:
    """What each layer recomputes: 'none', 'selected' (attention's output is kept) or 'full'.

    A budget is the share of layers that keep all activations. They are the last ones: their memory is free again when
    the backward pass reaches the first recomputed layer.
    """
    if recompute != "budget":
        return (recompute,) * layers
    keep = min(layers, math.floor(budget * layers + 1e-9))
    return ("selected",) * (layers - keep) + ("none",) * keep


def plan(model: ModelConfig, train: Train, hardware: Hardware, gpus_total: int, gpu_memory_gb: float) -> Plan:
    """The estimate for one GPU. `gpu_memory_gb` 0 = not known: everything fits.

    `recompute = "auto"` becomes the mode with the least work that fits: none, then as many layers as fit that keep all
    activations while the others keep attention's output, then full. If nothing fits, it is full and `fits` is False.
    `keep_gathered = "auto"` becomes "weights" where they fit with this recomputation, else "none". Where the memory is not known, one rank
    keeps copies and several keep nothing. `shard_degree` -1 becomes the ranks of a node from two nodes on where that fits with the
    recomputation of full sharding, else 0.
    """
    limit = int(gpu_memory_gb * 1e9)
    if hardware.shard_degree < 0:
        return _shard_in_nodes(model, train, hardware, gpus_total, gpu_memory_gb)
    if hardware.keep_gathered == "auto":
        return _keep_weights(model, train, hardware, gpus_total, gpu_memory_gb)
    if hardware.recompute != "auto":
        return _estimate(model, train, hardware, gpus_total, limit)
    n = model.n_layers

    def keeping(layers: int) -> Plan:
        """That many layers keep all activations. Fewer layers need less memory."""
        mode = replace(hardware, recompute="budget" if layers else "selected", recompute_budget=layers / n)
        return _estimate(model, train, mode, gpus_total, limit)

    whole = _estimate(model, train, replace(hardware, recompute="none"), gpus_total, limit)
    if whole.fits:
        return whole
    fewer = range(n - 1, -1, -1)
    at = bisect.bisect_left(fewer, True, key=lambda layers: keeping(layers).fits)
    if at < n:
        return keeping(fewer[at])
    return _estimate(model, train, replace(hardware, recompute="full"), gpus_total, limit)


def _shard_in_nodes(model: ModelConfig, train: Train, hardware: Hardware, gpus: int, gpu_memory_gb: float) -> Plan:
    """The plan for shard_degree = -1. Where the memory is not known, or where processes are no GPUs, all ranks share the weights."""
    least = plan(model, train, replace(hardware, shard_degree=0), gpus, gpu_memory_gb)
    node = gpus // hardware.nodes
    if hardware.nodes < 2 or node < 2 or gpus % hardware.nodes or not gpu_memory_gb:
        return least
    found = plan(model, train, replace(hardware, shard_degree=node), gpus, gpu_memory_gb)
    same = (found.recompute, found.recompute_budget) == (least.recompute, least.recompute_budget)
    return found if found.fits and same else least


def _keep_weights(model: ModelConfig, train: Train, hardware: Hardware, gpus: int, gpu_memory_gb: float) -> Plan:
    """The plan for keep_gathered = "auto". "gradients" gives other sums, so a recipe must name it."""
    limit = int(gpu_memory_gb * 1e9)
    least = plan(model, train, replace(hardware, keep_gathered="none"), gpus, gpu_memory_gb)
    if gpus == 1 and train.precision == "fp32":  # it computes from the parameters themselves
        return least
    if gpus > 1 and not limit:
        return least
    chosen = replace(
        hardware, keep_gathered="weights", recompute=least.recompute, recompute_budget=least.recompute_budget
    )
    found = _estimate(model, train, chosen, gpus, limit)
    return found if found.fits else least


def plan_again(
    model: ModelConfig, train: Train, hardware: Hardware, gpus_total: int, gpu_memory_gb: float, failed: int
) -> Plan:
    """The plan after a step ran out of memory with one that needs `failed` bytes: nothing is kept over microbatches, and the least
    recomputation that needs at most RETRY_SHARE of them, whatever `recompute` says; full where none does."""
    # The default of shard_degree becomes the one that needs least.
    smaller = replace(hardware, recompute="auto", keep_gathered="none", shard_degree=max(0, hardware.shard_degree))
    found = plan(model, train, smaller, gpus_total, RETRY_SHARE / SHARE * failed / 1e9)
    limit = int(gpu_memory_gb * 1e9)
    return replace(found, limit=limit, fits=not limit or found.total <= SHARE * limit)


def require(found: Plan, model: ModelConfig, train: Train, hardware: Hardware, gpus_total: int) -> Plan:
    """The plan if it fits. Raises SftError with its numbers and the first change of hardware numbers that would fit."""
    if found.fits:
        return found
    sizes = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.parts.items())
    raise SftError(
        f"[on.<cluster>.train] recompute {hardware.recompute!r}: {found.total / 1e9:.1f} GB per GPU are needed"
        f" on {gpus_total} GPUs of {found.limit / 1e9:.1f} GB, of which a plan may use {SHARE:.0%} ({sizes});"
        f" next: {_remedy(model, train, hardware, gpus_total, found.limit)}"
    )


def _remedy(model: ModelConfig, train: Train, hardware: Hardware, gpus: int, limit: int) -> str:
    def fits(train: Train = train, gpus: int = gpus, **changed: object) -> bool:
        new = replace(hardware, recompute="auto", keep_gathered="none", **changed)  # type: ignore[arg-type]
        return plan(model, train, new, gpus, limit / 1e9).fits

    if hardware.recompute != "auto" and fits():
        return "recompute=auto"
    if hardware.microbatch_tokens > train.seq_len and fits(microbatch_tokens=train.seq_len):
        return f"recompute=auto microbatch_tokens={train.seq_len}"
    if hardware.prefetch_layers > 1 and fits(prefetch_layers=1):
        return "recompute=auto prefetch_layers=1"
    if 0 < hardware.shard_degree < gpus and fits(shard_degree=0):
        return "recompute=auto shard_degree=0"
    for degree in range(hardware.context_degree + 1, min(gpus, model.n_heads) + 1):
        shared = (gpus, train.seq_len, model.n_heads, *model.shared_heads)
        if not any(count % degree for count in shared) and fits(context_degree=degree):
            return f"recompute=auto context_degree={degree}"
    for more in (2, 4, 8, 16, 32):
        if fits(gpus=gpus * more, nodes=hardware.nodes * more, shard_degree=0):
            return f"recompute=auto shard_degree=0 on {gpus * more} GPUs (nodes={hardware.nodes * more})"
    small = replace(train, optimizer="adamw8bit", gradients="bf16")
    if fits(train=small):
        return "recompute=auto optimizer=adamw8bit gradients=bf16 (changes the result)"
    if train.precision != "fp32" and train.method == "full" and fits(train=replace(small, weights="bf16")):
        return "recompute=auto optimizer=adamw8bit gradients=bf16 weights=bf16 (changes the result)"
    return "GPUs with more memory, a smaller seq_len, or a smaller model"


def _estimate(model: ModelConfig, train: Train, hardware: Hardware, gpus: int, limit: int) -> Plan:
    moments = _moments(model, train, hardware, gpus)
    if train.telemetry_every:
        moments.append(
            {"weights before the step": _stored(train) * _owned(model, train, hardware.shard_degree or gpus)}
        )
    peak = max(moments, key=lambda moment: sum(moment.values()))
    parts = _resident(model, train, hardware.shard_degree or gpus) | peak
    parts[LIBRARIES] = int(CONTEXT + COMMUNICATOR * communicators(hardware, gpus))
    total = sum(parts.values())
    fits = not limit or total <= SHARE * limit
    shares = (hardware.keep_gathered, hardware.shard_degree)
    return Plan(parts, total, fits, hardware.recompute, hardware.recompute_budget, limit, *shares)


def communicators(hardware: Hardware, gpus: int) -> int:
    """NCCL communicators of a rank that have buffers: all ranks, which also shard the weights; with copies of the weights
    those of a copy and those between copies; and a context group."""
    copies = 0 < hardware.shard_degree < gpus
    return int(gpus > 1) + 2 * copies + (hardware.context_degree > 1)


def _resident(model: ModelConfig, train: Train, ranks: int) -> dict[str, int]:
    """Bytes of what stays in memory, of a model that `ranks` share. Every rank has a Gated DeltaNet's decays whole."""
    named = trained_shapes(model, train)
    whole = _whole(named)
    trained = [shape for name, shape in named.items() if not name.endswith(DECAYS)]
    owned = _owned(model, train, ranks)
    moments = 8 * owned
    if train.optimizer == "adamw8bit":
        quantised = sum(_shard_size(shape, ranks) for shape in trained if is_quantised(shape))
        moments = 8 * (owned - quantised) + 2 * quantised + 8 * quantised // QUANTISED_BLOCK
    return {
        "parameters": _stored(train) * (owned - whole) + 4 * whole + _frozen_bytes(model, train, ranks),
        "gradients": (2 if train.gradients == "bf16" else 4) * (owned - whole) + 4 * whole,
        "optimizer state": moments,
    }


def _whole(named: Shapes) -> int:
    """Values of a Gated DeltaNet's decays."""
    return sum(shape[0] for name, shape in named.items() if name.endswith(DECAYS))


def _owned(model: ModelConfig, train: Train, ranks: int) -> int:
    """Trained values on the first of `ranks` ranks that share a model."""
    named = trained_shapes(model, train)
    return _whole(named) + sum(_shard_size(s, ranks) for name, s in named.items() if not name.endswith(DECAYS))


def _frozen_bytes(model: ModelConfig, train: Train, ranks: int) -> int:
    """Bytes of the parameters that no step changes. Every rank holds all quantised matrices."""
    replicated, width = _replicated(model, train), _width(train) if train.method == "lora" else _stored(train)
    frozen = frozen_shapes(model, train)
    divided = sum(_shard_size(shape, ranks) for name, shape in frozen.items() if name not in replicated)
    return width * divided + sum(_quantised_bytes(shape, train.base_dtype) for shape in replicated.values())


def _replicated(model: ModelConfig, train: Train) -> dict[str, tuple[int, ...]]:
    """The quantised matrices."""
    if train.base_dtype == "compute":
        return {}
    every = shapes(model)
    return {name: every[name] for name in lora_targets(model, train)}


def _quantised_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """nf4: half a byte for a value, and one for the scale of 64; else one for a value, and four for the scale of a row."""
    values = math.prod(shape)
    return values // 2 + values // 64 if dtype == "nf4" else values + 4 * shape[0]


def _dequantised_bytes(compute: int, dtype: str) -> int:
    """Bytes for each value of a matrix that is made from its codes, with those in between: fp32, and indices of nf4."""
    return compute + (12 if dtype == "nf4" else 4)


def _width(train: Train) -> int:
    """Bytes of a value in computations."""
    return 4 if train.precision == "fp32" else 2


def _stored(train: Train) -> int:
    """Bytes of a stored value of a trained parameter."""
    return 2 if train.weights == "bf16" else 4


def step_bytes(model: ModelConfig, train: Train) -> int:
    """Bytes of a step folder: weights and moments."""
    moments, stored = 2 if train.optimizer == "adamw8bit" else 8, _stored(train)
    if train.method == "full" and not (train.freeze or train.train_only):
        return (stored + moments) * model.parameters
    trained = sum(math.prod(shape) for shape in trained_shapes(model, train).values())
    return stored * (model.parameters if train.method == "full" else trained) + moments * trained


def _moments(model: ModelConfig, train: Train, hardware: Hardware, gpus: int) -> list[dict[str, int]]:
    """Bytes at the moments of a step that may need most: the end of the forward pass in the loss, the backward pass of
    the last layer and of the last recomputed one, and the reduction of the gradients of embedding and head at the
    end."""
    compute = _width(train)
    tokens = (hardware.microbatch_tokens or train.seq_len) // hardware.context_degree
    modes = layer_modes(model.n_layers, hardware.recompute, hardware.recompute_budget)
    # One process is wrapped by FSDP in bf16, unless it has copies of its weights.
    keep, copied = hardware.keep_gathered, gpus == 1 and hardware.keep_gathered != "none"
    wrapped = gpus > 1 or (compute == 2 and not copied)
    replicated, adapters = _replicated(model, train), lora_shapes(model, train)
    every = {n: s for n, s in (shapes(model) | adapters).items() if n not in replicated}
    block, root = _groups(every, wrapped)
    trained_block, trained_root = _groups(trained_shapes(model, train), wrapped)
    head = model.vocab_size * model.d_model
    head_gradient = head if hf.head_name(model) in trained_shapes(model, train) else 0
    # The input of an adapter's second factor, and a matrix that is made from its codes.
    low_rank = tokens * compute * train.lora_rank * len(adapters) // (2 * model.n_layers)
    if train.lora_dropout:  # a copy of the inputs and its mask
        low_rank += (
            tokens * (compute + 1) * sum(s[1] for n, s in adapters.items() if n.endswith(LORA_A)) // model.n_layers
        )
    made = _dequantised_bytes(compute, train.base_dtype) * max((math.prod(s) for s in replicated.values()), default=0)
    rounded = _rounded(model, tokens, hardware) if train.precision == "fp8" else 0
    by_layer = [
        activation_bytes(model, tokens, mode, compute, hardware, mixer) + (low_rank if mode == "none" else 0)
        for mode, mixer in zip(modes, model.mixers, strict=True)
    ]
    tables = len({model.layer_scaling(i) for i in range(model.n_layers) if model.has_positions(i)})
    rotary_tables = 8 * tokens * model.rotated * tables
    # Activations that no layer keeps. NEFTune's noise is there until it is added.
    outside = rotary_tables + compute * tokens * model.d_model * (2 if train.neftune_alpha else 1)
    gathered = compute * (root + (1 + hardware.prefetch_layers) * block)
    next_block = compute * block  # which the backward pass gathers ahead
    if keep != "none":
        gathered, next_block = _copies(model, train, every) if copied else compute * _values(every), 0
    unreduced = (
        {"unreduced gradients": 4 * _values(trained_shapes(model, train))} if keep == "gradients" and not copied else {}
    )
    # Of one rank with copies: a gradient of one matrix, before it is added to the stored one.
    handed_over = compute * max(map(math.prod, trained_shapes(model, train).values())) if copied and compute == 2 else 0
    loss = {
        "activations": sum(by_layer) + outside,
        "logits and loss": _loss(model, tokens, compute)
        + 4 * head_gradient
        + (compute * head_gradient if compute == 2 else 0),
        "gathered weights": gathered,
        "reduced gradients": 0,
        **unreduced,
    }
    all_of_layer = low_rank + max(
        activation_bytes(model, tokens, "none", compute, hardware, mixer) for mixer in dict.fromkeys(model.mixers)
    )
    last_recomputed = max((i for i, mode in enumerate(modes) if mode != "none"), default=0)
    backward = [
        {
            "activations": sum(by_layer[:layer])
            + outside
            + all_of_layer
            + _scratch(model, tokens, compute)
            + made
            + rounded,
            "logits and loss": compute * head_gradient,
            "gathered weights": gathered + next_block,
            "reduced gradients": (compute + 8) * trained_block + handed_over,
            **unreduced,
        }
        for layer in {model.n_layers - 1, last_recomputed}
    ]
    reduction = {
        "activations": 0,
        "logits and loss": 0,
        "gathered weights": compute * root if keep == "none" else gathered,
        "reduced gradients": (compute + 4) * trained_root + handed_over,
        **unreduced,
    }
    return [loss, *backward, reduction]


def _values(found: Shapes) -> int:
    return sum(map(math.prod, found.values()))


def _copies(model: ModelConfig, train: Train, every: Shapes) -> int:
    """Bytes of one rank's bf16 copies: of what is stored in fp32, but a Gated DeltaNet's decays."""
    if train.precision == "fp32" or train.weights == "bf16":
        return 0
    stored = trained_shapes(model, train) if train.method == "lora" else every
    return 2 * _values({name: shape for name, shape in stored.items() if not name.endswith(DECAYS)})


def _groups(found: Shapes, wrapped: bool) -> tuple[int, int]:
    """Values of the largest block and of all that is in no block, which FSDP2 gathers and reduces together."""
    blocks, root = Counter[str](), 0
    for name, shape in found.items():
        if name.startswith("blocks."):
            blocks[".".join(name.split(".")[:2])] += math.prod(shape)
        else:
            root += math.prod(shape)
    return max(blocks.values(), default=0) * wrapped, root * wrapped


def _shard_size(shape: tuple[int, ...], ranks: int) -> int:
    """Values of a parameter on the first rank: FSDP2 cuts the first dimension into equal chunks, rounded up."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def is_quantised(shape: tuple[int, ...]) -> bool:
    """Whether 8-bit AdamW stores a parameter's moments in 8 bits. Blocks are within a row, so no rank gets a part of
    one."""
    return len(shape) > 1 and shape[-1] % QUANTISED_BLOCK == 0


def activation_bytes(
    model: ModelConfig, tokens: int, mode: str, compute: int, hardware: Hardware, mixer: GatedDelta | None = None
) -> int:
    """Bytes that one layer keeps from forward to backward for `tokens` tokens of one rank. `compute` = bytes of a
    value. `mixer`: of a layer with a Gated DeltaNet."""
    d, width = model.d_model, compute
    fused = hardware.compile == "always" or (hardware.compile == "auto" and width == 2)
    if mixer is not None:
        # Selective recomputation cannot keep what these kernels return: it does not see them.
        return tokens * (width * d if mode != "none" else _gated_delta_bytes(model, mixer, width, fused))
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    # If a context group has more ranks than there are key/value heads, heads are repeated before the exchange.
    exchanged = kv * max(1, hardware.context_degree // model.n_kv_heads)
    statistics = 4 * model.n_heads
    if mode == "full":
        return tokens * width * d
    if mode == "selected":
        return tokens * (width * (d + q) + statistics)
    attention = width * (q + 2 * exchanged + q) + statistics  # the kernel's inputs and output
    normed = 2 * d + (q + kv if model.qk_norm else 0)
    rows = 2 + {"full": 2, "head": model.n_heads + model.n_kv_heads, "": 0}[model.qk_norm]
    if fused:
        # Fused: a norm keeps its input and one number per row, SwiGLU keeps its factors and product.
        norms = width * normed + 4 * rows
        return tokens * (width * 2 * d + norms + attention + width * 3 * model.intermediate_size)
    # Not fused: a norm keeps its input and quotient in fp32; SwiGLU keeps both factors, SiLU's output and the product.
    norms = 8 * normed + 4 * rows
    return tokens * (width * 2 * d + norms + attention + width * 4 * model.intermediate_size)


def _gated_delta_bytes(model: ModelConfig, mixer: GatedDelta, width: int, fused: bool) -> int:
    """Bytes that a layer with a Gated DeltaNet keeps for a token: what flash-linear-attention's functions save for the
    backward pass, and the tensors around them."""
    d, values = model.d_model, mixer.values
    channels = 2 * mixer.keys + values
    repeated = 2 * mixer.value_heads * mixer.key_dim + values  # after key heads are repeated for their value heads
    gates = 4 * 6 * mixer.value_heads  # decay, step size and what they are computed from
    kernels = width * (channels + repeated + RULE_CHUNK * mixer.value_heads) + 4 * 2 * mixer.value_heads
    if fused:
        norms, output, swiglu = width * 2 * d + 8, width * 3 * values + 4 * mixer.value_heads, 3
    else:
        norms, output, swiglu = 8 * 2 * d + 8, 4 * 5 * values + width * 3 * values + 4 * mixer.value_heads, 4
    return width * 2 * d + norms + gates + kernels + output + width * swiglu * model.intermediate_size


def _scratch(model: ModelConfig, tokens: int, compute: int) -> int:
    """Bytes of the largest set of temporary tensors in a layer's backward pass: three gradients of SwiGLU, or those of a
    Gated DeltaNet's channels with the states of all its chunks and their gradients; and two of the residual stream."""
    values = 3 * model.intermediate_size
    if mixer := model.gated_delta:
        states = 2 * mixer.value_heads * mixer.key_dim * mixer.value_dim // RULE_CHUNK
        values = max(values, states + 3 * (2 * mixer.keys + mixer.values))
    return tokens * compute * (values + 2 * model.d_model)


def _rounded(model: ModelConfig, tokens: int, hardware: Hardware) -> int:
    """Bytes of the 8-bit operands of a matrix's backward pass, by what torchao's function makes: the gradient of the outputs by rows and by
    columns, the inputs, and the weights. Without compilation there are also two fp32 copies of the one that is rounded."""
    largest = 0
    for rows, columns in fp8_matrices(model).values():
        operands = 2 * tokens * rows + tokens * columns + rows * columns
        copies = 0 if _fused(hardware) else 8 * max(tokens * rows, tokens * columns, rows * columns)
        largest = max(largest, operands + copies)
    return largest


def _fused(hardware: Hardware) -> bool:
    """Whether blocks that compute in two bytes are compiled."""
    return hardware.compile != "never"


def _loss(model: ModelConfig, tokens: int, compute: int) -> int:
    """Bytes of a chunk of logits with its gradient, and of the head's input with its gradient, if every token is
    trained."""
    logits = min(LOSS_CHUNK, tokens) * model.vocab_size * (4 if compute == 4 else 8)
    return logits + tokens * model.d_model * (8 + 3 * compute)
