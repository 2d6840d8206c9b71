"""Prepare as a program: memory, workers that die, its cache, two at a time, a full disk, and OLMo-core's reader of its dataset."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import REPO
from preparing import conversation, stage, write_rows
from sft.common.errors import SftError
from sft.data import preparation, prepare, tokencache, workers
from sft.data.dataset import Dataset


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    filler = [{"role": role, "content": "The tapir sleeps beside the ibis. " * 50} for role in ("user", "assistant")]
    rows = [json.dumps({"messages": conversation(i)["messages"] + filler}) for i in range(200)]
    peak = {}
    for times in (20, 100):  # both take the compiled way
        write_rows(tmp_path / f"{times}.jsonl", rows * times)
        code = (
            f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r})\n"
            "from pathlib import Path; import preparing as t; from sft.common import direct_io as bulk; from sft.data import materialise, prepare; from sft.sources import input_files\n"
            "from sft.data.tokenize import Encoder; Encoder.check_saved = lambda *_: None\n"  # it loads torch: 300 MB of noise
            "input_files.CHUNK_BYTES = 1 << 19; materialise.BLOCK_TOKENS = materialise.READ_TOKENS = 1 << 16\n"
            "bulk.BUFFER = 1 << 16; materialise.OPEN_FILES = 2\n"
            f"s = t.stage(Path({str(tmp_path)!r}), out='o{times}', sources=(t.Source(path='{times}.jsonl'),))\n"
            "prepare.prepare(s)\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"  # since exec
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(REPO / "lib")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peak[times] = int(done.stdout.split()[-1]) / 1024
    grown = (tmp_path / "100.jsonl").stat().st_size / 2**20
    assert peak[100] - peak[20] < grown / 4, (peak, grown)


def crash(_: int) -> Any:
    return lambda job: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.seconds
def test_a_worker_that_dies_is_reported_and_does_not_hang():
    with pytest.raises(SftError, match="a worker process was killed"):
        list(workers.work(crash, (0,), [1, 2, 3], 2))


def test_a_cache_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "x.tok"
    with pytest.raises(ZeroDivisionError), tokencache.ChunkWriter(file) as writer:
        one = np.zeros(1, dtype=np.uint64)
        writer.add(np.arange(3, dtype=np.uint32), np.array([3]), np.array([2]), np.array([0]), one, one)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert tokencache.read_summary(file) is None
    with tokencache.ChunkWriter(file):
        pass
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        assert tokencache.read_summary(file) is None


@pytest.mark.parametrize("scan", [None, False], ids=["eos scan", "csv"])
def test_olmo_core_reads_the_same_documents_and_labels(tmp_path, scan):
    pytest.importorskip("olmo_core")
    from olmo_core.data import NumpyPackedFSLDataset

    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(200)])
    s = stage(tmp_path, seed=3)
    prepare.prepare(s)
    made = json.loads((s.out / "dataset.json").read_bytes())
    ours = Dataset.open(s.out / "data")
    theirs = NumpyPackedFSLDataset(
        *sorted((s.out / "data").glob("token_ids_part_*.npy")),
        sequence_length=1024, pad_token_id=made["pad_id"], eos_token_id=made["eos_id"], vocab_size=made["vocab_size"],
        dtype=ours.dtype.type, generate_doc_lengths=True, use_array_if_local=scan,
        label_mask_paths=sorted((s.out / "data").glob("labels_mask_part_*.npy")),
    )  # fmt: skip
    theirs.work_dir = tmp_path / "work"
    theirs.prepare()
    found: Counter[tuple] = Counter()
    for i in range(len(theirs)):
        item = theirs[i]
        ids, mask, at = item["input_ids"].tolist(), item["label_mask"].tolist(), 0
        for length in item["doc_lens"].tolist():
            document = ids[at : at + length]
            if document[-1] != made["pad_id"]:
                found[tuple(document), tuple(mask[at : at + length])] += 1
            at += length
    assert found == Counter((tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in ours)


@pytest.mark.slow
def test_the_program_publishes_a_manifest_and_parts_fill_the_cache(tmp_path):
    """The smoke recipe through stages/prepare.py, with the real runner, cache and manifest."""
    command = [sys.executable, str(REPO / "stages" / "prepare.py"), str(tmp_path / "runs" / "smoke")]
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "runs" / "smoke" / "prepare" / "manifest.json").read_bytes())
    assert {"dataset.json", "proof.json", "data/documents.npy"} <= {e["path"] for e in manifest["outputs"]}
    assert manifest["metrics"]["labels"] > 1000
    shutil.rmtree(tmp_path / "runs" / ".cache" / "tokens")
    for shard, last in (("0/2", "then: SHARD=merge/2"), ("1/2", "then: SHARD=merge/2")):
        done = subprocess.run(command, env={**env, "SHARD": shard}, capture_output=True, text=True, cwd=REPO)
        assert done.returncode == 0 and last in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "runs" / ".cache" / "tokens").glob("*/*.tok"))


def test_a_second_run_waits_for_the_cache_and_then_encodes_nothing(tmp_path, no_encoding):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(30)])
    first = stage(tmp_path)
    holder = preparation.Preparation(first, prepare.Shard())
    order: list[str] = []

    def second() -> None:
        prepare.prepare(stage(tmp_path, out="second", seed=5))
        order.append("second")

    with holder.locked():
        thread = threading.Thread(target=second)
        thread.start()
        holder.encode()
        time.sleep(0.3)
        order.append("first")
        no_encoding()
    thread.join()
    assert order == ["first", "second"]


FULL = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import preparing as t
from sft.data import prepare
from sft.data.tokenize import Encoder
from sft.common.errors import SftError
Encoder.check_saved = lambda *_: None  # it imports torch, which takes longer than all else
try:
    prepare.prepare(t.stage(Path({root!r}), out="{out}", cache="{cache}"))
except SftError as e:
    print("told:", e)
"""


@pytest.mark.seconds
@pytest.mark.parametrize(("out", "cache"), [("full/out", "cache"), ("out", "full/cache")])
def test_a_full_disk_is_reported_with_the_path_and_the_bytes_needed(tmp_path, out, cache):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(1000)])
    (tmp_path / "full").mkdir()
    program = FULL.format(tests=str(REPO / "tests"), root=str(tmp_path), out=out, cache=cache)
    script = 'mount -t tmpfs -o size=100k none "$1" && exec "$2" -c "$3"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path / "full"), sys.executable, program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPO / "lib")}, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0, done.stderr
    assert (
        "told: " in done.stdout
        and "full/" in done.stdout
        and "bytes" in done.stdout
        and "next: free space" in done.stdout
    )
