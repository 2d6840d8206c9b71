"""Step folders in OLMo-core's layout: written completely or not at all, hashed, and read without running foreign code.

    stepN/config.json           model and tokenizer facts, in the form that OLMo-core's converter reads
    stepN/.metadata.json        {"ephemeral": …, "version": …}
    stepN/train/rank{r}.pt      what only a resume needs: counters, the guard's history, random generators
    stepN/model_and_optim/      torch DCP shards: model.<name>, optim.state.<name>.*, optim.param_groups.<name>.*
    stepN/manifest.json         size and sha256 of every file above; written last

    LATEST, BEST                text files beside the steps, which name one of them (sft.formats.steps)

In:  a model and optimizer (plain or sharded), the training folder.
Out: `save` writes into `.saving-stepN` and renames it (sft.training.saving does this beside training); `latest` finds
     the newest step whose bytes agree with its manifest; `restore` loads it on any number of ranks
     (sft.checkpoint.dcp_reader); `mark_best` names the best step in BEST; `prune` removes superfluous steps.

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
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.tensor import DTensor

from sft.checkpoint import disks
from sft.checkpoint.dcp_reader import DcpReader
from sft.common.direct_io import DirectFile
from sft.common.errors import SftError
from sft.common.files import UNFINISHED, sync_folder, write_atomic
from sft.formats import manifest
from sft.formats.manifest import Output, StepManifest
from sft.formats.steps import (
    BEST,
    DAMAGED,
    LATEST,
    METADATA,
    STEP,
    Best,
    StepMetadata,
    holds_steps,
    is_ephemeral,
    named_step,
    write_latest,
)
from sft.model.adapters import saved_parameters, trained_parameters
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
    """Files that are flushed to the disk when they are closed. Shards bypass the page cache and are hashed while they
    are written."""

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


class _Writer(FileSystemWriter):
    """DCP's writer without a random id and the temporary path in its metadata, so that equal states give equal
    bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=False)
        self.fs = self.files = _Files()

    def storage_meta(self) -> None:
        return None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<name>.<moment>": tensor} for every trained parameter."""
    return {f"{n}.{s}": value for n, p in trained_parameters(model).items() for s, value in optimizer.state[p].items()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a model and optimizer by OLMo-core's names, as a step folder stores it: of a model with adapters, the
    adapters alone. The tensors are not copied."""
    names = {name: parameter.detach() for name, parameter in saved_parameters(model).items()}
    # All options, because a reader asks for all that its optimizer has, and initial_lr, which OLMo-core's schedulers
    # start from.
    groups = {
        id(p): {"initial_lr": group["lr"]} | {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {
        "model": names,
        "optim": {f"state.{k}": v for k, v in optimizer_tensors(model, optimizer).items()}
        | {f"param_groups.{n}.{k}": v for n, p in trained_parameters(model).items() for k, v in groups[id(p)].items()},
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
    other_disk: Sequence[bool] = (),
) -> Path:
    """Writes a `snapshot` as out/stepN and returns the folder. Every rank calls this.

    `train_state`: of this rank. `config`: the content of config.json. `other_disk` (disks.other_disks): the files of these ranks
    are on their nodes' disks, in a folder of the same name with the same manifest. Uses the group of `world` only, so a
    thread with a separate group may call it. Raises SharedError on every rank; older steps are unchanged then.
    """
    final, work = out / f"step{step}", out / f".saving-step{step}"
    leads = disks.leads_disk(other_disk, world)
    try:
        world.on_all_ranks(lambda: shutil.rmtree(work, ignore_errors=True) if leads else None)
        world.on_all_ranks(lambda: _write_small_files(work, train_state, config, ephemeral, world))
        writer = _Writer(work / "model_and_optim")
        with warnings.catch_warnings():  # one process without a group is intended
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            state_dict_saver.save(
                dict(state), storage_writer=writer, process_group=world.group, no_dist=not dist.is_initialized()
            )
        described = world.on_all_ranks(lambda: _describe(work, writer.files.hashes, world))
        world.on_all_ranks(lambda: _publish(work, final, step, described) if leads else None)
    except (OSError, RuntimeError, SftError, CheckpointException) as error:
        if leads:
            shutil.rmtree(work, ignore_errors=True)
        raise SharedError(
            f"{final}: could not be saved ({_reason(error)}); a step needs about {_stored_bytes(state):,} bytes there;"
            " earlier steps are unchanged; next: make room and run train again, which continues from the last one"
        ) from error
    return final


def _write_small_files(
    work: Path, train_state: Mapping[str, Any], config: Mapping[str, Any], ephemeral: bool, world: World
) -> None:
    """This rank's train state; on rank 0 also config.json and .metadata.json."""
    (work / "train").mkdir(parents=True, exist_ok=True)
    with (work / "train" / f"rank{world.rank}.pt").open("wb") as f:
        torch.save(dict(train_state), f)
        f.flush()
        os.fsync(f.fileno())
    if world.is_rank0:
        _write_json(work / "config.json", config)
        StepMetadata(ephemeral).write(work / METADATA)


def _describe(work: Path, shard_hashes: Mapping[str, str], world: World) -> tuple[Output, ...]:
    """The manifest entries of the files that this rank wrote. `shard_hashes`: sha256 of its shards by file name."""
    mine = [f"train/rank{world.rank}.pt"]
    mine += [f"model_and_optim/{p.name}" for p in (work / "model_and_optim").glob(f"__{world.rank}_*.distcp")]
    mine += ["config.json", METADATA, "model_and_optim/.metadata"] if world.is_rank0 else []
    return manifest.describe(work, sorted(mine), {f"model_and_optim/{n}": h for n, h in shard_hashes.items()})


def _publish(work: Path, final: Path, step: int, described: Sequence[Sequence[Output]]) -> None:
    """Writes the manifest and renames the folder. `described`: the manifest entries of every rank."""
    outputs = sorted((output for part in described for output in part), key=lambda o: o.path)
    for folder in (work / "model_and_optim", work / "train"):
        sync_folder(folder)
    StepManifest(StepManifest.SCHEMA, step, tuple(outputs)).write(work / manifest.NAME)  # which flushes `work`
    if final.exists():  # an incomplete or foreign folder, which the resume skipped
        shutil.rmtree(to_trash(final))
    work.rename(final)
    sync_folder(final.parent)


def _stored_bytes(state: Mapping[str, Any]) -> int:
    """The size of a snapshot's files, with about 2 kB around every entry."""
    entries = [value for part in state.values() for value in part.values()]
    return sum(t.numel() * t.element_size() for t in entries if isinstance(t, Tensor)) + 2000 * len(entries)


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # DCP's errors of each rank
    if failures:
        return "; ".join(f"rank {r}: {next(iter(f), f) if isinstance(f, tuple) else f}" for r, f in failures.items())
    return str(error)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(value, indent=1).encode() + b"\n")


