"""How many tokens a second the loader feeds one rank, from the page cache.

In:  nothing; a dataset is written to a temporary folder. Out: a table, and one JSON object on the last line.
Run: make bench-loader    (or: python benchmarks/bench_loader.py --tokens 5000000)

Everything that training gets is made: ids, positions, document edges, labelled rows, their targets and sources. The
consumer does nothing, so this is the loader alone. `tokens_per_s` is of the mean 1.1k-token documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import numpy as np

from sft.data.dataset import Dataset
from sft.data.dataset_writer import DatasetWriter
from sft.packing.loader import Loader, Share, SpecialIds
from sft.packing.packs import pack_dataset
from sft.packing.steps import StepPlan
from sft.recipe.presets import PRESETS
from sft.recipe.schema import Train

TRAIN = Train(seq_len=16384, global_batch_tokens=64 * 16384, epochs=1.0)


def write(folder: str, mean: float, tokens: int) -> Dataset:
    rng = np.random.default_rng(0)
    count = int(tokens / np.exp(mean + 0.5))
    with DatasetWriter(folder, vocab_size=100_278, part_tokens=max(tokens // 4, 1)) as writer:
        for chunk in np.array_split(np.arange(count), max(count // 20_000, 1)):
            lengths = rng.lognormal(mean, 1.0, len(chunk)).clip(4, 40_000).astype(np.int64)
            mask = rng.random(lengths.sum()) < 0.4
            ends = np.cumsum(lengths)
            mask[ends - 1], mask[ends - lengths] = True, False
            writer.add(rng.integers(0, 100_257, lengths.sum(), dtype=np.uint32), mask, lengths, 0)
    return Dataset.open(folder)


def measure(dataset: Dataset, plan: StepPlan, threads: int) -> float:
    """Tokens a second of rank 0 of 8, the median of 5 passes after one that warms the page cache."""
    loader = Loader(plan, dataset, SpecialIds(100_257, 100_277), PRESETS["olmo3-7b"], Share(0, 8), threads=threads)
    speeds = []
    for _ in range(6):
        began, tokens = time.perf_counter(), 0
        for _, microbatches in loader:
            tokens += sum(m.num_tokens for m in microbatches)
        speeds.append(tokens / (time.perf_counter() - began))
    return statistics.median(speeds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the datasets")
    args = parser.parse_args()
    summary: dict[str, float] = {}
    for name, mean in (("mean 90 tokens", 4.0), ("mean 1.1k tokens", 6.5), ("mean 5k tokens", 8.0)):
        with tempfile.TemporaryDirectory() as folder:
            dataset = write(folder, mean, args.tokens)
            plan = StepPlan.build(pack_dataset(dataset, TRAIN.seq_len), TRAIN)
            for threads in (1, 2, 4):
                speed = measure(dataset, plan, threads)
                print(f"documents of {name:18} {threads} threads {speed / 1e6:8.1f}M tokens/s", flush=True)
                if threads == 2:
                    summary["tokens_per_s" if mean == 6.5 else f"tokens_per_s_{name.split()[1]}"] = round(speed)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
