"""Command lines: one way to state a run, one exit status for each kind of end, help everywhere."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import sft.__main__ as make_commands
from conftest import REPO
from patience import PATIENCE
from sft.common.errors import SftError
from sft.common.process import AGAIN, INTERRUPTED, TERMINATED, USAGE
from sft.runner.cli import COMMAND, RunOptions, parse_run, program, run_options

OTHERS = {"sft", "sft.launch.torchrun", "sft.runner.cli"}
"""What Make calls before the environment exists, torch's program, and an example in a docstring."""


def programs() -> Iterator[str]:
    """Everything that is run as a program in the environment."""
    for file in sorted([*(REPO / "stages").glob("*.py"), *(REPO / "lib" / "sft").rglob("*.py")]):
        if '__name__ == "__main__"' not in file.read_text():
            continue
        if file.parent.name == "stages":
            yield f"stages/{file.name}"
            continue
        name = ".".join(file.relative_to(REPO / "lib").with_suffix("").parts).removesuffix(".__main__")
        if name not in OTHERS:
            yield f"-m {name}"


PROGRAMS = list(programs())


def run(words: str, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    command = [sys.executable, *words.split(), *more]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)


def test_help_says_what_a_program_does_and_what_its_words_mean() -> None:
    done = run("stages/sync.py", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: stages/sync.py [OPTIONS] RUN [FIELD=VALUE]...")
    assert "--check" in done.stdout and "RUN is the folder of a run" in done.stdout


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy, for modules that are loaded already
@pytest.mark.parametrize("words", PROGRAMS)
def test_every_program_refuses_wrong_words_with_its_usage_and_the_next_command(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    name = words.removeprefix("-m ")
    monkeypatch.setattr(sys, "argv", [str(REPO / name), "--no-such-option"])
    try:
        with pytest.raises(SystemExit) as ended:  # in this process, which then imports torch once
            if name == words:
                runpy.run_path(str(REPO / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
    finally:
        for sent, handler in handlers.items():
            signal.signal(sent, handler)
    *usage, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == USAGE and any(line.startswith("Usage: ") for line in usage)
    assert re.fullmatch(r"\[[a-z-]+\] error: .*; next: .* --help", error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "words", "problem"),
    [
        ("sft.launch.agree", ["1"], "Missing option '--rank' (env var: 'SFT_NODE_RANK')"),
        ("sft.launch.interface", [], "Missing option '--rank' (env var: 'SFT_NODE_RANK')"),
        ("sft.launch.beaker.node_order", [], "Missing option '--rank' (env var: 'SFT_NODE_RANK')"),
        ("sft.evaluation.task_check", ["{"], "it is not JSON"),
        ("sft.evaluation.task_check", ['{"tasks": [], "data": {}}'], "cache, folder is missing"),
    ],
)
def test_what_launchers_and_the_doctor_must_give_is_named(
    name: str, words: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")
    assert ended.value.code == USAGE and problem in capsys.readouterr().err


def test_no_other_parser_is_left_in_the_environments_programs() -> None:
    files = [p for top in ("lib/sft", "stages") for p in (REPO / top).rglob("*.py")]
    assert [str(p) for p in files if "import argparse" in p.read_text()] == [str(REPO / "lib/sft/__main__.py")]
    readers = {str(p.relative_to(REPO / "lib/sft")) for p in files if "sys.argv[" in p.read_text()}
    before_the_environment, handed_on = {"__main__.py", "command.py"}, {"launch/run.py", "training/train.py"}
    assert readers == {"runner/cli.py"} | before_the_environment | handed_on


def test_a_run_is_stated_the_same_way_everywhere_and_options_may_stand_anywhere() -> None:
    wanted = RunOptions(Path("runs/x"), "c", "a:b", ("lr=1", "seed=2"))
    for words in ("runs/x --cluster c --data a:b lr=1 seed=2", "--data=a:b runs/x lr=1 --cluster c seed=2"):
        assert parse_run("train", words.split()) == wanted
    assert parse_run("train", ["runs/x"]) == RunOptions(Path("runs/x"))


@pytest.mark.parametrize("words", [[], ["x"], ["runs/x", "--clutser", "c"], ["runs/x", "--cluster"], [""]])
def test_wrong_words_of_a_run_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_run("train", words)
    assert ended.value.code == USAGE and "next: stages/train.sh --help" in capsys.readouterr().err


def test_the_folder_of_a_run_has_a_parent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_run("prepare", ["x"])
    assert "the folder of a run is <runs>/<run>, e.g. runs/x" in capsys.readouterr().err


def test_what_the_function_returns_is_the_exit_status_and_its_errors_are_one_message() -> None:
    @program("demo", "demo")
    @run_options
    @click.option("--broken", is_flag=True)
    def main(options: RunOptions, broken: bool) -> int:
        if broken:
            raise SftError("x: broken; next: fix it")
        return AGAIN

    assert main(["runs/x"]) == AGAIN
    with pytest.raises(SystemExit) as ended:
        main(["runs/x", "--broken"])
    assert ended.value.code == "[demo] error: x: broken; next: fix it"  # printed by Python, with status 1


def test_a_command_that_is_handed_on_keeps_its_words() -> None:
    found: list[str] = []

    @program("demo", "demo", settings=COMMAND)
    @click.argument("stage")
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    def main(stage: str, words: tuple[str, ...]) -> None:
        found[:] = words

    words = ["stages/x.py", "runs/x", "--cluster", "c", "--help", "a=-1", ""]
    assert main(["train", *words]) == 0 and found == words


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_ends_a_program_with_its_status_after_its_cleanup(tmp_path: Path, sent: int, status: int) -> None:
    code = (
        "import pathlib, sys, time\nfrom sft.runner.cli import program\n"
        "@program('demo', 'demo')\n"
        "def main():\n"
        "    try:\n        pathlib.Path('ready').touch()\n        time.sleep(60)\n"
        "    finally:\n        pathlib.Path('clean').touch()\n"
        "sys.exit(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(PATIENCE) == status and (tmp_path / "clean").exists()


def test_make_knows_the_variables_of_the_makefile() -> None:
    text = (REPO / "Makefile").read_text()
    used = set(re.findall(r"\$\((?:if |call quote,|or )?\$?\(?([A-Z_]{1,12})\)", text))
    own = {
        "GOALS",
        "STAGES",
        "PLAIN",
        "PLAN",
        "DIRS",
        "ARGS",
        "READY",
        "TOOLS",
        "PY",
        "BEFORE",
        "SFT",
        "CURDIR",
        "OTHER",
        "OWN",
    }
    own |= {"MAKE", "MAKECMDGOALS", "MAKEOVERRIDES", "PYTHONPATH"}
    assert used - own <= set(make_commands.MAKE_VARIABLES)


def test_the_command_of_a_group_is_the_prefix_of_its_errors(capsys: pytest.CaptureFixture[str]) -> None:
    @click.group()
    def group() -> None: ...

    @group.command("one")
    def one() -> None:
        raise SftError("broken; next: repair it")

    main = program("all", "programs.py")(group)
    with pytest.raises(SystemExit, match=r"^\[one\] error: broken; next: repair it$"):
        main(["one"])
    with pytest.raises(SystemExit, match="2"):
        main(["two"])
    assert "[all] error: No such command 'two'" in capsys.readouterr().err
