"""The train stage: the synced dataset and first weights to step folders.

In:  runs/<run> with a finished sync stage; torchrun's environment, or none for one process.
Out: runs/<run>/train/: stepN/ (OLMo-core's layout, see sft.checkpoint.step_folder), tokenizer/, metrics.jsonl,
     manifest.json last.

    python -m sft.training runs/<run> [--cluster C] [field=value …]
    torchrun --nproc-per-node 8 -m sft.training runs/<run> [--cluster C] [field=value …]

After a kill at any moment, the same command continues from the newest complete step. SIGTERM or SIGUSR1 saves and exits
with status 75 (EX_TEMPFAIL), which asks a scheduler to run it again. Status 12: a GPU ran out of memory, and the next start
recomputes more. Status 1 is an error with a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from sft.checkpoint import disks
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.common.process import AGAIN, OUT_OF_MEMORY, report_errors
from sft.formats import manifest
from sft.formats import metrics as metrics_format
from sft.formats.manifest import Output
from sft.formats.metrics import (
    Attempt,
    StepRecord,
    TrainMetrics,
    UploadSummary,
    initial_validation,
    read_metrics,
)
from sft.formats.steps import REQUEUE
from sft.model import utilisation
from sft.model.parallel import SharedError, World, join
from sft.recipe.schema import STATE_FIELDS
from sft.runner.cli import RunOptions, parse_run
from sft.runner.stage import Result, Stage, open_stage
from sft.training import logs
from sft.training.build import build_run
from sft.training.hang import HangWatch
from sft.training.loop import Requeue, Run, loop
from sft.training.metrics import MetricsWriter
from sft.training.out_of_memory import StartAgain, starts_again
from sft.training.saving import PUBLICATION_S
from sft.training.sources import lost_sources, table
from sft.training.stopping import EARLY_STOPPING, MAX_MINUTES
from sft.training.stored_steps import StoredSteps, find_steps
from sft.training.trackers import Trackers
from sft.training.uploads import destination
from sft.training.watcher import Watcher, start_watcher


def train_stage(
    stage: Stage, world: World, stop: Callable[[], bool], attempt: int = 1, stored: StoredSteps | None = None
) -> Result:
    """The stage on every rank. Raises Requeue, with the state saved, when `stop` returns True. `stored`: steps in a bucket."""
    if world.is_rank0:
        (stage.out / REQUEUE).unlink(missing_ok=True)
    run, start = build_run(stage, world, stored)
    metrics = None
    if world.is_rank0:
        save_tokenizer(stage)
        metrics = open_metrics(stage, run, start, attempt)
    try:
        run.hang = HangWatch(stage.out, start, world, stage.hardware.hang_s)
        with contextlib.closing(run.hang), starts_again(run):
            loop(run, start, metrics, stop)
        uploaded = run.saver.send()
    except Requeue:
        if world.local_rank == 0:  # on every node, as each may have its own disk
            write_atomic(stage.out / REQUEUE, b"")
        raise
    finally:
        run.saver.close()
        if metrics is not None:
            metrics.close()
    final = stage.out / f"step{run.last}"
    outputs = [final.name, "tokenizer", metrics_format.NAME]
    if not world.is_rank0:
        return Result(outputs)
    found = summary(stage.out, run, final, uploaded).to_value()
    for line in (*about_end(run), *table(run.labels), *lost_sources(run.labels, logs.colour())):
        stage.log(line)
    files = step_files(final)
    absent = tuple(o for o in files if not (stage.out / o.path).is_file())  # they are on other nodes' disks
    if absent and (uploaded is None or final.name not in uploaded.steps):
        raise SftError(
            f"{final}: {absent[0].path} and {len(absent) - 1} more of its files are on other nodes, and they could not be sent;"
            " next: run train again, which sends them, or continues from the newest step that was sent"
        )
    return Result(
        outputs,
        found,
        {o.path: o.sha256 for o in files},
        measured=[metrics_format.NAME],
        absent=absent,
        where=uploaded.where if uploaded else "",
    )


def step_files(step: Path) -> list[Output]:
    """The files of a step, relative to the training folder. Their hashes were computed while it was written, or verified when
    it was restored, so that publication does not read hundreds of GB again."""
    files = manifest.StepManifest.read(step / manifest.NAME).outputs
    return [dataclasses.replace(o, path=f"{step.name}/{o.path}") for o in files]


def wait_for_publication(world: World) -> None:
    """Keeps every rank until rank 0 has published, however long that takes: srun, torchrun and Beaker end a job whose other
    ranks have left. Ends a rank with status 1 when rank 0 fails. `world` has a group of its own, which waits so long."""
    try:
        world.sum(torch.zeros(1))
    except RuntimeError:  # rank 0 has printed its error, and its connection is closed
        sys.exit(1)


def open_metrics(stage: Stage, run: Run, start: int, attempt: int) -> MetricsWriter:
    """The metrics of this attempt, with its header and the trackers. Rank 0 only."""
    train = stage.recipe.train
    options = {"model": dataclasses.asdict(stage.recipe.model), "train": dataclasses.asdict(train)}
    trackers = Trackers.start(train, stage.recipe.run, stage.identity, options, stage.out, start, stage.log)
    device = torch.cuda.get_device_name() if run.world.device.type == "cuda" else "cpu"
    header = Attempt(
        attempt,
        start,
        run.world.size,
        device,
        run.peak_tflops or None,
        utilisation.FORMULA,
        run.plan.steps,
        train.continue_from or None,
        {name: options["train"][name] for name in STATE_FIELDS},
        run.room.mode if run.room is not None else None,
        str(run.short) if run.short is not None else None,
    )
    return MetricsWriter(stage.out, start, run.plan.steps, stage.log, header, trackers, run.first)


def save_tokenizer(stage: Stage) -> None:
    """Copies the tokenizer folder beside the step folders, where OLMo-core's converter and ours look for it."""
    source, target = stage.dataset / "data" / "tokenizer", stage.out / "tokenizer"
    work = stage.out / ".tokenizer"
    for folder in (work, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, work)
    work.rename(target)


