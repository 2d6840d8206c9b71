"""make chat: the model's own template, stop tokens and sampling, as transformers uses them; make serve."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_export
from conftest import REPO
from sft.common.errors import SftError
from sft.evaluation import serving, talk
from sft.export import write
from sft.recipe.schema import Convert
from sft.runner.plan import Place


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


class Pieces(io.StringIO):
    """What was written, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def generated(talking: talk.Talk, text: str, seed: int, **arguments: object) -> str:
    """What transformers generates by itself."""
    ids = talking.prompt(text)
    torch.manual_seed(seed)
    reply = talking.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64 - ids.shape[1], **arguments
    )
    return str(talking.tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.seconds
def test_replies_are_sampled_as_generation_config_says_and_streamed(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "convert/model", tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps({**config, **own}))
    talking = talk.load(folder, "cpu")
    assert talking.settings().endswith("sampling: temperature 0.7, top_p 0.9, top_k 20")
    wanted = generated(talking, "Who?", 5)
    assert wanted != generated(talking, "Who?", 6) and wanted != generated(talking, "Who?", 5, do_sample=False)
    torch.manual_seed(5)
    out = Pieces()
    assert talking.reply("Who?", out) == wanted
    assert len([p for p in out.pieces if p.strip()]) > 5  # as it comes, not at once
    talking.messages.clear()
    talk.converse(talking, ["/sampling greedy", "Who?"], out)
    assert talking.messages[1]["content"] == generated_alone(talking, do_sample=False)
    talk.converse(talking, ["/clear", "/sampling own"], out)
    assert talking.sampling == {}


def generated_alone(talking: talk.Talk, **arguments: object) -> str:
    talking.messages.clear()
    return generated(talking, "Who?", 0, **arguments)


def test_a_greedy_export_can_be_sampled_with_a_seed(talking: talk.Talk) -> None:
    talking.messages.clear()
    assert talking.settings().endswith("sampling: greedy")
    out = io.StringIO()
    talk.converse(talking, ["/sampling temperature=1.5 top_k=30 seed=9", "Who?"], out)
    assert "sampling: temperature 1.5, top_k 30" in out.getvalue()
    reply = talking.messages[1]["content"]
    talking.messages.clear()
    assert reply == generated(talking, "Who?", 9, do_sample=True, temperature=1.5, top_k=30)
    assert reply != generated(talking, "Who?", 9, do_sample=False)
    talk.converse(talking, ["/sampling greedy"], out)


@pytest.mark.parametrize(
    ("words", "message"),
    [("top_p=7", "0.001 to 1 is possible"), ("temperature=0", "0.001 to 100"), ("top_k=x", "a number is expected"), ("temp=1", "no such setting"),
     ("temperature=nan", "is possible"), ("greedy top_k=1", "no such setting")],
)  # fmt: skip
def test_sampling_that_is_not_possible_is_refused(talking: talk.Talk, words: str, message: str) -> None:
    before = dict(talking.sampling)
    with pytest.raises(SftError, match=message):
        talking.set_sampling(words)
    assert talking.sampling == before


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
    with pytest.raises(SftError, match=r"RUN=y: no such run in .*; next: make runs lists them"):
        talk.model_folder(tmp_path / "y", "", "", tmp_path, print)
    (tmp_path / "y").mkdir()
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


def test_serve_can_keep_base_and_adapter_apart(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO / "stages"))
    import chat

    shutil.copytree(run / "convert", tmp_path / "x/convert")
    asked = ["--run", str(tmp_path / "x"), "--adapter"]
    with pytest.raises(SystemExit, match="no adapter; next: make serve RUN=x"):
        chat.main([*asked, "--serve"])
    adapter = tmp_path / "x/convert/adapter"
    adapter.mkdir()
    (tmp_path / "data/my/base").mkdir(parents=True)
    (tmp_path / "data/my/base/config.json").write_text("{}")
    written = {"r": 32, "base_model_name_or_path": "my/base", "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    assert chat.main([*asked, "--serve", "--data", str(tmp_path / "data")]) == 0
    words = capsys.readouterr().out.split()
    assert words[:3] == [".venv/bin/vllm", "serve", str(tmp_path / "data/my/base")]
    found = dict(itertools.pairwise(words))
    assert found["--max-lora-rank"] == "32" and found["--lora-modules"] == f"x={adapter}"
    assert found["--tokenizer"] == found["--generation-config"] == str(tmp_path / "x/convert/model")
    with pytest.raises(SystemExit, match="ADAPTER=1 is for make serve RUN=x"):
        chat.main(asked)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"base_model_name_or_path": None}, "its base of random weights is no Hugging Face folder"),
        ({"base_model_name_or_path": "gs://b/step0"}, "its base gs://b/step0 is no Hugging Face folder"),
        ({"base_model_name_or_path": "step0"}, "no file or folder 'step0'"),
        ({"r": 600}, "rank 600: vLLM serves at most 512"),
        ({"base_model_name_or_path": "org/name", "revision": "abc", "r": 20}, ("org/name", "--revision abc", "--max-lora-rank 32")),
    ],
)  # fmt: skip
def test_a_base_that_vllm_cannot_serve_is_refused(
    run: Path, tmp_path: Path, fields: dict[str, object], found: str | tuple[str, ...]
) -> None:
    export = tmp_path / "convert/model"
    shutil.copytree(run / "convert/model", export)
    (tmp_path / "convert/adapter").mkdir()
    written = {"r": 8, "base_model_name_or_path": "a/b", "revision": None, **fields}
    (tmp_path / "convert/adapter/adapter_config.json").write_text(json.dumps(written))
    if isinstance(found, str):
        with pytest.raises(SftError, match=re.escape(found)):
            serving.serve_adapter(export, "x", Place(tmp_path))
    else:
        command = " ".join(serving.serve_adapter(export, "x", Place(tmp_path)))
        assert all(words in command for words in found)
