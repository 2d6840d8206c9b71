"""Reading rows: every kind of file gives the same rows, bad lines are counted with their numbers, chunks tile the file."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft.chat.rows import RowReader
from sft.common.errors import SftError
from sft.recipe import inputs
from sft.recipe.schema import Prepare, Source
from sft.sources import blocks, input_files, unpack

ROWS = [{"prompt": f"q{i} é", "completion": "a" * (i % 50)} for i in range(500)]


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return file


def resolved(folder: Path, name: str) -> list[input_files.InputFile]:
    return list(input_files.resolve(Source(path=name), lambda p: folder / p, folder / "cache").files)


def everything(folder: Path, name: str) -> tuple[list[dict], list[blocks.Reject]]:
    rows, bad = [], []
    for file in resolved(folder, name):
        base = 0
        for chunk in input_files.cut(file):
            count = 0
            for batch in blocks.read(chunk):
                rows += batch.rows
                bad += [b._replace(row=b.row + base + 1) for b in batch.rejects]
                count = batch.count
            base += count
    return rows, bad


def write_parquet(file: Path, rows: list) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=70)


def write_arrow(file: Path, rows: list) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(file.parent / "saved"))
    (saved,) = (file.parent / "saved").glob("*.arrow")
    saved.rename(file)


def compressed(compress):
    """A writer of lines of JSON that `compress` packs."""
    return lambda f, rows: f.write_bytes(compress(write_jsonl(f.parent / "plain", rows).read_bytes()))


def write_csv(file: Path, rows: list, delimiter: str = ",") -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def zstd(data: bytes) -> bytes:
    """Two frames, as tools write that compress in parallel."""
    half = len(data) // 2
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


ZST = zstd(b'{"a": 1}\n' * 999)


WRITERS = {
    "x.jsonl": write_jsonl,
    "x.jsonl.gz": compressed(gzip.compress),
    "X.JSONL.GZ": compressed(gzip.compress),
    "x.ndjson": write_jsonl,
    "x.ndjson.zst": compressed(zstd),
    "x.jsonl.xz": compressed(lzma.compress),
    "x.jsonl.bz2": compressed(bz2.compress),
    "x.json.gz": lambda f, rows: f.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "lines.json.zst": compressed(zstd),
    "x.json": lambda f, rows: f.write_text(json.dumps(rows, indent=2)),
    "lines.json": write_jsonl,
    "x.parquet": write_parquet,
    "x.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    assert everything(tmp_path, name) == (ROWS, [])


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.CSV.gz", "x.tsv.zst"])
def test_csv_gives_texts_and_nulls(tmp_path, name):
    rows = [
        {"prompt": 'a "b"\n\nc,\td', "completion": "é", "n": "007"},
        {"prompt": " x ", "completion": "1.0", "n": "true"},
    ]
    write_csv(tmp_path / "plain", [*rows, {"prompt": "", "completion": "NA", "n": "null"}], ",\t"["tsv" in name])
    data = (tmp_path / "plain").read_bytes()
    (tmp_path / name).write_bytes(
        gzip.compress(data) if name.endswith("gz") else zstd(data) if name.endswith("zst") else data
    )
    assert everything(tmp_path, name) == ([*rows, {"prompt": None, "completion": "NA", "n": "null"}], [])


def test_a_csv_file_may_have_a_byte_order_mark_and_one_column_without_a_name(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf,prompt,completion\r\n0,a,b\r\n1,c,d\r\n")
    assert everything(tmp_path, "x.csv")[0] == [
        {"unnamed": "0", "prompt": "a", "completion": "b"},
        {"unnamed": "1", "prompt": "c", "completion": "d"},
    ]


@pytest.mark.parametrize("tail", [0, 5, 64, 1000])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_chunks_of_any_size_hold_every_line_once(tmp_path, monkeypatch, size, tail):
    monkeypatch.setattr(blocks, "TAIL_BYTES", tail)
    monkeypatch.setattr(input_files, "MIN_CHUNK_BYTES", size)
    monkeypatch.setattr(input_files, "CHUNK_BYTES", size)
    text = '{"a": 1}\n\n{"a": 2}\r\n' + json.dumps({"a": "x" * 300}) + '\n{"a": 3}\n{"a": 4}'
    (tmp_path / "x.jsonl").write_text(text)
    rows, bad = everything(tmp_path, "x.jsonl")
    assert [r["a"] for r in rows] == [1, 2, "x" * 300, 3, 4] and not bad
    assert blocks.read_row(resolved(tmp_path, "x.jsonl"), 5)[1:] == (5, {"a": 3})  # the blank line is line 2


BAD_LINES = {
    "torn": (b'{"prompt": "x", "completi', "not_json"),
    "not_json": (b"hello", "not_json"),
    "latin1": ('{"prompt": "caf\xe9"}'.encode("latin-1"), "not_utf8"),
    "utf16": ('{"prompt": "x"}'.encode("utf-16"), "not_utf8"),
    "array": (b'[{"prompt": "x"}]', "not_an_object"),
    "number": (b"12", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "string": (b'"text"', "not_an_object"),
    "two_rows": (b'{"a": 1}{"a": 2}', "not_json"),
    "control_character": (b'{"a": "x\x00y"}', "not_json"),
    "deep": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not_json"),
    "huge_number": (b'{"a": ' + b"9" * 10_000 + b"}", "not_json"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_a_counted_reject_and_its_neighbours_live(tmp_path, case):
    line, reason = BAD_LINES[case]
    good = json.dumps({"prompt": "p"}).encode()
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    rows, bad = everything(tmp_path, "x.jsonl")
    assert rows == [{"prompt": "p"}] * 2
    assert [(b.row, b.reason) for b in bad] == [(2, reason)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), "its content is UTF-16"),
        ("x.json", gzip.compress(b"[]"), "its content is gzip"),
        ("x.jsonl.gz", gzip.compress(gzip.compress(b"{}")), "its content is gzip"),
        ("x.csv", b"PK\3\4", "its content is a zip archive"),
    ],
)
def test_a_text_file_that_is_no_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SftError, match=f"{name}: its name says text, and {message}; next: "):
        resolved(tmp_path, name)


def test_what_the_fast_parser_refuses_the_slow_one_decides():
    assert blocks.parse(b'{"a": "\\ud800"}') == {"a": "\ud800"}  # the encoder judges lone surrogates
    assert blocks.parse(b" \t\r") is None
    assert blocks.parse(b'{"a": 123456789012345678901234567890}') == {"a": 123456789012345678901234567890}


def test_integers_beyond_64_bits_are_not_rounded(tmp_path):
    rows = [{"n": 10**i + 1, "s": "x" * i} for i in range(40)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert everything(tmp_path, "x.jsonl") == (rows, [])
    assert not blocks._has_long_number(b'{"a": 123456789012345678, "b": "2024-01-01T00:00:00"}' * 99)
    for pad in range(30):
        assert blocks._has_long_number(b"x" * pad + b"1234567890123456789" + b"y" * 9)


def test_a_row_longer_than_the_limit_is_rejected_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MAX_ROW_BYTES", 2 << 20)
    long = json.dumps({"a": "x" * (5 << 20)})
    (tmp_path / "x.jsonl").write_text(f'{{"a": 1}}\n{long}\n{{"a": 2}}\n')
    rows, bad = everything(tmp_path, "x.jsonl")
    assert [r["a"] for r in rows] == [1, 2]
    assert [(b.row, b.reason) for b in bad] == [(2, "row_too_long")]


COMPRESS = {
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "gz": gzip.compress,
    "zst": lambda d: pa.compress(d, "zstd", asbytes=True),
}
TWO = {kind: pack(b"{}\n") + b"\0" + pack(b"{}\n")[1:] for kind, pack in COMPRESS.items()}
"""Two streams, the second one's first byte damaged."""


