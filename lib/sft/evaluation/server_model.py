"""lm-eval's client of servers with OpenAI's API (vllm serve, SGLang, …), with records of their replies.

The server gets the token ids of prompts that this process writes with the export's chat template, so that they are those of the other
backends. It must serve the run's export: by its folder's path, or by the name that the recipe gives. Likelihoods need a server that
returns the log-probabilities of a prompt (`echo` with `logprobs`); one that does not is refused for tasks and losses that need them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import requests
from lm_eval.models import api_models
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm
from transformers import AutoConfig

from sft.common.errors import SftError
from sft.evaluation.grouped import Grouped
from sft.evaluation.recorder import Backend

api_models.tqdm = functools.partial(tqdm, disable=True)  # its bars would be drawn over our own lines
ENDPOINT = "/completions"
GROUP = 32
"""Prompts of a request: the server computes them together."""
PROBE_S = 60


class ServerModel(Grouped, LocalCompletionsAPI):  # type: ignore[misc, unused-ignore]  # lm-eval has no types
    """A model that a server runs."""

    def __init__(
        self,
        folder: Path,
        base_url: str,
        served_model: str,
        *,
        batch_size: int,
        max_length: int,
        think_end: str | None,
        seed: int,
    ) -> None:
        """See sft.evaluation.backends.open_model. Raises SftError for a server that is out of reach or has another model."""
        name, self._is_vllm = find_served(folder, base_url, served_model)
        longest = max_length or AutoConfig.from_pretrained(folder, trust_remote_code=False).max_position_embeddings
        super().__init__(
            model=name,
            tokenizer=str(folder),
            base_url=base_url,
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            batch_size=batch_size or GROUP,
            max_length=longest + 1,  # lm-eval keeps a token for itself
            max_gen_toks=1024,
            seed=seed,
        )
        self.think_end_token = think_end
        self.start_groups(batch_size or GROUP, folder)
        self._scores_prompts: bool | None = None
        self.about = Backend("server", base_url, f"that of the server's model {name}")

    @property
    def max_gen_toks(self) -> int:
        return int(self._max_gen_toks)

    # --- replies ------------------------------------------------------------------------------------------------------

    def _create_payload(self, messages: Any, generate: bool = False, gen_kwargs: Any = None, **kwargs: Any) -> Any:
        """Where there are thoughts, no stop strings are sent: the answer is cut here, as with the other backends."""
        if generate and self.think_end_token:
            gen_kwargs = {**gen_kwargs, "until": []}
        payload = super()._create_payload(messages, generate=generate, gen_kwargs=gen_kwargs, **kwargs)
        return {**payload, "return_token_ids": True} if generate and self._is_vllm else payload

    def parse_generations(self, outputs: Any, contexts: Sequence[str] = (), **_: Any) -> list[str]:
        """The texts of the replies, with a record of how each ended. Raises RuntimeError for a reply that the server gave up."""
        responses = outputs if isinstance(outputs, list) else [outputs]
        choices = [c for response in responses for c in sorted(response["choices"], key=itemgetter("index"))]
        texts = []
        for prompt, choice in zip(contexts, choices, strict=True):
            tokens = choice.get("token_ids") or self.tok_encode(
                choice["text"]
            )  # bytes of no character have other tokens
            tokens = [i for i in tokens if i not in self.stop_ids]
            ids = self.tok_encode(prompt[-256:])
            reason = choice.get("stop_reason", choice.get("matched_stop"))  # of vLLM, of SGLang; others name none
            reply_ids = self.end_reply(ids, tokens, self.ending(choice["finish_reason"], reason), self.until)
            text = self.tokenizer.decode(reply_ids, skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, self.until, self.think_end_token))
        return texts

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def compute_likelihoods(self, requests: Sequence[Any], total: int) -> list[tuple[float, bool]]:
        if requests:
            self._require_prompt_scores("a task compares the likelihoods of given texts")
        return super().compute_likelihoods(requests, total)

    def target_losses(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[list[float]]:
        self._require_prompt_scores("the losses of held-out conversations and of plain text")
        for start in range(0, len(documents), GROUP):
            batch = documents[start : start + GROUP]
            answer = self.model_call(messages=[list(ids) for ids, _ in batch], generate=False)
            choices = sorted(answer["choices"], key=itemgetter("index"))
            for (ids, loss_mask), choice in zip(batch, choices, strict=True):
                found = choice["logprobs"]["token_logprobs"][: len(ids)]
                pairs = list(zip(found, loss_mask, strict=True))
                yield [-value for value, is_target in pairs[1:] if is_target]

    def _require_prompt_scores(self, what: str) -> None:
        """Raises SftError for a server that does not return the log-probabilities of a prompt."""
        if self._scores_prompts is None:
            ids = self.tok_encode("The capital of France")
            payload = self._create_payload([ids], generate=False, seed=self._seed)
            answer = requests.post(self.base_url, json=payload, headers=self.header, timeout=PROBE_S)
            found = _prompt_scores(answer.json()) if answer.ok else []
            self._scores_prompts = len(found) >= len(ids) and all(isinstance(x, float) for x in found[1 : len(ids)])
        if not self._scores_prompts:
            raise SftError(
                f"[evaluate] base_url = {self.base_url!r}: the server returns no log-probabilities of a prompt (echo with logprobs), which"
                f' {what} need{"" if what.startswith("the") else "s"}; next: serve the model with vllm serve, or backend = "hf"'
            )


def _prompt_scores(answer: Any) -> list[Any]:
    try:
        return list(answer["choices"][0]["logprobs"]["token_logprobs"])
    except (KeyError, IndexError, TypeError):
        return []


class Served(NamedTuple):
    """The name of a model on the server, and whether the server is vLLM, which returns the tokens of replies."""

    name: str
    is_vllm: bool


def find_served(folder: Path, base_url: str, served_model: str) -> Served:
    """The model of a folder on the server. Raises SftError for a server that is out of reach or has another model."""
    address = base_url.removesuffix(ENDPOINT) + "/models"
    try:
        answer = requests.get(address, timeout=PROBE_S)
        answer.raise_for_status()
        models = answer.json()["data"]
        names = [str(model["id"]) for model in models]
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise SftError(
            f"[evaluate] base_url = {base_url!r}: no list of models at {address}: {error}; next: start the server (vllm serve"
            f" {folder}), or correct base_url"
        ) from None
    if served_model:
        found = [m for m in models if m["id"] == served_model]
    else:
        found = [m for m in models if any(_is_folder(folder, m.get(key)) for key in ("id", "root"))]
    if not found:
        wanted = f"served_model = {served_model!r}" if served_model else str(folder)
        raise SftError(
            f"[evaluate] base_url = {base_url!r}: the server has {', '.join(names) or 'no model'}, not {wanted}; next: vllm serve {folder},"
            " or served_model = its name"
        )
    return Served(str(found[0]["id"]), found[0].get("owned_by") == "vllm")


def _is_folder(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and name.startswith("/") and Path(name).resolve() == folder.resolve()