def steps(out: Path) -> list[tuple[int, Path]]:
    """(number, folder) of all step folders in the order of their numbers, also incomplete ones."""
    found = [(int(m[1]), p) for p in out.iterdir() if (m := STEP.fullmatch(p.name)) and p.is_dir()]
    return sorted(found)


def latest(
    out: Path,
    world: World,
    warn: Callable[[str], None],
    reads: Callable[[Path, Collection[str]], set[str]] | None = None,
) -> Path | None:
    """The newest complete step folder. Others are skipped with a warning. `reads` (files_read): disks have only what their ranks
    read of a step, and each rank looks at its own files.

    A step whose bytes differ from its manifest is renamed to .damaged-stepN, so that it is no step any more; no file is
    removed. Removes the leftovers of saves and removals that were killed. Every rank calls this. None where no step was
    ever finished. Raises SftError where steps are there and none is whole.
    """
    for leftover in [*out.glob(".saving-step*"), *out.glob(".trash-*")] if world.is_rank0 else ():
        shutil.rmtree(leftover, ignore_errors=True)
    if world.is_rank0:
        _remove_unfinished_marks(out)
    for name in reversed(world.on_rank0(lambda: [folder.name for _, folder in steps(out)])):
        step = out / name
        problems = [line for part in world.on_all_ranks(partial(damage, step, world, reads)) for line in part]
        if not problems:
            if world.is_rank0:
                mark_latest(step)  # a kill may have come between the step's rename and LATEST
            return Path(step)
        now = world.on_rank0(partial(set_aside, step))
        warn(
            f"{step}: skipped: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
            + (f"; renamed to {now}" if now != step else "")
        )
    if world.on_rank0(lambda: holds_steps(out)):
        raise SftError(
            f"{out}: it has steps, and none is whole; training would begin again from its first weights; next: restore a step"
            f" from a backup, or mv {out} elsewhere, which trains from the first step"
        )
    if world.is_rank0:
        (out / LATEST).unlink(missing_ok=True)
    return None


