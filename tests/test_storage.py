"""Copies between folders: whole or absent, recognised when identical, and never outside the root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import REPO, files
from patience import PATIENCE
from sft.common.errors import SftError
from sft.storage import local
from sft.storage.checksums import checksums_of
from sft.storage.contract import FileCopy, Meter
from sft.storage.local import LocalStorage, is_partial
from sft.storage.transfer import open_storage, transfer


def make(root: Path, files: dict[str, bytes]) -> LocalStorage:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return LocalStorage(root)


def jobs(source: LocalStorage) -> list[FileCopy]:
    found = {n: checksums_of(source.root / n) for n in source.list()}
    return [FileCopy(n, n, s.bytes, s.sha256) for n, s in found.items()]


def quiet(_: str) -> None:
    pass


FILES = {"a": b"", "b/c.npy": os.urandom(9_000_000), "b/d/e": b"x" * 70_001}


@pytest.fixture
def source(tmp_path: Path) -> LocalStorage:
    return make(tmp_path / "source", FILES)


@pytest.fixture
def target(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "there" / "root")


def test_a_copy_has_the_same_bytes_and_leaves_nothing_else(source: LocalStorage, target: LocalStorage) -> None:
    done = transfer(jobs(source), source, target, quiet)
    assert all(d.copied for d in done) and [d.copy.target for d in done] == list(source.list())
    assert files(target.root) == FILES


def test_what_is_identical_is_not_copied_again_whatever_its_time(source: LocalStorage, target: LocalStorage) -> None:
    transfer(jobs(source), source, target, quiet)
    inodes = {n: (target.root / n).stat().st_ino for n in FILES}
    for n in FILES:
        os.utime(source.root / n, (1, 1))
        os.utime(target.root / n, (2e9, 2e9))
    assert not any(d.copied for d in transfer(jobs(source), source, target, quiet))
    assert {n: (target.root / n).stat().st_ino for n in FILES} == inodes


def test_a_bit_flip_at_the_target_is_found_and_repaired(source: LocalStorage, target: LocalStorage) -> None:
    transfer(jobs(source), source, target, quiet)
    flipped = bytearray(FILES["b/c.npy"])
    flipped[5_000_000] ^= 1
    (target.root / "b/c.npy").write_bytes(flipped)
    with pytest.raises(SftError, match="1 of 3 files differ"):
        transfer(jobs(source), source, target, quiet, check_only=True)
    assert [d.copy.target for d in transfer(jobs(source), source, target, quiet) if d.copied] == ["b/c.npy"]
    assert files(target.root) == FILES


def test_a_source_that_is_not_what_its_manifest_says_fails_and_the_others_arrive(
    source: LocalStorage, target: LocalStorage
) -> None:
    wanted = jobs(source)
    (source.root / "b/d/e").write_bytes(b"y" * 70_001)
    with pytest.raises(SftError, match=r"1 of 3 files failed:\n.*b/d/e has sha256 .*manifest says"):
        transfer(wanted, source, target, quiet)
    assert files(target.root) == {n: d for n, d in FILES.items() if n != "b/d/e"}


def test_a_missing_source_is_listed(source: LocalStorage, target: LocalStorage) -> None:
    wanted = jobs(source)
    (source.root / "a").unlink()
    with pytest.raises(SftError, match="a: no such file"):
        transfer(wanted, source, target, quiet)


def test_check_only_writes_nothing(source: LocalStorage, target: LocalStorage) -> None:
    with pytest.raises(SftError, match="3 of 3 files differ"):
        transfer(jobs(source), source, target, quiet, check_only=True)
    assert not target.root.exists()


def test_without_clobber_a_different_file_is_left_alone(source: LocalStorage, target: LocalStorage) -> None:
    make(target.root, {"a": b"mine"})
    with pytest.raises(SftError, match="was kept"):
        transfer(jobs(source), source, target, quiet, clobber=False)
    assert files(target.root) == {**FILES, "a": b"mine"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "a\0b", "./a", "~/x", "", "a\\b", ".."])
def test_names_that_could_leave_the_root_are_refused(
    name: str, source: LocalStorage, target: LocalStorage, tmp_path: Path
) -> None:
    before = files(tmp_path)
    with pytest.raises(SftError, match="relative path"):
        transfer([FileCopy("a", name, 0)], source, target, quiet)
    with pytest.raises(SftError, match="relative path"):
        transfer([FileCopy(name, "x", 0)], source, target, quiet)
    assert files(tmp_path) == before


def test_links_are_reported_and_not_followed(source: LocalStorage, target: LocalStorage, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("k")
    (source.root / "link").symlink_to(secret / "key")
    with pytest.raises(SftError, match=r"link: a link"):
        source.list()
    with pytest.raises(SftError, match="links are not followed"):
        transfer([FileCopy("link", "x", 1)], source, target, quiet)
    target.root.mkdir(parents=True, exist_ok=True)
    (target.root / "b").symlink_to(secret)
    with pytest.raises(SftError, match="links are not followed"):
        transfer([FileCopy("b/d/e", "b/d/e", 70_001)], source, target, quiet)
    assert files(secret) == {"key": b"k"}


def test_two_sources_for_one_target_are_refused(source: LocalStorage, target: LocalStorage) -> None:
    with pytest.raises(SftError, match="several sources for x"):
        transfer([FileCopy("a", "x", 0), FileCopy("b/d/e", "x", 70_001)], source, target, quiet)


def test_a_root_that_cannot_be_written_is_reported_first(source: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SftError, match="cannot be written"):
        transfer(jobs(source), source, LocalStorage(tmp_path / "file" / "root"), quiet)


def test_too_little_space_is_reported_with_the_bytes_needed(
    source: LocalStorage, target: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SftError, match=r"9,070,001 bytes are needed, 1,000 are free"):
        transfer(jobs(source), source, target, quiet)
    assert not files(target.root)


def test_a_disk_that_fills_up_leaves_no_partial_file(source: LocalStorage, tmp_path: Path) -> None:
    script = tmp_path / "full.sh"
    script.write_text(
        'set -e\nmkdir "$1/small"\nmount -t tmpfs -o size=1m none "$1/small"\n'
        'cd "$1"\n"$2" fill.py "$1/source" "$1/small" || echo failed\nls -AR "$1/small"\n'
    )
    (tmp_path / "fill.py").write_text(
        "import shutil, sys\nfrom pathlib import Path\nfrom sft.storage.contract import FileCopy\n"
        "from sft.storage.local import LocalStorage\nfrom sft.storage.transfer import transfer\n"
        "source, target = (LocalStorage(Path(p)) for p in sys.argv[1:])\n"
        "shutil.disk_usage = lambda _: type('U', (), {'free': 10**12})\n"  # it fills up later
        "jobs = [FileCopy(n, n, f.bytes) for n, f in source.list().items()]\n"
        "try:\n    transfer(jobs, source, target, print)\nexcept Exception as e:\n    sys.exit(str(e))\n"
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", str(script), str(tmp_path), sys.executable],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO / "lib")},
    )  # fmt: skip
    if "Operation not permitted" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert "No space left on device" in done.stderr and "free space there" in done.stderr, done.stderr
    assert "failed" in done.stdout and "c.npy" not in done.stdout and ".part" not in done.stdout, done.stdout


COPY_SLOWLY = """
import sys, time
from pathlib import Path
from sft.storage import contract as files, local, transfer as copying
from sft.storage.contract import FileCopy
from sft.storage.local import LocalStorage
local.CHUNK = 1 << 14
class Slow(files.Meter):
    def add(self, count):
        super().add(count)
        time.sleep(0.002)
