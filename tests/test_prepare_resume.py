"""prepare continues: the same bytes for any number of workers, after a kill, in parts; what is encoded stays encoded."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import REPO
from preparing import contents, conversation, stage, write_rows
from sft.common.errors import SftError
from sft.data import preparation, prepare
from sft.recipe.schema import Source
from sft.sources import input_files


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, small_chunks):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(120)] + ["torn {"])
    one, three = stage(tmp_path, 1, "one", "cache1"), stage(tmp_path, 3, "three", "cache3")
    prepare.prepare(one)
    prepare.prepare(three)
    assert any("3 workers" in line for line in three.said)
    assert contents(one.out) == contents(three.out)
    first, third = ({k: v for k, v in contents(s.cache).items() if k.endswith(".tok")} for s in (one, three))
    assert first == third and len(first) > 10


PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import preparing as t
from sft.data import preparation, prepare
from sft.data.tokenize import Encoder
from sft.sources import input_files
Encoder.check_saved = lambda *_: None  # it imports torch, which takes longer than all else
input_files.MIN_CHUNK_BYTES = input_files.CHUNK_BYTES = 2000
plain = preparation.EncodeChunk.__call__
def slow(self, job):
    time.sleep(0.05)
    return plain(self, job)
preparation.EncodeChunk.__call__ = slow
prepare.prepare(t.stage(Path({root!r}), out="killed", cache="cache"))
"""


@pytest.mark.seconds
def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path, small_chunks):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(200)])
    program = PROGRAM.format(tests=str(REPO / "tests"), root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(REPO / "lib")})
    done: list[Path] = []
    while len(done) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        done = [p for p in tmp_path.glob("cache/tokens/*/*.tok") if not p.name.startswith(".")]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "dataset.json").exists()
    before = {p: p.stat().st_ino for p in tmp_path.glob("cache/tokens/*/*.tok") if not p.name.startswith(".")}
    again, fresh = stage(tmp_path, out="killed"), stage(tmp_path, out="fresh", cache="other")
    prepare.prepare(again)
    prepare.prepare(fresh)
    assert contents(again.out) == contents(fresh.out)
    assert {p: p.stat().st_ino for p in before} == before
    assert any(f"{len(before)} of " in line for line in again.said)


def test_a_torn_write_is_not_taken_for_a_result(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(20)])
    s = stage(tmp_path)
    prepare.prepare(s)
    before = contents(s.out)
    (s.out / "data" / "token_ids_part_0007.npy").write_bytes(b"left behind")
    (s.out / "data" / "documents.npy").write_bytes(b"torn")
    (s.out / "validation").mkdir()
    prepare.prepare(s)
    assert contents(s.out) == before


@pytest.mark.parametrize("change", [{"sources": (Source(path="rows.jsonl", weight=0.5),)}, {"seed": 7}, {"validation_fraction": 0.2},
                                    {"deduplicate": True}, {"encoder": "tokenizers"}, {"max_reject_fraction": 0.9}])  # fmt: skip
def test_weights_seed_and_splits_tokenise_nothing_again(tmp_path, no_encoding, change):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(40)])
    prepare.prepare(stage(tmp_path))
    no_encoding()
    prepare.prepare(stage(tmp_path, out="other", **change))


@pytest.mark.parametrize("change", [{"template": "tulu"}, {"train_turns": "last"}, {"system": "Be brief."},
                                    {"sources": (Source(path="rows.jsonl", columns={"messages": "messages"}),)}])  # fmt: skip
def test_what_decides_tokens_or_masks_tokenises_again(tmp_path, no_encoding, change):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(40)])
    prepare.prepare(stage(tmp_path))
    no_encoding()
    with pytest.raises(AssertionError, match="encoded again"):
        prepare.prepare(stage(tmp_path, out="other", **change))


def test_a_new_file_in_a_folder_is_the_only_one_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "MIN_CHUNK_BYTES", 1)  # smaller files share a job
    (tmp_path / "mix").mkdir()
    for name in "ac":
        write_rows(tmp_path / "mix" / f"{name}.jsonl", [conversation(ord(name) * 100 + i) for i in range(10)])
    prepare.prepare(stage(tmp_path, sources=(Source(path="mix"),)))
    write_rows(tmp_path / "mix" / "b.jsonl", [conversation(i) for i in range(10)])
    encoded = []
    plain = preparation.EncodeChunk.__call__

    def watched(self, job):
        encoded.append([chunk.file.name for chunk in job.chunks])
        return plain(self, job)

    monkeypatch.setattr(preparation.EncodeChunk, "__call__", watched)
    prepare.prepare(stage(tmp_path, sources=(Source(path="mix"),), out="more"))
    assert {tuple(names) for names in encoded} == {("mix/b.jsonl",)}


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9, -30])
def test_a_flipped_bit_in_the_token_cache_is_found_and_made_again(tmp_path, where):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(40)])
    first, second = stage(tmp_path), stage(tmp_path, out="second")
    prepare.prepare(first)
    (file,) = first.cache.glob("tokens/*/*.tok")
    data = bytearray(file.read_bytes())
    good = bytes(data)
    data[int(where * len(data)) if where > 0 else where] ^= 16
    file.write_bytes(data)
    prepare.prepare(second)
    assert contents(first.out) == contents(second.out)
    assert file.read_bytes() == good


