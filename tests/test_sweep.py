"""make sweep: all combinations, shared data, resumed by the same command; make compare of trainings without scores."""

from __future__ import annotations

import html.parser
import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPO, Workspace
from sft.common import columns
from sft.common.errors import SftError
from sft.formats.comparison import Comparison
from sft.formats.metrics import Attempt, StepRecord
from sft.formats.results import Results, Score, TaskResult
from sft.launch import sweep
from sft.reporting import __main__ as drawing
from sft.reporting import trainings
from test_report import SCRIPTS, charts_of

SMOKE = REPO / "recipes/smoke.toml"
EMPTY = Comparison(runs=("b", "c", "a"), rows=(), notes=(), fields=())


def test_every_combination_is_a_run_and_seed_means_the_seeds_of_training() -> None:
    found = sweep.siblings(SMOKE, ["lr=1e-5 3e-5", "seed=1 2"], "local")
    assert [s.run for s in found] == [
        f"smoke_lr-{lr}_train.seed-{seed}_data-seed-{seed}" for lr in ("1e-5", "3e-5") for seed in (1, 2)
    ]
    assert found[0].overrides == ("lr=1e-5", "train.seed=1", "train.data_seed=1")
    assert len(sweep.siblings(SMOKE, ["lr=1e-5 0.00001 3e-5"], "local")) == 2  # equal values are one run


@pytest.mark.parametrize(
    ("fields", "message"),
    [(["lr=1e-5"], "one run only"), (["lr="], "lr has no value"), (["lr=1 -1"], "more than 0 is expected"),
     (["lrr=1 2"], "did you mean 'lr'"), (["train.seed=" + " ".join(map(str, range(300)))], "300 runs, at most 256")],
    ids=["one", "none", "bound", "name", "many"],
)  # fmt: skip
def test_a_sweep_that_cannot_be_meant_is_refused_before_anything_runs(fields: list[str], message: str) -> None:
    with pytest.raises(SftError, match=message):
        sweep.siblings(SMOKE, fields, "local")


@pytest.mark.seconds
def test_a_field_that_the_goal_of_a_sweep_does_not_read_is_refused_before_anything_runs(workspace: Workspace) -> None:
    told = workspace.make("sweep", "RECIPE=x", "limit=3 4", ok=False).stderr
    assert "[evaluate] has this field" in told and "or make sweep GOAL=convert or GOAL=evaluate or GOAL=all" in told
    assert not (workspace.root / "runs").exists()
    refused = workspace.make("sweep", "RECIPE=x", "lr=1e-4 2e-4", "GOAL=nope", ok=False).stderr
    assert "GOAL=nope: none of train, convert, evaluate, all" in refused


@pytest.mark.slow
def test_a_sweep_shares_its_data_and_makes_nothing_twice(workspace: Workspace) -> None:
    made = workspace.make("sweep", "RECIPE=x", "lr=1e-4 2e-4", timeout=300)
    assert workspace.ran() == ["prepare x", "sync x", "train x_lr-1e-4", "train x_lr-2e-4"]
    assert "[sweep] 2 runs of x, 1 at a time" in made.stdout
    (workspace.root / "runs/x_lr-2e-4/train/manifest.json").unlink()
    workspace.make("sweep", "RECIPE=x", "lr=1e-4 2e-4", timeout=300)
    assert workspace.ran() == ["train x_lr-2e-4"]


def run(folder: Path, name: str, best: float, steps: int = 40) -> Path:
    """A training whose loss falls to `best`."""
    (folder / name / "train").mkdir(parents=True)
    lines = [Attempt(1, 0, 1, "cpu", None, "f", steps).to_bytes()]
    for n in range(1, steps + 1):
        step = StepRecord(n, best + 1 / n, 1e-4, 1.0, 10, 100 * n, 1000.0, 0.1, 0.0, 2.0)
        if n % 10 == 0:
            step = replace(step, validation_loss=best + 2 / n, validation_sources={"<b>a</b>.jsonl": best})
        lines.append(step.to_bytes())
    (folder / name / "train/metrics.jsonl").write_bytes(b"".join(lines))
    return folder / name


