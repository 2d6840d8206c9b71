"""Further processes that answer a part of the requests: one model for each GPU of the machine, or for a share of the cores.

In:  what opens the model, and jobs. Out: answers, as they come. The first model runs in the process that asks: it deals the requests
out, longest first and in turn, and gathers the answers in its journal.

A worker ends with the process that started it. An error in a worker ends the evaluation with the worker's trace.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, TypeVar

from sft.common.errors import SftError
from sft.evaluation.answers import Answers
from sft.formats.samples import Likelihood, Reply

T = TypeVar("T")
KeyedRequest = tuple[str, str, dict[str, Any]]
"""Key, prompt and generation arguments of a reply (see sft.evaluation.scores.request_key)."""
Document = tuple[Sequence[int], Sequence[bool]]


class Budget(NamedTuple):
    """Tokens of the longest thought and of the longest answer behind it. 0 and 0: one limit for both, which lm-eval sets."""

    thought: int = 0
    reply: int = 0


class Model(Protocol):
    """What a worker uses of sft.evaluation.recorder.Recorder."""

    answers: Answers
    think_end_token: str | None
    budget: Budget

    def seed_sampling(self, seed: int) -> None: ...
    def compute_replies(self, asked: Sequence[KeyedRequest], total: int) -> None: ...
    def compute_likelihoods(self, requests: Sequence[Any], total: int) -> Any: ...
    def target_losses(self, documents: Sequence[Document]) -> Iterator[list[float]]: ...


Job = Callable[[Model], list[list[float]]]
"""What a worker does with its model. Its answers are sent as they come, and what it returns is sent at the end."""


def replies(
    requests: Sequence[KeyedRequest], think_end: str | None, budget: Budget, seed: int, model: Model
) -> list[list[float]]:
    """Generates the replies to requests. All but the model make a job with functools.partial, here and below."""
    model.think_end_token, model.budget = think_end, budget
    model.seed_sampling(seed)
    model.compute_replies(requests, len(requests))
    return []


def likelihoods(requests: Sequence[Any], model: Model) -> list[list[float]]:
    """Scores lm-eval's requests ((context, continuation), context ids, continuation ids)."""
    model.compute_likelihoods(requests, len(requests))
    return []


def losses(documents: Sequence[Document], model: Model) -> list[list[float]]:
    """The losses of the targets of documents."""
    return list(model.target_losses(documents))


class Worker:
    """A process with a model of its own."""

    def __init__(self, number: int, open_model: Callable[[], Model], threads: int, gpus: str | None) -> None:
        """`gpus` is its CUDA_VISIBLE_DEVICES; None leaves that as it is."""
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, open_model, threads), daemon=True)
        with _visible(gpus):
            self.process.start()
        theirs.close()

    def send(self, job: Job) -> None:
        """Starts a job; its answers are received with `receive`."""
        self.connection.send(job)

    def receive(self, add: Callable[[Sequence[Reply | Likelihood]], None], *, wait: bool) -> list[list[float]] | None:
        """Hands over the answers that have come. Returns what the job returned once it is done, None before. Raises SftError."""
        while wait or self.connection.poll():
            try:
                kind, value = self.connection.recv()
            except EOFError:
                raise SftError(
                    f"worker {self.number} of the evaluation ended; next: look for its error above, and run it again"
                ) from None
            if kind == "failed":
                raise SftError(f"worker {self.number} of the evaluation: {value}")
            if kind == "done":
                return list(value)
            add(value)
        return None

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()


def deal(items: Sequence[T], parts: int, length: Callable[[T], int]) -> list[list[T]]:
    """The items in `parts` lists of about the same work: longest first, in turn."""
    if parts == 1:
        return [list(items)]
    ordered = sorted(items, key=lambda item: -length(item))
    return [ordered[i::parts] for i in range(parts)]


def _serve(connection: Connection, open_model: Callable[[], Model], threads: int) -> None:
    """The life of a worker: jobs until the other end is closed."""
    try:
        if threads:
            import torch  # start-up: torch takes two seconds

            torch.set_num_threads(threads)
        model = open_model()
        while True:
            job = connection.recv()
            model.answers = _Sent(connection)
            connection.send(("done", job(model)))
    except EOFError:
        return
    except Exception as error:
        text = str(error) if isinstance(error, SftError) else traceback.format_exc()
        connection.send(("failed", text))


class _Sent(Answers):
    """Answers that go to the process that asked."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def add(self, answers: Sequence[Reply | Likelihood]) -> None:
        self.connection.send(("answers", list(answers)))


@contextmanager
def _visible(gpus: str | None) -> Iterator[None]:
    """Sets CUDA_VISIBLE_DEVICES for a process that is started inside."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        yield
    finally:
        if gpus is not None:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
