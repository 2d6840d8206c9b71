"""Near-duplicates: the sketches estimate the true similarity, an earlier document is named, and the option drops them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from preparing import conversation, stage, write_rows
from sft.data import near_duplicates as near
from sft.data import prepare
from sft.data.dataset import Dataset
from sft.recipe.schema import Source

pytest.importorskip("rensa")
WORDS = [f"w{i}" for i in range(500)]


def text(seed: int, words: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def grams_of(words: list[str]) -> np.ndarray:
    return near.SketchChunk(None, None, []).grams(" ".join(words))  # type: ignore[arg-type]


def found(documents: list[list[str]], threshold: float, tmp_path) -> list[int]:
    half = len(documents) // 2
    files = []
    for i, part in enumerate((documents[:half], [], documents[half:])):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], near.sketches([grams_of(words) for words in part]))
    first = np.array([0, half, half, len(documents)])
    return near.find(near.Sketches(files, first), threshold).tolist()


def test_sketches_estimate_the_jaccard_similarity_of_the_n_grams():
    for changed in (0, 5, 20, 60):
        one, other = text(1, 400), text(1, 400)
        other[:changed] = text(2, changed)
        sets = [
            {tuple(words[i : i + near.NGRAM]) for i in range(len(words) - near.NGRAM + 1)} for words in (one, other)
        ]
        truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        a, b = near.sketches([grams_of(one), grams_of(other)])
        assert abs((a == b).mean() - truth) < 0.17  # three standard errors of 64 values


def test_the_earlier_document_is_named_and_different_ones_are_not(tmp_path):
    documents = [text(i) for i in range(40)]
    documents[25] = [*documents[3][:-2], "x", "y"]
    documents[26], documents[30] = documents[4], [*documents[4], "z"]
    documents[31] = documents[32] = []  # without words
    documents[33] = documents[34] = ["one", "two"]  # shorter than an n-gram
    repeats = found(documents, 0.8, tmp_path)
    assert {i: r for i, r in enumerate(repeats) if r >= 0} == {25: 3, 26: 4, 30: 4, 34: 33}
    assert near.pairs(np.array(repeats), [20, 40]) == {(0, 1): 3, (1, 1): 1}
    assert {i for i, r in enumerate(found(documents, 1.0, tmp_path)) if r >= 0} >= {26, 34}


def test_case_punctuation_and_the_order_of_files_make_no_difference():
    assert (
        grams_of(["One,", "two;", "THREE", "four", "five", "six"])
        == grams_of(["one", "two", "three", "four", "five", "six"])
    ).all()


@pytest.mark.parametrize("choice", ["report", "drop"])
def test_near_duplicates_are_reported_by_pairs_of_sources_and_dropped_on_demand(tmp_path, choice):
    def row(words: list[str], answer: str) -> dict:
        return {"messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": answer}]}

    write_rows(tmp_path / "a.jsonl", [row(text(i), "yes") for i in range(20)])
    write_rows(
        tmp_path / "b.jsonl",
        [*(row([*text(i), "please"], "yes") for i in range(5)), *(conversation(i) for i in range(9))],
    )
    sources = (Source(path="a.jsonl"), Source(path="b.jsonl"))
    s = stage(tmp_path, sources=sources, near_duplicates=choice)
    prepare.prepare(s)
    made = json.loads((s.out / "dataset.json").read_bytes())
    pair = {"earlier": "a.jsonl", "later": "b.jsonl", "documents": 5}
    assert made["near_duplicates"] == {"similarity": 0.8, "dropped": choice == "drop", "pairs": [pair]}
    dropped = 5 * (choice == "drop")
    assert [source["near_duplicates"] for source in made["sources"]] == [0, dropped]
    assert len(Dataset.open(s.out / "data")) == 34 - dropped
    assert any("5 of b.jsonl nearly repeat one of a.jsonl" in line for line in s.said)
    listed = [json.loads(line) for line in (s.out / "near_duplicates.jsonl").read_text().splitlines()]
    assert [(r["file"], r["row"], r["earlier_file"], r["earlier_row"]) for r in listed] == [
        ("b.jsonl", i, "a.jsonl", i) for i in range(1, 6)
    ]


def test_all_documents_of_a_row_go_with_its_first():
    repeats = np.array([-1, -1, 0, -1, -1, 2, -1])
    assert near.spread(repeats, np.array([0, 0, 3, 3, 3, 4, 4])).tolist() == [-1, -1, 0, 0, 0, 2, 2]


def test_the_first_documents_of_each_pair_of_sources_are_listed():
    assert near.examples(np.array([-1, 0, 0, 0, 1, -1, 5]), [4, 7], 2).tolist() == [1, 2, 4, 6]
    assert near.examples(np.full(3, -1), [3], 2).tolist() == []
