"""The doctor says before anything runs what evaluate will run the model with, and refuses a vLLM that is not installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import REPO
from sft.launch.doctor import backend as doctor
from sft.recipe import recipe
from sft.recipe.schema import Cluster, Hardware


def row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cluster: Cluster, vllm: bool, gpus: int = -1, **fields: Any
) -> Any:
    loaded = recipe.load(REPO / "recipes/smoke.toml")
    loaded = replace(
        loaded, evaluate=replace(loaded.evaluate, **fields), on={"there": {"evaluate": Hardware(gpus=gpus)}}
    )
    if vllm:
        (tmp_path / "lib/python3.11/site-packages/vllm").mkdir(parents=True)
        (tmp_path / "lib/python3.11/site-packages/vllm/__init__.py").touch()
    monkeypatch.setattr(doctor, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(doctor, "gpus", lambda: 0)
    context: Any = SimpleNamespace(recipe=loaded, cluster=cluster, place=SimpleNamespace(cluster="there"))
    (found,) = doctor.backend(context)
    return found


SLURM = Cluster(storage="{runs}", launcher="slurm", gpus_per_node=8)


@pytest.mark.parametrize(
    ("vllm", "gpus", "fields", "state", "found"),
    [
        (True, -1, {}, "ok", "vllm (auto: a GPU, and vLLM is installed), 1 GPU"),
        (True, 4, {}, "ok", "vllm (auto: a GPU, and vLLM is installed), 4 GPUs"),
        (False, -1, {}, "ok", "hf (auto: vLLM is not installed), 1 GPU"),
        (True, 0, {}, "ok", "hf (auto: no GPU), no GPUs"),
        (False, -1, {"backend": "vllm"}, "RED", "[evaluate] backend = 'vllm': vLLM is not in"),
        (True, -1, {"backend": "hf"}, "ok", "hf (named by the recipe), 1 GPU"),
    ],
)
def test_the_plan_names_the_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vllm: bool, gpus: int, fields: Any, state: str, found: str
) -> None:
    made = row(monkeypatch, tmp_path, SLURM, vllm, gpus, **fields)
    assert made.state == state and made.found.startswith(found)


def test_where_the_jobs_environment_is_not_here_the_job_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    beaker = Cluster(storage="gs://b", launcher="beaker", gpus_per_node=8, shared_disk=False)
    assert row(monkeypatch, tmp_path, beaker, vllm=False).found == "auto: the job decides, its environment is not here"


def test_a_server_that_does_not_run_yet_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1/completions"
    made = row(monkeypatch, tmp_path, SLURM, vllm=False, backend="server", base_url=url)
    assert made.state == "note" and "127.0.0.1:9/v1/models" in made.found and "before evaluate" in made.next
