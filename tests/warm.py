"""A Python that has imported packages already: its processes are forked from a server, and start in milliseconds.

    warm.write_python(file, PACKAGES)     `file` is used as .venv/bin/python; the server of PACKAGES starts with the first such file

`python [-u] [-S] -m module …` and `python [-u] program.py …` are forked from the server. Everything else, such as `-c` and other options,
starts a new Python. The server has also imported much of this project's code, from this checkout. A fork whose own checkout has the same files
uses these modules, and they then name the fork's checkout (`Code.move`). Any other fork imports its own code.

A fork has the arguments, folder, environment, open files, umask, limits, cores and priority of the process that asked for it. That process
forwards its signals, and ends as the fork does. A fork whose asker is killed is killed too, with its process group. Variables that packages
read at their import (READ_ONCE) must be the server's: a process with others starts a new Python.

What a fork cannot show: the process id of the asker is not the fork's, so SIGSTOP does not stop it, /proc has other words for it, and
it is in another tree of processes than its asker. The name of the asker in /proc/PID/comm is `fork N`, where N is the fork's process id.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import marshal
import os
import random
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

LIGHT = (
    "click", "csv", "ctypes", "decimal", "email.parser", "importlib.metadata", "multiprocessing", "statistics", "tarfile", "tomllib",
    "urllib.request", "uuid", "yaml", "sft.__main__", "sft.launch.__main__", "sft.launch.commands", "sft.runner.stage",
)  # fmt: skip
"""What the planner, launchers, a stage without work and stand-ins of commands import: standard library, click, yaml, and this project's code."""
HEAVY = (
    *LIGHT,
    "concurrent.futures.thread", "multiprocessing.pool",
    "numpy", "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.run", "torch._dynamo", "torch.nn.attention.varlen", "torch.utils.flop_counter", "torchao", "torchao.prototype.mx_formats",
    "boto3", "fsspec.implementations.local", "google.cloud.storage", "google_crc32c", "httpcore", "httpx", "jinja2.sandbox", "numba", "obstore", "orjson", "pandas",
    "PIL.Image", "pyarrow.parquet", "regex", "requests", "sacrebleu", "safetensors.torch", "scipy.stats", "sympy", "xxhash",
    "sft.evaluation.evaluate", "sft.export.convert", "sft.reporting.report", "sft.training.train", "sft.training.watcher",
)  # fmt: skip
"""What stages import. Hugging Face's packages are left out: they read variables at their import that stages set before it."""
READ_ONCE = ("KMP_", "LD_PRELOAD", "MKL_", "NUMBA_", "PYTHON")
TAKEN = ("PYTHON", "PYTHONPATH", "PYTHONUNBUFFERED", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
"""Variables that a fork takes from its asker, although READ_ONCE names them. scikit-learn sets the last two in each process that imports it."""
LIB = Path(__file__).resolve().parents[1] / "lib"
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = [
    getattr(resource, name) for name in ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_DATA")
]


def read_once(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_ONCE) and name not in TAKEN}


# --- the tests' end ---------------------------------------------------------------------------------------------------


def write_python(file: Path, packages: Sequence[str] = HEAVY, path: str = "", unless: str = "") -> None:
    """Writes the program. `path`: the PYTHONPATH that it sets. `unless`: a variable of processes that are new Pythons."""
    words = [
        sys.executable,
        "-SE",
        str(Path(__file__).with_name("warm_client.py")),
        _server(tuple(packages)),
        sys.executable,
    ]
    setting = f"PYTHONPATH={path} " if path else ""
    new = f'[ -z "${unless}" ] || {setting}exec {sys.executable} "$@"\n' if unless else ""
    file.write_text(f'#!/bin/sh\n{new}{setting}exec {" ".join(words)} "$0" "$@"\n')
    file.chmod(0o755)


