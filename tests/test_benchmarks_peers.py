"""The ways that `make bench-peers` compares see the same documents: rows, labels, losses and the counts of FLOPs."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_peers
import peer_titan
import peer_ways
from peer_ways import Job, Numbers
from sft.recipe import presets
from training import SERVER

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


def alone(way: Callable[..., Numbers], *args: Any, **options: Any) -> Numbers:
    """A way in a process of its own: it puts folders of .peers on the path."""
    with SERVER.Pool(1) as pool:
        found: Numbers = pool.apply(way, args, options)
        return found


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
    assert report["trained_tokens_per_s"] < report["tokens_per_s"] and report["tflops_own"] > 0
    if not peer_ways.package("trl").is_dir():
        pytest.skip("TRL is not in .peers; benchmarks/bench_peers.py --fetch gets it")
    assert alone(peer_ways.trl, job, 0).losses[0] == pytest.approx(first, rel=1e-2)


@pytest.mark.slow
def test_olmo_cores_train_module_steps_and_rows_are_counted_as_it_counts_them(job: Job) -> None:
    core = pytest.importorskip("olmo_core.nn.transformer", reason="ai2-olmo-core is not installed")
    losses = peer_ways.olmo_core(job).losses
    assert losses[0] == pytest.approx(6.93, abs=0.2) and losses[1] != losses[0]
    theirs = core.TransformerConfig.olmo3_7B(vocab_size=100278).build(init_device="meta").num_flops_per_token(8192)
    ours = peer_ways.row_flops(replace(presets.PRESETS["olmo3-7b"], vocab_size=100278), 8192)
    assert ours / 8192 == pytest.approx(theirs, rel=1e-4)


def test_torchtitans_rows_are_filled_in_order_and_start_positions_anew(job: Job) -> None:
    rows = list(peer_titan.greedy(list(job.documents), 256))
    shown = [[n + 1 for n in torch.nonzero(positions == 0).flatten().tolist()] for _, _, positions in rows]
    assert shown == [[1, 200, 211], [1, 90, 119, 178], [1, 90]]
    assert all(part.shape == (256,) for row in rows for part in row)
    assert sum(int((labels != -100).sum()) for _, labels, _ in rows) == sum(
        int((labels[1:] != -100).sum()) for _, labels in job.documents
    )
    (ids, labels, _), document = rows[0], job.documents[0]
    assert torch.equal(ids[:199], document[0][:-1]) and torch.equal(labels[:199], document[1][1:])


@pytest.mark.slow
def test_torchtitan_steps_and_counts_flops_by_its_own_formula(job: Job) -> None:
    if absent := peer_ways.absent(peer_titan.needed()):
        pytest.skip(f"{', '.join(absent)} not in .peers; benchmarks/bench_peers.py gets it")
    found = alone(peer_titan.torchtitan, job)
    assert found.losses[0] == pytest.approx(6.93, abs=0.1) and found.losses[1] < found.losses[0]
    c = job.config
    matrices = c.parameters - c.vocab_size * c.d_model - 2 * c.n_layers * (c.n_heads * c.head_dim - c.head_dim) // 2
    per_token = 6 * matrices + 12 * c.n_layers * c.n_heads * c.head_dim * job.seq_len
    assert found.own_flops == pytest.approx(per_token * 3 * job.seq_len, rel=1e-3)


@pytest.mark.slow
def test_liger_is_refused_on_a_cpu_with_what_it_would_replace(job: Job) -> None:
    names = ["trl", "liger_kernel", *([] if importlib.util.find_spec("triton") else ["triton"])]
    if absent := peer_ways.absent(names):
        pytest.skip(f"{', '.join(absent)} not in .peers; benchmarks/bench_peers.py gets it")
    with pytest.raises(peer_ways.Missing, match=r"need a GPU\. On one they replace 4 Olmo3MLP, 9 Olmo3RMSNorm"):
        alone(peer_ways.trl, job, 0, liger=True)


def test_what_cannot_run_says_why(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "torchtitan" in bench_peers.ways([8]) and "TRL, packed, Liger" in bench_peers.ways([8])
    monkeypatch.setattr(peer_ways, "REPO", tmp_path)
    with pytest.raises(peer_ways.Missing, match=r"trl not in \.peers; next: run it without --no-fetch"):
        peer_ways.trl(job, 1)
    with pytest.raises(peer_ways.Missing, match=r"torchtitan, spmd_types, .* not in \.peers; next: "):
        peer_titan.torchtitan(job)


def test_a_package_that_cannot_be_had_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_ways, "REPO", tmp_path)
    for code in (1, 0):
        found = subprocess.CompletedProcess([], code, "", "no such index")
        monkeypatch.setattr(
            peer_ways.subprocess,
            "run",
            lambda command, found=found, **_: Path(command[-2]).mkdir(parents=True) or found,
        )
        peer_ways.fetch(["trl"])
        assert peer_ways.package("trl").is_dir() is (code == 0)
    assert capsys.readouterr().err == f"[bench] trl {peer_ways.PACKAGES['trl']} cannot be fetched: no such index\n"


@pytest.mark.parametrize(
    ("installed", "kernel", "note"),
    [
        ("flash_attn", "flash_attention_2", "attention by flash_attention_2"),
        ("kernels", "kernels-community/flash-attn2", "attention by kernels-community/flash-attn2"),
        ("", "sdpa", "attention with a dense mask: neither flash-attn nor kernels is installed"),
    ],
)
def test_trl_packs_with_kernels_that_know_documents_where_one_is_installed(
    installed: str, kernel: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == installed else None)
    assert peer_ways.attention_of_rows(True) == (kernel, note)
    assert peer_ways.attention_of_rows(False) == ("sdpa", "")
