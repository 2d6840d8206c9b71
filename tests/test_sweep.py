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
from sft.formats.metrics import Attempt, StepRecord
from sft.launch import sweep
from sft.reporting import __main__ as drawing
from sft.reporting import trainings
from test_report import SCRIPTS, charts_of

SMOKE = REPO / "recipes/smoke.toml"


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


def test_make_compare_shows_curves_where_there_are_no_scores(workspace: Workspace) -> None:
    for name, best in (("x", 1.5), ("x_lr-2e-4", 1.25)):
        run(workspace.root / "runs", name, best)
        (workspace.root / "runs" / name / "run.json").write_text(json.dumps({"recipe": "x", "overrides": []}))
    told = workspace.make("compare", "A=x", "B=x_lr-2e-4").stdout
    assert told.splitlines()[1].startswith("x_lr-2e-4  A") and "not all of them have scores: make evaluate" in told
    assert (workspace.root / "runs/x/compare/x_lr-2e-4-training.html").is_file()
