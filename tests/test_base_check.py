"""What sync and the planner refuse about a base before training: its tokenizer, its config and the names of its tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bases
import made_data
import tiny_export
from sft.common.errors import SftError
from sft.formats.dataset import TokenizerFacts
from sft.recipe import recipe
from sft.recipe.schema import Model, Prepare
from sft.runner import bases as bases_of_runs
from sft.sync import base_check


def prepared(folder: Path) -> TokenizerFacts:
    """A dataset's facts and tokenizer."""
    facts = tiny_export.tokenizer(folder / "data" / "tokenizer")
    made_data.dataset_info(facts, [made_data.source_summary("zoo.jsonl", 48, 4800, 1200)]).write(
        folder / "dataset.json"
    )
    return facts


def described(folder: Path, kind: str, **changes: Any) -> Path:
    """A base's small files, as they are before its weights are fetched."""
    tiny_export.tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(bases.SIZES | {"model_type": kind} | changes))
    return folder


def asked(**model: Any) -> Any:
    return SimpleNamespace(model=Model(base="b", **model), prepare=Prepare(tokenizer="t", sources=()), on={})


def test_sync_refuses_what_training_or_convert_would_refuse(tmp_path: Path) -> None:
    prepared(tmp_path)
    base_check.check_base(asked(), tmp_path, described(tmp_path / "llama", "llama"))
    with pytest.raises(SftError, match=r"clip_qkv: 8.0, not supported"):
        base_check.check_base(asked(), tmp_path, described(tmp_path / "clip", "llama", clip_qkv=8.0))
    with pytest.raises(SftError, match=r"n_layers .*4 .*n_layers = 2"):
        base_check.check_base(asked(n_layers=2), tmp_path, tmp_path / "llama")
    with pytest.raises(SftError, match=r"Qwen2Tokenizer of transformers encodes .* set \[prepare\] tokenizer"):
        base_check.check_base(asked(), tmp_path, described(tmp_path / "qwen2", "qwen2"))
    (tmp_path / "llama" / "tokenizer.json").write_text('{"version": "2.0"}')
    with pytest.raises(SftError, match=r"the data were made with tokenizer.json sha256"):
        base_check.check_base(asked(), tmp_path, tmp_path / "llama")


def test_sync_refuses_weights_without_a_tensor_of_the_config(tmp_path: Path) -> None:
    prepared(tmp_path)
    bases.write(tmp_path / "b", "llama2")
    base_check.check_weights(asked(), tmp_path, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(SftError, match=r"9 of 48 tensors missing, the first is blocks.4.attention"):
        base_check.check_weights(asked(), tmp_path, tmp_path / "b")
    base_check.check_weights(asked(), tmp_path, tmp_path / "no config")


def test_the_planner_compares_the_tokenizers_of_base_and_data(tmp_path: Path) -> None:
    described(tmp_path / "b", "llama")
    tiny_export.tokenizer(tmp_path / "t", 280)
    file = tmp_path / "x.toml"
    file.write_text('[model]\nbase = "b"\n[prepare]\ntokenizer = "t"\n[[prepare.sources]]\npath = "p.jsonl"\n'
                    '[evaluate]\ntasks = ["t"]\n')  # fmt: skip
    with pytest.raises(
        SftError, match=r"x.toml: 'tokenizer' in \[prepare\] = 't': .*t/tokenizer.json is not the base's"
    ):
        bases_of_runs.check_base((tmp_path,), tmp_path / "runs" / "x", recipe.load(file))
    bases_of_runs.check_base((tmp_path,), tmp_path / "runs" / "x", recipe.load(file, ["tokenizer=b"]))


def planned(folder: Path, recipe_text: str) -> None:
    """What the planner checks of a recipe with a base b and a tokenizer t under `folder`."""
    file = folder / "x.toml"
    file.write_text(f'[model]\nbase = "b"\n{recipe_text}[prepare]\ntokenizer = "t"\n[[prepare.sources]]\npath = "p.jsonl"\n'
                    '[evaluate]\ntasks = ["t"]\n')  # fmt: skip
    bases_of_runs.check_base((folder,), folder / "runs" / "x", recipe.load(file))


def test_the_planner_shows_in_which_parts_two_tokenizers_differ(tmp_path: Path) -> None:
    described(tmp_path / "b", "llama")
    tiny_export.tokenizer(tmp_path / "t", 280)
    file = tmp_path / "t" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFKC"}}))
    with pytest.raises(SftError) as error:
        planned(tmp_path, "")
    lines = str(error.value).splitlines()
    assert lines[1].split() == ["field", "base", "recipe"]
    assert any(line.split() == ["number", "of", "ids", "300", "280"] for line in lines)
    assert any(line.startswith("normalizer ") and line.endswith('{"type": "NFKC"}') for line in lines)


def test_the_planner_refuses_a_base_whose_tokenizer_cannot_be_the_datas(tmp_path: Path) -> None:
    described(tmp_path / "b", "llama")
    (tmp_path / "b" / "tokenizer.json").unlink()
    tiny_export.tokenizer(tmp_path / "t")
    with pytest.raises(
        SftError, match=r"x.toml: 'base' in \[model\] = 'b': no tokenizer.json, so that its tokenizer cannot"
    ):
        planned(tmp_path, "")
    with pytest.raises(SftError, match=r"has more ids than .*b/config.json\n(.|\n)*vocab_size +96 +300 ids"):
        planned(tmp_path, 'base_tokenizer = "unchecked"\n')
    described(tmp_path / "b", "llama", vocab_size=320)
    planned(tmp_path, 'base_tokenizer = "unchecked"\n')


def test_the_planner_refuses_a_tokenizer_that_transformers_class_of_the_family_would_change(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    described(tmp_path / "b", "qwen2")
    tiny_export.tokenizer(tmp_path / "t")
    with pytest.raises(SftError) as error:
        planned(tmp_path, "")
    assert "is not a tokenizer of qwen2: transformers loads it with that family's class" in str(error.value)
    assert re.search(r"\nnormalizer +NFC +none\n", str(error.value))
    assert "next: choose another [model] base" in str(error.value)  # the tokenizer is the base's own
    # What the class itself writes is accepted, also with a vocabulary of another size.
    for name in ("b", "t"):
        Qwen2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]).save_pretrained(tmp_path / name)
    planned(tmp_path, "")
