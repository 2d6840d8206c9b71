"""Renders conversations under a Jinja template without Jinja: what two conversations of the same skeleton share is rendered once.

In: a conversation. Its skeleton is what is left when stand-ins take the place of its texts: roles, fields, what is trained, white space at the
ends of texts, and the constants that the template asks texts for, such as </think>. Out: the runs that `JinjaTemplate.render` gives, or None
where that must render. `sft.chat.watched` proves for each skeleton that the template only writes the texts. The first conversation of a
skeleton, and a sample of the others, are rendered by both.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft.chat.probe import to_json
from sft.chat.rows import BadRow, Conversation, Message
from sft.chat.special_tokens import SpecialTokens
from sft.chat.template import JinjaTemplate
from sft.chat.watched import ANY, FIRST, JSON, OBJECT, VALUE, Depends, NewConstant, StandIn, Watch, watch_probe
from sft.common.errors import SftError

MOST_SKELETONS = 20_000
MOST_CONSTANTS = 16
CHECKED_EVERY = 512
"""One of so many conversations is rendered by Jinja too."""
THOUGHTS = ("<think>", "</think>")
PLACE = chr(FIRST)
SLOT = re.compile(
    f'\\{{"(?P<object>[{chr(OBJECT)}-{chr(ord(VALUE) - 1)}])": "{VALUE}"\\}}|{JSON}(?P<json>[{chr(FIRST)}-{chr(OBJECT - 1)}])'
    f"|(?P<text>[{chr(FIRST)}-{chr(OBJECT - 1)}])"
)
TEXT_SLOT, JSON_SLOT, OBJECT_SLOT = range(3)


class Unusual(Exception):
    """A text that must not be replaced, as it has special tokens or private-use characters, or skeletons that changed."""


class RenderPlan(NamedTuple):
    """What a skeleton renders to."""

    runs: list[list[str]]
    """The literal parts of each run, with "" for each slot."""
    slots: list[list[tuple[int, int, int]]]
    """For each run: where a slot is, its kind, and the number of its text or object."""
    specials: int
    answers_without_prefix: int

    def fill(self, texts: Sequence[str], objects: Sequence[str]) -> list[str]:
        made = []
        for parts, slots in zip(self.runs, self.slots, strict=True):
            parts = parts.copy()
            for at, kind, number in slots:
                if kind == TEXT_SLOT:
                    parts[at] = texts[number]
                else:
                    parts[at] = objects[number] if kind == OBJECT_SLOT else to_json(texts[number])[1:-1]
            made.append("".join(parts))
        return made


class Skeletons:
    """The skeletons of one template."""

    def __init__(self, template: JinjaTemplate) -> None:
        self.template, self.specials = template, template.specials
        self.watch = Watch()
        self.literal_tools = False  # the template looks into the tools
        self.plans: dict[tuple[Any, ...], RenderPlan | None] = {}  # None: Jinja must render
        self.once: set[tuple[Any, ...]] = set()  # skeletons that were seen once
        self.rendered = self.version = 0
        rules = template.rules
        for text in (*THOUGHTS, rules.generation_prefix, rules.closing or "", *rules.generation_prefix.split("\n")):
            left = text
            for known in self.watch.constants:
                left = left.replace(known, "")
            if left.strip():
                self.watch.constants.append(text.strip())
        self._compile()

    @functools.cached_property
    def watched(self) -> JinjaTemplate:
        """The template, watched. Made when it is needed: Jinja compiles a long template in half a second."""
        made = copy.copy(self.template)
        made.probe = watch_probe(made.probe, self.watch)
        return made

    def _compile(self) -> None:
        """Makes the patterns that find the constants."""
        constants = SpecialTokens(self.watch.constants)
        self.usable = not constants.can_overlap and len(constants.texts) <= MOST_CONSTANTS
        self.constant = re.compile(f"(\\s*(?:{constants.pattern.pattern})(?:\\s|{constants.pattern.pattern})*)")
        # One of these is in every text that has a constant or a special token.
        self.starts = sorted({text[:2] for text in (*self.watch.constants, *self.specials.texts)})
        self.beginnings, self.endings = parts_of(self.watch.constants)
        self.plans, self.once = {}, set()
        self.version += 1

    def learn(self, conversation: Conversation, texts: list[str], objects: list[str]) -> RenderPlan | None:
        """The plan of a conversation's skeleton. Fills its texts and objects. Returns None if Jinja must render. Raises Unusual; `version` then
        says whether skeletons have changed."""
        self._skeleton(conversation, texts, objects)
        plan = self._learn(conversation)
        if plan is None:
            return None
        runs = plan.fill(texts, objects)
        return plan if self.agrees(conversation, runs, plan.specials, plan.answers_without_prefix) else None

    def render(self, conversation: Conversation) -> tuple[list[str], int] | None:
        """The result of `JinjaTemplate.render`. Returns None if Jinja must render. Raises SftError if the two differ."""
        if not self.usable or conversation.variables:
            return None
        texts: list[str] = []
        objects: list[str] = []
        try:
            key = self._skeleton(conversation, texts, objects)
        except Unusual:
            return None
        if key not in self.plans:
            if key not in self.once:
                self.once.add(key)
                return None
            if len(self.plans) >= MOST_SKELETONS or len(self.once) >= 10 * MOST_SKELETONS:
                self._compile()
            try:
                plan = self._learn(conversation)
            except Unusual:
                return None
            if plan is not None and not self._agrees(conversation, plan.fill(texts, objects), plan):
                plan = None
            self.plans[key] = plan
        plan = self.plans[key]
        if plan is None:
            return None
        runs = plan.fill(texts, objects)
        self.rendered += 1
        if self.rendered % CHECKED_EVERY == 0 and not self._agrees(conversation, runs, plan):
            raise SftError(
                f"prepare.template: {self.template.name} renders a conversation of {len(conversation.messages)} messages in another way than those before it"
                " of the same form; next: report the template, and use one of the named templates until it is fixed"
            )
        self.template.answers_without_prefix += plan.answers_without_prefix
        return runs, plan.specials

    def _agrees(self, conversation: Conversation, runs: list[str], plan: RenderPlan) -> bool:
        return self.agrees(conversation, runs, plan.specials, plan.answers_without_prefix)

    def agrees(self, conversation: Conversation, runs: list[str], specials: int, answers: int) -> bool:
        """Whether Jinja renders these runs, special tokens, and answers without the generation prefix."""
        before = self.template.answers_without_prefix
        try:
            rendered = self.template.render(conversation)
        except BadRow:
            return False
        finally:
            added = self.template.answers_without_prefix - before
            self.template.answers_without_prefix = before
        return rendered == (runs, specials) and added == answers

    def _skeleton(self, conversation: Conversation, texts: list[str], objects: list[str]) -> tuple[Any, ...]:
        """What identifies the skeleton. Fills the texts and the JSON of the objects that the stand-ins replace."""
        key: list[Any] = list(conversation.train)
        for message in conversation.messages:
            if len(message) == 2:
                key += (message["role"], self.shape(message["content"], texts))
                continue
            key.append(len(message))
            for name, value in message.items():
                key.append(name)
                if name == "role":
                    key.append(value)
                elif name != "tool_calls":
                    key.append(self.shape(value, texts))
                else:
                    key.append(len(value))
                    for call in value:
                        function = call["function"]
                        key += (
                            self.shape(call["id"], texts) if "id" in call else None,
                            self.shape(function["name"], texts),
                        )
                        key.append(bool(function["arguments"]))
                        if function["arguments"]:
                            objects.append(self._json(function["arguments"]))
        if conversation.tools:
            tools = [self._json(tool) for tool in conversation.tools]
            key += ("tools", *tools) if self.literal_tools else ("tools", len(tools))
            objects += () if self.literal_tools else tools
        return tuple(key)

    def shape(self, text: str, texts: list[str]) -> str:
        """A text with a place in place of each part that is neither white space at an end nor a constant. Raises Unusual."""
        if not text.isascii() and b"\xf3" in text.encode(errors="surrogatepass") and ANY.search(text):
            raise Unusual
        body = text.strip()
        parts = [body]
        for start in self.starts:
            if start in text:
                if self.specials.pattern.search(text):
                    raise Unusual
                parts = self.constant.split(body)
                break
        if len(parts) == 1:
            if not body:
                return text
            if body.endswith(self.beginnings) or body.startswith(self.endings):
                raise Unusual
            texts.append(body)
            return PLACE if len(body) == len(text) else text.replace(body, PLACE, 1)
        for part in parts[::2]:
            if part.endswith(self.beginnings) or part.startswith(self.endings):
                raise Unusual
        texts += [part for part in parts[::2] if part]
        at = text.index(body)
        shape = "".join(part if index % 2 else PLACE if part else "" for index, part in enumerate(parts))
        return text[:at] + shape + text[at + len(body) :]

    def _json(self, value: Any) -> str:
        text = to_json(value)
        if self.specials.pattern.search(text) or (not text.isascii() and ANY.search(text)):
            raise Unusual
        return text

    def _learn(self, conversation: Conversation) -> RenderPlan | None:
        """The plan of a conversation's skeleton. Returns None if Jinja must render. Raises Unusual if skeletons have changed."""
        stand_in, num_tools = self._stand_in(conversation)
        before = self.watched.answers_without_prefix
        try:
            runs, specials = self.watched.render(stand_in)
        except NewConstant:
            self._compile()
            raise Unusual from None
        except (Depends, BadRow):
            if not num_tools:
                return None
            stand_in.tools = conversation.tools
            try:
                self.watched.render(stand_in)
            except (Depends, BadRow):
                return None
            except NewConstant:
                self._compile()
                raise Unusual from None
            self.literal_tools = True
            self._compile()
            raise Unusual from None
        answers = self.watched.answers_without_prefix - before
        return self._plan(runs, specials, answers, num_tools, stand_in)

    def _plan(
        self, runs: list[str], specials: int, answers: int, num_tools: int, stand_in: Conversation
    ) -> RenderPlan | None:
        literals: list[list[str]] = []
        all_slots: list[list[tuple[int, int, int]]] = []
        written: set[int] = set()
        for run in runs:
            parts: list[str] = []
            slots: list[tuple[int, int, int]] = []
            position = 0
            for found in SLOT.finditer(run):
                kind = TEXT_SLOT if found["text"] else JSON_SLOT if found["json"] else OBJECT_SLOT
                number = ord(found["text"] or found["json"] or found["object"]) - (
                    OBJECT if kind == OBJECT_SLOT else FIRST
                )
                parts += (run[position : found.start()], "")
                slots.append((len(parts) - 1, kind, number))
                written.update((number,) if kind == OBJECT_SLOT else ())
                position = found.end()
            parts.append(run[position:])
            if any(ANY.search(part) for part in parts):
                return None
            literals.append(parts)
            all_slots.append(slots)
        count = sum(
            len(m.get("tool_calls", ())) - sum(not c["function"]["arguments"] for c in m.get("tool_calls", ()))
            for m in stand_in.messages
        )
        if not written.issuperset(range(count, count + num_tools)) or not self._are_apart("".join(runs)):
            return None
        return RenderPlan(literals, all_slots, specials, answers)

    def _are_apart(self, text: str) -> bool:
        """Whether no special token can arise where a text meets what is written around it."""
        beginnings, endings = parts_of(self.specials.texts)
        end = 0
        for found in SLOT.finditer(text):
            if found["text"]:
                before = text[end : found.start()]
                if (end and not before) or before.endswith(beginnings):
                    return False
                if text.startswith(endings, found.end()):
                    return False
            end = found.end()
        return True

    def _stand_in(self, conversation: Conversation) -> tuple[Conversation, int]:
        """The conversation with stand-ins, and for how many tools there are some."""
        texts: list[str] = []
        made = copy.copy(conversation)
        made.messages, objects = [], 0

        def replaced(text: str) -> str:
            first = len(texts)
            shape = self.shape(text, texts)
            numbers = iter(range(first, len(texts)))
            return "".join(chr(FIRST + next(numbers)) if char == PLACE else char for char in shape)

        for message in conversation.messages:
            copied: Message = {}
            for name, value in message.items():
                if name == "role":
                    copied[name] = value
                elif name != "tool_calls":
                    copied[name] = replaced(value)
                else:
                    copied[name] = []
                    for call in value:
                        call_id = {"id": replaced(call["id"])} if "id" in call else {}
                        function = {"name": replaced(call["function"]["name"]), "arguments": {}}
                        if call["function"]["arguments"]:
                            function["arguments"] = StandIn(objects)
                            objects += 1
                        copied[name].append({**call_id, "type": "function", "function": function})
            made.messages.append(copied)
        num_tools = len(conversation.tools or ()) if not self.literal_tools else 0
        if num_tools:
            made.tools = [StandIn(objects + number) for number in range(num_tools)]
        return made, num_tools


def parts_of(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All beginnings of the texts, and all endings, without the whole texts."""
    places = [(text, k) for text in texts for k in range(1, len(text))]
    return tuple({text[:k] for text, k in places}), tuple({text[k:] for text, k in places})
