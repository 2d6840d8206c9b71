"""The exit status of a job of several nodes: python -m sft.launch.agree STATUS

In:  this node's exit status; SFT_NODE_RANK, SFT_NODES, SFT_HEAD (host:port of the first node; two ports above it are used).
Out: the highest status of all nodes, printed, as srun has it. Where a process was killed, its node ends with 75 (run it again)
     and the others, which only lost their peer, with 1: each alone would tell the scheduler something else.

A node that says nothing for SFT_AGREE_S seconds (120, as long as srun waits) has no say.
"""

from __future__ import annotations

import os
import sys

import click

from sft.launch.exchange import exchange, node_options
from sft.runner.cli import program

WAIT_S = 120.0


@program("launch", "python -m sft.launch.agree", signals=False)
@click.argument("status", type=int)
@node_options("rank", "nodes", "head")
@click.option("--wait-s", envvar="SFT_AGREE_S", show_envvar=True, type=float, default=WAIT_S)
def main(status: int, rank: int, nodes: int, head: str, wait_s: float) -> None:
    """Prints the exit status of a job of several nodes."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the end of a failed job's log is for what failed
    host, _, port = head.rpartition(":")
    words = exchange(rank, nodes, f"{host}:{int(port) + 2}", str(status), wait_s, required=False)
    print(max(int(word) for word in words if word))


if __name__ == "__main__":
    sys.exit(main())
