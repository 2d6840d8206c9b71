"""python -m sft.reporting PAGE RUN…: writes the page that compares these runs. `make compare` and `make sweep` call it.

In: the runs' folders, and PAGE's name with .json in place of .html where it compares scores. Out: PAGE.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from sft.common.files import write_atomic
from sft.formats.comparison import Comparison
from sft.reporting import comparison, replies, trainings
from sft.reporting.page import document, part
from sft.runner.cli import program


def page(runs: Sequence[Path], scores: Comparison | None) -> str:
    """The page. Runs with scores stay in their order, the first one is the baseline; others come with the best first."""
    trained = trainings.compare(comparison.with_steps(runs)) if comparison.with_steps(runs) else None
    by_name = {t.name: t for t in trained.trainings} if trained else {}
    names = list(scores.runs) if scores else list(by_name)
    letters = dict(zip(names, trainings.letters(), strict=False))
    curves = [by_name[name] for name in names if name in by_name]
    options = scores.fields if scores else trained.options if trained else ()
    found = replies.side_by_side(runs)
    sections = {
        "Differences": part("differences", comparison.of_scores(scores)) if scores else "",
        "Trainings": part("table", trainings.HEAD, trainings.table(curves, letters)) if curves else "",
        "Curves": part("charts", trainings.over_each_other(curves)) if curves else "",
        "By source": part("table", ["source", *(f"#{letters[t.name]}" for t in curves)], rows) if (rows := trainings.sources(curves)) else "",
        "Replies": part("viewer", found) if found else "",
        "Options": part("options", comparison.option_rows(options), itertools.islice(letters.values(), len(names))),
    }  # fmt: skip
    title = f"{len(names)} trainings" if len(names) > 2 else " and ".join(names)
    facts = [(letters[name], f"{name} (the baseline)" if scores and name == names[0] else name) for name in names]
    return document(f"{', '.join(names[1:])} against {names[0]}" if scores else title, sections, facts=facts)


@program("compare", "python -m sft.reporting")
@click.argument("file", metavar="PAGE", type=click.Path(path_type=Path))
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(file: Path, runs: tuple[Path, ...]) -> None:
    """Writes the page that compares these runs."""
    scores = file.with_suffix(".json")
    write_atomic(file, page(runs, Comparison.read(scores) if scores.is_file() else None).encode())


if __name__ == "__main__":
    sys.exit(main())
