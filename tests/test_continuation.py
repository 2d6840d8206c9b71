"""What the planner knows of [train] continue, of trainings that ended early, and of the best step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Workspace
from published import rewrite, step_record
from sft.common.errors import SftError
from sft.formats.identity import write_identity
from sft.formats.metrics import Attempt
from sft.recipe import recipe, schema
from sft.recipe.json_schema import recipe_schema
from sft.recipe.other_names import answer
from sft.runner import continuation, ended, extension, plan, removal

STEP = "runs/x/train/step8"
HERE = Path(__file__).resolve()


def identity(workspace: Workspace) -> str:
    """That of x's training."""
    code = "from pathlib import Path; from sft.runner import plan; from sft.recipe import recipe; place = plan.Place(Path('runs'));"
    code += "s, i = plan.consumed(place, recipe.load(Path('recipes/x.toml').absolute()), 'train'); print(plan.identity(s.key, i))"
    return workspace.python(code).strip()


@pytest.fixture
def trained(workspace: Workspace, finished: Callable[[str], None]) -> Workspace:
    """Run x, trained to step 8, and two recipes that go on from there."""
    finished("train")
    train = workspace.root / "runs/x/train"
    (train / "step8").mkdir()
    (train / "step8/manifest.json").write_text("{}")
    options = {name: getattr(schema.Train(), name) for name in schema.STATE_FIELDS}
    header = Attempt(1, 0, 1, "cpu", None, "", 8, None, {**options, "freeze": [], "train_only": [], "lora_targets": []})
    record = step_record(step=8, lr=2.5e-4)
    (train / "metrics.jsonl").write_bytes(header.to_bytes() + record.to_bytes())
    workspace.recipe("y", "lr = 1e-3  # why", f'lr = 1e-3\ncontinue = "{STEP}"\nepochs = 6.0')
    return workspace


@pytest.mark.seconds
def test_a_run_goes_on_from_a_step_by_its_recipe_or_by_an_override(trained: Workspace) -> None:
    shown = trained.make("show", "RECIPE=y").stdout
    assert f'continue = "{STEP}"' in shown and f"continues {STEP} with its optimizer state" in " ".join(shown.split())
    made = trained.make("train", "RECIPE=y")
    assert f"note: continues {STEP}" in " ".join(made.stderr.split()) and "0.00025 at that step" in " ".join(
        made.stderr.split()
    )
    assert trained.ran()[-1] == "train y"
    manifest = json.loads((trained.root / "runs/y/train/manifest.json").read_text())
    assert manifest["config"]["continue"] == STEP
    assert [i["file"] for i in manifest["inputs"] if "file" in i] == ["continue/manifest.json"]
    assert "y/train: up to date" in trained.make("why", "RECIPE=y").stdout
    trained.make("train", "RECIPE=x", f"continue={STEP}", "epochs=6.0", "continue_schedule=rewarmed")
    (run,) = {line.split()[1] for line in trained.ran() if line.startswith("train")}
    assert (
        run.startswith("x_epochs-6.0_continue-x-train-step8-".replace("x-train-step8", "train-step8"))
        or "continue" in run
    )
    # Another step under the same name makes it stale.
    (trained.root / "runs/x/train/step8/manifest.json").write_text("{} ")
    assert "y/train: continue/manifest.json changed" in trained.make("why", "RECIPE=y").stdout


