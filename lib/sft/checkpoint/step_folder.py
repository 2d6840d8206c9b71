"""Step folders in OLMo-core's layout: written whole or not at all, hashed, read back without running anything.

    stepN/config.json           model and tokenizer facts, in the form that OLMo-core's converter reads
    stepN/.metadata.json        {"ephemeral": …, "version": …}
    stepN/train/rank{r}.pt      what only a resume needs: counters, guard history, RNG
    stepN/model_and_optim/      torch DCP shards: model.<name>, optim.state.<name>.*, optim.param_groups.<name>.*
    stepN/manifest.json         size and sha256 of every file above; written last

    LATEST, BEST                text files beside the steps; the first line names one of them

In:  a model and optimizer (plain or sharded), the training folder.
Out: `save` writes into `.saving-stepN` and renames (beside training: sft.training.saving); `latest` finds the newest step
     whose bytes are what its manifest says; `restore` loads it for any number of ranks (sft.checkpoint.dcp_reader reads the
     shards); `mark_best` names the best step in BEST.

Pickled scalars (`optim.param_groups`) are written for OLMo-core and never read.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem

from sft.checkpoint import gather
from sft.checkpoint.dcp_reader import DcpReader
from sft.common.direct_io import DirectFile
from sft.common.errors import SftError
from sft.common.files import sync_folder, write_atomic
from sft.formats import manifest
from sft.formats.manifest import Output, StepManifest
from sft.formats.steps import BEST, LATEST, METADATA, STEP, Best, StepMetadata, is_ephemeral, named_step
from sft.model.parallel import SharedError, World


class _Shard(io.RawIOBase):
    """A DirectFile as a stream."""

    def __init__(self, file: DirectFile) -> None:
        self.file, self.at = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.file.write(data)
        self.at += size
        return size

    def tell(self) -> int:
        return self.at


class _Files(FileSystem):
    """Files that are on the disk when they are closed, shards past the page cache and hashed on their way."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if Path(path).suffix != ".distcp":
            with super().create_stream(path, mode) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            return
        file = DirectFile(Path(path))
        try:
            yield _Shard(file)
        except BaseException:
            file.abort()
            raise
        self.hashes[Path(path).name] = file.close()


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which would otherwise note a random id and the temporary path: equal states give equal bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=False)
        self.fs = self.files = _Files()

    def storage_meta(self) -> None:
        return None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "<name>.<moment>" for every parameter."""
    return {f"{n}.{s}": value for n, p in model.named_parameters() for s, value in optimizer.state[p].items()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a step folder holds of a model and optimizer, by OLMo-core's names: the live tensors, not copies."""
    names = {name: parameter.detach() for name, parameter in model.named_parameters()}
    group = optimizer.param_groups[0]
    # Every option, and initial_lr, which OLMo-core's schedulers start from: a reader asks for all that its optimizer has.
    options = {"initial_lr": group["lr"]} | {k: v for k, v in group.items() if k != "params"}
    return {
        "model": names,
        "optim": {f"state.{k}": v for k, v in optimizer_tensors(model, optimizer).items()}
        | {f"param_groups.{n}.{k}": v for n in names for k, v in options.items()},
    }


