"""Prints conversations of a run's sources as they will be tokenized, trained tokens colored; see sft.data.preview.

    python stages/preview.py runs/<run> [--source 2] [--row 17] [--cluster NAME] [--data FOLDERS] [field=value …]

Sources and rows count from 1. It writes only the cache of remote sources. Exit status 0, or 1 with a message.
"""

import os
import sys

import click

from sft.common.process import until_reader_stops
from sft.data.preparation import resolve_tokenizer, with_added_tokens
from sft.data.preview import preview
from sft.data.tokenize import Encoder
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.stage import open_stage
from sft.sources import input_files


@program("preview", "stages/preview.py")
@run_options
@click.option("--source", default="", metavar="N", help="Show only the N-th source, counted from 1.")
@click.option("--row", default="", metavar="N", help="Show only the N-th row, counted from 1.")
def main(options: RunOptions, source: str, row: str) -> None:
    """Prints conversations as they will be tokenized, trained tokens colored."""
    color = not os.environ.get("NO_COLOR") and (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR")))
    with open_stage("prepare", options, follower=True) as stage, until_reader_stops():
        table = stage.recipe.prepare
        encoder = Encoder(with_added_tokens(resolve_tokenizer(table, stage), table, stage), table, stage.find)
        files = [input_files.resolve(s, stage.find, stage.cache, log=stage.log).files for s in table.sources]
        for line in preview(encoder, files, source, row, color):
            print(line)


if __name__ == "__main__":
    sys.exit(main())