def repeated(column: pa.Array, name: str = "completion") -> bytes:
    """An Arrow stream with two columns `name` (but one where it is a struct)."""
    columns = [column] * (1 if pa.types.is_struct(column.type) else 2)
    batch = pa.RecordBatch.from_arrays(columns, [name] * len(columns))
    with pa.BufferOutputStream() as out:
        with pa.ipc.new_stream(out, batch.schema) as stream:
            stream.write_batch(batch)
        return out.getvalue().to_pybytes()


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column, column], ["completion"] * 2), tmp_path / "x.parquet")
    with pytest.raises(SftError, match=r"x\.parquet: several columns are named completion"):
        everything(tmp_path, "x.parquet")


@pytest.mark.parametrize("kind", COMPRESS)
def test_all_streams_of_a_compressed_file_are_read(tmp_path, kind):
    pack, padding = COMPRESS[kind], b"" if kind == "zst" else b"\0" * 8
    zeros = b'{"a": "' + b"0" * (5 << 20) + b'"}\n'
    between = padding if kind == "xz" else b""
    (tmp_path / f"x.jsonl.{kind}").write_bytes(pack(b'{"a": 1}\n') + between + pack(zeros) + padding)
    rows, rejects = everything(tmp_path, f"x.jsonl.{kind}")
    assert (rows[0], len(rows[1]["a"]), rejects) == ({"a": 1}, 5 << 20, [])


