#!/usr/bin/env python3
"""Prints conversations of a run's sources as they will be tokenised, trained tokens coloured; see sft.data.preview.

    python stages/preview.py runs/<run> [--source 2] [--row 17] [--cluster C] [--data ROOTS] [field=value …]

Sources and rows count from 1. Writes nothing but what a remote source's cache needs. Exit status 0, or 1 with a message.
"""

import argparse
import os
import sys

from sft.common.process import report_errors
from sft.data import sources
from sft.data.preparation import resolve_tokenizer
from sft.data.preview import preview
from sft.data.tokenize import Encoder
from sft.runner.stage import open_stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--source", default="")
    parser.add_argument("--row", default="")
    chosen, rest = parser.parse_known_args()
    colour = not os.environ.get("NO_COLOR") and (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR")))
    with report_errors("preview"), open_stage("prepare", rest, follower=True) as stage:
        table = stage.recipe.prepare
        encoder = Encoder(resolve_tokenizer(table.tokenizer, stage), table, stage.find)
        files = [sources.resolve(source, stage.find, stage.cache, log=stage.log) for source in table.sources]
        try:
            for line in preview(encoder, files, chosen.source, chosen.row, colour):
                print(line)
        except BrokenPipeError:  # | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
