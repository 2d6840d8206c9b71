"""Starts the process that evaluates checkpoints while training runs (stages/watch.py), and waits for its end.

Its standard input stays open as long as training runs. Closing it means that no more steps come.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from sft.common.machine import in_job
from sft.common.paths import REPO
from sft.runner.stage import Stage

STOP_S = 20
"""Seconds that the process has to end after SIGTERM."""


class Watcher:
    """The process. It has a low priority and log lines of its own."""

    def __init__(self, stage: Stage, argv: list[str]) -> None:
        ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in ranks}
        command = [sys.executable, str(REPO / "stages" / "watch.py"), *argv, "--until-end-of-input"]
        self.log = stage.log
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    def finish(self, stop: Callable[[], bool]) -> None:
        """Reports that no more steps come, and waits for the evaluation of the last ones, or until `stop` returns
        True."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        logged = False
        while (status := self.process.poll()) is None:
            if stop():
                self.stop()
                return
            if not logged:
                self.log("waiting for the evaluation of the last steps; make watch can finish it later")
                logged = True
            time.sleep(0.2)
        if status:
            self.log(f"warning: evaluation during training ended with status {status}; next: make watch, to try again")

    def stop(self) -> None:
        """Ends the process. The next attempt reuses the answers that it has so far."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_watcher(stage: Stage, argv: list[str]) -> Watcher | None:
    """Starts the process, if the recipe asks for one. In a job it starts only where no other job evaluates the checkpoints."""
    if not stage.recipe.evaluate.every:
        return None
    if in_job() and not {"SFT_STAGE_ADDRESS", "SFT_WATCH"} & os.environ.keys():
        stage.log("a separate job evaluates the checkpoints; next: make jobs, to see its state")
        return None
    return Watcher(stage, argv)
