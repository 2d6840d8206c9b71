"""The short form of make fuzz: some inputs of every kind are used or refused, and its checks see what is wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

import fuzz
import fuzz_files
import fuzz_words
from fuzz import TARGETS, Target
from sft.common.errors import SftError
from sft.recipe import schema


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_inputs_of_every_kind_are_used_or_refused(tmp_path: Path, target: Target) -> None:
    seen = fuzz.fuzz(target, max(5, 60 // target.cost), tmp_path.resolve())
    assert seen.total() >= 5


@pytest.mark.seconds
def test_another_exception_a_hang_and_a_false_use_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise SftError("x")

    def crash(*_: object) -> bool:
        raise KeyError("x")

    def hang(*_: object) -> bool:
        while True:
            pass

    def cases(_: Path) -> fuzz.Strategy:
        return st.just(0)

    assert fuzz.fuzz(Target("refused", cases, refuse), 5, tmp_path) == {"refused": 1}
    with pytest.raises(KeyError):
        fuzz.fuzz(Target("crashes", cases, crash), 5, tmp_path)
    monkeypatch.setattr(fuzz, "HANG_S", 0.05)
    with pytest.raises(fuzz.Hang):
        fuzz.fuzz(Target("hangs", cases, hang), 1, tmp_path)


def test_a_lost_row_and_a_changed_value_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="39 rows, 0 rejects of 40 lines"):
        monkeypatch.setattr(fuzz_files, "rows_of", lambda *_: (fuzz_files.ROWS[:39], 0))
        fuzz_files.check_source(tmp_path, ("x.jsonl", fuzz_files.LINES))
    with pytest.raises(AssertionError, match="39 rows of 40"):
        fuzz_files.check_source(tmp_path, ("x.jsonl.gz", b""))
    assert fuzz_words.same(schema.Train(lr=1.0), {"lr": 1, "betas": [0.9, 0.95]})
    assert not fuzz_words.same(schema.Train(lr=1.0), {"lr": 2}) and not fuzz_words.same(
        schema.Train(), {"betas": [0.9]}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 200, b"PK\x03\x04", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<u4', "],
    ids=["empty", "zeros", "zip", "half a header"],
)
def test_a_list_of_numbers_that_numpy_cannot_parse_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SftError, match=r"documents.npy: cannot be read"):
        fuzz_files.check_dataset(tmp_path, ("documents.npy", data))
    assert not fuzz_files.check_packs(tmp_path, ("offsets.npy", data)) and not fuzz_files.check_packs(
        tmp_path, ("pieces.npy", data)
    )


@pytest.mark.slow
def test_a_part_whose_position_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Part 2^24 times 2^40 is position 0 again in 64 bits."""
    rows = np.load(fuzz_files.dataset(tmp_path) / "documents.npy").copy()
    rows["part"][0] = 1 << 24
    out = io.BytesIO()
    np.save(out, rows)
    with pytest.raises(SftError, match="its documents do not cover the 1 parts"):
        fuzz_files.check_dataset(tmp_path, ("documents.npy", out.getvalue()))
