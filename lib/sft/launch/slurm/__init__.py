"""Stages as Slurm jobs."""

from sft.launch.slurm.checks import ask, check
from sft.launch.slurm.scheduler import open_scheduler

__all__ = ["ask", "check", "open_scheduler"]
