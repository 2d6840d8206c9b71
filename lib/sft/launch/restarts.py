"""Whether a training whose process was killed starts again: python -m sft.launch.restarts runs/<run> [--cluster C] [field=value …]

Exit status 0: again, from the last step; 1: no. It starts again `max_restarts` times ([on.<cluster>.train]) without a new step between, so that
a training that is killed at the same place does not go on for ever. train/.restarts has the step and the number.
"""

from __future__ import annotations

import sys

from sft.common.files import write_atomic
from sft.formats.steps import LATEST, RESTARTS, named_step
from sft.runner.cli import RunOptions, program, run_options


@program("train", "python -m sft.launch.restarts", signals=False)
@run_options
def main(options: RunOptions) -> int:
    """Counts a restart of the training of RUN. Exit status 1 where there were enough."""
    train = options.run / "train"
    most = options.load_recipe().hardware(options.cluster, "train").max_restarts
    step = named_step(train, LATEST)
    name = step.name if step else "step0"
    try:
        before, count = (train / RESTARTS).read_bytes().decode("latin-1").split()
        done = int(count) if before == name else 0
    except (OSError, ValueError):
        done = 0
    if done >= most:
        print(
            f"[train] error: a process was killed, {done} times since {name}; next: read train/logs, then run it again"
        )
        return 1
    write_atomic(train / RESTARTS, f"{name} {done + 1}\n".encode())
    print(f"[train] a process was killed; it starts again from {name}, {done + 1} of {most} times", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
