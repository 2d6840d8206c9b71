"""Asks a server of tests/warm.py for a fork, and stands in for it: python -SE warm_client.py SOCKET PYTHON NAME WORDS…

It has few imports, because it starts instead of a Python that has many: _signal and _socket are signal and socket without their enumerations.
A new PYTHON starts where there can be no fork.
"""

import _signal as signal
import _socket as socket
import marshal
import os
import resource
import sys
from array import array

address, python, name, *words = sys.argv[1:]
FORWARDED = [getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "WINCH", "CONT")]
LIMITS = ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_DATA")


def start_new() -> None:
    os.execv(python, [python, *words])


def open_files() -> list[int]:
    """All but the one that lists them."""
    return [int(file) for file in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{file}")]


def whole(server: socket.socket) -> bytes:
    """An answer of four bytes."""
    answer = b""
    while len(answer) < 4:
        part = server.recv(4 - len(answer))
        if not part:
            os._exit(1)  # the server is gone, and the fork with it
        answer += part
    return answer


def main() -> None:
    unbuffered = words[:1] == ["-u"]  # as torchrun starts its ranks
    bare = words[unbuffered:][:2] == ["-S", "-m"]  # as make starts the planner
    given = words[unbuffered + bare :]
    if not given or (given[0].startswith("-") and given[0] != "-m"):
        start_new()
    files = open_files()
    early: list[int] = []
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    forwarded = [number for number in FORWARDED if number not in ignored]
    for number in forwarded:
        signal.signal(number, lambda number, _: early.append(number))
    umask = os.umask(0)
    os.umask(umask)
    asked = {
        "words": given, "bare": bare, "unbuffered": unbuffered or bool(os.environ.get("PYTHONUNBUFFERED")), "python": os.path.abspath(name),
        "folder": os.getcwd(), "environment": dict(os.environ), "files": files,
        "umask": umask, "limits": [resource.getrlimit(getattr(resource, limit)) for limit in LIMITS], "ignored": [int(n) for n in ignored],
        "cores": list(os.sched_getaffinity(0)), "priority": os.getpriority(os.PRIO_PROCESS, 0),
    }  # fmt: skip
    server = socket.socket(socket.AF_UNIX)
    server.connect("\0" + address)
    text = marshal.dumps(asked)
    server.sendmsg([len(text).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", files))])
    server.sendall(text)
    fork = int.from_bytes(whole(server), "little")
    if not fork:
        for number in forwarded:
            signal.signal(number, signal.SIG_DFL)
        for number in early:
            os.kill(os.getpid(), number)
        start_new()
    for number in forwarded:
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    for number in early:
        server.sendall(bytes([number]))
    for file in files:  # the fork has them: readers of its pipes must see when it closes them
        os.close(file)
    with open("/proc/self/comm", "w") as comm:
        comm.write(f"fork {fork}")
    status = whole(server)
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "little"))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
