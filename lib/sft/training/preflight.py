"""A look at a job's processors, memories and links before it trains: seconds, in which a faulty or slow one is named.

In:  the ranks of a job, each with its device, before anything is on it.
Out: one line with the speeds; a warning for each rank or link that is slower than the others; SharedError for a wrong value.

* Matrix products of the same operands: bits, which must be the same in every product and on every rank with the same device, and
  their speed.
* Memory: most of what is free is filled with a pattern and its complement, and read back.
* Links: pairs of ranks exchange messages in both directions, with the next rank of the node before and behind, and with the same rank
  of the next node before and behind. A slow rank is slow in both pairs; where only one pair is slow, it is named.
* A sum over all ranks, of whole numbers whose sum is known.

Every part is bounded in time. A rank that does not end one is named by sft.training.hang.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sft.common.machine import node_name
from sft.model.parallel import SharedError, World
from sft.training.hang import HangWatch

LIMIT_S = 300
"""Without an end of a part in this time the preflight counts as hung. The first exchange of a large job sets up its links."""
SLOW = {"matmul": 0.85, "memory": 0.85, "link": 0.5}
"""A rank or a link with less than this share of the median is slow. The pairs of a node share its links."""
UNITS = {"matmul": "TFLOP/s", "memory": "GB/s", "link": "GB/s"}


@dataclass(frozen=True)
class Sizes:
    """How much work a preflight is on one kind of device."""

    seconds: float  # of matrix products
    matrix: int  # rows and columns
    memory_share: float  # of the free memory
    memory_bytes: int  # at most
    message_bytes: int
    repeats: int  # of an exchange


GPU = Sizes(3.0, 8192, 0.8, 1 << 40, 256 << 20, 10)
CPU = Sizes(0.5, 256, 0.1, 64 << 20, 1 << 20, 10)
BLOCK = 1 << 30
"""Bytes of memory that are compared at once."""


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank measured. Speeds are TFLOP/s and GB/s of one direction."""

    rank: int
    host: str
    device: str
    product: int  # bits of the product, added up
    matmul: float
    memory: float
    wrong: tuple[str, ...] = ()  # parts with a wrong value
    link: dict[int, float] = field(default_factory=dict)  # by the other rank


def preflight(out: Path, world: World, log: Callable[[str], None]) -> None:
    """Looks at all ranks' devices and links. Every rank calls this. Raises SharedError for a wrong value; a speed far below the
    others' is a warning."""
    began = time.monotonic()
    sizes = GPU if world.device.type == "cuda" else CPU
    watch = HangWatch(out, 0, world, LIMIT_S)
    try:
        found: list[RankMeasurement] = world.gather(
            measure(world, 1 + max(world.gather(world.local_rank)), sizes, watch)
        )
    finally:
        watch.close()
    if problems := wrong(found):
        for line in problems if world.is_rank0 else ():
            log(line)
        raise SharedError(
            f"preflight: {len(problems)} wrong values: {problems[0]}; next: leave that host out (the cluster's file), or"
            " preflight = 'never' in [on.<cluster>.train], which trains with it"
        )
    if world.is_rank0:
        for line in (summary(found, time.monotonic() - began), *slow(found)):
            log(line)


def measure(world: World, local_size: int, sizes: Sizes, watch: HangWatch) -> RankMeasurement:
    """All parts, on this rank. `local_size`: ranks of a node."""
    device, problems = world.device, list[str]()
    name = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    part = Parts(watch)
    part.begin("matrix products")
    product, matmul, same = multiply(device, sizes)
    problems += [] if same else ["products of the same matrices differ"]
    part.begin("memory")
    memory, same = fill(device, sizes)
    problems += [] if same else ["memory returns other values than were written"]
    link: dict[int, float] = {}
    if world.size > 1:
        part.begin("sum over all ranks")
        problems += [] if total(world, sizes) else ["a sum over all ranks is wrong"]
        for pairs in rounds(world.size, local_size):
            other = pairs[world.rank]
            part.begin(f"link with rank {other}" if other is not None else "links of other ranks")
            world.any(False)  # all begin together
            if other is None:
                continue
            speed, whole = exchange(world, other, sizes)
            link[other] = speed
            problems += [] if whole else [f"a message of rank {other} arrives with other values"]
    part.begin("end")
    return RankMeasurement(world.rank, node_name(), name, product, matmul, memory, tuple(problems), link)


