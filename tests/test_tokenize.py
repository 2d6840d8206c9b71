"""The encoder: the ids of the rendered text, exact masks, special-token text kept as text, parity, identity."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from chat_samples import (
    ENDS_TURNS_IN_EOS,
    EOS,
    IM_END,
    IM_START,
    NASTY,
    SOURCE,
    any_text,
    chat,
    conversations,
    encoder,
    make_tokenizer,
    text_of,
    tokenizer_folder,
    turns,
)
from sft.chat.rows import RowReader
from sft.chat.special_tokens import BLOCK_SIZE, PRIVATE_BLOCKS
from sft.common.errors import SftError
from sft.data.byte_encoder import parts_of
from sft.data.tokenize import Encoder
from sft.data.vocabulary import Vocabulary, check_rebuilt
from sft.formats.dataset import TokenizerFacts
from sft.formats.record import build, to_json
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.inputs import TEMPLATE_SUFFIXES

folder = tokenizer_folder


@pytest.fixture(scope="module")
def olmo(folder: Path) -> Encoder:
    return encoder(folder)


def rendered(made: Encoder, row: Any) -> str:
    return "".join(made.template.render(RowReader(made.prepare, SOURCE).read(row))[0])


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(conversations(roles=True), min_size=1, max_size=4))
def test_ids_are_those_of_prompts_and_answers_encoded_apart(olmo: Encoder, rows: list[dict]) -> None:
    """As at inference: an answer's first token never contains the end of the prompt."""
    got = olmo.encode(rows, SOURCE)
    start = 0
    for row, length in zip(got.rows.tolist(), got.lengths.tolist(), strict=True):
        runs = olmo.template.render(olmo.reader(SOURCE).read(rows[row]))[0]
        encode = olmo.vocabulary.tokenizer.encode
        right = [i for part in parts_of(runs) for i in encode(part, add_special_tokens=False).ids]
        assert got.ids[start : start + length].tolist() == right
        start += length
    assert len(got.rows) + len(got.rejects) == len(rows)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(conversations(text=any_text), min_size=1, max_size=6))
def test_a_batch_gives_what_its_rows_give_one_by_one(olmo: Encoder, rows: list[dict]) -> None:
    together = olmo.encode(rows, SOURCE)
    alone = [olmo.encode([row], SOURCE) for row in rows]
    assert together.ids.tolist() == [i for one in alone for i in one.ids.tolist()]
    assert together.loss_mask.tolist() == [i for one in alone for i in one.loss_mask.tolist()]
    assert together.lengths.tolist() == [i for one in alone for i in one.lengths.tolist()]
    assert together.num_targets.sum() == together.loss_mask.sum()


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=10, deadline=None)
@given(row=conversations(text=any_text))
def test_jinja_file_gives_the_same_tokens_and_masks_as_the_named_template(both: Any, name: str, row: dict) -> None:
    native, jinja = both(name)
    one, two = native.encode([row], SOURCE), jinja.encode([row], SOURCE)
    if one.rejects or two.rejects:
        # The last says in its name that it removes thoughts, which rejects the row under a Jinja template.
        lenient = name.startswith("simple_concat") or name == "olmo_thinker_remove_intermediate_thinking"
        assert (one.rejects and two.rejects) or lenient
        return
    assert one.ids.tolist() == two.ids.tolist()
    assert one.loss_mask.tolist() == two.loss_mask.tolist()


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("jinja")
    made: dict[str, tuple[Encoder, Encoder]] = {}

    def pair(name: str) -> tuple[Encoder, Encoder]:
        if name not in made:
            (root / f"{name}.jinja").write_text(TEMPLATES[name].jinja)
            made[name] = (
                encoder(folder, name),
                encoder(folder, f"{name}.jinja", lambda path: root / path, generation_prefix="rendered"),
            )
        return made[name]

    return pair


