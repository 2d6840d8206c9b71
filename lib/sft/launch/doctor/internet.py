"""The doctor's check of a cluster whose jobs reach no internet: what they would still fetch is named before a job is submitted.

In: the recipe's addresses, and what is here already. Out: rows of the table. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator

from sft.launch.doctor.context import NOTE, OK, RED, Context, Row
from sft.recipe import inputs
from sft.runner import plan

NLTK = "nltk_data/tokenizers/punkt_tab"


def internet(context: Context) -> Iterator[Row]:
    """A red row for each stage that would fetch something in a job; a note for what is recorded or scored otherwise."""
    cluster = context.cluster
    if cluster.launcher == "local" or cluster.internet:
        return
    states = plan.states(context.place, context.recipe)
    found = False
    for stage, addresses in fetched(context).items():
        runs_there = stage in cluster.stages and context.needs(stage)
        if addresses and runs_there and states[stage].stale:
            found = True
            left = ", ".join(f'"{s}"' for s in cluster.stages if s not in ("prepare", "sync"))
            then = (
                "name a folder on the cluster as MODEL"
                if stage in ("convert", "evaluate")
                else f"stages = [{left}] in {context.file}"
            )
            yield Row(
                RED,
                "internet",
                f"{stage} would fetch {', '.join(addresses)} in a job, and jobs reach no internet",
                then,
            )
    train = context.recipe.train
    for field in ("wandb_project", "comet_project"):
        if context.needs("train") and getattr(train, field):
            yield Row(
                NOTE,
                "internet",
                f"{field}: jobs record it offline, in the training folder",
                "send it from this machine afterwards",
            )
    if context.needs("evaluate") and _uses_ifeval(context) and not (plan.REPO / ".venv" / NLTK).is_dir():
        found = True
        yield Row(RED, "internet", "IFEval splits sentences with nltk's punkt_tab, which is not in .venv/nltk_data",
                  ".venv/bin/python -m nltk.downloader -d .venv/nltk_data punkt_tab")  # fmt: skip
    if not found:
        yield Row(
            OK,
            "internet",
            "jobs reach none, and need none: data, tokenizer, base and tasks' data are fetched before them",
        )


def fetched(context: Context) -> dict[str, list[str]]:
    """{stage: the remote addresses that it reads}. Tasks' data are fetched by the doctor and by the launch."""
    r = context.recipe
    named = {
        "prepare": [*(s.path for s in r.prepare.sources), r.prepare.tokenizer],
        "sync": [r.model.base, r.model.base_tokenizer],
        "convert": [r.convert.model],
    }
    return {stage: [p for p in dict.fromkeys(paths) if p and inputs.is_remote(p)] for stage, paths in named.items()}


def _uses_ifeval(context: Context) -> bool:
    options = context.recipe.evaluate
    return options.harness == "lm-eval" and any("ifeval" in name for name in options.tasks)
