"""The doctor's checks of a Beaker cluster: its file and the code here; account, images, clusters and secrets on Beaker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sft.common import paths
from sft.common.errors import SftError
from sft.formats.job import FOLDER
from sft.launch import code
from sft.launch.beaker import connection, specification
from sft.launch.beaker.requirements import NodeGpus
from sft.launch.beaker.scheduler import BeakerScheduler
from sft.launch.doctor.context import NOTE, OK, RED, Context, Row, SchedulerAnswer, red
from sft.launch.job import LostConnection
from sft.runner import plan


def check(context: Context) -> Iterator[Row]:
    """Checks the cluster's file, and that jobs can get the code. Contacts no other machine."""
    cluster = context.cluster
    try:
        specification.user()
        specification.check_cluster(context.place.cluster, cluster)
        for stage in set(context.stages) & set(cluster.stages):
            specification.check_time(context.recipe, context.place.cluster, stage)
        where = f"{', '.join(cluster.clusters)}, workspace {cluster.workspace}, budget {cluster.budget or 'of the workspace'}"
        yield Row(OK, "scheduler", f"Beaker: {where}")
        shipped = code.describe(plan.REPO, cluster.code)
        source = f"from {shipped.repository}" if shipped.repository else "as a Beaker dataset"
        yield Row(OK, "code", f"commit {shipped.commit[:12]} {source}")
    except SftError as e:
        about_cluster = any(word in str(e) for word in (context.file, "SFT_USER", "[on."))
        row = red("scheduler" if about_cluster else "code", e)
        then = row.next.replace('code = "dataset"', f'code = "dataset" in {context.file}')
        yield dataclasses.replace(row, next=then)


def ask(context: Context) -> SchedulerAnswer:
    """Asks Beaker for everything that a submission needs: account, workspace, budget, images, clusters and secrets."""
    if not connection.has_token():
        then = "BEAKER_TOKEN=…, or beaker configure; see https://beaker.org/user"
        return SchedulerAnswer("", (Row(RED, "secrets", "this machine has no Beaker token", then),))
    cluster = context.cluster
    harness = (
        context.needs("evaluate") and context.recipe.evaluate.harness != "lm-eval" and bool(cluster.evaluate_image)
    )
    try:
        asked = BeakerScheduler(context.run / FOLDER, cluster)
        problems, gpus = asked.missing(context.file, harness), asked.gpus()
        keys = asked.absent_keys(wanted_keys(context)) if context.needs("train") else []
    except (SftError, LostConnection) as e:
        return SchedulerAnswer("", (red("secrets", e),))
    kinds = {kind for _, kind in gpus.values()}
    rows = _gpus(context, gpus) if gpus and context.training.gpus and cluster.gpus_per_node else []
    for line in problems:
        found, _, then = line.removeprefix(f"{context.file}: ").partition("; next: ")
        rows.append(Row(RED, "secrets", found, then or f"correct {context.file}, or what it names on Beaker"))
    if not problems:
        secrets = ", ".join(paths.for_user(s) for s in cluster.secrets.values()) or "none"
        rows.append(Row(OK, "secrets", f"{secrets}; workspace, budget, image and clusters exist"))
    rows += [
        Row(NOTE, "secrets", f"no {key} in {cluster.workspace}: {field} is recorded offline, in the training folder",
            f"beaker secret write --workspace {cluster.workspace} NAME, and [optional_secrets] {key} = \"NAME\" in {context.file}")
        for field, key in keys
    ]  # fmt: skip
    return SchedulerAnswer(kinds.pop() if len(kinds) == 1 else "", tuple(rows))


def wanted_keys(context: Context) -> dict[str, str]:
    """{field of [train]: variable with its API key} of the trackers that the recipe uses."""
    train = context.recipe.train
    used = {"wandb_project": "WANDB_API_KEY", "comet_project": "COMET_API_KEY"}
    return {field: key for field, key in used.items() if getattr(train, field)}


def _gpus(context: Context, gpus: dict[str, NodeGpus]) -> list[Row]:
    """The GPUs of each cluster, {cluster: (GPUs of a node, their type)}. A note if they have several types and none is chosen."""
    kinds = {kind for _, kind in gpus.values()}
    text = "; ".join(f"{name}: {count} x {kind}" for name, (count, kind) in gpus.items())
    if context.training.gpu or context.cluster.gpu or len(kinds) == 1:
        return [Row(OK, "GPUs", text)]
    then = f'one of them: [on.{context.place.cluster}.train] gpu = "{min(kinds)}", for memory and hours'
    return [Row(NOTE, "GPUs", text, then)]