@functools.cache
def _server(packages: tuple[str, ...]) -> str:
    """Starts the server of some packages; it ends with this process. Returns the address of its socket, which no folder has."""
    address = f"warm-{os.getpid()}-{random.SystemRandom().getrandbits(64):x}"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("\0" + address)
    listening.listen(64)
    code = f"import warm; warm.serve({listening.fileno()}, {packages!r})"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if "sft.launch.agree" in packages:  # it sets the variable before it imports torch, which reads it then
        environment["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    command = [sys.executable, "-c", f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; {code}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd="/", pass_fds=[listening.fileno()], start_new_session=True)  # fmt: skip
    _servers.append(process)  # its standard input stays open as long as this process lives
    listening.close()
    return address


_servers: list[subprocess.Popen[bytes]] = []

# --- the server -------------------------------------------------------------------------------------------------------


def serve(listening: int, packages: Sequence[str]) -> None:
    """Forks a process for each connection, and answers with its status, until standard input ends."""
    import gc

    sys.path.insert(0, str(LIB))
    for name in packages:
        importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules, "forks import Hugging Face's packages themselves"
    del sys.path[:2]
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch takes its operators out of its table, one by one, in a process that ends
    code = Code()
    gc.collect()
    gc.freeze()
    forks = Forks(socket.socket(fileno=listening), code)
    try:
        forks.serve()
    except BaseException:
        traceback.print_exc()
        forks.end()


class Code:
    """This project's modules in the server, and the files that they were read from."""

    def __init__(self) -> None:
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "sft"]
        self.modules = [module for module in modules if module.__file__]
        files = [Path(module.__file__ or "") for module in self.modules]
        self.files = {file.relative_to(LIB): (_stamp(file), file.read_bytes()) for file in files}

    def take(self, lib: Path) -> None:
        """In the fork: the modules become those of `lib`, or are forgotten where `lib` has other files."""
        if lib == LIB:
            return
        if "SFT_PROJECT" not in os.environ and lib.resolve() == lib and self.is_in(lib):
            self.move(lib.parent)
        else:
            for name in [name for name in sys.modules if name.split(".")[0] == "sft"]:
                del sys.modules[name]

    def is_in(self, lib: Path) -> bool:
        """A copy has the time of its original, and a clone the content alone."""
        for file, (stamp, content) in self.files.items():
            found = _stamp(lib / file)
            if found != stamp and (found[0] != stamp[0] or (lib / file).read_bytes() != content):
                return False
        return True

    def move(self, root: Path) -> None:
        """Files and folders of the server's checkout that the modules hold become those of `root`."""
        old = str(LIB.parent)

        def moved(value: Any) -> Any:
            if isinstance(value, Path) and value.is_relative_to(old):
                return root / value.relative_to(old)
            if isinstance(value, str) and value.startswith(old + "/"):
                return f"{root}{value.removeprefix(old)}"
            return tuple(moved(part) for part in value) if type(value) is tuple else value

        for module in self.modules:
            values = vars(module)
            for holder in (values, vars(module.__spec__), vars(module.__loader__)):
                for name, value in list(holder.items()):
                    holder[name] = moved(value)
            for value in values.values():
                if isinstance(value, types.FunctionType) and value.__defaults__:
                    value.__defaults__ = moved(value.__defaults__)
            if path := values.get("__path__"):
                path[:] = map(moved, path)


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


