"""The hosts on which a job may run: without those that failed, and on Google Cloud within one block of its network.

In:  the job, its cluster's file (`google_zone`), runs/<run>/.jobs/failed-nodes, Beaker's nodes and their jobs.
Out: host names for the specification, or none: then Beaker chooses from the clusters.

Hosts in one block reach each other faster (https://cloud.google.com/compute/docs/instances/use-compact-placement-policies). The
choice is that of OLMo-core (olmo_core/launch/select_beaker_hosts.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from beaker import Beaker
from beaker import beaker_pb2 as pb2

from sft.common.errors import SftError
from sft.launch import failed
from sft.launch.beaker.states import SIGNALS
from sft.launch.job import Job
from sft.recipe.schema import Cluster

COMPUTE = "https://compute.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/compute.readonly"
ANSWER_S = 60
LINES = 500
SIGNS = re.compile(
    r"\[train\] a process was killed|hung: rank \d+ on |corrupt: rank \d+ on |CUDA error|HIP error|uncorrectable|Bus error"
)
"""In the last lines of a job's log."""


def allowed(client: Beaker, job: Job) -> tuple[str, ...]:
    """The names of the hosts on which a job may run; () = all of its clusters. Raises SftError where they are too few."""
    if not are_chosen(job):
        return ()
    avoided, by_place = failed.failed_twice(job.folder), _by_place(job)
    nodes = {node.hostname: node for node in nodes_of(client, job.cluster) if node.hostname not in avoided}
    if not by_place:
        if len(nodes) < job.nodes:
            raise SftError(
                f"{', '.join(avoided)} failed twice, and {', '.join(job.cluster.clusters)} has {len(nodes)} other nodes for"
                f" {job.nodes}; next: delete {job.folder / failed.NAME} to use them again"
            )
        return tuple(sorted(nodes))
    places = {place.split(".")[0]: block for place, block in blocks(job.cluster.google_zone)}
    known = {name: places[name.split(".")[0]] for name in sorted(nodes) if name.split(".")[0] in places}
    free = {name for name in known if is_free(client, nodes[name], priority_of(job))}
    try:
        return tuple(choose(known, free, job.nodes, nodes_of_a_copy(job)))
    except SftError as e:
        file = f"env/{job.place.cluster}.toml"
        raise SftError(f'{file}: google_zone: {e}; next: fewer nodes, later, or google_zone = "" there') from None


def are_chosen(job: Job) -> bool:
    """Whether the job runs on chosen hosts instead of any of its clusters."""
    return _by_place(job) or bool(failed.failed_twice(job.folder))


def _by_place(job: Job) -> bool:
    return bool(job.cluster.google_zone) and job.nodes > 1


def nodes_of(client: Beaker, cluster: Cluster) -> Iterator[pb2.Node]:
    """The nodes of a file's clusters."""
    for found in client.cluster.list():
        if any(f"{found.organization_name}/{name}" in cluster.clusters for name in (found.name, *found.aliases)):
            yield from client.node.list(cluster=found)


def is_nodes_fault(client: Beaker, job: pb2.Job) -> bool:
    """Whether a failed job ended by a kill, a rank that hung or an error of the hardware on its node."""
    if job.status.exit_code > SIGNALS:
        return True
    text = "\n".join(line.message.decode(errors="replace") for line in client.job.logs(job, tail_lines=LINES))
    return SIGNS.search(text) is not None


