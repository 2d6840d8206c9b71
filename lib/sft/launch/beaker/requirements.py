"""What a cluster's file names and Beaker must have: account, workspace, budget, images, clusters with their GPUs, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from beaker import Beaker
from beaker import beaker_pb2 as pb2
from beaker.exceptions import (
    BeakerBudgetNotFound,
    BeakerImageNotFound,
    BeakerSecretNotFound,
    BeakerWorkspaceNotFound,
)

from sft.common import paths
from sft.common.errors import SftError
from sft.launch.beaker import specification
from sft.recipe.schema import Cluster


class NodeGpus(NamedTuple):
    """The GPUs of a cluster: how many a node has, and their type, e.g. "NVIDIA A100 80GB". 0 and "" = unknown."""

    per_node: int
    kind: str


def missing(client: Beaker, cluster: Cluster, file: str, harness: bool) -> Iterator[str]:
    """One line for each thing that the cluster's file names and Beaker does not have.

    `file` is env/<cluster>.toml. `harness`: also check what an evaluation by one of AI2's harnesses needs.
    """
    if (account := client.user_name) != specification.user():
        yield (
            f"{file}: '{{user}}' is {specification.user()}, but your Beaker account is {account};"
            f" next: SFT_USER={account} make …"
        )
    try:
        workspace = client.workspace.get(cluster.workspace)
    except BeakerWorkspaceNotFound:
        yield f"{file}: 'workspace' = {cluster.workspace!r}: no such workspace, or none that you may use"
        workspace = None
    try:
        if cluster.budget:  # without one, the workspace's own is charged
            client.workspace.resolve_budget_id(cluster.budget)
    except BeakerBudgetNotFound:
        yield f"{file}: 'budget' = {cluster.budget!r}: no such budget"
    for field in ("image", *(["evaluate_image"] if harness else [])):
        try:
            client.image.get(getattr(cluster, field))
        except BeakerImageNotFound:
            yield f"{file}: '{field}' = {getattr(cluster, field)!r}: no such image"
    yield from _missing_clusters(client, cluster, file)
    if workspace:
        yield from _missing_secrets(client, cluster, file, workspace, harness)


def _missing_clusters(client: Beaker, cluster: Cluster, file: str) -> Iterator[str]:
    known = node_gpus(client)
    for name in cluster.clusters:
        if name not in known:
            yield f"{file}: 'clusters': {name!r}: no such cluster; there are {', '.join(sorted(known))}"
            continue
        count, kind = known[name]
        if kind and not set(re.findall(r"\w+", cluster.gpu.upper())) <= set(kind.split()):
            yield f"{file}: 'gpu' = {cluster.gpu!r}: the GPUs of {name} are {kind}"
        if 0 < count < cluster.gpus_per_node:
            yield f"{file}: 'gpus_per_node' = {cluster.gpus_per_node}: a node of {name} has {count}"


def _missing_secrets(
    client: Beaker, cluster: Cluster, file: str, workspace: pb2.Workspace, harness: bool
) -> Iterator[str]:
    for field in ("secrets", *(["evaluate_secrets"] if harness else [])):
        for variable, secret in getattr(cluster, field).items():
            secret = paths.for_user(secret)
            if secret_name(client, secret, workspace) is None:
                yield (
                    f"{file}: '{field}': {variable} = {secret!r}: the workspace {cluster.workspace} has no such secret"
                    f" (beaker secret write --workspace {cluster.workspace} {secret})"
                )


def node_gpus(client: Beaker) -> dict[str, NodeGpus]:
    """The GPUs of a node of each cluster, by every name that the cluster has."""
    found = {}
    for c in client.cluster.list():
        kind = pb2.GpuType.Name(c.node_shape.gpu_type).removeprefix("GPU_TYPE_").replace("_", " ")
        for name in (c.name, *c.aliases):
            gpus = NodeGpus(c.node_shape.gpu_count, kind if kind != "UNSPECIFIED" else "")
            found[f"{c.organization_name}/{name}"] = gpus
    return found


def secret_name(client: Beaker, name: str, workspace: pb2.Workspace) -> str | None:
    """The workspace's secret of this name, as the workspace spells it; None for none.

    Beaker compares names without case when it reads a value over HTTP and with case over gRPC (OLMo-core #666), so a file may
    spell a name in a way that only one of them finds. No value is read. Raises SftError for several that differ in case alone.
    """
    try:
        return str(client.secret.get(name, workspace=workspace).name)
    except BeakerSecretNotFound:
        found = sorted(
            {s.name for s in client.secret.list(workspace=workspace) if s.name.casefold() == name.casefold()}
        )
    if len(found) > 1:
        raise SftError(
            f"the secret {name!r}: {workspace.name} has {', '.join(found)}, which differ in case alone; next: name one of them in"
            " the cluster's file"
        )
    return found[0] if found else None
