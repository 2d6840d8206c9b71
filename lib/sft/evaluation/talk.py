"""make chat: talks to a model in the terminal, with its own template, stop tokens, system prompt and sampling.

In:  a Hugging Face folder: the export of a run, one of its steps, or any folder, gs://, s3:// or hf://org/name (see `model_folder`).
Out: replies as they are generated. Standard input that is no terminal is read as one message per line.

The template, the tokens that end a reply and the sampling are the folder's own: chat_template.jinja and generation_config.json.
Words that begin with "/" are commands: /system TEXT, /sampling temperature=0.7, /tokens, /clear, /help, /quit. Ctrl-C ends a reply, Ctrl-D the conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sft.common.columns import say
from sft.common.errors import SftError
from sft.export.olmo_core_steps import to_hf
from sft.export.places import local_folder
from sft.formats import manifest
from sft.recipe.schema import Convert

if TYPE_CHECKING:
    import torch

Log = Callable[[str], None]
HELP = "/system TEXT  /sampling temperature=0.7 top_p=0.9 | greedy | own  /tokens  /clear  /quit"
SAMPLING: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 1e-3, 100), "top_p": (float, 1e-3, 1), "top_k": (int, 1, 1e9), "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-3, 100), "seed": (int, 0, 2**63 - 1),
}  # fmt: skip
"""What /sampling sets, with the smallest and the largest value: arguments of transformers' `generate`, and a seed."""
LONGEST = 4096
"""Tokens of a reply, where the context has room for more."""


def model_folder(run: Path, step: str, model: str, cache: Path, log: Log) -> Path:
    """The Hugging Face folder to talk to: `model` if it is given, else the step of the run, else the run's export. Raises SftError."""
    if model:
        if step:
            raise SftError(f"STEP={step} and MODEL={model}: two models; next: give one of them")
        found = local_folder(model, cache, log, "MODEL")
        return _exported(found, cache, log) if (found / "model_and_optim").is_dir() else _checked(found)
    if not run.is_dir():
        raise SftError(f"RUN={run.name}: no such run in {run.parent}; next: make runs lists them")
    if step:
        folder = run / "train" / f"step{step.removeprefix('step')}"
        if not (folder / manifest.NAME).is_file():
            saved = sorted(
                (p.parent.name for p in (run / "train").glob(f"step*/{manifest.NAME}")), key=lambda n: int(n[4:])
            )
            raise SftError(
                f"STEP={step}: {folder} is not a saved step; there are: {', '.join(saved) or 'none'}; next: one of them"
            )
        return _exported(folder, cache, log)
    folder = run / "convert" / "model"
    if not folder.is_dir():
        raise SftError(f"{folder}: not there; next: make convert for {run.name}, or STEP=n for a step of its training")
    return _checked(folder)


def _checked(folder: Path) -> Path:
    for name in ("config.json", "chat_template.jinja"):
        if not (folder / name).is_file():
            raise SftError(f"{folder / name}: missing; next: name the folder of a chat model")
    return folder


def _exported(step: Path, cache: Path, log: Log) -> Path:
    """The step as a Hugging Face folder in the cache, made once for its content."""
    target = cache / "chat" / f"{step.resolve().parent.parent.name}-{step.name}-{_digest(step)}"
    if not target.is_dir():
        log(f"converting {step}")
        options = Convert(gate="fast")
        to_hf(str(step), str(target), options, "", "tokenizer", cache, lambda _: None)
    return target


def _digest(step: Path) -> str:
    from sft.common.files import hash_file  # start-up: an export needs none

    file = step / manifest.NAME
    return hash_file(file)[:12] if file.is_file() else "unlisted"


