"""make to-hf and to-core with CLUSTER=: the words of the job, before any scheduler is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Workspace
from sft.common.errors import SftError
from sft.launch import job, tools
from sft.launch.job import Job
from sft.recipe.schema import Hardware
from sft.runner import plan

SHARED = plan.Place(Path("runs"), (), "slurm")
FAR = plan.Place(Path("runs"), (), "ai2-jupiter")


def made(place: plan.Place, source: str, **options: str) -> Job:
    return tools.tool_job(place, "to-hf", source, "gs://b/out", options, ["dtype=float32"], Hardware())


def test_paths_are_those_that_the_job_sees_whatever_characters_they_have() -> None:
    found = made(SHARED, "a b/step7", tokenizer="x/lr=1/tok", template="olmo")
    assert found.command[2:8] == [str(Path("a b/step7").absolute()), "gs://b/out", "--tokenizer", str(Path("x/lr=1/tok").absolute()), "--template", "olmo"]  # fmt: skip
    assert found.command[-1] == "dtype=float32" and found.run.parent == Path("runs") / job.TOOL_RUNS
    assert made(SHARED, "a b/step7").run != found.run
    there = made(FAR, "weka://oe-training-default/x/step7")
    assert there.command[2] == "/weka/oe-training-default/x/step7"


@pytest.mark.parametrize("option", ["tokenizer", "adapter"])
def test_a_path_that_the_job_does_not_see_is_refused_by_its_name(option: str) -> None:
    with pytest.raises(SftError, match=r"SRC=/tmp/x: jobs on ai2-jupiter do not see it"):
        made(FAR, "/tmp/x")
    with pytest.raises(SftError, match=f"{option.upper()}=/tmp/t: jobs on ai2-jupiter do not see it"):
        made(FAR, "gs://b/step7", **{option: "/tmp/t"})


def test_a_tool_requests_what_its_scheduler_has() -> None:
    cluster = SHARED.load_cluster()
    numbers, others = tools._numbers(["cpus=2", "time=1:00:00", "dtype=float32"], "to-hf", cluster)
    assert (numbers.cpus, numbers.time, others) == (2, "1:00:00", ["dtype=float32"])
    with pytest.raises(SftError, match=r"'nodes': to-hf does not read it, only train.*\n'priority'.*'beaker' only"):
        tools._numbers(["nodes=2", "priority=high"], "to-hf", cluster)
    with pytest.raises(SftError, match="a whole number is expected"):
        tools._numbers(["cpus=many"], "to-hf", cluster)


@pytest.mark.seconds
def test_a_tool_is_detached_where_make_is_asked_to(workspace: Workspace) -> None:
    words = ("-n", "to-hf", "SRC=a b", "DST=b", "CLUSTER=slurm", "cpus=2")
    told = workspace.make(*words, "DETACH=1").stdout
    assert "DETACH=1 .venv/bin/python -m sft.launch.tools 'slurm' 'runs' to-hf 'a b' 'b'" in told and "cpus=2" in told
    assert "DETACH" not in workspace.make(*words).stdout
