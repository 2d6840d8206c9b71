"""The doctor's checks of the cluster: GPUs, what the launcher needs, and the evaluation harness."""

from __future__ import annotations

from collections.abc import Iterator

from sft.launch.doctor.context import NOTE, OK, RED, Context, Row, load_checks
from sft.runner.processes import requested_gpus


def scheduler(context: Context) -> Iterator[Row]:
    """What the launcher needs of this machine and of the cluster's file, without asking the scheduler."""
    cluster = context.cluster
    if (
        cluster.launcher != "local"
        and context.needs("train")
        and not (cluster.gpus_per_node or context.training.gpus > 0)
    ):
        yield Row(NOTE, "GPUs", "a job requests none: training runs on the CPU", f"gpus_per_node in {context.file}")
    for stage in (s for s in context.stages if s in cluster.stages and cluster.launcher != "local"):
        gpus = requested_gpus(stage, context.recipe.hardware(context.place.cluster, stage), cluster)
        if gpus > cluster.gpus_per_node > 0:
            yield Row(RED, "GPUs", f"{stage} requests {gpus} on each node, which has {cluster.gpus_per_node}",
                      f"gpus={cluster.gpus_per_node} for {stage}, or correct gpus_per_node in {context.file}")  # fmt: skip
    yield from load_checks(cluster.launcher).check(context)


def evaluation(context: Context) -> Iterator[Row]:
    """The cluster can run the evaluation harness that the recipe names."""
    options, cluster = context.recipe.evaluate, context.cluster
    if options.harness == "lm-eval":
        return
    if not context.reads("evaluate_image"):
        yield Row(RED, "evaluation", f"harness = {options.harness!r} runs on Beaker, {context.file} has launcher = {cluster.launcher!r}",
                  "another CLUSTER, or harness = \"lm-eval\"")  # fmt: skip
    elif not cluster.evaluate_image:
        yield Row(RED, "evaluation", f"no image that has {options.harness}", f"evaluate_image in {context.file}")
    elif cluster.evaluate_harness != options.harness:
        yield Row(RED, "evaluation", f"{context.file} has {cluster.evaluate_harness}, the recipe names {options.harness}",
                  f'harness = "{cluster.evaluate_harness}", or an image and evaluate_harness = "{options.harness}" there')  # fmt: skip
    else:
        tasks = f"{len(options.tasks)} tasks or suites"
        yield Row(OK, "evaluation", f"{options.harness} in {cluster.evaluate_image}, {tasks}")
