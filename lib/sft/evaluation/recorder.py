"""The part of a model that does not depend on the backend: it records how replies ended, keeps answers and reports progress.

lm-eval calls `generate_until` and `loglikelihood`, once for a task. A request that a journal answers is not computed again.
The others are computed in batches, longest first, and every batch is written to the journal.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers.utils import chat_template_utils

from sft.common.errors import SftError
from sft.evaluation import batches as batch_sizes
from sft.evaluation import stops, workers
from sft.evaluation.answers import Answers
from sft.evaluation.batches import Batches
from sft.evaluation.scores import UNCLOSED, request_key
from sft.evaluation.workers import Budget, Job, KeyedRequest, Worker, deal
from sft.formats.samples import Likelihood, Reply
from sft.runner.processes import Choice
from sft.training.metrics import clock

T = TypeVar("T")
NEXT = "next: raise [evaluate] max_length or [convert] max_position_embeddings"


class Backend(NamedTuple):
    """What runs the model, as results.json names it."""

    backend: str
    device: str
    dtype: str


class Ending(NamedTuple):
    """How a reply ended, its tokens without the terminator, whether it repeats itself, and its thought."""

    ended_by: str
    tokens: int
    repeats: bool
    thought: str | None


class Recorder(TemplateLM):  # type: ignore[misc, unused-ignore]  # lm-eval has no types
    """Base of the backends. A subclass calls `start_recording`, and `end_reply` for every reply, in the order of its rows."""

    about: Backend
    stop_ids: list[int]

    def start_recording(self, replies: Batches, likelihoods: Batches) -> None:
        """Sets up the state. `replies` and `likelihoods` decide the size of the batches of each kind."""
        self.batches = {"replies": replies, "likelihoods": likelihoods}
        self.answers = Answers()
        self.log: Callable[[str], None] = lambda _: None
        self.requested: list[tuple[str, str]] = []  # (key, prompt) of the current task's requests
        self.until: list[str] = []  # stop strings of the current batch
        self.cache_hook = _ReplyHook(self)
        self.date = (
            ""  # the day (YYYY-MM-DD) that the template writes where it asks for today's; without one it is refused
        )
        self.template_values: dict[str, Any] = {}  # variables of the chat template
        self.budget = Budget()
        self.draw, self.draws = 0, 1  # which of how many replies to each question lm-eval asks for now
        self.choice = Choice(self.__class__.__name__, "")  # why it is this backend
        self.workers: list[Worker] = []  # further processes, which answer a part of the requests
        self.sampling_seed = 0
        self._busy: list[Worker] = []
        self._endings: list[Ending] = []  # of the rows of the current batch, in the order of the backend
        self._ending_of: dict[str, list[Ending]] = {}  # the same by prompt

    def open_journal(self, file: Path, ahead: Answers | None = None) -> int:
        """Starts a task. Returns the number of answers that an earlier attempt left in the journal. `ahead`: those of its group."""
        self.answers, self.requested = Answers(file, ahead), []
        return self.answers.reused

    def set_rows(self, rows: int) -> None:
        """Sets the number of rows that lm-eval's code puts into one batch."""
        raise NotImplementedError

    def target_losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[list[float]]:
        """The loss of every target of each (ids, loss mask), in fp32 and in order. The first token of a document is no target."""
        raise NotImplementedError

    def losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[tuple[float, int]]:
        """(sum of the losses, number of targets) of each (ids, loss mask). (0.0, 0) without a target."""
        return ((math.fsum(losses), len(losses)) for losses in self.shared_losses(documents))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """lm-eval's call for a prompt. Raises ValueError for a conversation that the template refuses.

        lm-eval's own method would leave out the system message then, without a word.
        """
        try:
            with _on_day(self.date):
                return str(
                    self.tokenizer.apply_chat_template(
                        chat_history,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                        **self.template_values,
                    )
                )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in chat_history)
            raise ValueError(f"the chat template refuses a conversation of {roles}: {error}") from None

    # --- replies ------------------------------------------------------------------------------------------------------

    def end_reply(
        self, prompt: Sequence[int], tokens: Sequence[int], ended_by: str, until: Sequence[str]
    ) -> Sequence[int]:
        """Records how a reply ended and returns its tokens, cut behind the one that completes a stop string.

        `tokens` come without the terminator; `ended_by` says how the backend ended them. Stop strings inside a thought do not
        count, and a thought that is never closed, or is longer than its budget, has no answer.
        """
        think_end, thought, thought_tokens = self.think_end_token, None, 0
        if think_end and think_end in (text := self._decode(tokens)):
            thought = text.partition(think_end)[0]
            thought_tokens = len(stops.cut_at_stop(tokens, self._decode, [think_end]) or ())
            if self.budget.thought and thought_tokens > self.budget.thought:
                tokens, ended_by, until = tokens[: self.budget.thought], UNCLOSED, ()
        elif think_end:
            if stops.thinks(self._decode(prompt[-32:]), text, think_end):
                thought, ended_by, until = text, UNCLOSED, ()
            think_end = None
        most = thought_tokens + self.budget.reply
        if self.budget.thought and ended_by != UNCLOSED and len(tokens) > most:
            tokens, ended_by = tokens[:most], "length"
        cut = stops.cut_at_stop(tokens, self._decode, until, think_end)
        if cut is not None:
            tokens, ended_by = cut, "stop string"
        self._endings.append(Ending(ended_by, len(tokens), stops.repeats(tokens), thought))
        return tokens

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's call for all generated replies of a task: their texts, in the order of the requests.

        A prompt that is requested several times is sampled: the n-th request of a key has the key's n-th reply. With several
        draws the first one computes the replies of all: request n has the replies from n x draws on.
        """
        wanted = [r for r in requests for _ in range(self.draws)]
        keys = [request_key(r.args) for r in wanted]
        self.requested = [(key, r.args[0]) for key, r in zip(keys, wanted, strict=True)]
        numbers = _numbered(keys)
        missing = [
            i
            for i, (key, n) in enumerate(zip(keys, numbers, strict=True))
            if n >= len(self.answers.replies.get(key, ()))
        ]
        asked = [(keys[i], *wanted[i].args) for i in missing]
        for request in asked if self.workers else ():
            self._length(request)  # a prompt that does not fit is found before anything is computed
        parts = self._started(
            asked,
            lambda request: len(request[1]),
            lambda part, number: partial(
                workers.replies, part, self.think_end_token, self.budget, self.sampling_seed + number
            ),
        )
        self.compute_replies(parts, len(wanted))
        self._finish_workers()
        texts = [self.answers.replies[key][n].text for key, n in zip(keys, numbers, strict=True)]
        return texts[self.draw :: self.draws]

    def compute_replies(self, asked: Sequence[KeyedRequest], total: int) -> None:
        """Computes and stores the replies to requests. `total` counts those of earlier attempts and of other processes, too."""
        self._in_batches(
            [self._length(request) for request in asked],
            lambda chosen: self._generate([asked[i] for i in chosen]),
            "replies",
            total,
        )

    def seed_sampling(self, seed: int) -> None:
        """Seeds what samples the next replies."""
        torch.manual_seed(seed)

    def _length(self, request: KeyedRequest) -> int:
        """Tokens of a prompt and its longest reply. Raises SftError for a prompt that leaves no room for the reply."""
        _, prompt, arguments = request
        reply = int(arguments.get("max_gen_toks") or self.max_gen_toks)
        length = len(self.tok_encode(prompt))
        if length > self.max_length - reply:
            raise SftError(
                f"a prompt of {length} tokens leaves no room for its reply within max_length {self.max_length}; {NEXT}"
            )
        return length + reply

    def _generate(self, batch: Sequence[KeyedRequest]) -> None:
        """Computes and stores the replies to one batch."""
        self._endings, self._ending_of = [], {}
        requests = [
            Instance("generate_until", {}, (prompt, arguments), i) for i, (_, prompt, arguments) in enumerate(batch)
        ]
        until = batch[0][2].get("until") or []
        self.until = [until] if isinstance(until, str) else list(until)
        texts = super().generate_until(requests, disable_tqdm=True)
        replies = []
        for (key, prompt, _), text in zip(batch, texts, strict=True):
            ending = self._ending_of[prompt].pop(0)
            replies.append(Reply(key, "" if ending.ended_by == UNCLOSED else text, *ending))
        self.answers.add(replies)

    def reply_returned(self, prompt: str) -> None:
        """lm-eval has assigned the next row of the current batch to a prompt."""
        self._ending_of.setdefault(prompt, []).append(self._endings.pop(0))

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Any]:
        """lm-eval's call for the likelihoods of all continuations of a task."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        """lm-eval's step below all requests for likelihoods.

        A request is ((context, continuation) or None, context ids, continuation ids); its answer is (log-likelihood, whether
        the continuation is the greedy one). A request without texts has no key and is not stored.
        """
        keys = [request_key(texts) if texts else "" for texts, _, _ in requests]
        if named := [(key, r[0][0]) for key, r in zip(keys, requests, strict=True) if key]:
            self.requested = named
        stored = self.answers.likelihoods
        found: dict[int, tuple[float, bool]] = {i: stored[k][0].likelihood for i, k in enumerate(keys) if k in stored}
        missing = [i for i in range(len(requests)) if i not in found]
        if self.workers and all(keys[i] for i in missing):  # an answer without a key has nothing that identifies it
            mine = self._started(
                [requests[i] for i in missing],
                lambda r: len(r[1]) + len(r[2]),
                lambda part, _: partial(workers.likelihoods, part),
            )
            self.compute_likelihoods(mine, len(requests))
            self._finish_workers()
            found.update((i, stored[keys[i]][0].likelihood) for i in missing)
        else:
            found.update(
                zip(missing, self.compute_likelihoods([requests[i] for i in missing], len(requests)), strict=True)
            )
        return [found[i] for i in range(len(requests))]

    def compute_likelihoods(self, requests: Sequence[Any], total: int) -> list[tuple[float, bool]]:
        """Computes and stores likelihoods, and returns them in order. `total` as in `compute_replies`."""
        found: dict[int, tuple[float, bool]] = {}
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        if lengths and max(lengths) > self.max_length + 1:
            raise SftError(
                f"a prompt with its continuation of {max(lengths)} tokens does not fit max_length {self.max_length}; {NEXT}"
            )

        def score(chosen: list[int]) -> None:
            answers = super(Recorder, self)._loglikelihood_tokens([requests[i] for i in chosen], disable_tqdm=True)
            found.update(zip(chosen, map(tuple, answers), strict=True))
            self.answers.add([Likelihood(request_key(requests[i][0]), found[i]) for i in chosen if requests[i][0]])

        self._in_batches(lengths, score, "likelihoods", total)
        return [found[i] for i in range(len(requests))]

    # --- further processes --------------------------------------------------------------------------------------------

    def _started(self, items: Sequence[T], length: Callable[[T], int], job: Callable[[list[T], int], Job]) -> list[T]:
        """Deals out items among the workers, which start with theirs, and returns those of this process."""
        mine, *theirs = deal(items, 1 + len(self.workers), length)
        for number, (worker, part) in enumerate(zip(self.workers, theirs, strict=True), 1):
            worker.send(job(part, number))
        self._busy = list(self.workers)
        return mine

    def _collect(self) -> None:
        """Stores the answers that workers have sent so far."""
        self._busy = [worker for worker in self._busy if worker.receive(self.answers.add, wait=False) is None]

    def _finish_workers(self) -> None:
        """Waits for the workers, and stores their answers."""
        for worker in self._busy:
            worker.receive(self.answers.add, wait=True)
        self._busy = []

    def shared_losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[list[float]]:
        """`target_losses`, computed by all processes."""
        if not self.workers:
            yield from self.target_losses(documents)
            return
        count = 1 + len(self.workers)
        for number, worker in enumerate(self.workers, 1):
            worker.send(partial(workers.losses, documents[number::count]))
        parts = [list(self.target_losses(documents[::count]))]
        parts += [worker.receive(self.answers.add, wait=True) or [] for worker in self.workers]
        yield from (parts[i % count][i // count] for i in range(len(documents)))

    # --- batches ------------------------------------------------------------------------------------------------------

    def _in_batches(self, lengths: Sequence[int], compute: Callable[[list[int]], None], kind: str, total: int) -> None:
        """Calls `compute` with the indices into `lengths` of each batch, longest first, and logs progress.

        A batch that does not fit into memory is tried again in smaller ones. `total` counts the answers of earlier attempts, too.
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        sizes = self.batches[kind]
        progress = _Progress(self.log, kind, total, sum(lengths))
        at = 0
        while at < len(order):
            chosen = order[at : at + sizes.rows(lengths[order[at]])]
            self.set_rows(len(chosen))
            started = time.monotonic()
            try:
                compute(chosen)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not sizes.too_large(len(chosen)):
                    raise
                self.log(f"out of memory with {len(chosen)} at once: trying fewer")
                free_cache()
                continue
            sizes.done(len(chosen), len(chosen) * lengths[chosen[0]], time.monotonic() - started)
            at += len(chosen)
            self._collect()
            progress.add(sum(lengths[i] for i in chosen), len(order) - at, len(chosen))


