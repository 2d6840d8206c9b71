"""Shared parts of the tests: where real data may be, and a workspace in which the real Makefile drives tiny stages."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

import warm
from patience import PATIENCE
from sft.runner import plan

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait take the cores from other tests
os.environ.setdefault(
    "PYTHON", sys.executable
)  # what make plans with; a wrapper around python3 doubles the time of a start
# Images of Python often forbid bytecode. Every process of a test would then compile the whole library from its source.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
for _name in [n for n in os.environ if n.startswith("MAKE") or n == "MFLAGS"]:
    del os.environ[_name]  # `make test TESTS=…` gives its words to every make that a test calls
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a broken test
os.environ.setdefault("WANDB_MODE", "offline")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `make test &`: no process of a test could be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("SFT_SHARED_DATA", REPO.parent / "shared" / "data"))

# Workers take whole files, in this order: the files that take longest first. Of the first 21, every third one mostly waits.
LONGEST = (
    "test_slurm_sites", "test_soak", "test_smoke",
    "test_slurm_stages", "test_benchmarks_data", "test_kill",
    "test_sky", "test_make", "test_smollm2",
    "test_slurm", "test_model", "test_train",
    "test_bucket_runs", "test_context", "test_stage",
    "test_hang", "test_adamw8bit", "test_continue",
    "test_beaker", "test_core_trainer", "test_real_tokenizers",
    "test_beaker_evaluation", "test_watch", "test_plain", "test_memory", "test_real_templates", "test_saving", "test_uploads",
    "test_sync", "test_prepare", "test_prepare_runs", "test_forms", "test_columns",
    "test_checkpoint", "test_families", "test_olmo_core_steps", "test_stopping", "test_continuation", "test_references", "test_testbench",
    "test_s3", "test_pages", "test_fuzz", "test_fuzzed_formats", "test_fetch", "test_site",
)  # fmt: skip


UNTRACED = ("compile", "slow", "processes", "slurm")
"""Marks of tests whose work is in compilers, libraries and other processes, which coverage does not see. Tracing slows them."""
TRACED_CASES = 3
"""The first cases of a parametrized test take nearly all of its branches. Tracing makes Python code a third slower."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = Counter[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if cases[test] > TRACED_CASES or any(item.get_closest_marker(name) for name in UNTRACED):
            item.add_marker("no_cover")
    start = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: start.get(item.path.stem, len(LONGEST)))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are not a part of a test's name: those of gzip hold the time, and all workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Stops a redundant tracer. In a worker of xdist, pytest-cov 7.1 starts two tracers, pauses only the second one, and never stores what the
    first one traced."""
    plugin = session.config.pluginmanager.getplugin("_cov")
    if plugin and plugin.cov_controller and hasattr(session.config, "workerinput"):
        plugin.cov_controller.cov.stop()


def pytest_collection() -> None:
    gc.disable()  # half of the time would go into searching new modules for garbage


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests are no garbage later either
    gc.enable()
    gc.set_threshold(50_000, 50, 100)  # the usual 700 costs four percent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """pytest-cov traces fixtures also where it does not trace the test."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    coverage = plugin and plugin.cov_controller
    if not coverage or not item.get_closest_marker("no_cover"):
        return (yield)
    coverage.pause()
    try:
        return (yield)
    finally:
        coverage.resume()


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real tokenizer and GSM8K at {SHARED_DATA}; set SFT_SHARED_DATA")
    return SHARED_DATA


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synced dataset to train on."""
    from training import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def folder(tmp_path: Path, dataset: Path) -> Path:
    """A folder to train in, over that dataset."""
    from training import run_folder

    return run_folder(tmp_path, dataset)


def files(root: Path) -> dict[str, bytes]:
    """{relative path: content} of all files of a folder."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


STAGES = ["prepare", "sync", "train", "convert", "evaluate"]


