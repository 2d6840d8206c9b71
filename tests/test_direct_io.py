"""sft.common.direct_io: what is written is what lies on the disk, with its sha256, whether or not it goes past the page cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from sft.common import direct_io
from sft.common.direct_io import BLOCK, DirectFile


@pytest.fixture(params=["direct", "refused", "refused late", "unknown"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With O_DIRECT where the disk of the test has it; on a file system that refuses it at once, or by the first write; on a system
    without."""
    monkeypatch.setattr(direct_io, "BUFFER", 2 * BLOCK)
    monkeypatch.setattr(direct_io, "_free", direct_io.SimpleQueue())
    if request.param == "refused":
        plain = os.open

        def refusing(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & direct_io.DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
            return plain(path, flags, mode)

        monkeypatch.setattr(os, "open", refusing)
    elif request.param == "refused late":
        write = os.write

        def refusing_late(file: int, data: memoryview) -> int:
            if fcntl.fcntl(file, fcntl.F_GETFL) & direct_io.DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return write(file, data)

        monkeypatch.setattr(os, "write", refusing_late)
    elif request.param == "unknown":
        monkeypatch.setattr(direct_io, "DIRECT", 0)
    return str(request.param)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 9 * BLOCK + 5])
def test_bytes_of_any_number_in_any_pieces_are_written_and_hashed(tmp_path: Path, way: str, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    file = DirectFile(tmp_path / "x")
    cuts = sorted(np.random.default_rng(1).integers(0, size + 1, 6).tolist())
    for a, b in zip([0, *cuts], [*cuts, size], strict=True):
        file.write(data[a:b])
        assert not (tmp_path / "x").exists()
    assert file.close() == hashlib.sha256(data.tobytes()).hexdigest()
    assert (tmp_path / "x").read_bytes() == data.tobytes()
    assert os.listdir(tmp_path) == ["x"]


def test_arrays_of_wider_types_and_records_are_their_bytes(tmp_path: Path, way: str) -> None:
    numbers = np.arange(3000, dtype="<u4")
    records = np.zeros(5, dtype=[("a", "<u2"), ("b", "<u8")])
    file = DirectFile(tmp_path / "x")
    file.write(numbers)
    file.write(b"between")
    file.write(records)
    file.close()
    assert (tmp_path / "x").read_bytes() == numbers.tobytes() + b"between" + records.tobytes()


def test_what_a_killed_run_left_is_written_over(tmp_path: Path, way: str) -> None:
    (tmp_path / "x.partial").write_bytes(b"old" * BLOCK)
    file = DirectFile(tmp_path / "x")
    file.write(b"new")
    file.close()
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_disk_that_fails_leaves_nothing_and_is_reported_by_the_next_call(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "x").write_bytes(b"the old one")
    file = DirectFile(tmp_path / "x")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(8):
            file.write(bytes(BLOCK))
        file.close()
    file.abort()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"the old one"


def test_writes_that_take_less_than_they_are_given_are_continued(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.write
    monkeypatch.setattr(
        os, "write", lambda file, data: plain(file, data[: max(BLOCK, len(data) // 2 // BLOCK * BLOCK)])
    )
    data = np.random.default_rng(0).bytes(7 * BLOCK + 11)
    file = DirectFile(tmp_path / "x")
    file.write(data)
    assert file.close() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data


def test_memory_of_finished_files_is_used_again(tmp_path: Path, way: str) -> None:
    first = DirectFile(tmp_path / "a")
    memory = {buffer.ctypes.data for buffer in first._buffers}
    first.close()
    second = DirectFile(tmp_path / "b")
    assert {buffer.ctypes.data for buffer in second._buffers} == memory
    second.abort()
    assert os.listdir(tmp_path) == ["a"]