@pytest.mark.seconds
def test_what_is_no_step_of_another_run_is_refused_before_anything_runs(trained: Workspace) -> None:
    for value, expected in (
        ("runs/x/train/step9", "is no whole step; there are: step8; next"),
        ("runs/absent/train/step9", "make runs lists the runs"),
        ("runs/../x/train/step8", "a step of a run is expected, as runs/<run>/train/step<N>"),
        ("/etc/passwd", "a step of a run is expected"),
        ("runs/x/train", "a step of a run is expected"),
        ("runs/y/train/step8", "that is this run, which goes on by itself"),
    ):
        trained.recipe("y", "lr = 1e-3  # why", f'continue = "{value}"')
        said = " ".join(trained.make("train", "RECIPE=y", ok=False).stderr.split())
        assert "recipes/y.toml: 'continue' in [train]" in said and expected in said, said
    assert trained.ran() == []


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("field", "row"),
    [
        ('precision = "fp32"', "precision 'bf16' 'fp32' precision=bf16"),
        ('optimizer = "adamw8bit"', "optimizer 'adamw' 'adamw8bit' optimizer=adamw"),
        ('gradients = "bf16"', "gradients 'fp32' 'bf16' gradients=fp32"),
        ('method = "lora"', "method 'full' 'lora' method=full"),
        ('freeze = ["embeddings"]', "freeze [] ['embeddings']"),
    ],
)
def test_another_optimizer_state_is_refused_with_both_values(trained: Workspace, field: str, row: str) -> None:
    trained.recipe("y", "lr = 1e-3  # why", f'{field}\ncontinue = "{STEP}"')
    said = " ".join(trained.make("train", "RECIPE=y", ok=False).stderr.split())
    assert row in said and "or take its weights alone, with [model] base" in said


@pytest.mark.seconds
def test_options_are_those_of_the_manifest_where_no_attempt_recorded_them(trained: Workspace) -> None:
    (trained.root / "runs/x/train/metrics.jsonl").write_bytes(step_record(step=7).to_bytes())
    trained.recipe("y", "lr = 1e-3  # why", f'precision = "fp32"\ncontinue = "{STEP}"')
    assert "precision 'bf16' 'fp32'" in " ".join(trained.make("train", "RECIPE=y", ok=False).stderr.split())
    trained.recipe("y", "lr = 1e-3  # why", f'continue_schedule = "decayed"\ncontinue = "{STEP}"')
    assert "has no record of step 8; next: continue_schedule" in trained.make("train", "RECIPE=y", ok=False).stderr


@pytest.mark.seconds
def test_a_run_that_another_one_continues_is_not_deleted_before_it(trained: Workspace) -> None:
    trained.make("train", "RECIPE=y")
    said = trained.make("delete", "RUN=x", "YES=1", ok=False).stderr
    assert "y goes on from a step of it ([train] continue)" in said and "next: make delete RUN=y first" in said
    assert (trained.root / "runs/x/train/step8").is_dir()
    trained.make("delete", "RUN=y", "YES=1")
    trained.make("delete", "RUN=x", "YES=1")


def test_a_run_is_found_by_its_recipe_its_overrides_and_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    for name in ("x", "recipe", "word", "made"):
        (runs / name).mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/r.toml").write_text(f'[train]\ncontinue = "{STEP}"\n')
    (tmp_path / "recipes/s.toml").write_text("[train]\n")
    monkeypatch.setattr(continuation.paths, "REPO", tmp_path)
    for name, file, words in (("recipe", "r", []), ("word", "s", [f"train.continue={STEP}"])):
        (runs / name / "run.json").write_text(json.dumps({"recipe": file, "overrides": words}))
    (runs / "made/train").mkdir()
    made = {"schema": 1, "stage": "train", "run": "made", "key": "k", "config": {"continue": STEP}, "inputs": [], "outputs": [], "metrics": {}}  # fmt: skip
    (runs / "made/train/manifest.json").write_text(json.dumps(made))
    assert continuation.continued_by(runs / "x") == ["made", "recipe", "word"]
    assert continuation.steps_in_use(runs / "x/train") == [runs / "x/train/step8"]
    with pytest.raises(SftError, match="made, recipe, word go on from a step of it"):
        removal.removal(runs / "x")


