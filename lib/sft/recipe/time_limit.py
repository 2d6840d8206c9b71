"""Slurm's time limits, and the notice that a training gets before its limit. Standard library only."""

from __future__ import annotations

import re

from sft.common.errors import SftError
from sft.recipe.schema import SLURM, Cluster, Hardware

START_S = 30
"""A job needs this long before its training can answer a signal: Slurm's start, Python, torch."""


def seconds(limit: str) -> int | None:
    """A time limit in Slurm's notation in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    None for another notation, such as "infinite".
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", limit)
    if match is None:
        return None
    days, numbers = match[1], [int(n) for n in match[2].split(":")]
    if days is not None:  # hours come first
        hours, minutes, rest = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, rest = numbers
    else:
        hours, (minutes, rest) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def check_limit(cluster: Cluster, hardware: Hardware) -> None:
    """Raises SftError for a time that sbatch would refuse, before the stages that come first have run."""
    limit = hardware.time or cluster.time
    if (
        cluster.launcher in SLURM
        and limit
        and seconds(limit) is None
        and limit.lower() not in ("infinite", "unlimited")
    ):
        raise SftError(
            f"time = {limit!r}: no time limit of Slurm, which are minutes, 24:00:00, 1-12:00:00 or infinite; next: correct it"
        )


def check_notice(cluster: Cluster, hardware: Hardware) -> None:
    """Raises SftError for a training that Slurm would tell to save before it trains. `hardware`: of the train stage."""
    limit = hardware.time or cluster.time
    allowed = seconds(limit) if cluster.launcher in SLURM else None
    if allowed is not None and allowed < cluster.notice_s + START_S:
        raise SftError(
            f"time = {limit!r} is {allowed} s, and notice_s = {cluster.notice_s}: Slurm would tell training to save"
            f" {max(allowed - cluster.notice_s, 0)} s after its job starts; next: raise time, or lower notice_s in the cluster's file"
        )
