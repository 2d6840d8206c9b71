"""Checkpoints beside the training loop: a copy of the state is taken at once, the rest happens in a thread.

In:  the state after a step, on every rank.
Out: step folders (sft.checkpoint.step_folder.save), then LATEST and BEST, then retention: what became superfluous is renamed at
     once and removed in a thread of its own, so that a kill never leaves half a step under a step's name.

What the loop pays is `blocked_s`: waiting for the save before (there is one at a time), and the copy to host memory
(sft.training.host_copy). What goes on beside it (`seconds`): torch's dcp.save, hashes and publication, with a gloo group of
its own, so that its agreements never meet the loop's.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.checkpoint import step_folder
from sft.formats.metrics import SaveTimes, UploadSummary
from sft.formats.steps import Best
from sft.model.parallel import World
from sft.recipe.schema import Train
from sft.training.host_copy import HostCopy
from sft.training.uploads import Uploads

REQUEST = "SAVE"  # touch runs/<run>/train/SAVE: a permanent checkpoint after the step that is running


class Saver:
    """One save at a time. Every rank makes one and calls `begin`, `wait` and `close` alike."""

    def __init__(
        self,
        out: Path,
        train: Train,
        config: Mapping[str, Any],
        world: World,
        log: Callable[[str], None],
    ) -> None:
        """`config` = what config.json of a step says; `say` prints (rank 0 only)."""
        self.out, self.train, self.config, self.world, self.log = out, train, config, world, log
        self.uploads: Uploads | None = None  # sends kept steps away (rank 0 only)
        self.last: Path | None = None  # the newest whole step of this run
        self.waiting: Callable[[], Collection[Path]] = (
            tuple  # steps that wait for their evaluation, and stay until then
        )
        self._save_world = world.with_own_group()
        cuda = world.device.type == "cuda"
        self._copy = HostCopy()
        # A new thread would be on GPU 0, whichever this rank's is.
        mine: tuple[Any, ...] = (torch.cuda.set_device, (world.device,)) if cuda else (None, ())
        self._pool = ThreadPoolExecutor(1, "saving", *mine)
        self._bin = ThreadPoolExecutor(1, thread_name_prefix="removing")
        self._pending: Future[tuple[int, float]] | None = None  # (step, seconds)
        self._blocked = 0.0
        self._ended: tuple[int, float] | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way has failed; `wait` raises what happened, on every rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def requested(self) -> bool:
        """Whether somebody asks for a checkpoint now. Rank 0 looks; the file goes once the checkpoint is whole."""
        return self.world.is_rank0 and self._pending is None and (self.out / REQUEST).exists()

    def settled(self) -> Path | None:
        """The newest whole step, once a save under way has ended, well or not."""
        with contextlib.suppress(Exception):
            self.wait()
        return self.last

    def begin(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_state: Mapping[str, Any],
        *,
        ephemeral: bool,
        best: Best | None = None,
    ) -> None:
        """Takes a copy of the state after `step` steps and returns; without `async_save` returns when the step is whole.
        Raises SharedError when the save before this one failed."""
        began = time.monotonic()
        self.wait()
        state = step_folder.snapshot(model, optimizer)
        if self.train.async_save:
            state = self._copy.take(state)
        # One that will be removed again does not answer: the file stays, and the next step, or attempt, does.
        answers = self.world.is_rank0 and not ephemeral and (self.out / REQUEST).exists()
        job = (step, state, copy.deepcopy(dict(train_state)), ephemeral, best, answers)
        self._blocked = time.monotonic() - began
        self._pending = self._pool.submit(self._finish, *job)
        if not self.train.async_save:
            self.wait()
            self._blocked = time.monotonic() - began

    def _finish(
        self,
        step: int,
        state: dict[str, Any],
        train_state: dict[str, Any],
        ephemeral: bool,
        best: Best | None,
        answers: bool,
    ) -> tuple[int, float]:
        """In the thread: writes the step, names it and deletes superfluous ones. Returns the step and the seconds of writing."""
        began = time.monotonic()
        self.last = step_folder.save(
            self.out, step, state, train_state, self.config, self._save_world, ephemeral=ephemeral
        )
        seconds = time.monotonic() - began
        self._save_world.on_rank0(lambda: self._name(step, best, answers, ephemeral), share=False)
        if self.world.is_rank0:
            self.log(f"saved {self.last} in {seconds:.1f} s")
        return step, seconds

    def _name(self, step: int, best: Best | None, answers: bool, ephemeral: bool) -> None:
        step_folder.mark_latest(self.out / f"step{step}")
        if best is not None and step_folder.mark_best(self.out, step, best.metric, best.value, higher_is_better=False):
            self.log(f"best so far: step {step}, {best.metric} {best.value:.4f}")
        if answers:
            (self.out / REQUEST).unlink(missing_ok=True)
        if self.uploads is not None and not ephemeral:
            self.uploads.add(self.out / f"step{step}")
        self._prune()

    def _prune(self) -> None:
        busy = self.uploads.busy if self.uploads is not None else ()
        for doomed in step_folder.prune(self.out, self.train.keep, {*busy, *self.waiting()}):
            self._bin.submit(shutil.rmtree, doomed, ignore_errors=True)

    def send(self) -> UploadSummary | None:
        """Waits for uploads (rank 0, after the last step). None without uploads."""
        if self.uploads is None:
            return None
        sent = self.uploads.finish()
        self._prune()  # steps that stayed only until they were sent
        return sent

    def wait(self) -> None:
        """Waits until the save under way is complete. Raises SharedError, the same on every rank, when it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._ended = pending.result()

    def finished(self) -> SaveTimes | None:
        """The save that ended since the last call."""
        if self._pending is not None and self._pending.done() and not self.failed:
            self.wait()
        ended, self._ended = self._ended, None
        return SaveTimes(*ended, self._blocked) if ended else None

    def close(self) -> None:
        """Ends the threads; a save under way and removals are finished first. Raises nothing: a failure is only said."""
        try:
            self.wait()
        except Exception as error:
            self.log(f"warning: {error}")
        self._pool.shutdown()
        if self.uploads is not None:
            self.uploads.close()
        self._bin.shutdown()
        self._copy.close()
