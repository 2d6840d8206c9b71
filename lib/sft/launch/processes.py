"""How many processes a stage runs on a machine: python -m sft.launch.processes train runs/<run> [--cluster C] [field=value …]

Prints `<processes> <threads per process>` for stages/train.sh, once the batch arithmetic is known to work out.
"""

from __future__ import annotations

import sys

from sft.common.process import report_errors
from sft.runner import plan
from sft.runner.processes import processes
from sft.runner.stage import parse


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python -m sft.launch.processes train runs/<run> [--cluster C] [field=value …]")
    name = sys.argv[1]
    with report_errors(name):
        args = parse(name, sys.argv[2:])
        place = plan.Place.parse(str(args.run.parent), args.data, args.cluster)
        recipe = plan.load_run(place, args.run.name, args.overrides)
        hardware = recipe.hardware(place.cluster, name)
        if (args.run / "prepare" / "data").is_dir():  # what the numbers make impossible is told before a process starts
            from sft.packing.arithmetic import check

            check(args.run / "prepare", recipe, hardware, place.load_cluster())
        print(*processes(hardware, place.load_cluster()))


if __name__ == "__main__":
    main()
