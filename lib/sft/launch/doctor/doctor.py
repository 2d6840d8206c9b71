"""What would stop a run on a cluster, found before a GPU is asked for, in one table.

    make doctor RECIPE=olmo3-7b CLUSTER=ai2-jupiter     exit status 1 when a line is red

Each check is one function that returns rows (state, what, found, next command). What the recipe and this machine's files
show costs well under two seconds and asks nobody; a scheduler is asked only by `make doctor`. Launchers run the same checks
for their stage and refuse on a red line. Standard library, but for memory and hours, which need NumPy and are left out
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sft.common.errors import SftError
from sft.launch.doctor import cluster, inputs, training
from sft.launch.doctor.context import LEFT, OK, RED, Case, Row, red
from sft.recipe import recipe, schema
from sft.runner import plan

Check = Callable[[Case], Iterator[Row]]
CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (inputs.data, ("prepare", "sync")),
    (inputs.tokenizer, ("prepare", "sync", "train")),
    (inputs.storage, ("sync", "train")),
    (training.batch, ("train",)),
    (training.intervals, ("train",)),
    (training.memory, ("train",)),
    (training.hours, ("train",)),
    (training.disk, ("train",)),
    (cluster.scheduler, schema.STAGES),
    (cluster.evaluation, ("evaluate",)),
)


def examine(case: Case, ask: bool = False) -> list[Row]:
    """The rows of every check that matters for the case's stages. `ask`: also those that ask a scheduler, which come last but
    are asked first: what it tells of its GPUs the others plan with."""
    told, answers = cluster.ask(case) if ask else ("", [])
    case = case.with_gpu(told)
    rows = []
    for check, stages in CHECKS:
        if case.needs(*stages):
            try:
                rows += list(check(case))
            except SftError as e:
                rows.append(red(check.__name__, e))
            except ModuleNotFoundError as e:
                rows.append(Row(LEFT, check.__name__, f"not checked: {e.name} is not installed", "make setup"))
    return rows + answers


def table(rows: Sequence[Row]) -> str:
    wide = max((len(r.what) for r in rows), default=0)
    lines = []
    for r in rows:
        lines.append(f"{r.state:4}  {r.what:{wide}}  {r.found}")
        if r.next and r.state != OK:
            lines.append(f"{'':4}  {'':{wide}}  next: {r.next}")
    return "\n".join(lines)


def require(place: plan.Place, r: recipe.Recipe, stage: str) -> None:
    """What a launcher asks before it starts a stage: raises SftError with every red line."""
    red = [row for row in examine(Case(place, r, place.load_cluster(), (stage,))) if row.state == RED]
    if red:
        lines = "\n".join(f"{row.what}: {row.found}; next: {row.next}" for row in red)
        raise SftError(f"{lines}\nmake doctor RECIPE={r.name} CLUSTER={place.cluster} shows all checks")