class Workspace:
    """A copy of the repository's orchestration in a temporary folder; each stage is a few lines on the real runner."""

    template: ClassVar[Path]
    """What every workspace is a copy of. `cp` takes a third of the time of Python. The first one of a process makes it."""

    def __init__(self, root: Path):
        files, compiled = self.template / "files", self.template / "compiled"
        if not self.template.exists():
            self.root = files
            self._make(files)
            for folder in list(files.rglob("__pycache__")):
                moved = compiled / folder.relative_to(files)
                moved.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(moved)
        self.root = root
        # Python and numba replace compiled files, and never write into one: workspaces can share them.
        subprocess.run(["cp", "-a", f"{files}/.", root], check=True)  # keeps the times, by which compiled code is valid
        subprocess.run(["cp", "-al", f"{compiled}/.", root], check=True)

    def _make(self, root: Path) -> None:
        root.mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(REPO / name, root / name)
        # With what Python and numba have compiled, which is valid in a copy that keeps the times: numba takes ten seconds.
        unfinished = ("*.pyc.*", "*.tmp.*")
        shutil.copytree(REPO / "lib", root / "lib", ignore=shutil.ignore_patterns("*.egg-info", *unfinished))
        shutil.copytree(REPO / "env", root / "env")
        (root / "recipes" / "tasks").mkdir(parents=True)
        (root / "recipes" / "tok").mkdir()
        (root / "recipes" / "tok" / "tokenizer.json").write_text("{}")
        (root / "recipes" / "rows.jsonl").write_text('{"messages": []}\n')
        (root / "recipes" / "tasks" / "one.yaml").write_text("task: one\n")
        (root / "stages").mkdir()
        for stage in (*STAGES, "report"):
            self._stage(stage)
        self.recipe("x")
        venv = root / ".venv" / "bin"
        venv.mkdir(parents=True)
        self.use_light_python()
        warm.write_python(root / ".venv/bin/planner", warm.LIGHT)
        (root / ".venv" / f"ready-{plan.environment_digest()}").touch()  # its files are copies of the repository's

    def use_new_python(self) -> None:
        """A process of this workspace is a new Python."""
        (self.root / ".venv/bin/planner").unlink(missing_ok=True)
        python = self.root / ".venv/bin/python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH=lib exec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def use_light_python(self) -> None:
        """A process of this workspace is forked from one that has imported the runner and the launchers: tests/warm.py.

        Not in a job of Slurm, which ends the processes of its own tree, and a fork is in another one.
        """
        warm.write_python(self.root / ".venv/bin/python", warm.LIGHT, path="lib", unless="SLURM_JOB_ID")

    def use_python_with(self, *packages: str) -> None:
        """A process of this workspace is forked from one that has also imported these packages: clients of servers, or torch for a rendezvous."""
        warm.write_python(self.root / ".venv/bin/python", (*warm.LIGHT, *packages), path="lib", unless="SLURM_JOB_ID")

    def use_warm_python(self) -> None:
        """A process of this workspace is forked from one that has imported torch and other packages, which takes seconds: tests/warm.py."""
        warm.write_python(self.root / ".venv/bin/python", path="lib")

    def use_real_stages(self) -> None:
        """The repository's own stages."""
        shutil.rmtree(self.root / "stages")
        shutil.copytree(REPO / "stages", self.root / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        self.use_warm_python()

    def _stage(self, name: str) -> None:
        program = (
            "import json\nfrom sft.formats.remote import Remote, SyncMetrics\nfrom sft.runner.stage import Result, main\n"
            f"def body(stage):\n    open('log', 'a').write({name!r} + ' ' + stage.recipe.run + chr(10))\n"
            "    (stage.out / 'out').write_text(stage.identity)\n"
            "    metrics = {}\n"
            "    if stage.name == 'sync':\n"
            "        folder = stage.run / '..' / '.storage' / stage.recipe.run\n"
            "        folder.mkdir(parents=True, exist_ok=True)\n"
            "        (folder / 'manifest.json').write_bytes((stage.run / 'prepare' / 'manifest.json').read_bytes())\n"
            "        Remote(stage.recipe.run, None, ()).write(stage.out / 'remote.json')\n"
            "        metrics = SyncMetrics(stage.storage, str(folder), None, 0, 0).to_metrics()\n"
            "        return Result(['out', 'remote.json'], metrics)\n"
            "    return Result(['out'], metrics)\n"
            f"main({name!r}, body, shared={name == 'prepare'})\n"
        )
        (self.root / "stages" / f"{name}.py").write_text(program)
        if name == "train":
            (self.root / "stages" / "train.sh").write_text('#!/bin/sh\nexec .venv/bin/python stages/train.py "$@"\n')
            (self.root / "stages" / "train.sh").chmod(0o755)

    def recipe(self, name: str, old: str = "", new: str = "") -> Path:
        text = (
            '[model]\npreset = "olmo3-tiny"\n\n[prepare]\ntokenizer = "tok"\n[[prepare.sources]]\npath = "rows.jsonl"\n\n'
            '[train]\nseq_len = 512\nglobal_batch_tokens = 4096\nlr = 1e-3  # why\n\n[evaluate]\ntasks = ["one"]\n'
        )
        assert old in text
        file = self.root / "recipes" / f"{name}.toml"
        file.write_text(text.replace(old, new) if old else text)
        return file

    def python(self, code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": "lib"},
            text=True,
            check=True,
            capture_output=True,
        ).stdout

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, with the Python that make plans with: a new one where there is no environment."""
        planner = ".venv/bin/planner"
        return {**os.environ, **({"PYTHON": planner} if (self.root / planner).exists() else {})}

    def make(self, *args: str, ok: bool | None = True, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["make", *args], cwd=self.root, capture_output=True, text=True, timeout=timeout, env=self.environment
        )
        assert ok is None or (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    def copy_finished(self, runs: Path, last: str) -> None:
        """The state after `make LAST RECIPE=x`, copied from `runs`, in which all of STAGES were made."""
        subprocess.run(["cp", "-a", runs, self.root / "runs"], check=True)  # keeps the links of shared results
        for stage in STAGES[STAGES.index(last) + 1 :]:
            shutil.rmtree(self.root / "runs/x" / stage)

    def ran(self) -> list[str]:
        """The stages that ran since the last call, in order, as 'stage run'."""
        log = self.root / "log"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture(scope="session", autouse=True)
def _template(tmp_path_factory: pytest.TempPathFactory) -> None:
    Workspace.template = tmp_path_factory.mktemp("template") / "workspace"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs/ of a workspace in which recipe x is evaluated."""
    made = Workspace(tmp_path_factory.mktemp("finished"))
    made.make("evaluate", "RECIPE=x")
    return made.root / "runs"


@pytest.fixture
def finished(workspace: Workspace, finished_runs: Path) -> Callable[[str], None]:
    """finished("train") puts the workspace into the state after `make train RECIPE=x`, in milliseconds."""
    return partial(workspace.copy_finished, finished_runs)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 2 kB and workers for every one of them, so that a few hundred rows take the paths of a large file."""
    from sft.data import preparation
    from sft.sources import input_files

    monkeypatch.setattr(input_files, "MIN_CHUNK_BYTES", 2000)
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(preparation, "BYTES_PER_WORKER", 1)


@pytest.fixture
def no_encoding(monkeypatch):
    """Fails the test when anything is encoded."""

    from sft.data.chunks import EncodeChunk

    def refuse(self, job):
        raise AssertionError(f"{job.name} was encoded again")

    def arm():
        monkeypatch.setattr(EncodeChunk, "__call__", refuse)

    return arm
