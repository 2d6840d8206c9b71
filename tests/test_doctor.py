"""The doctor's table: every check green where it should be, red with a reason and a next command where not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from published import publish, step_record
from sft.common.errors import SftError
from sft.formats.metrics import Attempt
from sft.launch import beaker, slurm
from sft.launch.doctor import context as contexts
from sft.launch.doctor import doctor, training
from sft.recipe import recipe
from sft.runner import plan

REPO = Path(__file__).parents[1]
CLUSTER = """
launcher = "beaker"
clusters = ["ai2/jupiter"]
shared_disk = false
storage = "/weka/b/sft"
runs = "/weka/b/runs"
mounts = ["b:/weka/b"]
workspace = "ai2/team"
budget = "ai2/money"
image = "ann/image"
gpu = "H100"
gpu_memory_gb = 80
gpus_per_node = 8
"""


@pytest.fixture
def examine(workspace, monkeypatch):
    """rows = examine(cluster file, recipe old, new): {what: rows}."""
    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr(plan, "REPO", workspace.root)
    monkeypatch.setattr(recipe, "CLUSTERS", workspace.root / "env")
    monkeypatch.setenv("SFT_USER", "ann")
    for command in (["init", "--quiet"], ["remote", "add", "origin", "https://example.org/x"]):
        subprocess.run(["git", *command], cwd=workspace.root, check=True)

    def run(cluster: str = 'storage = "{runs}/.storage"', old: str = "", new: str = "") -> dict[str, list[doctor.Row]]:
        (workspace.root / "env" / "here.toml").write_text(cluster)
        loaded = recipe.load(workspace.recipe("y", old, new), cluster="here")
        place = plan.Place(workspace.root / "runs", (), "here")
        found: dict[str, list[doctor.Row]] = {}
        for row in doctor.examine(doctor.Context(place, loaded, place.load_cluster())):
            found.setdefault(row.what, []).append(row)
        return found

    return run


def red(rows: dict[str, list[doctor.Row]]) -> dict[str, doctor.Row]:
    return {what: row for what, many in rows.items() for row in many if row.state == doctor.RED}


def test_a_sound_recipe_on_this_machine_has_no_red_line(examine):
    rows = examine()
    assert not red(rows)
    assert {"data", "stages done", "storage", "batch", "steps", "warm-up", "memory"} <= set(rows)


TRAIN = "seq_len = 512\nglobal_batch_tokens = 4096\nlr = 1e-3  # why"


@pytest.mark.parametrize(
    ("cluster", "old", "new", "what", "found", "then"),
    [
        ('storage = "{runs}/s"', '"rows.jsonl"', '"gone.jsonl"', "data", "gone.jsonl", "DATA="),
        ('storage = "{runs}/s"', 'preset = "olmo3-tiny"', 'base = "gone"', "model", "no file or folder 'gone' under ", "name its folder"),
        ('storage = "/dev/null/none"', "", "", "storage", "cannot write to", "storage in env/here.toml"),
        ('storage = "{runs}/s"', TRAIN, TRAIN + "\nwarmup_fraction = 1.0", "warm-up", "never reached", "warmup_fraction="),
        (CLUSTER.replace("/weka/b/sft", "/other"), "", "", "storage", "none of the mounts", "env/here.toml"),
        (CLUSTER.replace('image = "ann/image"', ""), "", "", "scheduler", "'image' is missing", "env/here.toml"),
        (CLUSTER, '"olmo3-tiny"', '"olmo3-32b"', "memory", "80.0 GB", "recompute=auto"),
        (CLUSTER, "tokens = 4096", "tokens = 5120", "batch", "8 x 512", "global_batch_tokens"),
        ('storage = "{runs}/s"\n[on.train]\nprocesses = 2\nshard_degree = 3', "", "", "batch", "shard_degree = 3 does not divide the 2 processes", "divisor of 2"),
        ('storage = "{runs}/s"\n[on.train]\nprocesses = 2\ncontext_degree = 3', "", "", "batch", "context_degree = 3 does not divide", "context_degree=1"),
        ('storage = "{runs}/s"', TRAIN, TRAIN + '\nfreeze = ["nosuch"]', "trained", "freeze: 'nosuch' matches no parameter", "correct it"),
        ('storage = "{runs}/s"', TRAIN, TRAIN + '\nlr_factors = { "x*" = 2 }', "trained", "lr_factors: 'x*' matches no parameter", "correct it"),
        ('storage = "{runs}/s"', 'tasks = ["one"]', 'tasks = ["t"]\nharness = "olmo-eval"', "evaluation", "runs on Beaker", "CLUSTER"),
        (CLUSTER, 'tasks = ["one"]', 'tasks = ["t"]\nharness = "olmo-eval"', "evaluation", "no image", "evaluate_image"),
        ('storage = "{runs}/s"\nlauncher = "slurm"', "", "", "scheduler", "sbatch: not found", "login node"),
        ('storage = "{runs}/s"\nlauncher = "slurm"\nshared_disk = false', "", "", "job", "env/here.toml, or [on.here.", "shared_disk = true"),
        ('storage = "{runs}/s"\nlauncher = "slurm"\ntime = "24h"', "", "", "job", "time = '24h'", "correct it"),
        ('storage = "{runs}/s"\ngpus_per_node = 99', "", "", "GPUs", "is planned for", "gpus_per_node in env/here.toml"),
        (CLUSTER + "[on.train]\ngpus = 16", "", "", "GPUs", "train requests 16 on each node, which has 8", "gpus_per_node in env/here.toml"),
    ],
)  # fmt: skip
def test_a_red_line_says_why_and_what_next(examine, monkeypatch, cluster, old, new, what, found, then):
    if "slurm" in cluster:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    row = red(examine(cluster, old, new))[what]
    assert found in row.found and then in row.next and "next: " not in row.found + row.next, row


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{% for %}", "line 1: "),
        (b" ", "the template is empty"),
        (b"\xff\xfe", "not a text in UTF-8"),
        ("\ufeff{{ messages }}".encode(), "begins with a byte order mark"),
        (b"{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}", None),
    ],
)
def test_a_template_that_the_export_will_have_is_read_before_training(examine, content, found):
    Path("recipes/t.jinja").write_bytes(content)  # of the workspace
    row = examine('storage = "{runs}/s"', "[evaluate]", '[convert]\neval_template = "t.jinja"\n[evaluate]')[
        "eval_template"
    ][0]
    assert (row.state == doctor.RED and found in row.found) if found else row.state == doctor.OK


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("\ndecay_fraction = 0.5", "decay_fraction = 0.5: only schedule = 'wsd' reads it"),
        ("\nsteps = 3\nepochs = 2.0", "epochs = 2.0: only steps = 0 reads it"),
        ('\nschedule = "wsd"\ndecay_fraction = 0.5', None),
    ],
)
def test_options_that_others_turn_off_are_named(examine, more, found):
    rows = examine('storage = "{runs}/s"', TRAIN, TRAIN + more).get("not read", [])
    assert [row.found for row in rows] == ([found] if found else [])


@pytest.mark.parametrize(
    ("gpu", "size"),
    [("NVIDIA A100 80GB", 80), ("NVIDIA A100 40GB", 40), ("NVIDIA H100", 80), ("H200", 141), ("NVIDIA B200", 180), ("NVIDIA L40S", 48),
     ("NVIDIA L4", 24), ("NVIDIA RTX A6000", 48), ("A100", 0), ("NVIDIA V100", 0), ("", 0)],
)  # fmt: skip
def test_the_memory_of_a_gpu_is_known_by_its_name_unless_there_are_several_sizes(gpu, size):
    assert contexts.memory_gb(gpu) == size


@pytest.mark.seconds
def test_a_cluster_whose_gpus_are_not_stated_is_planned_with_what_the_recipe_or_the_scheduler_says(
    examine, monkeypatch
):
    unstated = CLUSTER.replace('gpu = "H100"\ngpu_memory_gb = 80\n', "")
    old, new = '"olmo3-tiny"', '"olmo3-32b"'
    (row,) = examine(unstated, old, new)["memory"]
    assert (
        row.state == contexts.NOTE
        and '[on.here.train] gpu = "A100 80GB"' in row.next
        and "gpu_memory_gb in env/here.toml" in row.next
    )
    place = plan.Place(Path("runs"), (), "here")

    def memory(kind: str = "", *overrides: str) -> doctor.Row:
        monkeypatch.setattr(beaker, "ask", lambda context: contexts.SchedulerAnswer(kind))
        loaded = recipe.load(Path("recipes/y.toml"), overrides, "here")
        rows = doctor.examine(doctor.Context(place, loaded, place.load_cluster()), ask=True)
        return next(r for r in rows if r.what == "memory")

    row = memory("NVIDIA L40S")
    assert row.state == doctor.RED and "[on.here.train]" in row.found and "48.0 GB" in row.found
    assert memory("NVIDIA L40S", "gpu=B200", "recompute=full", "nodes=4", "global_batch_tokens=16384").found.endswith(
        "of 180 GB (B200)"
    )


@pytest.mark.seconds
def test_a_precision_that_the_gpus_do_not_have_is_red_and_not_planned(examine):
    fp8 = TRAIN + '\nprecision = "fp8"'
    (row,) = examine(CLUSTER, TRAIN, fp8)["precision"]
    assert row == doctor.Row(doctor.OK, "precision", "fp8 on H100")
    older = CLUSTER.replace("H100", "A100")
    (row,) = examine(older, TRAIN, fp8)["precision"]
    assert row.state == doctor.RED and "the GPUs of CLUSTER=here are A100" in row.found and "precision=bf16" in row.next
    place = plan.Place(Path("runs"), (), "here")
    with pytest.raises(SftError, match="the GPUs of CLUSTER=here are A100"):
        plan.work(place, recipe.load(Path("recipes/y.toml"), cluster="here"), ["train"])
    file = examine(CLUSTER, TRAIN, fp8.replace("512", "24").replace("4096", "192")) and Path("recipes/y.toml")
    file.write_text(file.read_text().replace('"olmo3-tiny"', '"olmo3-tiny"\nvocab_size = 1024'))
    with pytest.raises(SftError, match="a rank has 24 tokens of a microbatch"):
        list(training.precision(doctor.Context(place, recipe.load(file, cluster="here"), place.load_cluster())))
    assert "precision" not in examine(CLUSTER)


def test_hours_have_a_band_and_follow_a_measured_mfu(examine):
    steps = TRAIN + "\nsteps = 1000"
    vocabulary = 'preset = "olmo3-tiny"\nvocab_size = 1024'
    rows = examine(CLUSTER, 'preset = "olmo3-tiny"', vocabulary)
    assert rows["hours"][0].state == doctor.SKIPPED
    place = plan.Place(Path("runs"), (), "here")
    file = Path("recipes/y.toml")
    file.write_text(file.read_text().replace(TRAIN, steps))
    context = doctor.Context(place, recipe.load(file, cluster="here"), place.load_cluster())
    row = next(training.hours(context))
    assert "MFU of 40% assumed" in row.found and " to " in row.found
    folder = Path("runs/old/train")
    folder.mkdir(parents=True)
    publish(folder, [], config={"model": {"preset": "olmo3-tiny"}})
    damaged = Path("runs/other/train")
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{}")
    (damaged / "metrics.jsonl").touch()

    def measured(device: str, *mfus: float) -> None:
        records = [step_record(step, mfu=mfu) for step, mfu in enumerate(mfus, 1)]
        header = Attempt(1, 0, 8, device, 989.4, "formula")
        (folder / "metrics.jsonl").write_bytes(b"".join(r.to_bytes() for r in (header, *records)))

    measured("NVIDIA A100-SXM4-80GB", 0.5)
    assert "assumed" in next(training.hours(context)).found
    measured("NVIDIA H100 80GB HBM3", 0.2, 0.5, 0.5)
    assert "MFU of 50% measured in an earlier run" in next(training.hours(context)).found


def test_checkpoints_that_do_not_fit_are_red(examine, monkeypatch):
    examine()
    file = Path("recipes/y.toml")
    file.write_text(file.read_text().replace(TRAIN, TRAIN + "\nsteps = 1000\nsave_every = 10").replace(
        'preset = "olmo3-tiny"', 'preset = "olmo3-7b"'))  # fmt: skip
    place = plan.Place(Path("runs"), (), "here")
    context = doctor.Context(place, recipe.load(file, cluster="here"), place.load_cluster())
    row = next(training.disk(context))
    assert row.state == doctor.RED and "101 of 87.6 GB" in row.found and "keep=2" in row.next


def test_a_run_that_stopped_halfway_on_a_disk_that_just_fits_goes_on(examine, monkeypatch):
    examine('storage = "{runs}/s"', TRAIN, TRAIN + "\nsteps = 1000\nsave_every = 100\nephemeral_every = 0")
    place = plan.Place(Path("runs"), (), "here")
    context = doctor.Context(place, recipe.load(Path("recipes/y.toml"), cluster="here"), place.load_cluster())
    monkeypatch.setattr(doctor.Context, "model", property(lambda self: SimpleNamespace(parameters=100)))
    used = shutil.disk_usage(".")._replace(free=7000)  # 10 steps of 1200 bytes: half of them are there
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: used)
    assert next(training.disk(context)).state == doctor.RED
    for step in range(100, 600, 100):
        (context.run / "train" / f"step{step}").mkdir(parents=True)
        (context.run / "train" / f"step{step}" / "model.safetensors").write_bytes(bytes(1200))
    row = next(training.disk(context))
    assert row.state == doctor.OK and "6.0 kB of them saved already" in row.found


@pytest.mark.seconds
def test_a_launch_is_refused_for_what_the_doctor_says(workspace):
    (workspace.root / "recipes" / "z.toml").write_text(
        (workspace.root / "recipes" / "x.toml")
        .read_text()
        .replace("lr = 1e-3  # why", "lr = 1e-3\nwarmup_fraction = 1.0")
    )
    done = workspace.make("train", "RECIPE=z", ok=False)
    assert "warm-up: warmup_fraction = 1" in done.stderr and "make doctor RECIPE=z CLUSTER=local" in done.stderr
    assert workspace.ran() == ["prepare z", "sync z"]


@pytest.mark.seconds
def test_make_doctor_is_one_table_with_an_exit_status_and_needs_no_environment(workspace):
    done = workspace.make("doctor", "RECIPE=x")
    assert "ok    recipe" in done.stdout and "RED" not in done.stdout
    shutil.rmtree(workspace.root / ".venv")
    assert "ok    batch" in workspace.make("doctor", "RECIPE=x").stdout
    done = workspace.make("doctor", "RECIPE=x", "warmup_fraction=1", ok=False)
    assert "RED   warm-up" in done.stdout and "1 red line" in done.stderr


@pytest.mark.seconds
def test_every_shipped_recipe_is_examined_on_every_kind_of_cluster(monkeypatch):
    monkeypatch.setenv("SFT_USER", "ann")
    for file in sorted((REPO / "recipes").glob("*.toml")):
        for name in ("local", "ai2-jupiter", "slurm"):
            place = plan.Place(Path("runs-none"), (), name)
            rows = doctor.examine(doctor.Context(place, recipe.load(file, cluster=name), place.load_cluster()))
            assert len(rows) > 8, file


@pytest.mark.parametrize(
    ("answer", "state"), [("echo would start; exit 0", "ok"), ("echo invalid partition >&2; exit 1", "RED")]
)
def test_slurm_is_asked_and_nothing_is_submitted(examine, tmp_path, monkeypatch, answer, state):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n{answer}\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    rows = examine('storage = "{runs}/s"\nlauncher = "slurm"\npartition = "a b"')
    assert rows["scheduler"][0].state == doctor.SKIPPED and not (tmp_path / "words").exists()
    place = plan.Place(Path("runs"), (), "here")
    context = doctor.Context(place, recipe.load(Path("recipes/y.toml"), cluster="here"), place.load_cluster())
    _, (row,) = slurm.ask(context)
    assert row.state == state and row.found in ("would start", "invalid partition")
    words = (tmp_path / "words").read_text().splitlines()
    assert words == ["--test-only", "--nodes=1", "--partition=a b", "--wrap=true"]


def test_require_names_every_red_line(examine):
    examine(CLUSTER.replace("/weka/b/sft", "/other"), TRAIN, TRAIN + "\nwarmup_fraction = 1.0")
    place = plan.Place(Path("runs"), (), "here")
    with pytest.raises(SftError) as error:
        doctor.require(place, recipe.load(Path("recipes/y.toml"), cluster="here"), "train")
    assert (
        "warm-up:" in str(error.value)
        and "storage:" in str(error.value)
        and "make doctor RECIPE=y CLUSTER=here" in str(error.value)
    )


@pytest.mark.parametrize(
    ("model", "state", "said"),
    [("weka://b/m", "-", "checked in the job"), ("hf://a/b@c", "-", "not checked, evaluate fetches it"), ("hf://a/b", "note", "has no revision"),
     ("/tmp", "RED", "do not see this machine's disks"), ("weka://other/m", "RED", "on none of the mounts")],
    ids=["mount", "pinned", "unpinned", "here", "unmounted"],
)  # fmt: skip
def test_another_model_is_examined_or_left_to_the_job(examine, model: str, state: str, said: str) -> None:
    found = examine(CLUSTER, 'tasks = ["one"]\n', f'tasks = ["one"]\n[convert]\nmodel = "{model}"\n')
    rows = [row for what, group in found.items() if what.replace("_", " ") == "other model" for row in group]
    assert any(row.state == state and said in row.found for row in rows), rows


def test_data_and_base_on_a_disk_of_jobs_are_left_to_the_job(examine) -> None:
    found = examine(CLUSTER, 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "/weka/b/base"')
    assert [row.state for row in found["base weights"]] == ["-"] and "checked in the job" in found["base weights"][
        0
    ].found
    red = examine(CLUSTER, 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "/weka/c/base"')
    assert any(row.state == "RED" and "on none of the mounts" in row.found for rows in red.values() for row in rows)
