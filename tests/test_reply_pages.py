"""The page of a task's replies: what it shows, that it runs no text of a model, and its filters in the order of its items."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from sft.common.files import write_atomic
from sft.formats.lines import to_lines
from sft.formats.results import Results, Score, TaskResult
from sft.formats.samples import Sample
from sft.reporting import replies

SCORE = Score(value=0.5, stderr=0.1, n=4, higher_is_better=True)
RESULT = TaskResult(metrics={"exact_match,strict": SCORE}, samples_sha256="a", task_sha256="b")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def sample(i: int, text: str, right: int, ended_by: str = "terminator", thought: str | None = None) -> Sample:
    return Sample(doc_id=i, filter="strict", prompt=f"question {i} {EVIL}", target=EVIL, replies=(text,), filtered=[text],
                  scores={"exact_match": right}, doc={"q": i}, ended_by=ended_by, tokens=3, repeats=False, thought=thought)  # fmt: skip


SAMPLES = [sample(0, "Paris", 1), sample(1, EVIL, 0), sample(2, "Rome", 0, "length", f"hm {EVIL}")]


def flags(html: str, name: str) -> list[str]:
    return re.findall(rf'data-{name}="(\d)"', html)


def test_a_page_shows_every_reply_and_runs_no_text_of_a_model() -> None:
    html = replies.page("run", "capitals", RESULT, SAMPLES, "", {})
    assert (flags(html, "wrong"), flags(html, "cut")) == (["0", "1", "1"], ["0", "0", "1"])
    assert html.count("<script") == 2 and "<img" not in html and html.count("alert(1)") > 3
    assert "<summary>thought</summary>" in html and "hm &lt;/script&gt;" in html and "default-src 'none'" in html
    assert 'name="viewport"' in html and 'id="changed"' not in html
    rows = re.search(r'<script type="application/json" id="rows">(.*?)</script>', html, re.S)
    assert rows and json.loads(rows[1]) == [json.loads(line) for line in to_lines(SAMPLES).decode().splitlines()]


def test_what_changed_since_the_baseline_is_marked(tmp_path: Path) -> None:
    for run, samples in (
        ("x", SAMPLES),
        ("x_baseline", [replace(SAMPLES[0], scores={"exact_match": 0}, replies=("Nice",)), *SAMPLES[1:]]),
    ):
        folder = tmp_path / run / "evaluate"
        (folder / "samples").mkdir(parents=True)
        write_atomic(folder / "samples/capitals.jsonl", to_lines(samples))
        results = Results(template_sha256="0", backend="hf", device="cpu", dtype="float32", tasks={"capitals": RESULT})
        results.write(folder / "results.json")
        manifest_of(folder)
    names = replies.write(tmp_path / "x", results, tmp_path / "report")
    assert names == ["replies/capitals.html"]
    html = (tmp_path / "report" / names[0]).read_text()
    assert flags(html, "changed") == ["1", "0", "0"] and html.count("the baseline's reply") == 1 and "Nice" in html
    assert "against x_baseline" in html and 'id="changed"' in html


def manifest_of(folder: Path) -> None:
    from sft.formats import manifest

    outputs = manifest.describe(folder, ["results.json", "samples"])
    made = manifest.Manifest(schema=manifest.SCHEMA, stage="evaluate", run=folder.parent.name, key="k", config={}, inputs=(),
                             outputs=outputs, metrics={})  # fmt: skip
    made.write(folder / manifest.NAME)
