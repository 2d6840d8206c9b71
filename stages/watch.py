"""Evaluates the checkpoints of a run as training keeps them; see sft.evaluation.watch.

    python stages/watch.py [--until-end-of-input | --beside JOB] runs/<run> [--cluster C] [--data ROOTS] [field=value …]

In:  runs/<run>/train/stepN. Out: runs/<run>/train/evaluations.jsonl, BEST. Ends when training is done and its last kept
step is evaluated: when it is published, when it closes standard input, or when the job JOB that trains has ended. Exit status 0,
75 when a scheduler says that its time is up (run it again), or 1 with a message.
"""

import contextlib
import os
import signal
import sys
import time

import click

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.locks import lock
from sft.common.process import AGAIN
from sft.evaluation import watch
from sft.launch import watched
from sft.runner import references
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.stage import open_stage


@program("watch", "stages/watch.py")
@run_options
@click.option("--until-end-of-input", is_flag=True, help="End when standard input closes: training has ended.")
@click.option("--beside", default="", metavar="JOB", help="End when this job, which trains, has ended.")
def main(options: RunOptions, until_end_of_input: bool, beside: str) -> None:
    """Evaluates the checkpoints of a run as training keeps them."""
    if references.owner(options.run / "train") != options.run.name:
        raise SftError(
            f"{options.run / 'train'} is that of another run; next: make watch for {references.owner(options.run / 'train')}"
        )
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(AGAIN))
    ended = watch.end_of_input() if until_end_of_input else lambda: False
    with contextlib.ExitStack() as stack:
        if beside:
            ended = watched.job_ended(options.place.load_cluster(), options.run / ".jobs", beside)
        while True:
            try:
                stage = stack.enter_context(open_stage("train", options, follower=True))
                break
            except SftError:  # training starts at the same time and makes its inputs available
                if not beside or ended():
                    raise
                time.sleep(watch.PAUSE)
        stage.log = lambda text: say(f"[watch] {text}")  # type: ignore[method-assign]
        evaluate, published = stage.recipe.evaluate, watch.trained(stage)
        if not evaluate.every:
            raise SftError("[evaluate] every = 0: no step is due for evaluation; next: make watch … every=1000")
        if evaluate.every_device != "cuda" and not beside:  # a job of its own sees only the GPU that it asked for
            os.environ["CUDA_VISIBLE_DEVICES"] = evaluate.every_device.partition(":")[2]
        os.nice(19)  # training comes first
        stack.enter_context(lock(stage.run / ".work" / "watch.lock", wait=True))
        watch.watch(stage, lambda: ended() or (not until_end_of_input and published()))


if __name__ == "__main__":
    sys.exit(main())
