"""TODO sft.evaluation.recorder"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from sft.common.errors import SftError
from sft.evaluation.batches import Batches
from sft.evaluation.files import SAY_EVERY
from sft.evaluation.scores import UNCLOSED, reply_key
from sft.training.metrics import clock


class Recorder(TemplateLM):
    """What both backends share. A subclass calls `start_recording`, and `ended` for every reply in the order it returns them."""

    about: dict[str, str]  # backend, device, dtype
    stop_ids: list[int]

    def start_recording(self, replies: Batches, likelihoods: Batches) -> None:
        self.batches = {"replies": replies, "likelihoods": likelihoods}
        self.journal: Path | None = None
        self.log: Callable[[str], None] = lambda _: None
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
                self.log(f"out of memory with {len(chosen)} at once: trying fewer")
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
                self.log(f"{answered:,}/{total:,} {what}, {len(chosen)} at once, ETA {clock(left)}")

    def losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[tuple[float, int]]:
        """(summed loss, labels) of each (ids, mask) document, in fp32; documents without a label give (0.0, 0)."""
        raise NotImplementedError


class _Hook:
    """Called by lm-eval once per reply, in the order in which `_model_generate` returned the rows."""

    def __init__(self, model: Recorder) -> None:
        self.model = model

    def add_partial(self, kind: str, request: Any, reply: Any) -> None:
        if kind == "generate_until":
            self.model._made.setdefault(request[0], []).append(self.model._ended.pop(0))


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
