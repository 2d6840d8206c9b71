"""Several ranks on one row of tokens: the exchange, the parts of a microbatch, and the same gradient however work is divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from sft.common.errors import SftError
from sft.model import context
from sft.packing.loader import Loader, Share, SpecialIds
from sft.packing.steps import context_groups
from sft.recipe.architecture import GatedDelta
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train

pytestmark = pytest.mark.processes

# Six packs a batch (two, three or six ranks divide them) and five left for the last one. 4 query and 2 key/value heads.
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, two packs a microbatch": (1, {"microbatch_tokens": 128}),
    "one rank, no accumulation": (1, {"microbatch_tokens": 384}),
    "two ranks": (2, {}),
    "three ranks": (3, {}),
    "two ranks of one group": (2, {"context_degree": 2}),
    "two ranks of one group, three packs": (2, {"context_degree": 2, "microbatch_tokens": 192}),
    "four ranks of one group, key/value heads repeated": (4, {"context_degree": 4}),
    "two groups of two": (4, {"context_degree": 2}),
    "two ranks with a copy each": (2, {"shard_degree": 1}),
    "two groups of two, two copies": (4, {"context_degree": 2, "shard_degree": 2, "recompute": "full"}),
    "two of one group, attention kept": (2, {"context_degree": 2, "recompute": "selected"}),
}


# Attention with a window and without.
MODEL: dict[str, Any] = {
    "config": replace(
        PRESETS["olmo3-tiny"], d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, intermediate_size=64, window=8,
        vocab_size=training.VOCAB + 8, n_layers=2, window_layers=(True, False),
    ),
}  # fmt: skip
# A Gated DeltaNet in one of two layers, and six heads in all: two or three ranks share them.
DELTA = GatedDelta(key_heads=6, value_heads=6, key_dim=4, value_dim=8, layers=(True, False))
SIX_HEADS = replace(
    PRESETS["olmo-hybrid-tiny"], d_model=32, n_heads=6, n_kv_heads=6, head_dim=8, intermediate_size=64,
    vocab_size=training.VOCAB + 8, n_layers=2, gated_delta=DELTA,
)  # fmt: skip
HYBRID: dict[str, Any] = {"config": SIX_HEADS, "seq_len": 96}
HYBRID_PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"microbatch_tokens": 96}),
    "one rank, no accumulation": (1, {"microbatch_tokens": 384}),
    "two ranks": (2, {}),
    "two ranks of one group, attention kept": (2, {"context_degree": 2, "recompute": "selected"}),
    "three ranks of one group, two packs": (3, {"context_degree": 3, "microbatch_tokens": 192}),
    "two groups of two, two copies": (4, {"context_degree": 2, "shard_degree": 2, "recompute": "full"}),
}
TWO_COMPILED: tuple[int, dict[str, Any]] = (2, {"context_degree": 2, "recompute": "budget", "compile": "always"})
# The second step has other documents, for which a layer is compiled for any: one kind of layer does it.
ONE_STEP: dict[str, Any] = {"epochs": 6 / 60}
# A layer of each kind: another one of a model is compiled for any window, which takes three times as long.
COMPILED: dict[str, dict[str, Any]] = {
    "a window": {"config": replace(MODEL["config"], n_layers=1, window_layers=(True,))},
    "no window": {**ONE_STEP, "config": replace(MODEL["config"], n_layers=1, window_layers=(False,))},
    "a Gated DeltaNet": {
        **HYBRID,
        **ONE_STEP,
        "config": replace(SIX_HEADS, n_layers=1, gated_delta=replace(DELTA, layers=(True,))),
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, dict[str, Any]]:
    return gradients(tmp_path_factory.mktemp("found"), dataset, PLANS, MODEL)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, dict[str, Any]]:
    return gradients(tmp_path_factory.mktemp("hybrid"), dataset, HYBRID_PLANS, HYBRID)


def gradients(
    folder: Path, dataset: Path, plans: dict[str, tuple[int, dict[str, Any]]], fields: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What training.gradients finds for each plan. The plans of as many ranks share their processes."""
    found: dict[str, dict[str, Any]] = {}
    for ranks in {ranks for ranks, _ in plans.values()}:
        here = training.run_folder(folder / str(ranks), dataset)
        ways = {name: {"hardware": hardware} for name, (needed, hardware) in plans.items() if needed == ranks}
        sizes = {"ranks": ranks, "ways": ways, "global_batch_tokens": 384, "steps": 0, "epochs": 11 / 60}
        process = training.SERVER.Process(target=training.run, args=(here, sizes | fields, training.gradients))
        process.start()
        training.finish(process, here)
        found |= torch.load(here / "gradients.pt")
    return found


