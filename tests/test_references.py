"""A run refers to the stages that another run has made: nothing is made twice, and nothing is written into another run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conftest import Workspace
from published import rewrite
from sft.common.errors import SftError
from sft.formats.identity import read_identity
from sft.runner import references

OVERRIDES = """
import dataclasses, json
from pathlib import Path
from sft.common.errors import SftError
from sft.recipe import recipe, schema
from sft.runner import plan

def other(f):
    if f.name == "tasks":
        return "two"
    if f.name == "plain_text":
        return "shipped"
    if f.name in ("harness", "location", "best", "every_device"):
        return {"harness": "oe-eval", "location": "org/name", "best": "one/acc", "every_device": "cuda:1"}[f.name]
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c != f.default)
    if f.default is dataclasses.MISSING:
        return {"data": '{a = "hf://org/name/file"}', "thinking": '{"*" = false}', "by_task": '{one = {max_reply_tokens = 3}}'}.get(f.name, '{a = "org"}')
    if isinstance(f.default, bool):
        return str(not f.default).lower()
    return {int: "7", float: "0.5", str: "other"}.get(type(f.default), "7")

place, found = plan.Place(Path("runs")), {}
for table in ("convert", "evaluate"):
    for f in dataclasses.fields(schema.TABLES[table]):
        value = "olmo" if f.name == "eval_template" else other(f)
        try:
            r = recipe.load(Path("recipes/x.toml").absolute(), [f"{table}.{f.name}={value}"])
        except SftError as error:
            found[f"{table}.{f.name}"] = str(error)
            continue
        work = plan.work(place, r, ["evaluate"])
        found[f"{table}.{f.name}"] = [r.run != "x", sorted(set(work.stale) - {"report"}), sorted(work.reused)]