@dataclass
class Talk:
    """A conversation with a loaded model. `messages` holds it so far; `show_tokens` prints ids instead of text.

    `sampling` holds arguments of `generate` that replace those of generation_config.json.
    """

    model: Any
    tokenizer: Any
    system: str = ""
    show_tokens: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """The longest input and reply in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or LONGEST)

    def prompt(self, text: str) -> torch.Tensor:
        """The ids of the conversation with the next message, as the template writes them. Raises SftError if it is too long."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, *self.messages, {"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if ids.shape[1] >= self.context:
            raise SftError(f"{ids.shape[1]:,} tokens, the model supports {self.context:,}; next: /clear")
        return ids  # type: ignore[no-any-return]

    def reply(self, text: str, out: IO[str]) -> str:
        """Generates the answer to a message and writes it to `out` as it comes. Ctrl-C ends it early. Returns its text."""
        ids = self.prompt(text).to(self.model.device)
        streamer = _Streamer(self.tokenizer, out, self.show_tokens)
        room = min(LONGEST, self.context - ids.shape[1])
        try:
            self.model.generate(
                ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer, max_new_tokens=room, **self.sampling
            )
        except KeyboardInterrupt:
            streamer.end()
        answer = str(self.tokenizer.decode(streamer.ids, skip_special_tokens=True))
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def command(self, line: str, out: IO[str]) -> bool:
        """Obeys a line that begins with "/". Returns whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/clear":
            self.messages.clear()
        elif name == "/tokens":
            self.show_tokens = not self.show_tokens
        elif name == "/system":
            self.system = rest.strip()
            self.messages.clear()
        elif name == "/sampling":
            self.set_sampling(rest)
        elif name != "/help":
            raise SftError(f"no command {name}; next: one of {HELP}")
        say(HELP if name == "/help" else self.settings(), out)
        return True

    def set_sampling(self, text: str) -> None:
        """Obeys `/sampling`: "temperature=0.7 top_p=0.9", "greedy", or "own" for what generation_config.json says. "" changes nothing.

        Raises SftError for another name or value.
        """
        if text in ("", "greedy", "own"):
            self.sampling = {"do_sample": False} if text == "greedy" else {} if text == "own" else self.sampling
            return
        found: dict[str, Any] = {"do_sample": True}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in SAMPLING:
                raise SftError(f"/sampling {word}: no such setting; next: one of {', '.join(SAMPLING)}, greedy or own")
            kind, least, most = SAMPLING[name]
            try:
                found[name] = kind(value)
            except ValueError:
                raise SftError(f"/sampling {word}: a number is expected; next: /sampling {name}=…") from None
            if not least <= found[name] <= most:
                raise SftError(f"/sampling {word}: {least:g} to {most:g} is possible; next: correct it")
        seed = found.pop("seed", None)
        self.sampling = found
        if seed is not None:
            import torch  # start-up: a wrong command line is reported at once

            torch.manual_seed(seed)

    def settings(self) -> str:
        """The system prompt and the sampling, for people."""
        own = self.model.generation_config.to_diff_dict()
        used = {**own, **self.sampling}
        names = [f"{n} {used[n]}" for n in SAMPLING if used.get(n) is not None] if used.get("do_sample") else ["greedy"]
        return f"system: {self.system or 'the template’s own'}; sampling: {', '.join(names) or 'temperature 1'}"


class _Streamer:
    """What `generate` calls with new ids: prints the text that they complete, or every token with its id."""

    def __init__(self, tokenizer: Any, out: IO[str], show_tokens: bool) -> None:
        self.tokenizer, self.out, self.show_tokens = tokenizer, out, show_tokens
        self.ids: list[int] = []
        self.printed = 0
        self.first = True

    def put(self, value: torch.Tensor) -> None:
        if self.first:  # the prompt
            self.first = False
            return
        self.ids += value.flatten().tolist()
        if self.show_tokens:
            for id in value.flatten().tolist():
                self.out.write(f"{id}:{self.tokenizer.convert_ids_to_tokens(id)!r} ")
        else:
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # part of a character
                self.out.write(text[self.printed :])
                self.printed = len(text)
        self.out.flush()

    def end(self) -> None:
        self.out.write("\n")
        self.out.flush()


def load(folder: Path, device: str, system: str = "") -> Talk:
    """The model on `device`, or on a GPU if there is one, in its own dtype; fp32 on a CPU."""
    import torch  # start-up: a wrong command line is reported at once
    import transformers  # start-up: the same

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind: Any = torch.float32 if where == "cpu" else "auto"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, trust_remote_code=False)
    return Talk(
        model.to(where).eval(), transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False), system
    )


def converse(talk: Talk, lines: Iterable[str], out: IO[str]) -> None:
    """Answers each line until they end or one says /quit."""
    for line in lines:
        text = line.strip()
        try:
            if text.startswith("/"):
                if not talk.command(text, out):
                    return
            elif text:
                talk.reply(text, out)
        except SftError as error:
            say(f"error: {error}", out)


def typed() -> Iterator[str]:
    """Lines of a terminal, with a prompt; of a pipe, without one."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - start-up: arrow keys and history in input()

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
