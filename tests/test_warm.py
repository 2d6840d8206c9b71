"""A forked Python is used as a new one is: what its asker has and sends reaches it, and it ends as its asker does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import REPO, Workspace
from patience import PATIENCE

pytestmark = pytest.mark.processes

SHOW = """
import atexit, json, os, resource, signal, sys
atexit.register(lambda: print("registered for the end"))
print(json.dumps([
    sys.argv, os.getcwd(), os.environ.get("OWN"), sys.stdin.read(), __name__, os.umask(0), resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, sorted(os.listdir("/proc/self/fd"))[:-1], sys.modules["__main__"].__dict__ is globals(),
    os.path.abspath(sys.path[0]), "beside" in sys.path[1], os.getpriority(os.PRIO_PROCESS, 0), sys.stdout.write_through,
]), flush=True)
match sys.argv[1]:
    case "error": raise ValueError("no luck")
    case "killed": os.kill(os.getpid(), signal.SIGKILL)
    case "text": sys.exit("an error as text")
    case code: sys.exit(int(code))
"""
WAIT = """
import pathlib, signal, sys, time
def note(number, _):
    print("got", number, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, note)
print("ready", flush=True)
for _ in range(9000):
    time.sleep(0.1)
    pathlib.Path("alive").touch()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/show.py").write_text(SHOW)
    (tmp_path / "programs/wait.py").write_text(WAIT)
    warm.write_python(tmp_path / "python", ("json",), path="beside")
    return tmp_path / "python"


@pytest.mark.parametrize("words", [["programs/show.py"], ["-m", "programs.show"], ["-u", "-m", "programs.show"]])
@pytest.mark.parametrize(
    ("how", "status"), [("0", 0), ("3", 3), ("error", 1), ("text", 1), ("killed", -signal.SIGKILL)]
)
def test_a_fork_shows_what_a_new_python_shows(python: Path, words: list[str], how: str, status: int) -> None:
    def prepare() -> None:
        os.umask(0o27)
        os.nice(1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def ran(program: list[str | Path]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OWN": "value", "PYTHONPATH": "beside"}
        return subprocess.run([*program, *words, how], cwd=python.parent, env=environment, input="typed", text=True,
                              capture_output=True, check=False, preexec_fn=prepare)  # fmt: skip

    fork, new = ran([python]), ran([sys.executable])
    assert (fork.stdout, fork.returncode) == (new.stdout, new.returncode) and fork.returncode == status
    assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def waiting(python: Path, **options: Any) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [python, "programs/wait.py"], cwd=python.parent, text=True, stdout=subprocess.PIPE, **options
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_signals_reach_the_fork_and_a_killed_asker_takes_it_along(python: Path) -> None:
    process = waiting(python)
    fork = int(Path(f"/proc/{process.pid}/comm").read_text().removeprefix("fork "))
    os.kill(fork, signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == f"got {signal.SIGTERM.value}\n" and process.returncode == 75
    process = waiting(python)
    process.kill()
    assert process.communicate(timeout=PATIENCE)[0] == ""  # the end of its output: the fork has gone
    (python.parent / "alive").unlink(missing_ok=True)
    time.sleep(0.3)
    assert not (python.parent / "alive").exists()


def test_other_starts_and_variables_that_packages_read_once_need_a_new_python(python: Path) -> None:
    def parent(*words: str, **variables: str) -> int:
        done = subprocess.run([python, *words], cwd=python.parent, env={**os.environ, **variables}, capture_output=True, text=True, check=True)  # fmt: skip
        return int(done.stdout)

    (python.parent / "parent.py").write_text("import os; print(os.getppid())")
    assert parent("-c", "import os; print(os.getppid())") == os.getpid()
    assert parent("parent.py") != os.getpid()
    assert parent("parent.py", NUMBA_NUM_THREADS="1") == os.getpid()
    assert parent("parent.py", KMP_INIT_AT_FORK="FALSE") != os.getpid()  # as scikit-learn sets it


OWN_CODE = """
import gc, json, pathlib, sys
imported = sorted(name for name in sys.modules if name.split(".")[0] == "sft")
import sft, sft.runner.plan
from sft.recipe import presets
gc.unfreeze()
paths = {str(found) for found in gc.get_objects() if isinstance(found, pathlib.PurePath)}
texts = {text for name in imported for text in vars(sys.modules[name]).values() if isinstance(text, str)}
print(json.dumps([imported, sorted(paths | texts), sft.__file__, str(sft.runner.plan.REPO), str(presets.TABLE)]))
"""


@pytest.mark.parametrize("packages", [warm.LIGHT, pytest.param(warm.HEAVY, marks=pytest.mark.slow)])
def test_a_fork_has_the_code_of_its_own_checkout(workspace: Workspace, packages: tuple[str, ...]) -> None:
    def shown() -> Any:
        done = subprocess.run([python, "own_code.py"], cwd=workspace.root, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    python = workspace.root / "python"
    warm.write_python(python, packages, path="lib")
    (workspace.root / "own_code.py").write_text(OWN_CODE)
    same, held, *named = shown()
    lib = workspace.root / "lib"
    assert "sft.launch.local" in same and named == [
        f"{lib}/sft/__init__.py",
        str(lib.parent),
        f"{lib}/sft/recipe/presets.json",
    ]
    # What an installation in this checkout says of itself names no code.
    ours = [name for name in held if name.startswith(f"{REPO}/") and "site-packages" not in name]
    assert [name for name in ours if not name.endswith(".egg-info")] == [str(warm.LIB)]
    plan = lib / "sft/runner/plan.py"
    os.utime(plan, (1, 1))
    assert shown()[0] == same  # a clone has other times
    assert plan.read_text().startswith('"""') and "." in plan.read_text().splitlines()[0]
    plan.write_text(
        plan.read_text().replace(".", "!", 1)
    )  # an edit in the first line of its docstring, which keeps the size
    edited, _, *named_then = shown()
    assert edited == [] and named_then == named
