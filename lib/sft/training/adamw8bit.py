"""AdamW with less memory: moments in 8 bits, gradients and weights stored in bfloat16.

In:  fp32 or bfloat16 parameters, plain or sharded by rows.
Out: `LowMemoryAdamW`, which is used like the fused AdamW and skips steps on the device like it (`found_inf`);
     `keep_gradients_in_bf16`, after which a parameter's gradient is rounded once it is reduced.

8-bit moments (arXiv 2110.02861, with torchao's scale): 256 values of a row share one fp32 scale, and each is a code for
one of 256 values of a dynamic scale. A block never crosses a row, and ranks divide matrices by rows, so the state, its
checkpoint and the training are the same on any number of ranks. Vectors, and matrices whose rows 256 does not divide,
keep fp32 moments. A step computes in fp32, and rounds a weight that is stored in bfloat16 by `sft.training.rounding`.

Compiled, a step is one pass over a matrix. Otherwise it updates a part at a time, so that its fp32 temporaries stay
small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft.model.memory import QUANTISED_BLOCK, is_quantised
from sft.model.torchao_import import importing_torchao
from sft.training.rounding import Place, bits, round_to_bf16

CHUNK = 1 << 24  # values of a parameter that are updated at once, unless compiled
MOMENTS = ("exp_avg", "exp_avg_sq")


class Scale(NamedTuple):
    """The meaning of the 256 codes of a moment, as a share of its block's largest value."""

    values: Tensor  # [256], ascending
    borders: Tensor  # [255], halfway between neighbours


class Moment(NamedTuple):
    """A moment of some values of a parameter, in fp32 or as codes."""

    values: Tensor  # fp32 [N], or uint8 codes [blocks, 256]
    largest: Tensor | None  # of codes: the largest absolute value of every block [blocks, 1]

    def part(self, rows: slice) -> Moment:
        return Moment(self.values[rows], None if self.largest is None else self.largest[rows])


class Operands(NamedTuple):
    """What a step reads and writes of some values of a parameter: views of one shape, [N] or [blocks, 256]."""

    parameter: Tensor
    gradient: Tensor
    first: Moment
    second: Moment
    place: Place | None = None  # of a parameter in bfloat16

    def chunks(self) -> Iterator[Operands]:
        """Parts of at most CHUNK values, in their order."""
        step = max(1, CHUNK // self.parameter[0].numel())
        for start in range(0, len(self.parameter), step):
            rows = slice(start, start + step)
            place = self.place
            if place is not None:
                place = Place(place.salt, place.first + start * self.parameter[0].numel())
            moments = (self.first.part(rows), self.second.part(rows))
            yield Operands(self.parameter[rows], self.gradient[rows], *moments, place)


class Options(NamedTuple):
    """AdamW's constants."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def _scales(device: torch.device) -> tuple[Scale, Scale]:
    """The scales of both moments. The second moment has no negative values. Raises SftError without torchao."""
    with importing_torchao("optimizer 'adamw8bit'", "optimizer=adamw"):
        from torchao.optim import quant_utils  # start-up: torchao takes a second, and is needed for 8-bit moments only

    def scale(signed: bool) -> Scale:
        values = torch.tensor(quant_utils.create_dynamic_map(signed=signed), device=device)
        return Scale(values, (values[1:] + values[:-1]) / 2)

    return scale(signed=True), scale(signed=False)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW over parameters whose gradients may have any dtype. A step with `found_inf` = 1 changes nothing."""

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],  # or groups of them
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        eight_bit: bool,
        compiled: bool = False,
        places: Mapping[Tensor, Place] | None = None,
    ) -> None:
        """`eight_bit`: moments of matrices are stored in 8 bits. `compiled`: the update is compiled. `places`: of the
        parameters in bfloat16. Raises SftError without torchao."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.scales = _scales(self.param_groups[0]["params"][0].device) if eight_bit else None
        self.compiled = compiled
        self.places = places or {}
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **self._moments(p)}

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        if self.scales is None or not is_quantised(tuple(p.shape)):
            return {name: torch.zeros_like(p, dtype=torch.float32) for name in MOMENTS}
        if isinstance(p, DTensor):
            blocks: Tensor = _scales_like(p)
        else:
            blocks = torch.zeros_like(p[..., ::QUANTISED_BLOCK], dtype=torch.float32)
        return {name: torch.zeros_like(p, dtype=torch.uint8) for name in MOMENTS} | {
            f"{name}_scale": torch.zeros_like(blocks) for name in MOMENTS
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            device = group["params"][0].device
            lr = torch.full((), group["lr"], device=device)
            skip = torch.full((), False, device=device) if self.found_inf is None else self.found_inf.to(device) > 0
            beta1, beta2 = group["betas"]
            options = Options(beta1, beta2, group["eps"], group["weight_decay"])
            for p in group["params"]:
                if p.grad is not None and _local(p).numel():
                    self._update(p, lr, skip, options)

    def _update(self, p: Tensor, lr: Tensor, skip: Tensor, options: Options) -> None:
        """Updates this rank's part of a parameter."""
        operands, step = self._operands(p), _local(self.state[p]["step"])
        step += ~skip
        scales = self.scales if operands.first.largest is not None else None
        if not self.compiled:
            for chunk in operands.chunks():
                update(chunk, scales, step, skip, lr, options)
            return
        for tensor in (operands.parameter, operands.gradient, *operands.first, *operands.second):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        _compiled_update()(operands, scales, step, skip, lr, options)

    def _operands(self, p: Tensor) -> Operands:
        """This rank's part of a parameter: as blocks of values where its moments are codes, else as one row of
        values."""
        assert p.grad is not None
        state = {name: _local(value) for name, value in self.state[p].items()}
        eight_bit = f"{MOMENTS[0]}_scale" in state
        shape = (-1, QUANTISED_BLOCK) if eight_bit else (-1,)
        first, second = (
            Moment(state[name].view(shape), state[f"{name}_scale"].view(-1, 1) if eight_bit else None)
            for name in MOMENTS
        )
        place = self.places.get(p)
        return Operands(_local(p).detach().view(shape), _local(p.grad).reshape(shape), first, second, place)