class Page(html.parser.HTMLParser):
    """Tags that are opened and closed in order, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_trainings_are_compared_by_step_tokens_and_time_with_the_best_first(tmp_path: Path) -> None:
    runs = [run(tmp_path, "x_lr-1e-4", 1.5), run(tmp_path, "x_lr-2e-4", 1.25), run(tmp_path, "x_lr-4e-4", 1.75, 20)]
    found = trainings.compare(runs)
    assert [t.name for t in found.trainings] == ["x_lr-2e-4", "x_lr-1e-4", "x_lr-4e-4"]
    table = trainings.text(found).splitlines()
    assert table[1].split()[:2] == ["x_lr-2e-4", "A"] and "1.3000" in table[1]
    assert all(len(line) <= columns.WIDTH for line in table)
    page = SCRIPTS.sub("", drawing.page(runs, None))
    assert Page(page).open == []
    curves = charts_of(page)
    assert [c["title"] for c in curves] == [
        "training loss, smoothed",
        "validation loss",
        "validation loss of <b>a</b>.jsonl",
    ]
    assert all(c["axes"] == ["step", "tokens", "hours of training"] for c in curves)
    assert [line["name"] for line in curves[0]["lines"]] == [t.name for t in found.trainings]
    for title in ("Trainings", "Curves", "By source"):
        assert f"<h2>{title}</h2>" in page
    assert "<b>a</b>.jsonl" not in page and "&lt;b&gt;a&lt;/b&gt;.jsonl" in page
    assert "http://" not in page and "https://" not in page


def test_a_run_without_steps_is_reported(tmp_path: Path) -> None:
    (tmp_path / "y").mkdir()
    with pytest.raises(SftError, match="no steps yet; next: make train for y"):
        trainings.compare([run(tmp_path, "x", 1.0), tmp_path / "y"])


@pytest.mark.seconds
def test_make_compare_shows_curves_where_there_are_no_scores(workspace: Workspace) -> None:
    for name, best in (("x", 1.5), ("x_lr-2e-4", 1.25)):
        run(workspace.root / "runs", name, best)
        (workspace.root / "runs" / name / "run.json").write_text(json.dumps({"recipe": "x", "overrides": []}))
    told = workspace.make("compare", "A=x", "B=x_lr-2e-4").stdout
    assert told.splitlines()[1].startswith("x_lr-2e-4  A") and "not all of them have scores: make evaluate" in told
    assert (workspace.root / "runs/x/compare/x_lr-2e-4-training.html").is_file()


@pytest.mark.parametrize(
    ("local", "gpus", "jobs", "expected"),
    [(True, [], 0, [""]), (True, [], 2, ["", ""]), (True, ["0"], 0, [""]), (True, ["0"], 3, [""]), (True, list("0123"), 0, list("0123")),
     (True, ["GPU-a", "GPU-b"], 1, ["GPU-a"]), (False, ["0"], 0, [""] * 6), (False, [], 2, ["", ""])],
    ids=["cpu", "cpu-2", "one", "one-3", "four", "one-of-two", "jobs", "two-jobs"],
)  # fmt: skip
def test_runs_are_dealt_to_gpus_one_each_and_to_a_cpu_one_at_a_time(
    local: bool, gpus: list[str], jobs: int, expected: list[str]
) -> None:
    assert sweep.slots(local, gpus, jobs, 6) == expected


def test_more_runs_at_a_time_than_gpus_are_refused() -> None:
    with pytest.raises(SftError, match="JOBS=3: this machine shows 2 GPUs, and each run takes one; next: JOBS=2"):
        sweep.slots(True, ["0", "1"], 3, 6)


@pytest.mark.slow
def test_two_runs_train_at_once_on_a_gpu_each(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")  # two GPUs that are not there: the stages are a few lines
    monkeypatch.setenv("SFT_LOCKS", str(tmp_path_factory.mktemp("locks")))
    file = workspace.root / "stages/train.py"
    meet = (
        "    import os, time\n    name = os.environ['CUDA_VISIBLE_DEVICES']\n    open(f'at-{name}', 'w').close()\n"
        "    until = time.monotonic() + 60\n    while not all(os.path.exists(f'at-{n}') for n in '79') and time.monotonic() < until:\n"
        "        time.sleep(0.02)\n    open('gpus', 'a').write(name + ' ' + str(time.monotonic() < until) + chr(10))\n"
    )
    file.write_text(file.read_text().replace("def body(stage):\n", "def body(stage):\n" + meet))
    made = workspace.make("sweep", "RECIPE=x", "lr=1e-4 2e-4", timeout=300)
    assert "2 runs of x, 2 at a time" in made.stdout
    assert sorted((workspace.root / "gpus").read_text().split("\n")[:-1]) == ["7 True", "9 True"]


def test_the_scores_of_a_sweep_are_compared_with_the_best_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.reporting import sweeps

    values = {"a": 0.25, "b": 0.75, "c": 0.5}
    for name, value in values.items():
        folder = tmp_path / name / "evaluate"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        score = Score(value=value, stderr=None, n=8, higher_is_better=True)
        task = TaskResult(metrics={"acc": score}, samples_sha256="1", task_sha256="2")
        Results(template_sha256="0", backend="hf", device="cpu", dtype="float32", tasks={"t": task}).write(
            folder / "results.json"
        )
    seen: list[list[str]] = []
    monkeypatch.setattr(sweeps.compare, "compare", lambda runs: seen.append([r.name for r in runs]) or EMPTY)
    monkeypatch.setattr(sweeps.compare, "text", lambda _: "table")
    monkeypatch.setattr(sweeps.comparison, "draw", lambda page, runs: f"{page.name} of {len(runs)}")
    page = tmp_path / "x.html"
    assert sweeps.best_first([tmp_path / n for n in values], page) == "table\n\nx.html of 3"
    assert seen == [["b", "c", "a"]] and page.with_suffix(".json").is_file()
    assert sweeps.best_first([tmp_path / "a"], page) == "" and not page.with_suffix(".json").exists()
