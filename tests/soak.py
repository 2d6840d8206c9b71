"""make soak N=200 [STAGE=train] [SEED=1]: kills and failures at random events of every stage; the end has the bytes of an undisturbed run.

    .venv/bin/python tests/soak.py [N] [STAGE …] [--seed S]

In:  a tiny recipe, prepare to evaluate, in a copy of this checkout; training has two ranks. An event is a call that changes a file of the
     runs (tests/events.c): open, write, fsync, rename, unlink. Faults: the process or its group is killed, or the call fails with EIO,
     ENOSPC or EFBIG, or writes half.
     Each seed has other faults.
Out: a line for each fault as it comes, and a table of stage, events of an undisturbed run, faults, runs that ended well in spite of one, and wrong ends. Exit status 1 where the
     bytes of an end differ, where something half done was published, or where a stage hangs.

After each fault a manifest that is there is that of the undisturbed run. After up to FAULTS of them the stage runs once more without one,
and then its digest and its files must be those of the undisturbed run. Processes are forked from a server that has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forks
from checkout import copied
from events import Events
from gcs_server import Server as Bucket
from sft.formats import manifest

RECIPE = """[model]
preset = "olmo3-tiny"
n_layers = 1
d_model = 32
n_heads = 2
n_kv_heads = 2
head_dim = 16
hidden = 64

[prepare]
tokenizer = "smoke/tokenizer"
template = "olmo"
validation_fraction = 0.05
[[prepare.sources]]
path = "soak.jsonl"

[train]
seq_len = 256
global_batch_tokens = 512
steps = 6
lr = 3e-3
precision = "fp32"
validate_every = 3
save_every = 2
ephemeral_every = 1
keep = 1

[convert]
dtype = "float32"

[evaluate]
tasks = ["smoke_choice"]
limit = 2
validation_documents = 2

[on.local.train]
microbatch_tokens = 256
processes = 2
threads = 1

[on.bucket.train]
microbatch_tokens = 256
threads = 1
"""
STAGES = ("prepare", "sync", "train", "convert", "evaluate")
FAULTS = 4
"""Faults in a row before the stage may end."""
PATIENCE_S = 600
RANKS = 2
PRELOADED = (
    "awkward", "datasets", "gigatoken", "numba", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.olmo3.modeling_olmo3", "sft.data.prepare", "sft.evaluation.backends", "sft.evaluation.evaluate",
    "sft.evaluation.harness", "sft.export.convert", "sft.export.other_model", "sft.sync.sync", "sft.training.train",
)  # fmt: skip
"""What the server of stages imports, most of which stages import when they need it: it takes longer than a stage of the tiny run."""
TIMES = ("seconds", "reused_replies")
"""Fields of results.json that two runs of the same work do not share."""


# --- the server: forks a process for each run of a stage --------------------------------------------------------------


def serve() -> None:
    """Runs the stages that it is asked for, each in a process of its own."""
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    forks.serve(_stage, PATIENCE_S)


def _stage(asked: dict[str, Any]) -> int:
    sys.argv = [f"stages/{asked['stage']}.py", *asked["words"]]
    return _ranks(asked["ranks"]) if asked["stage"] == "train" else _program(asked["stage"])


def _program(stage: str) -> int:
    runpy.run_path(f"stages/{stage}.py", run_name="__main__")
    return 0


def _ranks(count: int) -> int:
    """Training with `count` ranks. Where one ends badly the others are killed, as torchrun does."""
    from sft.training.train import main

    if count == 1:
        return main(sys.argv[1:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        child = os.fork()
        if not child:
            here = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_PORT": port,
            }
            os.environ.update({k: str(v) for k, v in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
            return main(sys.argv[1:])
        children[child] = rank
    worst = 0
    while children:
        pid, ended = os.wait()
        children.pop(pid, None)
        if status := os.waitstatus_to_exitcode(ended):
            worst = worst or status
            for other in children:
                os.kill(other, signal.SIGKILL)
    return worst & 255


# --- the soak ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Soak:
    """A checkout with an undisturbed run, and the server that runs stages in it. `failures` are what went wrong."""

    place: Path
    events: Events
    server: forks.Server
    cluster: str = "local"
    ranks: int = RANKS
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.place / "runs/soak"

    def execute(self, stage: str) -> int | None:
        """The exit status of a stage; None where it hangs."""
        words = ["runs/soak", "--cluster", self.cluster]
        asked = {"stage": stage, "words": words, "ranks": self.ranks, "log": str(self.place / "log")}
        return self.server.ask(asked)

    def undisturbed(self, stage: str) -> int:
        """Runs a stage without a fault. Returns its number of events."""
        self.events.arm(0, "kill")
        (self.place / "log").unlink(missing_ok=True)
        if (status := self.execute(stage)) != 0:
            raise SystemExit(f"{stage} without a fault: status {status}\n{self.said()}")
        return len(self.events.calls())

    def said(self) -> str:
        file = self.place / "log"
        return file.read_text()[-3000:] if file.is_file() else ""

    def trial(self, stage: str, whole: dict[str, Any], count: int, faults: int, chance: random.Random) -> Counter[str]:
        """Up to `faults` faults at random events, then a run without one; compares after each. Returns what happened."""
        seen: Counter[str] = Counter()
        for _ in range(faults):
            fault = chance.choice(("kill", "kill", "kill group", "EIO", "ENOSPC", "EFBIG", "short"))
            at = chance.randint(1, count)
            self.events.arm(at, fault.partition(" ")[0], fault.endswith("group"))
            status = self.execute(stage)
            what = f"{stage}: {fault} at event {at}"
            if status is None:
                self.fail(f"{what}: it hangs\n{self.said()}")
            reached = any(call.number == at for call in self.events.calls())
            seen["faults" if reached else "not reached"] += 1
            if (found := self.made(stage)) is not None and found != whole:
                self.fail(f"{what}: something else is published: {difference(found, whole)}\n{self.said()}")
            print(f"  {what}: {f'status {status}' if reached else 'not reached'}", flush=True)
            if status == 0:
                seen["ended well"] += reached
                break
        self.events.arm(0, "kill")
        status = self.execute(stage)
        if status != 0:
            self.fail(f"{stage} after {dict(seen)}: status {status}\n{self.said()}")
        elif (found := self.made(stage)) != whole:
            self.fail(f"{stage} after {dict(seen)}: other bytes: {difference(found, whole)}\n{self.said()}")
        return seen

    def fail(self, text: str) -> None:
        """Notes what went wrong, and shows it at once."""
        self.failures.append(text)
        print(text, flush=True)

    def made(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage has: the digest of its manifest, and its files. None where it is not published."""
        folder = self.run / stage
        if not (folder / manifest.NAME).is_file():
            return None
        made = manifest.load(folder / manifest.NAME)
        files = {o.path: "measured" if o.measured else o.sha256 for o in made.outputs}
        if broken := manifest.broken_outputs(folder, made.outputs):
            return {"broken": broken}
        if stage != "evaluate":
            return {**files, "digest": made.digest}
        return {**files, "results.json": json.dumps(_without_times(json.loads((folder / "results.json").read_text())))}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    return value


