"""The prepare stage end to end on the smoke tokenizer: same bytes whatever happens on the way, nothing bad published."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import made_data
from conftest import REPO
from preparing import TOKENIZER, conversation, stage, write_rows
from sft.common import paths
from sft.common.errors import SftError
from sft.data import preparation, prepare, token_check, tokencache
from sft.data.compiled import TRAINED, GatheredBlock, gather
from sft.data.dataset import Dataset
from sft.data.vocabulary import CANARIES
from sft.recipe import inputs
from sft.recipe.schema import Prepare, Source

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


@pytest.mark.seconds
def test_the_result_is_a_dataset_that_says_what_it_is(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(300)])
    s = stage(tmp_path, validation_fraction=0.1)
    result = prepare.prepare(s)
    assert sorted(result.outputs) == [
        "data",
        "dataset.json",
        "preview.json",
        "proof.json",
        "rejects.jsonl",
        "validation",
    ]
    made = json.loads((s.out / "dataset.json").read_bytes())
    data, held = Dataset.open(s.out / "data"), Dataset.open(s.out / "validation")
    assert len(data) + len(held) == 300 and 10 < len(held) < 60
    assert made["splits"]["data"] == {
        "documents": len(data),
        "tokens": data.documents["length"].sum(),
        "labels": data.documents["labels"].sum(),
    }
    assert made["sources"][0]["rejected"] == 0 and made["sources"][0]["rows"] == 300
    assert (np.dtype(made["dtype"]), made["boundaries"]) == (data.dtype, "eos")
    assert sum(n for _, n, _ in made["lengths"]["up_to"]) == len(data)
    assert all(ids[-1] == made["eos_id"] and mask[-1] and not mask[0] for ids, mask in data)
    proof = json.loads((s.out / "proof.json").read_bytes())
    assert proof["written"]["data"]["documents_ending_with_a_trained_terminator"] == len(data)
    assert proof["sources"][0]["encoded"]["documents"] == 300
    assert {c["claim"][:20]: c["of"] for c in proof["claims"][:4]} == dict.fromkeys(
        ("the ids of a documen", "a token of it is tra", "the last token that ", "it ends with the onl"), 300
    )
    assert len(proof["claims"]) == 5 and all(claim["true"] == claim["of"] > 0 for claim in proof["claims"])
    (first, *_) = json.loads((s.out / "preview.json").read_bytes())
    assert any("lynx" in p["text"] or "ibis" in p["text"] or "tapir" in p["text"] for p in first if p["trained"])
    assert not any("Which animal" in p["text"] for p in first if p["trained"])
    assert sorted(p.name for p in (s.out / "data" / "tokenizer").iterdir())[:1] == ["chat_template.jinja"]


def test_a_claim_about_all_documents_fails_the_stage_when_one_breaks_it(tmp_path, monkeypatch):
    flagged = {"messages": [USER, {**BOT, "train": True}, USER, {**BOT, "train": False}]}
    write_rows(tmp_path / "rows.jsonl", [*(conversation(i) for i in range(20)), flagged])
    prepare.prepare(stage(tmp_path))  # this template ends every turn
    plain = tokencache.Summary.__init__

    def forgetful(self, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if "documents_proven" in self.notes:
            self.notes = {**self.notes, "documents_proven": 20}

    monkeypatch.setattr(tokencache.Summary, "__init__", forgetful)
    with pytest.raises(SftError, match=r"decode to its rendered text' is true for 20 of 21"):
        prepare.prepare(stage(tmp_path, out="other"))


def test_documents_that_do_not_end_in_a_trained_terminator_are_no_proof():
    check = token_check.TokenCheck("x", made_data.facts(10, eos_id=9, pad_id=0))
    tokens = np.array([1, 2 | TRAINED, 9 | TRAINED, 1, 2 | TRAINED, 9], dtype=np.uint32)
    ids, mask = np.empty(6, dtype=np.uint32), np.empty(6, dtype=bool)
    block = GatheredBlock.of(np.array([100, 103]), np.array([3, 3]), ids, mask)._replace(places=np.array([3, 0]))
    gather(tokens, 100, 0, 2, np.uint32(9), block)
    assert ids.tolist() == [1, 2, 9, 1, 2, 9] and mask.tolist() == [False, True, False, False, True, True]
    assert (block.num_targets.tolist(), block.first_is_target.tolist()) == ([2, 1], [False, False])
    assert (block.last_target.tolist(), block.eos_counts.tolist()) == ([9, 2], [(1 << 31) + 1] * 2)
    check.add(check.count(block))
    with pytest.raises(SftError, match="in 1 of 2 documents, first in 1, the last trained token is no terminator"):
        check.finish()


BAD_ROWS = {
    "torn line": '{"messages": [{"role": "us',
    "plain text": "not JSON at all",
    "array": "[1, 2]",
    "number": "3",
    "null": "null",
    "nothing known": {"text": "raw"},
    "no messages": {"messages": []},
    "messages null": {"messages": None},
    "messages a number": {"messages": 5},
    "messages an object": {"messages": {"role": "user"}},
    "message a string": {"messages": ["hello", "there"]},
    "no role": {"messages": [USER, {"content": "x"}]},
    "unknown role": {"messages": [USER, {"role": "wizard", "content": "x"}]},
    "role a number": {"messages": [USER, {"role": 3, "content": "x"}]},
    "content null": {"messages": [USER, {"role": "assistant", "content": None}]},
    "content a number": {"messages": [USER, {"role": "assistant", "content": 7}]},
    "content an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, BOT]},
    "only user turns": {"messages": [USER, USER]},
    "nothing flagged": {"messages": [USER, {**BOT, "train": False}]},
    "train flag a string": {"messages": [USER, {**BOT, "train": "yes"}]},
    "weight a half": {"messages": [USER, {**BOT, "weight": 0.5}]},
    "tool calls broken": {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
    "tools broken": {"messages": [USER, BOT], "tools": "{not json"},
    "lone surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
    "prompt without completion": {"prompt": "x"},
    "completion a list of numbers": {"prompt": "x", "completion": [1, 2]},
    "instruction a number": {"instruction": 4, "output": "x"},
}


def test_every_kind_of_bad_row_is_one_counted_reject_with_its_file_and_row(tmp_path):
    rows: list = []
    for i, bad in enumerate(BAD_ROWS.values()):
        rows += [conversation(i), bad]
    write_rows(tmp_path / "rows.jsonl", rows)
    s = stage(tmp_path, max_reject_fraction=0.6)
    prepare.prepare(s)
    rejects = [json.loads(line) for line in (s.out / "rejects.jsonl").read_text().splitlines()]
    found = {r["row"]: r for r in rejects}
    missed = [name for i, name in enumerate(BAD_ROWS) if 2 * i + 2 not in found]
    assert not missed and len(rejects) == len(BAD_ROWS) >= 20
    assert all(r["file"] == "rows.jsonl" and r["reason"] and r["detail"] for r in rejects)
    assert len(Dataset.open(s.out / "data")) == len(BAD_ROWS)
    made = json.loads((s.out / "dataset.json").read_bytes())
    assert made["sources"][0]["rejected"] == len(BAD_ROWS)
    reasons = json.loads((s.out / "proof.json").read_bytes())["sources"][0]["reasons"]
    assert reasons == dict(Counter(r["reason"] for r in rejects))


def test_fields_that_nothing_reads_refuse_the_source_until_the_recipe_ignores_them(tmp_path, small_chunks):
    rows = [{**conversation(i), "id": i, "score": 0.5} for i in range(300)]
    rows[250]["rationale"] = "because"
    rows[251]["messages"][1]["audio"] = {"id": "a"}
    rows[252]["rationale"] = ""
    write_rows(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # the second time from the token cache
        with pytest.raises(SftError) as error:
            prepare.prepare(stage(tmp_path))
        text = str(error.value)
        assert "rationale (1 of " in text and 'e.g. "because"' in text and "messages.audio (1 of" in text
        assert 'ignore = ["messages.audio", "rationale"]' in text
    s = stage(tmp_path, sources=(Source(path="rows.jsonl", ignore=("messages.audio", "rationale", "nothing")),))
    prepare.prepare(s)
    fields = json.loads((s.out / "proof.json").read_bytes())["sources"][0]["fields"]
    assert fields["ignored"] == {"messages.audio": 1, "rationale": 1}
    assert fields["harmless"] == {"id": 300, "score": 300}
    assert fields["read"] == {"messages": 300, "messages.content": 300, "messages.role": 300}
    said = "\n".join(s.said)
    assert (
        "ignored by name: messages.audio 1, rationale 1" in said and "ignore names nothing, which holds nothing" in said
    )


def test_the_line_of_a_source_adds_up_and_rejects_are_a_warning(tmp_path):
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "README.md").write_text("about")
    for name, rows in (
        ("train", [*(conversation(i) for i in range(60)), "torn {", conversation(3), {"messages": []}]),
        ("test", []),
    ):
        write_rows(tmp_path / "mix" / f"{name}.jsonl", rows)
    s = stage(tmp_path, sources=(Source(path="mix"),), deduplicate=True, validation_fraction=0.2)
    prepare.prepare(s)
    said = "\n".join(s.said)
    assert "mix: reads 1 of 3 files; 1 of other splits or subsets: test.jsonl; 1 ignored: README.md" in said
    line = next(line for line in s.said if line.startswith("mix: found 63 rows in 1 file: rejected 2 (not_json), "))
    assert len(line) <= 100
    parts = re.sub(r" \(.*?\)", "", line.split("file: ")[1]).split(", ")
    numbers = dict(re.fullmatch(r"([a-z ]+) (\d+)(?: of \d+)?", part).groups() for part in parts)
    assert sum(map(int, numbers.values())) == 63 and numbers["duplicates"] == "1" and int(numbers["held out"]) > 3
    assert f"taken {numbers['taken']} of {numbers['taken']}" in line
    assert "warning: mix: 2 of 63 rows cannot be used (1 not_json, 1 " in said
    assert "); the first is mix/train.jsonl row 61: not_json: " in said
    (source,) = json.loads((s.out / "dataset.json").read_bytes())["sources"]
    assert source["files_ignored"] == ["README.md"] and source["files_of_other_splits"] == ["test.jsonl"]
    assert source["rows"] == source["found"] + source["rejected"]


def test_the_line_of_a_source_names_the_limits_that_left_documents_out(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(60)])
    s = stage(tmp_path, sources=(Source(path="rows.jsonl", weight=0.5, max_documents=11),))
    prepare.prepare(s)
    assert any(line.endswith("taken 11 of 60 (weight 0.5, max_documents 11)") for line in s.said)


def test_where_a_row_makes_several_documents_rows_and_documents_add_up(tmp_path):
    rows = [
        {"messages": [{"role": role, "content": f"{n} {i}"} for n in range(3) for role in ("user", "assistant")]}
        for i in range(9)
    ]
    write_rows(tmp_path / "rows.jsonl", [*rows, "torn {", rows[0]])
    s = stage(tmp_path, history="as-rendered", deduplicate=True, validation_fraction=0.3)
    prepare.prepare(s)
    line = next(line for line in s.said if line.startswith("rows.jsonl: found "))
    head, _, rest = line.partition(": found ")[2].partition(
        ": rejected 1 (not_json), 10 usable, which make 30 documents: "
    )
    numbers = [int(found) for found in re.findall(r"(?:duplicates|held out|taken) (\d+)", rest)]
    assert head == "11 rows in 1 file" and numbers[0] == 3 and sum(numbers) == 30
    assert any("1 of 11 rows cannot be used" in line for line in s.said)


def test_the_counts_of_fields_are_those_of_the_rows_that_are_used(tmp_path):
    bad = [{**conversation(1), "rationale": "lost", "chat_template_kwargs": {"a": 1}}, {"messages": [], "other": 1}]
    write_rows(tmp_path / "rows.jsonl", [*(conversation(i) for i in range(20)), *bad])
    s = stage(tmp_path, sources=(Source(path="rows.jsonl", columns={"system": "sys"}),))
    prepare.prepare(s)
    (source,) = json.loads((s.out / "proof.json").read_bytes())["sources"]
    assert source["rejected"] == 2 and set(source["fields"]["read"].values()) == {20}
    assert "warning: rows.jsonl: columns reads system from sys, which holds nothing in any used row" in s.said
    assert not any("answers are empty" in line for line in s.said)


def test_empty_answers_are_a_warning(tmp_path):
    write_rows(
        tmp_path / "rows.jsonl",
        [conversation(1), {"messages": [{"role": r, "content": ""} for r in ("user", "assistant")]}],
    )
    s = stage(tmp_path)
    prepare.prepare(s)
    assert any(line.startswith("warning: rows.jsonl: 1 trained answers are empty, so ") for line in s.said)


def test_answers_that_do_not_begin_as_their_prompt_ends_are_told(tmp_path: Path) -> None:
    said = []
    for content in ("<think>r</think>b", "r</think>b"):
        write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": content}])
        s = stage(tmp_path, template="olmo_thinker")
        prepare.prepare(s)
        said.append([line for line in s.said if "begin without the opening of thoughts" in line])
    assert [len(lines) for lines in said] == [0, 1] and said[1][0].startswith("warning: rows.jsonl: 1 trained answers")


def test_too_many_rejects_fail_with_examples_and_publish_nothing(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(98)] + [{"text": "raw"}, "torn"])
    s = stage(tmp_path, max_reject_fraction=0.01)
    with pytest.raises(SftError) as error:
        prepare.prepare(s)
    text = str(error.value)
    assert "2 of 100 rows cannot be used, more than max_reject_fraction = 0.01" in text
    assert "rows.jsonl row 99" in text and "not_json: e.g. rows.jsonl row 100" in text
    assert not list(s.out.iterdir())
    prepare.prepare(stage(tmp_path, max_reject_fraction=0.02))


@pytest.mark.seconds
def test_a_wrong_column_is_reported_after_the_first_chunks_not_after_all(tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(preparation, "GIVE_UP_ROWS", 20)
    write_rows(tmp_path / "rows.jsonl", [{"text": f"raw {i}"} for i in range(2000)])
    s = stage(tmp_path, max_reject_fraction=0.01)
    with pytest.raises(SftError, match=r"of the first .* rows cannot be used"):
        prepare.prepare(s)
    assert len(list(s.cache.glob("tokens/*/*.tok"))) < 5


def test_an_empty_source_and_a_missing_one_are_reported_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(SftError, match=r"rows\.jsonl: holds no row"):
        prepare.prepare(stage(tmp_path))
    with pytest.raises(SftError, match=r"'gone\.jsonl'"):
        prepare.prepare(stage(tmp_path, sources=(Source(path="gone.jsonl"),)))


def test_weights_repeat_and_sample_and_sources_are_numbered(tmp_path):
    write_rows(tmp_path / "a.jsonl", [conversation(i) for i in range(40)])
    write_rows(tmp_path / "b.jsonl", [conversation(1000 + i) for i in range(30)])
    mixed = (Source(path="a.jsonl", weight=0.5), Source(path="b.jsonl", weight=2.0), Source(path="a.jsonl", weight=7))
    s = stage(tmp_path, sources=mixed)
    prepare.prepare(s)
    data = Dataset.open(s.out / "data")
    assert np.bincount(data.documents["source"]).tolist() == [20, 60, 7]
    twice = Counter(
        ids.tobytes() for (ids, _), source in zip(data, data.documents["source"], strict=True) if source == 1
    )
    assert set(twice.values()) == {2}
    assert [x["documents"] for x in json.loads((s.out / "dataset.json").read_bytes())["sources"]] == [20, 60, 7]


def numbers(folder: Path, encoder: Any) -> list[int]:
    """Which `conversation(i)` stand in a split."""
    decoded = (encoder.vocabulary.decode(ids).decode() for ids, _ in Dataset.open(folder))
    return [int(re.findall(r"🦊 of (\d+)\.", text)[0]) for text in decoded]


@pytest.mark.seconds
def test_held_out_conversations_stay_held_out_under_every_template_weight_and_seed(tmp_path):
    rows = [conversation(i) for i in range(150)]
    write_rows(tmp_path / "rows.jsonl", [*rows, *rows[:75]])
    changes: list[dict[str, Any]] = [
        {}, {"template": "tulu"}, {"seed": 9}, {"system": "Be brief."}, {"deduplicate": True},
        {"sources": (Source(path="rows.jsonl", weight=40),)}, {"sources": (Source(path="rows.jsonl", weight=0.5),)},
    ]  # fmt: skip
    held, trained = [], []
    for change in changes:
        s = stage(tmp_path, out=f"out{len(held)}", validation_fraction=0.2, **change)
        prepare.prepare(s)
        encoder = preparation.Preparation(s, prepare.Shard()).encoder
        found = numbers(s.out / "validation", encoder)
        assert len(found) == len(set(found)), "a conversation is in validation twice"
        held.append(set(found))
        trained.append(set(numbers(s.out / "data", encoder)))
    *whole, half = held
    assert all(other == held[0] for other in whole) and 15 < len(held[0]) < 50
    assert half < held[0] and not held[0] & set().union(*trained)


def test_a_tokenizer_whose_tokens_have_no_fixed_bytes_is_prepared_to_the_end(tmp_path):
    """SentencePiece-like; a row with a character that it does not know is a reject, never an unknown token in the data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rows = [conversation(i) for i in range(20)]
    text = "".join(map(chr, range(33, 127))) + "\n▁🦊"
    letters = [("<unk>", 0.0), *((char, -2.0) for char in text)]
    tokenizer = Tokenizer(models.Unigram(letters, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["</s>"])
    (tmp_path / "unigram").mkdir()
    tokenizer.save(str(tmp_path / "unigram" / "tokenizer.json"))
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "unigram" / "tokenizer_config.json").write_text(json.dumps(config))
    write_rows(tmp_path / "rows.jsonl", [*rows, {"messages": [USER, {**BOT, "content": "日本"}]}])
    s = stage(tmp_path, tokenizer="unigram", template="simple_chat")
    result = prepare.prepare(s)
    assert [json.loads(line)["reason"] for line in (s.out / "rejects.jsonl").read_text().splitlines()] == [
        "unknown_token"
    ]
    assert len(Dataset.open(s.out / "data")) == 20
    (first, *_) = json.loads((s.out / "preview.json").read_bytes())
    assert any("🦊" in part["text"] for part in first if part["trained"])
    assert [part["text"] for part in first if part["special"]][-1] == "</s>" and first[-1]["end"]
    assert [line for line in s.said if "slower" in line and "no fixed bytes" in line]
    assert result.metrics["encoded_by"] == {"tokenizers": 20} and result.metrics["chunks_redone"] == 0


