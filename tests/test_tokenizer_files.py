"""Files of a tokenizer folder that say different things, or what transformers reads otherwise: used, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chat_samples import SOURCE, chat, encoder, tokenizer_folder
from preparing import conversation, stage, write_rows
from sft.common.errors import SftError
from sft.data.preparation import Preparation
from sft.data.prepare import prepare

folder = tokenizer_folder
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROW = chat("Hi there, how are you?", "Very well.")


def copied(folder: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder with one of its JSON files changed, or with a new one."""
    made = tmp_path / "changed"
    shutil.copytree(folder, made)
    file = made / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    change(content)
    file.write_text(json.dumps(content))
    return made


def added(**fields: Any) -> Callable[[dict[str, Any]], None]:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda content: content["added_tokens"].append({**token, **fields})


@pytest.mark.parametrize(
    "field",
    [
        {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}},
    ],
)  # fmt: skip
def test_truncation_and_padding_of_an_earlier_call_do_not_count(
    folder: Path, tmp_path: Path, field: dict[str, Any]
) -> None:
    made = encoder(copied(folder, tmp_path, "tokenizer.json", lambda content: content.update(field)))
    assert made.encode([ROW], SOURCE).ids.tolist() == encoder(folder).encode([ROW], SOURCE).ids.tolist()
    made.save_tokenizer(tmp_path / "saved")
    made.check_saved(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("tokenizer.json", lambda c: c["model"].update(dropout=0.1), "model.dropout = 0.1: ids would be random"),
        ("tokenizer.json", added(id=5000, content="<t>"), "added_tokens: '<t>' has the id 5000, and tokenizers gives it"),
        ("tokenizer.json", added(id=3, content="<t>"), "added_tokens: '<t>' has the id 3, and tokenizers gives it"),
        ("tokenizer_config.json", lambda c: c.update(bos_token="<s>"), "tokenizer_config.json: bos_token: '<s>' is not a token"),
        ("tokenizer_config.json", lambda c: c.update(bos_token=7), "tokenizer_config.json: bos_token = 7, expected the text"),
        ("tokenizer_config.json", lambda c: c.update(extra_special_tokens={"image": "<i>"}), "extra_special_tokens: '<i>' is not"),
        ("tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"1": {"content": "<|im_end|>"}}), "'<|im_end|>' with the id 1 has the id"),
        ("special_tokens_map.json", lambda c: c.update(additional_special_tokens=["<a>"]), "additional_special_tokens: '<a>' is not"),
        ("special_tokens_map.json", lambda c: c.update(eos_token="<|im_end|>"), "eos_token is '<|im_end|>' in special_tokens_map.json and '<|endoftext|>' in"),
        ("added_tokens.json", lambda c: c.update({"<a>": 9}), "added_tokens.json: added_tokens_decoder: '<a>' with the id 9 is not"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=7), "chat_template = 7, expected a text or templates"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=[{"name": "default"}]), "expected templates, each with a name"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=[{"name": "a", "template": "1"}] * 2), "expected templates, each with a name"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=" "), "the template is empty"),
        ("tokenizer_config.json", lambda c: c.update(chat_template="\ufeff" + CHATML), "the template begins with a byte order mark"),
    ],
)  # fmt: skip
def test_what_transformers_would_read_otherwise_is_refused(
    folder: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None], found: str
) -> None:
    made = copied(folder, tmp_path, name, change)
    with pytest.raises(SftError) as error:
        encoder(made, "tokenizer")
    assert found in str(error.value) and "; next: " in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", {"default": CHATML, "rag": "x"}),
        ("tokenizer_config.json", [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]),
        ("chat_template.json", CHATML),
    ],
)
def test_every_form_of_a_folders_template_is_read(folder: Path, tmp_path: Path, name: str, value: Any) -> None:
    made = encoder(copied(folder, tmp_path, name, lambda content: content.update(chat_template=value)), "tokenizer")
    assert made.template.text == CHATML


def test_the_older_files_do_not_count_where_the_configuration_lists_the_tokens(folder: Path, tmp_path: Path) -> None:
    """As in transformers."""
    made = copied(folder, tmp_path, "tokenizer_config.json", lambda content: content.update(added_tokens_decoder={}))
    (made / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>", "additional_special_tokens": ["<a>"]}')
    assert encoder(made).vocabulary.eos == encoder(folder).vocabulary.eos


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused_before_rows_are_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = next(
        t for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"] if t["content"] == "<|im_end|>"
    )
    listed = {str(token.pop("id")): {**token, "rstrip": True}}
    copied(folder, tmp_path, "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=listed))
    write_rows(tmp_path / "rows.jsonl", [conversation(1)])
    monkeypatch.setattr(Preparation, "encode", lambda *_: pytest.fail("rows were encoded"))
    with pytest.raises(SftError, match="correct what tokenizer_config"):
        prepare(stage(tmp_path, tokenizer="changed"))