def test_files_of_equal_content_are_reported(tmp_path):
    (tmp_path / "mix").mkdir()
    for name, n in (("a", 1), ("b", 2), ("c", 1), ("empty", 0), ("none", 0)):
        write_jsonl(tmp_path / "mix" / f"{name}.jsonl", [{"n": n}] if n else [])
    (tmp_path / "mix" / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "mix" / "a.jsonl").read_bytes()))
    lines: list[str] = []
    input_files.resolve(Source(path="mix"), lambda p: tmp_path / p, tmp_path / "cache", log=lines.append)
    (line,) = lines
    assert "warning: mix: 3 files have equal content" in line
    assert "mix/a.jsonl, mix/a.jsonl.gz, mix/c.jsonl; next: " in line
    write_parquet(tmp_path / "mix" / "b.parquet", [{"n": 2}])
    input_files.resolve(Source(path="mix"), lambda p: tmp_path / p, tmp_path / "cache", log=lines.append)
    assert (
        "2 files have names that differ in the format alone" in lines[-1] and "mix/b.jsonl, mix/b.parquet" in lines[-1]
    )


def test_sources_that_read_the_same_content_are_reported(tmp_path):
    for name, n in (("a", 1), ("b", 1), ("c", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"n": n}])
    named = (
        Source(path="a.jsonl"),
        Source(path="b.jsonl"),
        Source(path="c.jsonl"),
        Source(path="a.jsonl", columns={"prompt": "n"}),
    )
    found = [input_files.resolve(source, lambda p: tmp_path / p, tmp_path / "cache") for source in named]
    lines: list[str] = []
    input_files.warn_of_shared(named, found, lines.append)
    (line,) = lines
    assert (
        "warning: sources 1 (a.jsonl) and 2 (b.jsonl) read files of equal content" in line
        and ": a.jsonl; next: " in line
    )


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert everything(tmp_path, "x.jsonl") == everything(tmp_path, "x.json") == ([{"a": 1}], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"a": 1}, {"a": ', "after row 1"),
        ("x.json", b'[{"a": 1} {"a": 2}]', "expected a comma"),
        ("x.json", b'[{"a": 1}] trailing', "after the closing bracket"),
        ("x.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("x.json", b'{\n  "a": 1\n}', "neither a JSON array"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20], "broken gz file"),
        ("x.jsonl.gz", b"not gzip", "broken gz file"),
        ("x.jsonl.zst", b"notreal\n", "broken zst file"),
        ("x.jsonl.zst", ZST[:-9], "broken zst file"),
        ("x.jsonl.xz", lzma.compress(b"{}\n" * 99)[:-9], "broken xz file"),
        ("x.csv.bz2", bz2.compress(b"a,b\n" * 99)[:-9], "broken bz2 file"),
        ("x.csv", b"prompt,completion\na,b,c\n", "broken CSV"),
        ("x.csv", b"prompt,prompt\na,b\n", "name each column once"),
        ("x.csv", b'prompt,completion\nq,"a\nb"\n"yes" she said,A1\n', "line 4: broken CSV .* starts at line 4"),
        ("x.tsv", b'p\tc\nq1\tA1\nq2\t"open A2\nq3\tA3\nq4\tclose" A4\n', "line 5: broken CSV .* starts at line 3"),
        ("x.csv", b'p,c\nq,"open\n', "broken CSV"),
        ("x.jsonl.bz2", TWO["bz2"], "broken bz2 file"),
        ("x.jsonl.xz", TWO["xz"], "broken xz file"),
        ("x.jsonl.gz", TWO["gz"], "broken gz file"),
        ("x.jsonl.zst", TWO["zst"], "broken zst file"),
        *((f"x.jsonl.{kind}", b"", rf"broken {kind} file \(it is empty\)") for kind in ("gz", "zst", "bz2", "xz")),
        ("x.jsonl.xz", lzma.compress(b"{}\n") + b"rest", "broken xz file"),
        ("x.tsv", b"", "name each column once"),
        ("x.parquet", b"PAR1 and nothing else", "broken parquet"),
        ("x.arrow", b"nothing at all", "broken arrow"),
        ("x.arrow", repeated(pa.array(["a"])), "several columns are named completion; next"),
        ("x.arrow", repeated(pa.StructArray.from_arrays([pa.array(["a"])] * 2, ["b", "b"]), "other"), "named other.b"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # compressed bytes differ from process to process
)
def test_a_file_that_cannot_be_read_stops_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SftError, match=message) as error:
        everything(tmp_path, name)
    assert str(error.value).startswith(name)


def rows_of_calls() -> list[dict]:
    """Two conversations whose calls and tools have other properties, one of them a null that its tool requires."""
    rows = []
    for name, properties, arguments in (("f", ["a", "b"], {"a": None, "b": 1}), ("g", ["c"], {"c": [{"d": "x"}]})):
        schema = {
            "type": "object",
            "properties": {p: {"type": "object"} for p in properties},
            "required": properties[:1],
        }
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [
            {"role": "user", "content": "q", "note": ""},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        rows.append(
            {"messages": messages, "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}]}
        )
    del rows[0]["messages"][0]["note"]
    return rows


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl"])
def test_nulls_that_a_columnar_file_adds_are_not_read(tmp_path, name):
    rows = rows_of_calls()
    if name == "x.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        {"x.parquet": write_parquet, "x.arrow": write_arrow}[name](tmp_path / name, rows)
    source = Source(path=name)
    read = RowReader(Prepare(tokenizer="t", sources=(source,)), source).read
    for row, want in zip(map(read, everything(tmp_path, name)[0]), rows, strict=True):
        assert row.messages == [{"role": "user", "content": "q"}, {**want["messages"][1], "content": ""}]
        assert row.tools == want["tools"]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_json_values_of_arrow_are_parsed_wherever_they_are(tmp_path, name):
    def field(name: str) -> pa.Field:
        marks = {"ARROW:extension:name": "arrow.json", "ARROW:extension:metadata": ""}
        return pa.field(name, pa.string(), metadata=marks)

    text = json.dumps({"a": [1, None]})
    inside = pa.struct([("x", pa.list_(pa.struct([field("y")])))])
    schema = pa.schema([
        field("plain"), ("listed", pa.list_(field("item"))), ("text", pa.string()), ("inside", inside),
        ("mapped", pa.map_(pa.string(), field("value"))),
    ])  # fmt: skip
    rows = [
        {"plain": text, "listed": [text, None, '"s"'], "text": text, "inside": {"x": [{"y": "[]"}, {"y": "1"}]}, "mapped": [("k", text)]},
        {"plain": "{torn"}, {"text": "{torn"},
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema)
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(table)
    (first, last), bad = everything(tmp_path, name)
    value = {"a": [1, None]}
    assert first == {
        "plain": value, "listed": [value, None, "s"], "text": text, "inside": {"x": [{"y": []}, {"y": 1}]}, "mapped": [("k", value)],
    }  # fmt: skip
    assert last["text"] == "{torn" and [(b.row, b.reason) for b in bad] == [(2, "not_json")]


def test_a_flipped_byte_in_a_parquet_page_is_an_error_or_a_reject_never_a_crash(tmp_path):
    write_parquet(tmp_path / "x.parquet", ROWS)
    good = (tmp_path / "x.parquet").read_bytes()
    for at in range(4, len(good), len(good) // 40):
        (tmp_path / "x.parquet").write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            everything(tmp_path, "x.parquet")
        except SftError as error:
            assert "x.parquet" in str(error)


def test_json_arrays_are_read_in_blocks_smaller_than_an_element(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([*ROWS, 12345678, "s", None, [1]], ensure_ascii=False))
    assert list(unpack.json_array("x.json", tmp_path / "x.json", block=5)) == [*ROWS, 12345678, "s", None, [1]]


def test_a_folder_is_read_in_the_order_of_its_names_and_ignores_other_files(tmp_path):
    folder = tmp_path / "mix"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", [{"n": 2}])
    write_jsonl(folder / "a.jsonl", [{"n": 1}])
    write_jsonl(folder / "sub" / "c.jsonl", [{"n": 3}])
    (folder / "README.md").write_text("no rows")
    (folder / ".hidden.jsonl").write_text("{}")
    assert [r["n"] for r in everything(tmp_path, "mix")[0]] == [1, 2, 3]


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    write_jsonl(tmp_path / "secret.jsonl", [{"n": 1}])
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "x.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(SftError, match="leaves"):
        inputs.dataset_files(tmp_path / "mix", "mix", inputs.Choice())


@pytest.mark.parametrize("nested", [False, True])
def test_an_arrow_file_whose_offsets_leave_its_text_is_refused_and_not_read(tmp_path: Path, nested: bool) -> None:
    """pyarrow reads past its buffers. A text that is not UTF-8 costs its row alone."""
    values = [{"content": "abc"}, {"content": "defg"}] if nested else ["abc", "defg"]
    table = pa.table({"messages": pa.array([values, values[:1]])} if nested else {"prompt": pa.array(values)})
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as out:
        out.write_table(table)
    data = (tmp_path / "x.arrow").read_bytes()
    offsets = (0).to_bytes(4, "little") + (3).to_bytes(4, "little") + (7).to_bytes(4, "little")
    assert data.count(offsets) == 1
    (tmp_path / "y.arrow").write_bytes(
        data.replace(offsets, offsets[:4] + (1 << 30).to_bytes(4, "little") + offsets[8:])
    )
    with pytest.raises(SftError, match=r"y.arrow: broken arrow file \(.*out of bounds.*\); next: fetch"):
        everything(tmp_path, "y.arrow")
    (tmp_path / "z.arrow").write_bytes(data.replace(b"defg", b"de\xffg"))
    rows, bad = everything(tmp_path, "z.arrow")
    assert len(rows) == 1 and [b.reason for b in bad] == ["unreadable_value"]
