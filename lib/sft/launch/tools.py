"""make to-hf and to-core with CLUSTER=: one job that belongs to no run.

    python -m sft.launch.tools ai2-jupiter runs to-hf SRC DST [FIELD=VALUE …]

In:  SRC and DST as the job sees them: gs://…, hf://org/name (a source), a path on a mount, or any path where jobs see this disk.
Out: DST. runs/.tools/<name> holds the record of the job and its log, so that the same make finds the job again.

The job runs the same program as without CLUSTER=. DETACH and DRY_RUN mean what they mean for stages.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from sft.common import paths
from sft.common.errors import SftError
from sft.common.locks import lock
from sft.launch.job import TOOLS, Job, SubmittedJob, retried
from sft.launch.launcher import Scheduler, load_launcher
from sft.launch.run import follow, logger, submit
from sft.recipe import mounts, recipe, schema, typed
from sft.runner import plan
from sft.runner.cli import COMMAND, program

FOLDER = ".tools"


def in_job(text: str, cluster: schema.Cluster, name: str, what: str) -> str:
    """SRC or DST as the job sees it. Raises SftError for a path that it does not see."""
    if paths.REMOTE.match(text):
        return text
    if text.startswith(mounts.WEKA) or not cluster.shared_disk:
        if found := mounts.in_jobs(text, cluster):
            return found
        there = ", ".join(cluster.mounts) or "it has none"
        raise SftError(
            f"{what}={text}: jobs on {name} do not see it; next: gs://, or a path on a mount of env/{name}.toml ({there})"
        )
    return os.path.abspath(text)


def tool_job(place: plan.Place, tool: str, words: Sequence[str], numbers: schema.Hardware) -> Job:
    """The job of `tool SRC DST OPTIONS…`. Raises SftError."""
    cluster, name = place.load_cluster(), place.cluster
    if len(words) < 2 or not all(words[:2]):
        raise SftError(f"make {tool}: SRC= and DST= are needed; next: make {tool} SRC=… DST=… CLUSTER={name}")
    source, target, *rest = words
    source, target = in_job(source, cluster, name, "SRC"), in_job(target, cluster, name, "DST")
    for option in ("--tokenizer", "--adapter"):
        if option in rest:
            at = rest.index(option) + 1
            rest[at] = in_job(rest[at], cluster, name, option[2:].upper())
    if cluster.shared_disk:
        rest += ["--cache", str(place.cache.absolute())]
    command = [".venv/bin/python", f"stages/{tool.replace('-', '_')}.py", source, target, *rest]
    identity = hashlib.sha256("\0".join(command).encode()).hexdigest()
    run = place.runs / FOLDER / f"{tool}-{identity[:10]}"
    return Job(run, tool, command, place, cluster, _no_recipe(tool, name, numbers), identity)


def _no_recipe(tool: str, cluster: str, numbers: schema.Hardware) -> recipe.Recipe:
    """What a job asks a recipe for: a name in messages, and the numbers of its machine."""
    prepare, evaluate = schema.Prepare(tokenizer="", sources=()), schema.Evaluate(tasks=())
    tables = (schema.Model(), prepare, schema.Sync(), schema.Train(), schema.Convert(), evaluate)
    return recipe.Recipe(tool, "", *tables, on={cluster: {tool: numbers}})


def run_tool(job: Job, scheduler: Scheduler) -> int:
    """Submits the job, or finds the one that does the same, and follows it. Returns the exit status."""
    log = logger(job.stage)
    job.folder.mkdir(parents=True, exist_ok=True)
    with lock(job.record_file.with_suffix(".lock"), wait=True):
        known = SubmittedJob.load(job.record_file)
        if known is None or known.record.ended:
            known = retried(lambda: submit(job, scheduler), log)
            log(f"job {known.id} submitted to {job.place.cluster}")
        else:
            log(f"job {known.id} was submitted {known.record.submitted}")
    if os.environ.get("DETACH"):
        log(f"job {known.id} is detached; the same make without DETACH follows it")
        return 0
    return follow(known, scheduler, log)


def _numbers(fields: Sequence[str], cluster: schema.Cluster) -> tuple[schema.Hardware, list[str]]:
    """(what the job requests, the other fields) of FIELD=VALUE words. Raises SftError for one that no job of a tool has."""
    asked, others = {}, []
    for text in fields:
        name, _, value = text.partition("=")
        if name in ("cpus", "memory_gb", "time", "partition", "priority", "gpus"):
            kind = int if name in ("cpus", "memory_gb", "gpus") else str
            asked[name] = typed.parse_value(value, kind)
        else:
            others.append(text)
    problems: list[str] = []
    made: schema.Hardware = typed.build(schema.Hardware, asked, "job", problems)
    problems += typed.unread(schema.Hardware, asked, cluster.launcher)
    if problems:
        raise SftError("\n".join(problems) + "\nnext: correct it")
    return made, others


@program("launch", "python -m sft.launch.tools", settings=COMMAND)
@click.argument("cluster", metavar="CLUSTER")
@click.argument("runs", type=click.Path(path_type=Path), metavar="RUNS")
@click.argument("tool", type=click.Choice(TOOLS), metavar="TOOL")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SRC DST [OPTIONS]")
def main(cluster: str, runs: Path, tool: str, words: tuple[str, ...]) -> int:
    """Runs TOOL as one job on CLUSTER."""
    place = plan.Place(runs, (), cluster)
    fields = [w for w in words[2:] if "=" in w and not w.startswith("-")]
    numbers, others = _numbers(fields, place.load_cluster())
    kept = [w for w in words[2:] if w not in fields] if len(words) > 2 else []
    job = tool_job(place, tool, [*words[:2], *kept, *others], numbers)
    scheduler = load_launcher(job.cluster.launcher).open_scheduler(job.folder, job.cluster)
    if os.environ.get("DRY_RUN"):
        print(scheduler.render(job))
        return 0
    return run_tool(job, scheduler)


if __name__ == "__main__":
    sys.exit(main())
