"""Stages as SkyPilot's managed jobs: Kubernetes, clouds, pools of machines over SSH, through the `sky` command of this machine."""

from sft.launch.sky.checks import ask, check
from sft.launch.sky.scheduler import open_scheduler

__all__ = ["ask", "check", "open_scheduler"]
