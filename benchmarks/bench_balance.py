"""How long ranks wait for each other, before and after dealing packs by cost: a simulation of steps.

In:  nothing; lengths are drawn here and packed by the real packer. Out: a table, and one JSON object on the last line.
Run: make bench-balance    (or: python benchmarks/bench_balance.py --steps 20)

Idle is the share of all ranks' time spent waiting, when ranks meet after every microbatch (sharded parameters), and
in brackets when they meet once a step (replicated parameters). Before = packs in the shuffled order, rank by rank.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from sft.data.dataset import DOCUMENT
from sft.packing.balance import deal, deal_in_order, idle, pack_costs
from sft.packing.packs import PackIndex, pack_documents
from sft.recipe.presets import PRESETS

SEQ_LEN = 32768
MODELS = ("olmo2-1b", "olmo2-7b", "olmo3-7b", "olmo3-32b")
SHAPES = ((8, 1, 1), (8, 8, 1), (8, 4, 2), (32, 4, 1), (64, 4, 1))  # ranks, microbatches, packs a microbatch
GOAL = ("chat and reasoning", "olmo2-7b")  # mixed data and full attention


def mixes() -> dict[str, PackIndex]:
    rng = np.random.default_rng(0)

    def lognormal(mean: float, sigma: float, count: int) -> np.ndarray:
        return rng.lognormal(mean, sigma, count).clip(4, SEQ_LEN).astype(np.int64)

    lengths = {
        "chat": lognormal(6.5, 1.0, 300_000),
        "chat and reasoning": np.concatenate([lognormal(6.5, 1.0, 200_000), lognormal(9.2, 0.8, 15_000)]),
        "reasoning": lognormal(9.0, 0.9, 40_000),
        "half of the packs full": np.concatenate([lognormal(6.0, 0.7, 300_000), np.full(5_000, SEQ_LEN)]),
    }
    made = {}
    for name, length in lengths.items():
        documents = np.zeros(len(length), dtype=DOCUMENT)
        documents["length"], documents["labels"] = length, np.maximum(length // 2, 1)
        made[name] = pack_documents(documents, SEQ_LEN)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="simulated steps of every line")
    args = parser.parse_args()
    summary: dict[str, float] = {}
    print(f"{'data':24}{'model':12}{'ranks x microbatches x packs':30}{'before':>18}{'after':>18}")
    for name, index in mixes().items():
        for model in MODELS:
            costs = pack_costs(index, PRESETS[model])
            for ranks, microbatches, each in SHAPES:
                batch = ranks * microbatches * each
                rng = np.random.default_rng(0)
                steps = [costs[rng.permutation(len(costs))[:batch]] for _ in range(args.steps)]
                before = np.mean([idle(c, deal_in_order(batch, ranks, each)) for c in steps], axis=0)
                after = np.mean([idle(c, deal(c, ranks, each)) for c in steps], axis=0)
                shape = f"{ranks} x {microbatches} x {each}"
                print(
                    f"{name:24}{model:12}{shape:30}{before[0]:10.2%} ({before[1]:.1%}){after[0]:10.2%} ({after[1]:.1%})"
                )
                if (name, model) == GOAL and each == 1:
                    summary[f"idle_{ranks}x{microbatches}"] = after[0]
                    summary[f"before_{ranks}x{microbatches}"] = before[0]
    print(json.dumps({k: round(float(v), 5) for k, v in summary.items()}))


if __name__ == "__main__":
    main()
