"""A stage on this machine: env/local.sh runs/<run> <stage> COMMAND… replaces itself by COMMAND.

Signals therefore reach the stage, and the exit status is the stage's own. The `env` of a cluster with this launcher is set
for it. A stage that may use GPUs first locks each of them, machine-wide and for all users: another run that wants one of
the same GPUs waits and prints who holds it (GPU_WAIT=0: fails instead). The locks end with the last process of the stage.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.machine import visible_gpus
from sft.common.process import report_errors
from sft.launch.doctor import doctor
from sft.launch.doctor.context import RED, Context, Row, SchedulerAnswer
from sft.launch.launcher import Scheduler
from sft.recipe.schema import Cluster
from sft.runner.processes import requested_gpus

USES_GPUS = ("train", "evaluate")
SHARED = (Path("/run/lock"), Path("/tmp"))
"""Where locks go: the first folder that all users may write to and where none can remove another's file (sticky)."""
OWN_FOLDER = "set SFT_LOCKS to a folder of yours"


# --- what every launcher offers; see sft.launch.launcher --------------------------------------------------------------


def open_scheduler(folder: Path, cluster: Cluster) -> Scheduler:
    """Raises SftError: this machine has no scheduler."""
    raise SftError(
        f'{folder}: its cluster has launcher = "local", which has no jobs; next: name the CLUSTER of the job'
    )


def check(context: Context) -> Iterator[Row]:
    """Checks that this machine has the GPUs that its stages are planned for. It needs no scheduler."""
    found = len(visible_gpus())
    for stage in (s for s in context.stages if s in context.cluster.stages):
        planned = requested_gpus(stage, context.recipe.hardware(context.place.cluster, stage), context.cluster)
        if planned > found:
            yield Row(RED, "GPUs", f"{stage} is planned for {planned}, and this machine shows {found}",
                      f"correct gpus_per_node in {context.file}, or CUDA_VISIBLE_DEVICES")  # fmt: skip


def ask(context: Context) -> SchedulerAnswer:
    """Returns no row: there is no scheduler to ask."""
    return SchedulerAnswer()


# --- locks on GPUs ----------------------------------------------------------------------------------------------------


def lock_folder() -> tuple[Path, bool]:
    """(folder of this machine's locks, whether other users see it). Raises SftError for one that another user controls."""
    # Not XDG_RUNTIME_DIR: it goes with the last login session while a training runs on, and cron has none.
    for shared in SHARED if "SFT_LOCKS" not in os.environ else ():
        with contextlib.suppress(OSError):
            mode = shared.lstat().st_mode
            if stat.S_ISDIR(mode) and mode & stat.S_ISVTX and mode & stat.S_IWOTH:
                return shared, True
    folder = Path(os.environ.get("SFT_LOCKS") or f"/tmp/olmo-sft-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    # A folder for a group belongs to root or to this user. In a sticky one no user can replace another's lock.
    sticky = bool(found.st_mode & stat.S_ISVTX)
    if not stat.S_ISDIR(found.st_mode) or (found.st_uid != os.getuid() and not (sticky and found.st_uid == 0)):
        raise SftError(f"{folder}: not a folder of this user; next: remove it, or {OWN_FOLDER}")
    return folder, sticky


def open_lock(file: Path) -> int:
    """A descriptor of a lock's file, which every user may open. Follows no link. Raises SftError for any other kind of file."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = -1
    try:
        for _ in range(9):  # two users who start at once: one creates the file, the other opens it
            try:
                # No O_CREAT for an existing file: Linux refuses it for another user's file in a sticky folder.
                fd = os.open(file, os.O_RDWR | flags)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
                    os.fchmod(fd, 0o666)  # whatever the umask
            except PermissionError:  # created a moment ago, or protected: reading is enough for a lock
                fd = os.open(file, os.O_RDONLY | flags)
            if fd >= 0:
                break
        found = os.fstat(fd)
    except OSError as e:
        raise SftError(f"{file}: {e.strerror}; next: have its owner remove it, or {OWN_FOLDER}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise SftError(f"{file}: not a lock; next: have it removed, or {OWN_FOLDER}")
    return fd


def lock_gpus(gpus: Sequence[str], what: str, wait: bool) -> list[int]:
    """Locks every GPU. Returns the descriptors, which child processes inherit. `what` tells others who holds the lock.

    All runs lock in the same order, so that they cannot deadlock. Raises SftError naming the holder, unless it may wait.
    """
    if not gpus:
        return []
    held = []
    folder, shared = lock_folder()
    if not shared:
        say(f"warning: only this user sees the locks in {folder}: runs of other users are not waited for")
    for gpu in sorted(set(gpus)):
        safe = gpu if re.fullmatch(r"[A-Za-z0-9-]{1,80}", gpu) else hashlib.sha256(gpu.encode()).hexdigest()[:16]
        file = folder / f"olmo-sft-gpu-{safe}.lock"
        fd = open_lock(file)
        _lock_gpu(fd, file, gpu, wait)
        with contextlib.suppress(OSError):  # one that may only be read
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} of {user_name()}: {what}\n".encode(), 0)
        os.set_inheritable(fd, True)
        held.append(fd)
    return held


def _lock_gpu(fd: int, file: Path, gpu: str, wait: bool) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 200, 0).decode(errors="replace").strip()
        holder = re.sub(r"[^ -~]", "?", text) or "another process"  # any user may write there
        if not wait:
            raise SftError(f"{file}: GPU {gpu} is busy with {holder}; next: wait for it, stop it, or choose others with"
                           f" CUDA_VISIBLE_DEVICES") from None  # fmt: skip
        say(f"waiting for GPU {gpu}: busy with {holder}")
        fcntl.flock(fd, fcntl.LOCK_EX)


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"


def main(argv: Sequence[str]) -> int:
    """Checks the stage, locks its GPUs and becomes its command. Returns 0 for a dry run; raises SftError."""
    if len(argv) < 3:
        raise SftError("usage: env/local.sh runs/<run> <stage> COMMAND…")
    run, stage, *command = argv
    if os.environ.get("DRY_RUN"):
        print(shlex.join(command))
        return 0
    if os.environ.get("DETACH"):
        say(f"[{stage}] warning: DETACH is ignored on this machine, which has no scheduler")
    with report_errors(stage):
        if run in command:
            from sft.runner.cli import parse_run  # start-up: click is not there yet when the doctor loads a launcher

            options = parse_run(stage, command[command.index(run) :])
            cluster = options.place.load_cluster()
            if cluster.launcher == "local":  # otherwise this stage is one that the cluster leaves to this machine
                os.environ.update(cluster.env)
            doctor.require(options.place, options.load_recipe(), stage)
        if stage in USES_GPUS:
            lock_gpus(visible_gpus(), f"{stage} of {Path(run).absolute()}", os.environ.get("GPU_WAIT") != "0")
        os.execvp(command[0], command)
