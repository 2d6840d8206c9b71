"""Chat templates: a conversation to text, and which stretches of that text the model learns to emit.

In: a template by name (`sft.chat.named`), as a .jinja file, or the tokenizer's own. Out: `render(conversation)` gives runs
of text, untrained and trained in turn. Every conversation is rendered once, and the runs come from the structure of the
rendering: a named template knows its turns; a Jinja template is compiled with marks at the top of its loop over the
messages and at its {% generation %} blocks, so that the output says which message wrote which part of it. Inside one
message's part, what the generation prompt already gives is scaffold, and the first terminator ends what is trained; a
message without one, or with more text behind it, rejects the row. No text is ever searched for content, so no content
can move a mask.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox

from sft.chat.named import NamedTemplate
from sft.chat.rows import BadRow, Conversation
from sft.chat.trace import Generation, Mark, mark, mark_loops
from sft.common.errors import SftError
from sft.recipe.chat_templates import TEMPLATES

# Stand-ins for special-token text in content; two blocks, because a row may hold characters of one of them.
PRIVATE_BLOCKS = (0xF0000, 0x100000)
BLOCK = 0x1000
NAMED = "qjzxnamed"  # of probes: letters, as a template may write Python's repr of a call
# Message fields that a template which does not know them leaves out without a word.
FIELDS = ("functions", "function_calls", "tool_calls", "reasoning_content", "thinking")


class Template(Protocol):
    """What the encoder needs of a template."""

    name: str
    text: str
    boundaries: str
    eos_appended: bool
    terminators: list[str]
    generation_prefix: str  # what the generation prompt writes behind the header of the turn, such as <think>
    answers_without_prefix: int  # trained answers so far that did not begin with it

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """Runs of text, untrained and trained in turn, and the number of special tokens in the scaffold."""
        ...


class Specials:
    """The tokenizer's special-token texts, and how content that holds one is kept apart from the template's own."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = sorted(texts, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self.chain = re.compile(f"(?:{self.pattern.pattern})+")  # special tokens with nothing between them
        self.split = re.compile(f"({self.pattern.pattern})")

    def found(self, conversation: Conversation) -> bool:
        search = self.pattern.search
        return any(search(text) for text in strings([conversation.messages, conversation.tools]))

    def escape(self, conversation: Conversation) -> tuple[Conversation, Callable[[str], str]]:
        """The conversation with special-token text replaced by private-use characters, and the way back."""
        present = set("".join(strings([conversation.messages, conversation.tools])))
        base = next((b for b in PRIVATE_BLOCKS if not any(b <= ord(char) < b + BLOCK for char in present)), None)
        if base is None or len(self.texts) > BLOCK:
            raise BadRow("special_text", "special-token text together with private-use characters of planes 15 and 16")
        number = {text: chr(base + index) for index, text in enumerate(self.texts)}
        pattern = self.pattern

        def there(text: str) -> str:
            return pattern.sub(lambda match: number[match.group()], text)

        back = re.compile(f"[{chr(base)}-{chr(base + BLOCK - 1)}]")
        escaped = Conversation(
            [map_strings(message, there) for message in conversation.messages],
            conversation.train,
            map_strings(conversation.tools, there),
            conversation.flagged,
        )
        return escaped, lambda text: back.sub(lambda match: self.texts[ord(match.group()) - base], text)


def calls(message: Mapping) -> bool:
    return bool(message.get("tool_calls") or message.get("function_calls"))


def strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return value


def load_template(name: str, text: str | None, variables: Mapping[str, str], eos: str, specials: Specials) -> Template:
    """`text` is the Jinja text of a template that is not one of the named ones."""
    if text is None:
        return NamedTemplate(name, eos, specials.texts)
    return JinjaTemplate(name, text, variables, eos, specials)


def known_templates() -> list[str]:
    return sorted(TEMPLATES)


def commonprefix(texts: Sequence[str]) -> str:
    columns = itertools.takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return "".join(chars[0] for chars in columns)


