"""MODEL=: another model than the run's training is planned, identified, scored and named; disks that only jobs see."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_export
from conftest import REPO, Workspace
from evaluating import plain_place
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.evaluation import evaluate
from sft.export import other_model
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.manifest import Manifest, Output
from sft.formats.results import EvaluateMetrics
from sft.recipe import mounts, recipe
from sft.recipe.schema import Cluster
from sft.runner import models, plan
from sft.runner.stage import Result
from sft.storage.base_weights import BaseWeights
from sft.storage.local import LocalStorage

SMOKE = REPO / "recipes/smoke.toml"
place = plain_place
HERE = Cluster(storage="s")
FAR = Cluster(
    storage="/weka/data/s", launcher="beaker", shared_disk=False, runs="/weka/data/runs", mounts=("data:/weka/data",)
)


def scored(model: str, *fields: str) -> recipe.Recipe:
    return recipe.load(SMOKE, [*fields, f"convert.model={model}"])


def step(runs: Path, name: str = "y/train/step300", text: str = "{}") -> Path:
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifest.NAME).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("model", "end"),
    [("runs/y/train/step300", "_model-y-train-step300-"), ("hf://allenai/OLMo-2-0425-1B@abc", "_model-allenai-OLMo-2-0425-1B-abc-"),
     ("/data/models/x/", "_model-data-models-x-"), ("gs://b/a..b/c", "_model-b-a.b-c-")],
    ids=["step", "hub", "folder", "bucket"],
)  # fmt: skip
def test_a_run_of_another_model_is_named_by_it_and_found_again_by_its_name(
    model: str, end: str, tmp_path: Path
) -> None:
    r = scored(model, "limit=5")
    assert r.run.startswith("smoke_limit-5" + end) and recipe.from_run(r.run) == "smoke"
    assert plan.load_run(plan.Place(tmp_path), r.run, ["limit=5", f"convert.model={model}"]).run == r.run


def test_a_run_of_another_model_has_no_training_and_other_keys() -> None:
    own, other = recipe.load(SMOKE), scored("hf://a/b@c")
    assert other.stages == ("prepare", "convert", "evaluate") and other.chain("evaluate") == ("prepare", "evaluate")
    assert own.stages == recipe.schema.STAGES and own.chain("convert") == ("prepare", "sync", "train", "convert")
    assert own.config("evaluate") == {k: v for k, v in other.config("evaluate").items() if k != "convert"}
    assert "model" not in own.config("convert") and other.config("evaluate")["convert"]["model"] == "hf://a/b@c"


@pytest.mark.seconds
def test_model_is_scored_without_training_once_and_again_after_a_change(workspace: Workspace) -> None:
    runs = workspace.root / "runs"
    folder = step(runs)
    words = ("evaluate", "RECIPE=x", "MODEL=runs/y/train/step300")
    workspace.make("prepare", "RECIPE=x")
    workspace.make(*words)
    name = next(p.name for p in runs.glob("x_model-*"))
    assert workspace.ran() == ["prepare x", f"evaluate {name}"] and (runs / name / "prepare").is_symlink()
    workspace.make(*words)
    workspace.make("evaluate", "RECIPE=x", f"MODEL={folder}")  # the same step, by its place
    assert workspace.ran() == []
    assert name in workspace.make("runs").stdout.replace("…", "") or "x_model" in workspace.make("runs").stdout
    (folder / manifest.NAME).write_text('{"another": 1}')
    workspace.make(*words)
    assert workspace.ran() == [f"evaluate {name}"]


@pytest.mark.seconds
def test_convert_takes_a_step_and_baseline_the_base(workspace: Workspace) -> None:
    runs = workspace.root / "runs"
    step(runs)
    workspace.make("convert", "RECIPE=x", "MODEL=runs/y/train/step300")
    assert [line.split("_")[0] for line in workspace.ran()] == ["prepare x", "convert x"]
    told = workspace.make("baseline", "RECIPE=x", ok=False).stderr
    assert "training starts from random weights, which have no baseline" in told
    (workspace.root / "recipes/base").mkdir()
    (workspace.root / "recipes/base/config.json").write_text("{}")
    workspace.recipe("z", 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "base"')
    workspace.make("baseline", "RECIPE=z")
    assert workspace.ran() == ["evaluate z_baseline"]  # with the data of the run before
    workspace.make("evaluate", "RECIPE=z", "MODEL=base")
    assert workspace.ran() == []  # the same model by the same name


@pytest.mark.parametrize(
    ("words", "message"),
    [(["train", "MODEL=runs/y"], "make train: it reads no MODEL="), (["evaluate", "MODEL=~/x"], "write it without '~'"),
     (["evaluate", "MODEL=runs/y/prepare"], "neither a step nor an export"), (["evaluate", "MODEL=runs/y/train/step7"], "there are: step300"),
     (["evaluate", "MODEL=none"], "no file or folder 'none'"), (["evaluate", "MODEL=runs/y/train/step300", "lr=1"], "does not"),
     (["evaluate", "convert.model=hf://a/b", "lr=1"], "[train] has this field"), (["evaluate", "model=hf://a/b", "lr=1"], "[train] has this field"),
     (["sweep", "MODEL=hf://a/b", "lr=1 2"], "make sweep: it reads no MODEL="),
     (["to-hf", "SRC=a", "DST=b", "dtype=`touch pwned`"], "only letters, digits"),
     (["evaluate", "MODEL=weka://data/x"], "on none of the mounts in env/local.toml"),
     (["evaluate", "eval_template=model"], "there is no [convert] model")],
    ids=["train", "home", "prepare", "step", "none", "unread", "field", "word", "sweep", "shell", "weka", "template"],
)  # fmt: skip
def test_a_model_that_cannot_be_meant_is_refused(workspace: Workspace, words: list[str], message: str) -> None:
    step(workspace.root / "runs")
    recipe = () if words[0] == "to-hf" else ("RECIPE=x",)
    assert message in workspace.make(*words, *recipe, ok=False).stderr
    assert workspace.ran() == [] and not (workspace.root / "pwned").exists()


def test_a_step_is_identified_alike_here_and_where_jobs_see_it(tmp_path: Path) -> None:
    there, here, cache = tmp_path / "there", tmp_path / "here", HashCache(tmp_path)
    r = scored("runs/y/train/step300")
    folder = step(there)
    found = models.inputs(there, (), FAR, r, cache)
    made = Output("step300/manifest.json", 2, found[0].sha256)
    record = Manifest(schema=Manifest.SCHEMA, stage="train", run="y", key="k", config={}, inputs=(), outputs=(made,), metrics={},
                      cluster="c", version=1, provenance=None)  # fmt: skip
    (here / "y/train").mkdir(parents=True)
    record.write(here / "y/train" / manifest.NAME)
    Elsewhere("/weka/data/runs/y/train", ("step300/manifest.json",)).write(here / "y/train/elsewhere.json")
    assert models.inputs(here, (), FAR, r, cache) == found and folder.is_dir()
    models.check(r, "evaluate", here, (), FAR, "far")
    with pytest.raises(SftError, match=r"its files are in /weka/data/runs/y/train; next: the CLUSTER that has them"):
        models.check(r, "evaluate", here, (), HERE, "local")
    with pytest.raises(SftError, match=r"it is not in /weka/data/runs/y/train, where jobs on far look"):
        models.check(r, "evaluate", there, (), FAR, "far")


def test_jobs_elsewhere_do_not_see_a_folder_of_this_machine(tmp_path: Path) -> None:
    with pytest.raises(SftError, match="jobs on far do not see this machine's disks; next: gs://"):
        models.check(scored(str(tmp_path)), "evaluate", tmp_path, (), FAR, "far")
    models.check(scored("weka://data/m"), "evaluate", tmp_path, (), FAR, "far")  # is looked for in the job
    models.check(scored("hf://a/b"), "evaluate", tmp_path, (), FAR, "far")
    assert models.inputs(tmp_path, (), FAR, scored("/weka/data/m"), HashCache(tmp_path)) == []


def test_a_disk_of_the_cluster_is_known_by_its_mounts() -> None:
    assert mounts.in_jobs("weka://data/a/b", FAR) == mounts.in_jobs("/weka/data/a/b", FAR) == "/weka/data/a/b"
    assert mounts.in_jobs("/weka/other/b", FAR) == mounts.in_jobs("weka://data/../b", FAR) == ""
    with pytest.raises(
        SftError,
        match=r"x = '/d/b': not a plain relative path, and on none of the mounts in env/far.toml \(data:/weka/data\).*DATA=",
    ):
        mounts.require("/d/b", "sync", FAR, "far", "x")
    kept = dataclasses.replace(FAR, stages=("train",))
    with pytest.raises(SftError, match=r"sync runs on this machine; next: put 'sync' among stages in env/far.toml"):
        mounts.require("weka://data/b", "sync", kept, "far", "x")


# --- what is scored -----------------------------------------------------------------------------------------------------


class FakeStage:
    """What `sft.export.other_model` reads of a stage: prepare's folder with a tokenizer, and the recipe."""

    def __init__(self, root: Path, model: Path, template: str = "") -> None:
        self.facts = tiny_export.tokenizer(root / "prepare/data/tokenizer", 300)
        fields = [f"eval_template={template}"] if template else []
        self.recipe = scored(str(model), *fields)
        self.root, self.place, self.cluster, self.name = root, plan.Place(root / "runs"), HERE, "evaluate"
        self.out, self.lines = root / "out", list[str]()
        self.out.mkdir(exist_ok=True)

    def folder(self, name: str) -> Path:
        return self.root / name

    def find(self, path: str, what: str = "") -> Path:
        return self.root / path

    def log(self, text: str) -> None:
        self.lines.append(text)


