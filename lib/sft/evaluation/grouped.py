"""What vLLM and servers have in common: they form batches by themselves, and name the reason why a reply ended."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from sft.evaluation.batches import Batches
from sft.evaluation.recorder import Recorder


def stop_ids(config: GenerationConfig) -> list[int]:
    """The ids of the tokens that end a reply."""
    ids = config.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


class Grouped(Recorder):
    """A backend that gets groups of requests. The journal is written after each group."""

    def start_groups(self, rows: int, folder: Path) -> None:
        """`start_recording` with groups of `rows` requests, and what ends the replies of the model in `folder`."""
        groups = Batches(rows, gpu=True, bytes_per_token=0, free=lambda: 0)
        self.start_recording(groups, groups)
        self.stop_ids = stop_ids(GenerationConfig.from_pretrained(folder))
        self._stop_texts = {self.tokenizer.decode([i]) for i in self.stop_ids}

    def set_rows(self, rows: int) -> None:
        pass

    def ending(self, finish_reason: str | None, stop_reason: object) -> str:
        """How a reply ended. `stop_reason` is a stop string (which may be a terminator's text), a terminator's id, or None.

        Raises RuntimeError for a reply that was given up ("abort", "error"): it is not the model's.
        """
        if finish_reason == "length":
            return "length"
        if finish_reason != "stop":
            raise RuntimeError(f"{self.about.backend} ended a reply with {finish_reason!r} ({stop_reason})")
        is_string = isinstance(stop_reason, str) and stop_reason not in self._stop_texts
        return "stop string" if is_string else "terminator"
