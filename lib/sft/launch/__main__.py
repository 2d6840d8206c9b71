"""Runs a stage through a launcher: python -m sft.launch <launcher> runs/<run> <stage> COMMAND… (env/<launcher>.sh)"""

from __future__ import annotations

import os
import sys

import click

from sft.common import columns
from sft.launch import local, run
from sft.recipe import schema
from sft.runner.cli import COMMAND, program


@program("launch", "python -m sft.launch", signals=False, settings=COMMAND)
@click.argument("launcher", type=click.Choice(schema.LAUNCHERS), metavar="LAUNCHER")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="runs/RUN STAGE COMMAND...")
def main(launcher: str, words: tuple[str, ...]) -> int:
    """Runs COMMAND, which makes STAGE, on this machine (local), or as a job: submits it or finds it, and follows it."""
    if not os.environ.get("DRY_RUN"):
        print(columns.command([f"env/{launcher}.sh", *words], sys.stdout), flush=True)
    return local.main(words) if launcher == "local" else run.main(launcher, words)


if __name__ == "__main__":
    sys.exit(main())
