"""What outlives a job on a cluster without a shared disk: a stage's files in a bucket, brought before it and sent after it.

    python -m sft.launch.kept bring runs/<run> <stage> COMMAND…    earlier stages; of training also the steps to go on from
    python -m sft.launch.kept send runs/<run> <stage> STATUS       the finished stage; with status 75, what training saved

env/beaker-job.sh calls it around the stage's command, on a disk that ends with the job. SFT_INPUT_<stage>=gs://… says where an
earlier stage is kept, SFT_KEPT where this one is: gs://…/runs/<run>/<stage>/<16 hex of its identity>, so that no result replaces
another. Training sends its kept steps there by itself (sft.training.remote). Every file is proven; manifests come last.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sft import manifest, schema
from sft.errors import SftError
from sft.launch import handback
from sft.launch.job import AGAIN, Job
from sft.stage import report_errors
from sft.storage import fetch
from sft.storage.transfer import Job as File
from sft.storage.transfer import LocalStorage, Storage, open_storage, transfer

STEP_LIST = re.compile(rf"step(\d+)/{re.escape(manifest.NAME)}")
READS = {"sync": {"prepare"}, "train": {"sync"}, "convert": {"prepare", "train"}, "evaluate": {"prepare", "convert"}}
"""The earlier stages whose files a stage opens; of the others it needs the manifests."""


def say(text: str) -> None:
    print(f"[kept] {text}", flush=True)


def cache(run: Path) -> Path:
    return run.parent / ".cache"


# --- before the stage -------------------------------------------------------------------------------------------------


def bring(run: Path, stage: str, command: Sequence[str]) -> None:
    """Puts what the stage reads, and what an earlier attempt of it has kept, under `run`. Raises SftError."""
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
    if stage == "train":
        # A node may look while another's last attempt still sends the step it saved when told to end: the one before is on both.
        bring_steps(kept, run / stage, cache(run), job.identity, 2 if job.hardware.nodes > 1 else 1)


def bring_stage(address: str, folder: Path, cache: Path, whole: bool) -> None:
    """The files that a kept stage's manifest lists, or the manifest alone with a note where they are."""
    source, target = open_storage(address, cache), LocalStorage(folder)
    text = source.read(manifest.NAME)
    if text is None:
        raise SftError(
            f"{address}/{manifest.NAME}: not there; next: on your machine remove {folder}/{manifest.NAME} and make {folder.name} again"
        )
    files = [File(e["path"], e["path"], e["bytes"], e["sha256"]) for e in fetch.entries(text, f"{address}")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / handback.NAME).unlink(missing_ok=True)
    if whole:
        transfer(files, source, target, say)
    else:
        note = {"where": address, "outputs": [f.target for f in files]}
        target.write(handback.NAME, json.dumps(note, indent=1).encode() + b"\n")
    target.write(manifest.NAME, text)


def bring_steps(address: str, out: Path, cache: Path, identity: str, count: int = 1) -> None:
    """The newest `count` whole steps, the one that BEST names, and the metrics so far; nothing where no step was kept."""
    bucket = open_storage(address, cache)
    there = bucket.list()
    numbers = sorted((int(m[1]) for name in there if (m := STEP_LIST.fullmatch(name))), reverse=True)
    brought = list(itertools.islice((n for n in numbers if _bring_step(address, n, out, cache)), count))
    if not brought:
        return
    say(f"going on from step {brought[0]} of {address}")
    best = (bucket.read("BEST") or b"").decode()
    if match := re.match(r"step(\d+)\n", best):
        number = int(match[1])
        if number in brought or (number in numbers and _bring_step(address, number, out, cache)):
            LocalStorage(out).write("BEST", best.encode())
    if (evaluations := bucket.read("evaluations.jsonl")) is not None:
        LocalStorage(out).write("evaluations.jsonl", evaluations)
    if (metrics := bucket.read("metrics.jsonl")) is not None:
        LocalStorage(out).write("metrics.jsonl", metrics)
        for attempt in range(1, 1 + metrics.count(b'"attempt"')):  # so that this one gets the next number
            log = out / "logs" / f"attempt-{attempt:03}-rank0.log"
            log.parent.mkdir(exist_ok=True)
            log.write_text("This attempt ran as a job of its own, which has its log.\n")
    LocalStorage(out).write(".identity", identity.encode())


def _bring_step(address: str, number: int, out: Path, cache: Path) -> bool:
    """Whether the step is here now, whole; one that is not whole there is told and passed over."""
    source, target = open_storage(f"{address}/step{number}", cache), LocalStorage(out / f"step{number}")
    try:
        text = source.read(manifest.NAME) or b""
        files = [File(e["path"], e["path"], e["bytes"], e["sha256"]) for e in fetch.entries(text, source.where)]
        target.root.mkdir(parents=True, exist_ok=True)
        transfer(files, source, target, say)
    except SftError as e:
        say(f"warning: {source.where} is passed over: {e}")
        return False
    target.write(manifest.NAME, text)
    return True


# --- after the stage --------------------------------------------------------------------------------------------------


def send(run: Path, stage: str, status: int) -> None:
    """Sends the finished stage, its manifest last, or the newest step of a training that is to go on elsewhere."""
    address, folder = os.environ["SFT_KEPT"], run / stage
    bucket = open_storage(address, cache(run))
    for name in handback.BESIDE:  # first: never older than a step
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
    files = [File(e["path"], e["path"], e["bytes"], e["sha256"]) for e in fetch.entries(text, str(folder))]
    transfer(files, LocalStorage(folder), target, say)
    target.write(manifest.NAME, text)
    say(f"{folder} is kept in {target.where}")


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
                    "usage: python -m sft.launch.kept bring runs/<run> <stage> COMMAND… | send runs/<run> <stage> STATUS"
                )
