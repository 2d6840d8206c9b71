"""AdamW with 8-bit moments and bf16 gradients: against torch's and torchao's own, skipped steps, resumption, other ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from sft.checkpoint.step_folder import DcpReader
from sft.common.errors import SftError
from sft.model.memory import plan
from sft.recipe.schema import Train
from sft.training import adamw8bit
from sft.training.optim import build_adamw, clip
from training import run_folder

# It takes seconds.
training.SERVER.set_forkserver_preload([*training.PRELOADED, "torchao.optim.quant_utils", "frozen"])
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 512), (10, 48), (300,))]


def give_gradients(ps: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        # Of very different sizes, as embeddings' rows are.
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randint(-6, 1, p.shape, generator=generator)


def test_with_fp32_moments_it_is_torchs_adamw() -> None:
    ours, theirs = parameters(), parameters()
    mine, reference = adamw8bit.LowMemoryAdamW(ours, **HYPER, eight_bit=False), torch.optim.AdamW(theirs, **HYPER)
    for step in range(20):
        for ps, optimizer in ((ours, mine), (theirs, reference)):
            give_gradients(ps, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_with_8_bit_moments_it_is_torchaos(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    monkeypatch.setattr(adamw8bit, "CHUNK", 4 * 512)  # more than one piece, the last one smaller
    ours, theirs = parameters(), parameters()
    mine = adamw8bit.LowMemoryAdamW(ours, **HYPER, eight_bit=True)
    assert [sorted(mine.state[p]) for p in ours[1:]] == [
        ["exp_avg", "exp_avg_sq", "step"]
    ] * 2  # no blocks of 256 there
    first, second = (OptimState8bit.zeros(theirs[0].shape, signed, 256) for signed in (True, False))
    step = torch.tensor(0.0)
    for number in range(20):
        for ps in (ours, theirs):
            give_gradients(ps, number)
        mine.step()
        step += 1
        with torch.no_grad():
            single_param_adam(
                theirs[0], theirs[0].grad, step, first, second, None, torch.tensor(HYPER["lr"]), *HYPER["betas"],
                HYPER["weight_decay"], HYPER["eps"], True, False,
            )  # fmt: skip
    state = mine.state[ours[0]]
    # A code on the border between two steps of the scale may fall either way.
    assert (state["exp_avg"] != first.codes).float().mean() < 0.005
    torch.testing.assert_close(state["exp_avg_sq_scale"].flatten(), second.scale, rtol=1e-5, atol=0)
    assert (ours[0] - theirs[0]).abs().median() < 1e-6


@pytest.mark.compile
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_compiled_it_gives_the_same(device: str, eight_bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the graph is traced and run as it stands."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none here")
    if device == "cpu":
        traced = torch.compile(adamw8bit.update, fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(adamw8bit, "_compiled_update", lambda: traced)
    sizes = ((40, 512), (10, 48), (300,), (7, 256))
    found = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in sizes]
        optimizer = adamw8bit.LowMemoryAdamW(ps, **HYPER, eight_bit=eight_bit, compiled=compiled)
        for step in range(6):
            optimizer.param_groups[0]["lr"] = HYPER["lr"] / (1 + step)  # which compiles nothing again
            optimizer.found_inf = torch.tensor(float(step == 3), device=device)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator).to(device, torch.float32)
                p.grad = p.grad.fill_(torch.nan) if step == 3 else p.grad
            optimizer.step()
        found.append([*ps, *(optimizer.state[p][name] for p in ps for name in ("step", *adamw8bit.MOMENTS))])
    for ours, theirs in zip(*found, strict=True):
        if ours.dtype == torch.uint8:  # a value on a border may fall either way
            assert (ours != theirs).float().mean() < 0.005
        else:
            assert (ours - theirs).abs().quantile(0.99) < 1e-6


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_skipped_step_changes_no_bit(eight_bit: bool) -> None:
    ps = parameters()
    optimizer = adamw8bit.LowMemoryAdamW(ps, **HYPER, eight_bit=eight_bit)
    give_gradients(ps, 0)
    optimizer.step()
    before = [t.clone() for p in ps for t in (p.detach(), *optimizer.state[p].values())]
    for p in ps:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [t for p in ps for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizer.found_inf = torch.zeros(())
    give_gradients(ps, 1)
    optimizer.step()
    assert all(p.isfinite().all() for p in ps)
    assert not torch.equal(before[0], ps[0])


def test_bf16_gradients_wait_in_bf16_and_their_norm_is_exact() -> None:
    layer = torch.nn.Linear(256, 64)
    optimizer = build_adamw(layer, Train(gradients="bf16"))
    exact = torch.nn.Linear(256, 64)
    exact.load_state_dict(layer.state_dict())
    for _ in range(2):
        x = torch.randn(8, 256)
        for model in (layer, exact):
            model(x).square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.bfloat16}
    assert layer.weight.grad is not None and exact.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.float(), exact.weight.grad, rtol=2e-2, atol=5e-2)
    rounded = torch.cat([p.grad.float().flatten() for p in layer.parameters() if p.grad is not None])
    assert clip(layer.parameters(), 0.0).item() == pytest.approx(rounded.norm().item(), rel=1e-6)
    clip(layer.parameters(), 1.0)
    norm = torch.cat([p.grad.float().flatten() for p in layer.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1.0, rel=5e-3)
    optimizer.step()
    assert layer.weight.dtype == torch.float32


# Wide enough that its matrices have blocks of 256.
WIDE: dict[str, Any] = {
    "model_d_model": 256,
    "model_hidden": 256,
    "model_head_dim": 64,
    "model_n_layers": 2,
    "lr": 3e-3,
}
SMALL: dict[str, Any] = {"optimizer": "adamw8bit", "gradients": "bf16", "steps": 8, "save_every": 4, **WIDE}


@pytest.mark.slow
def test_8_bit_training_resumes_with_the_same_bits(tmp_path: Path, dataset: Path) -> None:
    ranks = 2
    folder = run_folder(tmp_path / "run", dataset)
    fields = SMALL | {"steps": 4, "save_every": 2}
    training.train(folder, ranks=ranks, **fields)
    kept = tmp_path / "kept"
    shutil.copytree(folder / "train" / "step4", kept)
    moments = DcpReader(kept, "optim.state.")
    assert moments.dtype("blocks.0.attention.w_q.weight.exp_avg") == torch.uint8
    assert moments.shape("blocks.0.attention.w_q.weight.exp_avg_scale") == (256, 1)
    assert moments.dtype("blocks.0.attention.q_norm.weight.exp_avg") == torch.float32
    shutil.rmtree(folder / "train" / "step4")
    assert "continuing from" in training.train(folder, ranks=ranks, **fields)
    training.assert_same_bits(folder / "train" / "step4", kept)


@pytest.mark.processes
def test_8_bit_training_goes_on_alike_on_other_ranks_and_close_to_fp32(tmp_path: Path, dataset: Path) -> None:
    one, three = run_folder(tmp_path / "one", dataset), run_folder(tmp_path / "three", dataset)
    exact = run_folder(tmp_path / "exact", dataset)
    batch = {"global_batch_tokens": 384}
    training.train(one, **SMALL, **batch)
    shutil.copytree(one / "train", three / "train")
    shutil.rmtree(three / "train" / "step8")
    training.train(three, ranks=3, **SMALL, **batch)  # rows that three ranks do not share evenly
    training.train(exact, **(SMALL | {"optimizer": "adamw", "gradients": "fp32"}), **batch)
    for ours, theirs, fp32 in zip(*map(training.records, (three, one, exact)), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert ours.loss == pytest.approx(fp32.loss, rel=2e-2)
    assert training.records(one)[-1].loss < 0.8 * training.records(one)[0].loss


def test_the_plan_counts_the_bytes_of_8_bit_moments() -> None:
    from sft.model.model import Transformer
    from sft.recipe import resolve, schema

    model = schema.Model(**training.MODEL | {k.removeprefix("model_"): v for k, v in WIDE.items() if k != "lr"})
    config = resolve.resolve(model, training.VOCAB)
    optimizer = build_adamw(Transformer(config), Train(optimizer="adamw8bit"))
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for n, t in s.items() if n != "step")
    assert plan(config, Train(optimizer="adamw8bit"), schema.Hardware(), 1, 0).parts["optimizer state"] == held


def test_without_torchao_the_error_names_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(
        SftError, match=r"needs the package torchao .*next: pip install -e '\.\[lowbit\]', or optimizer=adamw"
    ):
        build_adamw(torch.nn.Linear(2, 2), Train(optimizer="adamw8bit"))
    build_adamw(torch.nn.Linear(2, 2), Train(gradients="bf16"))  # needs none of it
