"""One rank's bf16 copies of its fp32 parameters, made once a step: nothing is gathered, and nothing is copied for each microbatch.

In:  a model that FSDP2 does not shard, on its device, with its weights.
Out: the same model, whose forward and backward pass read the copies. Its parameters, which the optimizer and checkpoints read, stay as they are, and
     get the copies' gradients.

The arithmetic is FSDP2's mixed precision on one rank: a parameter is rounded to bf16, its gradient is bf16 for each microbatch, and
microbatches are added up in the dtype of the stored gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from sft.model.parallel import replicated


class ComputeCopies:
    """The copies of a model, made before the first forward pass and before the first one after each step of the optimizer. Nothing else may
    change a parameter."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        kept = set(replicated(model))
        self.masters: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []
        self.stale = True
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False):
                if master.dtype == torch.bfloat16 or master in kept:
                    continue
                copy = nn.Parameter(torch.empty_like(master, dtype=torch.bfloat16), master.requires_grad)
                if master.requires_grad:
                    copy.register_post_accumulate_grad_hook(partial(hand_over, master))
                # An attribute of the instance is found before nn.Module looks among its parameters, which so keep their names.
                module.__dict__[name] = copy
                self.masters.append(master)
                self.copies.append(copy)
        model.register_forward_pre_hook(self.refresh)
        # A tensor's own count of changes does not know of the fused AdamW's.
        optimizer.register_step_post_hook(self.expire)

    def expire(self, *_: object) -> None:
        self.stale = True

    @torch.no_grad()
    def refresh(self, *_: object) -> None:
        """Rounds the parameters again if a step has changed them."""
        if self.stale and self.copies:
            torch._foreach_copy_(self.copies, self.masters)
            self.stale = False


def hand_over(master: nn.Parameter, copy: torch.Tensor) -> None:
    """Adds the gradient of a copy to that of its parameter, and calls the parameter's hooks, as FSDP2 does."""
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
    for hook in (getattr(master, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(master)


def copy_once_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> None:
    """Lets a model on one rank, which has its weights, compute in bf16 from copies, unless its precision is fp32."""
    if precision != "fp32":
        ComputeCopies(model, optimizer)
