"""Cross-entropy of the rows that have a target, in chunks. The gradient is computed in the forward pass.

In:  hidden [L, d] (rows whose next token is trained, already normalised), the output matrix [V, d], target ids [L]
     (-100 = padding), and the loss denominator: the number of targets in the GLOBAL batch, over all ranks and
     microbatches.
     Optional: a weight for each row [L].
Out: the sum of the rows' losses / loss denominator (fp32, differentiable), and the rows' own losses (fp32, for
     reports, without weights).

The logits of a chunk are turned into their gradient and dropped, so memory holds [chunk, V] and never [T, V]. The loss
is fp32 with any compute dtype. Gradients of the output matrix are summed over chunks in fp32. See docs/loss.md for the
denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target id of rows without a target
CHUNK = 1024


def chunk_losses(
    logits: Tensor,
    target_ids: Tensor,
    loss_denominator: Tensor,
    z_loss: float,
    train: bool,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses of a chunk's rows [rows], the sum of their z-losses, and, if `train`, the gradient of both sums / loss
    denominator with respect to the logits, in their dtype. `row_weights` [rows] multiply the z-losses and the gradient; the
    losses of the rows are returned without them.

    `logits` [rows, V] may be overwritten. Compiled, this is two passes over the logits without an fp32 copy of them.
    """
    target = target_ids.unsqueeze(1)
    is_target, target = target != IGNORED, target.clamp_min(0)
    values = logits.float()
    lse = values.logsumexp(1, keepdim=True)
    nll = (lse - values.gather(1, target)) * is_target
    weighted = is_target if row_weights is None else is_target * row_weights.unsqueeze(1)
    penalty = z_loss * (lse * lse * weighted).sum()
    if not train:
        return nll.squeeze(1), penalty, None
    scale = weighted / loss_denominator
    weight = scale * (1 + 2 * z_loss * lse) if z_loss else scale
    # softmax(logits) * scale - onehot(target) * scale
    if torch.compiler.is_compiling():  # a scatter would be a pass of its own
        columns = torch.arange(values.shape[1], device=values.device)
        grad = (values - lse).exp() * weight - torch.where(columns == target, scale, 0.0)
    else:
        grad = values.sub_(lse).exp_().mul_(weight).scatter_add_(1, target, -scale)
    return nll.squeeze(1), penalty, grad.to(logits.dtype)


@lru_cache(maxsize=1)
def _compiled_chunk_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    return torch.compile(chunk_losses, fullgraph=True)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        loss_denominator: float,
        z_loss: float,
        chunk: int,
        compiled: bool,
        row_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = torch.empty(len(target_ids), dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        denominator = torch.full((), loss_denominator, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        losses, train = _compiled_chunk_losses() if compiled else chunk_losses, needs_hidden or needs_weight
        for start in range(0, len(target_ids), chunk):
            part = slice(start, start + chunk)
            weights = None if row_weights is None else row_weights[part]
            nll, penalty, grad = losses(hidden[part] @ weight.T, target_ids[part], denominator, z_loss, train, weights)
            rows[part] = nll
            total += (nll if weights is None else nll * weights).sum() + penalty
            if grad is not None and grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad is not None and grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[part])
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(rows)
        return total / denominator, rows

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is the last node of the graph: its incoming gradient is 1, or a scalar that the caller chose.
        scale = outputs[0]
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(scale.to(g.dtype)) for g in grads), *[None] * 6)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in fp32 also where the factors are bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    loss_denominator: float,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
    compiled: bool = False,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of losses / loss denominator, losses by row [L]). A row with target id -100 has no loss and no gradient.

    `row_weights`, fp32 [L], multiply the loss and the z-loss of each row in the sum. The denominator and the losses by row
    stay as they are.

    `compiled`: with torch.compile, and twice as many rows at a time, which need no more memory.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _CrossEntropy.apply
    chunk = 2 * chunk if compiled else chunk
    return apply(hidden, weight, target_ids, loss_denominator, z_loss, chunk, compiled, row_weights)
