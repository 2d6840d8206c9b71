"""sft.packing.loader: a microbatch is what a reader of the files would write down by hand; a step is the same for every split."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from made_data import EOS, PAD, VOCAB, some_lengths, write_dataset
from sft.common.errors import SftError
from sft.data.dataset import Dataset
from sft.packing.loader import Loader, Microbatch, Share, SpecialIds, bucket
from sft.packing.packs import pack_dataset, pack_documents
from sft.packing.steps import StepPlan
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Train

SEQ, BATCH = 64, 8
MODEL = replace(PRESETS["olmo3-tiny"], vocab_size=VOCAB)
TRAIN = Train(seq_len=SEQ, global_batch_tokens=SEQ * BATCH, epochs=2.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), some_lengths(120, 100))


def loader(data: Dataset, plan: StepPlan, rank: int = 0, ranks: int = 1, **options) -> Loader:
    return Loader(plan, data, SpecialIds(EOS, PAD), MODEL, Share(rank, ranks), **options)


def by_hand(data: Dataset, plan: StepPlan, segments: np.ndarray) -> Counter:
    """(tokens of the piece, [(row, target)], source) of each piece, from the files and the rules alone."""
    found = []
    for document, start, length, _ in segments.tolist():
        ids, mask = data[document]
        tokens, trained = ids[start : start + length].tolist(), mask[start : start + length].tolist()
        trained[0] = False
        if plan.index.policy == "truncate" and len(ids) > length:
            tokens[-1], trained[-1] = EOS, False
        source = int(data.documents["source"][document])
        found.append((tuple(tokens), tuple((i - 1, tokens[i]) for i in range(length) if trained[i]), source))
    return Counter(found)


def segments_of(microbatches: list[Microbatch]) -> Counter:
    """The same, from the tensors; checks the form of the microbatches on the way."""
    found = []
    for mb in microbatches:
        edges = mb.cu_seqlens.tolist()
        assert mb.cu_seqlens.dtype == torch.int32 and edges[0] == 0 and len(edges) == bucket(len(edges))
        assert edges[-1] == len(mb.input_ids) == len(mb.positions) and edges == sorted(edges)
        assert mb.target_rows.shape == mb.target_ids.shape == mb.target_sources.shape and mb.num_targets <= len(
            mb.target_rows
        )
        rows, targets = mb.target_rows[: mb.num_targets].tolist(), mb.target_ids[: mb.num_targets].tolist()
        assert rows == sorted(set(rows)) and set(mb.target_ids[mb.num_targets :].tolist()) <= {-100}
        assert set(mb.target_rows[mb.num_targets :].tolist()) <= {0}
        spans = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
        assert max(b - a for a, b in spans) <= mb.max_len <= SEQ
        documents = [(a, b) for a, b in spans if b <= mb.num_tokens]
        assert documents == [] or documents[-1][1] == mb.num_tokens, "padding comes last"
        assert mb.input_ids[mb.num_tokens :].tolist() == [PAD] * (len(mb.input_ids) - mb.num_tokens)
        for a, b in spans:
            assert mb.positions[a:b].tolist() == list(range(b - a))
        for a, b in documents:
            inside = [k for k, row in enumerate(rows) if a <= row < b]
            sources = {int(mb.target_sources[k]) for k in inside}
            assert len(sources) == 1 and all(row + 1 < b for row in (rows[k] for k in inside))
            labels = tuple((rows[k] - a, targets[k]) for k in inside)
            found.append((tuple(mb.input_ids[a:b].tolist()), labels, sources.pop()))
        assert sum(len(labels) for _, labels, _ in found[len(found) - len(documents) :]) == mb.num_targets
    return Counter(found)


@pytest.mark.parametrize("policy", ["truncate", "drop", "split"])
@pytest.mark.parametrize("packs_each", [1, 2])
def test_microbatches_are_what_the_files_say(data: Dataset, policy: str, packs_each: int):
    plan = StepPlan.build(pack_dataset(data, SEQ, policy), TRAIN)
    seen = 0
    for step, microbatches in loader(data, plan, microbatch_tokens=packs_each * SEQ):
        segments = np.concatenate([plan.index.pack(p) for p in plan.packs(step)])
        assert segments_of(microbatches) == by_hand(data, plan, segments)
        assert sum(mb.num_targets for mb in microbatches) == plan.num_targets(step)
        assert sum(mb.num_tokens for mb in microbatches) == plan.tokens(step)
        assert {len(mb.input_ids) for mb in microbatches} == {packs_each * SEQ}
        seen += 1
    assert seen == plan.steps > 5


@pytest.mark.parametrize("order", ["shuffled", "olmo-core"])
def test_a_step_has_the_same_content_for_any_ranks_accumulation_and_threads(data: Dataset, order: str):
    plan = StepPlan.build(pack_dataset(data, SEQ), replace(TRAIN, order=order))
    expected = {step: segments_of(microbatches) for step, microbatches in loader(data, plan, threads=1)}
    for ranks, packs_each, threads in ((2, 1, 3), (4, 2, 1), (8, 1, 2), (1, 8, 2)):
        got = {step: Counter() for step in expected}
        counts = {step: set() for step in expected}
        for rank in range(ranks):
            options = {"microbatch_tokens": packs_each * SEQ, "threads": threads}
            for step, microbatches in loader(data, plan, rank, ranks, **options):
                got[step] += segments_of(microbatches)
                counts[step].add(len(microbatches))
        assert got == expected
        assert all(len(c) == 1 for c in counts.values()), "ranks meet in every microbatch, so all have as many"


def same(a: list[Microbatch], b: list[Microbatch]) -> bool:
    tensors = ("input_ids", "positions", "cu_seqlens", "target_rows", "target_ids", "target_sources")
    return len(a) == len(b) and all(
        all(torch.equal(getattr(x, n), getattr(y, n)) for n in tensors)
        and (x.max_len, x.num_targets, x.num_tokens) == (y.max_len, y.num_targets, y.num_tokens)
        for x, y in zip(a, b, strict=True)
    )


def test_a_run_resumed_at_any_step_goes_on_bit_for_bit(data: Dataset):
    plan = StepPlan.build(pack_dataset(data, SEQ), replace(TRAIN, epochs=2.5))
    assert len(plan.index) % BATCH, "some step spans two epochs"
    whole = list(loader(data, plan, 1, 2))
    for start in range(plan.steps + 1):
        again = StepPlan.build(pack_dataset(data, SEQ), replace(TRAIN, epochs=2.5))
        start = again.check(plan.consumed(start))
        rest = list(loader(data, again, 1, 2, start_step=start))
        assert [s for s, _ in rest] == list(range(start, plan.steps))
        assert all(same(a, b) for (_, a), (_, b) in zip(whole[start:], rest, strict=True))


def test_the_number_of_ranks_may_change_in_the_middle_of_a_run(data: Dataset):
    plan = StepPlan.build(pack_dataset(data, SEQ), TRAIN)
    expected = [segments_of(microbatches) for _, microbatches in loader(data, plan)]
    got = [Counter() for _ in expected]
    for ranks, first, last in ((2, 0, 3), (8, 3, 7), (1, 7, plan.steps)):
        for rank in range(ranks):
            for step, microbatches in loader(data, plan, rank, ranks, start_step=first):
                if step == last:
                    break
                got[step] += segments_of(microbatches)
    assert got == expected


def test_a_last_small_batch_has_no_needless_microbatches_and_padding_where_packs_lack(data: Dataset):
    index = pack_dataset(data, SEQ)
    plan = StepPlan.build(index, replace(TRAIN, epochs=(BATCH + 3) / len(index)))
    assert plan.steps == 2 and len(plan.packs(1)) == 3
    last = [list(loader(data, plan, rank, 4))[1][1] for rank in range(4)]
    assert [len(m) for m in last] == [1] * 4
    counts = [m[0].num_targets for m in last]
    assert counts.count(0) == 1 and sum(counts) == plan.num_targets(1)
    empty = last[counts.index(0)][0]
    assert empty.num_tokens == 0 and set(empty.input_ids.tolist()) == {PAD} and set(empty.target_ids.tolist()) == {-100}


def test_a_validation_pass_reads_everything_once(data: Dataset):
    index = pack_dataset(data, SEQ)
    plan = StepPlan.once(index, 4)
    got = Counter()
    for rank in range(2):
        for _, microbatches in loader(data, plan, rank, 2):
            got += segments_of(microbatches)
    assert got == by_hand(data, plan, index.segments)


def test_a_loader_can_be_left_in_the_middle_and_iterated_again(data: Dataset):
    plan = StepPlan.build(pack_dataset(data, SEQ), TRAIN)
    both = loader(data, plan)
    first = next(iter(both))
    assert same(first[1], next(iter(both))[1]) and first[0] == 0


def test_shapes_come_in_few_sizes(data: Dataset):
    plan = StepPlan.build(pack_dataset(data, SEQ), TRAIN)
    every = [mb for _, microbatches in loader(data, plan, microbatch_tokens=4 * SEQ) for mb in microbatches]
    assert len({len(mb.target_rows) for mb in every}) <= 8 and len({len(mb.cu_seqlens) for mb in every}) <= 2
    assert {mb.max_len for mb in every} == {SEQ}
    assert [bucket(n) for n in (1, 64, 65, 1000)] == [64, 64, 128, 1024]


def test_padding_is_cut_into_documents_so_that_it_costs_little(tmp_path: Path):
    data = write_dataset(tmp_path, [100, 3000])
    plan = StepPlan.build(pack_dataset(data, 8192), Train(seq_len=8192, global_batch_tokens=8192, epochs=1.0))
    (mb,) = next(iter(Loader(plan, data, SpecialIds(EOS, PAD), MODEL)))[1]
    lengths = torch.diff(mb.cu_seqlens).tolist()
    assert [n for n in lengths if n] == [3000, 100, 1024, 1024, 1024, 1024, 996] and mb.max_len == 4096


def test_masks_that_changed_since_packing_are_noticed(tmp_path: Path):
    data = write_dataset(tmp_path, some_lengths(60, 60))
    index = pack_dataset(data, SEQ)
    plan = StepPlan.build(index, replace(TRAIN, global_batch_tokens=SEQ))
    path = tmp_path / "labels_mask_part_0000.npy"
    path.write_bytes(np.ones(path.stat().st_size, dtype=bool).tobytes())
    with pytest.raises(SftError, match="the masks changed"):
        list(Loader(plan, Dataset.open(tmp_path), SpecialIds(EOS, PAD), MODEL))


def test_a_plan_made_without_masks_is_not_trained_on(data: Dataset):
    plan = StepPlan.build(pack_documents(data.documents, SEQ), TRAIN)
    with pytest.raises(SftError, match="estimate"):
        loader(data, plan)


def test_wrong_ranks_and_steps_are_refused(data: Dataset):
    plan = StepPlan.build(pack_dataset(data, SEQ), TRAIN)
    for options in ({"rank": 2, "ranks": 2}, {"start_step": plan.steps + 1}, {"ranks": 3}, {"microbatch_tokens": 100}):
        with pytest.raises(SftError, match=r"\d"):
            loader(data, plan, **options)


def test_the_expected_idle_share_is_that_of_the_dealing(data: Dataset):
    plan = StepPlan.build(pack_dataset(data, SEQ), TRAIN)
    in_order = StepPlan.build(plan.index, replace(TRAIN, order="olmo-core"))
    shares = [loader(data, plan, 0, 4).expected(s)[0] for s in range(in_order.steps)]  # whole batches in both
    theirs = [loader(data, in_order, 0, 4).expected(s)[0] for s in range(in_order.steps)]
    assert 0 <= np.mean(shares) < np.mean(theirs) < 1
    assert loader(data, plan).expected(0)[0] == pytest.approx(0)


@pytest.fixture(scope="module")
def olmo_core(tmp_path_factory: pytest.TempPathFactory):
    """Our folder in OLMo-core's own dataset, all documents short enough that no policy matters."""
    module = pytest.importorskip("olmo_core.data")
    folder = tmp_path_factory.mktemp("interop")
    data = write_dataset(folder, some_lengths(150, SEQ))

    def open_(use_array: bool | None):
        paths = sorted(str(p) for p in folder.glob("token_ids_part_*.npy"))
        masks = sorted(str(p) for p in folder.glob("labels_mask_*.npy"))
        theirs = module.NumpyPackedFSLDataset(
            *paths,
            sequence_length=SEQ,
            pad_token_id=PAD,
            eos_token_id=EOS,
            vocab_size=VOCAB,
            dtype=np.uint16,
            label_mask_paths=masks,
            generate_doc_lengths=True,
            source_group_size=len(paths),
            use_array_if_local=use_array,
        )
        theirs.work_dir = tmp_path_factory.mktemp("work")
        theirs.prepare()
        return theirs

    return data, open_