copying.Meter = Slow
source, target = (LocalStorage(Path(p)) for p in sys.argv[1:])
target.check_access(True)
target.sweep()
copying.transfer([FileCopy(n, n, f.bytes) for n, f in source.list().items()], source, target, print)
"""


@pytest.mark.seconds
def test_kill_at_any_moment_leaves_no_partial_file_and_a_rerun_completes(
    source: LocalStorage, target: LocalStorage
) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    command = [sys.executable, "-c", COPY_SLOWLY, str(source.root), str(target.root)]
    partial = False
    for moment in (0.05, 0.2, 0.45, 0.8):
        running = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        limit = time.monotonic() + PATIENCE
        while not target.root.exists() and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(moment)
        running.send_signal(signal.SIGKILL)
        running.wait()
        present = files(target.root)
        partial |= any(is_partial(Path(n).name) for n in present)
        assert all(FILES[n] == data for n, data in present.items() if not is_partial(Path(n).name))
    assert partial, "no kill came while a file was being written"
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    assert files(target.root) == FILES


def test_a_rename_that_fails_is_an_error_that_names_the_file(
    source: LocalStorage, target: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(old: Path, new: Path) -> None:
        raise OSError(5, os.strerror(5), str(new))

    monkeypatch.setattr(local.os, "replace", fail)
    with pytest.raises(SftError, match=r"b/c\.npy: Input/output error"):
        transfer(jobs(source), source, target, quiet)
    assert files(target.root) == {}


def test_progress_says_files_bytes_rate_and_time_left(source: LocalStorage, target: LocalStorage) -> None:
    said: list[str] = []
    transfer(jobs(source), source, target, said.append)
    assert said[-1] == "3 files copied (9.1 MB), 0 were there and identical"
    meter = Meter(3, 3_000_000, said.append, every_s=0)
    meter.add(1_500_000)
    meter.show()
    assert said[-1].startswith("0/3 files, 1.5 MB of 3.0 MB, ") and said[-1].endswith(" s left") and "/s" in said[-1]


def test_only_folders_and_gs_are_storage() -> None:
    with pytest.raises(SftError, match="s3://b"):
        open_storage("s3://b")
