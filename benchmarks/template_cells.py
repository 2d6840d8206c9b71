"""Chat templates times kinds of conversations, against transformers' rendering: what is trained in each cell, and whether that is right.

In: the text of a template. Out: `cells`: for each of `KINDS` a verdict and its reason. The oracle renders with transformers' own Jinja
environment. For each trained turn the prompt is the rendering of the messages before it with the generation prompt. The words of the
conversations are unique, so a word says whose it is.

    right      the document begins with the prompt, every word of trained messages is trained, no other word is, and the turn ends with
               a special token
    scaffold   the same, but the document lacks something that only the generation prompt writes
    wrong      anything else
    refused    the row or the template is refused, and transformers' rendering cannot be masked either
    usable     it is refused, and could be masked
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers.utils.chat_template_utils as oracle

from sft.chat.rows import RowReader
from sft.chat.template import TemplateOptions, load_template
from sft.common.errors import SftError
from sft.data.normalization import Normalizer
from sft.data.render import Renderer
from sft.recipe.schema import Prepare, Source

Message = dict[str, Any]
Row = dict[str, Any]
DATE = "2026-07-01"
SOURCE = Source(path="rows.jsonl")
WORD = re.compile(r"sysword|devword|uword\d|aword\d|rword\d|fn\d+x\d|v\d+x\d|tres\d+x\d|offeredone|offereddesc")
TOKEN = re.compile(
    r"<[|｜][^<>\n'\"{}]{1,40}[|｜]>|\[/?[A-Z][A-Z_]{2,}\]|</?s>|<(?:start|end)_of_\w+>|<\|[\w\"]{1,30}>|<[\w\"]{1,30}\|>|<extra_id_\d+>"
    r"|<SPECIAL_\d+>|\]~!b\[|\]~b\]|\[e~\[|<seed:\w+>|<bos>|<eos>|\[gMASK\]|<sop>|<sep>|<(?:END|START)_\w+>|\[\|\w+\|\]|<(?:BOS|EOS)_TOKEN>"
    r"|</?(?:assistant|user|system)>(?=.{0,4}(?:\\n|$))|〈\|\w+\|〉"
)
"""What looks like a special token in the text of a template."""
NOT_SPECIAL = re.compile(r"<\|\"\|>|.*think.*|</?tool_(?:call|response)>")
NOT_DECLARED = re.compile(r"<｜(?:User|Assistant|tool)")
"""Tokens that DeepSeek's tokenizers do not declare special."""
PLAIN_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
EOS = ("<｜end▁of▁sentence｜>", "<|eot_id|>", "<|eot|>", "</s>", "<|im_end|>", "<end_of_turn>", "<turn|>")
BOS = {"</s>": "<s>", "<|eot_id|>": "<|begin_of_text|>", "<｜end▁of▁sentence｜>": "<｜begin▁of▁sentence｜>"}
SCAFFOLD = re.compile(r"(?:\s|</?think>|/?think>?|<|>|\||channel>thought|<?channel\|>|Here are my reasoning steps:)*")
"""What only a generation prompt may write, and parts of it."""


class Tokens(NamedTuple):
    """The tokens of a template's tokenizer, as far as its text shows them."""

    special: list[str]
    added: list[str]
    eos: str
    variables: dict[str, str]


