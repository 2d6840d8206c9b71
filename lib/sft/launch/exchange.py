"""A word from each node of a job to all others, through a store on the first node."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import click

NODE_OPTIONS = {
    "rank": ("SFT_NODE_RANK", int, "This node's number."),
    "nodes": ("SFT_NODES", int, "Nodes of the job."),
    "head": ("SFT_HEAD", str, "HOST:PORT of the first node."),
}


def node_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds what launchers tell each node, as required options that also read the launchers' variables. `names`: keys of NODE_OPTIONS."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            variable, kind, text = NODE_OPTIONS[name]
            option = click.option(f"--{name}", envvar=variable, show_envvar=True, type=kind, required=True, help=text)
            function = option(function)
        return function

    return add


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