@pytest.mark.parametrize("name", [n for n in PLANS if n != "one rank"])
def test_the_gradient_is_the_same_however_the_work_is_divided(name: str, found: dict[str, dict[str, Any]]) -> None:
    (ranks, hardware), ours, reference = PLANS[name], found[name], found["one rank"]
    assert len(ours["steps"]) == 2
    for step, wanted in reference["steps"].items():
        for parameter, value in wanted.items():
            difference = (ours["steps"][step][parameter] - value).norm() / value.norm()
            assert difference < 2e-6, (step, parameter)
    assert sum(map(sum, ours["labels"])) == sum(map(sum, reference["labels"]))
    # Two copies of the weights meet for each of the three groups of parameters once a step, however many microbatches there are.
    if "shard_degree" in hardware:
        assert len(ours["labels"][0]) == 6 and ours["reductions"] == 6
    if ranks == 4:
        assert 0 in (n for labels in ours["labels"] for n in labels)  # a rank without a trained token


def largest_difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Of the gradients, relative. A decay's gradient is small beside the products that it is the sum of: a tenth counts."""
    assert found["steps"].keys() == wanted["steps"].keys()
    return max(
        ((found["steps"][step][name] - value).norm() / value.norm()).item() * (0.1 if name.endswith(DECAYS) else 1)
        for step, gradients in wanted["steps"].items()
        for name, value in gradients.items()
    )


DECAYS = (".A_log", ".dt_bias")


@pytest.mark.parametrize("name", [n for n in HYBRID_PLANS if n != "one rank"])
def test_the_gradient_of_a_hybrid_is_the_same_however_the_work_is_divided(
    name: str, hybrid: dict[str, dict[str, Any]]
) -> None:
    assert sum(n.endswith(DECAYS) for n in hybrid[name]["steps"][0]) == 2
    assert largest_difference(hybrid[name], hybrid["one rank"]) < 2e-6


@pytest.mark.compile
@pytest.mark.parametrize("layer", COMPILED)
def test_the_gradient_of_two_ranks_of_one_group_is_the_same_compiled(layer: str, tmp_path: Path, dataset: Path) -> None:
    plans: dict[str, tuple[int, dict[str, Any]]] = {"one": (1, {}), "two": TWO_COMPILED}
    found = gradients(tmp_path, dataset, plans, COMPILED[layer])
    assert found["two"]["steps"] and largest_difference(found["two"], found["one"]) < 2e-6


def test_the_gradient_of_a_hybrid_in_bf16_is_that_of_one_rank(tmp_path: Path, dataset: Path) -> None:
    """Two ranks with the same microbatches as one, whose sums are fp32."""
    plans = {name: (ranks, {"microbatch_tokens": 96}) for name, ranks in (("one", 1), ("two", 2))}
    found = gradients(tmp_path, dataset, plans, {**HYBRID, "precision": "bf16"})
    assert largest_difference(found["two"], found["one"]) < 2e-6


