"""Stages as Beaker experiments."""

from sft.launch.beaker.scheduler import open_scheduler

__all__ = ["open_scheduler"]
