"""python -m sft.training runs/<run> …: the train stage (`sft.training.train`), which remembers signals from its first moment.

Importing torch takes seconds. Without a handler, SIGTERM or SIGUSR1 would end the process in that time, and a scheduler would take it
for a failure.
"""

from __future__ import annotations

import signal
import sys

signals: list[int] = []


def note(signum: int, _: object) -> None:
    signals.append(signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGUSR1, note)
    from sft.training.train import main  # start-up: torch takes two seconds, and signals must be noted before

    sys.exit(main(signals=signals))
