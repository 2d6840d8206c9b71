"""The learning rate as a function of the step, AdamW, gradient clipping, and the guard against bad steps.

In:  schema.Train and the model's parameters (plain or sharded).
Out: an AdamW whose state exists from the start, so that a checkpoint can be loaded into it; a `Guard` that decides on
     the device, without waiting for the host, whether a step may change the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sft.model.adapters import trained_parameters
from sft.model.hf import DECAYS
from sft.model.trained import matched
from sft.packing.steps import warmup_steps
from sft.recipe.schema import Train
from sft.training.adamw8bit import LowMemoryAdamW, keep_gradients_in_bf16
from sft.training.rounding import Place, place_of


@dataclass(frozen=True)
class Start:
    """Where a run that continues another one begins: the number of finished steps, and the learning rate of the last of
    them (0 where no schedule reads it)."""

    step: int
    lr: float

    def to_value(self) -> dict[str, float]:
        return {"step": self.step, "lr": self.lr}

    @classmethod
    def of(cls, value: Mapping[str, float]) -> Start:
        """From what `to_value` returned."""
        return cls(int(value["step"]), value["lr"])


def learning_rate(step: int, steps: int, train: Train, start: Start | None = None) -> float:
    """The learning rate of step 1..steps: a linear warm-up, then a decay to `final_lr_fraction` of the peak, which step
    `steps + 1` would reach. "wsd" stays at the peak until the last `decay_fraction` of the steps (arXiv 2404.06395;
    shape "sqrt": 1 - sqrt, arXiv 2405.18392).

    OLMo-core's schedulers reach the end at the last step, which then learns nothing at a rate of 0. In the decay a step
    here has the rate that the step before it has there.

    start: of a run that continues another one. `continue_schedule` says what follows: "constant" stays at its rate,
    "decayed" falls from its rate to `final_lr_fraction` of that, "rewarmed" has a warm-up and `schedule` over the
    remaining steps (arXiv 2308.04014), and "recipe" has `schedule` over all steps.
    """
    if start is not None and train.continue_schedule == "rewarmed":
        step, steps = step - start.step, steps - start.step
    if start is not None and train.continue_schedule == "constant":
        return start.lr
    if start is not None and train.continue_schedule == "decayed":
        left = _left((step - 1 - start.step) / (steps - start.step), train.decay_shape)
        return start.lr * (train.final_lr_fraction + (1 - train.final_lr_fraction) * left)
    warmup = warmup_steps(train, steps)
    if step <= warmup:
        return train.lr * step / warmup
    wsd = train.schedule == "wsd"
    decay = max(1, round(train.decay_fraction * steps)) if wsd else steps - warmup
    done = (step - 1 - (steps - decay)) / decay
    if train.schedule == "constant" or done <= 0:
        return train.lr
    left = _left(done, train.decay_shape if wsd else train.schedule)
    return train.lr * (train.final_lr_fraction + (1 - train.final_lr_fraction) * left)


def _left(done: float, shape: str) -> float:
    """The share of the decay that is left where the share `done` of its steps has gone."""
    shapes = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "sqrt": 1 - math.sqrt(done)}
    return shapes[shape]


def build_adamw(model: nn.Module, train: Train, compiled: bool = False) -> torch.optim.Optimizer:
    """The fused AdamW, or `LowMemoryAdamW` for 8-bit moments, bf16 gradients or bf16 weights, which is compiled on CUDA if
    `compiled`."""
    parameters = list(trained_parameters(model).values())
    groups = parameter_groups(model, train)
    if train.gradients == "bf16":
        # A decay's gradient is summed over ranks after the last microbatch, and rounding before would depend on their number.
        keep_gradients_in_bf16(p for name, p in trained_parameters(model).items() if not name.endswith(DECAYS))
    if train.optimizer == "adamw8bit" or train.gradients == "bf16":
        eight_bit = train.optimizer == "adamw8bit"
        compiled = compiled and parameters[0].is_cuda
        places: dict[Tensor, Place] = {
            p: place_of(p, name, train.seed)
            for name, p in trained_parameters(model).items()
            if p.dtype == torch.bfloat16
        }
        return LowMemoryAdamW(groups, train.lr, train.betas, train.eps, train.weight_decay, eight_bit, compiled, places)
    optimizer = torch.optim.AdamW(
        groups, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay, fused=True
    )
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def parameter_groups(model: nn.Module, train: Train) -> list[dict[str, Any]]:
    """The trained parameters in the optimizer's groups, one for each weight decay and factor on the learning rate. A Gated
    DeltaNet's decays have no weight decay, and a group of their own: they are whole tensors on every rank, and the fused AdamW takes no
    group with whole and sharded ones."""
    named = trained_parameters(model)
    decays = matched(train.weight_decays, list(named), train.weight_decay, "weight_decays")
    decays |= {name: 0.0 for name in named if name.endswith(DECAYS)}
    factors = matched(train.lr_factors, list(named), 1.0, "lr_factors")
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((float(decays[name]), float(factors[name]), name.endswith(DECAYS)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: group[0] != (train.weight_decay, 1.0, False))
    return [
        {"params": parameters, "weight_decay": decay, **({"lr_factor": factor} if train.lr_factors else {})}
        for (decay, factor, _), parameters in ordered
    ]


def full_tensor(x: Tensor) -> Tensor:
    """The full value of a sharded tensor; a plain tensor unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients so that their global norm is at most `max_norm` (0 = no limit). Returns the norm before
    scaling."""
    parameters = [p for p in parameters if p.grad is not None]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    parts = [part for part in (sharded, [p for p in parameters if not isinstance(p, DTensor)]) if part]
    norms = [_norm([p.grad for p in part if p.grad is not None]) for part in parts]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm:
        for part in parts:
            nn.utils.clip_grads_with_norm_(part, max_norm, norm, foreach=True)
    return norm.detach()


def _norm(grads: list[Tensor]) -> Tensor:
    """The norm of gradients that are all sharded, or all whole."""
    if all(g.dtype == torch.float32 for g in grads):
        return full_tensor(nn.utils.get_total_norm(grads, foreach=True))
    # get_total_norm would compute the norm of bfloat16 gradients in bfloat16.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    return full_tensor(torch.linalg.vector_norm(torch.stack(norms)))


class Guard:
    """Takes or skips a step. A step with a loss or gradient norm that is not finite is skipped. With `sigmas`, a spike
    is skipped too: a loss or norm more than that many standard deviations above the mean of the last `HISTORY` finite
    steps, once `WARM` of them are known. A skipped spike is part of that history, as in OLMo-core: data that is harder
    than the rest raises the bound and is trained from then on. The deviation counts as at least `FLOOR` of the mean, so
    a loss that hardly varies makes no spike of a small change.

    A source keeps its tokens: after `LIMIT` spikes in a row among the steps that have tokens of a source, while steps without
    such tokens were trained in between, the next spike with them is trained. Where no step is trained in between, training itself is
    ill, and the spikes stay skipped.

    The optimizer reads `found_inf` on the device, and changes neither weights, moments nor step count where it is 1.
    """

    HISTORY = 128
    WARM = 64
    FLOOR = 0.1
    LIMIT = 4

    def __init__(self, sigmas: float, device: torch.device, sources: int = 1) -> None:
        self.sigmas = sigmas
        self.in_row = torch.zeros(1 + sources, dtype=torch.int64, device=device)
        """Skipped steps in a row: of all steps, then of the steps that have tokens of each source."""
        self.history = torch.zeros(2, self.HISTORY, dtype=torch.float64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)

    def step(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, num_targets: Tensor | None = None
    ) -> Tensor:
        """Steps the optimizer unless the step is bad. Returns 1.0 on the device if it was skipped, else 0.0.

        `num_targets` [S]: trained tokens of each source in the step.
        """
        present = self.in_row[1:] >= 0 if num_targets is None else num_targets > 0
        now = torch.stack((loss.double(), norm.double()))
        finite = now.isfinite().all()
        bad = ~finite
        if self.sigmas:
            count = self.seen.clamp(max=self.HISTORY)
            known = torch.arange(self.HISTORY, device=now.device) < count
            mean = (self.history * known).sum(1) / count.clamp(min=1)
            variance = ((self.history - mean[:, None]).square() * known).sum(1) / (count - 1).clamp(min=1)
            deviation = torch.maximum(variance.sqrt(), self.FLOOR * mean)
            spike = (now > mean + self.sigmas * deviation).any()
            due = present & (self.in_row[1:] >= self.LIMIT) & (self.in_row[1:] > self.in_row[0])
            bad |= spike & (count >= self.WARM) & ~due.any()
        skipped = bad.float()
        fused: Any = optimizer
        fused.found_inf = skipped
        optimizer.step()
        slot = (self.seen % self.HISTORY).view(1, 1).expand(2, 1)
        entry = torch.where(finite, now[:, None], self.history.gather(1, slot))
        self.history.scatter_(1, slot, entry)
        self.seen += finite
        concerned = torch.cat((torch.ones_like(present[:1]), present))
        self.in_row = torch.where(concerned, (self.in_row + 1) * bad, self.in_row)
        return skipped

    def state(self) -> dict[str, Tensor]:
        """A copy of the history on the host."""
        state = {"history": self.history, "taken": self.seen, "in_row": self.in_row}
        return {name: value.to("cpu", copy=True) for name, value in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores a history that `state` returned."""
        self.history.copy_(state["history"])
        self.seen.copy_(state["taken"])
        if "in_row" in state:  # early versions did not record it
            self.in_row.copy_(state["in_row"])
