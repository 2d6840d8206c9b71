"""The trainer on the GPUs of this machine: tests, numerics, then one model after another, measured against the plan.

In:  nothing but the GPUs; documents are drawn here. Out: tables, and one JSON object on the last line.
Run: make bench-gpu, or on all GPUs of a machine: .venv/bin/torchrun --nproc-per-node 8 benchmarks/bench_gpu.py
     --presets olmo2-1b olmo3-7b --seq-len 16384 --steps 4 --context-degree 2 --no-tests
     --device cpu --presets olmo3-tiny --seq-len 512 checks the script itself, without a GPU

A preset that the planner says does not fit is skipped with its numbers; one that fails otherwise (a loss that is not a
number, an error of the compiler) is reported as FAILED and the next one begins. Memory is the allocator's peak against the
plan's total without its allowance for the context; MFU is sft.model.utilisation'; imbalance is the share of time that ranks wait
for the slowest, expected by sft.packing.balance and measured by sft.training.stopwatch. Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException

from bench_gpu_all import TESTS
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.data.dataset import Dataset
from sft.data.dataset_writer import DatasetWriter
from sft.formats.adapter import Adapter
from sft.model import attention, fp8, memory, utilisation
from sft.model.adapters import FLOATS, add_adapters, start_adapters, trained_parameters
from sft.model.compute_copies import copy_once_a_step
from sft.model.model import RMSNorm, Transformer, compile_blocks, initial_values
from sft.model.parallel import World, begin_microbatch, context_group, join, shard
from sft.model.trained import lora_targets
from sft.packing.loader import Loader, Share, SpecialIds
from sft.packing.packs import pack_dataset
from sft.packing.steps import StepPlan, context_groups
from sft.recipe import presets
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Hardware, Train
from sft.training.optim import Guard, build_adamw, clip
from sft.training.stopwatch import Stopwatch, between, mark

WINDOW = 64


def tests() -> str:
    """The GPU tests of the suite; their last line."""
    done = subprocess.run(TESTS, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
    return f"{'passed' if not done.returncode else 'FAILED'}: {last}"


def attention_error(device: torch.device) -> float:
    """The largest relative difference of the device's bf16 attention from the fp32 loop over documents, windows off by one
    on either side of a document's length and of the window's."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]
    edges = torch.tensor([0, *np.cumsum(lengths), sum(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16() for heads in (8, 2, 2))
    worst = 0.0
    for window in (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 10 * WINDOW):
        wanted = attention.attention(q.float(), k.float(), v.float(), edges, max(lengths), window)
        there = (q.to(device), k.to(device), v.to(device), edges.to(device))
        found = attention.attention(*there, max(lengths), window)
        worst = max(worst, ((found.float().cpu() - wanted).norm() / wanted.norm()).item())
    return worst


def loss_error(world: World) -> float:
    """The largest relative difference of a bf16 loss on the device, sharded, from the fp32 loss on the host, over the families."""
    worst, device = 0.0, world.device
    for name in ("olmo2-tiny", "olmo3-tiny", "qwen3-tiny", "llama3-tiny"):
        config = replace(presets.PRESETS[name], vocab_size=1024)
        host = Transformer(config)
        host.load_state_dict(dict(initial_values(host, 0.1, 0)))
        near = Transformer(config)
        near.load_state_dict(host.state_dict())
        ids = torch.randint(0, 1024, (512,), generator=torch.Generator().manual_seed(1))
        batch: dict[str, Any] = {
            "input_ids": ids,
            "positions": torch.cat([torch.arange(300), torch.arange(212)]),
            "cu_seqlens": torch.tensor([0, 300, 512], dtype=torch.int32),
            "target_rows": torch.arange(511),
            "target_ids": ids[1:],
        }
        with torch.no_grad():
            wanted, _ = host(**batch, max_len=300, loss_denominator=511.0)
            moved = {key: value.to(device) for key, value in batch.items()}
            found, _ = shard(near.to(device), world, "bf16")(**moved, max_len=300, loss_denominator=511.0)
        worst = max(worst, abs(found.item() / wanted.item() - 1))
    return worst


def norm_ms(device: torch.device, tokens: int = 16384, width: int = 4096) -> dict[str, float]:
    """Milliseconds of norm + residual, forward and backward in bf16: this project's, compiled on a GPU, and Liger's norm where its package
    is installed."""
    ways: dict[str, torch.nn.Module] = {"ours": RMSNorm(width, 1e-6)}
    if device.type == "cuda":
        if importlib.util.find_spec("liger_kernel") is not None:
            from liger_kernel.transformers.rms_norm import LigerRMSNorm  # an optional package

            ways["liger"] = LigerRMSNorm(width, eps=1e-6)
        ways["ours"].compile()
    found = {}
    for name, norm in ways.items():
        norm.to(device, torch.bfloat16)
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        marks = []
        for _ in range(12):
            marks.append(mark(device))
            (x + norm(x)).backward(torch.ones_like(x))
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = round(1e3 * float(np.median([between(*pair) for pair in itertools.pairwise(marks)][2:])), 3)
    return found


def documents(folder: Path, tokens: int, seq_len: int) -> Dataset:
    """Chats mixed with reasoning, as bench_balance draws them, a third of their tokens trained."""
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, 1000, part_tokens=1 << 24) as writer:
        while writer.num_tokens < tokens:
            mean, sigma = (6.5, 1.0) if rng.random() < 0.93 else (9.2, 0.8)
            length = int(np.clip(rng.lognormal(mean, sigma), 4, seq_len))
            ids = rng.integers(3, 1000, length)
            ids[-1] = 1
            writer.add(ids, np.arange(length) >= length * 2 // 3, [length], source=0)
    return Dataset.open(folder)


class DoesNotFit(Exception):
    """The planner's word: nothing was allocated."""


class NotANumber(Exception):
    """Of a loss summed over the ranks, so that all of them raise it."""


def measure(
    name: str,
    config: ModelConfig,
    world: World,
    dataset: Dataset,
    args: argparse.Namespace,
    compiled: bool,
    precision: str = "",
) -> dict[str, Any]:
    """Steps of one preset: seconds, MFU, memory, loss, imbalance. DoesNotFit where the plan says so. `precision`: bf16 on a GPU unless
    it is given, fp32 on a CPU."""
    degree = args.context_degree
    hardware = Hardware(
        recompute=args.recompute,
        compile="always" if compiled else "never",
        context_degree=degree,
        keep_gathered=getattr(args, "keep_gathered", "auto"),
        nodes=world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
        shard_degree=getattr(args, "shard_degree", -1),
        prefetch_layers=getattr(args, "prefetch_layers", 1),
    )
    groups = world.size // degree
    train = Train(
        seq_len=args.seq_len,
        global_batch_tokens=args.seq_len * groups * args.microbatches,
        steps=args.steps + 1 + args.profile,
        precision=precision or ("bf16" if world.device.type == "cuda" else "fp32"),
        optimizer=args.optimizer,
        **getattr(args, "train", {}),
    )
    assert context_groups(config, train, hardware, world.size) == groups
    room = memory.plan(config, train, hardware, world.size, world.memory_gb)
    try:
        memory.require(room, config, train, hardware, world.size)
    except SftError as error:
        raise DoesNotFit(str(error)) from error
    plan = StepPlan.build(pack_dataset(dataset, train.seq_len), train)
    loader = Loader(
        plan, dataset, SpecialIds(1, 0), config, Share(world.rank // degree, groups, world.rank % degree, degree)
    )
    with torch.device("meta"):
        model: torch.nn.Module = Transformer(config)
    if train.method == "lora":
        adapter = Adapter("random", train.lora_rank, train.lora_alpha, train.lora_rslora, train.precision)
        add_adapters(model, lora_targets(config, train), adapter, FLOATS[train.precision])
    if train.precision == "fp8":
        fp8.require_sizes(config, train, hardware)
        fp8.multiply_in_fp8(model)
    blocks = list(model.get_submodule("blocks").children())
    modes = memory.layer_modes(config.n_layers, room.recompute, room.recompute_budget)
    group = context_group(world, degree)
    for block, mode in zip(blocks, modes, strict=True):
        block.recompute = mode  # type: ignore[assignment]
        block.attention.context = group  # type: ignore[union-attr]
    if compiled:
        compile_blocks(model, world.device, train.precision)
    model = shard(model, world, train.precision, room.shard_degree, room.keep_gathered, hardware.prefetch_layers)
    model = model.to_empty(device=world.device)
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    start_adapters(model, train.seed)
    optimizer, guard = build_adamw(model, train, compiled), Guard(0.0, world.device)
    if world.size == 1 and room.keep_gathered != "none":
        copy_once_a_step(model, optimizer, train.precision)
    watch = Stopwatch(blocks, world) if world.size > 1 and not compiled else None
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    totals, marks, cpu, expected, waited, kernels = [], [], [], [], [], []
    for step, batches in loader:
        if step < 2:
            wait(world)  # compiling and the first allocations; from there on the host runs ahead, as in training
        with profiler(args.profile and step == plan.steps - 1, world) as profile:  # the last step is not timed
            marks.append(mark(world.device))
            cpu.append(time.process_time())
            total = torch.zeros((), device=world.device)
            for number, batch in enumerate(batches, 1):
                begin_microbatch(model, room.keep_gathered, last=number == len(batches))
                b = batch.to(world.device)
                ids = (b.input_ids, b.positions, b.cu_seqlens, b.max_len, b.target_rows, b.target_ids)
                loss, _ = model(*ids, float(plan.num_targets(step)))
                loss.backward()
                total += loss.detach()
            guard.step(optimizer, total, clip(model.parameters(), 1.0))
            optimizer.zero_grad(set_to_none=True)
        kernels = costliest(profile) if profile else []
        totals.append(total)
        expected.append(loader.expected(step))
        if watch is not None:
            waited.append(watch.imbalance(watch.lap()))
    marks.append(mark(world.device))
    cpu.append(time.process_time())
    wait(world)
    losses = [world.sum(total.cpu()).item() for total in totals]
    seconds = [between(*pair) for pair in itertools.pairwise(marks)]
    timed = range(1, args.steps + 1)
    took = float(np.median([seconds[step] for step in timed]))
    speed = float(np.median([plan.tokens(step) / seconds[step] for step in timed]))
    peak = utilisation.peak_tflops(torch.cuda.get_device_name()) if cuda else 0.0
    used_flops = [utilisation.mfu(expected[step][1], seconds[step], world.size, peak) for step in timed] if peak else []
    trained = float(np.median([plan.num_targets(step) / seconds[step] for step in timed]))
    tflops = float(np.median([expected[step][1] / seconds[step] for step in timed])) / 1e12
    padding = [plan.padding(step) / (plan.padding(step) + plan.tokens(step)) for step in timed]
    used = max(world.gather(torch.cuda.max_memory_allocated() if cuda else 0))
    if not np.isfinite(losses).all():
        raise NotANumber(f"losses {losses}")
    return {
        "preset": name,
        "compiled": compiled,
        "precision": train.precision,
        "recompute": room.recompute,
        "recompute_budget": room.recompute_budget,
        "keep_gathered": room.keep_gathered,
        "shard_degree": room.shard_degree,
        "prefetch_layers": hardware.prefetch_layers,
        "loss": [losses[0], losses[-1]],
        "seconds": took,
        "cpu_seconds": float(np.median(np.diff(cpu)[1 : args.steps + 1])),
        "tokens_per_s_per_gpu": speed / world.size,
        "trained_tokens_per_s_per_gpu": trained / world.size,
        "tflops_per_gpu": tflops / world.size,
        "padding": float(np.mean(padding)),
        "first_step_ended": time.time() - sum(seconds[1:]),
        "mfu": float(np.median(used_flops)) if peak else None,
        "memory_gb": used / 1e9,
        "planned_gb": (room.total - room.parts[memory.LIBRARIES]) / 1e9,
        "imbalance_expected": float(np.mean([expected[step][0] for step in timed])),
        "imbalance": float(np.mean(waited[1:])) if waited else None,
        "kernels": kernels,
        "trained": sum(p.numel() for p in trained_parameters(model).values()),
    }


@contextlib.contextmanager
def profiler(wanted: bool, world: World) -> Iterator[torch.profiler.profile | None]:
    if not wanted:
        yield None
        return
    wait(world)
    with torch.profiler.profile(acc_events=True) as profile:
        yield profile
        wait(world)


def costliest(profile: torch.profiler.profile, count: int = 24) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of the kernels that took the device longest in one step, and of all others together."""
    regions = ("Optimizer.", "FSDP::", "ProfilerStep")  # they span kernels and are none
    kernels = (e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    found = [e for e in kernels if not e.key.startswith(regions)]
    found.sort(key=lambda e: -e.self_device_time_total)
    rest = found[count:]
    table = [(e.key, round(e.self_device_time_total / 1e3, 2), e.count) for e in found[:count]]
    return [*table, ("others", round(sum(e.self_device_time_total for e in rest) / 1e3, 2), sum(e.count for e in rest))]


def wait(world: World) -> None:
    """Until the device has done what it was told, on every rank."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.any(False)


def show(found: dict[str, Any]) -> str:
    kernels = "".join(f"\n    {ms:9.2f} ms {calls:6d} x  {name[:90]}" for name, ms, calls in found["kernels"])
    mfu = "" if found["mfu"] is None else f"  MFU {found['mfu']:5.1%}"
    kept = f" {found['recompute_budget']:.0%}" if found["recompute"] == "budget" else ""
    waited = "" if found["imbalance"] is None else f" measured {found['imbalance']:.1%}"
    return (
        f"{found['preset']:12} {'compiled' if found['compiled'] else 'eager':8} {found['precision']} {found['recompute'] + kept:12}"
        f" {found['tokens_per_s_per_gpu']:10,.0f} tokens/s/GPU{mfu}  memory {found['memory_gb']:6.1f} GB, planned"
        f" {found['planned_gb']:6.1f}  imbalance expected {found['imbalance_expected']:.1%}{waited}"
        f"  loss {found['loss'][0]:.3f} to {found['loss'][1]:.3f}{kernels}"
    )


def run(args: argparse.Namespace, world: World) -> Iterator[tuple[str, Any]]:
    """(name, result) of every check, in the order of the report."""
    if world.is_rank0 and args.tests:
        yield "tests", tests()
    world.any(False)
    yield "attention_error", attention_error(world.device)
    yield "loss_error", loss_error(world)
    cuda = world.device.type == "cuda"
    yield "norm_ms", norm_ms(world.device) if cuda else norm_ms(world.device, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(world.on_rank0(lambda: str(documents_in(Path(folder), args, world))))
        dataset = Dataset.open(place)
        world.any(False)
        for name in args.presets:
            config = presets.PRESETS[name]
            config = replace(config, vocab_size=config.vocab_size or 1024)
            for compiled, precision in ways(args, world):
                torch._dynamo.reset()
                gc.collect()
                if world.device.type == "cuda":
                    torch.cuda.empty_cache()
                try:
                    yield name, measure(name, config, world, dataset, args, compiled, precision)
                except DoesNotFit as error:
                    yield name, f"skipped: {error}"
                except Exception as error:
                    # A bad loss and what the compiler refuses meet every rank; after anything else the others would wait.
                    if world.size > 1 and not isinstance(error, NotANumber | TorchDynamoException):
                        raise
                    yield name, f"FAILED: {type(error).__name__}: {error}"
        world.any(False)


def ways(args: argparse.Namespace, world: World) -> list[tuple[bool, str]]:
    """(compiled, precision) of the rows of a preset: eager, compiled, and compiled in fp8 where the device has it."""
    found = [(False, "")] * args.eager + [(True, "")] * args.compile
    if args.compile and args.fp8:
        try:
            fp8.check_device(world.device)
        except SftError as error:
            print(f"no row in fp8: {error}", file=sys.stderr)
        else:
            found.append((True, "fp8"))
    return found


def documents_in(folder: Path, args: argparse.Namespace, world: World) -> Path:
    groups = world.size // args.context_degree
    tokens = args.seq_len * groups * args.microbatches * (args.steps + 3)
    return documents(folder / "data", tokens, args.seq_len).folder


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = [n for n in presets.PRESETS if not n.endswith("-tiny")]
    parser.add_argument("--presets", nargs="+", default=sizes, choices=list(presets.PRESETS))
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after one that warms up")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--context-degree", type=int, default=1)
    parser.add_argument("--recompute", default="auto")
    parser.add_argument("--keep-gathered", default="auto", choices=("auto", "none", "weights", "gradients"))
    parser.add_argument("--shard-degree", type=int, default=-1, help="as in a recipe: -1 = a node, from two nodes on")
    parser.add_argument("--prefetch-layers", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-eager", dest="eager", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-fp8", dest="fp8", action="store_false")
    parser.add_argument("--report", type=Path, help="a file for the JSON object so far, written after each part")
    parser.add_argument("--profile", action="store_true", help="one step more, and the kernels that took longest in it")
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "bench-gpu needs a CUDA device and torch finds none here; next: run it where there is one. To try the script"
            " without one: benchmarks/bench_gpu.py --device cpu --presets olmo3-tiny"
        )
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = join()
    gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    kernel = attention.choose_kernel(world.device)
    report: dict[str, Any] = {"gpu": gpu, "attention": kernel, "ranks": world.size, "torch": torch.__version__}
    report |= {"models": [], "failed": []}
    try:
        for name, found in run(args, world):
            if isinstance(found, dict) and "preset" in found:
                report["models"].append(found)
            else:
                report[name] = found
            if name in ("attention_error", "loss_error") and not found < 0.02:
                report["failed"].append(name)
            if isinstance(found, str) and found.startswith("FAILED"):
                report["failed"].append(name)
            if world.is_rank0:
                row = isinstance(found, dict) and "preset" in found
                print(show(found) if row else f"{name:12} {found}", flush=True)
                if args.report:
                    write_atomic(args.report, json.dumps(report).encode())
    finally:
        world.close()
    if world.is_rank0:
        print(json.dumps(report))
    sys.exit(1 if report["failed"] or not report["models"] else 0)


if __name__ == "__main__":
    main()
