"""lm-eval's vLLM backend with the same records as the other one. Importing this needs the package vllm (`.[vllm]`), a GPU.

vLLM batches by itself: it gets many requests at once, and the journal is written after each such group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.vllm_causallms import VLLM

from sft.evaluation.batches import Batches
from sft.evaluation.recorder import Recorder

GROUP = 1024  # requests handed over at once: enough to keep a GPU full, few enough to lose little in a kill


class VllmModel(Recorder, VLLM):
    def __init__(
        self,
        folder: Path,
        *,
        batch_size: int,
        max_length: int,
        think_end: str | None,
        seed: int = 1234,
        gpus: int = 1,
        device: str = "",  # vLLM takes the GPUs that CUDA_VISIBLE_DEVICES shows
    ) -> None:
        super().__init__(
            pretrained=str(folder),
            dtype="auto",
            batch_size=batch_size or GROUP,  # "auto" draws progress bars over our own lines
            max_model_len=max_length or None,
            tensor_parallel_size=gpus,
            seed=seed,
            think_end_token=think_end,
            trust_remote_code=False,
        )
        groups = Batches(batch_size or GROUP, gpu=True, bytes_per_token=0, free=lambda: 0)
        self.start_recording(groups, groups)
        from transformers import GenerationConfig

        ids = GenerationConfig.from_pretrained(folder).eos_token_id
        self.stop_ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
        self._stop_texts = {self.tokenizer.decode([i]) for i in self.stop_ids}
        config = self.model.llm_engine.model_config
        self.about = {"backend": "vllm", "device": f"{gpus} x cuda", "dtype": str(config.dtype).removeprefix("torch.")}

    def set_rows(self, rows: int) -> None:
        pass

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
        for prompt, made in zip(requests, (o.outputs[0] for o in outputs), strict=True) if generate else ():
            by = "length"
            if made.finish_reason not in ("stop", "length"):  # "abort", "error": no reply of the model's
                raise RuntimeError(f"vLLM ended a reply with {made.finish_reason!r} ({made.stop_reason})")
            if made.finish_reason == "stop":  # stop_reason: None or the id of a terminator, or the stop string
                by = "stop string" if isinstance(made.stop_reason, str) else "terminator"
                by = "terminator" if made.stop_reason in self._stop_texts else by
            tokens = [i for i in made.token_ids if i not in self.stop_ids]
            # lm-eval gives vLLM no stop strings where there are thoughts: the answer is cut here, as with the other backend
            kept = self.ended(prompt, tokens, by, self.until if self.think_end_token else ())
            if len(kept) < len(tokens):
                made.text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return outputs

    def losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[tuple[float, int]]:
        made = self._model_generate([list(ids) for ids, _ in documents])
        for (ids, mask), output in zip(documents, made, strict=True):
            scored = [getattr(at[token], "logprob", at[token]) for token, at, on in
                      list(zip(ids, output.prompt_logprobs, mask))[1:] if on]  # noqa: B905  # fmt: skip
            yield -float(sum(scored)), len(scored)
