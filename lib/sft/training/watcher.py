"""TODO sft.training.companion"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sft.common.machine import in_job
from sft.runner import plan

if TYPE_CHECKING:
    from sft.runner.stage import Stage


class Watcher:
    """The process that training starts: low priority, its own log lines, never in training's way."""

    def __init__(self, stage: Stage, argv: list[str]) -> None:
        ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in ranks}
        command = [sys.executable, str(plan.REPO / "stages" / "watch.py"), *argv, "--until-end-of-input"]
        self.log = stage.log
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    def finish(self, stop: Callable[[], bool]) -> None:
        """Tells it that no more steps come and waits for the last one, unless `stop` says that there is no time."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        told = False
        while (status := self.process.poll()) is None:
            if stop():
                self.stop()
                return
            if not told:
                self.log("waiting for the evaluation of the last steps; they can be finished later with make watch")
                told = True
            time.sleep(0.2)
        if status:
            self.log(
                f"warning: evaluating during training ended with status {status}; next: make watch, to try it again"
            )

    def stop(self) -> None:
        """Ends it; what it has answered so far is kept for the next attempt."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_watcher(stage: Stage, argv: list[str]) -> Watcher | None:
    """The watcher of a run that asks for one. A launcher submits it as a job of its own, unless no other job sees the checkpoints."""
    if not stage.recipe.evaluate.every:
        return None
    if in_job() and "SFT_STAGE_ADDRESS" not in os.environ:
        stage.log("checkpoints are evaluated by a job of their own: make jobs tells its state")
        return None
    return Watcher(stage, argv)
