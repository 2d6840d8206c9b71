"""attention(): documents never see each other, windows count the token itself, and packing changes no bit."""

import math

import pytest
import torch
from torch import Tensor

from sft.model import attention as module
from sft.model.attention import attention

LENGTHS = [5, 1, 23, 64, 40]


def make(lengths: list[int], heads: int = 4, kv: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return (
        torch.randn(total, heads, dim, generator=g),
        torch.randn(total, kv, dim, generator=g),
        torch.randn(total, kv, dim, generator=g),
    )


def edges(lengths: list[int], padding: int = 0) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(padding)]).int()


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int) -> Tensor:
    """Softmax over a dense mask, in the input's dtype."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(document))
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window:
        seen &= at[:, None] - at < window
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("window", [0, 1, 8, 39, 40, 41, 1000])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_equals_a_dense_mask(window: int, kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)  # long documents then take several blocks
    q, k, v = (x.requires_grad_() for x in make(LENGTHS, kv=kv))
    out = attention(q, k, v, edges(LENGTHS), 64, window)
    wanted = reference(q, k, v, LENGTHS, window)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    weight = torch.randn(out.shape)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 8, 30, 1000])
def test_a_packed_document_is_bitwise_what_it_is_alone(window: int) -> None:
    q, k, v = make(LENGTHS)
    packed = attention(q, k, v, edges(LENGTHS), 64, window).split(LENGTHS)
    for part, *alone in zip(packed, q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True):
        assert torch.equal(part, attention(*alone, edges([len(part)]), 64, window))


def test_another_document_changes_nothing() -> None:
    q, k, v = make(LENGTHS)
    before = attention(q, k, v, edges(LENGTHS), 64, 8)
    for x in (q, k, v):
        x[:6] = 100.0  # the first two documents
    assert torch.equal(attention(q, k, v, edges(LENGTHS), 64, 8)[6:], before[6:])


def test_the_window_counts_the_token_itself() -> None:
    q, k, v = make([20])
    v[10] = 1e6
    out = attention(q, k, v, edges([20]), 20, 4).abs().amax((1, 2))
    assert (out > 1e3).nonzero().flatten().tolist() == [10, 11, 12, 13]


def test_empty_documents_that_fill_a_bucket_change_nothing() -> None:
    q, k, v = make(LENGTHS)
    assert torch.equal(attention(q, k, v, edges(LENGTHS, 7), 64, 8), attention(q, k, v, edges(LENGTHS), 64, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused kernel needs a CUDA device; none here")
@pytest.mark.parametrize("window", [0, 1, 8, 63, 64, 1000])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("kernel", ["flash attention 2", "flash attention 3"])
def test_the_fused_kernel_equals_the_documents_loop(
    window: int, kv: int, kernel: str, request: pytest.FixtureRequest
) -> None:
    if kernel.endswith("3"):
        if (found := module.choose_kernel(torch.device("cuda"))) != kernel:
            pytest.skip(f"needs a Hopper GPU and the package flash-attn-3; here is {found}")
        request.addfinalizer(lambda: torch.nn.attention.restore_flash_attention_impl())
    q, k, v = (x.bfloat16() for x in make(LENGTHS, kv=kv, dim=64))
    wanted = reference(q.float(), k.float(), v.float(), LENGTHS, window)
    device = [x.cuda().requires_grad_() for x in (q, k, v)]
    out = attention(*device, edges(LENGTHS, 3).cuda(), 64, window)
    torch.testing.assert_close(out.float().cpu(), wanted, atol=2e-2, rtol=2e-2)
    host = [x.float().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(wanted.shape)
    theirs = torch.autograd.grad((reference(*host, LENGTHS, window) * weight).sum(), host)
    ours = torch.autograd.grad((out * weight.cuda()).sum(), device)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float().cpu(), b, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(
    ("capability", "torch_version", "installed", "fails", "wanted"),
    [
        ((9, 0), "2.13.0+cu130", True, False, "flash attention 3"),
        (
            (9, 0),
            "2.13.0+cu130",
            False,
            False,
            "flash attention 2; this GPU runs flash attention 3 with the package flash-attn-3, which is not installed",
        ),
        ((9, 0), "2.12.1", True, False, "flash attention 2"),
        ((10, 0), "2.13.0", True, False, "flash attention 2"),
        ((8, 0), "2.13.0", True, False, "flash attention 2"),
        (
            (9, 0),
            "2.13.0",
            True,
            True,
            "flash attention 2; flash_attn_interface is installed and cannot be used (other)",
        ),
    ],
)
def test_flash_attention_3_is_taken_where_it_can_be(
    capability: tuple[int, int],
    torch_version: str,
    installed: bool,
    fails: bool,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []

    def activate(name: str) -> None:
        if fails:
            raise RuntimeError("other")
        taken.append(name)

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.__version__", torch_version)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activate)
    assert module.choose_kernel(torch.device("cuda")) == wanted
    assert taken == (["FA3"] if wanted == "flash attention 3" else [])
    assert module.choose_kernel(torch.device("cpu")) == "a loop over documents"


def test_torch_knows_the_kernel_by_the_name_that_is_asked_for() -> None:
    assert "FA3" in torch.nn.attention.list_flash_attention_impls()
