"""The doctor's checks of a cluster that SkyPilot reaches."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from sft.common.errors import SftError
from sft.launch import code
from sft.launch.doctor.context import NOTE, OK, RED, Context, Row, SchedulerAnswer, red
from sft.launch.job import LostConnection
from sft.launch.sky import client, scheduler, task
from sft.runner import plan


def check(context: Context) -> Iterator[Row]:
    """Checks the cluster's file, that `sky` is here, and that jobs can get the code. Contacts no other machine."""
    cluster = context.cluster
    if not shutil.which("sky"):
        yield Row(RED, "scheduler", "sky: not found: the launcher needs SkyPilot on this machine", client.INSTALL)
    try:
        task.check_cluster(context.place.cluster, cluster)
        yield Row(
            OK, "scheduler", f"SkyPilot: {', '.join(cluster.infra) or 'any infrastructure that sky check allows'}"
        )
    except SftError as e:
        yield red("scheduler", e)
    if missing := scheduler.missing_secrets(cluster):
        yield Row(
            RED,
            "secrets",
            f"not set here: {', '.join(missing)}",
            f"export {missing[0]}=…, or [optional_secrets] in {context.file}",
        )
    if not cluster.shared_disk:
        try:
            shipped = code.describe(plan.REPO, cluster.code)
            source = f"from {shipped.repository}" if shipped.repository else "as a folder that SkyPilot copies"
            yield Row(OK, "code", f"commit {shipped.commit[:12]} {source}")
        except SftError as e:
            yield red("code", e)


def ask(context: Context) -> SchedulerAnswer:
    """Asks SkyPilot for its version, and whether it can reach the file's infrastructure."""
    if not shutil.which("sky"):
        return SchedulerAnswer()
    try:
        version = client.run("--version").strip().rpartition(" ")[2]
        clouds = [*dict.fromkeys(infra.partition("/")[0] for infra in context.cluster.infra if infra[0] != "*")]
        answer = client.run("check", *clouds, limit_s=client.ANSWER_S)
    except (SftError, LostConnection) as e:
        return SchedulerAnswer("", (red("SkyPilot", e),))
    enabled = enabled_infra(answer)
    if not enabled:
        reasons = " ".join(re.findall(r"^\s*Reason[^:]*: (.*)$", answer, re.MULTILINE)[:2])
        where = ", ".join(clouds) or "any infrastructure"
        return SchedulerAnswer("", (Row(RED, "SkyPilot", f"{version}: cannot use {where}: {reasons or answer.strip()[-300:]}",
                                        f"sky check {' '.join(clouds)}".strip()),))  # fmt: skip
    rows = [Row(OK, "SkyPilot", f"{version}: {', '.join(enabled)}")]
    refused = [c for c in clouds if not any(_same(c, e) for e in enabled)]
    if refused:
        rows.append(Row(NOTE, "SkyPilot", f"not enabled: {', '.join(refused)}", f"sky check {' '.join(refused)}"))
    return SchedulerAnswer("", tuple(rows))


def enabled_infra(answer: str) -> list[str]:
    """The infrastructure below "Enabled infra" in what `sky check` prints, e.g. ["Kubernetes [compute]"]."""
    _, _, below = answer.partition("Enabled infra")
    lines = [line.strip() for line in below.splitlines()[1:]]
    return [line for line in lines if re.match(r"[A-Z]\w*( \[.*\])?$", line)]


def _same(cloud: str, enabled: str) -> bool:
    name = enabled.split()[0].lower()
    return {"k8s": "kubernetes"}.get(cloud.lower(), cloud.lower()) == name