def stage(root: Path, model: Path, monkeypatch: pytest.MonkeyPatch, template: str = "") -> Any:
    made = FakeStage(root, model, template)
    monkeypatch.setattr(other_model.DatasetInfo, "of", lambda _: SimpleNamespace(facts=made.facts))
    monkeypatch.setattr("sft.sync.base_check.DatasetInfo.of", lambda _: SimpleNamespace(facts=made.facts))
    return made


def test_another_model_has_trainings_tokenizer_template_and_terminators(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "scored", place.root / "model"
    other_model.assemble(stage(tmp_path, model, monkeypatch), folder)
    theirs: Any = json.loads((model / "generation_config.json").read_text())
    made = json.loads((folder / "generation_config.json").read_text())
    assert sorted(made["eos_token_id"]) == sorted(theirs["eos_token_id"])
    assert (folder / "chat_template.jinja").read_text() == tiny_export.TEMPLATE
    from sft.evaluation.hf_model import HfModel

    loaded = HfModel(folder, batch_size=4, max_length=0, think_end=None)
    documents = [([5, 6, 7, 8], [False, True, True, True])]
    assert list(loaded.losses(documents)) == list(place.model.losses(documents))


def copied(place: SimpleNamespace, target: Path, template: str) -> Path:
    """The tiny export with another template."""
    target.mkdir()
    for file in (place.root / "model").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "chat_template.jinja").write_text(template)
    return target


