"""Saves checkpoints beside the training loop: the loop waits for a copy of the state, and a thread does the rest.

In:  the state after a step, on every rank.
Out: step folders (sft.checkpoint.step_folder.save), then LATEST and BEST, then retention. Superfluous steps are renamed
     at once and removed in another thread, so that a kill never leaves an incomplete step under a step's name.

The loop waits `blocked_s`: for the previous save, as there is one at a time, and for the copy to host memory
(sft.training.host_copy). The thread takes `seconds`: DCP's save, hashes and publication. It has a separate gloo group,
so that its exchanges never mix with those of the loop.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.checkpoint import disks, step_folder
from sft.formats.metrics import SaveTimes, UploadSummary
from sft.formats.steps import Best
from sft.model.parallel import World, transfer_s
from sft.recipe.schema import Train
from sft.training.host_copy import HostCopy
from sft.training.uploads import Uploads

PUBLICATION_S = 7 * 24 * 3600
"""How long ranks wait for the uploads of others, and for the publication. A scheduler's time limit is shorter."""
REQUEST = "SAVE"  # touch runs/<run>/train/SAVE: a permanent checkpoint after the step that is running


@dataclass(frozen=True)
class _Save:
    """A save that the thread does."""

    step: int
    state: Mapping[str, Any]  # step_folder.snapshot
    train_state: Mapping[str, Any]  # of this rank
    ephemeral: bool
    best: Best | None  # the entry of BEST if this step is the best
    answers: bool  # removes the request file when the step is complete


class Saver:
    """Saves one step at a time. Every rank has one and calls `begin`, `wait` and `close` at the same points."""

    def __init__(
        self,
        out: Path,
        train: Train,
        config: Mapping[str, Any],
        world: World,
        log: Callable[[str], None],
        step_bytes: int = 0,
    ) -> None:
        """`config`: the content of config.json of a step. `log` prints on rank 0 only. `step_bytes`: about the size of a step."""
        self.out, self.train, self.config, self.world, self.log = out, train, config, world, log
        self.uploads: Uploads | None = None  # of permanent steps, on ranks that lead a disk
        self.other_disk: Sequence[
            bool
        ] = ()  # ranks whose files stay on their node, which uploads them (disks.other_disks)
        self.last: Path | None = None  # the newest complete step of this run
        self.waiting: Callable[[], Collection[Path]] = tuple  # steps that must stay until they are evaluated
        self._save_world = world.with_own_group(transfer_s(step_bytes))
        cuda = world.device.type == "cuda"
        self._copy = HostCopy()
        # A new thread would use GPU 0 and not this rank's GPU.
        initializer: tuple[Any, ...] = (torch.cuda.set_device, (world.device,)) if cuda else (None, ())
        self._pool = ThreadPoolExecutor(1, "saving", *initializer)
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="removing")
        self._pending: Future[tuple[int, float]] | None = None  # (step, seconds)
        self._blocked = 0.0
        self._ended: tuple[int, float] | None = None

    def leave_on_nodes(self, other_disk: Sequence[bool]) -> None:
        """Leaves each node's files on its own disk. Every rank calls this, with the same list (disks.other_disks)."""
        self.other_disk, self._patient = other_disk, self.world.with_own_group(PUBLICATION_S)

    @property
    def leads(self) -> bool:
        """Whether this rank names, uploads and removes the steps of a disk."""
        return disks.leads_disk(self.other_disk, self.world)

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed on this rank. `wait` raises the error, on every rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def requested(self) -> bool:
        """Whether the request file is there (True on rank 0 only). It is removed when the checkpoint is complete."""
        return self.world.is_rank0 and self._pending is None and (self.out / REQUEST).exists()

    def newest_complete(self) -> Path | None:
        """The newest complete step, after the save under way has ended, with or without success."""
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
        """Copies the state after `step` steps and starts the save. Without `async_save` it returns when the step is
        complete. Raises SharedError when the previous save failed."""
        began = time.monotonic()
        self.wait()
        state = step_folder.snapshot(model, optimizer)
        if self.train.async_save:
            state = self._copy.take(state)
        # An ephemeral step does not answer a request: the file stays for the next step, or the next attempt.
        answers = self.world.is_rank0 and not ephemeral and (self.out / REQUEST).exists()
        save = _Save(step, state, copy.deepcopy(dict(train_state)), ephemeral, best, answers)
        self._blocked = time.monotonic() - began
        self._pending = self._pool.submit(self._run, save)
        if not self.train.async_save:
            self.wait()
            self._blocked = time.monotonic() - began

    def _run(self, save: _Save) -> tuple[int, float]:
        """In the thread: writes the step, names it and removes superfluous ones. Returns the step and the seconds of
        writing."""
        began = time.monotonic()
        self.last = step_folder.save(
            self.out, save.step, save.state, save.train_state, self.config, self._save_world,
            ephemeral=save.ephemeral, other_disk=self.other_disk,
        )  # fmt: skip
        seconds = time.monotonic() - began
        self._save_world.on_all_ranks(lambda: self._name(save) if self.leads else None)
        if self.world.is_rank0:
            self.log(f"saved {self.last} in {seconds:.1f} s")
        return save.step, seconds

    def _name(self, save: _Save) -> None:
        """On ranks that lead a disk: LATEST, BEST, the request file, the upload and retention."""
        folder, best = self.out / f"step{save.step}", save.best
        step_folder.mark_latest(folder)
        if best and step_folder.mark_best(self.out, best.step, best.metric, best.value, higher_is_better=False):
            self.log(f"best so far: step {best.step}, {best.metric} {best.value:.4f}")
        if save.answers:
            (self.out / REQUEST).unlink(missing_ok=True)
        if self.uploads is not None and not save.ephemeral:
            self.uploads.add(folder)
        self.prune()

    def prune(self) -> None:
        """Moves superfluous steps to the trash and removes them in a thread. Ranks that lead a disk only."""
        busy = self.uploads.busy if self.uploads is not None else ()
        keep = None if self.train.save_best_only else self.train.keep
        for trash in step_folder.prune(self.out, keep, {*busy, *self.waiting()}):
            self._remover.submit(shutil.rmtree, trash, ignore_errors=True)

    def send(self) -> UploadSummary | None:
        """Waits for uploads, after the last step. None without uploads, and on ranks that lead no disk. Every rank calls this."""
        sent = self.uploads.finish() if self.uploads is not None else None
        if sent is not None:
            self.prune()  # steps that stayed only until they were sent
        if any(self.other_disk):  # a step is uploaded when every node has sent its part
            parts = [part for part in self._patient.gather(sent) if part is not None]
            missing = sorted({step for part in parts for step in part.missing})
            if sent is not None:
                sent = replace(sent, steps=tuple(s for s in sent.steps if s not in missing), missing=tuple(missing))
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
        """Ends the threads after the save under way and removals. Raises nothing: a failure is only logged."""
        try:
            self.wait()
        except Exception as error:
            self.log(f"warning: {error}")
        self._pool.shutdown()
        if self.uploads is not None:
            self.uploads.close()
        self._remover.shutdown()
        self._copy.close()