def test_chunks_that_the_fast_encoder_got_wrong_are_counted(tmp_path, monkeypatch):
    from sft.data.byte_encoder import ByteLevelEncoder

    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(10)])
    s = stage(tmp_path)
    if preparation.Preparation(s, prepare.Shard()).encoder.engine.fast is None:
        pytest.skip("there is no fast encoder here")
    monkeypatch.setattr(ByteLevelEncoder, "parity", lambda *_: None)
    result = prepare.prepare(s)
    assert result.metrics["encoded_by"] == {"tokenizers": 10} and result.metrics["chunks_redone"] == 1
    assert [line for line in s.said if "1 of 1 chunks were encoded again" in line]


def test_documents_with_other_masks_are_no_duplicates(tmp_path):
    def row(train: bool) -> dict[str, Any]:
        return {"messages": [USER, {**BOT, "train": train}, USER, BOT]}

    write_rows(tmp_path / "rows.jsonl", [row(True), row(False), row(True)])
    s = stage(tmp_path, deduplicate=True)
    prepare.prepare(s)
    assert len({mask.tobytes() for _, mask in Dataset.open(s.out / "data")}) == 2
    assert json.loads((s.out / "dataset.json").read_bytes())["sources"][0]["duplicates"] == 1


def test_a_source_that_the_weight_leaves_nothing_of_is_reported(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(30)])
    sources_ = (Source(path="rows.jsonl"), Source(path="rows.jsonl", weight=0.01))
    s = stage(tmp_path, sources=sources_)
    prepare.prepare(s)
    (line,) = [line for line in s.said if line.startswith("warning: rows.jsonl: weight 0.01")]
    assert "leave none of 30 documents" in line