@pytest.mark.seconds
def test_parts_of_an_array_job_merge_into_the_same_bytes(tmp_path, small_chunks):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(150)])
    whole = stage(tmp_path, out="whole", cache="other")
    prepare.prepare(whole)
    merged = stage(tmp_path, out="merged")
    for i in (2, 0):
        prepare.prepare_part(stage(tmp_path), prepare.Shard.parse(f"{i}/3"))
    with pytest.raises(SftError, match=r"parts 1 of 3 are not done; next: SHARD=1/3"):
        prepare.prepare(merged, prepare.Shard.parse("merge/3"))
    prepare.prepare_part(stage(tmp_path), prepare.Shard.parse("1/3"))
    victim = sorted(merged.cache.glob("tokens/*/*.tok"))[4]
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + b"x")
    with pytest.raises(SftError, match=r"changed since part 1 wrote it; next: SHARD=1/3"):
        prepare.prepare(merged, prepare.Shard.parse("merge/3"))
    victim.write_bytes(good)
    prepare.prepare(merged, prepare.Shard.parse("merge/3"))
    assert contents(whole.out) == contents(merged.out)


@pytest.mark.parametrize("text", ["4/4", "x/4", "1", "-1/4", "0/0", "merge/0", "merge"])
def test_a_malformed_shard_is_refused(text):
    with pytest.raises(SftError, match="SHARD="):
        prepare.Shard.parse(text)


@pytest.mark.seconds
def test_the_cache_is_removed_when_nobody_uses_it_and_made_again(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(20)])
    runs = tmp_path / "runs"
    s = stage(tmp_path, cache="runs/.cache")
    command = [sys.executable, "-m", "sft", "clean_cache", "--runs", str(runs)]

    def clean() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=REPO / "lib", capture_output=True, text=True, check=False)

    prepare.prepare(s)
    before = contents(s.out)
    with preparation.Preparation(s, prepare.Shard()).locked():
        busy = clean()
    assert busy.returncode == 1 and f"busy, held by pid {os.getpid()}" in busy.stderr
    assert list((s.cache / "tokens").rglob("*.tok"))
    done = clean()
    assert done.returncode == 0 and "tokens: 0.0 MB removed" in done.stdout, done.stderr
    assert not (s.cache / "tokens").exists() and contents(s.out) == before
    prepare.prepare(s)
    assert contents(s.out) == before


def test_the_token_cache_keeps_to_its_bound_and_to_what_runs_need(tmp_path, small_chunks):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(120)])
    first = stage(tmp_path)
    prepare.prepare(first)
    assert not any("not needed" in line for line in first.said)
    tokens = first.cache / "tokens"
    (ours,) = tokens.iterdir()
    other = tokens / "other"
    other.mkdir()
    now = time.time()
    ages = {"oldest": 400_000, "older": 300_000, "old": 200_000, "young": 60}
    for name, age in ages.items():
        with (other / f"{name}.tok").open("wb") as f:
            f.truncate(10**9)  # no byte of it is on the disk
        os.utime(other / f"{name}.tok", (now - age, now - age))
    for file in ours.glob("*.tok"):
        os.utime(file, (now - 10**6, now - 10**6))  # the oldest of all, but needed again
    again = stage(tmp_path, out="again")
    again.hardware = dataclasses.replace(again.hardware, cache_gb=3)
    prepare.prepare(again)
    assert contents(first.out) == contents(again.out)
    assert sorted(p.name for p in other.iterdir()) == ["old.tok", "young.tok"]
    assert any(
        "token cache: 2 chunks (2.0 GB) that were unused for longest are deleted: cache_gb = 3" in line
        for line in again.said
    )
    again.hardware = dataclasses.replace(again.hardware, cache_gb=1)
    prepare.prepare(again)
    assert [p.name for p in other.iterdir()] == ["young.tok"] and any(ours.glob("*.tok"))