def save(
    out: Path,
    step: int,
    state: Mapping[str, Any],
    train_state: Mapping[str, Any],
    config: Mapping[str, Any],
    world: World,
    *,
    ephemeral: bool,
) -> Path:
    """Writes a `snapshot` as out/stepN and returns it; every rank calls this. Raises SftError, leaving every older step
    untouched. Its agreements go over `world`'s group alone, so that a thread with a group of its own may call it."""
    final, work = out / f"step{step}", out / f".saving-step{step}"

    def write() -> list[dict[str, Any]]:
        (work / "train").mkdir(parents=True, exist_ok=True)
        with (work / "train" / f"rank{world.rank}.pt").open("wb") as f:
            torch.save(dict(train_state), f)
            f.flush()
            os.fsync(f.fileno())
        if world.is_rank0:
            _write_json(work / "config.json", config)
            StepMetadata(ephemeral).write(work / METADATA)
        return []

    def describe() -> tuple[Output, ...]:
        mine = [f"train/rank{world.rank}.pt"]
        mine += [f"model_and_optim/{p.name}" for p in (work / "model_and_optim").glob(f"__{world.rank}_*.distcp")]
        mine += ["config.json", METADATA, "model_and_optim/.metadata"] if world.is_rank0 else []
        return manifest.describe(
            work, sorted(mine), {f"model_and_optim/{n}": h for n, h in writer.files.hashes.items()}
        )

    def publish() -> None:
        outputs = sorted((output for part in described for output in part), key=lambda o: o.path)
        StepManifest(manifest.SCHEMA, step, tuple(outputs)).write(work / manifest.NAME)
        for folder in (work / "model_and_optim", work / "train", work):
            sync_folder(folder)
        if final.exists():  # a torn or foreign folder of this name: the resume passed it over
            shutil.rmtree(to_trash(final))
        work.rename(final)
        sync_folder(out)

    try:
        world.on_rank0(lambda: shutil.rmtree(work, ignore_errors=True))
        world.on_all_ranks(write)
        writer = _Writer(work / "model_and_optim")
        with warnings.catch_warnings():  # one process without a group is what was meant
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            dcp.save(dict(state), storage_writer=writer, process_group=world.group, no_dist=not dist.is_initialized())
        described = world.on_all_ranks(describe)
        sent = gather.gather_files(work, described, world)
        world.on_rank0(publish)
        if sent:
            gather.forget(work)
    except (OSError, RuntimeError, SftError, dcp.api.CheckpointException) as error:
        entries = [value for part in state.values() for value in part.values()]
        tensors = [value for value in entries if isinstance(value, Tensor)]
        # And about 2 kB around every stored entry.
        need = sum(t.numel() * t.element_size() for t in tensors) + 2000 * len(entries)
        if world.is_rank0:
            shutil.rmtree(work, ignore_errors=True)
        raise SharedError(
            f"{final}: could not be saved ({_reason(error)}); a step needs about {need:,} bytes there; earlier steps are"
            " untouched; next: make room and run train again, which continues from the last one"
        ) from error
    return final


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # DCP wraps what happened on each rank
    if failures:
        return "; ".join(f"rank {r}: {next(iter(f), f) if isinstance(f, tuple) else f}" for r, f in failures.items())
    return str(error)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(value, indent=1).encode() + b"\n")


def steps(out: Path) -> list[tuple[int, Path]]:
    """Step folders by number, whole or not."""
    found = [(int(m[1]), p) for p in out.iterdir() if (m := STEP.fullmatch(p.name)) and p.is_dir()]
    return sorted(found)


def latest(out: Path, world: World, warn: Callable[[str], None]) -> Path | None:
    """The newest step folder that is whole. Others are passed over with a warning that says why: one whose bytes are not
    what its manifest says is renamed to .damaged-stepN, so that it counts among no steps; nothing of it is removed."""
    for leftover in [*out.glob(".saving-step*"), *out.glob(".trash-*")] if world.is_rank0 else ():
        shutil.rmtree(leftover, ignore_errors=True)
    for _, step in reversed(world.on_rank0(lambda: steps(out))):
        problems = [line for part in world.on_all_ranks(partial(damage, step, world)) for line in part]
        if not problems:
            if world.is_rank0:
                mark_latest(step)  # a kill may have come between a step's rename and its name
            return Path(step)
        now = world.on_rank0(partial(set_aside, step))
        warn(
            f"{step}: passed over: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
            + (f"; it is {now} now" if now != step else "")
        )
    if world.is_rank0:
        (out / LATEST).unlink(missing_ok=True)
    return None


def set_aside(step: Path) -> Path:
    """Renames a damaged step, and returns where it is. One without a manifest was never finished, and stays."""
    if not (step / manifest.NAME).is_file():
        return step
    aside = step.parent / f".damaged-{step.name}"
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{uuid.uuid4().hex[:8]}")
    step.rename(aside)
    sync_folder(step.parent)
    return aside


