"""What would stop a run on a cluster, found before a GPU is requested, in one table.

    make doctor RECIPE=olmo3-7b CLUSTER=ai2-jupiter     exit status 1 when a line is red

Each check is a function that returns rows (state, what, found, next command). The checks of the recipe and of this
machine's files take well under two seconds and ask no other machine; only `make doctor` asks a scheduler. Tasks of others than
this repository are imported once, with their data, by `make doctor` and before a launch. Launchers run
the same checks for their stage and refuse it on a red line. Standard library only, except for memory and hours: they need
NumPy and are skipped without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sft.common import columns
from sft.common.errors import SftError
from sft.common.strings import printable
from sft.launch.doctor import backend, cluster, environment, inputs, internet, tasks, training
from sft.launch.doctor.context import OK, RED, SKIPPED, Context, Row, SchedulerAnswer, load_checks, red
from sft.recipe import recipe, schema
from sft.runner import plan

Check = Callable[[Context], Iterator[Row]]
CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (inputs.data, ("prepare", "sync")),
    (inputs.eval_template, ("train", "convert")),
    (inputs.other_model, ("convert", "evaluate")),
    (inputs.model, ("prepare", "sync", "train")),
    (inputs.tokenizer, ("prepare", "sync", "train")),
    (inputs.storage, ("sync", "train")),
    (training.batch, ("train",)),
    (training.precision, ("train",)),
    (training.trained, ("train",)),
    (training.intervals, ("train",)),
    (training.unread, schema.STAGES),
    (training.memory, ("train",)),
    (training.hours, ("train",)),
    (training.disk, ("train",)),
    (cluster.scheduler, schema.STAGES),
    (environment.environment, schema.STAGES),
    (internet.internet, schema.STAGES),
    (cluster.evaluation, ("evaluate",)),
    (backend.backend, ("train", "evaluate")),
    (tasks.tasks, ("sync", "train", "evaluate")),
)
"""(check, the stages that it matters for), in the order of the table."""


def examine(context: Context, ask: bool = False) -> list[Row]:
    """The rows of every check that matters for the context's stages.

    With `ask`, the launcher also asks its scheduler. It is asked first, because the other checks use the type of the GPUs
    that it answers; its rows come last.
    """
    answer = SchedulerAnswer()
    if ask:
        try:
            answer = load_checks(context.cluster.launcher).ask(context)
        except ModuleNotFoundError as e:
            answer = SchedulerAnswer("", (_not_installed("scheduler", e),))
    context = context.with_gpu(answer.gpu)
    rows: list[Row] = []
    for check, stages in CHECKS:
        if context.needs(*stages):
            try:
                rows += list(check(context))
            except SftError as e:
                rows.append(red(check.__name__, e))
            except ModuleNotFoundError as e:
                rows.append(_not_installed(check.__name__, e))
    return [*rows, *answer.rows]


def _not_installed(what: str, e: ModuleNotFoundError) -> Row:
    return Row(SKIPPED, what, f"not checked: {e.name} is not installed", "make setup")


def table(rows: Sequence[Row], width: int = columns.WIDTH) -> str:
    """The rows as aligned lines of at most `width`. A row that is not OK has its next command below it."""
    longest = max((len(r.what) for r in rows), default=0)
    lines = []
    for r in rows:
        lines.append(columns.hanging(f"{r.state:4}  {r.what:{longest}}  ", printable(r.found), width))
        if r.next and r.state != OK:
            lines.append(columns.hanging(f"{'':4}  {'':{longest}}  ", f"next: {printable(r.next)}", width))
    return "\n".join(lines)


def require(place: plan.Place, r: recipe.Recipe, stage: str) -> None:
    """Checks a stage before a launcher starts it. Raises SftError with every red line."""
    found = [
        row for row in examine(Context(place, r, place.load_cluster(), (stage,), imports=True)) if row.state == RED
    ]
    if found:
        lines = "\n".join(f"{row.what}: {row.found}; next: {row.next}" for row in found)
        raise SftError(f"{lines}\nmake doctor RECIPE={r.name} CLUSTER={place.cluster} shows all checks")
