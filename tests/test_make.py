"""Make drives the stages: what runs, what does not, and what a person is told. Stages are tiny; all else is real."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from conftest import REPO, STAGES, Workspace
from published import rewrite


def names(lines):
    return [line.split()[0] for line in lines]


def planned(workspace, *args):
    """The stages that `make -n` says would run."""
    return re.findall(r"stages/(\w+)\.", workspace.make("-n", *args).stdout)


@pytest.mark.seconds
def test_evaluate_runs_every_stage_once_and_a_second_make_runs_nothing(workspace):
    workspace.make("evaluate", "RECIPE=x")
    assert names(workspace.ran()) == STAGES
    workspace.make("evaluate", "RECIPE=x")
    assert workspace.ran() == []
    workspace.make("-q", "evaluate", "RECIPE=x")


@pytest.mark.seconds
def test_dry_run_and_question_tell_the_truth_and_write_nothing(workspace):
    before = sorted(p for p in workspace.root.rglob("*") if "__pycache__" not in p.parts)
    assert planned(workspace, "train", "RECIPE=x") == ["prepare", "sync", "train"]
    workspace.make("-q", "train", "RECIPE=x", ok=False)
    assert sorted(p for p in workspace.root.rglob("*") if "__pycache__" not in p.parts) == before
    workspace.make("train", "RECIPE=x")
    assert planned(workspace, "evaluate", "RECIPE=x") == ["convert", "evaluate"]


@pytest.mark.seconds
def test_editing_lr_restages_train_and_what_follows_but_not_prepare(workspace, finished):
    finished("evaluate")
    workspace.recipe("x", "lr = 1e-3", "lr = 2e-3")
    assert "x/train: lr 0.001 -> 0.002" in workspace.make("why", "RECIPE=x").stdout
    workspace.make("evaluate", "RECIPE=x")
    assert names(workspace.ran()) == ["train", "convert", "evaluate"]


def test_editing_an_option_that_changes_no_result_reruns_nothing(workspace, finished):
    finished("evaluate")
    workspace.recipe("x", "lr = 1e-3", "lr = 1e-3\nsave_every = 7")
    workspace.make("evaluate", "RECIPE=x")
    workspace.make("evaluate", "RECIPE=x", "log_every=3")
    assert workspace.ran() == []


def test_touching_anything_reruns_nothing(workspace, finished):
    finished("evaluate")
    for path in workspace.root.rglob("*"):
        if path.name != "log":
            os.utime(path, (time.time() + 1000,) * 2)
    workspace.make("evaluate", "RECIPE=x")
    assert workspace.ran() == []


@pytest.mark.seconds
def test_changing_a_source_file_reruns_everything_although_its_time_stays(workspace, finished):
    finished("evaluate")
    rows = workspace.root / "recipes" / "rows.jsonl"
    times = (rows.stat().st_atime_ns, rows.stat().st_mtime_ns)
    rows.write_text(rows.read_text().replace("[]", "{}"))
    os.utime(rows, ns=times)
    assert "prepare: rows.jsonl changed" in workspace.make("why", "RECIPE=x").stdout
    workspace.make("evaluate", "RECIPE=x")
    assert names(workspace.ran()) == STAGES


@pytest.mark.seconds
def test_deleting_a_manifest_reruns_that_stage_and_what_follows(workspace, finished):
    finished("evaluate")
    (workspace.root / "runs/x/train/manifest.json").unlink()
    assert planned(workspace, "evaluate", "RECIPE=x") == ["train", "convert", "evaluate"]
    workspace.make("evaluate", "RECIPE=x")
    assert names(workspace.ran()) == ["train", "convert", "evaluate"]


@pytest.mark.seconds
def test_a_torn_manifest_counts_as_not_done(workspace, finished):
    finished("evaluate")
    file = workspace.root / "runs/x/convert/manifest.json"
    file.write_bytes(file.read_bytes()[:100])
    workspace.make("evaluate", "RECIPE=x")
    assert names(workspace.ran()) == ["convert", "evaluate"]


@pytest.mark.seconds
def test_a_stage_reruns_by_its_file_target(workspace):
    workspace.make("runs/x/sync/manifest.json")
    assert names(workspace.ran()) == ["prepare", "sync"]
    workspace.make("train", "RECIPE=x", "lr=5e-4")
    workspace.ran()
    (workspace.root / "runs/x_lr-5e-4/train/manifest.json").unlink()
    workspace.make("runs/x_lr-5e-4/train/manifest.json")  # the overrides are remembered in run.json
    assert workspace.ran() == ["train x_lr-5e-4"]


@pytest.mark.seconds
def test_an_override_builds_a_sibling_run_that_shares_the_prepared_data(workspace, finished):
    finished("train")
    workspace.make("train", "RECIPE=x", "lr=5e-4", "weight_decay=0.1")
    assert workspace.ran() == ["train x_lr-5e-4_weight-decay-0.1"]
    a, b = (workspace.root / "runs" / run / "prepare/out" for run in ("x", "x_lr-5e-4_weight-decay-0.1"))
    assert a.samefile(b)
    config = json.loads((b.parents[1] / "train/manifest.json").read_text())["config"]
    assert (config["lr"], config["weight_decay"]) == (5e-4, 0.1)


def test_an_override_with_the_recipes_own_value_is_the_recipes_run(workspace):
    assert "runs/x " in workspace.make("-n", "train", "RECIPE=x", "lr=0.001").stdout


@pytest.mark.seconds
def test_runs_names_the_folder_of_runs(workspace):
    workspace.make("prepare", "RECIPE=x", "RUNS=elsewhere/deep/")
    assert (workspace.root / "elsewhere/deep/x/prepare/manifest.json").is_file()
    assert not (workspace.root / "runs").exists()


@pytest.mark.slow
def test_two_recipes_in_parallel_each_run_once(workspace):
    workspace.recipe("y", "lr = 1e-3", "lr = 3e-3")
    workspace.make("-j8", "evaluate", "RECIPE=x y")
    ran = workspace.ran()
    # x and y prepare the same data: it is made once, under a lock, and linked into the other run
    assert sorted(set(ran) | {"prepare x", "prepare y"}) == sorted(f"{s} {r}" for s in STAGES for r in "xy")
    assert len(ran) == 9
    workspace.make("-q", "evaluate", "RECIPE=x y")
    workspace.make("verify", "RUN=x")


@pytest.mark.slow
def test_the_report_follows_whatever_stages_are_done(workspace, finished):
    finished("prepare")
    workspace.make("report", "RECIPE=x")
    assert names(workspace.ran()) == ["report"]
    workspace.make("report", "RECIPE=x")
    assert workspace.ran() == []
    workspace.make("all", "RECIPE=x")
    assert names(workspace.ran()) == [*STAGES[1:], "report"]
    workspace.make("-q", "all", "RECIPE=x")


@pytest.mark.seconds
def test_moving_to_another_cluster_retrains_nothing_but_syncs_before_new_training(workspace, finished):
    (workspace.root / "env/other.toml").write_text('storage = "{runs}/.other"\n')
    finished("train")
    workspace.make("train", "RECIPE=x", "CLUSTER=other")
    assert workspace.ran() == []
    workspace.recipe("x", "lr = 1e-3", "lr = 2e-3")
    workspace.make("train", "RECIPE=x", "CLUSTER=other")
    assert names(workspace.ran()) == ["sync", "train"]


@pytest.mark.seconds
def test_a_broken_recipe_is_reported_with_file_field_value_and_next_command(workspace):
    workspace.recipe("x", "lr = 1e-3", "lrr = 1e-3")
    done = workspace.make("train", "RECIPE=x", ok=False)
    assert "recipes/x.toml: no field 'lrr' in [train]; did you mean 'lr'?" in done.stderr
    assert "make show RECIPE=x" in done.stderr
    workspace.recipe("x", "lr = 1e-3", "lr = -1.0")
    assert "'lr' in [train] = -1.0: more than 0 is expected" in workspace.make("train", "RECIPE=x", ok=False).stderr
    assert not (workspace.root / "runs").exists()


@pytest.mark.seconds
def test_misspelt_names_are_corrected(workspace):
    assert "did you mean RECIPE=?" in workspace.make("train", "RECPE=x", ok=False).stderr
    assert (
        "did you mean 'warmup_fraction'?" in workspace.make("train", "RECIPE=x", "warmup_fration=0.1", ok=False).stderr
    )
    assert (
        "prepare.seed or train.seed or evaluate.seed" in workspace.make("train", "RECIPE=x", "seed=1", ok=False).stderr
    )
    assert "which recipe?" in workspace.make("train", ok=False).stderr
    assert "did you mean 'local'?" in workspace.make("train", "RECIPE=x", "CLUSTER=locl", ok=False).stderr


@pytest.mark.seconds
def test_hostile_values_reach_no_shell(workspace):
    for value in ("lr=1'; touch pwned; '", "lr=$$(touch pwned)", "lr=`touch pwned`", "lr=1 & touch pwned", "lr=a\nb"):
        done = workspace.make("train", "RECIPE=x", value, ok=False)
        assert "error" in done.stderr
    for variable in (
        "RECIPE=x'; touch pwned; '",
        "DATA='; touch pwned; '",
        "RUNS=r'; touch pwned; '",
        "CLUSTER=$$(touch pwned)",
    ):
        workspace.make("train", *([variable] if variable.startswith("RECIPE") else ["RECIPE=x", variable]), ok=False)
    workspace.make("train", "RECIPE=../x", ok=False)
    for folder in ("r`touch\tpwned`", "r&touch\tpwned", "r&b", "r;b", 'r"b', "r*"):
        done = workspace.make("train", "RECIPE=x", f"RUNS={folder}", ok=False)
        assert "the path may have letters, digits and _./+- only" in done.stderr
    assert not (workspace.root / "pwned").exists()
    assert workspace.ran() == []


@pytest.mark.seconds
def test_new_copies_a_recipe_with_its_comments_except_those_on_changed_values(workspace):
    several = 'tasks = [\n  "one",  # first\n  "two",\n]'
    recipe = workspace.recipe("x", 'tasks = ["one"]', several)
    recipe.write_text("# What we learn\n" + recipe.read_text())
    workspace.make(
        "new", "FROM=x", "RECIPE=my-exp", "lr=5e-4", "warmup_fraction=0.1", "on.local.train.processes=2", "tasks=three"
    )
    text = (workspace.root / "recipes/my-exp.toml").read_text()
    assert text.startswith("# What we learn\n")
    assert "lr = 0.0005\n" in text and "warmup_fraction = 0.1" in text
    assert 'tasks = ["three"]\n' in text and "two" not in text
    assert "[on.local.train]\nprocesses = 2" in text
    assert "lr = 0.0005" in workspace.make("show", "RECIPE=my-exp").stdout
    assert "exists already" in workspace.make("new", "FROM=x", "RECIPE=my-exp", ok=False).stderr


@pytest.mark.seconds
def test_verify_names_the_altered_file_and_diff_the_first_difference(workspace, finished):
    finished("evaluate")
    workspace.make("evaluate", "RECIPE=x", "lr=5e-4")
    workspace.make("verify", "RUN=x")
    assert "train:\n  lr 0.001 -> 0.0005" in workspace.make("diff", "A=x", "B=x_lr-5e-4").stdout
    (workspace.root / "runs/x/convert/out").write_text("flipped")
    done = workspace.make("verify", "RUN=x", ok=False)
    assert "runs/x/convert/out" in done.stdout and "1 problem" in done.stderr


@pytest.mark.seconds
def test_a_corrupt_upstream_stops_the_next_stage_by_name(workspace, finished):
    finished("train")
    (workspace.root / "stages/convert.py").write_text(
        "from sft.runner.stage import Result, main\n"
        "def body(stage):\n    stage.folder('train')\n    return Result([])\n"
        "main('convert', body)\n"
    )
    out = workspace.root / "runs/x/train/out"
    out.write_bytes(bytes([out.read_bytes()[0] ^ 1]) + out.read_bytes()[1:])
    done = workspace.make("convert", "RECIPE=x", ok=False)
    assert "runs/x/train/out has sha256" in done.stderr and "next: make train RECIPE=x" in done.stderr
    assert not (workspace.root / "runs/x/convert").exists()


@pytest.mark.seconds
def test_a_failing_stage_keeps_the_earlier_result_and_fails_make(workspace, finished):
    finished("convert")
    before = (workspace.root / "runs/x/convert/manifest.json").read_bytes()
    workspace.recipe("x", "[evaluate]", "[convert]\nmax_position_embeddings = 128\n[evaluate]")
    (workspace.root / "stages/convert.py").write_text(
        "from sft.common.errors import SftError\nfrom sft.runner.stage import main\n"
        "def body(stage):\n    (stage.out / 'half').write_text('x')\n    raise SftError('broken on purpose')\n"
        "main('convert', body)\n"
    )
    assert "broken on purpose" in workspace.make("convert", "RECIPE=x", ok=False).stderr
    assert (workspace.root / "runs/x/convert/manifest.json").read_bytes() == before


@pytest.mark.seconds
def test_a_second_process_on_the_same_stage_fails_and_names_the_first(workspace, finished):
    finished("prepare")
    (workspace.root / "runs/x/prepare/manifest.json").unlink()
    code = (
        "import subprocess\nfrom pathlib import Path\nfrom sft.runner.stage import lock\n"
        "with lock(Path('runs/x/.work/prepare.lock')):\n"
        "    r = subprocess.run(['make', 'prepare', 'RECIPE=x'], capture_output=True, text=True)\n"
        "    print(r.returncode, r.stderr)\n"
    )
    out = workspace.python(code)
    assert out.startswith("2 ") and "busy, held by pid" in out


def test_the_plan_imports_no_package_that_is_slow_to_start(workspace, finished, tmp_path):
    finished("evaluate")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -X importtime "$@" 2>>{tmp_path}/imports\n')
    python.chmod(0o755)
    workspace.make("evaluate", "RECIPE=x", f"PYTHON={python}")
    imported = {line.split("|")[-1].strip().split(".")[0] for line in (tmp_path / "imports").read_text().splitlines()}
    slow = {"numpy", "torch", "transformers", "pyarrow", "click", "jinja2", "google"}
    assert "sft" in imported and not imported & slow


@pytest.mark.seconds
def test_syncing_elsewhere_keeps_half_a_training_and_restages_nothing(workspace, finished):
    (workspace.root / "env/other.toml").write_text('storage = "{runs}/.other"\n')
    finished("train")
    workspace.make("sync", "RECIPE=x", "CLUSTER=other")
    workspace.ran()
    assert planned(workspace, "train", "RECIPE=x", "CLUSTER=other") == []
    assert planned(workspace, "train", "RECIPE=x") == []
    first = (workspace.root / "runs/x/train/out").read_text()
    (workspace.root / "runs/x/train/manifest.json").unlink()
    workspace.make("train", "RECIPE=x", "CLUSTER=other")
    assert (workspace.root / "runs/x/train/out").read_text() == first, "the identity that training continues by changed"


@pytest.mark.slow
def test_a_report_made_with_other_goals_comes_after_them(workspace):
    workspace.make("-j4", "evaluate", "report", "RECIPE=x")
    assert names(workspace.ran()) == [*STAGES, "report"]
    workspace.recipe("x", "lr = 1e-3", "lr = 2e-3")
    assert planned(workspace, "evaluate", "report", "RECIPE=x") == ["train", "convert", "evaluate", "report"]
    workspace.make("evaluate", "report", "RECIPE=x")
    workspace.make("-q", "evaluate", "report", "RECIPE=x")


@pytest.mark.seconds
def test_what_a_later_stage_lacks_is_reported_before_the_first_starts(workspace):
    for old, new, message in (
        ('path = "rows.jsonl"', 'path = "no.jsonl"', "no file or folder 'no.jsonl'"),
        ('path = "rows.jsonl"', 'path = "/etc/passwd"', "not a plain relative path"),
        ('preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "no/such"', "no file or folder 'no/such'"),
        ('tokenizer = "tok"', 'tokenizer = "tok"\ntemplate = "olmoo"', "olmoo"),
        ('tasks = ["one"]', 'tasks = ["onee"]', "did you mean 'one'?"),
        ('tasks = ["one"]', 'tasks = ["../one"]', "'../one' is not a task name"),
    ):
        workspace.recipe("x", old, new)
        assert message in workspace.make("evaluate", "RECIPE=x", ok=False).stderr
    assert workspace.ran() == []


@pytest.mark.slow
def test_broken_records_are_as_good_as_none(workspace, finished):
    finished("prepare")
    workspace.make("prepare", "RECIPE=x", "prepare.seed=7")
    run = workspace.root / "runs/x"
    for text in ("[]", '{"overrides": [1]}', "{"):
        (run / "run.json").write_text(text)
        workspace.make("runs/x/prepare/manifest.json")
    record = json.loads((run / "prepare/manifest.json").read_text()) | {"schema": 1}
    del record["seal"]
    for inputs in (["x"], [{"file": "a"}], [{"sha256": "0"}]):
        (run / "prepare/manifest.json").write_text(json.dumps(record | {"inputs": inputs}))
        assert "damaged" in workspace.make("why", "RECIPE=x").stdout
    newer = record | {"schema": 3}
    (run / "prepare/manifest.json").write_text(json.dumps(newer))
    for goal in ("why", "prepare"):  # never made again by an older checkout
        refused = workspace.make(goal, "RECIPE=x", ok=False)
        assert (
            "schema 3 is newer; this code reads schema 2; next: update this checkout" in refused.stdout + refused.stderr
        )
    assert json.loads((run / "prepare/manifest.json").read_text()) == newer
    (run / "prepare/manifest.json").write_text("{")
    for shared in (workspace.root / "runs/.cache/prepare").glob("*/manifest.json"):
        shared.write_text("{")
    workspace.make("prepare", "RECIPE=x")
    workspace.make("-q", "prepare", "RECIPE=x")


@pytest.mark.seconds
def test_a_damaged_run_json_is_named_where_its_overrides_are_needed(workspace):
    workspace.make("prepare", "RECIPE=x", "prepare.seed=7")
    run = workspace.root / "runs/x_prepare.seed-7"
    for text in ("{", '{"recipe": "x", "overrides": [1]}', '{"format": 2, "recipe": "x", "overrides": []}'):
        (run / "run.json").write_text(text)
        assert (
            "runs/x_prepare.seed-7/run.json: "
            in workspace.make(f"runs/{run.name}/prepare/manifest.json", ok=False).stderr
        )
    workspace.make("sync", "RECIPE=x", "prepare.seed=7")
    workspace.make(f"runs/{run.name}/prepare/manifest.json")


@pytest.mark.seconds
def test_metrics_of_sync_that_cannot_be_read_make_sync_run_again(workspace, finished):
    finished("train")
    file = workspace.root / "runs/x/sync/manifest.json"
    record = json.loads(file.read_text())
    rewrite(file, metrics={"storage": "s"})
    workspace.ran()
    assert planned(workspace, "train", "RECIPE=x") == []
    workspace.make("sync", "RECIPE=x")
    assert workspace.ran() == ["sync x"] and json.loads(file.read_text())["metrics"] == record["metrics"]


@pytest.mark.seconds
def test_unknown_names_of_runs_recipes_and_fields_are_reported(workspace, finished):
    finished("prepare")
    assert "did you mean x?" in workspace.make("verify", "RUN=xx", ok=False).stderr
    assert "RUN= is missing; next: make verify RUN=x" in workspace.make("verify", ok=False).stderr
    assert "B=nothing" in workspace.make("diff", "A=x", "B=nothing", ok=False).stderr
    assert "did you mean lr=3?" in workspace.make("train", "RECIPE=x", "LR=3", ok=False).stderr
    assert "did you mean 'x'?" in workspace.make("train", "RECIPE=x.toml", ok=False).stderr
    assert "FROM= is missing" in workspace.make("new", "RECIPE=z", ok=False).stderr
    assert "SHARD is for prepare" in workspace.make("train", "RECIPE=x", "SHARD=0/2", ok=False).stderr
    workspace.make("-n", "./runs/x/prepare/manifest.json")


@pytest.mark.seconds
def test_a_clone_runs_its_own_code_in_the_environment_of_another(workspace, tmp_path):
    (tmp_path / "other").mkdir()
    other = Workspace(tmp_path / "other")
    shutil.rmtree(other.root / ".venv")
    (other.root / ".venv").symlink_to(workspace.root / ".venv")
    python = workspace.root / ".venv/bin/python"  # as installed from the first clone: PYTHONPATH comes before it
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{workspace.root}/lib" exec {sys.executable} "$@"\n'
    )
    for name in ("prepare", "train"):
        program = other.root / f"stages/{name}.py"
        program.write_text("import sft\nopen('code', 'a').write(sft.__file__ + chr(10))\n" + program.read_text())
    shutil.copy(REPO / "env/local.sh", other.root / "env/local.sh")
    other.make("train", "RECIPE=x")
    code = (other.root / "code").read_text().split()
    assert code == [str(other.root / "lib/sft/__init__.py")] * 2
    by_hand = subprocess.run(
        [".venv/bin/python", "stages/convert.py", "runs/x"], cwd=other.root, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    assert by_hand.returncode == 1 and f"next: export PYTHONPATH={other.root}/lib" in by_hand.stderr
    module = subprocess.run(
        [".venv/bin/python", "-m", "sft.launch.commands", "jobs", "runs"], cwd=other.root, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, check=False,
    )  # fmt: skip
    assert module.returncode == 1 and f"would run the code of {workspace.root}" in module.stderr
