"""Evaluates the checkpoints of a run as training keeps them; see sft.evaluation.watch.

    python stages/watch.py [--until-end-of-input | --beside JOB] runs/<run> [--cluster C] [--data ROOTS] [field=value …]

In:  runs/<run>/train/stepN. Out: runs/<run>/train/evaluations.jsonl, BEST. Ends when training is done and its last kept
step is evaluated: when it is published, when it closes standard input, or when the job JOB that trains has ended. Exit status 0,
75 when a scheduler says that its time is up (run it again), or 1 with a message.
"""

import argparse
import contextlib
import os
import signal
import sys
import time

from sft.common.errors import SftError
from sft.common.locks import lock
from sft.common.process import report_errors
from sft.evaluation import watch
from sft.launch import watched
from sft.runner import plan
from sft.runner.stage import open_stage, parse

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--until-end-of-input", action="store_true")
    parser.add_argument("--beside", default="")
    how, rest = parser.parse_known_args()
    ended = watch.end_of_input() if how.until_end_of_input else lambda: False
    with report_errors("watch"), contextlib.ExitStack() as stack:
        if how.beside:
            args = parse("watch", rest)
            cluster = plan.Place.parse(str(args.run.parent), args.data, args.cluster).load_cluster()
            ended = watched.job_ended(cluster, args.run / ".jobs", how.beside)
        while True:
            try:
                stage = stack.enter_context(open_stage("train", rest, follower=True))
                break
            except SftError:  # training, which starts at the same time, brings what it is made from
                if not how.beside or ended():
                    raise
                time.sleep(watch.PAUSE)
        stage.log = lambda text: print(f"[watch] {text}", flush=True)  # type: ignore[method-assign]
        options, published = stage.recipe.evaluate, watch.trained(stage)
        if not options.every:
            raise SftError("[evaluate] every = 0: no step is asked for; next: make watch … every=1000")
        if options.every_device != "cuda" and not how.beside:  # a job of its own sees the GPU that was asked for it
            os.environ["CUDA_VISIBLE_DEVICES"] = options.every_device.partition(":")[2]
        os.nice(19)  # training comes first
        stack.enter_context(lock(stage.run / ".work" / "watch.lock", wait=True))
        watch.watch(stage, lambda: ended() or (not how.until_end_of_input and published()))
