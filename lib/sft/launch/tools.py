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
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from sft.common import paths
from sft.common.errors import SftError
from sft.common.locks import lock
from sft.launch.job import TOOL_RUNS, TOOLS, Job, SubmittedJob, retried
from sft.launch.launcher import Scheduler, load_launcher
from sft.launch.run import follow, logger, submit
from sft.recipe import mounts, recipe, schema, typed
from sft.runner import plan
from sft.runner.cli import program


def in_job(text: str, cluster: schema.Cluster, name: str, what: str) -> str:
    """SRC or DST as the job sees it. Raises SftError for a path that it does not see."""
    if paths.REMOTE.match(text):
        return text
    if text.startswith(mounts.WEKA) or not cluster.shared_disk:
        if found := mounts.in_jobs(text, cluster):
            return found
        raise SftError(
            f"{what}={text}: jobs on {name} do not see it; next: gs://, s3://, or a path on a mount of env/{name}.toml"
            f" ({mounts.listed(cluster)})"
        )
    return os.path.abspath(text)


def tool_job(
    place: plan.Place,
    tool: str,
    source: str,
    target: str,
    options: Mapping[str, str],
    fields: Sequence[str],
    numbers: schema.Hardware,
) -> Job:
    """The job of `tool SRC DST OPTIONS… FIELDS…`. Raises SftError."""
    cluster, name = place.load_cluster(), place.cluster
    words = [in_job(source, cluster, name, "SRC"), in_job(target, cluster, name, "DST")]
    for option, value in options.items():
        words += [f"--{option}", value if option == "template" else in_job(value, cluster, name, option.upper())]
    if cluster.shared_disk:
        words += ["--cache", str(place.cache.absolute())]
    command = [".venv/bin/python", f"stages/{tool.replace('-', '_')}.py", *words, *fields]
    identity = hashlib.sha256("\0".join(command).encode()).hexdigest()
    run = place.runs / TOOL_RUNS / f"{tool}-{identity[:10]}"
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


def _numbers(fields: Sequence[str], tool: str, cluster: schema.Cluster) -> tuple[schema.Hardware, list[str]]:
    """(what the job requests, the other fields) of FIELD=VALUE words. Raises SftError for one that no job of a tool has."""
    hints = typing.get_type_hints(schema.Hardware)
    asked, others = {}, []
    for text in fields:
        name, _, value = text.partition("=")
        if name in typed.HARDWARE_FIELDS:
            asked[name] = typed.parse_value(value, hints[name])
        else:
            others.append(text)
    problems = typed.of_other_stages(asked, tool)
    made: schema.Hardware = typed.build(schema.Hardware, asked, "", problems)
    problems += typed.unread(schema.Hardware, asked, cluster.launcher)
    if problems:
        raise SftError("\n".join(problems) + "\nnext: correct it")
    return made, others


@program("launch", "python -m sft.launch.tools")
@click.argument("cluster", metavar="CLUSTER")
@click.argument("runs", type=click.Path(path_type=Path), metavar="RUNS")
@click.argument("tool", type=click.Choice(TOOLS), metavar="TOOL")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.argument("fields", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--tokenizer", default="", metavar="FOLDER", help="to-hf: the tokenizer of the step.")
@click.option("--template", default="", metavar="NAME", help="to-hf: the chat template that was trained.")
@click.option("--adapter", default="", metavar="FOLDER", help="to-core: the LoRA adapter that is merged.")
def main(cluster: str, runs: Path, tool: str, source: str, target: str, fields: tuple[str, ...], **options: str) -> int:
    """Runs TOOL as one job on CLUSTER. FIELD=VALUE is what the job requests, such as cpus=8, or a field of [convert]."""
    place = plan.Place(runs, (), cluster)
    numbers, others = _numbers(fields, tool, place.load_cluster())
    job = tool_job(place, tool, source, target, {k: v for k, v in options.items() if v}, others, numbers)
    scheduler = load_launcher(job.cluster.launcher).open_scheduler(job.folder, job.cluster)
    if os.environ.get("DRY_RUN"):
        print(scheduler.render(job))
        return 0
    return run_tool(job, scheduler)


if __name__ == "__main__":
    sys.exit(main())
