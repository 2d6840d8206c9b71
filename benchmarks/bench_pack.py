"""How fast and how tightly documents are packed: ours, OLMo-core's packer, first-fit decreasing and the lower bound.

In:  nothing; lengths are drawn here. Out: tables, and one JSON object on the last line.
Run: make bench-pack    (or: python benchmarks/bench_pack.py --documents 100000 --large 0)

Ours is timed from the table of documents to the index on disk, synced; OLMo-core's (the `interop` extra) from the array
of offsets to its lists in memory, on the same documents in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sft.data.dataset import DOCUMENT
from sft.packing.packs import PackIndex, pack_documents

SEQ_LEN = 32768


def first_fit_decreasing(lengths: ArrayLike, capacity: int) -> int:
    """The number of packs of first-fit decreasing: the first pack with room, not the best.

    A tree of maxima over the packs finds it in O(log packs).
    """
    ordered = np.sort(np.asarray(lengths))[::-1].tolist()
    leaves = 1 << max(len(ordered) - 1, 0).bit_length()
    tree = [capacity] * (2 * leaves)
    used = 0
    for length in ordered:
        node = 1
        while node < leaves:
            node *= 2
            if tree[node] < length:
                node += 1
        tree[node] -= length
        used = max(used, node - leaves + 1)
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return used


def lognormal(count: int, mean: float = 6.5, sigma: float = 1.0) -> np.ndarray:
    return np.random.default_rng(0).lognormal(mean, sigma, count).clip(2, SEQ_LEN).astype(np.int64)


def pareto(count: int) -> np.ndarray:
    return (np.random.default_rng(0).pareto(1.1, count) * 600).clip(2, SEQ_LEN).astype(np.int64)


DISTRIBUTIONS: dict[str, Callable[[int], np.ndarray]] = {
    "chat (lognormal, mean 1.1k)": lognormal,
    "reasoning (lognormal, mean 8k)": lambda n: lognormal(n, 8.5, 1.2),
    "heavy tail (Pareto 1.1)": pareto,
    "uniform": lambda n: np.random.default_rng(0).integers(2, SEQ_LEN + 1, n),
    "near thirds": lambda n: np.random.default_rng(0).integers(SEQ_LEN // 3 - 200, SEQ_LEN // 3 + 200, n),
}


def table(lengths: np.ndarray) -> np.ndarray:
    documents = np.zeros(len(lengths), dtype=DOCUMENT)
    documents["length"], documents["labels"] = lengths, np.maximum(lengths // 2, 1)
    return documents


class Clock:
    """Wall and CPU seconds since it was made. CPU seconds still compare where other programs share the cores."""

    def __init__(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.began, time.process_time() - self.cpu_began


def ours(lengths: np.ndarray) -> tuple[float, float, PackIndex]:
    """Wall and CPU seconds to pack and to write the index, and the index."""
    documents = table(lengths)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        index = pack_documents(documents, SEQ_LEN)
        index.save(Path(folder) / "index")
        return *clock.read(), index


def theirs(lengths: np.ndarray) -> tuple[float, float, int] | None:
    """Wall and CPU seconds and packs of OLMo-core's packer, or None where it is not installed."""
    try:
        from olmo_core.data.utils import InstancePacker
    except ImportError:
        return None
    ends = np.cumsum(lengths)
    offsets = np.stack([ends - lengths, ends], axis=1).astype(np.uint64)
    clock = Clock()
    instances, _, _ = InstancePacker(SEQ_LEN).pack_documents(offsets)
    return *clock.read(), len(instances)


def lower_bound(lengths: np.ndarray) -> int:
    """No packing has fewer packs: tokens have to fit, and no two documents above a half share a pack."""
    return max(-(-int(lengths.sum()) // SEQ_LEN), int((lengths > SEQ_LEN // 2).sum()))


def row(name: str, packs: int, seconds: float | None, lengths: np.ndarray) -> None:
    fill = lengths.sum() / (packs * SEQ_LEN)
    speed = f"{seconds:9.3f} s {len(lengths) / seconds:13,.0f} documents/s" if seconds else ""
    print(f"  {name:24} {packs:9,} packs  fill {fill:8.4%} {speed}", flush=True)


def compare(name: str, lengths: np.ndarray, repeats: int) -> dict[str, Any]:
    print(f"{name}: {len(lengths):,} documents, {lengths.sum():,} tokens, packs of {SEQ_LEN:,}", flush=True)
    runs = [ours(lengths) for _ in range(repeats)]
    seconds, cpu, packs = statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs), len(runs[0][2])
    row("ours, index written", packs, seconds, lengths)
    reference = theirs(lengths)
    if reference is None:
        print("  OLMo-core is not installed: pip install '.[interop]' to compare with it")
    else:
        row("OLMo-core", reference[2], reference[0], lengths)
    began = time.perf_counter()
    first_fit = first_fit_decreasing(lengths, SEQ_LEN)
    row("first-fit decreasing", first_fit, time.perf_counter() - began, lengths)
    row("lower bound", lower_bound(lengths), None, lengths)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "ratio": reference[0] / seconds if reference else None,
        "ratio_cpu": reference[1] / cpu if reference else None,
        "equal": reference[2] == packs if reference else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents of the main comparison")
    parser.add_argument("--others", type=int, default=100_000, help="documents of the other distributions")
    parser.add_argument(
        "--large", type=int, default=20_000_000, help="documents of the large run, ours alone; 0 = none"
    )
    parser.add_argument("--only-large", action="store_true", help="the large run in this process, for its memory")
    args = parser.parse_args()
    if args.only_large:
        seconds, _, index = ours(lognormal(args.large))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "packs": len(index), "peak_gb": peak / 1e9}))
        return
    names = list(DISTRIBUTIONS)
    main_result = compare(names[0], DISTRIBUTIONS[names[0]](args.documents), repeats=5)
    results = [main_result] + [compare(name, DISTRIBUTIONS[name](args.others), repeats=1) for name in names[1:]]
    equal = [r["equal"] for r in results]
    summary = {
        "ratio_to_olmo_core": main_result["ratio"],
        "ratio_cpu": main_result["ratio_cpu"],
        "packs_equal": None if None in equal else all(equal),
        "seconds_1m": main_result["seconds"],
        "cpu_seconds_1m": main_result["cpu"],
        "documents": args.documents,
        "documents_per_s": args.documents / main_result["seconds"],
    }
    if args.large:
        # A process of its own, so that the peak is that of this run. It includes drawing the lengths.
        command = [sys.executable, __file__, "--only-large", "--large", str(args.large)]
        large = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"{names[0]}: {args.large:,} documents in {large['seconds']:.2f} s, peak memory {large['peak_gb']:.2f} GB"
        )
        summary |= {"seconds_20m": large["seconds"], "peak_gb_20m": large["peak_gb"], "documents_large": args.large}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