def _remove_unfinished_marks(out: Path) -> None:
    """Removes what killed writes of LATEST and BEST left. An evaluation beside training writes BEST under the same lock."""
    with steps_lock(out):
        for name in (LATEST, BEST):
            for file in out.glob(f".{name}.*{UNFINISHED}"):
                file.unlink(missing_ok=True)


def set_aside(step: Path) -> Path:
    """Renames a damaged step and returns its new folder. A step without a manifest was not finished and is not
    renamed."""
    if not (step / manifest.NAME).is_file():
        return step
    aside = step.parent / f"{DAMAGED}{step.name}"
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{uuid.uuid4().hex[:8]}")
    step.rename(aside)
    sync_folder(step.parent)
    return aside


def damage(
    step: Path, world: World | None = None, reads: Callable[[Path, Collection[str]], set[str]] | None = None
) -> list[str]:
    """The differences between a step and its manifest. With a world, each rank reads a part of the files, or those that `reads`
    names; without, all are read."""
    file = step / manifest.NAME
    try:
        entries = StepManifest.read(file).outputs
        listed = {o.path for o in entries}
        needed = {"config.json", METADATA, "train/rank0.pt", "model_and_optim/.metadata"}
        if not needed <= listed:
            return [f"{file} does not list {', '.join(sorted(needed - listed))}"]
        if reads is not None:
            wanted = reads(step, listed)
            entries = tuple(o for o in entries if o.path in wanted)
        elif world is not None:
            entries = entries[world.rank :: world.size]
        return manifest.broken_outputs(step, entries)
    except FileNotFoundError:
        return [f"{file} is missing: the step was not finished"]
    except (OSError, ValueError, KeyError, TypeError, SftError) as error:
        return [f"{file}: {type(error).__name__}: {error}"]


def files_read(
    step: Path, listed: Collection[str], model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> set[str]:
    """The files of a step that this rank's `restore` reads, and those that say what the step is. `listed`: the names in its
    manifest. The folder needs only DCP's .metadata. Raises SftError."""
    state = f"train/rank{world.rank}.pt"
    names = {"config.json", METADATA, "model_and_optim/.metadata", state if state in listed else "train/rank0.pt"}
    for reader, tensors in _stored(step, model, optimizer):
        if missing := sorted(tensors.keys() - reader.keys()):
            raise SftError(f"{step}: no tensor {reader.prefix}{missing[0]}")
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) or _reader_of(reader, name, tensor, world) == world.rank:
                names |= {f"model_and_optim/{file}" for file in reader.files_of(name, tensor)}
    return names


def _stored(
    step: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[DcpReader, Mapping[str, Tensor]]]:
    """What a step stores, and the tensors that it fills: weights, and moments."""
    return [
        (DcpReader(step, adapters=True), saved_parameters(model)),
        (DcpReader(step, "optim.state."), optimizer_tensors(model, optimizer)),
    ]


def _reader_of(reader: DcpReader, name: str, tensor: Tensor, world: World) -> int:
    """The rank that reads a tensor that every rank has whole: the one that wrote it, where there is one of this number. DCP
    spreads such tensors (the counters of AdamW) over the files of all ranks, and a node need not have the files of others."""
    if world.size == 1:
        return 0
    written = [int(m[1]) for file in sorted(reader.files_of(name, tensor)) if (m := re.match(r"__(\d+)_", file))]
    return written[0] % world.size if written else 0


