"""sft.evaluation.plain_text: the loss of texts that are no chat is lm-eval's own, and runs are compared by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluating import plain_place
from published import publish
from sft.common.errors import SftError
from sft.evaluation import compare
from sft.evaluation.plain_text import plain_text_loss, read_texts
from sft.formats.lines import read_lines, to_lines
from sft.formats.results import Results
from sft.formats.samples import PlainTextLoss
from sft.recipe.inputs import SHIPPED_TEXTS as SHIPPED
from test_compare import evaluated

place = plain_place


def written(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": t, "kind": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts)))
    return file


def test_the_loss_of_a_text_is_lm_evals_rolling_likelihood(place: SimpleNamespace, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    texts = [
        "The sea is salt.",
        "é" * 400,
        "def f(x):\n    return x\n",
    ]  # the second is longer than the model's context
    found = plain_text_loss(place.model, written(tmp_path / "t.jsonl", texts), tmp_path / "out.jsonl")
    items = read_lines(PlainTextLoss, tmp_path / "out.jsonl")
    wanted: Any = place.model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(texts)], disable_tqdm=True
    )
    assert items[1].labels > place.model.max_length
    assert [i.bytes for i in items] == [len(t.encode()) for t in texts]
    for item, value in zip(items[::2], wanted[::2], strict=True):
        assert item.loss == pytest.approx(-value, rel=1e-5)
    assert items[1].loss == pytest.approx(-wanted[1], rel=0.02)  # lm-eval's windows are one token longer
    total = sum(i.loss for i in items)
    assert found.loss == pytest.approx(total / sum(i.labels for i in items))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / sum(i.bytes for i in items))
    assert found.by_kind and found.by_kind["b"].loss == pytest.approx(items[1].loss / items[1].labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no text; next: correct"), ('{"text": "a"}\n{"txt": "b"}\n', ":2: damaged: unknown field txt"), ("a\n", ":1: .*not JSON")],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_refused(
    place: SimpleNamespace, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(SftError, match=message):
        plain_text_loss(place.model, tmp_path / "t.jsonl")


def test_the_shipped_texts_are_of_many_kinds_and_short() -> None:
    texts = read_texts(SHIPPED)
    assert 20_000 < SHIPPED.stat().st_size < 40_000
    assert len(texts) == len({t.text for t in texts}) >= 30
    assert {"prose", "facts", "code", "maths"} <= {t.kind for t in texts}


def with_texts(run: Path, losses: list[float], labels: int) -> Path:
    items = [PlainTextLoss(f"t{i}", "a", loss, labels + i, 100 + i) for i, loss in enumerate(losses)]
    (run / "evaluate/plain_text.jsonl").write_bytes(to_lines(items))
    publish(
        run / "evaluate", ["results.json", "samples", "validation.jsonl", "plain_text.jsonl"], config={"tasks": ["zoo"]}
    )
    return run


def test_runs_are_compared_by_text_in_bits_per_byte_where_tokenizers_differ(tmp_path: Path) -> None:
    losses = [50.0, 61.0, 47.0, 80.0]
    a = with_texts(evaluated(tmp_path / "a", 1), losses, 20)
    b = with_texts(evaluated(tmp_path / "b", 1), [x + 2 for x in losses], 20)
    c = with_texts(evaluated(tmp_path / "c", 1), losses, 30)
    rows = [r for r in compare.compare([a, b, c]).rows if r.task == "plain text"]
    assert [(r.metric, r.run, r.n) for r in rows] == [("loss", 1, 4), ("bits per byte", 2, 4)]
    assert rows[0].value == pytest.approx(8 / 86) and rows[0].higher_is_better is False
    assert rows[1].value == 0 and rows[1].a == pytest.approx(238 / math.log(2) / 406)


def test_results_keep_the_texts_loss_and_the_manifests_metrics_hold_it(place: SimpleNamespace, tmp_path: Path) -> None:
    found = plain_text_loss(place.model, written(tmp_path / "t.jsonl", ["a b", "c d"]))
    results = Results(tasks={}, plain_text=found)
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").plain_text == found
    metrics = results.metrics
    assert type(metrics).parse(metrics.to_value()).plain_text == found
    assert "plain_text" not in replace(metrics, plain_text=None).to_value()
