"""What outlives a job on a cluster without a shared disk: a stage's files in a bucket, brought before it and sent after it.

    python -m sft.launch.beaker.bucket_runs bring runs/<run> <stage> COMMAND…    the earlier stages that it reads
    python -m sft.launch.beaker.bucket_runs send runs/<run> <stage> STATUS       the finished stage; with status 75, what training saved

env/beaker-job.sh calls it around the stage's command, on a disk that ends with the job. SFT_INPUT_<stage>=gs://… says where an
earlier stage is kept, SFT_KEPT where this one is: gs://…/runs/<run>/<stage>/<16 hex of its identity>, so that no result replaces
another. Training sends its kept steps there by itself, and brings the one to go on from (sft.training.uploads). Every file is
proven; manifests come last.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.common.process import report_errors
from sft.formats import manifest
from sft.formats.elsewhere import NAME, UNLISTED, Elsewhere
from sft.launch.job import AGAIN, Job
from sft.recipe import schema
from sft.storage.transfer import LocalStorage, Storage, open_storage, transfer
from sft.sync import fetch

READS = {"sync": {"prepare"}, "train": {"sync"}, "convert": {"prepare", "train"}, "evaluate": {"prepare", "convert"}}
"""The earlier stages whose files a stage opens; of the others it needs the manifests."""


def log(text: str) -> None:
    print(f"[kept] {text}", flush=True)


def cache(run: Path) -> Path:
    return run.parent / ".cache"


# --- before the stage -------------------------------------------------------------------------------------------------


def bring(run: Path, stage: str, command: Sequence[str]) -> None:
    """Puts what the stage reads under `run`. Raises SftError."""
    addresses = {s: os.environ.get(f"SFT_INPUT_{s}", "") for s in schema.STAGES[: schema.STAGES.index(stage)]}
    addresses = {earlier: address for earlier, address in addresses.items() if address.startswith("gs://")}
    for earlier, address in addresses.items():
        bring_stage(address, run / earlier, cache(run), earlier in READS[stage])
    job = Job.parse([str(run), stage, *command])
    if stage == "train" and job.recipe.evaluate.every and "prepare" in addresses:  # evaluations during training read it
        bring_stage(addresses["prepare"], run / "prepare", cache(run), whole=True)
    kept = os.environ["SFT_KEPT"]
    if kept.rpartition("/")[2] != job.identity[:16]:
        raise SftError(
            f"{kept}: this job would make {job.identity[:16]}: its recipe or inputs are not those of the submission;"
            f" next: make {stage} RECIPE={job.recipe.name} CLUSTER={job.place.cluster} again"
        )


def bring_stage(address: str, folder: Path, cache: Path, whole: bool) -> None:
    """The files that a kept stage's manifest lists, or the manifest alone with a note where they are."""
    source, target = open_storage(address, cache), LocalStorage(folder)
    text = source.read(manifest.NAME)
    if text is None:
        raise SftError(
            f"{address}/{manifest.NAME}: not there; next: on your machine remove {folder}/{manifest.NAME} and make {folder.name} again"
        )
    files = fetch.listed(text, address)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    if whole:
        transfer(files, source, target, log)
    else:
        target.write(NAME, Elsewhere(address, tuple(f.target for f in files)).to_bytes())
    target.write(manifest.NAME, text)


# --- after the stage --------------------------------------------------------------------------------------------------


def send(run: Path, stage: str, status: int) -> None:
    """Sends the finished stage, its manifest last, or the newest step of a training that is to go on elsewhere."""
    address, folder = os.environ["SFT_KEPT"], run / stage
    bucket = open_storage(address, cache(run))
    for name in UNLISTED:  # first: never older than a step
        if (folder / name).is_file():
            bucket.write(name, (folder / name).read_bytes())
    if status == AGAIN and stage == "train":
        steps = {int(p.parent.name[4:]): p.parent for p in folder.glob(f"step*/{manifest.NAME}")}
        if steps:
            step = steps[max(steps)]
            _send_folder(step, open_storage(f"{address}/{step.name}", cache(run)))
    if status == 0:
        _send_folder(folder, bucket)


def _send_folder(folder: Path, target: Storage) -> None:
    text = (folder / manifest.NAME).read_bytes()
    if target.read(manifest.NAME) == text:
        return
    transfer(fetch.listed(text, str(folder)), LocalStorage(folder), target, log)
    target.write(manifest.NAME, text)
    log(f"{folder} is kept in {target.where}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with report_errors("kept"):
        match sys.argv[1:]:
            case ["bring", run, stage, *command] if stage in schema.STAGES and command:
                bring(Path(run), stage, command)
            case ["send", run, stage, status] if stage in schema.STAGES and status.isdigit():
                send(Path(run), stage, int(status))
            case _:
                sys.exit(
                    "usage: python -m sft.launch.beaker.bucket_runs bring runs/<run> <stage> COMMAND… | send runs/<run> <stage> STATUS"
                )
