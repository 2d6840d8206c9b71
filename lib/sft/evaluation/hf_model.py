"""lm-eval's transformers backend with records of its replies, on a GPU in the model's dtype or on a CPU in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from sft.evaluation.batches import CPU_ROWS, Batches, free_memory
from sft.evaluation.grouped import stop_ids
from sft.evaluation.recorder import Backend, Recorder


class HfModel(Recorder, HFLM):  # type: ignore[misc, unused-ignore]  # lm-eval has no types
    """A model that transformers runs."""

    def __init__(
        self, folder: Path, *, batch_size: int, max_length: int, think_end: str | None, device: str = ""
    ) -> None:
        """See sft.evaluation.backends.open_model."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpu = device.startswith("cuda")
        super().__init__(
            pretrained=str(folder),
            device=device,
            # bf16 is emulated on most CPUs: slower than fp32 and no closer to the GPU's result.
            dtype="auto" if gpu else "float32",
            batch_size=batch_size or 1,
            max_length=max_length or None,
            think_end_token=think_end,
            trust_remote_code=False,
        )
        config, free = self.model.config, (lambda: torch.cuda.mem_get_info(self.device)[0]) if gpu else free_memory
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # bytes per token: keys and values of a generated one; logits, their copy and fp32 log-probabilities of a scored one
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        scored = 12 * config.vocab_size
        self.start_recording(
            Batches(batch_size, gpu=gpu, bytes_per_token=cached, free=free, least=1 if gpu else CPU_ROWS),
            Batches(batch_size, gpu=gpu, bytes_per_token=scored, free=free),
        )
        self.stop_ids = stop_ids(self.model.generation_config)
        self.about = Backend("hf", str(self.device), str(self.model.dtype).removeprefix("torch."))

    def set_rows(self, rows: int) -> None:
        self.batch_size_per_gpu = rows

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        """Token ids [rows, prompt + reply] of a batch; what follows the end of a reply is padding."""
        # lm-eval's stopping criteria know no thoughts, and continue until every row of the batch holds the string.
        out = super()._model_generate(context, max_length, [] if self.think_end_token else stop, **kwargs)
        start = context.shape[1]
        for prompt, row, tokens in zip(context.tolist(), out, out[:, start:].tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
            reply = self.end_reply(prompt, tokens[:end], "length" if end is None else "terminator", stop)
            row[start + len(reply) :] = self.tokenizer.pad_token_id
        return out

    @torch.inference_mode()
    def target_losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[list[float]]:
        for ids, loss_mask in documents:
            x = torch.tensor([list(ids)], device=self.device)  # [1, tokens]
            is_target = torch.tensor(list(loss_mask), device=self.device)[1:]
            if not is_target.any():
                yield []
                continue
            logits = self.model(input_ids=x[:, :-1], use_cache=False).logits[0][is_target].float()
            yield torch.nn.functional.cross_entropy(logits, x[0, 1:][is_target], reduction="none").tolist()