def summary(out: Path, run: Run, final: Path, uploaded: UploadSummary | None) -> TrainMetrics:
    """The metrics of the manifest. The first step includes start-up, so it counts for no speed."""
    records, train = read_metrics(out / metrics_format.NAME), run.stage.recipe.train
    steps = [r for r in records if isinstance(r, StepRecord)]
    if not steps or steps[-1].step != run.last:
        raise SftError(
            f"{out / metrics_format.NAME}: its last record is not of the final step {run.last}; next: restore the file"
            " and run train again"
        )
    timed = steps[1:] or steps
    seconds = sum(r.seconds for r in timed)
    used = [(r.mfu, r.seconds) for r in timed if r.mfu is not None]
    validation = [r.validation_loss for r in steps if r.validation_loss is not None]
    before = initial_validation(records)
    return TrainMetrics(
        final_step=run.last,
        checkpoint=final.name,
        loss=steps[-1].loss,
        first_loss=steps[0].loss,
        tokens=steps[-1].tokens,
        tokens_per_s=sum(r.tokens_per_s * r.seconds for r in timed) / seconds if seconds else 0.0,
        skipped_steps=sum(1 for r in steps if r.skipped),
        attempts=sum(isinstance(r, Attempt) for r in records),
        data=run.plan.describe(),
        mfu=sum(mfu * s for mfu, s in used) / sum(s for _, s in used) if used else None,
        validation_loss=validation[-1] if validation else None,
        first_validation_loss=validation[0] if validation else None,
        remote=uploaded,
        sources=tuple(run.labels),
        initial_validation_loss=before.initial_validation_loss if before else None,
        stopped=run.ended or None,
        max_minutes=train.max_minutes if run.ended == MAX_MINUTES else None,
        continues=train.continue_from or None,
        out_of_memory=next((r.out_of_memory for r in records if isinstance(r, Attempt) and r.out_of_memory), None),
    )


def about_end(run: Run) -> list[str]:
    """What is said of replays, and of a training that ended before its last step."""
    return [*about_replays(run), *about_early_end(run)]