def restore(step: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Loads weights and moments from a complete step folder, on any number of ranks. Returns this rank's train state. A tensor
    that every rank has whole is read by one and sent to the others. Every rank calls this. Raises SftError."""
    for reader, tensors in _stored(step, model, optimizer):
        world.on_all_ranks(partial(_read_own, reader, tensors, world))
        _exchange_whole(reader, tensors, world)
    mine = step / "train" / f"rank{world.rank}.pt"
    file = mine if mine.is_file() else step / "train" / "rank0.pt"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise SftError(f"{file}: not readable: {error}; next: remove {step}, and run train again") from error
    return state


def _read_own(reader: DcpReader, tensors: Mapping[str, Tensor], world: World) -> None:
    """Reads what this rank alone has of tensors, or all of one process."""
    for name, tensor in tensors.items():
        if world.size == 1 or isinstance(tensor, DTensor):
            reader.read_into(name, tensor)


def _exchange_whole(reader: DcpReader, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fills the tensors that every rank has whole."""
    whole = {} if world.size == 1 else {n: t for n, t in tensors.items() if not isinstance(t, DTensor)}

    def read() -> dict[str, Tensor]:
        mine = {n: t for n, t in whole.items() if _reader_of(reader, n, t, world) == world.rank}
        for name, tensor in mine.items():
            reader.read_into(name, tensor)
        return {name: tensor.detach().cpu() for name, tensor in mine.items()}

    for part in world.on_all_ranks(read) if whole else ():
        for name, value in part.items():
            with torch.no_grad():
                whole[name].copy_(value)


# --- which steps are kept ---------------------------------------------------------------------------------------------


def mark_latest(step: Path) -> None:
    write_latest(step)


def mark_best(out: Path, step: int, metric: str, value: float, higher_is_better: bool = True) -> bool:
    """Names out/stepN in BEST if its value is better than the recorded one, or if BEST has another metric or a step
    that does not exist. Returns whether it did. Raises SftError for a value that is not finite, and for a step that
    does not exist."""
    folder = out / f"step{step}"
    if not math.isfinite(value):
        raise SftError(f"{folder}: {metric} is {value}; only finite values can be compared")
    with steps_lock(out):
        if not (folder / manifest.NAME).is_file():
            raise SftError(f"{folder}: no such step; BEST cannot name it")
        known = Best.read(out)
        comparable = known is not None and known.metric == metric and (out / f"step{known.step}").is_dir()
        if known and comparable and (known.value >= value if higher_is_better else known.value <= value):
            return False
        Best(step, metric, value).write(out)
    return True


@contextlib.contextmanager
def steps_lock(out: Path) -> Iterator[None]:
    """A lock for changes of BEST and for choosing steps to remove; the trainer and an evaluation beside it take it."""
    with (out / ".steps.lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def to_trash(folder: Path) -> Path:
    """Renames a folder before it is removed, so that an interrupted removal leaves nothing that looks like a step.
    Returns the new name."""
    trash = folder.parent / f".trash-{folder.name.lstrip('.')}-{uuid.uuid4().hex[:8]}"
    folder.rename(trash)
    return trash


def prune(out: Path, keep: int | None, protected: Collection[Path] = ()) -> list[Path]:
    """Moves superfluous steps to the trash and returns their new folders: older ephemeral steps, and permanent ones
    beyond the newest `keep` (0 = all stay, None = none). The steps of LATEST and BEST and the `protected` ones always stay."""
    with steps_lock(out):
        latest_step = named_step(out, LATEST)
        if latest_step is None:
            return []
        newest = int(latest_step.name.removeprefix("step"))
        # A step without a manifest was not finished. It is left for a person to look at.
        older = [step for number, step in steps(out) if number <= newest and (step / manifest.NAME).is_file()]
        permanent = [step for step in older if not is_ephemeral(step)]
        newest_ones = [] if keep is None else permanent[-keep:]  # [-0:] is all of them
        stay = {latest_step, named_step(out, BEST), *protected, *newest_ones}
        return [to_trash(step) for step in older if step not in stay]
