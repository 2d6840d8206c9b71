"""The ways that `make bench-peers` compares see the same documents: rows, labels, losses and the counts of FLOPs."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import peer_ways
from peer_ways import Job
from sft.recipe import presets

CONFIG = replace(presets.PRESETS["olmo3-tiny"], vocab_size=1024)


LENGTHS = (200, 12, 90, 30, 60, 90)


@pytest.fixture(scope="module")
def job() -> Job:
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in LENGTHS:
        ids = torch.randint(3, 1000, (length,), generator=generator)
        documents.append((ids, torch.where(torch.arange(length) >= length // 2, ids, -100)))
    return Job(CONFIG, documents, 256, 2, 1, torch.device("cpu"), compiled=False, recompute=False)


def test_rows_have_every_document_once_and_every_label(job: Job) -> None:
    wanted = sum(len(ids) for ids, _ in job.documents)
    labels = sum(int((labels[1:] != -100).sum()) for _, labels in job.documents)
    packed, padded = list(peer_ways.packed(job)), list(peer_ways.padded(job, 3))
    assert sum(row["input_ids"].numel() for row in packed) == wanted
    assert max(row["input_ids"].numel() for row in packed) <= job.seq_len
    assert sum(int(row["attention_mask"].sum()) for row in padded) == wanted
    for rows in (packed, padded):
        assert sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows) == labels
    core = peer_ways.core_batch(job, packed, with_lengths=True)
    assert core["input_ids"].shape == (len(packed), job.seq_len) and int(core["label_mask"].sum()) == labels
    assert core["doc_lens"].sum(1).tolist() == [job.seq_len] * len(packed)


@pytest.mark.slow
def test_every_way_of_transformers_has_the_same_first_loss_and_trl_too(job: Job, tmp_path: Path) -> None:
    rows = {
        "one": partial(peer_ways.padded, batch=1),
        "three": partial(peer_ways.padded, batch=3),
        "packed": peer_ways.packed,
    }
    found = {name: peer_ways.transformers_loop(job, row, recompute=name == "three") for name, row in rows.items()}
    first = found["one"].losses[0]
    assert first == pytest.approx(6.93, abs=0.1)
    assert all(numbers.losses[0] == pytest.approx(first, rel=1e-4) for numbers in found.values())
    report = found["three"].report(job, time.time() - 100, 0)
    assert report["padding"] > 0 and report["tflops_of_rows"] > report["tflops"] > 0 and report["start_s"] < 100
    assert report["trained_tokens_per_s"] < report["tokens_per_s"]
    if not peer_ways.package("trl").is_dir():
        pytest.skip("TRL is not in .peers; benchmarks/bench_peers.py --fetch gets it")
    assert peer_ways.trl(job, 0).losses[0] == pytest.approx(first, rel=1e-2)


@pytest.mark.slow
def test_olmo_cores_train_module_steps_and_rows_are_counted_as_it_counts_them(job: Job) -> None:
    core = pytest.importorskip("olmo_core.nn.transformer", reason="ai2-olmo-core is not installed")
    losses = peer_ways.olmo_core(job).losses
    assert losses[0] == pytest.approx(6.93, abs=0.2) and losses[1] != losses[0]
    theirs = core.TransformerConfig.olmo3_7B(vocab_size=100278).build(init_device="meta").num_flops_per_token(8192)
    ours = peer_ways.row_flops(replace(presets.PRESETS["olmo3-7b"], vocab_size=100278), 8192)
    assert ours / 8192 == pytest.approx(theirs, rel=1e-4)


def test_what_cannot_run_says_why(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peer_ways, "REPO", tmp_path)
    with pytest.raises(peer_ways.Missing, match=r"trl is not in \.peers; next: --fetch"):
        peer_ways.trl(job, 1)
    with pytest.raises(peer_ways.Missing, match="another geometry"):
        peer_ways.torchtitan(job)