def damage(step: Path, world: World | None = None) -> list[str]:
    """What differs from the step's manifest. Ranks share out the files; without a world all are read."""
    file = step / manifest.NAME
    try:
        entries = StepManifest.read(file).outputs
        listed = {o.path for o in entries}
        needed = {"config.json", METADATA, "train/rank0.pt", "model_and_optim/.metadata"}
        if not needed <= listed:
            return [f"{file} does not list {', '.join(sorted(needed - listed))}"]
        if world is not None:
            entries = entries[world.rank :: world.size]
        return manifest.broken_outputs(step, entries)
    except FileNotFoundError:
        return [f"{file} is missing: the step was not finished"]
    except (OSError, ValueError, KeyError, TypeError, SftError) as error:
        return [f"{file}: {type(error).__name__}: {error}"]


def restore(step: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Loads weights and moments from a whole step folder, for any number of ranks; returns this rank's train state."""
    weights, moments = DcpReader(step), DcpReader(step, "optim.state.")
    for name, parameter in model.named_parameters():
        weights.read_into(name, parameter)
    for name, tensor in optimizer_tensors(model, optimizer).items():
        moments.read_into(name, tensor)
    mine = step / "train" / f"rank{world.rank}.pt"
    file = mine if mine.is_file() else step / "train" / "rank0.pt"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise SftError(f"{file}: not readable: {error}") from error
    return state


# --- which steps stay -------------------------------------------------------------------------------------------------


def mark_latest(step: Path) -> None:
    write_atomic(step.parent / LATEST, f"{step.name}\n".encode())


def mark_best(out: Path, step: int, metric: str, value: float, higher_is_better: bool = True) -> bool:
    """Names out/stepN in BEST when its value is better than the one there, or when BEST follows another metric or names
    a step that is gone; says whether it did. Raises SftError for a value that is not finite or a step that is not there."""
    folder = out / f"step{step}"
    if not math.isfinite(value):
        raise SftError(f"{folder}: {metric} is {value}; only finite values can be compared")
    with steps_lock(out):
        if not (folder / manifest.NAME).is_file():
            raise SftError(f"{folder}: no such step, so BEST cannot name it")
        known = Best.read(out)
        comparable = known is not None and known.metric == metric and (out / f"step{known.step}").is_dir()
        if known and comparable and (known.value >= value if higher_is_better else known.value <= value):
            return False
        Best(step, metric, value).write(out)
    return True


@contextlib.contextmanager
def steps_lock(out: Path) -> Iterator[None]:
    """Held while BEST changes or steps are chosen for removal, by the trainer or by an evaluation beside it."""
    with (out / ".steps.lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def to_trash(folder: Path) -> Path:
    """Renames a folder so that a removal that is cut short never leaves something that looks like a step."""
    doomed = folder.parent / f".trash-{folder.name.lstrip('.')}-{uuid.uuid4().hex[:8]}"
    folder.rename(doomed)
    return doomed


def prune(out: Path, keep: int, spare: Collection[Path] = ()) -> list[Path]:
    """Moves to the trash what the newest whole step (LATEST) makes superfluous, and returns where it lies: older ephemeral
    steps, and permanent ones beyond the newest `keep` (0 = all stay). What LATEST or BEST names, or `spare` holds, stays in any case."""
    with steps_lock(out):
        latest_step = named_step(out, LATEST)
        if latest_step is None:
            return []
        newest = int(latest_step.name.removeprefix("step"))
        # One without a manifest was not finished: it is no copy to rely on, and left for a person to look at.
        older = [step for number, step in steps(out) if number <= newest and (step / manifest.NAME).is_file()]
        permanent = [step for step in older if not is_ephemeral(step)]
        kept = {latest_step, named_step(out, BEST), *spare, *(permanent[-keep:] if keep else permanent)}
        return [to_trash(step) for step in older if step not in kept]
