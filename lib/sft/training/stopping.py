"""What follows a training step: a checkpoint, a validation, the end. Early stopping and the clock decide here.

In:  [train], the number of finished steps, validation losses, rank 0's clock.
Out: a `Due` after each step, the same on every rank; `Stopping.state`, which a checkpoint stores, so that a resumed
     training stops at the same step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from sft.model.parallel import World
from sft.recipe.schema import Train

EARLY_STOPPING, MAX_MINUTES = "early_stopping", "max_minutes"
"""Why a training ended before its last step, as train's manifest says it."""


@dataclass
class Stopping:
    """Early stopping and the clock of one rank. Only rank 0's clock counts: the loop shares what it says."""

    train: Train
    lowest: float = math.inf  # of the scheduled validation losses
    misses: int = 0  # scheduled validations in a row without a loss that is lower by early_stopping_threshold
    seconds: float = 0.0  # of earlier attempts, up to the checkpoint that this one continues from
    _began: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Starts the clock of this attempt."""
        self._began = self._saved = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training over all attempts."""
        return self.seconds + time.monotonic() - self._began

    @property
    def out_of_time(self) -> bool:
        return self.train.max_minutes > 0 and self.elapsed >= 60 * self.train.max_minutes

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.train.early_stopping_patience <= self.misses

    @property
    def save_due(self) -> bool:
        """Whether save_every_minutes have passed since the last checkpoint."""
        every = self.train.save_every_minutes
        return every > 0 and time.monotonic() - self._saved >= 60 * every

    def saved(self) -> None:
        self._saved = time.monotonic()

    def validated(self, loss: float) -> bool:
        """Counts a scheduled validation. Returns whether its loss is the lowest so far. A loss that is not finite is never
        lower."""
        lower = loss < self.lowest
        improved = lower and self.lowest - loss > self.train.early_stopping_threshold
        self.misses = 0 if improved else self.misses + 1
        self.lowest = loss if lower else self.lowest
        return lower

    def state(self) -> dict[str, float]:
        """What a checkpoint stores; empty where nothing depends on it, so that its bytes are those without these options."""
        train = self.train
        if not (train.early_stopping_patience or train.save_best_only or train.max_minutes):
            return {}
        return {"lowest": self.lowest, "misses": self.misses, "seconds": self.elapsed if train.max_minutes else 0.0}

    def load(self, state: dict[str, float]) -> None:
        """Restores what `state` returned."""
        self.lowest, self.misses, self.seconds = state["lowest"], int(state["misses"]), state["seconds"]


@dataclass(frozen=True)
class Due:
    """What follows a step.

    With save_every = 4, ephemeral_every = 2 and validate_every = 3: step 2 is saved for a while, step 3 is validated,
    step 4 is saved for good. A signal to stop, a request for a checkpoint, and the clock make a step due at once.
    """

    permanent: bool  # a checkpoint that stays
    ephemeral: bool  # a checkpoint that is deleted when a newer one is complete
    validation: bool
    counts: bool  # the validation is one of validate_every, which early stopping counts
    stop: bool  # save and end, because a signal asked for it
    timed: bool  # an ephemeral checkpoint, because save_every_minutes have passed
    ended: str = ""  # why training is finished here, before its last step

    @classmethod
    def after(
        cls,
        done: int,
        steps: int,
        train: Train,
        *,
        held_out: bool,
        stop: bool,
        requested: bool,
        timed: bool,
        out_of_time: bool,
    ) -> Due:
        """After `done` of `steps` steps. `held_out`: there is a validation split. `stop`: a signal came. `requested`:
        someone asked for a checkpoint. The same on every rank."""
        last = done == steps or out_of_time
        counts = held_out and train.validate_every > 0 and done % train.validate_every == 0
        return cls(
            permanent=last or requested or done % train.save_every == 0,
            ephemeral=ephemeral_due(train, done),
            validation=counts or (held_out and last),
            counts=counts,
            stop=stop and not last,
            timed=timed,
            ended=MAX_MINUTES if last and done < steps else "",
        )

    def validated(self, done: int, steps: int, stopping: Stopping, loss: float) -> Due:
        """What is due once the step's validation loss is known. Early stopping counts it."""
        if not self.counts:
            return self
        best = stopping.validated(loss) and stopping.train.save_best_only
        if not stopping.out_of_patience or done == steps:
            return replace(self, permanent=self.permanent or best)
        return replace(self, permanent=True, stop=False, ended=self.ended or EARLY_STOPPING)

    @property
    def scheduled(self) -> bool:
        """Whether an uninterrupted run has a checkpoint here too."""
        return self.permanent or self.ephemeral

    @property
    def saves(self) -> bool:
        return self.scheduled or self.stop or self.timed

    @property
    def any(self) -> bool:
        return self.saves or self.validation


def clock(stopping: Stopping, world: World) -> tuple[bool, bool]:
    """Whether a checkpoint and the end are due by the clock, on rank 0. The other ranks' clocks count for nothing."""
    return (stopping.save_due, stopping.out_of_time) if world.is_rank0 else (False, False)


def already_ended(stopping: Stopping, world: World) -> str:
    """Why a restored step is the last one: early stopping or max_minutes ended training there. "" where it goes on. Every rank
    calls this."""
    patience, out_of_time = stopping.out_of_patience, clock(stopping, world)[1]
    if world.any(patience):
        return EARLY_STOPPING
    return MAX_MINUTES if world.any(out_of_time) else ""


def ephemeral_due(train: Train, done: int) -> bool:
    """Whether the step gets an ephemeral checkpoint, unless it gets a permanent one."""
    return train.ephemeral_every > 0 and done % train.ephemeral_every == 0


def may_be_best(train: Train, done: int) -> bool:
    """Whether an uninterrupted run may have a checkpoint after this step, which BEST then may name."""
    best = train.save_best_only and train.validate_every > 0 and done % train.validate_every == 0
    return best or done % train.save_every == 0 or ephemeral_due(train, done)