@settings(max_examples=60, deadline=None)
@given(row=conversations(text=any_text))
def test_special_text_in_content_never_becomes_a_special_token(olmo: Encoder, row: dict) -> None:
    got = olmo.encode([row], SOURCE)
    if got.rejects:
        text = json.dumps(row, ensure_ascii=False)  # hypothesis draws the constants of the code too
        no_stand_in = all(any(block <= ord(c) < block + BLOCK_SIZE for c in text) for block in PRIVATE_BLOCKS)
        assert got.rejects[0].reason in ("nothing_to_train", *["special_text"] * no_stand_in)
        return
    assert text_of(olmo, got) == rendered(olmo, row)
    turns_of_row = len(row["messages"]) + (row["messages"][0]["role"] != "system")
    special = olmo.vocabulary.is_special[got.ids]
    assert int(special.sum()) == 2 * turns_of_row
    assert (got.ids == olmo.vocabulary.eos_id).tolist() == [False] * (len(got.ids) - 1) + [True]


def test_recipe_may_turn_special_text_into_tokens_or_refuse_it(folder: Path) -> None:
    row = chat(f"what is {IM_END}?", "a token")
    as_token = encoder(folder, special_text="token").encode([row], SOURCE)
    as_text = encoder(folder).encode([row], SOURCE)
    assert len(as_token.ids) < len(as_text.ids)
    refused = encoder(folder, special_text="reject").encode([row, chat("a", "b")], SOURCE)
    assert [(bad.row, bad.reason) for bad in refused.rejects] == [(0, "special_text")]
    eos = encoder(folder, special_text="token").encode([chat(EOS, "b")], SOURCE)
    assert [bad.reason for bad in eos.rejects] == ["eos_inside"]


def test_special_text_survives_a_jinja_template_that_looks_at_content(folder: Path) -> None:
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content | replace('<|im_end|>', 'GONE')) + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    made = Encoder(
        folder, encoder(folder).prepare.__class__(tokenizer="t", sources=(SOURCE,), template="x.jinja"), None, text
    )
    got = made.encode([chat(f"a{IM_END}{IM_START}b", f"c{IM_END}d")], SOURCE)
    assert text_of(made, got, trained=True) == f"c{IM_END}d{IM_END}"
    assert int(made.vocabulary.is_special[got.ids].sum()) == 5


@pytest.mark.parametrize("content", ["\nb", "\n\n\nb", " b", "", "b", "\n"])
def test_token_that_straddles_the_edge_of_scaffold_is_not_trained(olmo: Encoder, content: str) -> None:
    got = olmo.encode([chat("a", content)], SOURCE)
    whole, trained = text_of(olmo, got), text_of(olmo, got, trained=True)
    assert whole.endswith("<|im_start|>assistant\n" + content + EOS)
    assert (content + EOS).endswith(trained) and trained.endswith(EOS)
    # Only white space that merged with the header's newline is left out, and the proof counts it.
    assert (content + EOS).removesuffix(trained).strip() == ""
    assert got.proof["straddling_tokens"] == (trained != content + EOS)


def test_gap_that_merges_with_the_end_of_an_answer_is_not_trained(folder: Path) -> None:
    made = encoder(folder, "simple_chat")
    got = made.encode([chat("hi", "how are you?!", "fine", "bye")], SOURCE)
    assert not any(text in text_of(made, got, trained=True) for text in ("User:", "\n\n", "fine"))


def test_first_token_of_a_document_is_never_a_target(folder: Path) -> None:
    made = encoder(folder, "simple_concat_with_new_line")
    got = made.encode([{"messages": turns(("assistant", "Once upon a time"))}] * 2, SOURCE)
    assert got.loss_mask[0] == False and got.loss_mask[got.lengths[0]] == False  # noqa: E712
    assert got.num_targets.tolist() == (got.lengths - 1).tolist()


def test_conversation_that_ends_with_the_user_still_ends_with_one_untrained_eos(olmo: Encoder) -> None:
    got = olmo.encode([chat("a", "b", "c")], SOURCE)
    assert text_of(olmo, got).endswith("c<|im_end|>\n<|endoftext|>")
    assert text_of(olmo, got, trained=True) == "b<|im_end|>"


def test_training_that_would_not_end_in_a_terminator_is_a_counted_reject(folder: Path) -> None:
    """A layout that ends only the conversation, and a row that trains only an answer inside it."""
    inner = chat("a", "b", "c", "d")
    inner["messages"][3]["train"] = False
    got = encoder(folder, "simple_chat").encode([inner, chat("a", "b")], SOURCE)
    assert [(bad.row, bad.reason) for bad in got.rejects] == [(0, "no_terminator")] and got.rows.tolist() == [1]
    assert encoder(folder, "olmo").encode([inner], SOURCE).rows.tolist() == [0]


