"""The pages in a real browser: nothing is cut off, nothing is logged as an error, on a phone and a desk, in light and in dark.

The data is hostile: long words without a break, markup and quotes in every name and text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import browser
import test_compare
from browser import Browser, NoBrowser
from published import publish_again
from sft.evaluation import compare
from sft.formats import evaluations
from sft.formats.evaluations import Evaluation
from sft.formats.lines import to_lines
from sft.formats.metrics import read_steps
from sft.formats.results import Score, TaskResult
from sft.formats.samples import Sample
from sft.reporting import __main__ as drawing
from sft.reporting import page, replies, report
from test_report import whole_run

WIDTHS = (390, 1280)
LONG = "averylongwordwithoutanybreak" * 6
EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"`${window.hacked=1}\u2028"
NAMES = ["report", "compare", "trainings", "replies"]


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    """One browser for all pages."""
    try:
        browser.program()
    except NoBrowser as error:
        pytest.skip(f"no browser to look at pages with: {error}")
    with Browser() as started:
        yield started


def trained(run: Path) -> None:
    """Gives a run losses by source, under hostile names."""
    file = run / "train" / "metrics.jsonl"
    steps = [
        replace(s, sources={EVIL: s.loss, LONG: 2.0}, validation_sources={EVIL: 1.0} if s.step % 40 == 0 else None)
        for s in read_steps(file)
    ]
    file.write_bytes(b"".join(s.to_bytes() for s in steps))
    publish_again(run / "train")


def samples(count: int) -> list[Sample]:
    return [
        Sample(doc_id=i, filter="none", prompt=f"question {i} {LONG} {EVIL}", target=EVIL, replies=(f"reply {i} {EVIL} {LONG}",), filtered=["r"],
               scores={"acc": float(i % 3 > 0)}, doc={"q": i}, ended_by="length" if i % 5 == 0 else "terminator", tokens=3, repeats=False,
               thought=f"hm {EVIL}" if i % 2 else None)
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [whole_run(folder / name) for name in ("smoke", f"smoke_lr-{LONG}")]
    score = Score(value=0.5, stderr=0.1, n=25, low=0.3, high=0.7, higher_is_better=True)
    for run in runs:
        trained(run)
    asked = [
        Evaluation(step=n, checkpoint="c", settings="s", tasks={f"{EVIL} {LONG}": {"acc": score}}) for n in (100, 200)
    ]
    evaluations.write(runs[0] / "train", asked)
    result = TaskResult(metrics={"acc": score}, task_sha256="t", samples_sha256="s")
    keyed = {str(s.doc_id): s for s in samples(120)}
    before = {key: replace(s, scores={"acc": 1.0}) for key, s in keyed.items()}
    compared = [
        test_compare.evaluated(folder / name, seed, lr=seed) for name, seed in (("a<b>", 1), (LONG[:120], 3), ("c", 5))
    ]
    for run in compared:  # of their trainings only the options are real
        (run / "train" / "metrics.jsonl").unlink(missing_ok=True)
    texts = {
        "report": report.page(runs[0]),
        "compare": drawing.page(compared, compare.compare(compared)),
        "trainings": drawing.page(runs, None),
        "replies": replies.page("run", f"task {LONG}", result, keyed, before),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.seconds
@pytest.mark.parametrize("name", NAMES)
def test_nothing_overflows_and_nothing_is_logged_at_any_width_or_theme(
    opened: Browser, pages: dict[str, Path], name: str
) -> None:
    for width in WIDTHS:
        for dark in (False, True):
            seen = opened.look(pages[name], width=width, dark=dark)
            assert (seen.overflows, seen.errors) == ([], []), f"{name} at {width} px, {'dark' if dark else 'light'}"
    assert opened.evaluate("window.hacked") is None
    drawn = opened.evaluate(
        "[...document.querySelectorAll('figure.chart')].map(f => f.querySelectorAll('canvas').length)"
    )
    assert set(drawn) <= {1} and (drawn or name == "replies")


@pytest.mark.seconds
def test_on_a_phone_a_number_is_seen_beside_its_name(opened: Browser, pages: dict[str, Path]) -> None:
    opened.look(pages["report"], width=390)
    rights = opened.evaluate(
        "[...document.querySelectorAll('td:first-child + td.num')].map(c => c.getBoundingClientRect().right)"
    )
    assert len(rights) > 3 and max(rights) <= 390


@pytest.mark.seconds
def test_a_finger_reads_a_point_and_zooms_and_the_axis_becomes_logarithmic(
    opened: Browser, pages: dict[str, Path]
) -> None:
    opened.look(pages["report"], width=390, touch=True)
    where = "(() => { const e = document.querySelector('.plot canvas'); e.scrollIntoView({block: 'center'}); return e.getBoundingClientRect().toJSON() })()"
    box = opened.evaluate(where)
    opened.touch([(box["left"] + box["width"] * 0.6, box["top"] + 100)])
    told = opened.evaluate("document.getElementById('vg-tooltip-element').innerText")
    assert told.startswith("step\t") and "validation loss\t" in told and " at " in told  # the last one before it
    before = opened.evaluate("document.querySelector('.plot canvas').toDataURL()")
    y = box["bottom"] - 45
    opened.touch([(box["left"] + 80 + 12 * k, y) for k in range(10)])
    zoomed = opened.evaluate("document.querySelector('.plot canvas').toDataURL()")
    opened.evaluate("document.querySelector('figure input[type=checkbox]').click(), window.ready")
    log = opened.evaluate(
        "new Promise(r => setTimeout(() => r(document.querySelector('.plot canvas').toDataURL()), 300))"
    )
    assert len({before, zoomed, log}) == 3 and opened.logged() == []


@pytest.mark.seconds
def test_replies_are_filtered_searched_and_exported(opened: Browser, pages: dict[str, Path]) -> None:
    opened.look(pages["replies"], width=1280)
    count = "document.getElementById('count').textContent"
    cards = "document.querySelectorAll('article').length"
    assert (opened.evaluate(count), opened.evaluate(cards)) == ("120 of 120 items", 50)
    assert opened.evaluate("document.getElementById('more').click(), " + cards) == 100
    assert opened.evaluate(f"document.getElementById('wrong').click(), {count}") == "40 of 120 items"
    assert opened.evaluate(f"document.getElementById('cut').click(), {count}") == "8 of 120 items"
    opened.evaluate("text.value = 'Question 30 ', text.dispatchEvent(new Event('input'))")
    assert opened.evaluate(f"new Promise(r => setTimeout(() => r({count}), 400))") == "1 of 120 items"
    opened.evaluate(
        "URL.createObjectURL = blob => { window.blob = blob; return '#' }, document.getElementById('export').click()"
    )
    rows = [json.loads(line) for line in opened.evaluate("blob.text()").split("\n")[:-1]]
    assert rows == [json.loads(to_lines([samples(31)[30]]))]


def test_text_of_data_would_run_if_it_were_not_escaped(opened: Browser, pages: dict[str, Path]) -> None:
    """The names above are hostile indeed: without the page's own escaping and policy they run."""
    file = pages["replies"].with_name("open.html")
    file.write_text(f"<!doctype html><body>{EVIL}</body>")
    opened.look(file, width=390)
    assert opened.evaluate("window.hacked") == 1
    closed = pages["replies"].with_name("closed.html")
    closed.write_text(page.document("t", {"a": page.Markup(EVIL)}))
    seen = opened.look(closed, width=390)  # markup that came through is stopped by the policy
    assert opened.evaluate("window.hacked") is None and any("Content Security Policy" in e for e in seen.errors)


def test_an_overflow_an_error_and_a_request_are_found(opened: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body><pre>"
        + "x" * 400
        + "</pre><script>console.error('no')</script><img src=http://a.invalid/>"
    )
    seen = opened.look(bad, width=390)
    assert seen.overflows and any('"no"' in e for e in seen.errors)
    assert any("asks for http://a.invalid" in e for e in seen.errors)
