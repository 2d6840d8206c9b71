"""Paths that only a cluster's jobs see: weka://bucket/… and absolute paths on a mount of the cluster's file. Standard library only.

    in_jobs("weka://oe-training-default/ai2-llm/x", cluster)      ->  "/weka/oe-training-default/ai2-llm/x"

The planner does not look for them. The job looks, and what it finds is checked there. Such a path is the same on every machine, so
it counts as unknown content also where this machine happens to have it.
"""

from __future__ import annotations

from sft.common.errors import SftError
from sft.recipe.recipe import Recipe
from sft.recipe.schema import Cluster

WEKA = "weka://"


def is_on_disk(path: str) -> bool:
    """Whether a path is written as one on a disk of the cluster."""
    return path.startswith((WEKA, "/"))


def in_jobs(path: str, cluster: Cluster) -> str:
    """The path in jobs, or "" where it is on none of the cluster's mounts."""
    if ".." in path.split("/"):
        return ""
    for mount in cluster.mounts:
        bucket, _, at = mount.partition(":")
        if path.startswith(f"{WEKA}{bucket}/"):
            return f"{at}/{path.removeprefix(f'{WEKA}{bucket}/')}"
        if path.startswith(f"{at}/"):
            return path
    return ""


def listed(cluster: Cluster) -> str:
    """The mounts of a cluster, for messages."""
    return ", ".join(cluster.mounts) or "it has none"


def require(path: str, stage: str, cluster: Cluster, name: str, what: str) -> str:
    """The path in jobs of one that is written as on a disk of the cluster. Raises SftError where the stage cannot read it.

    name: that of the cluster's file. what: the file and the field, for messages.
    """
    if not (found := in_jobs(path, cluster)):
        plain, local = (
            "not a plain relative path, and ",
            "; or write it relative to a folder and name that with DATA=/that/folder",
        )
        if path.startswith(WEKA):
            plain = local = ""
        raise SftError(
            f"{what} = {path!r}: {plain}on none of the mounts in env/{name}.toml ({listed(cluster)}); next: CLUSTER= with a cluster that has it{local}"
        )
    if stage not in cluster.stages:
        raise SftError(
            f"{what} = {path!r}: a disk that only jobs see, and {stage} runs on this machine; next: put {stage!r} among stages in"
            f" env/{name}.toml"
        )
    return found


def named(r: Recipe, stage: str) -> list[tuple[str, str]]:
    """(field, path) of what a stage reads from disks of the cluster."""
    found = []
    if stage == "prepare":
        found += [("'path' in [[prepare.sources]]", s.path) for s in r.prepare.sources]
        found += [("'tokenizer' in [prepare]", r.prepare.tokenizer)]
    if stage == "sync":
        found += [("'base' in [model]", r.model.base)]
    return [(field, path) for field, path in found if is_on_disk(path)]
