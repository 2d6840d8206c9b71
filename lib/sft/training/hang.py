"""Finds a training that hangs, names the rank that is behind, and ends the process so that the job is run again.

In:  `mark` before every part of a step, `finish_step` after it, on every rank.
Out: when no step has ended within the bound, every rank writes the Python stacks of its threads to its log (faulthandler),
     one rank writes which rank is behind and what it was doing, and every process ends with status 75 and the request file
     of train.sh. A second hang from the same checkpoint ends with status 1: running it again would not help.

The bound is learnt: FACTOR times the longest step so far, and LEAST_S at least. Nothing is judged before STEPS steps, nor while
a checkpoint is saved, which waits for a disk. A thread watches. It compares the ranks through torch's key-value store, with a
connection of its own, so that it needs no rank to answer: one that does not answer is named.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore

from sft.common.files import write_atomic
from sft.common.machine import node_name
from sft.common.process import AGAIN
from sft.formats.steps import HANGS, REQUEUE
from sft.model.parallel import World

FACTOR, LEAST_S, STEPS = 10.0, 600.0, 5
ANSWER_S = 15.0
"""How long the ranks wait for each other's reports."""


@dataclass(frozen=True)
class Report:
    """What a rank was doing: `parts` counts its marks, `frame` is the innermost Python frame of its main thread outside of torch."""

    rank: int
    host: str
    step: int
    parts: int
    what: str
    frame: str
    waits: bool  # it is in torch.distributed, and so waits for other ranks

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: step {self.step + 1}, {self.what}, {self.frame}"


class HangWatch:
    """Watches one rank. `limit_s` replaces the learnt bound; 0 = learnt."""

    def __init__(self, out: Path, start: int, world: World, limit_s: float) -> None:
        self.out, self.start, self.world, self.limit_s = out, start, world, limit_s
        self.step, self.parts, self.what = start, 0, "start"
        self.longest_s, self.steps = 0.0, 0
        self._began = time.monotonic()
        self._main = threading.get_ident()
        self._paused = False
        self._ended = threading.Event()
        self._store = connect(world)
        self._thread = threading.Thread(target=self._watch, name="hang", daemon=True)
        self._thread.start()

    def mark(self, what: str) -> None:
        """A part of the step begins."""
        self.parts += 1
        self.what = what

    def finish_step(self, step: int) -> None:
        """`step` steps are done on this rank's host."""
        now = time.monotonic()
        if self.steps:  # the first step compiles, and has no earlier one to start from
            self.longest_s = max(self.longest_s, now - self._began)
        self.step, self.steps, self._began = step, self.steps + 1, now
        self.mark("waits for its batch")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While a checkpoint is saved."""
        self._paused = True
        try:
            yield
        finally:
            self._began = time.monotonic()
            self._paused = False

    @property
    def bound_s(self) -> float:
        """Seconds without a finished step that count as a hang; 0 as long as nothing is judged."""
        if self.limit_s:
            return self.limit_s if self.steps else 0.0
        return max(LEAST_S, FACTOR * self.longest_s) if self.steps >= STEPS else 0.0

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    # --- in the thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, max(0.2, self.bound_s / 20))):
            bound, parts = self.bound_s, self.parts
            waited = time.monotonic() - self._began
            if bound and waited > bound and not self._paused and parts == self.parts and not self._ended.is_set():
                self._report(waited)

    def _report(self, waited: float) -> None:
        mine = self._describe()
        self._send(mine)
        sys.stdout.flush()
        print(f"[train] no step for {waited:.0f} s; stacks of rank {mine.rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        reports = self._collect(mine)
        again = str(self.start) not in past_hangs(self.out)
        if mine.rank == min(r.rank for r in reports):
            for line in verdict(reports, self.world.size, waited):
                print(f"[train] {line}", flush=True)
            second = (
                f"a second hang from step {self.start}: not run again; next: read the stacks in {self.out / 'logs'}"
            )
            print(f"[train] {'it asks to be run again' if again else second}", flush=True)
        time.sleep(1.0)  # all have read the list before it gets a line
        with contextlib.suppress(OSError):
            if mine.rank == min(r.rank for r in reports):
                with (self.out / HANGS).open("a") as file:
                    file.write(f"{self.start}\n")
            if again:
                write_atomic(self.out / REQUEUE, b"")
        sys.stderr.flush()
        os._exit(AGAIN if again else 1)

    def _describe(self) -> Report:
        frame: FrameType | None = sys._current_frames()[self._main]
        waits = False
        while frame is not None and "torch" in Path(frame.f_code.co_filename).parts:
            waits = waits or "distributed" in Path(frame.f_code.co_filename).parts
            frame = frame.f_back
        place = "in torch"
        if frame is not None:
            name = "/".join(Path(frame.f_code.co_filename).parts[-2:])
            place = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        return Report(self.world.rank, node_name(), self.step, self.parts, self.what, place, waits)

    def _send(self, report: Report) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):  # the store may have ended with its rank
                self._store.set(f"hang/{report.rank}", json.dumps(asdict(report)))

    def _collect(self, mine: Report) -> list[Report]:
        """The reports of the ranks that answer within ANSWER_S."""
        found = {mine.rank: mine}
        until = time.monotonic() + ANSWER_S
        while self._store is not None and len(found) < self.world.size and time.monotonic() < until:
            with contextlib.suppress(Exception):
                for rank in set(range(self.world.size)) - found.keys():
                    if self._store.check([f"hang/{rank}"]):
                        found[rank] = Report(**json.loads(self._store.get(f"hang/{rank}")))
            time.sleep(0.2)
        return [found[rank] for rank in sorted(found)]


def connect(world: World) -> TCPStore | None:
    """A connection of our own to the key-value store of the process group; None for one process."""
    if world.size == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))


def past_hangs(out: Path) -> list[str]:
    """The first steps of attempts that hung."""
    try:
        return (out / HANGS).read_text().split()
    except OSError:
        return []


def verdict(reports: Sequence[Report], ranks: int, waited_s: float) -> list[str]:
    """Which rank is behind, in lines: one that does not answer; else the one with the fewest parts done; among several, one that
    waits for no other rank. `hung: rank R on HOST` is read by the script of a job."""
    silent = sorted(set(range(ranks)) - {r.rank for r in reports})
    if silent:
        names = ", ".join(map(str, silent))
        return [f"hung: no step for {waited_s:.0f} s; rank{'s' * (len(silent) > 1)} {names} did not answer"] + [
            str(r) for r in reports[:1]
        ]
    least = min(r.parts for r in reports)
    behind = [r for r in reports if r.parts == least]
    suspects = [r for r in behind if not r.waits] or behind
    if len(suspects) < len(reports) or ranks == 1:
        return [f"hung: {report}; no step for {waited_s:.0f} s" for report in suspects]
    return [f"hung: no step for {waited_s:.0f} s, and no rank is behind the others", str(reports[0])]
