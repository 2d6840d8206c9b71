"""How many processes a stage runs on a machine: python -m sft.launch.processes train runs/<run> [--cluster C] [field=value …]

Prints `<processes> <threads per process>` for stages/train.sh, after checking the GPUs and the batch arithmetic.
"""

from __future__ import annotations

import sys

import click

from sft.common.machine import visible_gpus
from sft.recipe import schema
from sft.runner.bases import find_base
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.processes import processes, requested_gpus


@program("train", "python -m sft.launch.processes")
@click.argument("stage", type=click.Choice(schema.STAGES), metavar="STAGE")
@run_options
def main(options: RunOptions, stage: str) -> None:
    """Prints the number of processes of STAGE on each machine and the threads of each."""
    recipe, cluster = options.load_recipe(), options.place.load_cluster()
    hardware = recipe.hardware(options.cluster, stage)
    requested = requested_gpus(stage, hardware, cluster)
    if requested or visible_gpus():
        from sft.model.gpus import check_gpus  # start-up: torch, not needed without GPUs

        check_gpus(requested, cluster, f"env/{options.cluster}.toml")
    if (options.run / "prepare" / "data").is_dir():  # numbers that cannot work are reported before a process starts
        from sft.packing.arithmetic import check  # start-up: numpy and numba, not needed without data

        base = find_base(options.place.roots, options.run, recipe)
        check(options.run / "prepare", recipe, hardware, cluster, base, options.place.runs)
    print(*processes(hardware, cluster))


if __name__ == "__main__":
    sys.exit(main())
