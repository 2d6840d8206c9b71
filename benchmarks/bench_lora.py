"""LoRA steps here and by TRL's SFTTrainer with PEFT: documents of one draw, the same geometry, precision, rank and optimizer, tokens/s and memory.

In:  nothing; documents and weights are drawn here. `--fetch` first gets TRL and PEFT from PyPI into .peers/; nothing is fetched otherwise.
Out: a table, and one JSON object on the last line. Exit status 1 where a way failed.
Run: .venv/bin/python benchmarks/bench_lora.py --fetch, or make bench-lora once they are there
     On a GPU: --device cuda --preset olmo2-1b --seq-len 4096 --packs 8

* TRL, N a batch: padded to the longest of N documents, as SFTTrainer does by default;
* TRL, packed: SFTTrainer's packing by best fit, told by position_ids where documents begin;
* ours: packs, attention over documents, labelled rows only.

All take documents of one draw, `packs` packs of `seq_len` tokens in a step: ours the next packs, TRL the first documents in every step. tokens/s
counts tokens of documents, never padding; it is the median of the steps after the first. On the CPU each way has one thread, and tokens
per CPU second count, which other work on the machine hardly changes. Every way is a process of its own. Memory is what its resident set
grew by at its peak after the imports; on a GPU it is the allocator's peak. The CPU computes in fp32, a GPU in bf16. TRL's step includes the
entropy and accuracy that it logs. The loss is the first step's, at random weights: about the logarithm of the vocabulary's size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bench_gpu
from peer_ways import PACKAGES, fetch, memory_gb, package, taken
from sft.data.dataset import Dataset
from sft.model.hf import hf_config
from sft.model.parallel import join
from sft.recipe import presets
from sft.recipe.architecture import ModelConfig

REPO = Path(__file__).resolve().parents[1]
PEERS = ("trl", "peft")
RATE, BETAS = 1e-3, (0.9, 0.95)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(config: ModelConfig, dataset: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of bench_gpu's loop with adapters."""
    world = join(threads=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = argparse.Namespace(
        seq_len=args.seq_len, steps=args.steps, microbatches=args.packs, context_degree=1, optimizer="adamw", profile=False,
        recompute="none", train={"method": "lora", "lora_rank": args.rank, "lora_alpha": float(args.rank), "lr": RATE},
    )  # fmt: skip
    try:
        found = bench_gpu.measure(args.preset, config, world, dataset, options, args.compile)
    finally:
        world.close()
    return {
        "tokens_per_s": found["tokens_per_s_per_gpu"],
        "tokens_per_cpu_s": found["tokens_per_s_per_gpu"] * found["seconds"] / found["cpu_seconds"],
        "memory_gb": memory_gb(before),
        "loss": found["loss"][0],
        "trained": found["trained"],
    }


def theirs(config: ModelConfig, dataset: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """SFTTrainer over the documents of the first `packs` packs, an epoch a step."""
    sys.path[:0] = [str(package(name)) for name in PEERS]
    import datasets
    import transformers
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset

    lengths = dataset.documents["length"].astype(np.int64)
    count = int(np.searchsorted(np.cumsum(lengths), args.seq_len * args.packs))
    documents = taken(dataset, range(count))
    rows = datasets.Dataset.from_list(
        [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in documents]
    )
    tokens = sum(len(ids) for ids, _ in documents)
    tokenizer = AutoTokenizer.from_pretrained(REPO / "recipes" / "smoke" / "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shape = hf_config(config, vocab_size=config.vocab_size, max_position_embeddings=65536, dtype="float32")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", dtype=torch.float32)
    cuda = args.device == "cuda"

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.began = time.monotonic(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.seconds.append(time.monotonic() - self.began[0])
            self.cpu.append(time.process_time() - self.began[1])

    clock, packed = Clock(), args.way == "TRL, packed"
    batch = 1 if packed else int(args.way.split()[1])
    made = pack_dataset(rows, args.seq_len, "bfd") if packed else rows  # the trainer packs by itself
    accumulation = -(-len(made) // batch)  # all documents in every step
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out, max_length=args.seq_len, packing=packed, per_device_train_batch_size=batch, max_steps=args.steps + 1,
            gradient_accumulation_steps=accumulation, learning_rate=RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0,
            optim="adamw_torch_fused", gradient_checkpointing=False, bf16=cuda, fp16=False, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, use_cpu=not cuda, dataloader_pin_memory=cuda,
        )  # fmt: skip
        adapters = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model, settings, train_dataset=rows, processing_class=tokenizer, peft_config=adapters, callbacks=[clock]
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_s": tokens / statistics.median(clock.seconds[1:]),
        "tokens_per_cpu_s": tokens / statistics.median(clock.cpu[1:]),
        "memory_gb": memory_gb(before),
        "loss": losses[0],
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "transformers": transformers.__version__,
    }


def one_way(args: argparse.Namespace) -> None:
    """Measures a way in this process and prints its numbers."""
    config = presets.PRESETS[args.preset]
    config = replace(config, vocab_size=config.vocab_size or 1024)
    with tempfile.TemporaryDirectory() as place:
        dataset = bench_gpu.documents(Path(place) / "data", args.seq_len * args.packs * (args.steps + 3), args.seq_len)
        print(json.dumps((ours if args.way.startswith("ours") else theirs)(config, dataset, args)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="olmo3-tiny", choices=list(presets.PRESETS))
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--packs", type=int, default=2, help="packs of seq_len tokens in a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that warms up")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="documents in a padded batch")
    parser.add_argument("--compile", action="store_true", help="torch.compile of ours")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--fetch", action="store_true")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        one_way(args)
        return 0
    if args.fetch:
        fetch(PEERS)
    if not all(package(name).is_dir() for name in PEERS):
        print(f"TRL and PEFT are not in {REPO / '.peers'}; next: run it with --fetch", file=sys.stderr)
        return 2
    ways = ["ours", *(f"TRL, {n} a batch" for n in args.batch), "TRL, packed"]
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        command, quiet = [sys.executable, __file__, *sys.argv[1:], "--way", way], {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
        found[way] = (
            json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-2000:]}
        )
        print(f"{way:16} {show(found[way])}", flush=True)
    speed = "tokens_per_cpu_s" if args.device == "cpu" else "tokens_per_s"
    speeds = {way: f[speed] for way, f in found.items() if "failed" not in f}
    ratios = {w: round(speeds["ours"] / s, 2) for w, s in speeds.items() if w != "ours" and "ours" in speeds}
    settings = {name: getattr(args, name) for name in ("preset", "seq_len", "packs", "rank", "device", "compile")}
    print(
        json.dumps(
            {
                "bench": "lora",
                **settings,
                "peers": {name: PACKAGES[name] for name in PEERS},
                "torch": torch.__version__,
                "ratio_of": speed,
                "ratio_to": ratios,
                "ways": found,
            }
        )
    )
    return int(len(speeds) < len(ways))


def show(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"FAILED\n{found['failed']}"
    return (
        f"{found['tokens_per_s']:10,.0f} tokens/s, {found['tokens_per_cpu_s']:,.0f} a CPU second  memory {found['memory_gb'] * 1000:8,.0f} MB  loss {found['loss']:.4f}"
        f"  {found['trained']:,} trained"
    )


if __name__ == "__main__":
    sys.exit(main())
