"""The exchanges of many ranks, with torch's fake process group: their order, number and bytes, and the memory of a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sft.model.memory import LIBRARIES, plan
from sft.model.model import Transformer
from sft.model.parallel import World, begin_microbatch, context_group, shard
from sft.recipe.architecture import ModelConfig
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Hardware, Train
from sft.training.optim import build_adamw

CONFIG = ModelConfig(n_layers=3, d_model=64, n_heads=8, n_kv_heads=8, head_dim=8, intermediate_size=128, vocab_size=256)
TOKENS = 64
GATHER, REDUCE, SUM, EXCHANGE, WAIT = "gather", "reduce", "sum", "exchange", "wait"
NAMES = {
    "_allgather_base_": GATHER, "_reduce_scatter_base_": REDUCE, "allreduce_": SUM, "all_to_all_single": EXCHANGE,
    "wait_tensor": WAIT,
}  # fmt: skip
PRODUCTS = ("mm", "addmm")


class Recorded(TorchDispatchMode):
    """(what, bytes of the largest tensor) of every exchange and matrix product, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[-1]
        if name in NAMES or name in PRODUCTS:
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.seen.append((NAMES.get(name, "product"), max(x.numel() * x.element_size() for x in tensors)))
        return function(*args, **(kwargs or {}))

    def order(self, *kinds: str) -> list[str]:
        return [what for what, _ in self.seen if what in kinds]

    def bytes(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for what, size in self.seen:
            found[what] += size
        return found


@contextmanager
def ranks(count: int) -> Iterator[World]:
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield World(0, count, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def build(world: World, hardware: Hardware, precision: str = "bf16") -> torch.nn.Module:
    model = Transformer(CONFIG)
    for block in model.blocks:
        block.attention.context = context_group(world, hardware.context_degree)  # type: ignore[union-attr]
    return shard(model, world, precision, hardware.shard_degree, hardware.keep_gathered, hardware.prefetch_layers)


def batch(hardware: Hardware, tokens: int = TOKENS) -> dict[str, Any]:
    ids = torch.arange(tokens // hardware.context_degree) % CONFIG.vocab_size
    return {
        "input_ids": ids, "positions": ids, "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32),
        "max_len": tokens, "target_rows": torch.arange(len(ids) - 1), "target_ids": ids[1:],
    }  # fmt: skip


def step(model: torch.nn.Module, hardware: Hardware, microbatches: int = 1) -> Recorded:
    """The exchanges of one step."""
    with Recorded() as recorded:
        for number in range(1, microbatches + 1):
            begin_microbatch(model, hardware.keep_gathered, last=number == microbatches)
            model(**batch(hardware))[0].backward()
    return recorded


GROUPS = CONFIG.n_layers + 1  # each block, and embedding, head and last norm
WHOLE = CONFIG.parameters


@pytest.mark.parametrize("count", [8, 32])
@pytest.mark.parametrize(
    ("hardware", "gathered", "reduced", "summed"),
    [
        # Two microbatches: blocks are gathered in both passes of each, but the last one, which the backward pass still has.
        ({"shard_degree": 0}, None, 2 * GROUPS, 0),
        ({"shard_degree": 8}, None, 2 * GROUPS, GROUPS),
        ({"shard_degree": 0, "prefetch_layers": 2}, None, 2 * GROUPS, 0),
        ({"shard_degree": 0, "keep_gathered": "weights"}, GROUPS, 2 * GROUPS, 0),
        ({"shard_degree": 8, "keep_gathered": "gradients"}, GROUPS, GROUPS, GROUPS),
        ({"shard_degree": 8, "context_degree": 4}, None, 2 * GROUPS, GROUPS),
    ],
)
def test_the_exchanges_of_a_step_are_those_that_the_docs_count(
    count: int, hardware: dict[str, Any], gathered: int | None, reduced: int, summed: int
) -> None:
    numbers = Hardware(**({"keep_gathered": "none"} | hardware))
    with ranks(count) as world:
        found = step(build(world, numbers), numbers, microbatches=2)
    counts, size = Counter(what for what, _ in found.seen), found.bytes()
    copies = numbers.shard_degree not in (0, count)
    assert counts[GATHER] == (gathered if gathered is not None else 2 * (2 * CONFIG.n_layers + 1))
    assert counts[REDUCE] == reduced and counts[SUM] == summed * copies
    # Bytes of whole tensors: weights in bf16, gradients in fp32, and of each copy's part for the sum over copies.
    assert size[REDUCE] == 4 * WHOLE * reduced // GROUPS
    assert size[SUM] == copies * 4 * WHOLE // (numbers.shard_degree or count)
    if gathered is not None:
        assert size[GATHER] == 2 * WHOLE
    # q, k, v and the output, forward and backward, in each microbatch. They carry all of a rank's tokens.
    contexts = numbers.context_degree > 1
    assert counts[EXCHANGE] == contexts * 2 * CONFIG.n_layers * 2 * 4
    assert size[EXCHANGE] == counts[EXCHANGE] * 2 * TOKENS // numbers.context_degree * CONFIG.d_model


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_are_gathered_ahead_and_gradients_reduced_between_backward_passes(layers: int) -> None:
    numbers = Hardware(keep_gathered="none", shard_degree=4, prefetch_layers=layers)
    with ranks(8) as world:
        seen = step(build(world, numbers), numbers).seen
    order = [what for what, _ in seen]
    first = order.index("product")
    # The root, the first blocks, and one more for the block that begins: all before its first product.
    assert order[:first].count(GATHER) == min(1 + 1 + layers, GROUPS)
    # Every reduction but those of the first block and of the root has products of an earlier block behind it.
    reductions = [i for i, what in enumerate(order) if what == REDUCE]
    assert all("product" in order[a:b] for a, b in pairwise(reductions[:-1]))
    # A block is gathered before the gradients of the block behind it are reduced: the two overlap.
    assert GATHER in order[first : reductions[0]]
    # Sums over copies follow their reduction at once, beside the products of the blocks that are left.
    assert [what for what in order if what in (REDUCE, SUM)] == [REDUCE, SUM] * GROUPS
    assert "product" in order[order.index(SUM) :]


def test_sums_over_copies_wait_for_the_last_microbatch() -> None:
    numbers = Hardware(keep_gathered="none", shard_degree=4)
    with ranks(8) as world:
        order = step(build(world, numbers), numbers, microbatches=3).order(REDUCE, SUM)
    assert order == [REDUCE] * (2 * GROUPS) + [REDUCE, SUM] * GROUPS


def test_an_exchange_of_a_context_group_has_products_beside_it() -> None:
    """Forward: q is under way while k is projected, k while v is. Backward: their gradients are, while v's and k's products run."""
    numbers = Hardware(keep_gathered="none", context_degree=4, shard_degree=0)
    with ranks(8) as world:
        model = build(world, numbers)
        with Recorded() as forward:
            loss, _ = model(**batch(numbers))
        with Recorded() as backward:
            loss.backward()
    layer = ["product", EXCHANGE, "product", EXCHANGE, "product", EXCHANGE, WAIT, WAIT, WAIT]
    assert forward.order("product", EXCHANGE, WAIT)[: len(layer)] == layer
    found = backward.order("product", EXCHANGE, WAIT)
    start = next(i for i in range(len(found)) if found[i : i + 3] == [EXCHANGE] * 3)
    assert found[start : start + 12] == [EXCHANGE] * 3 + [WAIT, "product", "product"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "hardware"),
    [
        (32, {"shard_degree": 0}),
        (8, {"shard_degree": 4, "prefetch_layers": 2}),
        (32, {"shard_degree": 8, "keep_gathered": "weights"}),
        (8, {"shard_degree": 0, "context_degree": 2}),
    ],
)
def test_the_peak_of_a_rank_is_what_the_plan_says(count: int, hardware: dict[str, Any]) -> None:
    numbers = Hardware(**({"keep_gathered": "none", "recompute": "none", "compile": "never"} | hardware))
    train = Train(seq_len=16 * TOKENS)  # as many that activations count as in training
    with ranks(count) as world:
        model = build(world, numbers)
        optimizer = build_adamw(model, train)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            model(**batch(numbers, train.seq_len))[0].backward()
            optimizer.step()
            [peak] = tracker.get_tracker_snapshot("peak").values()
    found = plan(CONFIG, train, numbers, count, 0)
    assert found.total - found.parts[LIBRARIES] == pytest.approx(peak["Total"], rel=0.125)


# --- the choice of copies


def sharded(nodes: int, gb: float, preset: str = "olmo2-7b", **changed: Any) -> Any:
    train = Train(**changed.pop("train", {}))
    return plan(PRESETS[preset], train, Hardware(nodes=nodes, compile="always", **changed), 8 * nodes, gb)


def test_weights_are_sharded_inside_a_node_from_two_nodes_on_where_they_fit() -> None:
    assert [sharded(nodes, 141).shard_degree for nodes in (1, 2, 4)] == [0, 8, 8]
    assert sharded(2, 141, context_degree=2).shard_degree == 8
    assert sharded(4, 141, shard_degree=0).shard_degree == 0 and sharded(4, 141, shard_degree=16).shard_degree == 16
    assert sharded(4, 0).shard_degree == 0, "the memory is not known"
    # A copy in a node would need more recomputation, or does not fit at all.
    assert sharded(4, 80).shard_degree == 0 and sharded(8, 80, "olmo3-32b").shard_degree == 0
    # Frozen weights in bf16 are small.
    lora = {"method": "lora", "seq_len": 4096}
    assert sharded(2, 80, train=lora).shard_degree == 8
    for gb in (40, 80, 100):
        ours, whole = sharded(4, gb), sharded(4, gb, shard_degree=0)
        assert (ours.recompute, ours.recompute_budget, ours.fits) == (
            whole.recompute, whole.recompute_budget, whole.fits,
        )  # fmt: skip
    assert dict(sharded(4, 141).table())["weights shared by"] == "8 ranks"
    assert "4 copies, each over 8 ranks" in sharded(4, 141).sharding(32)


def test_layers_ahead_are_in_the_plan() -> None:
    one, three = (sharded(1, 0, prefetch_layers=n, keep_gathered="none").parts["gathered weights"] for n in (1, 3))
    block = (PRESETS["olmo2-7b"].parameters - 2 * PRESETS["olmo2-7b"].vocab_size * 4096 - 4096) // 32
    assert three - one == 2 * 2 * block