def test_copies_of_evaluation_questions_are_dropped_and_listed(tmp_path):
    question = "How many legs do seven tapirs and three ibises have when two of the tapirs lie down?"
    write_rows(tmp_path / "test.jsonl", [{"question": question, "answer": "34"}])
    leaked = {"messages": [{"role": "user", "content": f"Quiz! {question.upper()}"}, BOT]}
    write_rows(tmp_path / "rows.jsonl", [*(conversation(i) for i in range(20)), leaked])
    s = stage(tmp_path, decontaminate=("test.jsonl",))
    assert "contaminated.jsonl" in prepare.prepare(s).outputs
    (dropped,) = map(json.loads, (s.out / "contaminated.jsonl").read_text().splitlines())
    assert dropped == {"source": "rows.jsonl", "file": "rows.jsonl", "row": 21, "repeats": "test.jsonl:1"}
    assert len(Dataset.open(s.out / "data")) == 20
    assert json.loads((s.out / "dataset.json").read_bytes())["decontamination"]["dropped"] == 1


def test_only_what_the_conversation_says_is_compared_with_evaluation_texts(tmp_path):
    question = "How many legs do seven tapirs and three ibises have when two of the tapirs lie down?"
    write_rows(tmp_path / "test.jsonl", [{"question": question, "answer": "34"}])
    rows = [
        {**conversation(1), "origin": question},
        {"messages": json.dumps([{"role": "user", "content": question}, BOT])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in (question[:9], question[9:])]}, BOT]},
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    s = stage(tmp_path, decontaminate=("test.jsonl",))
    prepare.prepare(s)
    dropped = [json.loads(line)["row"] for line in (s.out / "contaminated.jsonl").read_text().splitlines()]
    assert dropped == [2, 3]
    assert [line for line in s.said if "1 evaluation texts; not covered: 1 of fewer than 5 words" in line]
    described = json.loads((s.out / "dataset.json").read_bytes())["decontamination"]
    assert described["not_covered"] == {"too_short": 1, "shared_by_many_rows": 0}


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, 1),
        ({"decontaminate_overlap": 0.3}, 2),
        ({"decontaminate_overlap": 1.0, "decontaminate_ngram": 5}, 0),
        ({"decontaminate_overlap": 0.3, "decontaminate_ngram": 14}, 1),
    ],
)
def test_n_and_share_of_an_evaluation_text_decide_what_is_its_copy(tmp_path, options, dropped):
    words = [f"word{i}" for i in range(20)]
    write_rows(tmp_path / "test.jsonl", [{"question": " ".join(words)}])
    asked = [" ".join(words[:17]), " ".join(words[:12])]  # of 13 n-grams of 8 words they have 10 and 5
    rows = [{"messages": [{"role": "user", "content": text}, BOT]} for text in asked]
    write_rows(tmp_path / "rows.jsonl", [*(conversation(i) for i in range(5)), *rows])
    s = stage(tmp_path, decontaminate=("test.jsonl",), **options)
    prepare.prepare(s)
    found = json.loads((s.out / "dataset.json").read_bytes())["decontamination"]
    assert found["dropped"] == dropped
    assert (found["ngram"], found["overlap"]) == (
        options.get("decontaminate_ngram", 8), options.get("decontaminate_overlap", 0.5)
    )  # fmt: skip


