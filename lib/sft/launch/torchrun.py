"""torchrun, for stages/train.sh: python -m sft.launch.torchrun <torchrun's arguments>

Schedulers and terminals signal every process of a job, and train.sh forwards the signal too. torchrun therefore gets it
twice, and its second call of the handler stops waiting for ranks that are saving. This module ignores all but the first. A
SIGTERM or SIGUSR1 that comes before torchrun can handle it exits with 75, which asks to be run again.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from sft.common.process import AGAIN, OUT_OF_MEMORY

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
KILLED = (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT)
"""Signals that no error of a recipe sends: memory, a GPU or a node has failed. The exit status is then 128 and the signal."""
if __name__ == "__main__":  # importing torch takes seconds, and no rank has begun: nothing is lost by starting again
    for early in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(early, lambda *_: os._exit(AGAIN))

from torch.distributed.elastic.multiprocessing import api  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.run import main  # noqa: E402

raise_in_agent = api._terminate_process_handler


def first_only(signum: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise_in_agent(signum, frame)


if __name__ == "__main__":
    api._terminate_process_handler = first_only
    try:
        main()
    except api.SignalException as e:  # instead of a traceback of thirty lines
        sys.exit(128 + e.sigval)
    except ChildFailedError as e:  # a rank that was killed, or had too little memory, has made the others fail
        if any(f.exitcode == OUT_OF_MEMORY for f in e.failures.values()):
            sys.exit(OUT_OF_MEMORY)
        killed = [f for f in e.failures.values() if -f.exitcode in KILLED]
        if not killed:
            raise
        sys.exit(128 - killed[0].exitcode)
