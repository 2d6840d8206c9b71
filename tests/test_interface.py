"""Ranks on two nodes whose own names resolve to 127.0.1.1, Debian's default: two network namespaces with a link between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPO
from patience import PATIENCE
from sft.common.errors import SftError
from sft.launch import interface

pytestmark = pytest.mark.processes
NODES = ("sft-one", "sft-two")
SUM = """
import os, torch, torch.distributed as dist
from datetime import timedelta
print("interface", os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
dist.init_process_group("gloo", timeout=timedelta(seconds=int(os.environ.get("GIVE_UP_S", 60))))
value = torch.ones(1)
dist.all_reduce(value)
print("sum", value.item(), flush=True)
dist.destroy_process_group()  # a thread of gloo that runs at the exit aborts the process
"""


@pytest.fixture
def nodes() -> Iterator[tuple[str, ...]]:
    """Two namespaces, 10.77.7.1 and 10.77.7.2, each with an /etc/hosts as Debian's installer writes it."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("no `ip` and `unshare` here to make network namespaces with")
    names = [f"{name}-{os.getpid()}" for name in NODES]
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names, 1):
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
                pytest.skip("making a network namespace needs root")
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.parent.mkdir(parents=True)
            stack.callback(shutil.rmtree, hosts.parent)
            other = names[2 - number]
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.7.{3 - number} {other}\n")
        ends = [f"sft{number}x{os.getpid()}"[:15] for number in (1, 2)]
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            run("ip", "link", "set", end, "netns", name)
            inside(name, "ip", "link", "set", end, "name", "wire0")
            inside(name, "ip", "link", "set", "lo", "up")
            inside(name, "ip", "addr", "add", f"10.77.7.{number}/24", "dev", "wire0")
            inside(name, "ip", "link", "set", "wire0", "up")
        yield tuple(names)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def inside(node: str, *command: str) -> None:
    run("ip", "netns", "exec", node, *command)


def train(tmp_path: Path, nodes: tuple[str, ...], **env: str) -> list[tuple[int, str]]:
    """(exit status, output) of stages/train.sh on each node, whose training is one sum over the ranks."""
    root = tmp_path / "repo"
    (root / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (root / "stages").mkdir(exist_ok=True)
    shutil.copy(REPO / "stages/train.sh", root / "stages")
    (root / "sum.py").write_text(SUM)
    python = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words[1] == "sft.launch.processes":
    sys.exit(print(1, 1))
if "sft.training" in words:
    words[words.index("sft.training") - 1 :] = ["sum.py"]
os.execv({sys.executable!r}, [{sys.executable!r}, *words])
"""
    (root / ".venv/bin/python").write_text(python)
    (root / ".venv/bin/python").chmod(0o755)
    started = []
    for rank, node in enumerate(nodes):
        own = {"SFT_NODES": "2", "SFT_NODE_RANK": str(rank), "SFT_HEAD": f"{nodes[0]}:29411", "SFT_PEER": "10.77.7.2",
               "PYTHONPATH": str(REPO / "lib"), "OMP_NUM_THREADS": "1", **env}  # fmt: skip
        command = [
            "ip",
            "netns",
            "exec",
            node,
            "unshare",
            "-u",
            "sh",
            "-c",
            f"hostname {node}; exec timeout -k 1 60 stages/train.sh runs/x",
        ]
        started.append(subprocess.Popen(command, cwd=root, env={**os.environ, **own}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    out = [process.communicate(timeout=PATIENCE)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, out, strict=True)]


def test_nodes_whose_names_resolve_to_loopback_meet(nodes, tmp_path):
    for status, out in train(tmp_path, nodes):
        assert status == 0 and "sum 2.0" in out and "gloo uses wire0, NCCL =wire0" in out, out


def test_the_interface_of_the_cluster_file_is_used(nodes, tmp_path):
    """[env] names loopback: the ranks cannot meet, which shows that it was used."""
    for status, out in train(tmp_path, nodes, GLOO_SOCKET_IFNAME="lo", GIVE_UP_S="3"):
        assert status != 0 and "interface lo" in out and "sum 2.0" not in out and "gloo uses" not in out, out


def test_own_address_and_default_route_and_an_error(monkeypatch):
    found = interface.source_address(interface.OUTSIDE)
    if found:
        assert interface.interface_to("localhost") == interface.interface_of(found) == interface.interface_to(found)
    assert interface.interface_of("127.0.0.1") == "lo" and interface.addresses("no-such-host.invalid") == []
    monkeypatch.setattr(interface, "source_address", lambda target: "")
    with pytest.raises(SftError, match=r"no interface to n7 .*GLOO_SOCKET_IFNAME"):
        interface.interface_to("n7", "")
