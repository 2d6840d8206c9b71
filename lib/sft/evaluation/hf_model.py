"""TODO sft.evaluation.hf_model"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from sft.evaluation.batches import Batches, free_memory
from sft.evaluation.recorder import Recorder


class Model(Recorder, HFLM):
    """transformers, on a GPU in the export's dtype or on the CPU in fp32."""

    def __init__(
        self, folder: Path, *, batch_size: int, max_length: int, think_end: str | None, device: str = ""
    ) -> None:
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
        c, free = self.model.config, (lambda: torch.cuda.mem_get_info(self.device)[0]) if gpu else free_memory
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        cached = 2 * c.num_hidden_layers * c.num_key_value_heads * head * self.model.dtype.itemsize
        scored = 12 * c.vocab_size  # logits, their copy and fp32 log-probabilities of every position
        self.start_recording(
            Batches(batch_size, gpu=gpu, bytes_per_token=cached, free=free),
            Batches(batch_size, gpu=gpu, bytes_per_token=scored, free=free),
        )
        ids = self.model.generation_config.eos_token_id
        self.stop_ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
        self.about = {
            "backend": "hf",
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def set_rows(self, rows: int) -> None:
        self.batch_size_per_gpu = rows

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        # lm-eval's criteria know no thoughts, and go on until every row of the batch has met the string.
        out = super()._model_generate(context, max_length, [] if self.think_end_token else stop, **kwargs)
        start = context.shape[1]
        for prompt, row, made in zip(context.tolist(), out, out[:, start:].tolist(), strict=True):
            end = next((i for i, token in enumerate(made) if token in self.stop_ids), None)
            by = "length" if end is None else "terminator"
            kept = self.ended(prompt, made[:end], by, stop)
            row[start + len(kept) :] = self.tokenizer.pad_token_id
        return out

    @torch.inference_mode()
    def losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[tuple[float, int]]:
        for ids, mask in documents:
            x = torch.tensor([list(ids)], device=self.device)
            targets = torch.tensor(list(mask), device=self.device)[1:]
            if not targets.any():
                yield 0.0, 0
                continue
            logits = self.model(input_ids=x[:, :-1], use_cache=False).logits[0][targets].float()
            loss = torch.nn.functional.cross_entropy(logits, x[0, 1:][targets], reduction="sum")
            yield loss.item(), int(targets.sum())