@functools.cache
def tokens_of(text: str) -> Tokens:
    special = {token for token in TOKEN.findall(text) if not NOT_SPECIAL.fullmatch(token)}
    added = {token for token in PLAIN_TOKENS if token in text} | {t for t in special if NOT_DECLARED.match(t)}
    special -= added
    if "<|start_header_id|>" in text:
        special |= {"<|eot_id|>", "<|end_header_id|>", "<|begin_of_text|>"}
    if re.search(r"'<\|'|\"<\|\" \+ ", text):
        special |= {"<|user|>", "<|assistant|>", "<|system|>", "<|end|>"}
    eos = next((token for token in EOS if token in special), "</s>" if re.search(r"\[INST\]|bos_token", text) else "")
    eos = "<|endoftext|>" if not eos or ("<|im_start|>" in text and "eos_token" in text) else eos
    if "hy_eos" in text:
        eos = "<｜hy_eos:opensource｜>"
        special |= {"<｜hy_User:opensource｜>", "<｜hy_Assistant:opensource｜>"}
    bos = BOS.get(eos, "<s>")
    special |= {eos, bos}
    return Tokens(
        sorted(special),
        sorted(added),
        eos,
        {"bos_token": bos, "eos_token": eos, "pad_token": eos, "unk_token": "<unk>"},
    )


# --- conversations ----------------------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "offeredone",
            "description": "offereddesc",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "string", "description": "d"}},
                "required": ["q"],
            },
        },
    }
]


def call(turn: int, number: int) -> dict[str, Any]:
    name = f"{turn}x{number}"
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": f"fn{name}", "arguments": {"q": f"v{name}"}},
    }


def user(turn: int, text: str = "") -> Message:
    return {"role": "user", "content": text or f"uword{turn} asks"}


def assistant(turn: int, text: str | None = None, **fields: Any) -> Message:
    return {"role": "assistant", "content": f"aword{turn} says" if text is None else text, **fields}


def result(turn: int, number: int) -> Message:
    name = f"{turn}x{number}"
    return {"role": "tool", "content": f"tres{name}", "name": f"fn{name}", "tool_call_id": f"call0000{number}"}


def row(*messages: Message, tools: bool = False) -> Row:
    return {"messages": list(messages), **({"tools": TOOLS} if tools else {})}


SYSTEM = {"role": "system", "content": "sysword here"}
TWO = (user(0), assistant(0), user(1), assistant(1))
THOUGHTS = [f"<think>\nrword{turn} thinks\n</think>\n\naword{turn} says" for turn in range(2)]
KINDS: dict[str, Row] = {
    "plain": row(user(0), assistant(0)),
    "system": row(SYSTEM, user(0), assistant(0)),
    "two turns": row(*TWO),
    "system, three turns": row(SYSTEM, *TWO, user(2), assistant(2)),
    "a call": row(user(0), assistant(0, "", tool_calls=[call(0, 1)]), result(0, 1), assistant(1), tools=True),
    "a call beside text": row(SYSTEM, user(0), assistant(0, tool_calls=[call(0, 1)]), result(0, 1), assistant(1), tools=True),
    "two calls": row(
        user(0), assistant(0, "", tool_calls=[call(0, 1), call(0, 2)]), result(0, 1), result(0, 2), assistant(1), tools=True
    ),
    "a last call": row(user(0), assistant(0, "", tool_calls=[call(0, 1)]), tools=True),
    "thoughts": row(user(0), assistant(0, reasoning_content="rword0 thinks")),
    "thoughts of two turns": row(
        user(0), assistant(0, reasoning_content="rword0 thinks"), user(1), assistant(1, reasoning_content="rword1 thinks")
    ),
    "thoughts in the content": row(user(0), assistant(0, THOUGHTS[0])),
    "thoughts in the content of two turns": row(user(0), assistant(0, THOUGHTS[0]), user(1), assistant(1, THOUGHTS[1])),
    "developer": row({"role": "developer", "content": "devword"}, user(0), assistant(0)),
    "an empty answer": row(user(0), assistant(0, ""), user(1), assistant(1)),
    "white space": row(
        user(0, "  uword0 asks\n"), assistant(0, "\n  aword0 says  \n"), user(1, "\nuword1"), assistant(1, " aword1\n\n")
    ),
    "parts": row(
        {"role": "user", "content": [{"type": "text", "text": "uword0 asks"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "aword0 says"}]},
    ),
    "tools that are not called": row(user(0), assistant(0), tools=True),
    "system and tools": row(SYSTEM, user(0), assistant(0), tools=True),
    "flags": row(
        user(0), assistant(0, train=True), user(1), assistant(1, train=False), user(2), assistant(2, train=True)
    ),
    "only the last": row(*TWO),
    "an answer first": row(assistant(0), user(1), assistant(1)),
    "two answers in a row": row(user(0), assistant(0), assistant(1)),
    "unicode": row(
        user(0, "uword0 日本語 👩‍👩‍👧‍👦"), assistant(0, "aword0 naïve e\u0301 \u200b"), user(1), assistant(1, "aword1 Ελληνικά")
    ),
}  # fmt: skip
SPECIAL_TEXT = "text of special tokens"