class Parts:
    """Tells the watch of hangs which part begins: each is a step to it."""

    def __init__(self, watch: HangWatch) -> None:
        self.watch, self.count = watch, 0

    def begin(self, name: str) -> None:
        self.watch.finish_step(self.count)
        self.watch.mark(f"preflight: {name}")
        self.count += 1


def multiply(device: torch.device, sizes: Sizes) -> tuple[int, float, bool]:
    """(bits of the product, TFLOP/s, whether all products of the same operands have the same bits)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(sizes.matrix, sizes.matrix, generator=generator).to(device, dtype) for _ in range(2))
    first = bits(product(a, b))
    differ, count, seconds = torch.zeros((), dtype=torch.bool, device=device), 0, 0.0
    while seconds < sizes.seconds:
        wait(device)
        began = time.monotonic()
        results = [product(a, b) for _ in range(4)]
        wait(device)
        seconds += time.monotonic() - began
        count += len(results)
        for result in results:
            differ |= bits(result) != first
    return int(first), 2.0 * sizes.matrix**3 * count / seconds / 1e12, not bool(differ)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product that is measured."""
    return a @ b


def bits(values: Tensor) -> Tensor:
    """The bits of all values, added up as integers."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32).sum(dtype=torch.int64)


def fill(device: torch.device, sizes: Sizes) -> tuple[float, bool]:
    """(GB/s of writing and reading, whether all of it was read as it was written)."""
    if device.type == "cuda":
        room = int(torch.cuda.mem_get_info(device)[0] * sizes.memory_share)
    else:
        room = sizes.memory_bytes
    words = min(BLOCK, room // 2) // 8
    pattern = torch.arange(words, device=device) * 0x9E3779B97F4A7C1 + 1  # of every bit, and another one in every word
    blocks = list[Tensor]()
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # another process may use the device
        blocks += (torch.empty_like(pattern) for _ in range(max(1, min(room, sizes.memory_bytes) // (8 * words) - 1)))
    wait(device)
    began, same = time.monotonic(), torch.ones((), dtype=torch.bool, device=device)
    for value in (pattern, ~pattern):
        for block in blocks:
            block.copy_(value)
        for block in blocks:
            same &= (block == value).all()
    good = bool(same)  # waits
    seconds = time.monotonic() - began
    moved = 2 * 2 * 8 * words * len(blocks)
    del blocks, pattern
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the training reports its own peak
    return moved / seconds / 1e9, good


def total(world: World, sizes: Sizes) -> bool:
    """Whether a sum of whole numbers over all ranks is what it must be."""
    numbers = torch.arange(sizes.message_bytes // 4, device=world.device).remainder_(1000)
    value = summed((numbers + world.rank).float())
    expected = world.size * numbers + world.size * (world.size - 1) // 2  # below 2^24: exact in fp32
    return bool((value == expected).all())


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(value)
    return value


def rounds(ranks: int, local_size: int) -> Iterator[list[int | None]]:
    """Pairings of all ranks, [other rank or None] by rank: of neighbours in a node, then of the same place in neighbouring nodes."""
    for places, stride in ((local_size, 1), (ranks // local_size, local_size)):
        for first in (0, 1):
            pairs = [_other(rank, rank // stride % places, places, stride, first) for rank in range(ranks)]
            if any(other is not None for other in pairs):
                yield pairs


def _other(rank: int, place: int, places: int, stride: int, first: int) -> int | None:
    """The rank that is paired with the one at `place`, where the first pair begins at `first`. An even number of places is a ring."""
    other = place + 1 if (place - first) % 2 == 0 else place - 1
    if not 0 <= other < places and (places % 2 or places < 3):
        return None
    return rank + (other % places - place) * stride


def exchange(world: World, other: int, sizes: Sizes) -> tuple[float, bool]:
    """(GB/s of one direction while both send, whether the other rank's values came)."""
    numbers = torch.arange(sizes.message_bytes // 4, device=world.device, dtype=torch.int32)
    mine, theirs = numbers ^ (world.rank * 0x10001), torch.empty_like(numbers)

    theirs = swap(mine, theirs, other)  # sets the link up
    began = time.monotonic()
    for _ in range(sizes.repeats):
        theirs = swap(mine, theirs, other)
    seconds = time.monotonic() - began
    whole = bool((theirs == numbers ^ (other * 0x10001)).all())
    return sizes.repeats * sizes.message_bytes / seconds / 1e9, whole


def swap(mine: Tensor, theirs: Tensor, other: int) -> Tensor:
    """Sends `mine` to the other rank and returns `theirs` with what it sends."""
    both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    wait(mine.device)
    return theirs


def wait(device: torch.device) -> None:
    """Until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what it says ------------------------------------------------------------------------------------------------------


def wrong(found: Sequence[RankMeasurement]) -> list[str]:
    """A line for each wrong value of a rank. A product that another rank with the same device computed otherwise is wrong where most
    ranks agree on another one."""
    lines = [f"corrupt: rank {f.rank} on {f.host}: {problem} (preflight)" for f in found for problem in f.wrong]
    for device in dict.fromkeys(f.device for f in found):
        alike = [f for f in found if f.device == device]
        products = Counter(f.product for f in alike)
        usual, count = products.most_common(1)[0]
        if 2 * count > len(alike):
            lines += [
                f"corrupt: rank {f.rank} on {f.host}: its product of the same matrices is not that of {count} others (preflight)"
                for f in alike
                if f.product != usual
            ]
        elif len(products) > 1:
            lines.append(
                f"corrupt: the product of the same matrices has {len(products)} values on {len(alike)} ranks (preflight)"
            )
    return lines


def slow(found: Sequence[RankMeasurement]) -> list[str]:
    """A warning for each rank, or pair of ranks, that is slower than the others."""
    lines = []
    for kind in ("matmul", "memory"):
        median = statistics.median(getattr(f, kind) for f in found)
        lines += [
            _warning(f"rank {f.rank} on {f.host}", kind, getattr(f, kind), median)
            for f in found
            if getattr(f, kind) < SLOW[kind] * median
        ]
    hosts = {f.rank: f.host for f in found}
    for near, where in ((True, "in its node"), (False, "to other nodes")):
        speeds = {(f.rank, o): s for f in found for o, s in f.link.items() if (hosts[o] == f.host) == near}
        lines += _slow_links(speeds, hosts, where)
    return lines


def _slow_links(speeds: dict[tuple[int, int], float], hosts: dict[int, str], where: str) -> list[str]:
    median = statistics.median(speeds.values()) if speeds else 0.0
    late = {pair for pair, speed in speeds.items() if speed < SLOW["link"] * median}
    lines = []
    for rank in sorted({rank for rank, _ in late}):
        mine = [pair for pair in speeds if pair[0] == rank]
        if len(mine) > 1 and set(mine) <= late:
            best = max(speeds[pair] for pair in mine)
            lines.append(_warning(f"every link of rank {rank} on {hosts[rank]} {where}", "link", best, median))
            late -= {pair for pair in late if rank in pair}
    for a, b in sorted(pair for pair in late if pair[0] < pair[1]):
        lines.append(
            _warning(f"the link of rank {a} on {hosts[a]} and rank {b} on {hosts[b]}", "link", speeds[a, b], median)
        )
    return lines


def _warning(where: str, kind: str, speed: float, median: float) -> str:
    what = "" if kind == "link" else f" {kind}"
    return (
        f"warning: preflight: {where}:{what} {_number(speed)} {UNITS[kind]}, the median is {_number(median)}; next: look at"
        " its clocks and cables, or leave it out"
    )


def _number(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def summary(found: Sequence[RankMeasurement], seconds: float) -> str:
    """The speeds in one line."""

    def span(values: Sequence[float], kind: str) -> str:
        return f"{kind} {_number(min(values))} to {_number(max(values))} {UNITS[kind]}"

    links = [speed for f in found for speed in f.link.values()]
    parts = [span([f.matmul for f in found], "matmul"), span([f.memory for f in found], "memory")]
    parts += [span(links, "link")] if links else []
    return f"preflight of {len(found)} x {found[0].device} in {seconds:.0f} s: {', '.join(parts)}"
