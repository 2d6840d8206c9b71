"""The learning-rate range test of a run (make lr-range RECIPE=x [LOW=1e-7 HIGH=1 STEPS=100]); see sft.training.lr_range.

python stages/lr_range.py [--low LR] [--high LR] [--steps N] runs/<run> [--cluster C] [--data FOLDERS] [field=value …]

Prints a suggested range and writes runs/<run>/lr-range/index.html. The train stage of the run is not touched.
"""

import sys

import click

from sft.reporting import lr_range as shown
from sft.runner.cli import RunOptions, program, run_options
from sft.training.lr_range import lr_range


@program("lr-range", "stages/lr_range.py")
@run_options
@click.option("--low", type=float, default=1e-7, show_default=True, help="The first rate.")
@click.option("--high", type=float, default=1.0, show_default=True, help="The last rate.")
@click.option("--steps", type=int, default=100, show_default=True, help="Steps between them.")
def main(options: RunOptions, low: float, high: float, steps: int) -> None:
    """Raises the learning rate from step to step and suggests a range, without touching the training of RUN."""
    found = lr_range(options, low, high, steps)
    if found is None:  # another rank
        return
    for line in (*shown.picture(found), found.line, f"page: {shown.write(options.run, found)}"):
        print(f"[lr-range] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