def update(
    operands: Operands, scales: tuple[Scale, Scale] | None, step: Tensor, skip: Tensor, lr: Tensor, options: Options
) -> None:
    """One step of AdamW, in place. `scales`: of both moments where they are codes. `step`: the number of steps taken,
    with this one. `skip` (a bool on the device): nothing changes. The scalars are tensors so that a new value compiles
    nothing again."""
    p, gradient = operands.parameter, operands.gradient.float()
    first = _update_moment(operands.first, gradient, options.beta1, scales[0] if scales else None, skip)
    second = _update_moment(operands.second, gradient.square(), options.beta2, scales[1] if scales else None, skip)
    count = step.clamp(min=1)
    denominator = second.sqrt() / (1 - options.beta2**count).sqrt() + options.eps
    change = (first / denominator) * (lr / (1 - options.beta1**count))
    value = p.float() * (1 - lr * options.weight_decay) - change
    if operands.place is not None:
        value = round_to_bf16(value, bits(operands.place, step, value))
    _put(p, value, skip)


def _update_moment(moment: Moment, new: Tensor, beta: float, scale: Scale | None, skip: Tensor) -> Tensor:
    """Stores the moving average of a moment and `new`, and returns it in fp32, before it is rounded to codes."""
    if scale is None or moment.largest is None:
        value = torch.lerp(moment.values, new, 1 - beta)
        _put(moment.values, value, skip)
        return value
    value = torch.lerp(scale.values[moment.values.int()] * moment.largest, new, 1 - beta)
    largest = value.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    codes = torch.bucketize(value / largest, scale.borders, right=True, out_int32=True)
    _put(moment.values, codes.to(torch.uint8), skip)
    _put(moment.largest, largest, skip)
    return value


@lru_cache(maxsize=1)
def _compiled_update() -> Callable[..., None]:
    return torch.compile(update, fullgraph=True)


def _put(target: Tensor, value: Tensor, skip: Tensor) -> None:
    target.copy_(torch.where(skip, target, value))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _scales_like(p: DTensor) -> DTensor:
    """A zero for every block of a sharded matrix, on the rank that has the block's row."""
    local = p.to_local()
    shape = torch.Size((*p.shape[:-1], p.shape[-1] // QUANTISED_BLOCK))
    values = local.new_zeros((*local.shape[:-1], shape[-1]), dtype=torch.float32)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def keep_gradients_in_bf16(parameters: Iterable[Tensor]) -> None:
    """From now on a gradient is stored in bfloat16 as soon as it is reduced. Sums over microbatches are rounded too."""

    def round_off(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad.to(torch.bfloat16)

    for p in parameters:
        p.grad_dtype = None  # any: FSDP sets an fp32 gradient, and the hook rounds it
        p.register_post_accumulate_grad_hook(round_off)
