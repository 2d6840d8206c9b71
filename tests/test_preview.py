"""`make preview`: what is shown is what is trained, and data cannot command the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chat_samples import EOS, IM_END, SOURCE, chat, encoder, make_tokenizer
from conftest import REPO
from sft.common.errors import SftError
from sft.data import preview
from sft.data.tokenize import Encoder
from sft.recipe.schema import Source
from sft.sources import input_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return encoder(make_tokenizer(tmp_path_factory.mktemp("preview") / "tokenizer"), "chatml")


@pytest.fixture
def files(tmp_path: Path) -> list[list[input_files.InputFile]]:
    rows = [chat("Hi", "Hello\nyou"), chat("no answer"), chat("third", "3"), chat("fourth", "4")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [input_files.resolve(SOURCE, lambda path: tmp_path / path, tmp_path / "cache").files]


def test_segments_are_the_document_with_special_tokens_alone(made: Encoder) -> None:
    got = made.encode([chat("é", f"b{EOS}c")], SOURCE)
    parts = preview.segments(made.vocabulary, got.ids, got.loss_mask)
    assert (
        "".join(part.text for part in parts)
        == f"<|im_start|>user\né{IM_END}\n<|im_start|>assistant\nb{EOS}c{IM_END}\n{EOS}"
    )
    assert [part.text for part in parts if part.special] == ["<|im_start|>", IM_END, "<|im_start|>", IM_END, EOS]
    assert [part.text for part in parts if part.trained] == [f"b{EOS}c", IM_END]


def test_preview_shows_rows_rejects_and_boundaries(made: Encoder, files: list) -> None:
    shown = "\n".join(preview.preview(made, files, "", "", colour=False))
    assert "⟦Hello↵\nyou<|im_end|>⟧↵\n<|endoftext|>" in shown and "end of document, EOS" in shown
    assert "row 2 · rejected, nothing_to_train" in shown and "third" not in shown
    assert "⟦3<|im_end|>⟧" in "\n".join(preview.preview(made, files, "1", "3", colour=False))
    coloured = "\n".join(preview.preview(made, files, "rows.jsonl", "4", colour=True))
    assert preview.GREEN + "4" + preview.RESET in coloured and "⟦" not in coloured


def test_every_row_of_a_folder_can_be_asked_for_by_its_file_or_by_counting_on(made: Encoder, tmp_path: Path) -> None:
    (tmp_path / "mix").mkdir()
    for name in "ab":
        rows = [chat("q", f"{name}1"), chat("q", f"{name}2"), chat(f"no answer in {name}")]
        (tmp_path / "mix" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [input_files.resolve(Source(path="mix"), lambda path: tmp_path / path, tmp_path / "cache").files]

    def shown(source: str, row: str) -> str:
        return "\n".join(preview.preview(made, files, source, row, colour=False))

    assert "mix/b.jsonl row 2 ·" in shown("mix/b.jsonl", "2") and "⟦b2" in shown("mix/b.jsonl", "2")
    assert "mix/b.jsonl row 3 · rejected" in shown("mix/b.jsonl", "3")
    assert "mix/b.jsonl row 1 ·" in shown("", "4") and "⟦b1" in shown("1", "4")
    assert "⟦b1" in shown("mix/b.jsonl", "") and "⟦a1" not in shown("mix/b.jsonl", "")
    with pytest.raises(SftError, match="no row 7; there are 6"):
        shown("", "7")
    with pytest.raises(SftError, match="no such source or file"):
        shown("mix/c.jsonl", "1")


@pytest.mark.parametrize(
    ("source", "row", "why"), [("2", "", "no such source"), ("", "0", "not a row number"), ("", "9", "no row 9")]
)
def test_unknown_source_or_row_is_reported(made: Encoder, files: list, source: str, row: str, why: str) -> None:
    with pytest.raises(SftError, match=why):
        list(preview.preview(made, files, source, row, colour=False))


def test_control_characters_in_data_do_not_reach_the_terminal(made: Encoder) -> None:
    lines = list(preview.show(made, 0, "x", 1, chat("\x1b[2J\x07\u202e", "ok"), colour=False))
    assert not any(char in "".join(lines) for char in "\x1b\x07\u202e")
    assert "\\x1b[2J\\x07\\u202e" in "".join(lines)


def test_fields_are_shown_by_what_becomes_of_them(made: Encoder) -> None:
    row = {**chat("a", "b"), "id": 1, "rationale": "r", "tools": []}
    shown = "\n".join(preview.show(made, 0, "x", 1, row, colour=False))
    assert "read: messages, messages.content, messages.role\n" in shown and "without training content: id\n" in shown
    assert "not read, which refuses the source: rationale" in shown


@pytest.mark.seconds
def test_program_prints_the_smoke_recipe(tmp_path: Path) -> None:
    command = [sys.executable, "stages/preview.py", str(tmp_path / "smoke"), "--row", "1"]
    done = subprocess.run(
        command, cwd=REPO, env={"PYTHONPATH": "lib", "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "⟦" in done.stdout and "end of document, EOS" in done.stdout
    assert not (tmp_path / "smoke").exists()