def test_a_models_own_template_is_told_of_and_taken_where_it_is_asked_for(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = copied(place, tmp_path / "m", "{{ 1 }}"), tmp_path / "scored"
    asked = stage(tmp_path, model, monkeypatch)
    other_model.assemble(asked, folder)
    assert (folder / "chat_template.jinja").read_text() == tiny_export.TEMPLATE
    assert any('eval_template="model" takes its own' in line for line in asked.lines)
    other_model.assemble(stage(tmp_path, model, monkeypatch, "model"), folder)
    assert (folder / "chat_template.jinja").read_text() == "{{ 1 }}"
    (model / "chat_template.jinja").unlink()
    with pytest.raises(SftError, match=r"no chat template .*next: eval_template= a name"):
        other_model.assemble(stage(tmp_path, model, monkeypatch, "model"), folder)


def test_the_commit_of_a_hub_model_is_in_the_metrics_of_its_evaluation(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = BaseWeights(LocalStorage(place.root / "model"), "m", "f" * 40)
    monkeypatch.setattr(other_model, "find_base_weights", lambda *_: found)
    asked = stage(tmp_path, Path("x"), monkeypatch)
    asked.recipe, asked.cache, asked.hardware = scored("hf://org/name"), tmp_path, None
    scores = EvaluateMetrics(tasks={}).to_value()
    monkeypatch.setattr(evaluate, "score", lambda *_: Result(["results.json"], scores))
    made = evaluate.evaluate(asked)
    assert EvaluateMetrics.parse(made.metrics).model_commit == "f" * 40
    assert EvaluateMetrics.parse(made.metrics).to_value() == made.metrics
    assert "model_commit" not in scores  # of a model that is no commit of the hub


def test_the_default_of_several_templates_is_the_models_own(tmp_path: Path) -> None:
    """transformers also takes the one named default."""
    file = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for value, wanted in ((named, "d"), ({"default": "d"}, "d"), ("d", "d"), (None, "")):
        file.write_text(json.dumps({"chat_template": value}))
        assert other_model.template_of(tmp_path) == wanted
    for value, message in (
        (named[:1], "'tool_use', and none is named 'default'"),
        (3, "3, expected a text or templates by name"),
    ):
        file.write_text(json.dumps({"chat_template": value}))
        with pytest.raises(SftError, match=rf"tokenizer_config.json: chat_template(:| =) {message}"):
            other_model.template_of(tmp_path)


def test_a_model_that_cannot_be_scored_is_refused(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copied(place, tmp_path / "m", "x")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + " ")
    with pytest.raises(SftError, match=r"the data were made with tokenizer.json sha256"):
        other_model.assemble(stage(tmp_path, other, monkeypatch), tmp_path / "scored")
    (other / "tokenizer.json").write_text(text)
    (other / "config.json").write_text(json.dumps({"vocab_size": 200, "model_type": "olmo2"}))
    with pytest.raises(SftError, match=r"vocab_size = 200, and the tokenizer of training has \d+ ids"):
        other_model.assemble(stage(tmp_path, other, monkeypatch), tmp_path / "scored")
    for file in other.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(SftError, match=r"no model\.safetensors or pytorch_model\.bin"):
        other_model.assemble(stage(tmp_path, other, monkeypatch), tmp_path / "scored")
