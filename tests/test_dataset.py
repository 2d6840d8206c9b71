"""sft.data.dataset: what is written is what is read, in OLMo-core's layout, and a torn folder is refused."""

from __future__ import annotations

import gzip
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from sft.common.errors import SftError
from sft.data.dataset import DOCUMENT, Dataset, token_dtype
from sft.data.dataset_writer import DatasetWriter


def documents(count: int, seed: int = 0, vocab: int = 1000, longest: int = 40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, count)
    ids = rng.integers(0, vocab, lengths.sum())
    mask = rng.random(lengths.sum()) < 0.4
    mask[np.cumsum(lengths) - lengths] = False
    return ids, mask, lengths


def test_documents_come_back_as_they_were_added(tmp_path: Path):
    ids, mask, lengths = documents(200)
    half = int(lengths[:90].sum())
    with DatasetWriter(tmp_path, vocab_size=1000, part_tokens=500) as writer:
        writer.add(ids[:half], mask[:half], lengths[:90], 0)
        writer.add([], [], [], 0)
        writer.add(ids[half:], mask[half:], lengths[90:], np.arange(110) % 3)
    data = Dataset.open(tmp_path)
    assert (len(data), data.documents["length"].sum(), data.documents["labels"].sum(), data.dtype) == (
        200,
        lengths.sum(),
        mask.sum(),
        np.dtype("<u2"),
    )
    assert (writer.num_documents, writer.num_tokens, writer.num_targets) == (200, lengths.sum(), mask.sum())
    assert len(data.ids) > 5 and max(map(len, data.ids)) <= 500
    assert np.concatenate([i for i, _ in data]).tolist() == ids.tolist()
    assert np.concatenate([m for _, m in data]).tolist() == mask.tolist()
    assert data.documents["labels"].tolist() == [int(m.sum()) for _, m in data]
    assert data.documents["source"].tolist() == [0] * 90 + [i % 3 for i in range(110)]


def test_every_csv_tiles_its_part_and_no_document_is_cut(tmp_path: Path):
    with DatasetWriter(tmp_path, vocab_size=70_000, part_tokens=100) as writer:
        writer.add(*documents(60, vocab=70_000), 0)
        writer.add(np.arange(250), np.arange(250) > 0, [250], 0)  # longer than a part
        writer.add([1, 2], [False, True], [2], 0)
    data = Dataset.open(tmp_path)
    total = 0
    for part in range(len(data.ids)):
        lines = gzip.decompress((tmp_path / f"token_ids_part_{part:04d}.csv.gz").read_bytes()).decode().split()
        spans = [tuple(map(int, line.split(","))) for line in lines]
        assert spans[0][0] == 0 and spans[-1][1] == len(data.ids[part]) == len(data.loss_masks[part])
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        total += len(spans)
    assert total == len(data) == 62 and len(data.ids) > 2


def test_the_bytes_do_not_depend_on_how_documents_were_grouped_in_calls(tmp_path: Path):
    ids, mask, lengths = documents(100)
    with DatasetWriter(tmp_path / "a", vocab_size=1000, part_tokens=300) as writer:
        writer.add(ids, mask, lengths, 1)
    with DatasetWriter(tmp_path / "b", vocab_size=1000, part_tokens=300) as writer:
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            writer.add(ids[end - length : end], mask[end - length : end], [length], 1)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_the_dtype_is_the_smallest_that_holds_the_vocabulary():
    assert [token_dtype(v).itemsize for v in (256, 257, 65_536, 65_537, 100_278)] == [1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("ids", "mask", "lengths", "message"),
    [
        ([1, 2], [True, False], [2], "first token is a target"),
        ([1, 2], [False, True], [2, 0], "empty"),
        ([1, 2], [False], [2], "1 mask entries"),
        ([1, 99], [False, True], [2], "vocabulary of 50"),
        ([1, -1], [False, True], [2], "from -1"),
    ],
)
def test_unusable_documents_are_refused_with_numbers(tmp_path: Path, ids, mask, lengths, message: str):
    with pytest.raises(SftError, match=message), DatasetWriter(tmp_path, vocab_size=50) as writer:
        writer.add(ids, mask, lengths)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_midway_leaves_no_dataset(tmp_path: Path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path, vocab_size=1000) as writer:
        writer.add(*documents(5))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(SftError, match="make prepare"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("torn", ["ids", "mask", "part", "documents", "fields"])
def test_a_torn_folder_is_refused(tmp_path: Path, torn: str):
    with DatasetWriter(tmp_path, vocab_size=1000, part_tokens=200) as writer:
        writer.add(*documents(50))
    ids, mask, table = (
        tmp_path / "token_ids_part_0001.npy",
        tmp_path / "labels_mask_part_0001.npy",
        tmp_path / "documents.npy",
    )
    rows = np.load(table)
    if torn == "ids":
        ids.write_bytes(ids.read_bytes()[:-2])
    elif torn == "mask":
        mask.write_bytes(mask.read_bytes()[:-1])
    elif torn == "part":
        ids.unlink()
        mask.unlink()
    elif torn == "documents":
        np.save(table, rows[:-1])
    else:
        np.save(table, rows["start"])
    with pytest.raises(SftError):
        Dataset.open(tmp_path)


def test_an_empty_dataset_opens_and_has_no_documents(tmp_path: Path):
    DatasetWriter(tmp_path, vocab_size=1000).close()
    assert len(Dataset.open(tmp_path)) == 0
    assert np.load(tmp_path / "documents.npy").dtype == DOCUMENT


def test_documents_may_be_numbered_otherwise_than_they_lie(tmp_path: Path):
    ids, mask, lengths = documents(80)
    order = np.random.default_rng(1).permutation(80)
    with DatasetWriter(tmp_path / "a", vocab_size=1000, part_tokens=300, documents=80) as writer:
        writer.add(ids, mask, lengths, np.arange(80) % 7, numbers=np.argsort(order))
    with DatasetWriter(tmp_path / "b", vocab_size=1000, part_tokens=300) as writer:
        writer.add(ids, mask, lengths, np.arange(80) % 7)
    numbered, plain = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    for number, place in enumerate(order):
        assert [x.tolist() for x in numbered[number]] == [x.tolist() for x in plain[int(place)]]
    assert numbered.documents["source"].tolist() == (order % 7).tolist()
    for name in {p.name for p in (tmp_path / "b").iterdir()} - {"documents.npy"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert writer.hashes[name] == hashlib.sha256((tmp_path / "b" / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("fault", ["overlap", "gap", "twice", "another part", "beyond", "empty"])
def test_documents_that_do_not_tile_the_parts_are_refused(tmp_path: Path, fault: str):
    with DatasetWriter(tmp_path, vocab_size=1000, part_tokens=200) as writer:
        writer.add(*documents(50))
    rows = np.load(tmp_path / "documents.npy")
    if fault == "overlap":
        rows["start"][3] -= 1
    elif fault == "gap":
        rows["length"][3] -= 1
    elif fault == "twice":
        rows[3] = rows[4]
    elif fault == "another part":
        rows["part"][3] = 1 if rows["part"][3] == 0 else 0
    elif fault == "beyond":
        rows["part"][3] = 99
    else:
        rows = np.append(rows, rows[3:4])
        rows["length"][-1] = 0
    np.save(tmp_path / "documents.npy", rows)
    with pytest.raises(SftError, match=r"documents\.npy: its documents do not cover"):
        Dataset.open(tmp_path)
    np.save(tmp_path / "documents.npy", np.random.default_rng(0).permutation(rows))
    with pytest.raises(SftError, match="do not cover"):
        Dataset.open(tmp_path)
