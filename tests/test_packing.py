"""sft.packing.packs: every segment in one pack, no pack over capacity, as few packs as OLMo-core; cutting counts labels exactly."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_pack import first_fit_decreasing
from made_data import write_dataset
from sft.common.errors import SftError
from sft.data.dataset import DOCUMENT, Dataset
from sft.data.dataset_writer import DatasetWriter
from sft.packing.packs import PackIndex, _best_fit, cut_documents, pack, pack_dataset, pack_documents, target_counter
from sft.packing.steps import StepPlan
from sft.recipe.schema import Train


def one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined; the fill of every pack."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return [capacity - r for r in rooms]


def fills(lengths: np.ndarray, capacity: int) -> list[int]:
    offsets, order = pack(lengths, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths))), "every segment exactly once"
    assert offsets[0] == 0 and offsets[-1] == len(lengths) and (np.diff(offsets) > 0).all(), "no empty pack"
    sums = [int(lengths[order[a:b]].sum()) for a, b in itertools.pairwise(offsets)]
    assert max(sums, default=0) <= capacity, "capacity"
    for a, b in itertools.pairwise(offsets):
        assert (np.diff(lengths[order[a:b]]) <= 0).all(), "a pack lists its segments from long to short"
    return sums


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_packs_are_those_of_best_fit_decreasing_one_document_at_a_time(data):
    capacity = data.draw(st.integers(1, 1200))
    top = data.draw(st.integers(1, capacity))
    lengths = data.draw(st.lists(st.integers(1, top), max_size=120))
    assert Counter(fills(np.array(lengths, dtype=np.int64), capacity)) == Counter(one_at_a_time(lengths, capacity))


DISTRIBUTIONS = {
    "lognormal": lambda rng, n, c: np.clip(rng.lognormal(np.log(c) - 3.5, 1.0, n), 2, c),
    "heavy tail": lambda rng, n, c: np.clip(rng.pareto(1.1, n) * c / 50, 2, c),
    "uniform": lambda rng, n, c: rng.integers(1, c + 1, n),
    "just above a half": lambda rng, n, c: rng.integers(c // 2, c // 2 + 40, n),
    "thirds": lambda rng, n, c: c // 3 + rng.integers(-5, 6, n),
    "all equal": lambda rng, n, c: np.full(n, c // 7),
    "two kinds": lambda rng, n, c: np.where(rng.random(n) < 0.2, c, 17),
    "chat and reasoning": lambda rng, n, c: np.where(
        rng.random(n) < 0.9, rng.lognormal(np.log(c) - 5, 1, n), rng.lognormal(np.log(c) - 1.5, 0.8, n)
    ).clip(2, c),
}


@pytest.mark.seconds
@pytest.mark.parametrize("capacity", [256, 2048, 16384])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_as_many_packs_and_the_same_fills_as_olmo_core(name: str, capacity: int):
    utils = pytest.importorskip("olmo_core.data.utils")
    rng = np.random.default_rng(capacity)
    lengths = DISTRIBUTIONS[name](rng, 1000, capacity).astype(np.int64)
    ends = np.cumsum(lengths)
    instances, documents, _ = utils.InstancePacker(capacity).pack_documents(np.stack([ends - lengths, ends], axis=1))
    theirs = [sum(int(documents[d][1] - documents[d][0]) for d in instance) for instance in instances]
    assert Counter(fills(lengths, capacity)) == Counter(theirs)


def test_the_example_of_the_docstrings():
    offsets, order = pack([3, 5, 2, 5, 3], 8)
    assert offsets.tolist() == [0, 2, 4, 5] and order.tolist() == [1, 0, 3, 4, 2]
    placed, packs = _best_fit(np.bincount([5, 3, 3, 2, 2, 2]), 8)
    assert [column.tolist() for column in placed] == [[0, 0, 1, 1, 2], [1] * 5, [1, 1, 1, 2, 1]] and packs == 3


def test_any_sequence_length_works_around_the_words_of_the_bitmap():
    rng = np.random.default_rng(1)
    for capacity in (1, 2, 255, 256, 257, 511, 512, 513, 24_000, 70_001, 131_072):
        lengths = rng.integers(1, capacity + 1, 300)
        assert Counter(fills(lengths, capacity)) == Counter(one_at_a_time(lengths.tolist(), capacity))


def test_packing_does_not_depend_on_the_integer_type_of_the_lengths():
    lengths = np.random.default_rng(2).integers(1, 4000, 5000)
    first = pack(lengths, 4096)
    for kind in (np.uint16, np.uint32, np.int32):
        again = pack(lengths.astype(kind), 4096)
        assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_a_length_outside_the_capacity_is_refused_and_nothing_packs_to_nothing():
    for bad in ([5, 11], [0, 3]):
        with pytest.raises(SftError, match="do not fit"):
            pack(bad, 10)
    offsets, order = pack([], 10)
    assert offsets.tolist() == [0] and order.tolist() == []


def test_first_fit_for_the_bench_is_first_fit():
    rng = np.random.default_rng(3)
    for _ in range(50):
        lengths = rng.integers(1, 100, rng.integers(1, 80)).tolist()
        rooms: list[int] = []
        for length in sorted(lengths, reverse=True):
            at = next((i for i, r in enumerate(rooms) if r >= length), None)
            if at is None:
                rooms.append(100 - length)
            else:
                rooms[at] -= length
        assert first_fit_decreasing(lengths, 100) == len(rooms)


LENGTHS = [7, 64, 65, 128, 129, 200, 3, 63, 300, 64, 66]


@pytest.mark.parametrize("policy", ["truncate", "drop", "split"])
def test_labels_of_cut_documents_are_counted_in_the_masks(tmp_path: Path, policy: str):
    data, seq_len = write_dataset(tmp_path, LENGTHS), 64
    index = pack_dataset(data, seq_len, policy)
    expected = []
    for number, (_, mask) in enumerate(data):
        if policy == "split":
            spans = [(a, min(a + seq_len, len(mask))) for a in range(0, len(mask), seq_len)]
        else:
            spans = [(0, min(len(mask), seq_len))] if len(mask) <= seq_len or policy == "truncate" else []
        for a, b in spans:
            piece = mask[a:b].copy()
            piece[0] = False  # no context
            if policy == "truncate" and len(mask) > seq_len:
                piece[-1] = False  # becomes EOS
            if piece.any():
                expected.append((number, a, b - a, int(piece.sum())))
    assert sorted(tuple(p) for p in index.segments.tolist()) == expected
    assert index.losses.exact and index.losses.long_documents == sum(n > seq_len for n in LENGTHS)
    assert index.losses.tokens_lost == data.documents["length"].sum() - sum(e[2] for e in expected)
    assert index.losses.labels_lost == data.documents["labels"].sum() - sum(e[3] for e in expected)
    assert index.sums("length").max() <= seq_len and index.sums("labels").sum() == sum(e[3] for e in expected)


def saved(index: PackIndex, folder: Path) -> Path:
    index.save(folder)
    return folder


def test_a_segment_without_a_trained_token_is_left_out_and_counted(tmp_path: Path):
    mask = np.zeros(100, dtype=bool)
    mask[70:] = True  # the first 64 tokens are a prompt
    with DatasetWriter(tmp_path, vocab_size=10) as writer:
        writer.add(np.ones(100, dtype=int), mask, [100], 0)
    truncated, split = (pack_dataset(Dataset.open(tmp_path), 64, policy) for policy in ("truncate", "split"))
    assert (len(truncated), truncated.losses.unlabelled_pieces, truncated.losses.labels_lost) == (0, 1, 30)
    assert (len(split), split.losses.unlabelled_pieces, split.losses.tokens_lost) == (1, 1, 64)
    assert split.segments.tolist() == [(0, 64, 36, 30)]
    with pytest.raises(
        SftError, match=r"all 1 documents lose every trained token to seq_len 64 .*100 tokens.*raise \[train\] seq_len"
    ):
        StepPlan.build(truncated, Train(seq_len=64, global_batch_tokens=128))
    assert PackIndex.load(saved(truncated, tmp_path / "packs")).losses == truncated.losses


def test_without_masks_only_the_labels_of_cut_documents_are_estimates(tmp_path: Path):
    data = write_dataset(tmp_path, LENGTHS)
    exact, estimate = pack_dataset(data, 64), pack_documents(data.documents, 64)
    assert not estimate.losses.exact and exact.losses.exact
    whole = data.documents["length"][exact.segments["document"]] <= 64
    assert (exact.segments[whole] == estimate.segments[whole]).all()
    assert pack_documents(data.documents, 300).losses.exact, "nothing is cut at 300"


def test_an_unknown_policy_is_refused():
    with pytest.raises(SftError, match="not one of truncate, drop, split"):
        cut_documents(np.zeros(0, dtype=DOCUMENT), 64, "wrap")


def test_a_saved_index_is_read_back_and_a_damaged_one_refused(tmp_path: Path):
    data = write_dataset(tmp_path / "data", LENGTHS)
    index = pack_dataset(data, 64, "split")
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # a second process that had the same idea
    again = PackIndex.load(tmp_path / "index")
    assert again.digest == index.digest and again.losses == index.losses and (again.segments == index.segments).all()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    raw = bytearray((tmp_path / "index" / "pieces.npy").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "index" / "pieces.npy").write_bytes(raw)
    with pytest.raises(SftError, match="the content has digest"):
        PackIndex.load(tmp_path / "index")
    (tmp_path / "index" / "offsets.npy").unlink()
    with pytest.raises(SftError, match="not a pack index"):
        PackIndex.load(tmp_path / "index")


def test_the_cache_is_keyed_by_documents_length_policy_and_content(tmp_path: Path):
    data, cache = write_dataset(tmp_path / "data", LENGTHS), tmp_path / "cache"
    pack_dataset(data, 64, cache=cache)
    assert not cache.exists(), "without an identity of the masks nothing is reused"
    first = pack_dataset(data, 64, cache=cache, identity="a")
    assert pack_dataset(data, 64, cache=cache, identity="a").digest == first.digest and len(list(cache.iterdir())) == 1
    for changed in ({"seq_len": 32}, {"policy": "drop"}, {"identity": "b"}):
        pack_dataset(data, **{"seq_len": 64, "cache": cache, "identity": "a", **changed})
    assert len(list(cache.iterdir())) == 4
    for saved in cache.iterdir():
        (saved / "pieces.npy").write_bytes(b"torn")
    assert pack_dataset(data, 64, cache=cache, identity="a").digest == first.digest, "a damaged index is made again"
    assert pack_dataset(data, 64, cache=cache, identity="a").digest == first.digest


def test_the_digest_tells_different_packs_apart(tmp_path: Path):
    data = write_dataset(tmp_path, LENGTHS)
    assert len({pack_dataset(data, n, p).digest for n in (64, 65) for p in ("truncate", "drop", "split")}) == 6
    count = target_counter(data)
    assert pack_documents(data.documents, 64, "drop", count).digest == pack_dataset(data, 64, "drop").digest