def probe_call() -> dict:
    return {"type": "function", "id": "call00001", "function": {"name": NAMED, "arguments": {"x": 1}}}


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class JinjaTemplate:
    """Any Hugging Face chat template. What it does with turns is learnt once, from probe conversations."""

    def __init__(self, name: str, text: str, variables: Mapping[str, str], eos: str, specials: Specials) -> None:
        self.name, self.text, self.eos, self.specials = name, text, eos, specials
        self.variables = dict(variables)
        # The settings that Hugging Face renders with. strftime_now stays undefined: data must not depend on the day.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = to_json
        self.index_of: dict[int, int] = {}
        self.writing = -1
        self.knows: dict[tuple, bool] = {}
        self.answers_without_prefix = 0
        env.globals.update(
            raise_exception=refuse,
            sft_message=self._mark_message,
            sft_loop_end=lambda: mark("end"),
            sft_generation=lambda: mark("generation"),
            sft_endgeneration=lambda: mark("endgeneration"),
        )
        try:
            tree = env.parse(text)
            self.generation = "sft_generation" in {node.name for node in tree.find_all(nodes.Name)}
            mark_loops(tree)
            tree.set_environment(env)
            code = env.compile(tree, name=name)
            self.template = jinja2.Template.from_code(env, code, env.make_globals(None))
        except jinja2.TemplateError as error:
            raise SftError(f"prepare.template: {name}: {error}; next: correct the Jinja text") from None
        self._probe()

    def _mark_message(self, *targets: Any) -> str:
        for target in targets:
            index = self.index_of.get(id(target), -1)
            if index >= 0:
                self.writing = index
                return mark("message", index)
        return ""

    def pieces(self, messages: list[dict], tools: list[dict] | None = None, prompt: bool = False) -> list[str]:
        self.index_of = {id(message): index for index, message in enumerate(messages)}
        self.writing = -1
        context = self.template.new_context(
            {
                **self.variables,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": prompt,
            }
        )
        try:
            return list(self.template.root_render_func(context))
        except Exception as error:  # Jinja text is a program: it can fail in any way, out of memory included
            where = f"template {self.name}" + (f", message {self.writing}" if self.writing >= 0 else "")
            raise BadRow("template", f"{where}: {type(error).__name__}: {error}") from None

    def layout(self, pieces: list[str]) -> tuple[str, dict[int, list[tuple[int, int]]], list[tuple[int, int, int]]]:
        """The text; the stretches each message wrote; the generation blocks as (message, start, end)."""
        position, current, start = 0, -1, 0
        regions: dict[int, list[tuple[int, int]]] = {}
        blocks: list[tuple[int, int, int]] = []
        opened: list[int] = []
        for piece in pieces:
            if type(piece) is not Mark:
                position += len(piece)
                continue
            if piece.what == "generation":
                opened.append(position)
            elif piece.what == "endgeneration":
                blocks.append((current, opened.pop(), position))
            else:
                if current >= 0 and position > start:
                    regions.setdefault(current, []).append((start, position))
                current, start = piece.message, position
        if current >= 0 and position > start:
            regions.setdefault(current, []).append((start, position))
        return "".join(pieces), regions, blocks

    def _probe(self) -> None:
        """Learns header, terminator and boundaries from conversations whose contents are single private-use characters."""
        marks = [chr(PRIVATE_BLOCKS[0] + BLOCK + index) for index in range(4)]
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": content} for role, content in zip(roles, marks, strict=False)]
        try:
            text, regions, blocks = self.layout(self.pieces(messages))
            # Does what it writes after a question, less what it writes without the prompt, open the answer?
            asked = ["".join(self.pieces(messages[:1], prompt=prompt)) for prompt in (False, True)]
        except BadRow as error:
            raise SftError(
                f"prepare.template: {self.name} cannot render a plain two-turn conversation: {error.detail};"
                " next: use a template that can, or name one (" + ", ".join(known_templates()) + ")"
            ) from None
        shared = len(commonprefix(asked))
        for token in self.specials.pattern.finditer(asked[1]):
            if token.start() < shared < token.end():  # two special tokens that begin alike
                shared = token.start()
        prompt = asked[1][shared:]
        for index in (1, 3):
            inside = [text[a:b] for a, b in regions.get(index, [])]
            if len(inside) != 1 or marks[index] not in inside[0]:
                raise SftError(
                    f"prepare.template: {self.name} does not write assistant message {index} once, from a loop over the messages at its"
                    f" top level, so no mask can be derived from it; next: write such a loop, or name one of {', '.join(known_templates())}"
                )
        parts = [text[slice(*regions[index][0])] for index in (1, 3)]
        before = [part[: part.index(content)] for part, content in zip(parts, marks[1::2], strict=True)]
        # Scaffold is what the generation prompt gives: only as far as the turns really begin with it (a thinking prompt
        # may go on into <think>, which the data spells out), or all that stands before the content when there is no prompt.
        self.header = commonprefix([prompt, *before]) if prompt else ""
        self.generation_prefix = prompt[len(self.header) :]
        if prompt and not self.header:
            raise SftError(
                f"prepare.template: {self.name} opens an answer with {prompt!r} when prompted, but writes {before[0]!r} before an answer in"
                " the history, so the trained text would not be what the model is asked for; next: make the two equal"
            )
        tails = [parts[0].split(marks[1], 1)[1], text[text.index(marks[3]) + 1 :]]
        stops = self.stops = [self._stop(tail) for tail in tails]
        if stops[1] is None:
            raise SftError(
                f"prepare.template: {self.name} writes no special token after the last answer, so the model would never learn to stop;"
                " next: end assistant turns with {{ eos_token }} or the tokenizer's end-of-turn token"
            )
        self.tail = tails[0] if stops[0] is None else ""
        self.terminators = sorted({stop for stop in (*stops, self._stop_of_calls()) if stop})
        if self.generation:
            self._check_generation(text, regions, blocks, tails)
        eos = text.count(self.eos)
        self.eos_appended = eos == 0
        self.boundaries = "eos" if eos == 0 or (eos == 1 and text.endswith(self.eos)) else "index"

    def _check_generation(self, text: str, regions: Mapping, blocks: list, tails: list[str]) -> None:
        for index, tail in ((1, tails[0]), (3, tails[1])):
            spans = [(start, end) for message, start, end in blocks if message == index]
            header_end = regions[index][0][0] + len(self.header)
            if not spans:
                raise SftError(
                    f"prepare.template: {self.name}: no {{% generation %}} block in assistant message {index}; next: add it"
                )
            if spans[0][0] < header_end:
                raise SftError(
                    f"prepare.template: {self.name}: the {{% generation %}} block begins with {text[spans[0][0] : header_end]!r}, which the"
                    " generation prompt already gives; next: move it behind the header"
                )
            if (stop := self._stop(tail)) is not None and stop not in text[spans[-1][0] : spans[-1][1]]:
                raise SftError(
                    f"prepare.template: {self.name}: the {{% generation %}} block ends before the terminator {stop!r}, so the model would"
                    " never learn to stop; next: move {% endgeneration %} behind it"
                )

    def _stop(self, tail: str) -> str | None:
        """The token that ends a turn: the last of the first special tokens that stand together behind the content."""
        chain = self.specials.chain.search(tail)
        return self.specials.pattern.findall(chain.group())[-1] if chain else None

    def _stop_of_calls(self) -> str | None:
        """The token that ends a turn of tool calls, which may be another than the one that ends an answer."""
        messages: list[dict] = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [probe_call()]},
            {"role": "tool", "content": "r", "name": NAMED, "tool_call_id": "call00001"},
            {"role": "assistant", "content": "a"},
        ]
        try:
            text, regions, _ = self.layout(self.pieces(messages))
        except BadRow:
            return None  # a template without tools
        part = text[slice(*regions[1][0])].rstrip() if regions.get(1) else ""
        found = self.specials.pattern.findall(part) if NAMED in part else []
        return found[-1] if found and part.endswith(found[-1]) else None

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """`conversation` must hold no special-token text (`Specials.escape`), so every special token found is scaffold."""
        messages = conversation.messages
        text, regions, blocks = self.layout(self.pieces(messages, conversation.tools))
        specials = len(self.specials.pattern.findall(text))
        if self.boundaries == "eos" and text.find(self.eos) not in (-1, len(text) - len(self.eos)):
            raise BadRow("eos_inside", f"template {self.name} writes {self.eos} inside this conversation")
        if conversation.tools:
            self._demand("tools", any(message["role"] == "system" for message in messages))
        spans: list[tuple[int, int]] = []
        written = 0
        for index, train in enumerate(conversation.train):
            wrote = regions.get(index, [])
            message = messages[index]
            if wrote and message["role"] not in ("system", "developer"):
                if wrote[0][0] < written:
                    raise BadRow("template", f"template {self.name} writes messages in another order than the row's")
                written = wrote[-1][1]
            if len(message) > 2:
                for name in FIELDS:
                    if name in message and (train or name not in ("reasoning_content", "thinking")):
                        self._demand(name, message["role"], bool(message["content"]), index)
            if not train:
                if (
                    not wrote
                    and message["role"] not in ("system", "developer")
                    and (message["content"] or len(message) > 2)
                ):
                    raise BadRow("template", f"message {index} is not rendered by template {self.name}")
                continue
            if len(wrote) != 1:
                raise BadRow("template", f"message {index} is rendered {len(wrote)} times by template {self.name}")
            own = self._spans(conversation, text, wrote[0], [(a, b) for m, a, b in blocks if m == index], index)
            said = "".join(text[start:end] for start, end in own)
            if not self.specials.pattern.sub("", said).strip() and (message["content"].strip() or calls(message)):
                raise BadRow("template", f"message {index}: template {self.name} writes nothing of what it says")
            spans += own
        runs: list[str] = []
        position = 0
        for start, end in spans:
            if start < position:
                raise BadRow("template", f"template {self.name} writes messages in another order than the row's")
            runs += (text[position:start], text[start:end])
            position = end
        if position < len(text):
            runs.append(text[position:])
        if "".join(runs) != text:
            raise BadRow("proof", f"the runs of template {self.name} are not the text it rendered")
        if self.boundaries == "eos" and not text.endswith(self.eos):
            specials += 1
            runs = runs if len(runs) % 2 else [*runs, ""]
            runs[-1] += self.eos
        return runs, specials

    def _spans(
        self, conversation: Conversation, text: str, wrote: tuple[int, int], blocks: list[tuple[int, int]], index: int
    ) -> list[tuple[int, int]]:
        """What is trained of a message, given the stretch it wrote and its generation blocks."""
        start, end = wrote
        last = index == len(conversation.messages) - 1
        if last:
            end = len(text)
        role = conversation.messages[index]["role"]
        if self.generation:
            if not blocks:
                raise BadRow(
                    "template", f"message {index} is to be trained but is in no generation block of {self.name}"
                )
        else:
            header = self.header if role == "assistant" else self._header_of(conversation, index)
            begins = text.startswith(header, start)
            opening = start + len(header)
            odd = self.specials.pattern.match(text, opening, end)
            if role == "assistant" and (not begins or (odd and odd.group() not in self.terminators)):
                opening = self._opening(conversation, text, start, index)
            elif not begins:
                raise BadRow("template", f"message {index} does not begin with {header!r}")
            blocks = [(opening, end)]
        if role != "assistant":
            return [(a, self._end(text, a, b, index, self.specials.texts, None)) for a, b in blocks]
        first = blocks[0][0]
        if self.generation_prefix and not text.startswith(self.generation_prefix, start + len(self.header)):
            self.answers_without_prefix += 1
        elif self.generation_prefix and first == start + len(self.header):
            # The prompt already says it. Where it ends inside a token, that token is scaffold too.
            blocks = [
                (first + len(self.generation_prefix), max(first + len(self.generation_prefix), blocks[0][1])),
                *blocks[1:],
            ]
        for a, b in blocks[:-1]:
            if any(stop in text[a:b] for stop in self.terminators):
                raise BadRow("template", f"message {index}: a generation block follows the terminator")
        a, b = blocks[-1]
        return [*blocks[:-1], (a, self._end(text, a, b, index, self.terminators, self.stops[1 if last else 0]))]

    def _opening(self, conversation: Conversation, text: str, start: int, index: int) -> int:
        """Where the model's own text begins in a turn that does not open as the others do, say behind a tool's result:
        after what the template writes when it is asked for this very turn."""
        prompt = "".join(self.pieces(conversation.messages[:index], conversation.tools, prompt=True))
        if not text.startswith(prompt):
            prompt = prompt.removesuffix(self.generation_prefix)
        if not text.startswith(prompt):
            raise BadRow(
                "template",
                f"message {index} opens with {text[start : start + 40]!r}, but the prompt for it ends in {prompt[-40:]!r}",
            )
        return max(start, len(prompt))

    def _end(self, text: str, start: int, end: int, index: int, stops: Sequence[str], stop: str | None) -> int:
        """Where what is trained of text[start:end] ends: behind its first terminator and the special tokens that stand
        right behind it, or before the gap between turns. `stop`: the terminator that there must be."""
        for chain in self.specials.chain.finditer(text, start, end):
            if not any(token in stops for token in self.specials.pattern.findall(chain.group())):
                continue
            rest = text[chain.end() : end].strip()
            if rest.removeprefix(self.eos):
                raise BadRow("template", f"message {index}: {rest[:40]!r} follows the terminator")
            return chain.end()
        if stop is not None:
            raise BadRow("template", f"message {index} ends without {stop}: {text[start:end][-40:]!r}")
        if self.tail and text.endswith(self.tail, start, end):
            return end - len(self.tail)
        return end

    def _demand(self, field: str, *where: Any) -> None:
        """Raises BadRow when the template leaves `field` out: learnt once from a conversation with it and one without."""
        index = where[-1] if len(where) == 3 else -1
        key = (field, *where[:2])
        if key not in self.knows:
            self.knows[key] = self._probe_field(*key)
        if not self.knows[key]:
            place = "tools" if field == "tools" else f"message {index}: {field}"
            raise BadRow(
                "template", f"{place}: template {self.name} leaves it out, or leaves out the content beside it"
            )

    def _probe_field(self, field: str, role: Any, spoken: bool = True) -> bool:
        """`role`: who has the field, or for tools, whether there is a system message. `spoken`: with a content beside it."""
        said, named = "qjzxsaid", NAMED
        messages: list[dict] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        tools = None
        if field == "tools":
            tools = [{"type": "function", "function": {"name": named, "description": "d", "parameters": {}}}]
            messages = [{"role": "system", "content": said}, *messages] if role else messages
            spoken = role
        else:
            value = [probe_call()] if field == "tool_calls" else named
            carrier = {"role": role, "content": said if spoken else "", field: value}
            if role == "system":
                messages.insert(0, carrier)
            else:
                messages[1:] = [carrier] if role == "assistant" else [carrier, messages[1]]
        try:
            text = "".join(self.pieces(messages, tools))
        except BadRow:
            return True  # the template may want more of it than this: the row itself will show
        return named in text and (not spoken or said in text)

    def _header_of(self, conversation: Conversation, index: int) -> str:
        """What stands before the content of a trained message that is not the assistant's, from the same conversation with
        its content made a private-use character."""
        present = "".join(strings([conversation.messages, conversation.tools]))
        content = next(chr(code) for code in range(PRIVATE_BLOCKS[1] + BLOCK, 0x110000) if chr(code) not in present)
        messages = [dict(message) for message in conversation.messages]
        messages[index]["content"] = content
        text, regions, _ = self.layout(self.pieces(messages, conversation.tools))
        part = text[slice(*regions[index][0])] if regions.get(index) else ""
        if content not in part:
            raise BadRow("template", f"message {index} is not rendered with its content")
        return part[: part.index(content)]
