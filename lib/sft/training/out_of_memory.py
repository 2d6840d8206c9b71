"""What happens when a GPU has too little memory for a step: training starts again once, with more recomputation.

In:  the error of a step, and train/.out-of-memory, which an earlier attempt wrote.
Out: `starts_again` writes that file and ends the attempt; `earlier` finds it in the next one, whose plan is
     `sft.model.memory.plan_again`.

The process ends, because memory that other ranks and libraries hold is free only then. stages/train.sh starts it again for exit
status OUT_OF_MEMORY, from the newest step. Recomputation changes no gradient, so the run is the same. A step that runs out of memory
again ends training with status 1: another start would end in the same way.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from sft.common.errors import SftError
from sft.formats.out_of_memory import OutOfMemory
from sft.formats.steps import OUT_OF_MEMORY
from sft.model.parallel import World
from sft.runner.stage import Stage
from sft.training.loop import Run

WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
)
"""Of errors that are no torch.OutOfMemoryError: of CUDA itself, cuBLAS and NCCL."""


class StartAgain(Exception):
    """A step ran out of memory, and training starts again with more recomputation."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def earlier(stage: Stage, world: World) -> OutOfMemory | None:
    """What ran out of memory before, with the same hardware numbers and ranks. Every rank calls this: each node may have
    its own disk."""

    def read() -> OutOfMemory | None:
        with contextlib.suppress(FileNotFoundError):
            return OutOfMemory.read(stage.out / OUT_OF_MEMORY)
        return None

    found = next(filter(None, world.gather(read())), None)
    return found if found is not None and found.hardware == _numbers(stage, world) else None


def _numbers(stage: Stage, world: World) -> dict[str, Any]:
    """As JSON gives them back."""
    return dict(json.loads(json.dumps(asdict(stage.hardware) | {"ranks": world.size})))


def note(run: Run, error: BaseException) -> str:
    """Records that the running step ran out of memory, and returns that in words.

    Raises SftError where starting again would not help: everything is recomputed, or it is the second time.
    """
    assert run.room is not None
    step = run.hang.step + 1 if run.hang is not None else run.first + 1
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    numbers = _numbers(run.stage, run.world)
    found = OutOfMemory(step, run.world.rank, run.room.mode, run.room.total, numbers, first)
    chosen = run.stage.hardware.shard_degree < 0 and run.room.shard_degree > 0  # copies that the next plan does without
    least = run.room.recompute == "full" and run.room.keep_gathered == "none" and not chosen
    if run.short is not None or least:
        raise SftError(
            f"{run.stage.out}: {found}, and {run.room.total / 1e9:.1f} GB per GPU were planned; next: a smaller"
            " [on.<cluster>.train] microbatch_tokens, a larger context_degree, more GPUs, or optimizer = 'adamw8bit'"
        ) from error
    found.write(run.stage.out / OUT_OF_MEMORY)
    less = "more recomputation" if run.room.keep_gathered == "none" else "no weights kept over microbatches"
    less += " and one copy of the weights over all ranks" * chosen
    return f"{found}; training starts again once, from the newest step, with {less}"


@contextlib.contextmanager
def starts_again(run: Run) -> Iterator[None]:
    """Turns a GPU's lack of memory into `StartAgain`, or into SftError where that would not help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StartAgain(note(run, error)) from error
