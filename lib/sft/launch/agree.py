"""The exit status of a job of several nodes: python -m sft.launch.agree STATUS

In:  this node's exit status; SFT_NODE_RANK, SFT_NODES, SFT_HEAD (host:port of the first node; two ports above it are used).
Out: the highest status of all nodes, printed, as srun has it. Where a process was killed, its node ends with 75 (run it again)
     and the others, which only lost their peer, with 1: each alone would tell the scheduler something else.

A node that says nothing for SFT_AGREE_S seconds (120, as long as srun waits) has no say.
"""

from __future__ import annotations

import os
import sys

from sft.launch.exchange import exchange

WAIT_S = 120.0


def main() -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the end of a failed job's log is for what failed
    mine = sys.argv[1]
    host, _, port = os.environ["SFT_HEAD"].rpartition(":")
    rank, nodes = int(os.environ["SFT_NODE_RANK"]), int(os.environ["SFT_NODES"])
    wait_s = float(os.environ.get("SFT_AGREE_S", WAIT_S))
    words = exchange(rank, nodes, f"{host}:{int(port) + 2}", mine, wait_s, required=False)
    print(max(int(word) for word in words if word))
    return 0


if __name__ == "__main__":
    sys.exit(main())
