"""The nodes on which jobs of a run failed: runs/<run>/.jobs/failed-nodes, a line "<node> <job> …" for each failure.

Slurm's script and Beaker's launcher add lines; a new job avoids the nodes with two. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

NAME = "failed-nodes"
TWICE = 2


def failed_twice(folder: Path) -> list[str]:
    """The nodes on which jobs of this run failed twice or more. `folder` is runs/<run>/.jobs."""
    nodes = [line.split()[0] for line in _lines(folder)]
    return sorted({node for node in nodes if nodes.count(node) >= TWICE})


def add(folder: Path, node: str, job: str, how: str) -> bool:
    """Adds a failure of a job, once for each job. Returns whether it was new."""
    if any(line.split()[:2] == [node, job] for line in _lines(folder)):
        return False
    with open(folder / NAME, "a", encoding="utf-8") as file:
        file.write(f"{node} {job} {how}\n")
    return True


def _lines(folder: Path) -> list[str]:
    try:
        return [line for line in (folder / NAME).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        return []