def test_the_exchange_gives_every_rank_the_whole_row_of_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played on one rank: what the ranks send each other is collected, then handed out."""
    ranks, tokens = 4, 8
    q, k, v = torch.randn(tokens, 8, 3), torch.randn(tokens, 2, 3), torch.randn(tokens, 2, 3)
    parts = [tuple(x.chunk(ranks)[r] for x in (q, k, v)) for r in range(ranks)]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(context, "end_exchange", lambda x: x)
    for number, x in enumerate((q, k, v)):
        sent.clear()
        monkeypatch.setattr(context, "start_exchange", lambda x, group: sent.append(x) or x)  # type: ignore[func-returns-value]
        for part in parts:
            context.send_tokens(part[number], "group", ranks)
        ours = [context.receive_tokens(torch.stack([s[rank] for s in sent]), "group") for rank in range(ranks)]
        for rank in range(ranks):
            wanted = x[:, 2 * rank : 2 * rank + 2] if x is q else x[:, rank // 2 : rank // 2 + 1]
            assert torch.equal(ours[rank], wanted)  # one key/value head serves two ranks
    # And back: every rank gives away the tokens of its heads.
    sent.clear()
    monkeypatch.setattr(context, "exchange", lambda x, group: sent.append(x) or x)  # type: ignore[func-returns-value]
    for rank in range(ranks):
        context.gather_heads(q[:, 2 * rank : 2 * rank + 2], "group", ranks)
    for rank in range(ranks):
        monkeypatch.setattr(context, "exchange", lambda x, group, r=rank: torch.stack([s[r] for s in sent]))
        assert torch.equal(context.gather_heads(q[:, :2], "group", ranks), q.chunk(ranks)[rank])


def test_the_parts_of_a_microbatch_are_the_microbatch(dataset: Path) -> None:
    from sft.data.dataset import Dataset
    from sft.packing.packs import pack_dataset
    from sft.packing.steps import StepPlan

    data = Dataset.open(dataset / "data")
    plan = StepPlan.once(pack_dataset(data, 64), 4)
    ids = SpecialIds(training.EOS, training.PAD)
    sizes = {"special_ids": ids, "model": PRESETS["olmo2-tiny"], "microbatch_tokens": 128}
    whole = Loader(plan, data, **sizes)
    parts = [Loader(plan, data, share=Share(part=i, parts=4), **sizes) for i in range(4)]
    edge = 0
    for (_, batches), *shares in zip(whole, *parts, strict=True):
        for batch, *parts in zip(batches, *(b for _, b in shares), strict=True):
            assert torch.equal(torch.cat([p.input_ids for p in parts]), batch.input_ids)
            assert torch.equal(torch.cat([p.positions for p in parts]), batch.positions)
            rows = torch.cat([p.target_rows[: p.num_targets] + 32 * i for i, p in enumerate(parts)])
            assert torch.equal(rows, batch.target_rows[: batch.num_targets])
            for name in ("target_ids", "target_sources"):
                found = torch.cat([getattr(p, name)[: p.num_targets] for p in parts])
                assert torch.equal(found, getattr(batch, name)[: batch.num_targets])
            assert all(torch.equal(p.cu_seqlens, batch.cu_seqlens) and p.max_len == batch.max_len for p in parts)
            edge += sum(int((p.target_rows[: p.num_targets] == 31).sum()) for p in parts[:-1])
    assert edge  # a part's last token predicted the next part's first


@pytest.mark.parametrize(
    ("ranks", "degree", "words"),
    [
        (6, 4, "context_degree 4 does not divide the 6 ranks; next: use one of 1, 2"),
        (6, 3, "context_degree 3 does not divide the 32 query heads of the model; next: use one of 1, 2"),
        (64, 64, "64 does not divide the 32 query heads of the model; next: use one of 1, 2, 4, 8, 16, 32"),
    ],
)
def test_a_degree_that_does_not_divide_is_refused_with_those_that_do(ranks: int, degree: int, words: str) -> None:
    hardware = Hardware(context_degree=degree)
    with pytest.raises(SftError, match=words):
        context_groups(PRESETS["olmo2-7b"], Train(), hardware, ranks)
    assert context_groups(PRESETS["olmo2-7b"], Train(), Hardware(context_degree=2), ranks) == ranks // 2
    # 40 query and 8 key/value heads, as in olmo3-32b: 5 ranks would share neither evenly.
    with pytest.raises(SftError, match="context_degree 5 and the 8 key/value heads of the model"):
        context_groups(PRESETS["olmo3-32b"], Train(seq_len=20), Hardware(context_degree=5), 10)


def test_a_hybrid_s_ranks_share_30_heads() -> None:
    hybrid, train = PRESETS["olmo-hybrid-7b"], Train(seq_len=3840)
    assert [context_groups(hybrid, train, Hardware(context_degree=n), 30) for n in (2, 3, 5, 6)] == [15, 10, 6, 5]
    with pytest.raises(SftError, match=r"context_degree 4 does not divide the 30 query heads .* one of 1, 2"):
        context_groups(hybrid, train, Hardware(context_degree=4), 8)
    fewer = replace(hybrid, gated_delta=GatedDelta(10, 30, 96, 192))
    with pytest.raises(SftError, match=r"context_degree 3 does not divide the 10 heads of the Gated DeltaNet"):
        context_groups(fewer, train, Hardware(context_degree=3), 30)