@pytest.mark.parametrize("use_array", [None, False], ids=["boundaries from EOS", "boundaries from csv"])
def test_olmo_core_reads_the_same_documents_and_targets_from_our_folder(olmo_core, use_array: bool | None):
    data, open_ = olmo_core
    theirs, index = open_(use_array), pack_dataset(data, SEQ)
    assert len(theirs) == len(index) and len(data.ids) > 3
    found = Counter()
    for instance in (theirs[i] for i in range(len(theirs))):
        at = 0
        for length in instance["doc_lens"].tolist():
            ids, mask = instance["input_ids"][at : at + length], instance["label_mask"][at : at + length]
            at += length
            if set(ids.tolist()) != {PAD}:
                found[tuple(ids.tolist()), tuple(mask.tolist())] += 1
    assert found == Counter((tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in data)


def test_the_olmo_core_order_is_its_loaders_on_every_rank_and_epoch(olmo_core, tmp_path: Path):
    from olmo_core.data import DataCollator, NumpyFSLDataLoader

    data, open_ = olmo_core
    theirs, index = open_(None), pack_dataset(data, SEQ)
    plan = StepPlan.build(index, replace(TRAIN, order="olmo-core", epochs=3.0))
    per_epoch = len(index) // BATCH
    assert plan.steps == 3 * per_epoch and len(index) % BATCH
    for ranks in (1, 2, 8):
        ours = Loader(plan, data, SpecialIds(EOS, PAD), MODEL, Share(0, ranks))
        for rank in range(ranks):
            loader_ = NumpyFSLDataLoader(
                theirs,
                collator=DataCollator(pad_token_id=PAD),
                global_batch_size=SEQ * BATCH,
                work_dir=tmp_path,
                seed=TRAIN.data_seed,
                dp_world_size=ranks,
                dp_rank=rank,
                fs_local_rank=0,
            )
            for epoch in range(3):
                loader_.reshuffle(epoch + 1, in_memory=True)
                wanted = list(loader_._get_local_instance_indices(loader_.get_global_indices()))
                mine = [ours.assignment(epoch * per_epoch + s)[:, rank].ravel() for s in range(per_epoch)]
                assert np.concatenate(mine).tolist() == wanted
