"""The held-out loss by source and by the position of the answer."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluating import plain_place
from sft.data.dataset_writer import DatasetWriter
from sft.evaluation.validation import MOST_TURNS, by_turns, validation_loss

place = plain_place


def test_an_answer_is_a_run_of_targets() -> None:
    assert by_turns([False, True, True, False, False, True], [1, 2, 3]) == {0: [1, 2], 1: [3]}
    assert by_turns([True, True], [5]) == {0: [5]}  # the first token is no target
    many = by_turns([False, True] * 12, list(range(12)))
    assert list(many) == list(range(MOST_TURNS)) and len(many[MOST_TURNS - 1]) == 12 - MOST_TURNS + 1


def test_the_parts_add_up_to_the_whole(place: SimpleNamespace, tmp_path: Path) -> None:
    documents = [
        ([5, 6, 7, 8, 9, 10], [0, 1, 1, 0, 1, 1], 0),
        ([9, 8, 7, 6], [0, 0, 1, 1], 1),
        ([4, 5, 6], [0, 1, 1], 1),
    ]
    with DatasetWriter(tmp_path / "validation", 300) as writer:
        for ids, mask, source in documents:
            writer.add(ids, mask, [len(ids)], source)
    found = validation_loss(place.model, tmp_path / "validation", 9, 512)
    assert found.by_source and found.by_turn and list(found.by_source) == ["0", "1"]
    for parts in (found.by_source.values(), found.by_turn):
        assert sum(p.labels for p in parts) == found.labels == 8
        assert math.fsum(p.loss * p.labels for p in parts) == pytest.approx(found.loss * found.labels, abs=1e-9)
    assert [p.documents for p in found.by_turn] == [3, 1]
    (alone,) = place.model.losses([([5, 6, 7, 8, 9, 10], [False, True, True, False, True, True])])
    assert found.by_source["0"].loss == pytest.approx(alone[0] / alone[1], abs=1e-9)
