"""A loopback server with OpenAI's API for completions, which transformers computes: what vllm serve answers, in its form.

Prompts are lists of token ids. `echo` with `logprobs` returns the log-probabilities of the prompt. With `scores_prompts=False` there are none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


class Server:
    """A model behind the API. `requests` has the bodies that came."""

    def __init__(self, folder: Path, name: str, scores_prompts: bool, owner: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name, self.folder, self.scores_prompts, self.owner = name, folder, scores_prompts, owner
        self.requests: list[dict[str, Any]] = []
        self.url = ""

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "root": str(self.folder), "owned_by": self.owner}]}

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(body)
        choose = self.echo if body.get("echo") else self.reply
        return {"choices": [{"index": i, **choose(ids, body)} for i, ids in enumerate(body["prompt"])][::-1]}

    def echo(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        if not self.scores_prompts:
            return {"text": "", "finish_reason": "length", "logprobs": None}
        out = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)  # [tokens, vocabulary]
        best = out.max(-1)
        own = [None] + [out[i, token].item() for i, token in enumerate(ids[1:])] + [best.values[-1].item()]
        top: list[Any] = [None] + [
            {"a": row.item(), "b": value} for row, value in zip(best.values, own[1:], strict=True)
        ]
        return {"text": "", "finish_reason": "length", "logprobs": {"token_logprobs": own, "top_logprobs": top}}

    def reply(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        found = self.generated(ids, body)
        return found if body.get("return_token_ids") else {k: v for k, v in found.items() if k != "token_ids"}

    def generated(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        stops = [s for s in body.get("stop") or () if s != self.tokenizer.eos_token]
        out: list[int] = []
        ends = self.model.generation_config.eos_token_id
        for _ in range(body["max_tokens"]):
            token = int(self.model(torch.tensor([[*ids, *out]])).logits[0, -1].argmax())
            if token in (ends if isinstance(ends, list) else [ends]):
                return {
                    "text": self.tokenizer.decode(out),
                    "finish_reason": "stop",
                    "stop_reason": token,
                    "token_ids": [*out, token],
                }
            out.append(token)
            text = self.tokenizer.decode(out)
            if found := [s for s in stops if s in text]:
                return {
                    "text": text.partition(found[0])[0],
                    "finish_reason": "stop",
                    "stop_reason": found[0],
                    "token_ids": out,
                }
        return {"text": self.tokenizer.decode(out), "finish_reason": "length", "stop_reason": None, "token_ids": out}


@contextmanager
def serving(folder: Path, name: str = "tiny", scores_prompts: bool = True, owner: str = "vllm") -> Iterator[Server]:
    """The server while the block runs, at `url`."""
    server = Server(folder, name, scores_prompts, owner)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(server.models())

        def do_POST(self) -> None:
            self.answer(server.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def answer(self, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1/completions"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