@pytest.mark.seconds
def test_a_step_that_jobs_do_not_see_is_refused(trained: Workspace) -> None:
    r = recipe.load(trained.root / "recipes/y.toml")
    found = continuation.named(r, trained.root / "runs")
    assert found is not None
    far = schema.Cluster(
        storage="gs://bucket", launcher="slurm", shared_disk=False, runs="/weka/runs", stages=("train",)
    )
    with pytest.raises(SftError, match=r"it is not in /weka/runs/x/train, where jobs on far look"):
        continuation.check(found, r, far, "far")
    (found.train / "elsewhere.json").write_text(json.dumps({"where": "/weka/runs/x/train", "outputs": []}))
    continuation.check(found, r, far, "far")
    with pytest.raises(SftError, match="its files are in /weka/runs/x/train; next: the CLUSTER that has them"):
        shutil.rmtree(found.folder)
        continuation.check(found, r, schema.Cluster(storage=""), "local")


@pytest.mark.seconds
def test_a_higher_limit_on_minutes_makes_a_training_go_on_in_its_folder(trained: Workspace) -> None:
    run = trained.root / "runs/x"
    rewrite(run / "train/manifest.json", metrics={"final_step": 8, "stopped": "max_minutes", "max_minutes": 60.0})
    assert "x/train: up to date" in trained.make("why", "RECIPE=x", "max_minutes=60").stdout
    assert "x/train: up to date" in trained.make("why", "RECIPE=x", "max_minutes=30").stdout
    more = "x/train: it stopped at step 8 after 60 minutes, and max_minutes is now 90"
    assert more in trained.make("why", "RECIPE=x", "max_minutes=90").stdout
    assert "there is no max_minutes now" in trained.make("why", "RECIPE=x").stdout
    # A sibling with the same key does not take it for a whole training.
    assert (
        "not made yet" in trained.make("why", "RECIPE=x", "limit=3").stdout.split("x_limit-3/train: ")[1].split("\n")[0]
    )
    assert "reuses" in trained.make("why", "RECIPE=x", "limit=3", "max_minutes=60").stdout.split("x_limit-3/train: ")[1]
    (trained.root / "stages/train.py").write_text(
        "import sys\nfrom sft.runner.cli import parse_run\nfrom sft.runner.stage import Result, open_stage\n"
        "with open_stage('train', parse_run('train', sys.argv[1:]), in_place=True) as stage:\n"
        "    stage.finish(Result(['step8'], {'final_step': 8}))\n"
    )
    write_identity(run / "train", identity(trained))
    trained.make("train", "RECIPE=x", "max_minutes=90")
    assert (run / "train/step8").is_dir() and not (run / ".replaced").exists()
    assert "x/train: up to date" in trained.make("why", "RECIPE=x").stdout


@pytest.mark.seconds
def test_more_patience_goes_on_with_extend_and_the_cost_is_told(trained: Workspace) -> None:
    run = trained.root / "runs/x"
    lines = "lr = 1e-3\nearly_stopping_patience = {}\n"
    held_out = "[prepare]\nvalidation_fraction = 0.1"
    text = trained.recipe("x", "lr = 1e-3  # why", lines.format(2)).read_text().replace("[prepare]", held_out)
    (trained.root / "recipes/x.toml").write_text(text)
    trained.make("train", "RECIPE=x", "RETRAIN=1")
    (run / "train/step8").mkdir()
    (run / "train/step8/manifest.json").write_text("{}")
    figures = {"tokens": 7200, "tokens_per_s": 2.0, "data": {"steps": 24, "epochs": 3.0}}
    rewrite(run / "train/manifest.json", metrics={"final_step": 8, "stopped": "early_stopping", **figures})
    (trained.root / "recipes/x.toml").write_text(text.replace("patience = 2", "patience = 5"))
    said = trained.make("train", "RECIPE=x", ok=False).stderr
    assert "early_stopping_patience 2 -> 5; it has finished 8 steps" in said
    assert "(from step 0: about 24 steps, 3.0 h; going on: about 16 steps, 2.0 h)" in said
    assert "going on: about 16 steps, 2.0 h" in trained.make("extend", "RECIPE=x").stdout


