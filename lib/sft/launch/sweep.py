"""make sweep: sibling runs for every combination of values, several at a time, and one page that compares them. Standard library only.

    make sweep RECIPE=x lr="1e-5 3e-5 1e-4" seed="1 2"        six runs; GOAL=train (default), evaluate or all; JOBS=n at a time

A field with several values, separated by spaces, makes a dimension. `seed` means [train] seed and data_seed. The data is
synced first, so that the others refer to its data. On this machine each run gets a GPU of its own (CUDA_VISIBLE_DEVICES) where there are
several; with a scheduler all runs are submitted and followed at once. What is finished is not made again, so the same command resumes a sweep.
"""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sft.common import columns
from sft.common.errors import SftError
from sft.common.machine import visible_gpus
from sft.recipe import recipe
from sft.runner import asked, plan

GOALS = ("train", "convert", "evaluate", "all")
MOST = 256
"""Runs of a sweep. More are a mistake more often than a wish."""


@dataclass(frozen=True)
class Sibling:
    """One run of a sweep: its name and its overrides."""

    run: str
    overrides: tuple[str, ...]


def siblings(file: Path, fields: Sequence[str], cluster: str) -> list[Sibling]:
    """The runs of all combinations, each checked as a recipe. Raises SftError."""
    dimensions: list[list[tuple[str, ...]]] = []
    for field in fields:
        name, _, text = field.partition("=")
        values = text.split()
        if not values:
            raise SftError(f'make sweep: {name} has no value; next: {name}="1 2"')
        names = ("train.seed", "train.data_seed") if name == "seed" else (name,)
        dimensions.append([tuple(f"{n}={value}" for n in names) for value in values])
    combinations = [tuple(itertools.chain(*parts)) for parts in itertools.product(*dimensions)]
    if len(combinations) < 2:
        raise SftError(
            'make sweep: one run only; next: give a field several values, as in lr="1e-5 3e-5", or make train'
        )
    if len(combinations) > MOST:
        raise SftError(f"make sweep: {len(combinations)} runs, at most {MOST} are possible; next: fewer values")
    found: dict[str, Sibling] = {}
    for overrides in combinations:
        run = recipe.load(file, overrides, cluster).run
        found.setdefault(run, Sibling(run, overrides))
    return list(found.values())


def slots(local: bool, gpus: Sequence[str], jobs: int, runs: int) -> list[str]:
    """The GPU of each run that goes at the same time; "" for one that keeps what it sees. Raises SftError.

    On this machine there are as many as it has GPUs, or one on a CPU; jobs of a cluster all go at once. `jobs` is JOBS=, 0 where it is
    not given.
    """
    if not local:
        return [""] * (jobs or runs)
    if len(gpus) < 2:
        return [""] * (jobs if jobs and not gpus else 1)
    if jobs > len(gpus):
        raise SftError(
            f"make sweep JOBS={jobs}: this machine shows {len(gpus)} GPUs, and each run takes one; next: JOBS={len(gpus)} or less"
        )
    return list(gpus[: jobs or len(gpus)])


def sweep(
    place: plan.Place,
    r: str,
    found: Sequence[Sibling],
    goal: str,
    jobs: int,
    words: Sequence[str],
    finish: Callable[[], None],
) -> None:
    """Makes all runs, then calls `finish`, which compares them. Raises SftError with the runs that failed, after the others have ended."""
    if goal not in GOALS:
        raise SftError(f"make sweep GOAL={goal}: none of {', '.join(GOALS)}; next: correct it")
    check_read(place, r, found, goal)
    places = slots(place.load_cluster().launcher == "local", visible_gpus(), jobs, len(found))
    free: queue.Queue[str] = queue.Queue()
    for gpu in places:
        free.put(gpu)
    logs = place.runs / ".sweeps"
    logs.mkdir(parents=True, exist_ok=True)
    columns.say(f"[sweep] {len(found)} runs of {r}, {min(len(places), len(found))} at a time; output: {logs}")
    data = tuple(o for o in found[0].overrides if _is_of_data(o, place.cluster))
    if _make(place, r, Sibling(found[0].run, data), "sync", "", logs, words):
        print(_last_lines(logs / f"{found[0].run}.log"), file=sys.stderr, flush=True)
        raise SftError(
            f"{logs / found[0].run}.log: the data cannot be prepared; next: read it, then the same make sweep"
        )
    failed: list[str] = []
    stopped = threading.Event()

    def one(sibling: Sibling) -> None:
        gpu = free.get()
        if stopped.is_set():
            free.put(gpu)
            return
        try:
            code = _make(place, r, sibling, goal, gpu, logs, words)
        finally:
            free.put(gpu)
        if stopped.is_set():
            return
        if code:
            print(_last_lines(logs / f"{sibling.run}.log"), file=sys.stderr, flush=True)
            failed.append(f"{sibling.run} (exit status {code}, {logs / sibling.run}.log)")
        columns.say(f"[sweep] {sibling.run}: {'failed' if code else 'done'}")

    with ThreadPoolExecutor(len(places)) as pool:
        try:
            list(pool.map(one, found))
        except KeyboardInterrupt:  # the makes have got it too: trainings here save, jobs go on
            stopped.set()
            jobs_go_on = "" if place.load_cluster().launcher == "local" else " jobs go on;"
            columns.say(f"[sweep] stopped;{jobs_go_on} next: the same make sweep resumes")
            raise
    finish()
    if failed:
        raise SftError("failed: " + "; ".join(failed) + "\nnext: read the logs, then the same make sweep resumes")


def check_read(place: plan.Place, r: str, found: Sequence[Sibling], goal: str) -> None:
    """Raises SftError for a field that no stage up to the goal reads, before anything runs."""
    watches = bool(recipe.load(plan.REPO / "recipes" / f"{r}.toml", found[0].overrides, place.cluster).evaluate.every)
    question = asked.Asked([goal], place.load_cluster(), place.cluster, watches=watches)
    for sibling in found:
        try:
            question.resolve(sibling.overrides)
        except SftError as error:
            reaching = " or ".join(f"GOAL={g}" for g in GOALS[GOALS.index(goal) + 1 :])
            raise SftError(f"{error}, or make sweep {reaching}" if reaching else str(error)) from None


def _is_of_data(override: str, cluster: str) -> bool:
    """Whether prepare or sync reads the field."""
    path = recipe.locate(override.partition("=")[0], cluster, [])
    return path is not None and path[0] in (*asked.READS["prepare"], *asked.READS["sync"])


def _make(place: plan.Place, r: str, sibling: Sibling, goal: str, gpu: str, logs: Path, words: Sequence[str]) -> int:
    """Runs make for one run, with its output in a file. Returns the exit status."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = ["make", "--no-print-directory", goal, f"RECIPE={r}", f"RUNS={place.runs}", *words, *sibling.overrides]
    with (logs / f"{sibling.run}.log").open("ab") as log:
        log.write((" ".join(command) + "\n").encode())
        log.flush()
        done = subprocess.run(
            command, cwd=plan.REPO, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode


def _last_lines(log: Path) -> str:
    """The end of a run's output, which says why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
    return "\n".join(f"[sweep] {columns.cut(line, 90)}" for line in lines)