def kinds(tokens: Tokens) -> Iterator[tuple[str, Row]]:
    yield from copy.deepcopy(KINDS).items()
    text = " ".join(tokens.special[:6])
    yield SPECIAL_TEXT, row(user(0, f"uword0 {text} asks"), assistant(0, f"aword0 {text} says"), user(1), assistant(1))


# --- the oracle -------------------------------------------------------------------------------------------------------


def words(value: Any) -> set[str]:
    return set(WORD.findall(json.dumps(value, ensure_ascii=False)))


def words_of(message: Message) -> set[str]:
    return words([message["content"], message.get("tool_calls"), message.get("reasoning_content")])


@functools.cache
def rendered(text: str, conversation: str, prompt: bool) -> str | None:
    """What transformers renders; None where it fails. `conversation`: messages and tools as JSON. Cells ask for the same texts often."""
    messages, tools = json.loads(conversation)
    day = datetime.datetime.fromisoformat(DATE)
    try:
        return str(
            oracle._compile_jinja_template(text).render(
                messages=oracle._alias_reasoning_fields(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                strftime_now=day.strftime,
                **tokens_of(text).variables,
            )
        )
    except Exception:  # a template may raise anything
        return None


@dataclass
class Case:
    """One cell: a template, a conversation as transformers takes it, and which messages are trained."""

    text: str
    tokens: Tokens
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    trained: list[int]

    def _forms(self) -> Iterator[list[Message]]:
        """The messages with the arguments of calls as objects, and as text."""
        messages = self.messages
        if self.takes_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        yield messages
        if any("tool_calls" in message for message in messages):
            made = copy.deepcopy(messages)
            for message in made:
                for one in message.get("tool_calls", ()):
                    one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
            yield made

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template only writes contents that are lists of parts."""
        question = [{"role": "user", "content": "uword0"}]
        parts = [{"role": "user", "content": [{"type": "text", "text": "uword0"}]}]
        return "uword0" not in (self._render(question) or "") and "uword0" in (self._render(parts) or "")

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        return rendered(self.text, json.dumps([messages, self.tools], ensure_ascii=False), prompt)

    def renderings(self, stop: int | None = None, prompt: bool = False) -> list[str]:
        """What transformers renders of the first `stop` messages. Empty where it fails."""
        made = [self._render(messages[:stop], prompt) for messages in self._forms()]
        return [text for text in made if text is not None]

    def usable(self) -> bool:
        """Whether a rendering says everything in order, and begins with the prompts for its trained turns."""
        needed = {
            word
            for i, m in enumerate(self.messages)
            if i in self.trained or m["role"] != "assistant"
            for word in words_of(m)
        }
        needed |= words(self.tools)
        for text in self.renderings():
            said = [m for m in self.messages if words_of(m) and m["role"] not in ("system", "developer")]
            places = [min(text.find(word) for word in words_of(m)) for m in said]
            if (
                not needed - words(text)
                and places == sorted(places)
                and all(self._begins(text, i) for i in self.trained)
            ):
                last = max(text.rfind(word) for i in self.trained for word in words_of(self.messages[i]) or {""})
                return any(token in text[last:] for token in self.tokens.special)
        return False

    def _begins(self, text: str, turn: int) -> bool:
        prompts = self.renderings(turn, prompt=True)
        rests = [prompt[len(common(prompt, text)) :] for prompt in prompts]
        return not prompts or any(SCAFFOLD.fullmatch(rest) for rest in rests)


def common(one: str, other: str) -> str:
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def judge(runs: Sequence[str], case: Case) -> str:
    """ "" for a right document, "scaffold", or what is wrong."""
    text, spans, at = "".join(runs), [], 0
    for index, run in enumerate(runs):
        if index % 2 and run:
            spans.append((at, at + len(run)))
        at += len(run)
    return (
        _wrong_words(text, [text[a:b] for a, b in spans], case)
        or _cut_tokens(text, spans, case)
        or _wrong_ends(text, spans, case)
        or _wrong_rendering(text, spans, case)
        or _wrong_openings(text, spans, case)
    )


def _wrong_words(text: str, inside: Sequence[str], case: Case) -> str:
    mine = {word for index in case.trained for word in words_of(case.messages[index])}
    got = words(list(inside))
    if mine != got:
        return f"trained words: missing {sorted(mine - got)}, too many {sorted(got - mine)}"
    prompts: set[str] = words(case.tools)
    for index, message in enumerate(case.messages):
        if index not in case.trained:
            found = words_of(message)
            prompts |= {word for word in found if word[0] == "a"} if message["role"] == "assistant" else found
    lost = prompts - words(text)
    return f"lost {sorted(lost)}" if lost else ""


def _cut_tokens(text: str, spans: Sequence[tuple[int, int]], case: Case) -> str:
    tokens = sorted({*case.tokens.special, *case.tokens.added}, key=len, reverse=True)
    for token in re.finditer("|".join(map(re.escape, tokens)), text):
        if any(token.start() < edge < token.end() for span in spans for edge in span):
            return f"an edge inside {token.group()}"
    return ""


def _special(case: Case) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(case.tokens.special, key=len, reverse=True))))


def _wrong_ends(text: str, spans: Sequence[tuple[int, int]], case: Case) -> str:
    special = _special(case)
    if len(spans) != len(case.trained):
        return "" if "" in (case.messages[i]["content"] for i in case.trained) else f"{len(spans)} spans"
    for (start, end), turn in zip(spans, case.trained, strict=True):
        found = list(special.finditer(text, start, end))
        ends = bool(found) and found[-1].end() == end
        rest = text[end:]
        last = turn == len(case.messages) - 1
        if not ends and (last or not (special.match(rest.lstrip()) or rest.startswith("\n"))):
            return f"turn {turn} ends with {text[start:end][-20:]!r}"
        if last and rest.strip().removesuffix(case.tokens.eos).strip():
            return f"{rest[:30]!r} follows the last turn"
    return ""


def _wrong_rendering(text: str, spans: Sequence[tuple[int, int]], case: Case) -> str:
    """Whether the document is what transformers renders, apart from what prompts and ends add."""
    start = spans[0][0] if spans else 0
    if text[:start] in case.renderings(min(case.trained), prompt=True):
        return ""  # the document is the prompt and the answer
    special = _special(case)
    faults = []
    for whole in case.renderings():
        if whole.startswith(text.removesuffix(case.tokens.eos)):
            return ""
        changes = difflib.SequenceMatcher(None, whole, text, autojunk=False).get_opcodes()
        wrong = [
            (kind, whole[a:b], text[c:d])
            for kind, a, b, c, d in changes
            if kind != "equal"
            and not (kind == "insert" and (SCAFFOLD.fullmatch(text[c:d]) or not special.sub("", text[c:d]).strip()))
            and not (kind == "delete" and c >= spans[-1][1])
        ]
        if not wrong:
            return ""
        faults.append(str(wrong[0]))
    return "not what transformers renders: " + (faults[-1] if faults else "it fails")


def _wrong_openings(text: str, spans: Sequence[tuple[int, int]], case: Case) -> str:
    verdict = ""
    if len(spans) != len(case.trained):
        return verdict
    for (start, _), turn in zip(spans, case.trained, strict=True):
        prompts = [prompt for prompt in case.renderings(turn, prompt=True) if prompt.strip() or turn]
        if not prompts or any(text[:start] == prompt or text[:start].endswith(prompt[-20:]) for prompt in prompts):
            continue
        for prompt in prompts:
            if text.startswith(prompt):
                return (
                    f"turn {turn} begins at {text[start : start + 20]!r}, the prompt ends at {len(prompt) - start:+d}"
                )
        bare = [prompt[: len(common(prompt, text[:start]))] for prompt in prompts]
        tails = [prompt[len(b) :] for prompt, b in zip(prompts, bare, strict=True)]
        if not any(
            SCAFFOLD.fullmatch(tail) or prompt.rstrip()[-20:] == text[:start].rstrip()[-20:]
            for tail, prompt in zip(tails, prompts, strict=True)
        ):
            return f"turn {turn}: the prompt ends with {prompts[0][-30:]!r}, the text before the answer with {text[:start][-30:]!r}"
        verdict = "scaffold"
    return verdict


# --- cells --------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    kind: str
    verdict: str
    why: str


def cells(name: str, text: str, options: Mapping[str, Any] | None = None) -> Iterator[Cell]:
    """The verdict of each kind of conversation under a template. `options`: of [prepare]."""
    tokens = tokens_of(text)
    prepare = Prepare(tokenizer="t", sources=(SOURCE,), **(options or {}))
    renderer: Renderer | None = None
    refusal = ""
    try:
        rules = TemplateOptions(
            DATE if "strftime_now" in text else "",
            prepare.template_variables,
            prepare.generation_prefix,
            prepare.history,
        )
        template = load_template(name, text, tokens.variables, tokens.eos, tokens.special, tokens.added, rules)
        renderer = Renderer(prepare, template, template.specials, True, Normalizer())
    except SftError as error:
        refusal = str(error)
    names = () if renderer is None else (False, template.renamed_roles(), template.field_of_thoughts())
    reader = RowReader(prepare, SOURCE, *names)
    last = RowReader(dataclasses.replace(prepare, train_turns="last"), SOURCE, *names)
    for kind, value in kinds(tokens):
        chosen = last if kind == "only the last" else reader
        yield Cell(kind, *_cell(renderer, refusal, value, chosen, prepare.history, text, tokens))


def _cell(
    renderer: Renderer | None, refusal: str, value: Row, reader: RowReader, history: str, text: str, tokens: Tokens
) -> tuple[str, str]:
    trained = [index for index, train in enumerate(reader.read(copy.deepcopy(value)).train) if train]
    roles = reader.renamed_roles
    messages = [
        {
            key: roles[item]
            if key == "role" and item in roles
            else "".join(part["text"] for part in item)
            if key == "content" and isinstance(item, list)
            else item
            for key, item in message.items()
            if key != "train"
        }
        for message in value["messages"]
    ]
    case = Case(text, tokens, messages, value.get("tools"), trained)
    if renderer is None:
        return ("usable" if case.usable() else "refused"), refusal
    batch = renderer.render([value], reader.read)
    if batch.rejects:
        return ("usable" if case.usable() else "refused"), batch.rejects[0].detail
    if history == "whole":
        fault = judge(batch.runs[0], case)
    else:
        turns = [Case(text, tokens, messages[: turn + 1], case.tools, [turn]) for turn in trained]
        faults = [judge(runs, turn) for runs, turn in zip(batch.runs, turns, strict=True)]
        fault = next((fault for fault in faults if fault not in ("", "scaffold")), max(faults))
    return ("right" if not fault else "scaffold" if fault == "scaffold" else "wrong"), fault
