"""Trains one batch of a run until its loss is near 0 (make overfit RECIPE=x [BOUND=0.1 STEPS=200]); see sft.training.overfit.

python stages/overfit.py [--bound LOSS] [--steps N] runs/<run> [--cluster C] [--data FOLDERS] [field=value …]

Exit status 1, with the reason, where the loss does not fall below the bound. The train stage of the run is not touched.
"""

import sys

import click

from sft.runner.cli import RunOptions, program, run_options
from sft.training.overfit import overfit


@program("overfit", "stages/overfit.py")
@run_options
@click.option("--bound", type=float, default=0.1, show_default=True, help="The loss to reach, in nats a token.")
@click.option("--steps", type=int, default=200, show_default=True, help="At most so many steps.")
def main(options: RunOptions, bound: float, steps: int) -> None:
    """Trains one batch of RUN to a loss near 0, to see whether mask, loss and optimizer work."""
    overfit(options, bound, steps)


if __name__ == "__main__":
    sys.exit(main())
