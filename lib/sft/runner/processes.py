"""How many processes and threads a stage runs on one machine. Standard library only."""

from __future__ import annotations

from sft.common.machine import cores, gpus, in_job
from sft.recipe.schema import Cluster, Hardware


def processes(hardware: Hardware, cluster: Cluster | None = None) -> tuple[int, int]:
    """(processes, threads of each) on one machine: one process per GPU, or one for all cores.

    The GPUs are those of this machine; where training runs as a job on `cluster`, they are those that the job would request.
    """
    asked = hardware.gpus if hardware.gpus >= 0 else None
    if cluster is not None and cluster.launcher != "local" and "train" in cluster.stages and not in_job():
        found = cluster.gpus_per_node if asked is None else asked
    else:
        found = gpus()
    count = hardware.processes or max(1, found)
    return count, hardware.threads or max(1, cores() // count)