def difference(found: dict[str, Any] | None, whole: dict[str, Any]) -> str:
    found = found or {"nothing": ""}
    names = [name for name in {**found, **whole} if found.get(name) != whole.get(name)]
    return ", ".join(f"{name}: {found.get(name)} in place of {whole.get(name)}"[:200] for name in names[:4])


@contextlib.contextmanager
def opened(folder: Path, bucket: Bucket | None = None) -> Any:
    """A Soak in a new copy of this checkout."""
    place = copied((folder / "checkout").resolve())
    rows = (place / "recipes/smoke/train.jsonl").read_text().splitlines(keepends=True)[:60]
    (place / "recipes/soak.jsonl").write_text("".join(rows))
    (place / "recipes/soak.toml").write_text(RECIPE)
    (place / "env/bucket.toml").write_text('storage = "gs://soak/x"\n')
    (place / "runs").mkdir()
    events = Events(folder.resolve(), place / "runs")
    environment = {
        **os.environ, **events.environment, "PYTHONPATH": f"{place / 'lib'}:{Path(__file__).parent}", "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", **({"STORAGE_EMULATOR_HOST": bucket.url} if bucket else {}),
    }  # fmt: skip
    with forks.started("import soak; soak.serve()", place, environment) as server:
        yield Soak(place, events, server, *(("bucket", 1) if bucket else ()))


def soak(
    made: Soak, wanted: int, stages: Sequence[str], seed: int = 0, faults: int = FAULTS
) -> list[tuple[str, int, Counter[str]]]:
    """At least `wanted` faults in each stage. Returns (stage, events of an undisturbed run, what happened)."""
    chance, table = random.Random(seed), []
    for stage in STAGES:
        before = made.place / f"before-{stage}"
        shutil.copytree(made.place / "runs", before, symlinks=True)
        count = made.undisturbed(stage)
        whole = made.made(stage)
        assert whole is not None and "broken" not in whole
        shutil.copytree(made.place / "runs", made.place / f"after-{stage}", symlinks=True)
        seen: Counter[str] = Counter()
        while stage in stages and seen["faults"] < wanted and len(made.failures) < 5:
            _replace(before, made.place / "runs")
            (made.place / "log").unlink(missing_ok=True)
            seen += made.trial(stage, whole, count, faults, chance)
        if stage in stages:
            print(f"{stage:10}{count:>8}{seen['faults']:>8}{seen['ended well']:>12}{len(made.failures):>8}", flush=True)
            table.append((stage, count, seen))
        _replace(made.place / f"after-{stage}", made.place / "runs")
    return table


def _replace(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target, symlinks=True)


def main(words: Sequence[str]) -> int:
    asked = argparse.ArgumentParser()
    asked.add_argument("wanted", type=int, nargs="?", default=200)
    asked.add_argument("stages", nargs="*", default=STAGES)
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args(words)
    wanted, stages = given.wanted, tuple(" ".join(given.stages).split()) or STAGES
    if unknown := set(stages) - set(STAGES):
        raise SystemExit(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    print(f"{'stage':10}{'events':>8}{'faults':>8}{'ended well':>12}{'wrong':>8}")
    wrong: list[str] = []
    with_bucket = [stage for stage in stages if stage in ("sync", "train")]
    for where, bucket, chosen in (
        ("in a folder, two ranks", None, stages),
        ("in a bucket, one rank", Bucket(), with_bucket),
    ):
        if not chosen:
            continue
        with (
            tempfile.TemporaryDirectory(prefix="soak-") as folder,
            bucket or contextlib.nullcontext(),
            opened(Path(folder), bucket) as made,
        ):
            print(where, flush=True)
            soak(made, wanted, chosen, given.seed)
            wrong += made.failures
    print("\n".join(wrong) or "every end has the bytes of an undisturbed run")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
