"""A stage on this machine: env/local.sh runs/<run> <stage> COMMAND… becomes COMMAND, so that signals and the exit status are its own.

The `env` of a cluster without a scheduler is set for it.
A stage that may use GPUs first takes a lock on each of them, machine-wide and for all users: another run that wants one of
the same GPUs waits and is told who has it (GPU_WAIT=0: fails instead). The locks end with the last process of the stage.
DRY_RUN=<anything> prints the command instead. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import re
import shlex
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.common.machine import visible_gpus
from sft.common.process import report_errors
from sft.launch.doctor import doctor
from sft.runner import plan
from sft.runner.stage import parse

USES_GPUS = ("train", "evaluate")
SHARED = (Path("/run/lock"), Path("/tmp"))  # the first that all users may write to, and none of them spoil


def lock_folder() -> tuple[Path, bool]:
    """(folder of this machine's locks, whether other users see it). Raises SftError for one that another user controls."""
    # Not XDG_RUNTIME_DIR, which goes with the last login session while a training goes on, and which cron does not have.
    for shared in SHARED if "SFT_LOCKS" not in os.environ else ():
        with contextlib.suppress(OSError):
            mode = shared.lstat().st_mode
            if stat.S_ISDIR(mode) and mode & stat.S_ISVTX and mode & stat.S_IWOTH:
                return shared, True
    folder = Path(os.environ.get("SFT_LOCKS") or f"/tmp/olmo-sft-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    # A folder for a group is root's or this user's; in a sticky one nobody can replace another's lock.
    open_to_all = bool(found.st_mode & stat.S_ISVTX)
    if not stat.S_ISDIR(found.st_mode) or (found.st_uid != os.getuid() and not (open_to_all and found.st_uid == 0)):
        raise SftError(f"{folder}: not a folder of this user; next: remove it, or set SFT_LOCKS to a folder of yours")
    return folder, open_to_all


def open_lock(file: Path) -> int:
    """A descriptor of the lock's file, which anybody may open. Follows no link; raises SftError for what is no lock of ours."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = -1
    try:
        for _ in range(9):  # two users who begin at once: one makes it, the other opens it
            try:
                # Never O_CREAT on what is there: Linux refuses it for another user's file in a sticky folder.
                fd = os.open(file, os.O_RDWR | flags)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
                    os.fchmod(fd, 0o666)  # whatever the umask
            except PermissionError:  # its maker has just made it, or has a reason: a lock needs no more than reading
                fd = os.open(file, os.O_RDONLY | flags)
            if fd >= 0:
                break
        found = os.fstat(fd)
    except OSError as e:
        raise SftError(
            f"{file}: {e.strerror}; next: have it removed by its owner, or set SFT_LOCKS to a folder of yours"
        ) from None
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise SftError(f"{file}: not a lock; next: have it removed, or set SFT_LOCKS to a folder of yours")
    return fd


def take_gpus(gpus: Sequence[str], what: str, wait: bool) -> list[int]:
    """Locks every GPU, in one order for all so that nobody waits in a circle. Returns descriptors that children inherit.

    Raises SftError naming the holder, unless it may wait.
    """
    if not gpus:
        return []
    held = []
    folder, seen = lock_folder()
    if not seen:
        print(f"locks in {folder} are seen by this user alone: other users' runs are not waited for", flush=True)
    for gpu in sorted(set(gpus)):
        safe = gpu if re.fullmatch(r"[A-Za-z0-9-]{1,80}", gpu) else hashlib.sha256(gpu.encode()).hexdigest()[:16]
        file = folder / f"olmo-sft-gpu-{safe}.lock"
        fd = open_lock(file)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            holder = re.sub(r"[^ -~]", "?", holder) or "another process"  # anybody may write there
            if not wait:
                raise SftError(f"{file}: GPU {gpu} is busy with {holder}; next: wait for it, stop it, or choose others with"
                               f" CUDA_VISIBLE_DEVICES") from None  # fmt: skip
            print(f"waiting for GPU {gpu}: busy with {holder}", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # one that may only be read
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} of {user_name()}: {what}\n".encode(), 0)
        os.set_inheritable(fd, True)
        held.append(fd)
    return held


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"


def main(argv: Sequence[str]) -> None:
    if len(argv) < 3:
        sys.exit("usage: env/local.sh runs/<run> <stage> COMMAND…")
    run, stage, *command = argv
    if os.environ.get("DRY_RUN"):
        print(shlex.join(command))
        return
    if os.environ.get("DETACH"):
        print(f"[{stage}] DETACH has no meaning on this machine, only on a cluster with a scheduler", flush=True)
    with report_errors(stage):
        if run in command:
            args = parse(stage, command[command.index(run) :])
            place = plan.Place.parse(str(args.run.parent), args.data, args.cluster)
            cluster = place.load_cluster()
            if cluster.launcher == "local":  # else this stage is one that the cluster leaves to this machine
                os.environ.update(cluster.env)
            doctor.require(place, plan.load_run(place, args.run.name, args.overrides), stage)
        if stage in USES_GPUS:
            take_gpus(visible_gpus(), f"{stage} of {Path(run).absolute()}", os.environ.get("GPU_WAIT") != "0")
        os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
