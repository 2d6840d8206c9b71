"""make chat: the model's own template, stop tokens and sampling, as transformers uses them; make serve."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_export
from conftest import REPO
from sft.common.errors import SftError
from sft.evaluation import talk
from sft.export import write
from sft.recipe.schema import Convert


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export of a tiny model."""
    run = tmp_path_factory.mktemp("runs") / "x"
    facts = tiny_export.tokenizer(run / "train/tokenizer")
    options = Convert(dtype="float32", max_position_embeddings=64)
    (run / "convert").mkdir(parents=True)
    weights = tiny_export.weights(tiny_export.OLMO2)
    trained = write.Trained(weights, tiny_export.OLMO2, facts, run / "train/tokenizer")
    write.export(trained, tiny_export.TEMPLATE, options, run / "convert/model", lambda _: None)
    return run


@pytest.fixture(scope="module")
def talking(run: Path) -> talk.Talk:
    return talk.load(talk.model_folder(run, "", "", run.parent / ".cache", print), "cpu", system="Be brief.")


def test_the_prompt_is_what_transformers_writes_and_the_reply_what_it_generates(talking: talk.Talk) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    theirs = talking.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert talking.prompt("Who?").tolist() == theirs["input_ids"].tolist()
    torch.manual_seed(1)
    wanted = talking.model.generate(**theirs, max_new_tokens=64 - theirs["input_ids"].shape[1])[
        0, theirs["input_ids"].shape[1] :
    ]
    torch.manual_seed(1)
    out = io.StringIO()
    answer = talking.reply("Who?", out)
    text = talking.tokenizer.decode(wanted, skip_special_tokens=True)
    assert answer == text and out.getvalue().rstrip("\ufffd\n") == text.rstrip("\ufffd\n")
    assert [m["role"] for m in talking.messages] == ["user", "assistant"]


def test_commands_change_the_conversation_and_too_much_is_reported(talking: talk.Talk) -> None:
    out = io.StringIO()
    talk.converse(
        talking,
        ["/clear", "/tokens", "Hi", "/tokens", "/nope", "word " * 99, "/system Be long.", "/quit", "never"],
        out,
    )
    text = out.getvalue()
    assert "no command /nope" in text and "the model supports 64; next: /clear" in text and "system: Be long." in text
    assert ":" in text and talking.messages == [] and talking.system == "Be long."


def test_what_cannot_be_talked_to_is_reported_with_the_next_command(run: Path, tmp_path: Path) -> None:
    for step, model, message in (
        ("300", "", r"there are: none; next: one of them"),
        ("300", "x", "two models; next: give one of them"),
        ("", str(tmp_path), "config.json: missing; next: name the folder of a chat model"),
    ):
        with pytest.raises(SftError, match=message):
            talk.model_folder(run, step, model, tmp_path, print)
    with pytest.raises(SftError, match="next: make convert for y, or STEP=n"):
        talk.model_folder(tmp_path / "y", "", "", tmp_path, print)


@pytest.mark.slow
def test_serve_prints_the_command_of_vllm_and_start_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs/x/convert"
    shutil.copytree(run / "convert", folder)
    config = json.loads((folder / "model/config.json").read_text())
    command = [sys.executable, str(REPO / "stages/chat.py"), "--run", "runs/x", "--serve", "--start"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPO / "lib"), "PATH": ""},
        check=False,
    )
    words = done.stdout.split()
    assert (
        words[:3] == [".venv/bin/vllm", "serve", "runs/x/convert/model"]
        and words[words.index("--served-model-name") + 1] == "x"
    )
    assert words[words.index("--max-model-len") + 1] == str(config["max_position_embeddings"])
    assert done.returncode == 1 and "not installed; next: .venv/bin/pip install -e '.[vllm]'" in done.stderr