def test_fast_encoder_and_tokenizers_give_the_same_bytes(folder: Path) -> None:
    rows = [chat(a, b + "x") for a in NASTY for b in NASTY]
    fast, slow = (encoder(folder, encoder=engine) for engine in ("auto", "tokenizers"))
    one, two = fast.encode(rows, SOURCE), slow.encode(rows, SOURCE)
    assert two.engine == "tokenizers"
    assert (
        np.array_equal(one.ids, two.ids)
        and np.array_equal(one.loss_mask, two.loss_mask)
        and np.array_equal(one.rows, two.rows)
    )


class Liar:
    """A fast encoder that is wrong about every text with an é, as an encoder with another pre-tokenizer would be."""

    def __init__(self, honest: Any) -> None:
        self.honest = honest

    def encode(self, text: bytes) -> Any:
        return self.honest.encode(text.replace("é".encode(), "e\u0301".encode()))


def test_batch_that_the_fast_encoder_gets_wrong_is_encoded_by_tokenizers(folder: Path) -> None:
    pytest.importorskip("gigatoken")
    made, right = encoder(folder), encoder(folder, encoder="tokenizers")
    made.engine.fast = Liar(made.engine.fast)
    rows = [chat("a", "b")] * 50 + [chat("é", "b")] + [chat("a", "b")] * 50
    got = made.encode(rows, SOURCE)
    assert got.engine == "tokenizers"
    assert got.ids.tolist() == right.encode(rows, SOURCE).ids.tolist()
    assert made.encode([chat("a", "b")], SOURCE).engine == "gigatoken"


class Splitter:
    """A fast encoder whose ids are no longer the tokenizer's, though they decode to the same text: it knows no merges."""

    def __init__(self, made: Encoder) -> None:
        self.made = made

    def encode(self, text: bytes) -> Any:
        vocabulary = self.made.vocabulary
        single = {token: number for number, token in enumerate(vocabulary.token_bytes) if len(token) == 1}
        parts = [vocabulary.specials.get(part) or part for part in self.made.specials.split.split(text.decode())]
        return [
            number
            for part in parts
            for number in ([part] if isinstance(part, int) else [single[bytes([byte])] for byte in part.encode()])
        ]


def test_other_ids_of_the_same_text_are_caught_by_the_parity_sample(folder: Path) -> None:
    pytest.importorskip("gigatoken")
    made, right = encoder(folder), encoder(folder, encoder="tokenizers")
    made.engine.fast = Splitter(made)
    for row in (chat("a question", "an answer"), chat("long " * 900, "an answer")):
        got = made.encode([row], SOURCE)
        assert got.engine == "tokenizers" and got.ids.tolist() == right.encode([row], SOURCE).ids.tolist()


def test_wrong_ids_that_the_sample_missed_fail_the_proof_and_are_encoded_again(folder: Path) -> None:
    pytest.importorskip("gigatoken")
    made = encoder(folder, parity_sample=0.0)
    made.engine.fast = Liar(made.engine.fast)
    rows = [chat("a", "b"), chat("é", "b"), chat(f"é{EOS}", "b")]
    got = made.encode(rows, SOURCE)
    assert got.engine == "tokenizers" and got.rows.tolist() == [0, 1, 2]
    assert got.ids.tolist() == encoder(folder, encoder="tokenizers").encode(rows, SOURCE).ids.tolist()


def test_document_whose_ids_cannot_be_proven_is_not_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(folder, encoder="tokenizers")
    honest = made.engine.encode_slowly
    monkeypatch.setattr(made.engine, "encode_slowly", lambda texts: honest([text.replace("é", "e") for text in texts]))
    got = made.encode([chat("a", "b"), chat("é", "b"), chat("c", "d")], SOURCE)
    assert [(bad.row, bad.reason) for bad in got.rejects] == [(1, "proof")]
    assert got.rows.tolist() == [0, 2] and text_of(made, got, 1, trained=True) == "d" + EOS


