"""Runs in a bucket, for clusters whose disks end with a job: a stage's inputs are fetched before it, its outputs sent after.

    python -m sft.launch.bucket_runs fetch runs/<run> <stage> COMMAND…    the earlier stages that it reads
    python -m sft.launch.bucket_runs send runs/<run> <stage> STATUS       the finished stage; with status 75, the saved step

env/beaker-job.sh and env/sky-job.sh call it around the stage's command. SFT_INPUT_<stage>=gs://… is the address of an earlier stage.
SFT_STAGE_ADDRESS=gs://…/runs/<run>/<stage>/<16 hex of its identity> is the address of this one, so that no result replaces
another. Training sends its kept steps to it and fetches the one to resume from by itself (sft.training.uploads). Every file
is verified; manifests come last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from sft.common.errors import SftError
from sft.common.paths import BUCKETS
from sft.common.process import AGAIN
from sft.formats import manifest
from sft.formats.elsewhere import NAME, UNLISTED, Elsewhere
from sft.formats.steps import BEST, named_step
from sft.launch.job import Job
from sft.recipe import schema
from sft.runner.cli import COMMAND, program
from sft.storage.contract import Storage
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer
from sft.sync.fetch import listed_copies
from sft.sync.send import send as send_step

READS = {"sync": {"prepare"}, "train": {"sync"}, "convert": {"prepare", "train"}, "evaluate": {"prepare", "convert"}}
"""The earlier stages whose files a stage reads. Of the others it needs the manifests only."""


def log(text: str) -> None:
    print(f"[bucket] {text}", flush=True)


def cache(run: Path) -> Path:
    """The folder for what storages remember about their objects."""
    return run.parent / ".cache"


# --- before the stage -------------------------------------------------------------------------------------------------


def fetch(run: Path, stage: str, command: Sequence[str]) -> None:
    """Fetches what the stage reads into `run`. Raises SftError, also where the job would make something else."""
    addresses = {s: os.environ.get(f"SFT_INPUT_{s}", "") for s in schema.STAGES[: schema.STAGES.index(stage)]}
    addresses = {earlier: address for earlier, address in addresses.items() if address.startswith(BUCKETS)}
    for earlier, address in addresses.items():
        fetch_stage(address, run / earlier, cache(run), manifest_only=earlier not in READS[stage])
    if "train" in addresses:
        fetch_best_name(addresses["train"], run / "train", cache(run))
    job = Job.parse([str(run), stage, *command])
    if stage == "convert" and job.recipe.convert.checkpoint == "best" and "train" in addresses:
        fetch_best(addresses["train"], run / "train", cache(run))
    if stage == "train" and job.recipe.evaluate.every and "prepare" in addresses:  # evaluations during training read it
        fetch_stage(addresses["prepare"], run / "prepare", cache(run))
    address = os.environ["SFT_STAGE_ADDRESS"]
    if address.rpartition("/")[2] != job.identity[:16]:
        raise SftError(
            f"{address}: this job would make {job.identity[:16]}: its recipe or inputs are not those of the submission;"
            f" next: make {stage} RECIPE={job.recipe.name} CLUSTER={job.place.cluster} again"
        )


def fetch_stage(address: str, folder: Path, cache: Path, manifest_only: bool = False) -> None:
    """Fetches the files that a stored stage's manifest lists, or the manifest with a note where they are. Raises SftError."""
    source, target = open_storage(address, cache), LocalStorage(folder)
    text = source.read(manifest.NAME)
    if text is None:
        raise SftError(
            f"{address}/{manifest.NAME}: not found; next: on your machine remove {folder}/{manifest.NAME} and make {folder.name} again"
        )
    files = listed_copies(text, address)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    if manifest_only:
        target.write(NAME, Elsewhere(address, tuple(f.target for f in files)).to_bytes())
    else:
        transfer(files, source, target, log)
    target.write(manifest.NAME, text)


def fetch_best_name(address: str, train: Path, cache: Path) -> None:
    """Fetches the file BEST, which no manifest lists, where the bucket has it. It is part of the identity of convert."""
    if (name := open_storage(address, cache).read(BEST)) is not None:
        LocalStorage(train).write(BEST, name)


def fetch_best(address: str, train: Path, cache: Path) -> None:
    """Fetches the step that BEST names: train's manifest lists the final step only. Raises SftError where the bucket does not have
    the step."""
    step = named_step(train, BEST)
    if step is None:
        raise SftError(
            f"{train / BEST}: damaged: the name of a step is expected; next: restore it, or checkpoint = 'final'"
        )
    there = f"{address}/{step.name}"
    if open_storage(there, cache).read(manifest.NAME) is None:
        raise SftError(f"{there}: not found, and BEST names it; next: checkpoint=final")
    fetch_stage(there, step, cache)


# --- after the stage --------------------------------------------------------------------------------------------------


def send(run: Path, stage: str, status: int) -> None:
    """Sends the finished stage, its manifest last; with exit status 75, the newest step of a training that is to resume, or
    the part of it that this node has."""
    address, folder = os.environ["SFT_STAGE_ADDRESS"], run / stage
    first = os.environ.get("BEAKER_REPLICA_RANK", "0") == "0"
    bucket = open_storage(address, cache(run))
    for name in UNLISTED if first else ():  # before the step, so that they are never older
        if (folder / name).is_file():
            bucket.write(name, (folder / name).read_bytes())
    steps = {int(p.parent.name[4:]): p.parent for p in folder.glob(f"step*/{manifest.NAME}")}
    if status == AGAIN and stage == "train" and steps:
        send_step(steps[max(steps)], address, cache(run), ())
    if status == 0 and first:
        _send_folder(folder, bucket)


def send_folder(folder: Path, address: str, cache: Path) -> None:
    """Sends a finished stage's folder to an address in a bucket, its manifest last."""
    _send_folder(folder, open_storage(address, cache))


def _send_folder(folder: Path, target: Storage) -> None:
    """Sends what this disk has of a stage; other nodes have sent the rest of a training's last step."""
    text = (folder / manifest.NAME).read_bytes()
    if target.read(manifest.NAME) == text:
        return
    absent = set(Elsewhere.of(folder).outputs)
    copies = [copy for copy in listed_copies(text, str(folder)) if copy.source not in absent]
    transfer(copies, LocalStorage(folder), target, log)
    target.write(manifest.NAME, text)
    log(f"{folder} is stored in {target.where}")


@click.group(no_args_is_help=False)
def group() -> None:
    """Copies a run's stages between a bucket and a disk that ends with the job."""


@group.command("fetch", context_settings=COMMAND)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stage", type=click.Choice(schema.STAGES))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def _fetch(run: Path, stage: str, command: tuple[str, ...]) -> None:
    """Copies the earlier stages that STAGE reads to RUN. COMMAND is the command of the stage."""
    fetch(run, stage, command)


@group.command("send")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stage", type=click.Choice(schema.STAGES))
@click.argument("status", type=click.IntRange(min=0))
def _send(run: Path, stage: str, status: int) -> None:
    """Copies the finished STAGE to the bucket; with STATUS 75, the step that training saved."""
    send(run, stage, status)


if __name__ == "__main__":
    sys.exit(program("bucket", "python -m sft.launch.bucket_runs")(group)())
