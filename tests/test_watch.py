"""sft.evaluation.watch: kept checkpoints are evaluated as they appear, once each, and training never waits for them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import warm
from conftest import REPO
from patience import PATIENCE
from published import publish_step
from sft.checkpoint import step_folder
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.evaluation import watch
from sft.formats import evaluations, manifest
from sft.formats.evaluations import Evaluation
from sft.formats.identity import write_identity
from sft.formats.results import Score, ValidationLoss
from sft.formats.steps import METADATA, StepMetadata, named_step
from sft.recipe import recipe
from sft.recipe.schema import Evaluate
from sft.runner import plan
from sft.training.evaluations import DueStep, held

ME = "0" * 64
SMOKE = REPO / "recipes" / "smoke.toml"
FIELDS = [
    "steps=5", "save_every=2", "ephemeral_every=3", "every=2", "every_limit=2", "min_stop_rate=0", "max_empty_fraction=1",
    "validation_documents=2", "keep=1", 'tasks=["smoke_generate"]', "async_save=false",
]  # fmt: skip


def step(train: Path, number: int, ephemeral: bool = False, text: str = "") -> Path:
    folder = train / f"step{number}"
    folder.mkdir(parents=True, exist_ok=True)
    StepMetadata(ephemeral=ephemeral).write(folder / METADATA)
    (folder / "weights").write_text(text or str(number))
    publish_step(folder, number, ["weights"])
    return folder


def numbers(found: list[DueStep]) -> list[int]:
    return [due.step for due in found]


def evaluation(train: Path, number: int, settings: str = "", **found: Any) -> Evaluation:
    digest = hash_file(train / f"step{number}" / "manifest.json")
    return Evaluation(step=number, checkpoint=digest, settings=settings, **{"tasks": {}, **found})


def test_the_first_kept_step_at_or_after_each_multiple_is_due_and_the_last(tmp_path: Path) -> None:
    smoke = recipe.load(SMOKE, ["every=100"])
    for n in (60, 120, 160, 240, 410, 420):
        step(tmp_path, n)
    step(tmp_path, 300, ephemeral=True)
    (tmp_path / "step500").mkdir()  # not whole yet
    assert numbers(watch.due(tmp_path, plan.Place(tmp_path), smoke)) == [120, 240, 410]
    assert numbers(watch.due(tmp_path, plan.Place(tmp_path), smoke, last=True)) == [120, 240, 410, 420]


def test_a_step_is_due_again_when_it_was_made_again_or_is_asked_something_else(tmp_path: Path) -> None:
    smoke = recipe.load(SMOKE, ["every=100"])
    for n in (100, 200):
        step(tmp_path, n)
    settings = watch.settings(plan.Place(tmp_path), smoke)
    evaluations.write(tmp_path, [evaluation(tmp_path, n, settings) for n in (100, 200)])
    assert watch.due(tmp_path, plan.Place(tmp_path), smoke) == []
    assert watch.due(tmp_path, plan.Place(tmp_path), recipe.load(SMOKE, ["every=100", "batch_size=3"])) == []
    assert numbers(watch.due(tmp_path, plan.Place(tmp_path), recipe.load(SMOKE, ["every=100", "every_limit=3"]))) == [
        100,
        200,
    ]
    assert numbers(watch.due(tmp_path, plan.Place(tmp_path), recipe.load(SMOKE, ["every=100", "system_prompt=x"]))) == [
        100,
        200,
    ]
    step(tmp_path, 200, text="trained again")
    assert numbers(watch.due(tmp_path, plan.Place(tmp_path), smoke)) == [200]


def test_the_score_that_best_follows_is_the_recipes() -> None:
    up, down, none = (
        Score(value=v, stderr=None, n=9, higher_is_better=h) for v, h in ((0.5, True), (2.0, False), (1.0, None))
    )
    loss = ValidationLoss(loss=1.5, stderr=None, perplexity=4.5, documents=1, labels=9)
    tasks = {"a": {"acc": up, "ppl": down, "x": none}}
    record = Evaluation(step=1, checkpoint="", settings="", tasks=tasks, validation=loss)

    def best(name: str) -> Any:
        return watch.best_score(record, Evaluate(tasks=("a", "b"), best=name))

    assert best("a/acc") == best("") == ("a/acc", 0.5, True)
    assert best("a/ppl") == ("a/ppl", 2.0, False) and best("validation/loss") == ("validation/loss", 1.5, False)
    assert best("a/x") is best("b/acc") is best("a/acc2") is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "every=5,harness=olmo-eval",
            "'every' in .evaluate. = 5: evaluating during training needs harness = 'lm-eval'",
        ),
        ("every_device=gpu", "'every_device' in .evaluate. = 'gpu': cpu, or a GPU such as cuda:1"),
        (
            "best=other/acc",
            "'best' in .evaluate. = 'other/acc': 'validation/loss', or 'task/metric' of one of smoke_generate",
        ),
        ("every=5,backend=vllm", "'every_device' in .evaluate. = 'cpu': backend = 'vllm' needs a GPU"),
        ("best=smoke_choice", "'best' in .evaluate. = 'smoke_choice'"),
    ],
)
def test_what_cannot_be_watched_is_reported_before_training(field: str, message: str) -> None:
    with pytest.raises(SftError, match=message):
        recipe.load(SMOKE, field.split(","))
    for name in ("smoke_choice/acc", "validation/loss"):
        recipe.load(SMOKE, [f"best={name}"])


def test_retention_leaves_what_is_due_until_it_has_its_record(tmp_path: Path) -> None:
    def retire() -> list[int]:
        for doomed in step_folder.prune(tmp_path, keep=1, protected=held(tmp_path, 100)):
            shutil.rmtree(doomed)
        return [number for number, _ in step_folder.steps(tmp_path)]

    def record(number: int, **found: Any) -> None:
        evaluations.write(tmp_path, [*evaluations.read(tmp_path), evaluation(tmp_path, number, **found)])

    for n in (50, 100, 150, 200, 250):
        step(tmp_path, n)
    step_folder.mark_latest(tmp_path / "step250")
    assert retire() == [100, 200, 250]
    record(100)
    assert retire() == [200, 250]
    record(200, failed="no scores")
    step(tmp_path, 260)
    step_folder.mark_latest(tmp_path / "step260")
    assert retire() == [260]  # the steps that were removed have had their turn: 260 is not the first one after 200


def test_a_bad_step_is_reported_and_does_not_keep_others_from_being_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def evaluate_step(stage: Any, due: DueStep) -> None:
        seen.append(due.step)
        if seen[-1] == 100:
            raise RuntimeError("torn")
        watch.record(stage, evaluation(tmp_path, due.step, watch.settings(stage.place, smoke)))

    monkeypatch.setattr(watch, "evaluate_step", evaluate_step)
    logged: list[str] = []
    write_identity(tmp_path, ME)
    smoke = recipe.load(SMOKE, ["every=100"])
    left = tmp_path / ".work/watch-step50-x/model"
    left.mkdir(parents=True)
    stage = SimpleNamespace(
        out=tmp_path, run=tmp_path, place=plan.Place(tmp_path), identity=ME, recipe=smoke, log=logged.append, key="k"
    )
    for n in (100, 200, 300):
        step(tmp_path, n)
    with pytest.raises(SftError, match=r"1 steps have no scores: step100; next: .* make watch RECIPE=smoke"):
        watch.watch(stage, lambda: True, pause=0)  # type: ignore[arg-type]
    assert seen == [100, 200, 300] and not left.exists()
    assert logged == ["step100 has no scores: RuntimeError('torn')"]
    assert [e.failed for e in evaluations.read(tmp_path)] == ["RuntimeError('torn')", None, None]
    assert numbers(watch.due(tmp_path, stage.place, smoke)) == [100]  # the next watcher tries it again


def test_a_changed_task_file_is_asked_again(tmp_path: Path) -> None:
    tasks = tmp_path / "data/mine"
    tasks.mkdir(parents=True)
    (tasks / "checks.py").write_text("limit = 1\n")
    place = plan.Place(tmp_path, (tmp_path / "data",))
    mine = recipe.load(SMOKE, ["task_dir=mine"])
    before = watch.settings(place, mine)
    assert watch.settings(place, mine) == before
    (tasks / "checks.py").write_text("limit = 20\n")
    assert watch.settings(place, mine) != before


def test_a_watcher_waits_for_the_run_of_its_own_recipe(tmp_path: Path) -> None:
    write_identity(tmp_path, ME)
    stage = SimpleNamespace(out=tmp_path, identity=ME, recipe=recipe.load(SMOKE, []))
    stage.identity = "another recipe"
    with pytest.raises(SftError, match="not trained from this recipe"):
        watch.watch(stage, lambda: True, pause=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def stage(runs: Path, *command: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    python = runs.parent / "python"
    warm.write_python(python, path=str(REPO / "lib"))
    return subprocess.Popen([python, *command], cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=environment, **options)  # fmt: skip


@pytest.mark.slow
def test_training_starts_evaluations_waits_for_the_last_and_keeps_their_records_out_of_its_own_digest(
    runs: Path,
) -> None:
    run = str(runs / recipe.load(SMOKE, FIELDS).run)
    for name in ("prepare", "sync"):
        process = stage(runs, f"stages/{name}.py", run, *FIELDS)
        assert process.wait() == 0, process.communicate()[0]
    process = stage(runs, "-m", "sft.training", run, *FIELDS)
    logged = process.communicate()[0]
    assert process.returncode == 0, logged
    train = Path(run) / "train"
    records = evaluations.read(train)
    assert [e.step for e in records] == [2, 4, 5], logged
    assert all(
        e.tasks["smoke_generate"]["exact_match"].n == 2 and e.validation and e.validation.documents == 2
        for e in records
    )
    assert records[0].checkpoint == hash_file(train / "step2" / "manifest.json")
    assert logged.index("[train] done in") < logged.index(
        "[watch] step5:"
    )  # training is safe before the last evaluation
    assert named_step(train, "BEST") == train / "step2"  # all score 0 after so few steps: the first stays
    assert [number for number, _ in step_folder.steps(train)] == [2, 5]  # keep=1, once every step had its scores
    assert not [o for o in manifest.load(train / "manifest.json").outputs if "evaluations" in o.path]
    assert {f.name for f in (Path(run) / ".work").glob("watch-*/*")} == {"samples"}
    assert watch.due(train, plan.Place(runs), recipe.load(SMOKE, FIELDS), last=True) == []


@pytest.mark.slow
def test_a_watcher_that_is_stopped_ends_at_once_and_one_whose_training_died_ends_by_itself(runs: Path) -> None:
    run = str(runs / recipe.load(SMOKE, FIELDS).run)
    train = Path(run) / "train"
    if not (train / ".identity").is_file():
        pytest.fail("needs the run of the test before")
    evaluations.write(
        train, [record for record in evaluations.read(train) if record.step != 2]
    )  # due at once, unlike the last
    process = stage(runs, "stages/watch.py", run, *FIELDS, "--until-end-of-input", stdin=subprocess.PIPE)
    until = time.monotonic() + PATIENCE
    while not list((Path(run) / ".work").glob("watch-*/model")):  # it works on a step
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) in (143, -signal.SIGTERM)
    process = stage(runs, "stages/watch.py", run, *FIELDS, "--until-end-of-input", stdin=subprocess.PIPE)
    logged = process.communicate()[0]  # closes standard input, as the death of training would
    assert process.returncode == 0, logged
    assert sorted(e.step for e in evaluations.read(train)) == [2, 4, 5]
    assert not list((Path(run) / ".work").glob("watch-*/model"))
