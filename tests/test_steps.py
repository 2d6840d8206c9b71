"""sft.packing.steps: every step's packs and loss denominator are known in advance; what cannot be trained is refused with numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from made_data import some_lengths, write_dataset
from sft.common.errors import SftError
from sft.data.dataset import DOCUMENT
from sft.data.mix import Pool, mix
from sft.packing.balance import deal
from sft.packing.packs import PackIndex, pack_dataset, pack_documents
from sft.packing.steps import StepPlan, accumulation, epoch_order
from sft.recipe.schema import Source, Train
from test_mix import index_of, source_of

SEQ, BATCH = 64, 5
TRAIN = Train(seq_len=SEQ, global_batch_tokens=SEQ * BATCH, epochs=3.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PackIndex:
    data = write_dataset(tmp_path_factory.mktemp("data"), some_lengths(90, 80))
    made = pack_dataset(data, SEQ)
    assert len(made) % BATCH, "the epoch's last batch must be incomplete for these tests to say anything"
    return made


def consumed(plan: StepPlan) -> list[int]:
    return [int(p) for step in range(plan.steps) for p in plan.packs(step)]


def test_every_epoch_consumes_every_pack_and_a_batch_may_span_two_epochs(index: PackIndex):
    plan = StepPlan.build(index, TRAIN)
    stream = consumed(plan)
    assert len(stream) == 3 * len(index) and plan.steps == -(-3 * len(index) // BATCH)
    for epoch in range(3):
        assert sorted(stream[epoch * len(index) : (epoch + 1) * len(index)]) == list(range(len(index)))
    assert all(len(plan.packs(s)) == BATCH for s in range(plan.steps - 1))
    assert len(plan.packs(plan.steps - 1)) == 3 * len(index) % BATCH or BATCH


def test_weights_are_exact_passes_whatever_the_ranks_and_the_last_batch():
    """2.5 epochs of one source and 0.3 of another: mixed, packed, dealt to ranks and counted document by document."""
    sizes, weights = (40, 90), (2.5, 0.3)
    pools = [Pool.empty(n, deduplicate=False) for n in sizes]
    for number, one in enumerate(pools):
        one.lengths[:] = some_lengths(len(one.lengths), 60)
        one.conversations[:] = np.random.default_rng(number).integers(0, 2**63, len(one.lengths))
    chosen = mix(pools, [Source(path=p, weight=w) for p, w in zip("ab", weights, strict=True)], seed=3).data
    documents = np.zeros(len(chosen), DOCUMENT)
    source, index = source_of(chosen), index_of(chosen)
    documents["length"] = [pools[s].lengths[i] for s, i in zip(source, index, strict=True)]
    documents["labels"], documents["source"] = 1, source
    plan = StepPlan.build(pack_documents(documents, SEQ), replace(TRAIN, epochs=1.0, global_batch_tokens=SEQ * 4))
    for ranks in (1, 2, 4):
        seen: Counter[tuple[int, int]] = Counter()
        for step in range(plan.steps):
            packs = plan.packs(step)
            costs = np.array([len(plan.index.pack(int(p))) for p in packs], dtype=np.float64)
            for slot in deal(costs, ranks, 1).ravel():
                for segment in plan.index.pack(int(packs[slot])) if slot >= 0 else ():
                    number = int(segment["document"])
                    seen[int(source[number]), int(index[number])] += 1
        times = [Counter(seen[source, i] for i in range(size)) for source, size in enumerate(sizes)]
        assert times == [{3: 20, 2: 20}, {1: 27, 0: 63}]


def test_epochs_are_shuffled_differently_and_seeds_too(index: PackIndex):
    n = len(index)
    orders = [epoch_order(n, seed, epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4 and all(sorted(o) == list(range(n)) for o in orders)


def test_the_order_is_this_one_on_every_machine_and_numpy():
    assert epoch_order(10, 34521, 0).tolist() == [7, 8, 2, 0, 1, 6, 5, 4, 9, 3]
    assert epoch_order(10, 34521, 1).tolist() == [0, 1, 9, 6, 3, 7, 4, 5, 2, 8]


def test_dropping_the_tail_gives_whole_batches_of_one_epoch_each(index: PackIndex):
    plan = StepPlan.build(index, replace(TRAIN, epoch_tail="drop"))
    per_epoch = len(index) // BATCH
    assert plan.steps == 3 * per_epoch and plan.describe().packs_dropped_per_epoch == len(index) - per_epoch * BATCH
    for epoch in range(3):
        packs = [p for s in range(epoch * per_epoch, (epoch + 1) * per_epoch) for p in plan.packs(s).tolist()]
        assert max(Counter(packs).values()) == 1


def test_a_number_of_steps_is_taken_as_it_is(index: PackIndex):
    plan = StepPlan.build(index, replace(TRAIN, steps=17))
    assert plan.steps == 17 and all(len(plan.packs(s)) == BATCH for s in range(17))
    with pytest.raises(IndexError):
        plan.packs(17)


def test_a_fraction_of_an_epoch_is_that_many_packs(index: PackIndex):
    assert len(consumed(StepPlan.build(index, replace(TRAIN, epochs=0.5)))) == round(len(index) / 2)
    assert len(consumed(StepPlan.build(index, replace(TRAIN, epochs=1.25)))) == round(len(index) * 1.25)


def test_sums_of_steps_are_sums_of_their_packs(index: PackIndex):
    plan = StepPlan.build(index, TRAIN)
    for step in range(plan.steps):
        segments = np.concatenate([index.pack(p) for p in plan.packs(step)])
        assert plan.num_targets(step) == segments["labels"].sum() and plan.tokens(step) == segments["length"].sum()
        assert plan.padding(step) == len(plan.packs(step)) * SEQ - segments["length"].sum()


def test_the_description_adds_up(index: PackIndex):
    plan = StepPlan.build(index, replace(TRAIN, warmup_fraction=0.1))
    facts, steps = plan.describe(), range(plan.steps)
    assert facts.steps == plan.steps and facts.warmup_steps == round(0.1 * plan.steps)
    assert facts.tokens == sum(map(plan.tokens, steps)) and facts.padding == sum(map(plan.padding, steps))
    labels = [plan.num_targets(s) for s in steps]
    assert facts.trained_tokens == sum(labels) and facts.epochs == 3.0
    per_step = facts.trained_tokens_per_step
    assert (per_step.min, per_step.max) == (min(labels), max(labels))
    assert per_step.mean == pytest.approx(np.mean(labels))
    assert facts.tokens_lost == index.losses.tokens_lost > 0 and facts.packs_dropped_per_epoch == 0 and facts.exact


def test_the_description_needs_no_token_files(tmp_path: Path, index: PackIndex):
    data = write_dataset(tmp_path, some_lengths(90, 80))
    for file in tmp_path.glob("*part*"):
        file.unlink()
    facts = StepPlan.build(pack_documents(data.documents, SEQ), TRAIN).describe()
    exact = StepPlan.build(index, TRAIN).describe()
    assert not facts.exact and facts.steps == exact.steps and facts.tokens == exact.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_tokens": 100}, r"global_batch_tokens 100 is not a multiple of seq_len 64; next: use 64 or 128"),
        ({"global_batch_tokens": 40}, r"not a multiple of seq_len 64; next: use 64$"),
        (
            {"global_batch_tokens": 64 * 500},
            r"smaller than one batch: \d+ tokens of 90 documents fill \d+ packs of 64.*needs 500",
        ),
        ({"epochs": 0.05}, r"zero steps: epochs 0.05 of \d+ packs are \d packs, one batch is 5; next: raise epochs"),
        ({"seq_len": 32, "global_batch_tokens": 320}, r"seq_len 32: the packs are of 64"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_numbers(index: PackIndex, change: dict, message: str):
    with pytest.raises(SftError, match=message):
        StepPlan.build(index, replace(TRAIN, **change))


def test_a_batch_without_a_trained_token_is_refused(index: PackIndex):
    silent = index.segments.copy()
    silent["labels"] = 0
    with pytest.raises(SftError, match=r"step 1 of \d+ has no trained token in 5 packs"):
        StepPlan.build(replace(index, segments=silent), TRAIN)


def test_an_empty_dataset_is_refused(index: PackIndex):
    empty = pack_documents(np.zeros(0, dtype=DOCUMENT), SEQ)
    with pytest.raises(SftError, match="0 tokens of 0 documents"):
        StepPlan.build(empty, TRAIN)
    assert StepPlan.once(empty, 4).steps == 0


def test_a_validation_pass_takes_every_pack_once_in_order(index: PackIndex):
    plan = StepPlan.once(index, 4)
    assert consumed(plan) == list(range(len(index))) and plan.steps == -(-len(index) // 4)


def test_steps_can_be_asked_in_any_order(index: PackIndex):
    plan, other = StepPlan.build(index, TRAIN), StepPlan.build(index, TRAIN)
    wanted = [plan.packs(s).tolist() for s in range(plan.steps)]
    for step in np.random.default_rng(0).permutation(plan.steps):
        assert other.packs(int(step)).tolist() == wanted[step]


def test_a_position_counts_what_was_consumed_and_belongs_to_one_plan(index: PackIndex):
    plan = StepPlan.build(index, TRAIN)
    last = plan.consumed(plan.steps)
    assert last.packs == plan.total_packs and (last.epoch, last.pack_in_epoch) == (3, 0)
    for step in (0, 1, len(index) // BATCH + 1, plan.steps):
        assert plan.check(plan.consumed(step)) == step
    longer = StepPlan.build(index, replace(TRAIN, epochs=4.0))
    assert longer.check(plan.consumed(7)) == 7, "more epochs of the same order continue"
    for change in ({"data_seed": 1}, {"epoch_tail": "drop"}, {"order": "olmo-core"}, {"global_batch_tokens": SEQ * 4}):
        with pytest.raises(SftError, match="data position differs"):
            StepPlan.build(index, replace(TRAIN, **change)).check(plan.consumed(7))


def test_accumulation_is_derived_and_a_remainder_refused_with_what_would_do():
    assert accumulation(64, 16384, 8) == (8, 1)
    assert accumulation(64, 16384, 8, 32768) == (4, 2)
    with pytest.raises(
        SftError,
        match=r"1048576 is not a multiple of 7 ranks x microbatch_tokens 16384 = 114688; next: use 1032192 or 1146880",
    ):
        accumulation(64, 16384, 7)
    with pytest.raises(SftError, match=r"microbatch_tokens 20000 is not a multiple of seq_len 16384"):
        accumulation(64, 16384, 8, 20000)
    with pytest.raises(SftError, match=r"use 2097152, or"):
        accumulation(64, 16384, 128)
