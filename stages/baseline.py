"""Scores the base, or any model, under a recipe's tasks, template and sampling; see sft.evaluation.baseline.

    python stages/baseline.py runs/<run> [--model FOLDER|gs://…|hf://org/name] [--cluster C] [--data ROOTS] [field=value …]

In:  runs/<run>/prepare, [model] base or the model. Out: runs/<run>-baseline/evaluate.
"""

import sys

import click

from sft.common.process import report_errors
from sft.evaluation import baseline
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.stage import open_stage


@program("baseline", "stages/baseline.py")
@run_options
@click.option("--model", default="", metavar="MODEL", help="A Hugging Face folder, gs:// or hf://; empty = the base.")
def main(options: RunOptions, model: str) -> None:
    """Scores a model that no run has trained, for a comparison with one that is."""
    with report_errors("baseline"), open_stage("sync", options, follower=True) as stage:
        stage.log = lambda text: print(f"[baseline] {text}", flush=True)  # type: ignore[method-assign]
        folder = baseline.score(stage, model)
        stage.log(f"{folder / 'results.json'}; next: make compare A={folder.parent.name} B={stage.recipe.run}")


if __name__ == "__main__":
    sys.exit(main())
