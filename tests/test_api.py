"""The Python API, and the examples of its page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sft
from conftest import REPO
from sft.common.errors import SftError


@pytest.mark.slow
def test_a_model_of_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=97, max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(1, 13)
    ours = sft.load_model(tmp_path)
    with torch.no_grad():
        logits, hidden = ours(ids, torch.arange(12), torch.tensor([0, 12], dtype=torch.int32), 12)
        expected = theirs(ids[None]).logits[0]
    assert logits.shape == (12, 97) and hidden.shape == (12, 32)
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (REPO / "docs" / "python.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "docs/python.md", "exec"), names)
    run = names["run"]
    assert isinstance(run, sft.Run)
    assert run.folder == Path("runs/smoke_lr-1e-4") and run.losses == [] and run.steps == []
    assert set(run.stale) == {"prepare", "sync", "train", "convert", "evaluate"} and run.stale["prepare"] == []
    ids, mask = run.dataset[0]
    assert len(ids) == len(mask) and 0 < int(np.sum(mask)) < len(ids)
    packs = sft.pack(run)
    assert int(packs.sums("length").max()) <= run.recipe.train.seq_len
    assert len(sft.pack(run, seq_len=run.recipe.train.seq_len * 2)) < len(packs)
    with pytest.raises(SftError, match="make evaluate"):
        _ = run.scores


def test_what_is_no_run_and_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SftError, match="make runs lists the runs"):
        sft.Run.open(tmp_path)
    with pytest.raises(SftError, match="neither a checkpoint nor"):
        sft.load_model(tmp_path)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sft.no_such_name  # type: ignore[attr-defined]


def test_importing_the_package_loads_nothing_of_the_environment() -> None:
    code = "import sft, sys; print(sorted({'numpy', 'torch', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": str(REPO / "lib")},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"