def test_validate_every_is_in_the_key_only_where_early_stopping_counts_validations(trained: Workspace) -> None:
    file = trained.root / "recipes/x.toml"
    held_out = "[prepare]\nvalidation_fraction = 0.1"
    file.write_text(file.read_text().replace("[prepare]", held_out))

    def config(*words: str) -> dict[str, Any]:
        return recipe.load(file, words).config("train")

    assert config("validate_every=7") == config() and "validate_every" not in config()
    stopping = config("early_stopping_patience=2", "validate_every=7")
    assert stopping["validate_every"] == 7 and stopping["early_stopping_patience"] == 2
    late = {
        "continue",
        "continue_schedule",
        "early_stopping_patience",
        "early_stopping_threshold",
        "max_minutes",
        "save_best_only",
    }
    assert not late & config().keys()  # finished runs keep their keys


def test_fields_that_nothing_would_read_are_refused(trained: Workspace) -> None:
    file = trained.root / "recipes/x.toml"
    plain = file.read_text()
    held_out = plain.replace("[prepare]", "[prepare]\nvalidation_fraction = 0.1")
    for text, words, expected in (
        (plain, ["continue_schedule=constant"], "only a run with 'continue' reads it"),
        (plain, ["early_stopping_threshold=0.1"], "only early_stopping_patience reads it"),
        (plain, ["early_stopping_patience=2"], "there is no validation split"),
        (
            held_out,
            ["early_stopping_patience=2", "validate_every=0"],
            "validate_every = 0 measures the loss only at the end",
        ),
        (held_out, ["save_best_only=true", "keep=2"], "both say which checkpoints stay"),
        (held_out, ["save_best_only=true", "best_metric=none"], "best_metric = 'none'"),
        (held_out, ["save_best_only=true", "every=2"], "chooses BEST by a score"),
        (plain, ["checkpoint=best"], "nothing chooses the best step"),
        (held_out, ["checkpoint=best", "convert.model=runs/y"], "trains nothing; remove it"),
        (plain, ["max_minutes=-1"], "at least 0"),
        (plain, ["continue_from=runs/x/train/step8"], "no such field"),
    ):
        file.write_text(text)
        with pytest.raises(SftError) as error:
            recipe.load(file, words)
        assert expected in str(error.value), (words, str(error.value))


def test_the_best_step_is_an_input_of_its_export(trained: Workspace) -> None:
    file = trained.root / "recipes/x.toml"
    held_out = file.read_text().replace("[prepare]", "[prepare]\nvalidation_fraction = 0.1")
    file.write_text(held_out + '\n[convert]\ncheckpoint = "best"\n')
    r = recipe.load(file)
    train = trained.root / "runs/x/train"
    with pytest.raises(SftError, match="BEST is not there: no saved step was validated or scored"):
        ended.best_inputs(train, r)
    (train / "BEST").write_text("step8\nvalidation_loss 0.5\n")
    (found,) = ended.best_inputs(train, r)
    place = plan.Place(trained.root / "runs", (trained.root / "recipes",))
    assert found in plan.input_files(place, r, "convert", plan.HashCache(place.cache))
    (train / "BEST").write_text("step9\nvalidation_loss 0.4\n")
    assert ended.best_inputs(train, r) != [found]
    file.write_text(held_out)
    assert "checkpoint" not in recipe.load(file).config("convert")


def test_the_name_in_recipes_is_the_one_in_schemas_completion_and_other_trainers_tables() -> None:
    properties = recipe_schema()["properties"]["train"]["properties"]
    assert "continue" in properties and "continue_from" not in properties
    assert answer("resume_from_checkpoint", "local").startswith("here it is 'continue' in [train]")
    for word, place in (("early_stopping_min_delta", "early_stopping_threshold"), ("load_best_model_at_end", "checkpoint"),
                        ("save_strategy", "save_best_only"), ("max_time", "max_minutes"), ("save_total_limit", "keep")):  # fmt: skip
        assert f"'{place}'" in answer(word, "local"), word
    assert extension.LENGTH[0] == "epochs"