def choose(hosts: Mapping[str, str], free: AbstractSet[str], nodes: int, together: int) -> list[str]:
    """The hosts for a job of `nodes` nodes, of which `together` at a time must be in one block. `hosts`: {host: block}.

    If one block has more free hosts than needed, all its hosts, also those that are taken now: the job may start on them later.
    Otherwise free hosts of several blocks, a multiple of `together` of each. Raises SftError where they are too few.
    """
    by_block: dict[str, list[str]] = {}
    for host, block in hosts.items():
        if host in free:
            by_block.setdefault(block, []).append(host)
    largest_first = sorted(by_block.items(), key=lambda item: -len(item[1]))
    if largest_first and len(largest_first[0][1]) > nodes:
        return [host for host, block in hosts.items() if block == largest_first[0][0]]
    chosen: list[str] = []
    for _, found in largest_first:
        chosen += found[: min(nodes - len(chosen), len(found) // together * together)]
    if len(chosen) < nodes:
        raise SftError(
            f"{len(chosen)} of {nodes} hosts found, with each {together} in one block; {len(free)} of {len(hosts)} are free"
        )
    return chosen


def nodes_of_a_copy(job: Job) -> int:
    """The nodes that exchange most: those that hold one copy of the weights between them."""
    nodes = -(-max(0, job.hardware.shard_degree) // max(1, job.gpus)) or job.nodes
    return nodes if job.nodes % nodes == 0 else job.nodes


def priority_of(job: Job) -> int:
    """The job's priority as Beaker's number; higher ones come first."""
    name = job.hardware.priority or job.cluster.priority
    return int(pb2.JobPriority.Value(f"JOB_PRIORITY_{name.upper()}"))


def is_free(client: Beaker, node: pb2.Node, priority: int) -> bool:
    """Whether a job of this priority could start there now: no job with GPUs is on it that could not be preempted."""
    if node.cordon_details.HasField("cordoned"):
        return False
    jobs = client.job.list(scheduled_on_node=node, finalized=False)
    return all(
        may_be_preempted(j, priority) for j in jobs if j.assignment_details.resource_assignment.assigned_slots_count
    )


def may_be_preempted(job: pb2.Job, priority: int) -> bool:
    """Whether a job of `priority` could take this one's place: it has a lower priority and has run for as long as it must."""
    protected = job.status.started.seconds + job.system_details.min_runtime.seconds > time.time()
    return int(job.system_details.priority) < priority and not protected


def blocks(zone: str) -> Iterator[tuple[str, str]]:
    """(name, block of the network) of each running instance of a zone, "project/zone". Asks Google. Raises SftError."""
    project, _, name = zone.partition("/")
    address, page = f"{COMPUTE}/compute/v1/projects/{project}/zones/{name}/instances", ""
    session = _session(zone)
    while True:
        found = _page(session, zone, address, page)
        for instance in found.get("items", ()):
            topology = instance.get("resourceStatus", {}).get("physicalHostTopology", {})
            if instance.get("status") == "RUNNING" and topology.get("block"):
                yield instance["name"], topology["block"]
        page = found.get("nextPageToken", "")
        if not page:
            return


def _session(zone: str) -> Any:
    import google.auth  # start-up: only a few clusters are on Google Cloud
    from google.auth.exceptions import DefaultCredentialsError  # start-up: as above
    from google.auth.transport.requests import AuthorizedSession  # start-up: as above

    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
    except DefaultCredentialsError as e:
        raise SftError(f"google_zone = {zone!r}: {_one_line(e)}; next: gcloud auth application-default login") from None
    return AuthorizedSession(credentials)  # type: ignore[no-untyped-call]


def _page(session: Any, zone: str, address: str, page: str) -> dict[str, Any]:
    import requests  # start-up: as above
    from google.auth.exceptions import GoogleAuthError  # start-up: as above

    try:
        answer = session.get(address, params={"pageToken": page} if page else {}, timeout=ANSWER_S)
        if answer.status_code == requests.codes.ok:
            return dict(answer.json())
        problem = f"{answer.status_code} {_one_line(answer.reason)}"
    except (requests.RequestException, GoogleAuthError, ValueError) as e:
        problem = _one_line(e)
    raise SftError(
        f"google_zone = {zone!r}: Google does not list its instances ({problem}); next: ask for compute.instances.list in that"
        ' project, or google_zone = "" in the cluster\'s file: Beaker then chooses the hosts'
    )


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
