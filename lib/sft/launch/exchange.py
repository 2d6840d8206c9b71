"""A word from each node of a job to all others, through a store on the first node."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import click


def node_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what launchers tell each node: its number, the number of nodes, and the first node."""
    for option in (
        click.option("--head", envvar="SFT_HEAD", show_envvar=True, required=True, help="HOST:PORT of the first node."),
        click.option(
            "--nodes", envvar="SFT_NODES", show_envvar=True, type=int, required=True, help="Nodes of the job."
        ),
        click.option(
            "--rank", envvar="SFT_NODE_RANK", show_envvar=True, type=int, required=True, help="This node's number."
        ),
    ):
        function = option(function)
    return function


def exchange(rank: int, nodes: int, head: str, mine: str, wait_s: float, required: bool = True) -> list[str]:
    """The words of all nodes, by their number. Every node calls it with its own and the same `head`, host:port of the store.

    A node that says nothing within `wait_s` seconds is an error (torch's DistStoreError or DistNetworkError) if `required`;
    otherwise its word is "".
    """
    from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # start-up: torch

    host, _, port = head.rpartition(":")
    wait = timedelta(seconds=wait_s)
    words = [mine if r == rank else "" for r in range(nodes)]
    try:
        store = TCPStore(host, int(port), nodes, is_master=rank == 0, timeout=wait, wait_for_workers=False)
        store.set(f"word {rank}", mine)
    except (DistNetworkError, DistStoreError):
        if required:
            raise
        return words
    try:
        for other in range(nodes):
            words[other] = store.get(f"word {other}").decode()
        store.set(f"read {rank}", "")
        if rank == 0:  # the store ends with this process
            store.wait([f"read {r}" for r in range(nodes)])
    except (DistNetworkError, DistStoreError):
        if required:
            raise
    return words
