"""The page of a task's replies: what its script reads, that it runs no text of a model, and what it may run (tests/test_pages.py opens it)."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft.common.files import write_atomic
from sft.formats.lines import to_lines
from sft.formats.results import Results, Score, TaskResult
from sft.formats.samples import Sample
from sft.reporting import page as page_module
from sft.reporting import replies

SCORE = Score(value=0.5, stderr=0.1, n=4, higher_is_better=True)
RESULT = TaskResult(metrics={"exact_match,strict": SCORE}, samples_sha256="a", task_sha256="b")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def sample(i: int, text: str, right: int, ended_by: str = "terminator", thought: str | None = None) -> Sample:
    return Sample(doc_id=i, filter="strict", prompt=f"question {i} {EVIL}", target=EVIL, replies=(text,), filtered=[text],
                  scores={"exact_match": right}, doc={"q": i}, ended_by=ended_by, tokens=3, repeats=False, thought=thought)  # fmt: skip


SAMPLES = [sample(0, "Paris", 1), sample(1, EVIL, 0), sample(2, "Rome", 0, "length", f"hm {EVIL}")]


def shown(html: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="items">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def page(samples: list[Sample], before: list[Sample] | None = None) -> str:
    keyed = [{str(s.doc_id): s for s in found} for found in (samples, before or [])]
    return replies.page("run", "capitals", RESULT, *keyed)


def test_a_page_has_every_reply_and_runs_no_text_of_a_model() -> None:
    html = page(SAMPLES)
    task = shown(html)["tasks"][0]
    assert [i["rows"][0]["doc_id"] for i in task["items"]] == [
        2,
        1,
        0,
    ]  # the worst first, of these the one that was cut
    assert ([i["wrong"] for i in task["items"]], [i["cut"] for i in task["items"]]) == (
        [True, True, False],
        [True, False, False],
    )
    assert html.count("<script") == html.count("</script") == 2 and "<img" not in html and "default-src 'none'" in html
    assert 'name="viewport"' in html and 'id="changed"' not in html
    rows = [i["rows"][0] for i in sorted(task["items"], key=lambda i: i["rows"][0]["doc_id"])]
    assert rows == [json.loads(line) for line in to_lines(SAMPLES).decode().splitlines()]


@pytest.mark.parametrize("text", [EVIL, "<!--<script>", "]]>", "a\u2028b\u2029c", "'\"&", "\ud800"], ids=str)
def test_no_text_ends_the_script_that_holds_it(text: str) -> None:
    data = page_module.embedded({text: [text]})
    assert data.isascii() and not set("<>&'") & set(data) and json.loads(data) == {text: [text]}
    assert json.loads(page_module.embedded([math.nan, {"a": (math.inf, 1.5)}])) == ["nan", {"a": ["inf", 1.5]}]


def test_only_the_styles_and_scripts_of_the_page_may_run() -> None:
    html = page(SAMPLES)
    policy = re.search(r'Content-Security-Policy" content="(.*?)">', html)
    assert policy and "unsafe" not in policy[1]
    inline = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", html, re.S)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
    assert len(inline) == 2 and re.findall(r"sha256-([\w+/=]+)", policy[1]) == hashes
    assert " style=" not in html and not re.search(r" on\w+=", html.split("<script")[0])


def test_a_large_page_leaves_out_the_best_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MOST_BYTES", 700)
    task = shown(page(SAMPLES))["tasks"][0]
    assert 0 < len(task["items"]) < 3 and task["left"] == 3 - len(task["items"]) and task["items"][0]["wrong"]


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
    names = replies.write(tmp_path / "x", tmp_path / "report")
    assert names == ["replies/capitals.html"]
    html = (tmp_path / "report" / names[0]).read_text()
    data = shown(html)
    items = data["tasks"][0]["items"]
    assert data["columns"] == ["x", "x_baseline"] and [i["changed"] for i in items] == [True, False, False]
    assert items[0]["rows"][1]["replies"] == ["Nice"] and "doc" not in items[0]["rows"][1] and 'id="changed"' in html
    assert [i["wrong"] for i in items] == [False, True, True]  # of the run, not of its baseline


def manifest_of(folder: Path) -> None:
    from sft.formats import manifest

    outputs = manifest.describe(folder, ["results.json", "samples"])
    made = manifest.Manifest(schema=manifest.Manifest.SCHEMA, stage="evaluate", run=folder.parent.name, key="k", config={}, inputs=(),
                             outputs=outputs, metrics={})  # fmt: skip
    made.write(folder / manifest.NAME)
