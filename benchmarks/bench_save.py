"""Checkpoints beside training: what the loop waits, against a save it waits for whole.

python benchmarks/bench_save.py [parameters in millions = 15]

Trains a model of that size on the CPU, one process, alternating saves beside training and saves that it waits for; the last line
is JSON: seconds that the loop was blocked and that the save took (by the clock, and in CPU time, which a busy machine changes
less), and the time of steps during a save against those without.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from sft.checkpoint import olmo_core
from sft.formats.dataset import TokenIds
from sft.model.model import Transformer, initial_values
from sft.model.parallel import World
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Train
from sft.training.optim import build_adamw
from sft.training.saving import Saver

ROUNDS = 3


def main() -> None:
    torch.set_num_threads(1)
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    layers = max(1, round(millions * 1e6 / 3.1e6))
    config = ModelConfig(layers, 512, 8, 8, 64, 1344, 1024)
    model = Transformer(config)
    for name, value in initial_values(model, 0.02, 0):
        dict(model.named_parameters())[name].data.copy_(value)
    world = World(0, 1, 0, torch.device("cpu"))
    ids = torch.randint(0, 1024, (256,))
    edges = torch.tensor([0, 256], dtype=torch.int32)

    def step() -> float:
        began = time.monotonic()
        loss, _ = model(ids, torch.arange(256), edges, 256, torch.arange(255), ids[1:], 255.0, 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.monotonic() - began

    optimizer = build_adamw(model, Train())
    quiet, during, blocked, waited, seconds, copied, written = [], [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        beside, waiting = (
            Saver(
                Path(folder),
                Train(async_save=a, keep=1),
                olmo_core.step_config(config, TokenIds()),
                world,
                lambda _: None,
            )
            for a in (True, False)
        )
        step()
        for number in range(1, ROUNDS + 1):
            quiet += [step() for _ in range(3)]
            cpu = time.thread_time()
            beside.begin(2 * number, model, optimizer, {}, ephemeral=True)
            copied.append(time.thread_time() - cpu)
            while beside._pending is not None and not beside._pending.done():
                during.append(step())
            saved = beside.finished()
            assert saved is not None
            blocked.append(saved.blocked_s)
            seconds.append(saved.seconds)
            cpu = time.process_time()
            waiting.begin(2 * number + 1, model, optimizer, {}, ephemeral=True)
            written.append(time.process_time() - cpu)
            saved = waiting.finished()
            assert saved is not None
            waited.append(saved.blocked_s)
        beside.close()
        waiting.close()
    first, *later = blocked
    result = {
        "parameters": config.parameters,
        "state_gb": config.parameters * 12 / 1e9,
        "waited_s": statistics.median(waited),
        "beside_s": statistics.median(seconds),
        "blocked_first_s": first,
        "blocked_s": statistics.median(later),
        "blocked_share": statistics.median(later) / statistics.median(waited),
        "blocked_cpu_s": statistics.median(copied[1:]),
        "waited_cpu_s": statistics.median(written),
        "blocked_cpu_share": statistics.median(copied[1:]) / statistics.median(written),
        "step_during_save": statistics.median(during) / statistics.median(quiet),
        "steps_during_saves": len(during),
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
