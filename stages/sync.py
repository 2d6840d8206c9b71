"""Puts the prepared dataset and the base weights where the cluster reads them; see sft.sync.sync.

python stages/sync.py runs/<run> [--cluster NAME] [--data FOLDERS] [field=value …]
python stages/sync.py runs/<run> --check …     copies nothing; exit status 0 if all files are there and identical
"""

import sys

import click

from sft.runner.cli import RunOptions, program, run_options
from sft.runner.stage import open_stage, run_stage
from sft.sync.sync import copy_inputs, sync


@program("sync", "stages/sync.py")
@run_options
@click.option("--check", is_flag=True, help="Copy nothing; report what is missing or different.")
def main(options: RunOptions, check: bool) -> None:
    """Puts the prepared dataset and the base weights on the cluster's storage, every file verified."""
    if not check:
        run_stage("sync", options, sync)
        return
    with open_stage("sync", options) as stage:
        remote, _ = copy_inputs(stage, check_only=True)
        stage.log(f"complete and identical: {len(remote.files)} files under {stage.storage}")


if __name__ == "__main__":
    sys.exit(main())
