"""How many processes a stage runs on one machine, and how many threads each of them has. Standard library only."""

from __future__ import annotations

from typing import NamedTuple

from sft.common.machine import cores, gpus, in_job
from sft.recipe.schema import Cluster, Hardware


def requested_gpus(stage: str, hardware: Hardware, cluster: Cluster) -> int:
    """GPUs of each machine that the stage is planned for: [on.<cluster>.<stage>] gpus, else all for training, one for
    evaluation, none for the rest."""
    if hardware.gpus >= 0:
        return hardware.gpus
    return {"train": cluster.gpus_per_node, "evaluate": min(1, cluster.gpus_per_node)}.get(stage, 0)


class Choice(NamedTuple):
    """A backend of evaluate, and why it is that one."""

    backend: str
    reason: str


def evaluation_backend(backend: str, gpus: int, has_vllm: bool) -> Choice:
    """What [evaluate] backend means. `gpus`: those of the plan, or those that a running stage sees."""
    if backend != "auto":
        return Choice(backend, "named by the recipe")
    if not gpus:
        return Choice("hf", "auto: no GPU")
    return (
        Choice("vllm", "auto: a GPU, and vLLM is installed")
        if has_vllm
        else Choice("hf", "auto: vLLM is not installed")
    )


def processes(hardware: Hardware, cluster: Cluster | None = None) -> tuple[int, int]:
    """(processes, threads of each) on one machine: one process for each GPU, or one process without a GPU.

    The GPUs are those of this machine. With a `cluster` that trains in jobs, and outside of a job, they are those that its
    job would request.
    """
    requested = hardware.gpus if hardware.gpus >= 0 else None
    if cluster is not None and cluster.launcher != "local" and "train" in cluster.stages and not in_job():
        found = cluster.gpus_per_node if requested is None else requested
    else:
        found = gpus()
    count = hardware.processes or max(1, found)
    return count, hardware.threads or max(1, cores() // count)
