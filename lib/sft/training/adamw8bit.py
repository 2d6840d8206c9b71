"""AdamW with less memory: moments in 8 bits, gradients that wait in bfloat16.

In:  fp32 parameters, plain or sharded by rows. Out: `LowMemoryAdamW`, stepped like the fused AdamW and skipping on the device
     like it (`found_inf`); `keep_gradients_in_bf16`, after which a parameter's gradient is rounded once it is reduced.

8-bit moments (arXiv 2110.02861, the scale is torchao's): 256 values of a row share one fp32 scale, and each is one of 256
steps of a dynamic scale. A block never crosses a row and rows are what ranks divide, so the state, its checkpoint and what
follows are the same on any number of ranks. Vectors, and rows that 256 does not divide, keep fp32 moments.

Compiled, a step is one pass over a matrix. Otherwise it takes a part at a time, so that its fp32 temporaries stay small.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft.common.errors import SftError
from sft.model.memory import QUANTISED_BLOCK, is_quantised

CHUNK = 1 << 24  # values of a parameter that are updated at once, unless compiled
MOMENTS = ("exp_avg", "exp_avg_sq")
Scale = tuple[Tensor, Tensor]  # the values of the codes [256], the borders between them [255]


def _scales(device: torch.device) -> list[Scale]:
    """What the codes of each moment mean."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports every kernel that this machine cannot load
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise SftError(
            f"[train] optimizer 'adamw8bit' needs the package torchao ({error}); next: pip install torchao, or optimizer=adamw"
        ) from error
    values = [
        torch.tensor(quant_utils.create_dynamic_map(signed=name == MOMENTS[0]), device=device) for name in MOMENTS
    ]
    return [(v, (v[1:] + v[:-1]) / 2) for v in values]


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW over fp32 parameters whose gradients may be of any dtype. `found_inf` = 1 makes a step change nothing."""

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        eight_bit: bool,
        compiled: bool = False,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.scales = _scales(self.param_groups[0]["params"][0].device) if eight_bit else []
        self.compiled = compiled
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **self._moments(p)}

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        if not self.scales or not is_quantised(tuple(p.shape)):
            return {name: torch.zeros_like(p) for name in MOMENTS}
        blocks = torch.zeros_like(p[..., ::QUANTISED_BLOCK]) if not isinstance(p, DTensor) else _scales_like(p)
        return {name: torch.zeros_like(p, dtype=torch.uint8) for name in MOMENTS} | {
            f"{name}_scale": torch.zeros_like(blocks) for name in MOMENTS
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            device = group["params"][0].device
            lr = torch.full((), group["lr"], device=device)
            skip = torch.full((), False, device=device) if self.found_inf is None else self.found_inf.to(device) > 0
            constants = (*group["betas"], group["eps"], group["weight_decay"])
            for p in group["params"]:
                if p.grad is None or not _local(p).numel():
                    continue
                state = {name: _local(value) for name, value in self.state[p].items()}
                step = state["step"]
                step += ~skip
                eight_bit = f"{MOMENTS[0]}_scale" in state
                scales = self.scales if eight_bit else []
                # As blocks of values, or as one row of them; scales are one for each block.
                shape = (-1, QUANTISED_BLOCK) if eight_bit else (-1,)
                tensors = [_local(p).detach().view(shape), _local(p.grad).reshape(shape)]
                tensors += [state[name].view(shape) for name in MOMENTS]
                tensors += [state[f"{name}_scale"].view(-1, 1) for name in MOMENTS if eight_bit]
                if self.compiled:
                    for tensor in tensors:
                        torch._dynamo.maybe_mark_dynamic(tensor, 0)
                    _compiled_update()(tensors, scales, step, skip, lr, constants)
                    continue
                rows = max(1, CHUNK // tensors[0][0].numel())
                for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                    update(parts, scales, step, skip, lr, constants)


def update(
    tensors: Sequence[Tensor],
    scales: Sequence[Scale],
    step: Tensor,
    skip: Tensor,
    lr: Tensor,
    constants: tuple[float, float, float, float],
) -> None:
    """One step of some parameters. `tensors`: they, their gradients and two moments, all of one shape, [N] or [blocks, 256]; with
    `scales` the moments are codes, and the largest value [blocks, 1] of each block of both follows. `constants`: both betas,
    eps, weight decay."""
    p, grad, *moments = tensors
    grad = grad.float()
    *betas, eps, weight_decay = constants
    values = []
    for i, (beta, new) in enumerate(zip(betas, (grad, grad.square()), strict=True)):
        old = scales[i][0][moments[i].int()] * moments[2 + i] if scales else moments[i]
        values.append(torch.lerp(old, new, 1 - beta))
        if scales:
            largest = values[i].abs().amax(-1, keepdim=True).clamp(min=1e-12)
            codes = torch.bucketize(values[i] / largest, scales[i][1], right=True, out_int32=True)
            _put(moments[i], codes.to(torch.uint8), skip)
            _put(moments[2 + i], largest, skip)
        else:
            _put(moments[i], values[i], skip)
    count = step.clamp(min=1)
    denominator = values[1].sqrt() / (1 - betas[1] ** count).sqrt() + eps
    change = (values[0] / denominator) * (lr / (1 - betas[0] ** count))
    _put(p, p * (1 - lr * weight_decay) - change, skip)


@lru_cache(maxsize=1)
def _compiled_update() -> Callable[..., None]:
    return torch.compile(update, fullgraph=True)


def _put(target: Tensor, value: Tensor, skip: Tensor) -> None:
    target.copy_(torch.where(skip, target, value))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _scales_like(p: DTensor) -> DTensor:
    """A zero for every block of a sharded matrix, on the rank that holds the block's row."""
    local = p.to_local()
    shape = torch.Size((*p.shape[:-1], p.shape[-1] // QUANTISED_BLOCK))
    values = local.new_zeros((*local.shape[:-1], shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def keep_gradients_in_bf16(parameters: Iterable[Tensor]) -> None:
    """From now on a gradient is stored in bfloat16 as soon as it is reduced; sums over microbatches are rounded to it."""

    def round_off(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad.to(torch.bfloat16)

    for p in parameters:
        p.grad_dtype = None  # any: FSDP hands over fp32, then this rounds
        p.register_post_accumulate_grad_hook(round_off)
