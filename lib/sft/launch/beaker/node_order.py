"""The number of this node among those of its job, by the nodes' places in Google's network: python -m sft.launch.beaker.node_order

In:  SFT_NODE_RANK and SFT_NODES as Beaker numbers them; SFT_HEAD (host:port of the first node; the port above it is used).
Out: the number, printed. Nodes of one block are neighbours, and in a block those of one subblock, so that a ring of ranks
leaves a block as seldom as possible. The first node stays first.

The order is that of OLMo-core (olmo_core/launch/reorder_ranks_in_gcp.py). Google's metadata server tells each node its place
as /block/subblock/machine (https://cloud.google.com/compute/docs/instances/use-compact-placement-policies).
"""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Sequence

from sft.launch.exchange import exchange, node_options
from sft.runner.cli import program

PATH = "/computeMetadata/v1/instance/attributes/physical_host"
ANSWER_S = 10
WAIT_S = 1800.0
"""How long the nodes wait for each other: some prepare their environment more slowly."""


@program("launch", "python -m sft.launch.beaker.node_order", signals=False)
@node_options("rank", "nodes", "head")
def main(rank: int, nodes: int, head: str) -> None:
    """Prints the number of this node, by the nodes' places in Google's network."""
    host, _, port = head.rpartition(":")
    places = exchange(rank, nodes, f"{host}:{int(port) + 1}", place(), WAIT_S)
    ranks = order(places)
    if rank == 0:
        how = "by their places" if all(places) else "as Beaker numbers them: the place of one is not known"
        print(f"[launch] {nodes} nodes, {how}: {', '.join(places[r] or '?' for r in ranks)}", file=sys.stderr)
    print(ranks.index(rank))


def place() -> str:
    """This machine's place, "/block/subblock/machine"; "" where Google's metadata server does not tell one."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")  # the variable of Google's own clients
    request = urllib.request.Request(f"http://{host}{PATH}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            text = str(answer.read().decode()).strip()
    except (OSError, ValueError):
        return ""
    return text if len(text.strip("/").split("/")) == 3 else ""


def order(places: Sequence[str]) -> list[int]:
    """Beaker's numbers in the order of the final ones; unchanged where a place is not known."""
    ranks = list(range(len(places)))
    if not all(places):
        return ranks
    parts = [place.strip("/").split("/") for place in places]
    first = parts[0]
    return sorted(ranks, key=lambda r: ([p != f for p, f in zip(parts[r], first, strict=True)], parts[r], r))


if __name__ == "__main__":
    sys.exit(main())
