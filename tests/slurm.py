"""A real Slurm on loopback, without root and without installing anything: Debian's packages unpacked into a folder.

    make slurm-up      ->  python tests/slurm.py up      a controller and two nodes on this machine; prints the PATH to use
    make slurm-down    ->  python tests/slurm.py down

    with Slurm(folder) as slurm:                          the same in a test; slurm.env is the environment of its commands

The second partition, `urgent`, preempts the first: its jobs send those of `main` SIGTERM and have them run again later.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import debian

PACKAGES = [
    "libhwloc15",
    "liblua5.1-0",
    "libmunge2",
    "munge",
    "slurm-wlm-basic-plugins",
    "slurm-client",
    "slurmd",
    "slurmctld",
]
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct")


def packages() -> Path:
    """Debian's Slurm packages, unpacked. Raises NotDebian, and RuntimeError when fetching fails."""
    return debian.unpacked("slurm", PACKAGES)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Slurm:
    """slurmctld and `nodes` slurmd of two cores each, with their files in `folder`. Two nodes are in `main`, the third in `aside`."""

    def __init__(self, folder: Path, nodes: int = 3):
        self.folder, self.root = folder.absolute(), packages()
        self.bin = self.folder / "bin"
        self.nodes = [f"n{i}" for i in range(nodes)]
        lib = next(self.root.glob("usr/lib/*/slurm-wlm")).parent
        self.own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "LD_LIBRARY_PATH": f"{lib}:{lib}/slurm-wlm"}
        self.plugins = lib / "slurm-wlm"

    @property
    def env(self) -> dict[str, str]:
        """The caller's environment with Slurm's commands on PATH."""
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout.strip()

    def start(self) -> Slurm:
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        settings = " ".join(f"{k}='{v}'" for k, v in self.own.items())
        for name in COMMANDS:  # jobs inherit PATH alone, not the libraries
            script = self.bin / name
            script.write_text(f'#!/bin/sh\n{settings} exec "{self.root}/usr/bin/{name}" "$@"\n')
            script.chmod(0o755)
        for _ in range(3):  # another process may take a port that was free
            self._configure()
            self._daemon("slurmctld", "slurmctld", "-D", "-c")
            for node in self.nodes:
                self._daemon(node, "slurmd", "-D", "-N", node, "-d", str(self.root / "usr/sbin/slurmstepd-wlm"))
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(subprocess.CalledProcessError):
                    if self.run("sinfo", "-h", "-N", "-p", "main,aside", "-o", "%T").split() == ["idle"] * len(
                        self.nodes
                    ):
                        return self
                time.sleep(0.1)
            self.stop()
        logs = "\n".join(f"{f.name}: {f.read_text()[-2000:]}" for f in self.folder.glob("*.log"))
        raise RuntimeError(f"Slurm did not come up in {self.folder}:\n{logs}")

    def _configure(self) -> None:
        ports = free_ports(1 + len(self.nodes))
        user = getpass.getuser()
        lines = [
            "ClusterName=loopback", "SlurmctldHost=localhost(127.0.0.1)", f"SlurmctldPort={ports[0]}",
            f"SlurmUser={user}", f"SlurmdUser={user}", "AuthType=auth/none", "CredType=cred/none",
            "AuthInfo=cred_expire=5",  # a requeued job waits for so long
            f"PluginDir={self.plugins}", f"StateSaveLocation={self.folder}/state", f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid", f"SlurmdPidFile={self.folder}/%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log", f"SlurmdLogFile={self.folder}/%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "ReturnToService=2",
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny", "SlurmdParameters=config_overrides",
            "SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0", "SchedulerType=sched/backfill",
            "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "KillWait=120", "MinJobAge=300", "JobRequeue=1",
            *(f"NodeName={n} NodeHostname=localhost NodeAddr=127.0.0.1 Port={p} CPUs=2 RealMemory=4000"
              for n, p in zip(self.nodes, ports[1:], strict=True)),
            "PartitionName=main Nodes=n[0-1] Default=YES PriorityTier=1 MaxTime=INFINITE State=UP",
            "PartitionName=urgent Nodes=n[0-1] PriorityTier=9 PreemptMode=off MaxTime=INFINITE State=UP",
            "PartitionName=aside Nodes=n2 MaxTime=INFINITE State=UP",
        ]  # fmt: skip
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _daemon(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"{name}.out").open("w") as out:
            process = subprocess.Popen(
                [str(self.root / "usr/sbin" / f"{program}-wlm"), *args], env={**os.environ, **self.own},
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        (self.folder / f"{name}.started").write_text(str(process.pid))

    def stop(self, daemons: str = "*") -> None:
        """Ends jobs and daemons (those whose name matches), by the ids they were started with."""
        if daemons == "*" and (self.folder / "slurmctld.started").exists():
            for options in (["--signal=KILL", "--full"], []):
                with contextlib.suppress(subprocess.SubprocessError):
                    self.run("timeout", "5", "scancel", "-u", getpass.getuser(), *options)
        for file in sorted(self.folder.glob(f"{daemons}.started")):
            pid = int(file.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                for _ in range(50):
                    if _dead(pid):
                        break
                    time.sleep(0.1)
                else:
                    os.kill(pid, signal.SIGKILL)
            file.unlink()

    def __enter__(self) -> Slurm:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _dead(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def main() -> None:
    folder = debian.REPO / ".venv" / "slurm" / "up"
    try:
        slurm = Slurm(folder)
    except (debian.NotDebian, RuntimeError) as e:
        sys.exit(f"error: {e}; next: install Slurm, or run the tests without it")
    match sys.argv[1:]:
        case ["up"]:
            slurm.stop()
            slurm.start()
            print(f"Slurm is up; next: export PATH={slurm.bin}:$PATH, then make train RECIPE=smoke CLUSTER=slurm")
        case ["down"]:
            slurm.stop()
        case _:
            sys.exit("usage: python tests/slurm.py up|down")


if __name__ == "__main__":
    main()
