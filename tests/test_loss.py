"""cross_entropy(): the full cross-entropy's value and gradients from labelled rows alone, whatever the chunk size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.model import loss as module
from sft.model.loss import IGNORED, cross_entropy


def make(rows: int = 37, width: int = 12, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[::5] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradients_equal_full_logits(chunk: int, z_loss: float) -> None:
    hidden, weight, labels = make()
    kept = labels != IGNORED
    logits = hidden @ weight.T
    wanted = (
        F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        + z_loss * (logits.logsumexp(1).square() * kept).sum()
    ) / 11
    loss, rows = cross_entropy(hidden, weight, labels, 11.0, z_loss, chunk)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(rows, F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED))
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(3 * wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_compiled_it_gives_the_same(device: str, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the graph is traced and run as it stands: the formula without a scatter."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none here")
    if device == "cpu":
        traced = torch.compile(module.chunk_losses, fullgraph=True, backend="eager")
        monkeypatch.setattr(module, "_compiled_chunk_losses", lambda: traced)
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    for dtype in dtypes:
        hidden, weight, labels = (x.detach().to(device) for x in make(300, 64, 1000))
        found = []
        for compiled in (False, True):
            h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight / 8))
            loss, rows = cross_entropy(h, w, labels, 100.0, z_loss, 64, compiled=compiled)
            loss.backward()
            with torch.no_grad():
                assert torch.equal(cross_entropy(h, w, labels, 100.0, z_loss, 64, compiled=compiled)[1], rows)
            found.append((loss.detach(), rows, h.grad, w.grad))
        for a, b in zip(*found, strict=True):
            assert a is not None and b is not None and a.dtype == b.dtype
            exact = dtype == torch.float32
            torch.testing.assert_close(a, b, atol=1e-6 if exact else 2e-3, rtol=1e-5 if exact else 2e-2)


def test_rows_of_padding_alone_cost_and_move_nothing() -> None:
    hidden, weight, labels = make()
    loss, _ = cross_entropy(hidden, weight, torch.full_like(labels, IGNORED), 5.0)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_evaluation_makes_no_gradients() -> None:
    hidden, weight, labels = make()
    with torch.no_grad():
        loss, _ = cross_entropy(hidden, weight, labels, 1.0)
    assert not loss.requires_grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_logits_give_the_fp32_loss_to_bf16_rounding(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none here")
    hidden, weight, labels = (x.detach().to(device) for x in make(512, 64, 1000))
    exact, _ = cross_entropy(hidden, weight / 8, labels, 100.0)
    rounded, _ = cross_entropy(hidden.bfloat16(), (weight / 8).bfloat16(), labels, 100.0)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0, rtol=2e-3)


def test_the_mean_of_rank_means_is_not_the_global_mean() -> None:
    """docs/loss.md's example: one rank holds 4 labels with loss 3, the other 28 with loss 1."""
    few, many = torch.full((4,), 3.0), torch.full((28,), 1.0)
    rank_means = (few.mean() + many.mean()) / 2
    global_mean = torch.cat([few, many]).mean()
    ours = few.sum() / 32 + many.sum() / 32
    assert rank_means.item() == 2.0
    assert ours.item() == global_mean.item() == 1.25