class Forks:
    """The server's loop. `children`: the asker's connection of each process."""

    def __init__(self, listening: socket.socket, code: Code) -> None:
        self.listening, self.code, self.selector = listening, code, selectors.DefaultSelector()
        self.environment = read_once(dict(os.environ))
        self.children: dict[int, socket.socket] = {}

    def serve(self) -> None:
        self.selector.register(self.listening, selectors.EVENT_READ, self.accept)
        self.selector.register(0, selectors.EVENT_READ, self.end)
        while True:
            for key, _ in self.selector.select():
                if self.selector.get_map().get(key.fd) is key:  # not forgotten a moment ago
                    key.data()

    def end(self) -> NoReturn:
        for child in self.children:
            _kill_group(child)
        os._exit(0)

    def accept(self) -> None:
        asker, _ = self.listening.accept()
        with contextlib.suppress(ConnectionError, EOFError, ValueError):  # killed while it asked
            asked, files = _receive(asker)
            if read_once(asked["environment"]) != self.environment:
                asker.sendall(bytes(4))
                asker.close()
            elif child := os.fork():
                self.children[child] = asker
                ended = os.pidfd_open(child)
                self.selector.register(asker, selectors.EVENT_READ, functools.partial(self.forward, asker, child))
                self.selector.register(ended, selectors.EVENT_READ, functools.partial(self.answer, asker, child, ended))
                asker.sendall(child.to_bytes(4, "little"))
            else:
                try:
                    asker.close()  # not later, when its number is that of another file
                    self.become(asked, files)
                    _run(asked["words"], asked["unbuffered"], asked["bare"], self.code)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            for file in files:
                os.close(file)

    def forward(self, asker: socket.socket, child: int) -> None:
        """Signals that came to the asker, a byte each. The end of the connection is the asker's."""
        numbers = b""
        with contextlib.suppress(ConnectionError):
            numbers = asker.recv(64)
        if not numbers:
            self.selector.unregister(asker)
            _kill_group(child)
        for number in numbers:
            os.kill(child, number)

    def answer(self, asker: socket.socket, child: int, ended: int) -> None:
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ConnectionError):
            asker.sendall(status.to_bytes(4, "little"))
        with contextlib.suppress(KeyError):
            self.selector.unregister(asker)
        self.selector.unregister(ended)
        os.close(ended)
        self.children.pop(child).close()

    def become(self, asked: dict[str, Any], files: list[int]) -> None:
        """In the fork: takes the asker's place."""
        self.selector.close()
        self.listening.close()
        for connection in self.children.values():
            connection.close()
        os.setsid()
        _take_files(asked["files"], files)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.umask(asked["umask"])
        for name, limit in zip(LIMITS, asked["limits"], strict=True):
            resource.setrlimit(name, limit)
        os.sched_setaffinity(0, asked["cores"])
        os.setpriority(os.PRIO_PROCESS, 0, asked["priority"])
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else signal.SIG_DFL)
        signal.signal(
            signal.SIGINT, signal.SIG_IGN if signal.SIGINT in asked["ignored"] else signal.default_int_handler
        )
        time.tzset()
        random.seed()
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(asked["cores"])))
        sys.executable = asked["python"]


def _receive(asker: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, files, _, _ = socket.recv_fds(asker, 8, 250)
    size, text = int.from_bytes(head, "little"), b""
    while len(text) < size:
        if not (part := asker.recv(size - len(text))):
            raise EOFError
        text += part
    return marshal.loads(text), files


def _take_files(numbers: list[int], files: list[int]) -> None:
    """Gives the files the numbers that they have in the asker, and closes all others."""
    high = [os.dup(file) for file in files]
    while any(file <= max(numbers, default=0) for file in high):  # out of the way of the numbers
        high = [os.dup(file) if file <= max(numbers) else file for file in high]
    for number, file in zip(numbers, high, strict=True):
        os.dup2(file, number)
    for file in map(int, os.listdir("/proc/self/fd")):
        if file not in numbers and os.path.exists(f"/proc/self/fd/{file}"):
            with contextlib.suppress(OSError):
                os.close(file)


def _kill_group(child: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)


def _streams(unbuffered: bool) -> None:
    """Standard input, output and error as Python opens them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None  # of a closed file
        with contextlib.suppress(OSError):
            file = open(number, "wb" if number else "rb", 0 if unbuffered and number else -1, closefd=False)  # noqa: SIM115
            stream = io.TextIOWrapper(
                file,
                "utf-8",
                "backslashreplace" if name == "stderr" else "strict",
                line_buffering=name == "stderr" or os.isatty(number),
                write_through=unbuffered,
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run(words: list[str], unbuffered: bool, bare: bool, code: Code) -> NoReturn:
    """Runs `-m module …` or `program …` as the main module. `bare`: without installed packages (-S)."""
    _streams(unbuffered)
    if bare:
        sys.path = [entry for entry in sys.path if not entry.endswith("-packages")]
    added = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = added
    if code.modules:
        code.take(next((Path(entry) for entry in added if (Path(entry) / "sft").is_dir()), Path("nowhere")))
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    status = 0
    try:
        if words[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = ["-m", *words[2:]]
            for name in (words[1], f"{words[1]}.__main__"):
                if not hasattr(sys.modules.get(name), "__path__"):
                    sys.modules.pop(name, None)  # it is __main__ now
            runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
            main.__dict__.update(__file__=words[0], __builtins__=__builtins__)
            exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)
    except SystemExit as end:
        status = _status(end)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        status = 1
    _exit(status)


def _exit(status: int) -> NoReturn:
    """Waits for threads and runs what is registered for the end. Python's own end would also take all that was imported apart, for 0.4 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def _status(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return int(end.code or 0) & 255
    print(end.code, file=sys.stderr)
    return 1