def test_without_gigatoken_tokenizers_does_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    made = encoder(folder)
    assert made.engine.name == "tokenizers" and "not importable" in made.engine.fallback_reason
    assert made.encode([chat("a", "b")], SOURCE).num_targets.tolist() == [2]
    with pytest.raises(SftError, match="gigatoken is not importable"):
        encoder(folder, encoder="gigatoken")


def test_encoder_pickles_with_its_template_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATES["chatml"].jinja)
    made = encoder(folder, "mine.jinja", lambda path: tmp_path / path)
    (tmp_path / "mine.jinja").unlink()
    again = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert again.identity == made.identity
    assert again.encode([chat("a", "b")], SOURCE).ids.tolist() == made.encode([chat("a", "b")], SOURCE).ids.tolist()


@pytest.mark.parametrize("suffix", TEMPLATE_SUFFIXES)
def test_every_name_of_a_template_file_that_the_planner_accepts_is_read(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / f"mine{suffix}").write_text(TEMPLATES["chatml"].jinja)
    made = encoder(folder, f"mine{suffix}", lambda path: tmp_path / path)
    assert made.template.text == TEMPLATES["chatml"].jinja
    assert (
        made.encode([chat("a", "b")], SOURCE).ids.tolist()
        == encoder(folder, "chatml").encode([chat("a", "b")], SOURCE).ids.tolist()
    )


def test_identity_says_what_readers_of_the_data_need(folder: Path) -> None:
    identity = encoder(folder).identity
    vocabulary = Vocabulary(folder)
    assert identity.boundaries == "eos" and identity.eos_id == vocabulary.specials[EOS]
    assert identity.terminator_ids == tuple(sorted([vocabulary.specials[EOS], vocabulary.specials[IM_END]]))
    assert identity.vocab_size == vocabulary.size
    assert build(TokenizerFacts, json.loads(json.dumps(to_json(identity))), "") == identity
    assert {name: encoder(folder, name).identity.boundaries for name in TEMPLATES} == {
        name: "index" if name in ENDS_TURNS_IN_EOS else "eos" for name in TEMPLATES
    }


@pytest.mark.parametrize("name", ["olmo", "tulu", "simple_chat", "chatml"])
def test_transformers_loads_the_saved_folder_with_the_same_ids_and_rendering(
    folder: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    made = encoder(folder, name)
    made.save_tokenizer(tmp_path / "tokenizer")
    made.check_saved(tmp_path / "tokenizer")
    rebuilt = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    row = {
        "messages": turns(("system", "S"), ("user", "é\n1234"), ("assistant", "x"), ("user", " y"), ("assistant", "z"))
    }
    ids = rebuilt.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert made.encode([row], SOURCE).ids.tolist() == ids + [made.vocabulary.eos_id] * made.template.eos_appended
    # The saved folder is a tokenizer folder like any other: its own template is the one trained with.
    own = encoder(tmp_path / "tokenizer", "tokenizer")
    assert own.encode([row], SOURCE).loss_mask.tolist() == made.encode([row], SOURCE).loss_mask.tolist()


def test_tokenizer_that_transformers_rebuilds_differently_is_refused_and_saved_soundly(
    folder: Path, tmp_path: Path
) -> None:
    """open-instruct #1896: a model's own tokenizer class brings its own pre-tokenizer."""
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (odd / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(SftError, match="transformers rebuilds this tokenizer"):
        check_rebuilt(odd)
    made = encoder(odd)
    made.save_tokenizer(tmp_path / "saved")
    made.check_saved(tmp_path / "saved")


def test_tokenizer_folder_that_cannot_be_used_is_reported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SftError, match="not found"):
        encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SftError, match="not a tokenizer"):
        encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(SftError, match="eos_token is None"):
        encoder(tmp_path)
    with pytest.raises(SftError, match="has no chat template; next: name one of chatml"):
        encoder(folder, "tokenizer")
    with pytest.raises(SftError, match="neither 'tokenizer', nor a"):
        encoder(folder, "olom")