print(json.dumps(found))
"""


@pytest.mark.seconds
def test_a_dry_run_says_what_it_would_reuse_and_writes_nothing(workspace: Workspace, finished) -> None:
    finished("evaluate")
    told = workspace.make("dry-run", "RECIPE=x", "STAGE=evaluate", "limit=3").stdout
    assert "[train] would reuse runs/x/train" in told and "stages/evaluate.py runs/x_limit-3" in told
    assert [p.name for p in (workspace.root / "runs").glob("x*")] == ["x"]


@pytest.mark.seconds
def test_no_field_of_convert_or_evaluate_trains_again(workspace: Workspace, finished) -> None:
    finished("evaluate")
    (workspace.root / "recipes/other").mkdir()  # a task_dir, and a model
    (workspace.root / "recipes/other/config.json").write_text("{}")
    found = json.loads(workspace.python(OVERRIDES))
    alone = {name: result for name, result in found.items() if not isinstance(result, str)}
    assert len(alone) > 25 and len(found) - len(alone) <= 10, found  # a few need another field as well, as a harness
    found = alone
    for name, (sibling, stale, reused) in found.items():
        if sibling:
            assert stale == (["convert", "evaluate"] if name.startswith("convert") else ["evaluate"]), name
            wanted = {"prepare"} if name == "convert.model" else {"prepare", "sync", "train", "convert"}
            assert reused == sorted(wanted - set(stale)), name
        else:  # it changes no result
            assert stale == reused == [], name


@pytest.mark.slow
def test_a_sibling_run_makes_only_what_is_new_and_says_what_it_reuses(workspace: Workspace, finished) -> None:
    finished("evaluate")
    assert "x_limit-10/train: reuses runs/x/train" in workspace.make("why", "RECIPE=x", "limit=10").stdout
    assert not (workspace.root / "runs/x_limit-10").exists()
    made = workspace.make("evaluate", "RECIPE=x", "limit=10")
    assert "[train] reuses runs/x/train\n" in made.stdout and workspace.ran() == ["evaluate x_limit-10"]
    run = workspace.root / "runs/x_limit-10"
    assert os.readlink(run / "train") == "../x/train"
    workspace.make("-q", "evaluate", "RECIPE=x", "limit=10")
    workspace.make("verify", "RUN=x_limit-10")
    workspace.make("evaluate", "RECIPE=x", "dtype=float32")
    assert workspace.ran() == ["convert x_dtype-float32", "evaluate x_dtype-float32"]


@pytest.mark.seconds
def test_a_run_that_shares_a_stage_never_writes_into_the_other(workspace: Workspace, finished) -> None:
    finished("evaluate")
    workspace.make("evaluate", "RECIPE=x", "limit=10")
    workspace.ran()
    before = (workspace.root / "runs/x/train/manifest.json").read_bytes()
    workspace.recipe("x", "lr = 1e-3", "lr = 2e-3")
    workspace.make("evaluate", "RECIPE=x", "limit=10")
    assert workspace.ran() == [f"{stage} x_limit-10" for stage in ("train", "convert", "evaluate")]
    assert (workspace.root / "runs/x/train/manifest.json").read_bytes() == before
    assert not (workspace.root / "runs/x_limit-10/train").is_symlink()


@pytest.mark.seconds
def test_another_recipe_with_the_same_training_reuses_it(workspace: Workspace, finished) -> None:
    finished("train")
    workspace.recipe("y", 'tasks = ["one"]', 'tasks = ["two"]')
    workspace.make("train", "RECIPE=y")
    assert workspace.ran() == [] and (workspace.root / "runs/y/train").resolve() == workspace.root / "runs/x/train"
    assert json.loads((workspace.root / "runs/y/run.json").read_text())["recipe"] == "y"


@pytest.mark.seconds
def test_a_stage_with_a_lost_file_is_not_reused(workspace: Workspace, finished) -> None:
    finished("train")
    (workspace.root / "runs/x/train/out").write_text("short")
    assert "x_limit-10/train: not made yet" in workspace.make("why", "RECIPE=x", "limit=10").stdout


def test_what_is_in_the_way_of_a_reference_is_kept_and_a_lost_origin_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SftError, match="it is gone; next: run the same make again"):
        references.refer(tmp_path / "a", "train", tmp_path / "b/train")
    (tmp_path / "b/train").mkdir(parents=True)
    (tmp_path / "b/train/manifest.json").write_text(json.dumps(
        {"schema": 1, "stage": "train", "run": "b", "key": "k", "config": {}, "inputs": [], "outputs": [], "metrics": {}}))  # fmt: skip
    (tmp_path / "a/train").mkdir(parents=True)
    (tmp_path / "a/train/step1").touch()
    references.refer(tmp_path / "a", "train", tmp_path / "b/train")
    references.refer(tmp_path / "a", "train", tmp_path / "b/train")
    assert len(list((tmp_path / "a/.replaced").glob("train-*/step1"))) == 1
    assert references.owner(tmp_path / "a/train") == "b" and references.owner(tmp_path / "b/train") == "b"
    assert references.referrers(tmp_path / "b") == {"train": [tmp_path / "a/train"]}
    references.release(tmp_path / "a/train")
    references.release(tmp_path / "b/train")
    assert not (tmp_path / "a/train").exists() and (tmp_path / "b/train").is_dir()


@pytest.mark.seconds
def test_a_longer_training_is_reported_before_anything_is_moved_and_goes_on_if_asked(
    workspace: Workspace, finished
) -> None:
    finished("train")
    run = workspace.root / "runs/x"
    file = run / "train/manifest.json"
    rewrite(file, metrics={"final_step": 8})
    (run / "train/step8").mkdir()
    (run / "train/step8/manifest.json").write_text("{}")
    workspace.recipe("x", "lr = 1e-3  # why", "lr = 1e-3\nepochs = 6.0")
    told = workspace.make("train", "RECIPE=x", ok=False).stderr
    assert "epochs 3.0 -> 6.0; it has finished 8 steps, and make train would set them aside" in told
    assert "make extend RECIPE=x goes on from step 8" in told and file.is_file() and workspace.ran() == []
    assert "nothing was done; next: the same with YES=1" in workspace.make("extend", "RECIPE=x").stdout
    assert "goes on from step 8 with its optimizer state" in workspace.make("extend", "RECIPE=x", "YES=1").stdout
    assert (run / "train/step8").is_dir() and (run / "train/.finished-step8.json").is_file() and not file.exists()
    mark = read_identity(run / "train")
    code = "from pathlib import Path; from sft.runner import plan; from sft.recipe import recipe; place = plan.Place(Path('runs'));"
    code += "s, i = plan.consumed(place, recipe.load(Path('recipes/x.toml').absolute()), 'train'); print(plan.identity(s.key, i))"
    assert workspace.python(code).strip() == mark
    assert "no finished training that differs" in workspace.make("extend", "RECIPE=x", ok=False).stderr


@pytest.mark.seconds
def test_training_from_step_0_again_is_possible_where_it_is_asked_for(workspace: Workspace, finished) -> None:
    finished("train")
    file = workspace.root / "runs/x/train/manifest.json"
    rewrite(file, metrics={"final_step": 8})
    workspace.recipe("x", "lr = 1e-3  # why", "lr = 1e-3\nsteps = 9")
    workspace.make("train", "RECIPE=x", "RETRAIN=1")
    assert workspace.ran() == ["train x"]
