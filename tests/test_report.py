"""sft.reporting.report and sft.reporting.charts: one page that shows what there is and asks nothing of the network."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import made_data
import published
from sft.common.errors import SftError
from sft.formats import evaluations, manifest
from sft.formats.dataset import LengthHistogram
from sft.formats.evaluations import Evaluation
from sft.formats.gate import (
    CarriedTemplate,
    ConvertMetrics,
    GateRecord,
    GreedyReply,
    LogitCheck,
    TensorCheck,
    TokenizerCheck,
)
from sft.formats.lines import read_lines, to_lines
from sft.formats.metrics import Attempt, InitialValidation, read_steps
from sft.formats.preview import Preview, Segment
from sft.formats.results import Generation, PartLoss, Results, Score, TaskResult, TextLoss, TokenCounts, ValidationLoss
from sft.formats.samples import Sample
from sft.formats.steps import Best
from sft.reporting import charts, report

VOID = {"meta", "link", "br", "input"}
SCRIPTS = re.compile(r"<script>.*?</script>", re.S)


class Strict(HTMLParser):
    """Every element is closed by its own end tag, and nothing points outside the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert name not in ("src", "srcset", "action", "data", "poster") and not name.startswith("on")
            assert name != "href" or re.fullmatch(r"#[\w-]+|data:,|(\.\./|replies/)[\w%.-]+\.html", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def made(run: Path, stage: str, metrics: dict[str, Any], files: dict[str, str], upstream: str | None) -> None:
    folder = run / stage
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    inputs = [published.upstream(run / upstream)] if upstream else []
    about = {"git": "0123456789ab", "dirty": False, "host": "box", "started": "2026-01-01T00:00:00+00:00"}
    provenance = {**about, "finished": "2026-01-01T00:01:40+00:00", "argv": (), "versions": {}}
    config = {stage: {"field": 1}}
    published.publish(folder, list(files), config=config, inputs=inputs, metrics=metrics, provenance=provenance)


def whole_run(run: Path, steps: int = 240) -> Path:
    """A run with every stage, in the form the stages write."""
    lengths = LengthHistogram(
        67.5, 60, 130, 200, 240, ((32, 40, 900), (64, 130, 6000), (128, 90, 8000), (256, 20, 4000))
    )
    source = made_data.source_summary("smoke/<train>.jsonl", 280, 18900, 5200, rejected=2)
    info = made_data.dataset_info(made_data.facts(1024, 0, 1), [source], lengths=lengths)
    segments = (
        Segment("<|im_start|>", False, True),
        Segment("user\nWhere is <b>the otter</b>?\nassistant\n", False, False),
        Segment("In the <|river|> house.", True, False),
        Segment("<|im_end|>", True, True),
        Segment("\n", False, False, end=True),
    )
    made(run, "prepare", {"documents": 280, "tokens": 18900, "labels": 5200, "rejected": 2},
         {"dataset.json": info.to_bytes().decode(), "preview.json": Preview((segments,) * 3).to_bytes().decode()}, None)  # fmt: skip
    made(
        run,
        "sync",
        {"storage": "/s", "dataset": "/s/d", "base": None, "files": 0, "bytes": 0},
        {"remote.json": "{}"},
        "prepare",
    )
    records = []
    for step in range(1, steps + 1):
        loss = 0.4 + 4 * math.exp(-step / 45) + 0.12 * math.sin(step * 12.9898) * math.cos(step * 78.233)
        lr, speed = 1e-3 * min(step / 12, (steps - step) / steps), 41000 + 900 * math.sin(step)
        validation = loss + 0.2 if step % 40 == 0 else None
        records.append(published.step_record(step, loss=loss, lr=lr, grad_norm=0.5 + loss / 4, tokens_per_s=speed,
                                             validation_loss=validation))  # fmt: skip
    plan = published.step_summary(
        steps, fill=0.981, packs=74, seq_len=256, trained_tokens=15000, tokens=55000, padding=1200, padding_fraction=0.0214,
        documents_per_pack=3.8, tokens_lost_fraction=0.0123, trained_tokens_lost_fraction=0.0456,
    )  # fmt: skip
    train = published.train_metrics(steps, loss=records[-1].loss, first_loss=records[0].loss, tokens=55000, tokens_per_s=41234.5,
                                    validation_loss=0.61, first_validation_loss=2.4, data=plan)  # fmt: skip
    lines = b"".join(r.to_bytes() for r in records).decode()
    made(run, "train", train.to_value(), {"metrics.jsonl": lines}, "sync")
    logits = LogitCheck(
        max_difference=1.9e-6, max_logit=6.3, rounding_kl=2.1e-5, argmax_agreement=1.0, documents=(134, 60, 21), tokens=215,
        rows=215, layers=4, which=(0, 1, 2, 3),
    )  # fmt: skip
    chats = (
        GreedyReply("<|im_start|>user\nHi<|im_end|>\n", "Hello </script>", 9, True),
        GreedyReply("<|im_start|>user\nAnd?<|im_end|>\n", "and and", 48, False),
    )
    gate = GateRecord.of("full", TensorCheck(47, 1800000, "bfloat16"), TokenizerCheck(2, (2, 0)), logits, chats)
    converted = ConvertMetrics(
        step=steps, parameters=912384, bytes=1800000, template=CarriedTemplate("as trained", "ab"), gate=gate.summary
    )
    made(run, "convert", converted.to_metrics(), {"gate.json": gate.to_bytes().decode()}, "train")
    scored = results()
    reply = "The otter lives in the river house."
    sample = Sample(
        doc_id=0, filter="none", prompt="<|im_start|>user\nWhere is the otter?<|im_end|>\n<|im_start|>assistant\n", target=reply,
        replies=(reply,), filtered=[reply], scores={"exact_match": 1.0}, doc={}, ended_by="terminator", tokens=9, repeats=False,
    )  # fmt: skip
    files = {
        "results.json": scored.to_bytes().decode(),
        "samples/smoke_generate.jsonl": to_lines([sample] * 3).decode(),
    }
    made(run, "evaluate", scored.metrics.to_value(), files, "convert")
    return run


ACC = Score(value=0.8125, stderr=0.07, n=32, low=0.647, high=0.911, interval="wilson", higher_is_better=True)


def results(up_to: tuple[tuple[int, int], ...] | None = None) -> Results:
    """Scores of two tasks; `up_to` are the lengths of the replies to the second."""
    match = replace(ACC, value=0.0, stderr=0.0, low=0.0, high=0.107)
    tokens = TokenCounts(median=8, p90=12, max=16, up_to=up_to)
    facts = Generation(n=32, stop_rate=0.97, terminator_rate=0.97, empty=0.0, repeating=0.03, tokens=tokens)
    tasks = {
        "smoke_choice": TaskResult(metrics={"acc": ACC}, samples_sha256="a", task_sha256="b"),
        "smoke_generate": TaskResult(
            metrics={"exact_match": match}, generation=facts, samples_sha256="c", task_sha256="d"
        ),
    }
    loss = ValidationLoss(loss=0.61, stderr=0.03, perplexity=1.84, documents=14, labels=250)
    return Results(template_sha256="ab", tasks=tasks, validation=loss)


def test_the_page_is_whole_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = report.page(whole_run(tmp_path / "smoke"))
    parsed = Strict(SCRIPTS.sub("", text.replace("<!doctype html>", "")))
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", SCRIPTS.sub("", text))
    for section in ("Training", "Scores", "Replies", "Export", "Data", "Trained tokens", "Chain", "Recipe"):
        assert f"<h2>{section}</h2>" in text and f'href="#{section.lower().replace(" ", "-")}"' in text
    assert [chart["title"] for chart in charts_of(text)][:2] == ["loss", "learning rate"]
    assert "0.8125" in parsed.text and "0.647 to 0.911" in parsed.text and "97% stop" in parsed.text
    assert "changed since" not in text


def charts_of(text: str) -> list[dict[str, Any]]:
    """The data of a page's charts."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)
    return [json.loads(data) for data in found]


def test_the_header_says_what_was_trained_on_what_and_when(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    for stage, config in (
        ("prepare", {"template": "<olmo>"}),
        ("train", {"model": {"preset": "olmo3-7b", "base": "gs://b/step0"}}),
    ):
        file = run / stage / "manifest.json"
        replace(manifest.load(file), config=config).write(file)
    (run / "train/metrics.jsonl").write_bytes(Attempt(1, 0, 8, "H100", 989.4, "6 N").to_bytes())
    published.publish_again(run / "train")
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", report.page(run))
    assert facts == [("preset", "olmo3-7b"), ("base", "gs://b/step0"), ("template", "&lt;olmo&gt;"), ("data", "smoke/&lt;train&gt;.jsonl"),
                     ("trained on", "8 × H100"), ("finished", "2026-01-01 00:01")]  # fmt: skip


def test_every_source_has_a_curve_of_its_training_and_of_its_validation_loss(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    file = run / "train" / "metrics.jsonl"
    steps = [
        replace(s, sources={"a": 1.0, "b": 2.0}, validation_sources={"a": 3.0} if s.step % 40 == 0 else None)
        for s in read_steps(file)
    ]
    file.write_bytes(b"".join(s.to_bytes() for s in steps))
    published.publish_again(run / "train")
    found = {c["title"]: c for c in charts_of(report.page(run))}
    training, validation = found["training loss by source, smoothed"], found["validation loss by source"]
    assert [line["name"] for line in training["lines"]] == ["a", "b"] and [
        line["name"] for line in validation["lines"]
    ] == ["a"]
    assert training["axes"] == ["step", "tokens", "hours of training"]
    assert [p[0] for p in validation["lines"][0]["points"]] == [40, 80, 120, 160, 200, 240]
    assert {p[-1] for p in training["lines"][1]["points"]} == {2.0}


def test_validation_curves_begin_with_the_starting_weights_and_plain_text_has_its_loss(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    file = run / "train" / "metrics.jsonl"
    file.write_bytes(InitialValidation(3.5, {"a": 4.5}).to_bytes() + file.read_bytes())
    text = TextLoss(loss=2.0, stderr=0.1, perplexity=7.4, bits_per_byte=0.987, documents=5, labels=1000, bytes=4000, sha256="a",
                    by_kind={"facts": PartLoss(1.5, None, 2, 400)})  # fmt: skip
    replace(results(), plain_text=text).write(run / "evaluate" / "results.json")
    for stage in ("train", "evaluate"):
        published.publish_again(run / stage)
    page = report.page(run)
    lines = next(c for c in charts_of(page) if c["title"] == "loss")["lines"]
    assert [line["points"][0][0] for line in lines] == [1, 1, 0] and lines[2]["points"][0] == [0, 0, 0, 3.5]
    assert "plain text, which is no chat: 0.987 bits a byte" in page and '<td class="">plain text: facts</td>' in page


def test_the_worst_replies_come_first(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    file = run / "evaluate/samples/smoke_generate.jsonl"
    good = read_lines(Sample, file)[0]
    rows = [replace(good, doc_id=i, scores={"exact_match": score}, ended_by=end) for i, (score, end) in enumerate(
        [(1.0, "terminator"), (0.0, "terminator"), (1.0, "length"), (0.0, "length"), (1.0, "terminator")])]  # fmt: skip
    file.write_bytes(to_lines(rows))
    published.publish_again(run / "evaluate")
    section = report.page(run).split('id="replies"')[1].split("</section>")[0]
    assert re.findall(r"<header>(\d) · ", section) == ["3", "1", "2", "0"] and "the worst of 5" in section
    assert 'href="replies/smoke_generate.html"' in section


def test_what_packing_loses_is_reported_of_tokens_and_of_trained_tokens(tmp_path: Path) -> None:
    page = report.page(whole_run(tmp_path / "smoke"))
    assert "loses 1.23% of the tokens and 4.56% of the trained ones" in " ".join(page.split())


def test_the_report_shows_every_greedy_reply_of_the_gate(tmp_path: Path) -> None:
    section = report.page(whole_run(tmp_path / "smoke")).split('id="export"')[1].split("</section>")[0]
    assert "greedy reply, 9 tokens, stopped by itself" in section
    assert "user\nHi&lt;|im_end|&gt;\n<mark>Hello &lt;/script&gt;</mark>" in section
    assert "greedy reply, 48 tokens, did not stop by itself" in section
    assert "user\nAnd?&lt;|im_end|&gt;\n<mark>and and</mark>" in section


def test_scores_over_steps_name_best_and_what_was_broken(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    assert "<h2>Scores over steps</h2>" not in report.page(run)
    score = Score(value=0.5, stderr=0.1, n=25, low=0.3, high=0.7, higher_is_better=True)
    loss = ValidationLoss(loss=0.75, stderr=0.01, perplexity=2.1, documents=9, labels=90)

    def evaluation(step: int, tasks: dict[str, dict[str, Score]], **found: Any) -> Evaluation:
        return Evaluation(step=step, checkpoint="c", settings="s", tasks=tasks, **found)

    evaluations.write(run / "train", [
        evaluation(100, {}, broken={"zoo": "zoo: 0% of 25 replies <stop>"}),
        evaluation(200, {"zoo": {"acc": score}}, validation=loss),
        evaluation(300, {"zoo": {"acc": replace(score, value=0.625)}}, validation=replace(loss, loss=0.5, stderr=None)),
    ])  # fmt: skip
    Best(300, "zoo/acc", 0.625).write(run / "train")
    text = report.page(run)
    parsed = Strict(SCRIPTS.sub("", text.replace("<!doctype html>", "")))
    section = text.split('id="scores-over-steps"')[1].split("</section>")[0]
    scores, losses = charts_of(section)
    assert scores["lines"][0]["spread"] == [[200, 0.3, 0.7], [300, 0.3, 0.7]] and len(losses["lines"][0]["points"]) == 2
    assert [(x, low < 0.75 < high) for x, low, high in losses["lines"][0]["spread"]] == [(200, True)]
    assert "300 <b>BEST</b>" in section and "BEST: step300, zoo/acc 0.625" in section
    assert 'title="zoo: 0% of 25 replies &lt;stop&gt;">broken<' in section and "0.6250 ± 0.1000" in parsed.text


def test_what_only_some_machines_measure_is_drawn_where_it_is_there(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    text = report.page(run)
    assert "model FLOPs utilisation" not in text and "Attempts:" not in text and "replies by length" not in text
    file = run / "train" / "metrics.jsonl"
    records = [replace(r, mfu=0.4, memory_gb=61.5) for r in read_steps(file)]
    headers = [Attempt(number, start, 8, "H100", 989.4, "6 N") for number, start in ((1, 0), (2, 120))]
    file.write_bytes(b"".join(r.to_bytes() for r in (headers[0], *records[:9], headers[1], *records[9:])))
    results(up_to=((8, 30), (16, 2))).write(run / "evaluate" / "results.json")
    for stage in ("train", "evaluate"):
        published.publish_again(run / stage)
    text = report.page(run)
    assert "model FLOPs utilisation" in text and "peak memory of a GPU, GB" in text
    assert "Attempts: 2, continued from step 120." in text
    assert "smoke_generate: replies by length" in text and "2 replies of at most 16 tokens" in text


def test_data_cannot_write_markup(tmp_path: Path) -> None:
    text = report.page(whole_run(tmp_path / "smoke"))
    assert "&lt;b&gt;the otter&lt;/b&gt;" in text and "smoke/&lt;train&gt;.jsonl" in text
    assert text.count("</script") == text.count("<script") == 2 + len(charts_of(text))


def test_trained_tokens_are_marked_and_others_are_not(tmp_path: Path) -> None:
    text = report.page(whole_run(tmp_path / "smoke"))
    article = text.split('id="trained-tokens"')[1].split("</article>")[0]
    assert re.findall(r"<mark>(.*?)</mark>", article, re.S) == [
        'In the &lt;|river|&gt; house.<span class="special">&lt;|im_end|&gt;</span>'
    ]


def test_special_tokens_differ_from_text_that_looks_like_them_and_documents_have_an_end(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    section = report.page(run).split('id="trained-tokens"')[1].split("</section>")[0]
    assert set(re.findall(r'class="special">(.*?)</span>', section)) == {
        "Coloured", "&lt;|im_start|&gt;", "&lt;|im_end|&gt;",
    }  # fmt: skip
    assert section.count("■ end of document") == section.count("<article") == 3


@pytest.mark.parametrize("last", range(5))
def test_any_subset_of_stages_has_a_page(tmp_path: Path, last: int) -> None:
    run = whole_run(tmp_path / "smoke")
    stages = ("prepare", "sync", "train", "convert", "evaluate")
    for stage in stages[last + 1 :]:
        (run / stage / "manifest.json").unlink()
    text = report.page(run)
    Strict(SCRIPTS.sub("", text.replace("<!doctype html>", "")))
    assert ("Not done yet: " in text) == (last < 4)
    assert ("<h2>Scores</h2>" in text) == (last == 4)


def test_a_run_without_stages_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SftError, match="no stage is done"):
        report.page(tmp_path)


def test_a_result_made_from_something_else_is_marked(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "smoke")
    record = manifest.load(run / "train" / "manifest.json")
    replace(record, key="sha256:other").write(run / "train" / "manifest.json")
    assert report.page(run).count("changed since") == 1


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    points = [(float(i), float(i % 7)) for i in range(100_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS + 1 and thinned[-1] == points[-1]
    assert abs(sum(y for _, y in thinned) / len(thinned) - 3) < 0.05


def test_smoothing_starts_at_the_first_value_and_survives_not_a_number() -> None:
    smoothed = charts.smooth([(0, 4.0), (1, 2.0), (2, math.nan), (3, 2.0)])
    assert smoothed[0][1] == 4.0
    assert all(2.0 <= y <= 4.0 for _, y in smoothed)


def test_numbers_are_short() -> None:
    assert [charts.number(v) for v in (1319, 1.3e6, 0.25, 3e-5, 0, 2e12)] == [
        "1,319",
        "1.3M",
        "0.25",
        "3e-05",
        "0",
        "2T",
    ]