def test_caps_and_row_counts_bound_what_a_source_gives(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(i) for i in range(60)])

    def made(**options) -> Dataset:
        s = stage(tmp_path, out=str(len(list(tmp_path.iterdir()))), sources=(Source(path="rows.jsonl", **options),))
        prepare.prepare(s)
        return Dataset.open(s.out / "data")

    everything = made()
    lengths = everything.documents["length"]
    assert len(everything) == 60
    assert len(made(max_documents=7)) == 7 and len(made(weight=40)) == 40
    room = int(lengths.sum()) // 3
    taken = made(max_tokens=room).documents["length"]
    assert room - int(lengths.min()) < int(taken.sum()) <= room


def test_the_manifest_names_the_tokenizer_by_its_hash_and_by_ids(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(0)])
    named = prepare.prepare(stage(tmp_path)).metrics["tokenizer"]
    file = REPO / "recipes" / TOKENIZER / "tokenizer.json"
    assert named["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    ids = Tokenizer.from_file(str(file)).encode(CANARIES[1], add_special_tokens=False).ids
    assert named["canaries"][CANARIES[1]] == ids


def test_the_recipes_system_prompt_stands_where_a_row_has_none(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation(0), conversation(1)])
    s = stage(tmp_path, system="Only zoo facts.")
    prepare.prepare(s)
    encoder = preparation.Preparation(s, prepare.Shard()).encoder
    texts = [encoder.vocabulary.decode(ids).decode() for ids, _ in Dataset.open(s.out / "data")]
    assert sorted("Only zoo facts." in text for text in texts) == [False, True]
    assert sorted("You keep zoo number 0." in text for text in texts) == [False, True]


def test_the_planner_gets_every_local_file(tmp_path):
    (tmp_path / "mix").mkdir()
    for name in ("mix/a.jsonl", "mix/NOTES.md", "test.jsonl", "my.jinja"):
        (tmp_path / name).write_text("x")
    table = Prepare(
        tokenizer=TOKENIZER, template="my.jinja", decontaminate=("test.jsonl",),
        sources=(Source(path="mix"), Source(path="hf://org/name"), Source(path="gs://bucket/x.jsonl")),
    )  # fmt: skip
    named = [
        name for name, _ in inputs.prepare_files(table, lambda p: paths.find([tmp_path, REPO / "recipes"], p, "x"))
    ]
    assert [n for n in named if not n.startswith(TOKENIZER)] == ["mix/a.jsonl", "test.jsonl", "my.jinja"]
    assert f"{TOKENIZER}/tokenizer.json" in named
