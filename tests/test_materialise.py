"""sft.data.materialise: documents in any order, read and written forwards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_data
from sft.common.errors import SftError
from sft.data import materialise as module
from sft.data.chunks import Progress
from sft.data.compiled import TRAINED
from sft.data.dataset import Dataset
from sft.data.materialise import materialise, reads
from sft.data.mix import Selection
from sft.data.placement import CachedSource, Placement
from sft.data.token_check import TokenCheck
from sft.data.tokencache import ChunkWriter

EOS = 9


def cached(folder: Path, files: int, documents: int, seed: int = 0) -> tuple[list[Path], list[list[np.ndarray]]]:
    """Files of the token cache, and the documents in each: ids with the bit TRAINED."""
    rng = np.random.default_rng(seed)
    paths, found = [], []
    for number in range(files):
        path = folder / f"{number}.tok"
        made = []
        for _ in range(documents):
            ids = rng.integers(10, 1000, rng.integers(3, 30)).astype(np.uint32)
            ids[-1] = EOS
            ids[rng.integers(1, len(ids)) :] |= TRAINED
            made.append(ids)
        lengths = np.array([len(d) for d in made])
        with ChunkWriter(path) as writer:
            labels = np.array([int((d >= TRAINED).sum()) for d in made])
            writer.add(
                np.concatenate(made), lengths, labels, np.arange(documents), *np.zeros((2, documents), dtype=np.uint64)
            )
        paths.append(path)
        found.append(made)
    return paths, found


def placed(made: list[list[np.ndarray]], picks: list[tuple[int, int]]) -> Placement:
    """The documents (file, document), numbered in this order. Every file is a source."""
    index, numbers = [], []
    for source in range(len(made)):
        mine = sorted((d, number) for number, (f, d) in enumerate(picks) if f == source)
        index.append(np.array([d for d, _ in mine], dtype=np.uint32))
        numbers += [number for _, number in mine]
    lengths = [np.array(list(map(len, documents)), dtype=np.uint32) for documents in made]
    sources = [CachedSource(np.array([0, len(x)]), x) for x in lengths]
    return Placement(Selection(tuple(index), np.array(numbers, dtype=np.uint32)), sources)


def run(folder: Path, paths: list[Path], placement: Placement, threads: int = 2) -> Dataset:
    check = TokenCheck("x", made_data.facts(1000, EOS, pad_id=0))
    progress = Progress(lambda _: None, "writing", 1)
    written, _ = materialise(folder, 1000, paths, placement, check, progress, threads)
    assert written.documents == placement.documents and written.tokens == placement.tokens
    return Dataset.open(folder)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("copies", [1, 3])
def test_every_document_has_its_number_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, copies: int
) -> None:
    for name, value in (("BLOCK_TOKENS", 100), ("READ_TOKENS", 64), ("GAP_TOKENS", 8), ("OPEN_FILES", 1)):
        monkeypatch.setattr(module, name, value)
    paths, made = cached(tmp_path, files=4, documents=30)
    rng = np.random.default_rng(1)
    picks = [(f, d) for f in range(4) for d in range(30) if rng.random() < 0.6] * copies
    picks = [picks[i] for i in rng.permutation(len(picks))]
    data = run(tmp_path / "out", paths, placed(made, picks), threads)
    for (f, d), (ids, mask), row in zip(picks, data, data.documents, strict=True):
        assert ids.tolist() == (made[f][d] & ~TRAINED).tolist()
        assert mask.tolist() == (made[f][d] >= TRAINED).tolist()
        assert (row["source"], row["labels"]) == (f, mask.sum())


def test_files_are_read_once_forwards_and_copies_lie_apart(tmp_path: Path) -> None:
    paths, made = cached(tmp_path, files=3, documents=10)
    picks = [(f, d) for f in (2, 0, 1) for d in range(10)] * 2
    picks = [picks[i] for i in np.random.default_rng(0).permutation(60)]
    placement = placed(made, picks)
    first = list(dict.fromkeys(f for f, _ in picks))  # files in the order of their first documents
    for most in (1, 40, 10**9):
        batches = list(placement.batches(most))
        order = np.concatenate([batch.number for batch in batches]).tolist()
        assert sorted(order) == list(range(60))
        assert [picks[i] for i in order] == [(f, d) for _ in range(2) for f in first for d in range(10)]
        assert all(batch.length.sum() <= most or len(batch) == 1 for batch in batches)
    assert len(run(tmp_path / "out", paths, placement).ids) == 1


def test_the_files_of_a_source_are_placed_like_those_of_several() -> None:
    lengths = np.arange(1, 31, dtype=np.uint32)
    source = CachedSource(np.array([0, 10, 10, 30]), lengths)
    index = np.array([3, 3, 9, 10, 29], dtype=np.uint32)
    placement = Placement(Selection((index,), np.array([4, 0, 3, 2, 1], dtype=np.uint32)), [source])
    (first, second) = placement.batches(10**9)
    assert first.number.tolist() == [4, 3, 2, 1] and second.number.tolist() == [0]
    assert first.file.tolist() == [0, 0, 2, 2] and first.start.tolist() == [6, 45, 0, sum(range(11, 30))]
    assert (placement.documents, placement.tokens, placement.longest) == (5, 4 + 4 + 10 + 11 + 30, 30)


def test_the_bytes_do_not_depend_on_threads_or_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, made = cached(tmp_path, files=3, documents=40)
    picks = [(f, d) for f in range(3) for d in range(40)]
    documents = placed(made, [picks[i] for i in np.random.default_rng(0).permutation(120)])
    run(tmp_path / "a", paths, documents, threads=1)
    monkeypatch.setattr(module, "BLOCK_TOKENS", 50)
    monkeypatch.setattr(module, "READ_TOKENS", 1)
    run(tmp_path / "b", paths, documents, threads=3)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.seconds
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=40))
def test_reads_bring_every_document_once_and_little_else(rows: list[tuple[int, int, int]]) -> None:
    file, start, length = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_TOKENS", 20)
        patch.setattr(module, "GAP_TOKENS", 4)
        spans = list(reads(file, start, length))
    assert [i for a, b in spans for i in range(a, b)] == list(range(len(rows)))
    for a, b in spans:
        assert len(set(file[a:b].tolist())) == 1
        ends = (start + length)[a:b]
        assert ends[-1] - start[a] <= 20 or b - a == 1
        assert (start[a + 1 : b] >= ends[:-1]).all() and (start[a + 1 : b] - ends[:-1] <= 4).all()


def test_a_file_that_lost_its_end_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    paths, made = cached(tmp_path, files=2, documents=10)
    documents = placed(made, [(f, d) for f in range(2) for d in range(10)])
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(SftError, match=r"1\.tok: this file of the token cache ends too soon"):
        run(tmp_path / "out", paths, documents)
    paths[1].unlink()
    with pytest.raises(SftError, match="missing in the token cache"):
        run(tmp_path / "other", paths, documents)


def test_a_disk_too_small_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, made = cached(tmp_path, files=1, documents=5)
    usage: Any = lambda _: SimpleNamespace(free=10)  # noqa: E731
    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    with pytest.raises(SftError, match="10 are free on that disk"):
        run(tmp_path / "out", paths, placed(made, [(0, 1)]))
    assert not (tmp_path / "out").exists()
