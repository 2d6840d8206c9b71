"""lm-eval in-process, with what it leaves out: how each reply ended, answers that survive a kill, batches by memory, progress.

In:  a Hugging Face folder, a task (see tasks.py). Out: `run_task` gives lm-eval's own metrics and
samples; the model's `replies` hold the facts about every reply. Imported late: lm-eval takes seconds to import.
"""

from __future__ import annotations

import json
import logging
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers.utils.logging import disable_progress_bar

from sft.errors import SftError
from sft.evaluation.batches import Batches, free_memory
from sft.evaluation.evaluate import SAY_EVERY
from sft.evaluation.scores import UNCLOSED, reply_key
from sft.training.metrics import clock

logging.getLogger("lm_eval").setLevel(logging.ERROR)
disable_progress_bar()


class Recorder(TemplateLM):
    """What both backends share. A subclass calls `start_recording`, and `ended` for every reply in the order it returns them."""

    about: dict[str, str]  # backend, device, dtype
    stop_ids: list[int]

    def start_recording(self, replies: Batches, likelihoods: Batches) -> None:
        self.batches = {"replies": replies, "likelihoods": likelihoods}
        self.journal: Path | None = None
        self.say: Callable[[str], None] = lambda _: None
        self.replies: dict[str, list[dict[str, Any]]] = {}  # a key's replies in the order in which they were asked
        self.asked: list[tuple[str, str]] = []
        self.cache_hook = _Hook(self)
        self._ended: list[dict[str, Any]] = []
        self._made: dict[str, list[dict[str, Any]]] = {}

    def open_journal(self, file: Path) -> int:
        """Answers of an earlier attempt at the same task, which need not be made again; returns their number."""
        self.journal, self.replies, self.asked = file, {}, []
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self.replies.setdefault(entry["key"], []).append(entry)
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # the last line of a killed attempt may be torn
        return sum(map(len, self.replies.values()))

    def keep(self, entries: Sequence[dict[str, Any]]) -> None:
        for entry in entries:
            self.replies.setdefault(entry["key"], []).append(entry)
        if self.journal:
            with self.journal.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)

    def set_rows(self, rows: int) -> None:
        """Rows that lm-eval's code puts into one batch."""
        raise NotImplementedError

    def ended(self, prompt: Sequence[int], tokens: Sequence[int], by: str, stop: Sequence[str]) -> list[int]:
        """Records a reply, given without its terminator; returns what is left of it up to and with the token that
        completes a stop string. Inside a thought nothing stops it, and one that is never closed has no answer."""
        kept, think_end = list(tokens), self.think_end_token

        def text(end: int) -> str:
            return str(self.tokenizer.decode(kept[:end], skip_special_tokens=False))

        whole, closed = text(len(kept)), bool(think_end)
        if think_end and think_end not in whole:
            closed, think = False, think_end.replace("/", "")
            asked = self.tokenizer.decode(prompt[-32:], skip_special_tokens=False)
            if whole.lstrip().startswith(think) or asked.rstrip().endswith(think):
                by, stop = UNCLOSED, ()

        def stopped(end: int) -> bool:
            answer = text(end).partition(think_end)[2] if closed else text(end)
            return any(s in answer for s in stop)

        if stopped(len(kept)):
            kept, by = kept[: bisect_left(range(len(kept)), True, key=stopped)], "stop string"
        self._ended.append({"ended_by": by, "tokens": len(kept), "repeats": repeats(kept)})
        return kept

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keys = [reply_key(r.args) for r in requests]
        self.asked = list(zip(keys, (r.args[0] for r in requests), strict=True))
        # The same prompt several times is sampling: a key's n-th request has its n-th reply.
        seen: Counter[str] = Counter()
        number = []
        for key in keys:
            number.append(seen[key])
            seen[key] += 1
        missing = [i for i, key in enumerate(keys) if number[i] >= len(self.replies.get(key, ()))]
        lengths = []
        for i in missing:
            prompt, kwargs = requests[i].args
            reply = int(kwargs.get("max_gen_toks", self.max_gen_toks))
            length = len(self.tok_encode(prompt))
            if length > self.max_length - reply:
                raise SftError(
                    f"a prompt of {length} tokens leaves no room for its reply within max_length {self.max_length};"
                    " next: raise [evaluate] max_length or [convert] max_position_embeddings"
                )
            lengths.append(length + reply)

        def run(chosen: list[int]) -> None:
            self._ended, self._made = [], {}
            batch = [requests[missing[j]] for j in chosen]
            until = batch[0].args[1].get("until") or []
            self.until = [until] if isinstance(until, str) else list(until)
            made = super(Recorder, self).generate_until(batch, disable_tqdm=True)
            entries = []
            for j, request, text in zip(chosen, batch, made, strict=True):
                facts = self._made[request.args[0]].pop(0)
                text = "" if facts["ended_by"] == UNCLOSED else text
                entries.append({"key": keys[missing[j]], "text": text, **facts})
            self.keep(entries)

        self._in_batches(lengths, run, "replies", len(requests))
        return [self.replies[key][n]["text"] for key, n in zip(keys, number, strict=True)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Any]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        """lm-eval's step under all likelihood requests: ((context, continuation) or None, context ids, continuation ids)."""
        keys = [reply_key(words) if words else "" for words, _, _ in requests]
        if words := [(key, r[0][0]) for key, r in zip(keys, requests, strict=True) if key]:
            self.asked = words
        found: dict[int, Any] = {
            i: tuple(self.replies[key][0]["likelihood"]) for i, key in enumerate(keys) if key in self.replies
        }
        missing = [i for i in range(len(requests)) if i not in found]
        lengths = [len(requests[i][1]) + len(requests[i][2]) for i in missing]
        if lengths and max(lengths) > self.max_length + 1:
            raise SftError(
                f"a prompt with its continuation of {max(lengths)} tokens does not fit max_length {self.max_length};"
                " next: raise [evaluate] max_length or [convert] max_position_embeddings"
            )

        def run(chosen: list[int]) -> None:
            batch = [requests[missing[j]] for j in chosen]
            made = super(Recorder, self)._loglikelihood_tokens(batch, disable_tqdm=True)
            found.update((missing[j], answer) for j, answer in zip(chosen, made, strict=True))
            self.keep(
                [{"key": keys[missing[j]], "likelihood": list(found[missing[j]])} for j in chosen if keys[missing[j]]]
            )

        self._in_batches(lengths, run, "likelihoods", len(requests))
        return [found[i] for i in range(len(requests))]

    def _in_batches(self, lengths: Sequence[int], run: Callable[[list[int]], None], what: str, total: int) -> None:
        """Calls `run` with the indices of each batch, longest first; says how far it is and when it will end."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        batches = self.batches[what]
        began = said = time.monotonic()
        work, done, at = sum(lengths), 0, 0
        while at < len(order):
            chosen = order[at : at + batches.rows(lengths[order[at]])]
            self.set_rows(len(chosen))
            started = time.monotonic()
            try:
                run(chosen)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not batches.too_large(len(chosen)):
                    raise
                self.say(f"out of memory with {len(chosen)} at once: trying fewer")
                free_cache()
                continue
            now = time.monotonic()
            batches.done(len(chosen), len(chosen) * lengths[chosen[0]], now - started)
            at += len(chosen)
            done += sum(lengths[i] for i in chosen)
            if now - said >= SAY_EVERY and at < len(order):
                said = now
                left = (now - began) / done * (work - done)
                answered = total - len(order) + at
                self.say(f"{answered:,}/{total:,} {what}, {len(chosen)} at once, ETA {clock(left)}")

    def losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[tuple[float, int]]:
        """(summed loss, labels) of each (ids, mask) document, in fp32; documents without a label give (0.0, 0)."""
        raise NotImplementedError


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


class _Hook:
    """Called by lm-eval once per reply, in the order in which `_model_generate` returned the rows."""

    def __init__(self, model: Recorder) -> None:
        self.model = model

    def add_partial(self, kind: str, request: Any, reply: Any) -> None:
        if kind == "generate_until":
            self.model._made.setdefault(request[0], []).append(self.model._ended.pop(0))


def open_model(folder: Path, backend: str, **options: Any) -> Recorder:
    """The export behind a backend: 'hf' or 'vllm'. Raises SftError when vllm is not installed."""
    if backend == "hf":
        options.pop("gpus", None)
        options.pop("seed", None)
        return Model(folder, **options)
    try:
        from sft.evaluation.vllm_model import VllmModel
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise SftError(
            "[evaluate] backend = 'vllm': the package vllm is not installed; next, on a machine with a GPU:"
            " .venv/bin/python -m pip install -e '.[vllm]', or backend = \"hf\""
        ) from None
    return VllmModel(folder, **options)


def is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def free_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def repeats(tokens: Sequence[int]) -> bool:
    """A reply that goes round in circles: fewer than half of its 4-grams are different ones."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(grams) >= 16 and len(set(grams)) < len(grams) / 2


def run_task(
    model: Model, task: Task, *, limit: int, seed: int, system_prompt: str, bootstrap: int = 1000
) -> dict[str, Any]:
    """lm-eval's results of one task: {"results", "samples", "config", "higher_is_better"}."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    name = task.config.task
    found: Any = evaluate(
        lm=model,
        task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=limit or None,
        bootstrap_iters=bootstrap,
        log_samples=True,
        system_instruction=system_prompt or None,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return {
        "results": found["results"][name],
        "samples": found["samples"][name],
        "config": task.dump_config(),
        "higher_is_better": found["higher_is_better"].get(name, {}),
    }
