"""The dataset of a run as a folder for OLMo-core's own training scripts; see sft.export.olmo_core_dataset.

    python stages/export.py runs/<run> DST

Refuses a dataset whose documents OLMo-core would split differently, and a DST that exists. Exit status 0, or 1 with a message.
"""

import sys
from pathlib import Path

import click

from sft.common.columns import say
from sft.common.errors import SftError
from sft.export.olmo_core_dataset import olmo_core_export
from sft.runner.cli import program


@program("export", "stages/export.py")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("dst", required=False, default="")
def main(run: Path, dst: str) -> None:
    """Writes the prepared dataset of RUN into the new folder DST, for OLMo-core."""
    if not dst:
        raise SftError("DST= is missing; next: make export RECIPE=x DST=folder")
    size = olmo_core_export(run / "prepare", Path(dst))
    say(f"[export] {dst}: {size:,} bytes for OLMo-core")


if __name__ == "__main__":
    sys.exit(main())
