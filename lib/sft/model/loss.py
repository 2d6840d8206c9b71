"""Cross-entropy of labelled rows only, in chunks, with the gradient made in the forward pass.

In:  hidden [L, d] (rows whose next token is trained, already normalised), the head's weight [V, d], label ids [L] (-100 =
     padding), and the loss_denominator: the number of labels in the GLOBAL batch, over all ranks and microbatches.
Out: the sum of the rows' losses / loss_denominator (fp32, differentiable) and the rows' own losses (fp32, for reports).

Logits of a chunk are made, turned into their gradient and dropped, so memory holds [chunk, V] and never [T, V]. The loss is
fp32 whatever the compute dtype; weight gradients are summed over chunks in fp32. See docs/loss.md for the loss_denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK = 1024


def losses(
    logits: Tensor, labels: Tensor, loss_denominator: Tensor, z_loss: float, train: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of logits [rows, V], which it may use up: the rows' losses [rows], the sum of their z-losses, and, to `train`, the gradient of
    both sums / loss_denominator in the dtype of the logits. Compiled, it is two passes over the logits, and no fp32 copy of them exists."""
    label = labels.unsqueeze(1)
    kept, target = label != IGNORE, label.clamp_min(0)
    values = logits.float()
    lse = values.logsumexp(1, keepdim=True)
    nll = (lse - values.gather(1, target)) * kept
    penalty = z_loss * (lse * lse * kept).sum()
    if not train:
        return nll.squeeze(1), penalty, None
    scale = kept / loss_denominator
    weight = scale * (1 + 2 * z_loss * lse) if z_loss else scale
    # softmax(logits) * scale - onehot(target) * scale
    if torch.compiler.is_compiling():  # where a scatter would need a pass of its own
        columns = torch.arange(values.shape[1], device=values.device)
        grad = (values - lse).exp() * weight - torch.where(columns == target, scale, 0.0)
    else:
        grad = values.sub_(lse).exp_().mul_(weight).scatter_add_(1, target, -scale)
    return nll.squeeze(1), penalty, grad.to(logits.dtype)


@lru_cache(maxsize=1)
def _compiled_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    return torch.compile(losses, fullgraph=True)


class _LabelledRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_denominator: float, z_loss: float, chunk: int, compiled: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by = torch.full((), loss_denominator, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        make, train = _compiled_losses() if compiled else losses, needs_hidden or needs_weight
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            nll, penalty, grad = make(hidden[part] @ weight.T, labels[part], by, z_loss, train)
            rows[part] = nll
            total += nll.sum() + penalty
            if grad is not None and grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad is not None and grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[part])
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(rows)
        return total / by, rows

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is the last node of the graph: its incoming gradient is 1 or a scalar the caller chose.
        scale = outputs[0]
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(scale.to(g.dtype)) for g in grads), None, None, None, None, None)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32 also where the factors are bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def labelled_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_denominator: float,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sum of losses / loss_denominator, losses by row [L]). A row labelled -100 costs and contributes nothing.

    `compiled`: by torch.compile, with twice as many rows at a time, which need no more memory.
    """
    if compiled:
        chunk *= 2
    loss, rows = _LabelledRows.apply(hidden, weight, labels, loss_denominator, z_loss, chunk, compiled)
    return loss, rows