def about_replays(run: Run) -> list[str]:
    """How many microbatches were computed twice, and how they were compared."""
    if run.replay is None:
        return []
    how = "in every bit" if run.replay.exact else "within their bounds"
    return [f"replay: {run.replay.count:,} microbatches of this attempt were computed twice and agree {how}"]


def about_early_end(run: Run) -> list[str]:
    """What is said of a training that ended before its last step."""
    train, at = run.stage.recipe.train, f"step {run.last:,} of {run.plan.steps:,}"
    if run.ended == EARLY_STOPPING:
        return [
            f"stopped early at {at}: {run.stopping.misses} validations in a row had no lower loss than"
            f" {run.stopping.lowest:.4f} (early_stopping_patience = {train.early_stopping_patience}); BEST names the best step"
        ]
    if run.ended == MAX_MINUTES:
        return [
            f"stopped early at {at}: {train.max_minutes:g} minutes have passed (max_minutes); with a larger max_minutes the"
            " same command goes on"
        ]
    return []


def main(argv: Sequence[str] | None = None, signals: Sequence[int] = ()) -> int:
    """Runs the stage and returns its exit status. The caller's handlers append to `signals`: it then saves and asks to be run again."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse_run("train", words)
    world = join()
    began = time.monotonic()
    stage: Stage | None = None
    watcher: Watcher | None = None
    try:
        with report_errors("train") if world.is_rank0 else other_rank(), ExitStack() as stack:
            stage = open_on_all_ranks(options, world, stack)
            attempt, stored = prepare_attempt(stage, world)
            patient = world.with_own_group(PUBLICATION_S)
            if world.is_rank0:
                watcher = start_watcher(stage, words)
            result = train_stage(stage, world, lambda: bool(signals), attempt, stored)
            if world.is_rank0:
                stage.finish(result)
        if world.is_rank0:
            stage.log(f"done in {time.monotonic() - began:.1f} s: {stage.out / manifest.NAME}")
        wait_for_publication(patient)
        if watcher is not None:
            watcher.finish(lambda: bool(signals))
    except StartAgain as error:
        print(f"[train] warning: {error}", file=sys.stderr, flush=True)
        return OUT_OF_MEMORY
    except Requeue:
        if world.is_rank0 and stage is not None:
            stage.log(f"stopped by a signal and saved; exit status {AGAIN} asks to be run again")
        return AGAIN
    finally:
        if watcher is not None:
            watcher.stop()  # does nothing if it has finished
        world.close()
    return 0


def open_on_all_ranks(options: RunOptions, world: World, stack: ExitStack) -> Stage:
    """The stage on every rank. Rank 0 opens it first: it takes the lock, and sets a folder of other inputs aside,
    before another rank looks at it."""

    def lead() -> Stage:
        return stack.enter_context(open_stage("train", options, in_place=True))

    stage: Stage | None = world.on_rank0(lead, share=False)
    return stage or stack.enter_context(open_stage("train", options, in_place=True, follower=True))


def prepare_attempt(stage: Stage, world: World) -> tuple[int, StoredSteps | None]:
    """Sets the CPU threads, looks for steps in the bucket where this disk ends with the job or nodes share none, and starts the
    logs. Returns the attempt's number and the steps."""
    if stage.hardware.threads and world.device.type == "cpu":
        torch.set_num_threads(stage.hardware.threads)
    stored, where = None, destination(stage.storage, stage.recipe.run, stage.identity)
    if where and ("SFT_STAGE_ADDRESS" in os.environ or any(disks.other_disks(stage.out, world))):
        stored = find_steps(stage.out, where, stage.cache, world, stage.log if world.is_rank0 else lambda _: None)
    attempt: int = world.on_rank0(functools.partial(logs.next_attempt, stage.out))
    logs.record(stage.out, attempt, world.rank)
    return attempt, stored


@contextlib.contextmanager
def other_rank() -> Iterator[None]:
    """For ranks other than 0: prints only the errors that rank 0 does not print."""
    try:
        yield
    except SharedError:
        sys.exit(1)
    except SftError as error:
        # Most errors occur on all ranks. Rank 0 prints them, and torchrun then ends this rank before it prints them
        # again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        sys.exit(f"[train] error on rank {os.environ.get('RANK')}: {error}")
