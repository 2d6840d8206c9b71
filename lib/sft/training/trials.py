"""Short trainings that keep nothing: what `make lr-range` and `make overfit` build and step.

In:  the folder of a run whose sync is finished. A trial has the run's data, first weights, trained parameters and ranks.
Out: a `Trial`, whose steps change weights in memory alone. runs/<run>/train is neither read nor written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from sft.common.errors import SftError
from sft.common.library_logs import quiet_libraries
from sft.model.parallel import World, join
from sft.packing.loader import Microbatch
from sft.recipe.schema import Hardware, Train
from sft.runner.asked import check_here
from sft.runner.cli import RunOptions
from sft.runner.processes import processes
from sft.runner.stage import Stage
from sft.training.build import build_run
from sft.training.loop import Run, forward, optimizer_step
from sft.training.metrics import clock
from sft.training.optim import Guard
from sft.training.train import other_rank

Change = Callable[[Train, Hardware, World], Train]


@dataclass(frozen=True)
class Measured:
    """One step of a trial. `loss` is what is minimised, before the step."""

    lr: float
    loss: float
    grad_norm: float


class Trial:
    """A built training. All ranks call its methods at the same points."""

    def __init__(self, run: Run, steps: int) -> None:
        """`steps`: how many there will be at most, for the time that is left."""
        self.run, self.steps = run, steps
        self.world, self.stage = run.world, run.stage
        self._began, self._done = time.monotonic(), 0

    def say(self, text: str) -> None:
        """Prints a line, on rank 0 only."""
        if self.world.is_rank0:
            self.stage.log(text)

    def batches(self) -> Iterator[tuple[int, list[Microbatch]]]:
        """(step, microbatches of this rank), as in training."""
        return iter(self.run.loader(0))

    def step(self, number: int, batches: Sequence[Microbatch], lr: float) -> Measured:
        """One update at this rate. A step that is not finite changes no weight."""
        values, _ = optimizer_step(self.run, number, batches, lr)
        norm, _, loss = values[:3].tolist()
        self._done += 1
        return Measured(lr, loss, norm)

    def progress(self, now: Measured) -> None:
        """Prints the step that was just done. The first one has the start-up in its time."""
        seconds = (time.monotonic() - self._began) / self._done
        self.say(
            f"step {self._done:>{len(str(self.steps))}}/{self.steps}  loss {now.loss:7.4f}  lr {now.lr:.2e}"
            f"  grad {now.grad_norm:6.3f}  ETA {clock((self.steps - self._done) * seconds)}"
        )

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Microbatch]) -> float:
        """The mean loss over the targets of these microbatches of all ranks; NaN without one."""
        size = 2 * len(self.run.sources)
        total = torch.zeros(size, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            total += forward(self.run, batch, 1.0)[1][1:]
        if self.world.size > 1:
            dist.all_reduce(total)
        loss, count = total.view(2, -1).sum(1).tolist()
        return loss / count if count else float("nan")


@contextlib.contextmanager
def open_trial(name: str, options: RunOptions, steps: int, change: Change) -> Iterator[Trial]:
    """Builds the training of a run with other options in [train], on every rank. `name`: of the goal of Make.

    `change` gets [train], the hardware numbers and the ranks. Raises SftError, also for what training refuses.
    """
    on_all_processes(name, options)
    world = join()
    folder: Path | None = None
    try:
        with contextlib.nullcontext() if world.is_rank0 else other_rank():
            recipe = options.load_recipe()
            stage = Stage("train", options.place, recipe, sys.argv, follower=not world.is_rank0)
            stage.recipe = dataclasses.replace(recipe, train=change(recipe.train, stage.hardware, world))
            folder = stage.run / ".work" / name
            stage.name, stage.out, stage.storage = name, folder, ""  # nothing is uploaded, no step is found
            world.on_rank0(lambda: _empty(folder), share=False)
            quiet_libraries(stage.run / ".work" / f"{name}-rank{world.rank}.log")
            if stage.hardware.threads and world.device.type == "cpu":
                torch.set_num_threads(stage.hardware.threads)
            run, _ = build_run(stage, world)
            run.guard = Guard(0.0, world.device, len(run.sources))
            yield Trial(run, steps)
            run.saver.close()
    finally:
        if folder is not None and world.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)
        world.close()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def on_all_processes(name: str, options: RunOptions) -> None:
    """Replaces this process by one for each GPU, as training has them, unless it is one of them.

    Raises SftError where training needs more than this machine.
    """
    if "RANK" in os.environ:
        return
    recipe, cluster = options.load_recipe(), options.place.load_cluster()
    check_here([name], cluster, options.cluster)
    hardware = recipe.hardware(options.cluster, "train")
    if hardware.nodes > 1:
        raise SftError(
            f"make {name}: nodes = {hardware.nodes} in [on.{options.cluster}.train], and it runs on one machine; next: nodes=1"
        )
    count, threads = processes(hardware, cluster)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if count > 1:
        words = ["-m", "sft.launch.torchrun", "--standalone", "--nproc-per-node", str(count), *sys.argv]
        os.execv(sys.executable, [sys.executable, *words])