def test_tokenizer_without_fixed_bytes_goes_by_offsets(tmp_path: Path) -> None:
    """SentencePiece-like: a space is a letter of the vocabulary, and the first word gets one in front."""
    words = [
        "▁",
        "▁hi",
        "▁there",
        "▁you",
        "h",
        "i",
        "a",
        "b",
        "\n",
        "▁a",
        "▁b",
        "?",
        "User",
        ":",
        "▁User",
        "Assistant",
        "▁Assistant",
    ]
    vocabulary = [("<unk>", 0.0), *((word, -1.0 - 0.1 * index) for index, word in enumerate(words))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    made = encoder(tmp_path, "simple_chat")
    assert not made.vocabulary.byte_level and made.engine.name == "tokenizers"
    got = made.encode([chat("hi there", "hi you?", "a", "b"), chat("a </s>", "b"), chat("a", "b")], SOURCE)
    assert [(bad.row, bad.reason) for bad in got.rejects] == [(1, "special_text")]
    tokens = [tokenizer.id_to_token(number) for number in got.ids[: got.lengths[0]].tolist()]
    trained = [token for token, flag in zip(tokens, got.loss_mask.tolist(), strict=False) if flag]
    assert trained == ["▁hi", "▁you", "?", "▁b", "</s>"]


@pytest.mark.seconds
def test_real_dolma2_agrees_with_tokenizers_on_gsm8k(shared_data: Path) -> None:
    from sft.recipe.schema import Prepare, Source

    source = Source(path="x", columns={"prompt": "question", "completion": "answer"})
    table = Prepare(tokenizer="t", sources=(source,), template="olmo", parity_sample=1.0)
    made = Encoder(shared_data / "dolma2-tokenizer", table)
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:300]]
    got = made.encode(rows, source)
    assert got.engine == made.engine.name and not got.rejects
    assert got.proof["parity_documents"] in (0, len(rows)) and got.proof["straddling_tokens"] == 0
    for document in range(len(rows)):
        assert text_of(made, got, document, trained=True) == rows[document]["answer"] + EOS
    assert made.identity.eos_id == 100257 and made.identity.pad_id == 100277 and made.identity.vocab_size == 100278


def test_answers_that_lack_what_the_prompt_gives_are_counted(folder: Path) -> None:
    rows = [chat("a", "<think>1</think>b", "c", "d"), chat("a", "<think>1</think>b"), chat(f"a{IM_END}", "b")]
    assert encoder(folder, "olmo_thinker").encode(rows, SOURCE).proof["answers_without_prompt"] == 2
    assert "answers_without_prompt" not in encoder(folder, "olmo").encode(rows, SOURCE).proof


def test_template_file_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "latin.jinja").write_bytes(b"{# \xe9 #}")
    for name, why in (("folder", "Is a directory"), ("latin", "not UTF-8"), ("gone", "No such file")):
        with pytest.raises(SftError, match=rf"{name}.jinja: prepare.template: .*{why}.*; next: "):
            encoder(folder, f"{name}.jinja", lambda path: tmp_path / path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_tokenizer(tmp_path / "tokenizer", template="")
    (made / "chat_template.jinja").write_text("x")
    read = Path.read_bytes, Path.read_text

    def refuse(reader: Any) -> Any:
        def refused(path: Path, *args: Any, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(13, "Permission denied")
            return reader(path, *args, **options)

        return refused

    monkeypatch.setattr(Path, "read_bytes", refuse(read[0]))
    monkeypatch.setattr(Path, "read_text", refuse(read[1]))
    with pytest.raises(SftError, match=rf"{name}: .*Permission denied; next: "):
        encoder(made, "tokenizer")


def test_tokenizer_configuration_that_is_no_object_is_named(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path / "tokenizer")
    (made / "tokenizer_config.json").write_text("[]")
    with pytest.raises(SftError, match=r"tokenizer_config.json: holds list, not an object; next: "):
        encoder(made)


def test_gigatoken_that_fails_at_its_first_text_gives_way_to_tokenizers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def encode_batch(self, texts: list) -> Any:
            raise AttributeError("layout\n\nLocation:\n    src/mod.rs")

    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=lambda path: Broken()))
    made = encoder(folder)
    assert made.engine.name == "tokenizers" and made.engine.fallback_reason.endswith(": layout")
    assert made.encode([chat("a", "b")], SOURCE).engine == "tokenizers"
    with pytest.raises(SftError, match=r'prepare.encoder = "gigatoken": gigatoken cannot read this tokenizer: layout'):
        encoder(folder, encoder="gigatoken")
