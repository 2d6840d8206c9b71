"""Every file between stages, with values of any type and bytes of any kind: read, or refused with the file's name. Never a traceback."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz_files import FORMATS, check_format, contents
from fuzz_values import VALUES
from sft.common.errors import SftError
from sft.data.tokencache import MAGIC, read_summary
from sft.formats.identity import NAME, read_identity
from sft.formats.record import Record
from sft.formats.steps import Best, named_step
from sft.runner.listing import progress


@pytest.mark.parametrize(("name", "cls"), FORMATS)
@settings(max_examples=20, deadline=None)  # make fuzz does as many as it is asked for
@given(data=st.data())
def test_a_file_is_read_or_refused_by_its_name(name: str, cls: type[Record], data: Any) -> None:
    with contextlib.suppress(SftError):
        check_format(Path(), (cls, data.draw(contents(cls))))


@pytest.mark.parametrize(("name", "cls"), FORMATS)
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_file_that_is_nested_too_deeply_is_refused_by_its_name(name: str, cls: type[Record], depth: int) -> None:
    fields = ", ".join(f'"{field}": {"[" * depth}{"]" * depth}' for field in cls.__dataclass_fields__)
    try:
        cls.from_bytes(f"{{{fields}}}".encode(), "the/file")
        assert cls.SKIPS_UNKNOWN
    except SftError as error:
        assert str(error).startswith("the/file: ")


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
def test_marks_of_any_content_end_no_program(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("LATEST", "BEST", NAME):
        (folder / name).write_bytes(content)
    named_step(folder, "LATEST")
    Best.read(folder)
    try:
        read_identity(folder)
    except SftError as error:
        assert str(error).startswith(str(folder / NAME))


@settings(max_examples=150, deadline=None)
@given(
    value=VALUES
    | st.fixed_dictionaries({"step": VALUES, "loss": VALUES, "attempt": VALUES, "steps": VALUES, "seconds": VALUES})
)
def test_the_table_of_runs_survives_any_record(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "metrics.jsonl").write_text(json.dumps(value) + "\n")
    progress(folder)


@settings(max_examples=150, deadline=None)
@given(value=VALUES | st.fixed_dictionaries({"tokens": VALUES, "documents": VALUES, "rejects": VALUES}))
def test_a_cached_chunk_of_any_content_is_made_again(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "chunk"
    data = json.dumps(value).encode()
    file.write_bytes(data + len(data).to_bytes(8, "little") + MAGIC)
    read_summary(file)
