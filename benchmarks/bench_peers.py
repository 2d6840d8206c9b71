"""Training steps on one GPU against the ways people train with transformers: the same documents, the same geometry, one run.

In:  nothing but the GPU; documents and weights are drawn here. Out: a table, and one JSON object on the last line.
Run: make bench-peers, or .venv/bin/python benchmarks/bench_peers.py --preset olmo3-7b --seq-len 16384
     --device cpu --preset olmo3-tiny --seq-len 512 --no-compile checks the script itself, without a GPU

* padded, N a batch: transformers' own class under bf16 autocast with fp32 weights; N documents in random order, padded to the
  longest of them; its own loss. What padded trainers do; one a batch pads nothing and feeds the GPU little;
* packed: the same class on rows of seq_len tokens of whole documents, told by position_ids where they begin, which it turns
  into a mask of seq_len x seq_len;
* ours: packs, attention over documents, labelled rows only; eager and compiled.

All use fused AdamW with fp32 state once per global batch, which is the same number of document tokens for each. tokens/s counts
tokens of documents, never padding. A way that runs out of memory is reported so. The loss is the mean over the trained tokens of a
global batch at random weights: about the logarithm of the vocabulary's size for every way.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bench_gpu
from sft.data.dataset import Dataset
from sft.model.hf import hf_config
from sft.model.parallel import World, join
from sft.packing.packs import pack_dataset
from sft.recipe import presets
from sft.recipe.architecture import ModelConfig

Row = dict[str, Tensor]


def taken(dataset: Dataset, numbers: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of documents; labels are -100 where a token is not trained."""
    found = []
    for number in numbers:
        ids, mask = dataset[int(number)]
        tokens = torch.from_numpy(ids.astype(np.int64))
        found.append((tokens, torch.where(torch.from_numpy(mask.copy()), tokens, -100)))
    return found


def padded(documents: Sequence[tuple[Tensor, Tensor]], batch: int) -> Iterator[Row]:
    order = np.random.default_rng(0).permutation(len(documents))
    for start in range(0, len(order), batch):
        ids, labels = zip(*(documents[i] for i in order[start : start + batch]), strict=True)
        width = max(map(len, ids))
        lengths = torch.tensor([len(i) for i in ids])
        yield {
            "input_ids": torch.stack([nn.functional.pad(i, (0, width - len(i))) for i in ids]),
            "labels": torch.stack([nn.functional.pad(i, (0, width - len(i)), value=-100) for i in labels]),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }


def packed(dataset: Dataset, seq_len: int, packs: int) -> Iterator[Row]:
    index = pack_dataset(dataset, seq_len)
    for number in range(packs):
        chosen = taken(dataset, index.pack(number)["document"])
        yield {
            "input_ids": torch.cat([ids for ids, _ in chosen])[None],
            "labels": torch.cat([labels for _, labels in chosen])[None],
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in chosen])[None],
        }


def theirs(config: ModelConfig, world: World, rows: Callable[[], Iterator[Row]], recompute: bool) -> dict[str, Any]:
    """One warm-up pass over some rows, then one timed global batch, by transformers' class."""
    from transformers import AutoModelForCausalLM

    shape = hf_config(config, vocab_size=config.vocab_size, max_position_embeddings=65536, dtype="float32")
    torch.manual_seed(0)
    with world.device:
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    cuda = world.device.type == "cuda"

    def step(some: int | None = None) -> tuple[int, float]:
        batches = list(rows())[:some]
        labels = sum(int((row["labels"][:, 1:] != -100).sum()) for row in batches)
        tokens, total = 0, torch.zeros((), device=world.device)
        for row in batches:
            tokens += int(row["attention_mask"].sum()) if "attention_mask" in row else row["input_ids"].numel()
            moved = {name: value.to(world.device) for name, value in row.items()}
            with torch.autocast(world.device.type, torch.bfloat16, enabled=cuda):
                loss = model(**moved, num_items_in_batch=labels).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens, total.item()

    step(2)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    bench_gpu.wait(world)
    began = time.monotonic()
    tokens, loss = step()
    bench_gpu.wait(world)
    seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return {"tokens_per_s": tokens / seconds, "memory_gb": peak, "loss": loss, "tokens": tokens}


def ours(
    config: ModelConfig, world: World, dataset: Dataset, args: argparse.Namespace, compiled: bool
) -> dict[str, Any]:
    options = argparse.Namespace(
        seq_len=args.seq_len, steps=3, microbatches=args.packs, context_degree=1, optimizer="adamw", profile=False,
        recompute="full" if args.recompute else "none",
    )  # fmt: skip
    found = bench_gpu.measure(args.preset, config, world, dataset, options, compiled)
    return {
        "tokens_per_s": found["tokens_per_s_per_gpu"],
        "memory_gb": found["memory_gb"],
        "loss": found["loss"][0],
        "mfu": found["mfu"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="olmo2-1b", choices=list(presets.PRESETS))
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--packs", type=int, default=4, help="packs of seq_len tokens in a global batch")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="documents in a padded batch")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, for all ways")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "bench-peers needs a CUDA device and torch finds none here; --device cpu --preset olmo3-tiny checks it"
        )
    world = join()
    config = presets.PRESETS[args.preset]
    config = replace(config, vocab_size=config.vocab_size or 1024)
    found: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = bench_gpu.documents(Path(folder) / "data", args.seq_len * args.packs * 6, args.seq_len)
            lengths = dataset.documents["length"].astype(np.int64)
            count = int(np.searchsorted(np.cumsum(lengths), args.seq_len * args.packs))
            documents = taken(dataset, range(count))
            rows = {f"padded, {n} a batch": partial(padded, documents, n) for n in args.batch}
            rows["packed"] = partial(packed, dataset, args.seq_len, args.packs)
            ways = {name: partial(theirs, config, world, row, args.recompute) for name, row in rows.items()}
            ways |= {
                f"ours, {how}": partial(ours, config, world, dataset, args, how == "compiled")
                for how in ["eager"] + ["compiled"] * args.compile
            }
            for name, way in ways.items():
                torch._dynamo.reset()
                gc.collect()
                if world.device.type == "cuda":
                    torch.cuda.empty_cache()
                try:
                    found[name] = way()
                except (torch.OutOfMemoryError, bench_gpu.DoesNotFit) as error:
                    found[name] = {"failed": f"out of memory: {str(error)[:80]}"}
                print(f"{name:20} {show(found[name])}", flush=True)
    finally:
        world.close()
    speeds = {name: way["tokens_per_s"] for name, way in found.items() if "tokens_per_s" in way}
    best = max((s for name, s in speeds.items() if name.startswith("ours")), default=0.0)
    others = {name: round(best / speed, 2) for name, speed in speeds.items() if not name.startswith("ours")}
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report = {"bench": "peers", "preset": args.preset, "gpu": gpu, "torch": torch.__version__, "ratio_to": others}
    print(json.dumps({**report, "ways": found}))
    sys.exit(0 if best else 1)


def show(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    mfu = f"  MFU {found['mfu']:.1%}" if found.get("mfu") else ""
    return (
        f"{found['tokens_per_s']:10,.0f} tokens/s  memory {found['memory_gb']:6.1f} GB  loss {found['loss']:.4f}{mfu}"
    )


if __name__ == "__main__":
    main()