@contextlib.contextmanager
def _on_day(date: str) -> Iterator[None]:
    """Makes transformers render chat templates as of a day; without a day, a template that asks for it is refused."""

    class Clock:
        @staticmethod
        def now() -> datetime.datetime:
            if not date:
                raise jinja2.TemplateError(
                    "it writes today's date, so scores would depend on the day; next: set [prepare] date"
                )
            return datetime.datetime.fromisoformat(date)

    module: Any = chat_template_utils
    real, module.datetime = module.datetime, Clock
    try:
        yield
    finally:
        module.datetime = real


class _Progress:
    """Logs from time to time how many requests are answered and when the rest will be."""

    def __init__(self, log: Callable[[str], None], kind: str, total: int, tokens: int) -> None:
        self.log, self.kind, self.total, self.tokens = log, kind, total, tokens
        self.began = self.logged = time.monotonic()
        self.done = 0

    def add(self, tokens: int, left: int, rows: int) -> None:
        """Reports a batch of `rows` requests and `tokens` tokens. `left` = requests that are not answered yet."""
        now = time.monotonic()
        self.done += tokens
        if now - self.logged >= batch_sizes.LOG_EVERY_S and left:
            self.logged = now
            seconds = (now - self.began) / self.done * (self.tokens - self.done)
            self.log(f"{self.total - left:,}/{self.total:,} {self.kind}, {rows} at once, ETA {clock(seconds)}")


class _ReplyHook:
    """lm-eval calls it once per reply, in the order in which `_model_generate` returned the rows."""

    def __init__(self, model: Recorder) -> None:
        self.model = model

    def add_partial(self, kind: str, request: Any, reply: Any) -> None:
        if kind == "generate_until":
            self.model.reply_returned(request[0])


def _numbered(keys: Sequence[str]) -> list[int]:
    """How many times each key occurred before: ["a", "b", "a"] gives [0, 0, 1]."""
    seen: Counter[str] = Counter()
    numbers = []
    for key in keys:
        numbers.append(seen[key])
        seen[key] += 1
    return numbers


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory is short, on a GPU or on a CPU."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def free_cache() -> None:
    """Returns cached GPU memory to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
