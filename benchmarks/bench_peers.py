"""Training steps on one device by the ways that people train: the same documents, geometry, precision and optimizer, a process each.

In:  nothing; documents and weights are drawn here. TRL, Liger and torchtitan come from PyPI into .peers/ first, each in a folder of its own.
Out: a table, and one JSON object on the last line. Exit status 1 where a way failed for another reason than memory.
Run: make bench-peers, or .venv/bin/python benchmarks/bench_peers.py --preset olmo3-7b --seq-len 16384
     Without a GPU it takes a tiny model and short rows (SIZES), and says so.

* finetune.py, N a batch: what open-instruct's padded trainer does: N documents of a long tail of lengths, padded to the longest of them, everything
  recomputed, full logits; transformers' class;
* transformers: the same without recomputation; packed: rows of whole documents told by position_ids, which it turns into a dense mask;
* OLMo-core: its train module and model, packed;
* TRL: SFTTrainer with its chunked loss, padded; packed; packed with Liger's layers (its loss replaces what TRL patches, so TRL leaves it out);
* torchtitan: its Qwen3, rows and chunked loss (peer_titan.py);
* ours: packs, attention over documents, labelled rows only; eager and compiled.

tokens/s counts tokens of documents, trained tokens/s those with a label; padding counts in neither. MFU is by one count for all: that of the documents (docs/train.md).
"by rows" is what OLMo-core would report: every position of a row reaches the head, and attention sees the whole row. "By its own" is the count of the way
itself: transformers' and TRL's 6 FLOPs for each parameter outside the embedding and each position, torchtitan's with whole rows in each layer. Start is from the start of the
process to the end of the first step, compilation included. The others take the documents of one step again and again, ours the next ones of the same draw.
The loss is the mean over the trained tokens of the first step at random weights: about the logarithm of the vocabulary's size for every way.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bench_gpu
import peer_titan
import peer_ways
from peer_ways import Job, Missing, Numbers
from sft.model import attention, utilisation
from sft.model.parallel import join
from sft.recipe import presets

SIZES = {
    "cuda": {"preset": "olmo2-1b", "seq_len": 16384, "packs": 4, "batch": [1, 8], "compile": True},
    "cpu": {"preset": "olmo3-tiny", "seq_len": 2048, "packs": 4, "batch": [8], "compile": False},
}
"""What a device trains where no option says more."""


def ways(batches: Sequence[int]) -> dict[str, Callable[[Job], Numbers]]:
    """{name: way}, but for ours."""
    return {**peer_ways.ways(batches), "torchtitan": peer_titan.torchtitan}


def one_way(args: argparse.Namespace) -> dict[str, Any]:
    """Measures a way in this process."""
    started = float(os.environ.get("PEERS_STARTED", time.time()))
    world = join(threads=1)
    config = presets.PRESETS[args.preset]
    config = replace(config, vocab_size=config.vocab_size or 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with tempfile.TemporaryDirectory() as folder:
            wanted = args.seq_len * args.packs
            dataset = bench_gpu.documents(Path(folder) / "data", wanted * (args.steps + 3), args.seq_len)
            if args.way.startswith("ours"):
                return ours(args, config, world, dataset, started, before)
            count = int(np.searchsorted(np.cumsum(dataset.documents["length"].astype(np.int64)), wanted))
            documents = peer_ways.taken(dataset, range(count))
            job = Job(
                config,
                documents,
                args.seq_len,
                args.packs,
                args.steps,
                world.device,
                args.compile,
                args.recompute,
            )
            return ways(args.batch)[args.way](job).report(job, started, before)
    except Missing as reason:
        return {"skipped": str(reason)}
    except (torch.OutOfMemoryError, bench_gpu.DoesNotFit) as error:
        return {"skipped": f"out of memory: {str(error)[:80]}"}
    finally:
        world.close()


def ours(
    args: argparse.Namespace, config: Any, world: Any, dataset: Any, started: float, before: int
) -> dict[str, Any]:
    options = argparse.Namespace(
        seq_len=args.seq_len, steps=args.steps, microbatches=args.packs, context_degree=1, optimizer="adamw", profile=False,
        recompute="full" if args.recompute else "none",
    )  # fmt: skip
    kernel = attention.choose_kernel(world.device)
    found = bench_gpu.measure(args.preset, config, world, dataset, options, args.way == "ours, compiled")
    rows = peer_ways.row_flops(config, args.seq_len) * args.packs
    return {
        "tokens_per_s": found["tokens_per_s_per_gpu"],
        "trained_tokens_per_s": found["trained_tokens_per_s_per_gpu"],
        "tflops": found["tflops_per_gpu"],
        "tflops_of_rows": rows / found["seconds"] / 1e12,
        "padding": found["padding"],
        "loss": found["loss"][0],
        "memory_gb": peer_ways.memory_gb(before),
        "start_s": found["first_step_ended"] - started,
        "notes": kernel,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets.PRESETS))
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--packs", type=int, help="packs of seq_len tokens in a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that warms up")
    parser.add_argument("--batch", type=int, nargs="+", help="documents in a padded batch")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing of TRL and ours too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU where torch finds one")
    parser.add_argument("--no-fetch", dest="fetch", action="store_false", help="use the packages that .peers/ has")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in SIZES[args.device].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "bench-peers needs a CUDA device and torch finds none here; next: --device cpu, which takes tiny sizes"
        )
    if args.way:
        print(json.dumps(one_way(args)))
        return 0
    if args.device == "cpu":
        print(f"no GPU is used: {args.preset}, rows of {args.seq_len} tokens; these figures say nothing about a GPU")
    if args.fetch:
        peer_ways.fetch(("trl", "liger_kernel", *peer_titan.needed()))
    names = [*ways(args.batch), "ours, eager", *(["ours, compiled"] if args.compile else [])]
    peak = utilisation.peak_tflops(torch.cuda.get_device_name()) if args.device == "cuda" else 0.0
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = measured(name, peak)
        print(f"{name:23} {show(found[name])}", flush=True)
    return summed_up(args, found)


def measured(name: str, peak: float) -> dict[str, Any]:
    """A way in a process of its own."""
    variables = {"PEERS_STARTED": str(time.time()), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if not peak:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--way", name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if peak and "tflops" in found:
        found |= {
            key.replace("tflops", "mfu"): value / peak for key, value in found.items() if key.startswith("tflops")
        }
    return found


def summed_up(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> int:
    """Prints the JSON object and returns the exit status."""
    speeds = {name: one["trained_tokens_per_s"] for name, one in found.items() if "tflops" in one}
    best = max((speed for name, speed in speeds.items() if name.startswith("ours")), default=0.0)
    others = {name: round(best / speed, 2) for name, speed in speeds.items() if not name.startswith("ours")}
    settings = {name: getattr(args, name) for name in ("preset", "seq_len", "packs", "steps", "recompute", "compile")}
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report = {"bench": "peers", **settings, "gpu": gpu, "torch": torch.__version__, "packages": peer_ways.PACKAGES}
    print(json.dumps({**report, "ratio_of": "trained_tokens_per_s", "ratio_to": others, "ways": found}))
    return int(not best or any("failed" in one for one in found.values()))


COUNTS = {"": "by documents", "_of_rows": "by rows", "_own": "by its own"}


def show(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return textwrap.fill(f"skipped: {found['skipped']}", 76, subsequent_indent="    ")
    if "failed" in found:
        return f"FAILED\n{found['failed']}"
    line = (
        f"{found['tokens_per_s']:9,.0f} tok/s {found['trained_tokens_per_s']:8,.0f} trained/s {found['memory_gb']:6.2f} GB"
        f" pad {found['padding']:3.0%} start {found['start_s']:3.0f} s loss {found['loss']:.3f}"
    )
    more = [found["notes"]] if found["notes"] else []
    counts = [(name, found.get(f"tflops{name}"), found.get(f"mfu{name}")) for name in COUNTS]
    told = [
        f"{COUNTS[name]} {1e3 * speed:,.1f} GFLOP/s{f' ({share:.1%})' if share else ''}"
        for name, speed, share in counts
        if speed
    ]
    more.append(", ".join(told))
    return "\n    ".join([line, *more])


if __name__ == "__main__":
    sys.exit(main())
