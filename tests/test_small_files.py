"""Small files share a job; every row keeps its file and its number; a file without a usable row is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preparing import contents, conversation, stage, write_rows
from sft.common.errors import SftError
from sft.data import prepare
from sft.formats import rejects
from sft.recipe.schema import Source
from sft.sources import blocks, input_files, small_files


def files_in(folder: Path, *names: str) -> list[input_files.InputFile]:
    found = input_files.resolve(Source(path="mix"), lambda _: folder / "mix", folder / "cache").files
    return [file for file in found if not names or file.name in names]


def write_mix(folder: Path) -> None:
    """Ten small JSONL files, of which some have odd ends, and three Parquet files, of which one has another schema."""
    (folder / "mix").mkdir()
    for i in range(10):
        write_rows(folder / "mix" / f"{i}.jsonl", [conversation(10 * i + k) for k in range(3)])
    (folder / "mix" / "2.jsonl").write_bytes((folder / "mix" / "2.jsonl").read_bytes()[:-1])  # no newline at the end
    text = (folder / "mix" / "4.jsonl").read_bytes()
    (folder / "mix" / "4.jsonl").write_bytes(b"\xef\xbb\xbf\n" + text + b"\n\n")  # byte order mark and blank lines
    for i, rows in enumerate(([{"n": 0}], [{"n": 1}], [{"n": "text"}])):
        pq.write_table(pa.Table.from_pylist(rows), folder / "mix" / f"p{i}.parquet")


def test_jobs_of_several_files_hold_every_row_in_order(tmp_path):
    write_mix(tmp_path)
    files = files_in(tmp_path)
    jobs = list(small_files.cut_into_jobs(files))
    assert [len(chunks) for chunks in jobs] == [10, 3]
    alone = [[batch.rows for chunk in input_files.cut(f) for batch in blocks.read(chunk)] for f in files]
    for chunks in jobs:
        counts: list[int] = []
        made = list(small_files.read_job(chunks, counts))
        read = [batch for block in made if (batch := block.batch())]
        assert len(made) == (1 if chunks[0].file.kind == "jsonl" else 2)
        before = [sum(counts[:i]) for i in range(len(counts))]
        found = {n: row for batch in read for n, row in zip(batch.numbers, batch.rows, strict=True)}
        for file, start, count in zip((c.file for c in chunks), before, counts, strict=True):
            expected = [row for rows in alone[files.index(file)] for row in rows]
            assert [found[n] for n in range(start, start + count) if n in found] == expected
    assert counts == [1, 1, 1]


def test_large_files_and_files_of_another_kind_have_jobs_of_their_own(tmp_path, monkeypatch):
    write_mix(tmp_path)
    write_rows(tmp_path / "mix" / "5.jsonl", [conversation(i) for i in range(200)])
    monkeypatch.setattr(input_files, "MIN_CHUNK_BYTES", 3000)
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 20_000)
    jobs = list(small_files.cut_into_jobs(files_in(tmp_path)))
    names = [chunk.file.name for chunks in jobs for chunk in chunks]
    assert list(dict.fromkeys(names)) == [f.name for f in files_in(tmp_path)]
    assert all(len({c.file.kind for c in chunks}) == 1 for chunks in jobs)
    assert all(len(chunks) == 1 for chunks in jobs if chunks[0].file.name == "mix/5.jsonl") and len(jobs) > 4
    assert all(sum(c.bytes for c in chunks[:-1]) < 3000 for chunks in jobs)


def test_a_reject_in_a_shared_job_has_its_own_file_and_row(tmp_path, small_chunks):
    (tmp_path / "mix").mkdir()
    for i in range(5):
        rows = [conversation(10 * i + k) for k in range(2)]
        write_rows(tmp_path / "mix" / f"{i}.jsonl", [*rows, "", "torn {", conversation(99 + i)][i % 2 :])
    write_rows(tmp_path / "mix" / "long.jsonl", [*(conversation(i) for i in range(100, 160)), "torn {"])
    s = stage(tmp_path, sources=(Source(path="mix"),))
    prepare.prepare(s)
    found = [json.loads(line) for line in (s.out / rejects.REJECTS).read_text().splitlines()]
    expected = [(f"mix/{i}.jsonl", 4 - i % 2) for i in range(5)]
    assert [(r["file"], r["row"]) for r in found] == [*expected, ("mix/long.jsonl", 61)]
    assert contents(s.out)


@pytest.mark.parametrize("bad", ["not a row\n", "", "\n\n", '{"unknown": 1}\n'])
def test_a_file_without_a_usable_row_is_refused_whatever_its_share(tmp_path, bad):
    (tmp_path / "mix").mkdir()
    write_rows(tmp_path / "mix" / "a.jsonl", [conversation(i) for i in range(300)])
    (tmp_path / "mix" / "b.jsonl").write_text(bad)
    with pytest.raises(SftError, match=r"mix/b\.jsonl: holds no usable row.*next: correct or remove the file"):
        prepare.prepare(stage(tmp_path, sources=(Source(path="mix"),)))
