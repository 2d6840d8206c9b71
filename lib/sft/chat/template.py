"""Chat templates: a conversation to text, and which parts of that text the model learns to emit.

In: a template by name (`sft.chat.named`), as a file of Jinja text, or the tokenizer's own. Out: `render(conversation)` returns runs
of text, untrained and trained in turn. The runs follow from the structure of the rendering: a named template has a table of turns; a
Jinja template is compiled with trace events (`sft.chat.trace`) at the top of its loop over the messages and at its {% generation %}
blocks, so its output says which message wrote which part. `sft.chat.learn` finds out how a template writes a turn,
`sft.chat.openings` finds where a message's own text begins, and `sft.chat.spans` computes what is trained of its part. The template's
text decides what a mask covers; content is only searched to reject a row of which something would be lost.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jinja2

from sft.chat.checks import THINKING_FIELDS, RowChecks, shown
from sft.chat.learn import check_generation_blocks, known_templates, learn_rules, observe, refuse, scaffold_tokens
from sft.chat.messages import renamed_roles
from sft.chat.named import NamedTemplate
from sft.chat.openings import Opening, Openings
from sft.chat.probe import RESERVED, TemplateProbe, TwoTurns
from sft.chat.rows import BadRow, Conversation
from sft.chat.spans import Graft, answer_end, before_gap, other_end, to_runs
from sft.chat.special_tokens import SpecialTokens
from sft.chat.trace import Span, Trace
from sft.chat.words import missing_text
from sft.common.errors import SftError

__all__ = ["JinjaTemplate", "Template", "TemplateOptions", "known_templates", "load_template"]

KWARGS = "chat_template_kwargs"
MOST_VARIANTS = 100
"""Combinations of variables of rows that are remembered."""


@dataclass(frozen=True)
class TemplateOptions:
    """What the recipe says about rendering; see the options of the same names in [prepare]."""

    date: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    generation_prefix: str = "prompt"
    history: str = "whole"


DEFAULT = TemplateOptions()


class Template(Protocol):
    """What the encoder needs of a template."""

    name: str
    text: str
    """The Jinja text, which is exported with the model."""
    specials: SpecialTokens
    """The texts that are special tokens to this template: those of the tokenizer, and added tokens that it writes as scaffold."""
    boundaries: str
    """'eos' when every document ends in the only EOS that it contains, else 'index'."""
    eos_appended: bool
    """The Jinja text writes no EOS, so `render` appends one."""
    terminators: list[str]
    """The special tokens that end an assistant's turn."""
    generation_prefix: str
    """What the generation prompt writes after the header of the turn, such as <think>."""
    needs_tools: bool
    """It fails for conversations without tools."""
    answers_without_prefix: int
    """Trained answers so far that did not begin with the generation prefix."""

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """Runs of text, untrained and trained in turn, and the number of special tokens in the scaffold. Raises BadRow."""
        ...

    def verbatim(self, conversation: Conversation) -> str:
        """What the Jinja text writes today, without anything that `render` adds."""
        ...

    def renamed_roles(self) -> dict[str, str]:
        """See `sft.chat.messages.renamed_roles`."""
        ...

    def field_of_thoughts(self) -> str:
        """The field of thoughts that the template reads, if it reads only one of the two."""
        ...

    def written_names(self) -> frozenset[tuple[str, str]]:
        """(field, role) of the names and ids that the template writes."""
        ...


def load_template(
    name: str,
    text: str | None,
    variables: Mapping[str, str],
    eos: str,
    specials: Sequence[str],
    added: Sequence[str] = (),
    options: TemplateOptions = DEFAULT,
) -> Template:
    """`text` is the Jinja text of a template that is not one of the named ones. `added`: tokens that are not declared special."""
    if text is None:
        return NamedTemplate(name, eos, specials)
    return JinjaTemplate(name, text, variables, eos, SpecialTokens(specials), added, options)


TAKES_TEXTS = (
    "{%- set taken = namespace(messages=[]) -%}{%- for message in messages -%}{%- if message.content is string -%}"
    "{%- set message = dict(message, content=[{'type': 'text', 'text': message.content}]) -%}{%- endif -%}"
    "{%- set taken.messages = taken.messages + [message] -%}{%- endfor -%}{%- set messages = taken.messages -%}{{ '' }}"
)
"""Goes before a template that only takes contents as lists of parts, so that an exported model can be asked with texts."""


class JinjaTemplate:
    """Any Hugging Face chat template. Probe conversations show once how it writes turns.

    Raises SftError for a template from which no correct mask can be derived.
    """

    takes_variables = True
    """Rows may have template variables of their own."""

    def __init__(
        self,
        name: str,
        text: str,
        variables: Mapping[str, str],
        eos: str,
        specials: SpecialTokens,
        added: Sequence[str] = (),
        options: TemplateOptions = DEFAULT,
    ) -> None:
        self.name, self.text, self.eos, self.options = name, with_defaults(text, options.variables), eos, options
        self.answers_without_prefix = 0
        self.variants: dict[str, JinjaTemplate] = {}  # the template with the variables of rows
        self.tokens = SpecialTokens([*specials.texts, *(text for text in added if text not in specials.texts)])
        try:
            self.probe = TemplateProbe(
                name, text, {**options.variables, **variables, "eos_token": eos}, self.tokens, options.date
            )
        except jinja2.TemplateError as error:
            raise SftError(f"prepare.template: {name}: {error}; next: correct the Jinja text") from None
        self.checks = RowChecks(self.probe)
        self._check_options()
        turns = observe(self.probe)
        if self.probe.way.content_as_parts:
            self.text = with_defaults(TAKES_TEXTS + text, options.variables)
        self.rules = learn_rules(self.probe, turns, specials, self.tokens, eos)
        self.specials = SpecialTokens([*specials.texts, *scaffold_tokens(self.probe, self.rules, SpecialTokens(added))])
        if len(self.specials.texts) > len(specials.texts):
            self.rules = learn_rules(self.probe, turns, self.specials, self.tokens, eos)
        self._use_rules(turns)

    def _use_rules(self, turns: TwoTurns) -> None:
        """Sets what follows from the rules."""
        eos = self.eos
        self.generation_prefix, self.needs_tools = self.rules.generation_prefix, self.probe.way.needs_tools
        self.terminators = list(self.rules.terminators)
        self.openings = Openings(self.probe, self.rules, self.specials, self.options.generation_prefix)
        if self.probe.has_generation:
            check_generation_blocks(self.probe, self.rules, turns.trace)
        number_of_eos = turns.trace.text.count(eos)
        self.eos_appended = number_of_eos == 0 and self.rules.appended != eos
        ends_in_eos = number_of_eos == 1 and turns.trace.text.endswith(eos)
        self.boundaries = "eos" if self.eos_appended or ends_in_eos else "index"

    def _check_options(self) -> None:
        """Refuses options that the template does not read, and a template that reads the day without one."""
        date, reads = self.options.date, self.probe.reads
        if "strftime_now" in reads and not date and self.probe.asks_for_day():
            refuse(
                self.probe,
                " writes the day on which it runs (strftime_now), so the data would depend on the day",
                'set [prepare] date = "2026-07-01", or another day, which every document then has',
            )
        if date and "strftime_now" not in reads:
            raise SftError(f"prepare.date: template {self.name} does not read the day; next: remove the option")
        for variable in self.options.variables:
            if variable in RESERVED or variable not in reads:
                why = "is set by the conversation" if variable in RESERVED else f"is not read by template {self.name}"
                raise SftError(f"prepare.template_variables: {variable} {why}; next: remove it or correct its name")

    def _with_variables(self, variables: Mapping[str, Any]) -> JinjaTemplate:
        """The template with a row's own variables. Raises BadRow for variables that it does not read, or under which it writes other
        turns than the rest of the data."""
        key = json.dumps(variables, sort_keys=True, default=str)
        if key in self.variants:
            return self.variants[key]
        for name in variables:
            if name in RESERVED or name in self.probe.variables.keys() - self.options.variables.keys():
                raise BadRow(KWARGS, f"{KWARGS}: {name} is not a variable that a row can set")
            if name not in self.probe.reads:
                raise BadRow(KWARGS, f"{KWARGS}: template {self.name} does not read {name}")
        made = copy.copy(self)
        made.probe, made.variants = self.probe.with_variables(variables), {}
        made.checks = RowChecks(made.probe)
        try:
            turns = observe(made.probe)
            made.rules = learn_rules(made.probe, turns, self.specials, self.tokens, self.eos)
        except SftError as error:
            raise BadRow(KWARGS, f"{KWARGS} {key}: {error}") from None
        made._use_rules(turns)
        if made.boundaries != self.boundaries or not set(made.terminators) <= set(self.terminators):
            raise BadRow(KWARGS, f"{KWARGS} {key}: template {self.name} ends turns in another way")
        if len(self.variants) < MOST_VARIANTS:
            self.variants[key] = made
        return made

    def renamed_roles(self) -> dict[str, str]:
        return renamed_roles(self.probe.writes_role)

    def field_of_thoughts(self) -> str:
        read = [name for name in THINKING_FIELDS if self.probe.writes_field(name, "assistant", True)]
        return read[0] if len(read) == 1 else ""

    def written_names(self) -> frozenset[tuple[str, str]]:
        return self.probe.written_names()

    def verbatim(self, conversation: Conversation) -> str:
        today = self.probe.with_variables({"strftime_now": datetime.datetime.now().strftime})
        return today.text(conversation.messages, conversation.tools)

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """`conversation` must contain no special-token text (see `SpecialTokens.escape`): every special token found is scaffold."""
        made = self._with_variables(conversation.variables) if conversation.variables else self
        before = made.answers_without_prefix
        try:
            rendered = made._render(conversation)
        except BadRow:
            again = made._render_with_thought(conversation) if self.options.history == "as-rendered" else None
            if again is None:
                raise
            rendered = again
        if made is not self:
            self.answers_without_prefix += made.answers_without_prefix - before
        return rendered

    def _render_with_thought(self, conversation: Conversation) -> tuple[list[str], int] | None:
        """Renders the last turn with its thought, for a template that drops the thought even there.

        Returns None if the last turn has no thought, or if the thought cannot be put back.
        """
        message, closing = conversation.messages[-1], self.rules.closing
        thought, answer = split_thought(message)
        if not thought or not closing or self.options.generation_prefix == "rendered" or message.get("tool_calls"):
            return None
        stand_in, messages = self.probe.replace_content(conversation, len(conversation.messages) - 1)
        messages[-1] = {"role": message["role"], "content": stand_in}
        without = copy.copy(conversation)
        without.messages = messages
        runs, _ = self._render(without)
        runs = [run.replace(closing + stand_in, thought + closing + answer) for run in runs]
        return (runs, sum(map(self.specials.count, runs))) if stand_in not in "".join(runs) else None

    def _render(self, conversation: Conversation) -> tuple[list[str], int]:
        trace = self.probe.trace(conversation.messages, conversation.tools)
        text = trace.text
        if self.boundaries == "eos" and text.find(self.eos) not in (-1, len(text) - len(self.eos)):
            raise BadRow("eos_inside", f"template {self.name} writes {self.eos} inside this conversation")
        self.checks.check_tools(conversation)
        self.checks.check_order(conversation, trace)
        spans: list[Span] = []
        grafts: dict[int, Graft] = {}
        for index, train in enumerate(conversation.train):
            self.checks.check_fields(conversation, index)
            if train:
                found, graft = self._trained(conversation, trace, index)
                spans += found
                if graft != ("", "") and found:
                    grafts[found[0][0]] = graft
        runs = to_runs(text, spans, grafts)
        if runs is None:
            raise BadRow("template", f"template {self.name} writes messages in another order than the row's")
        tools_move = conversation.tools is not None and self.checks.prompt_differs_with_tools()
        if self.rules.prompt_differs or tools_move or self.options.history == "as-rendered":
            self._begin_with_prompt(conversation, runs)
        self.checks.check_prompts(conversation, trace, "\n".join(runs[::2]))
        if (
            conversation.train[-1]
            and len(runs) % 2
            and runs[-1].strip() not in ("", self.eos, self.rules.last_gap.strip())
        ):
            del runs[-1]  # the header of a further turn, which is in no prompt
        is_open = conversation.train[-1] and text.endswith(self.rules.last_gap, spans[-1][1])
        runs = self._end(conversation, runs, is_open and len(text) - spans[-1][1] == len(self.rules.last_gap))
        return runs, sum(map(self.specials.count, runs))

    def _begin_with_prompt(self, conversation: Conversation, runs: list[str]) -> None:
        """Replaces what the template wrote before the first trained answer by the prompt for it, which may show another history."""
        first = conversation.train.index(True)
        prompt = self.probe.prompt(conversation.messages[:first], conversation.tools)
        if prompt is None or conversation.messages[first]["role"] != "assistant":
            return
        prefix = self.generation_prefix
        if prefix and prompt.endswith(prefix) and not runs[0].endswith(prefix):
            prompt = prompt.removesuffix(prefix)  # the answer has it, or goes without it
        runs[0] = prompt

    def _end(self, conversation: Conversation, runs: list[str], is_open: bool) -> list[str]:
        """The runs with the terminator and EOS that the template leaves out at the end. `is_open`: the last run is an answer."""
        last = conversation.messages[-1]
        if self.rules.appended and is_open and last["role"] == "assistant":
            answer = len(runs) - 1 - len(runs) % 2
            runs[answer] += self.rules.appended_to_calls if last.get("tool_calls") else self.rules.appended
        if self.boundaries == "eos" and not runs[-1].endswith(self.eos):
            runs = runs if len(runs) % 2 else [*runs, ""]
            runs[-1] += self.eos
        return runs

    def _trained(self, conversation: Conversation, trace: Trace, index: int) -> tuple[list[Span], Graft]:
        """The spans of a message that are trained, and what is inserted before them. Raises BadRow when they cannot be told from
        the structure, or do not say all that the message says."""
        message, text, regions = conversation.messages[index], trace.text, trace.regions.get(index, [])
        if len(regions) != 1:
            raise BadRow("template", f"message {index} is rendered {len(regions)} times by template {self.name}")
        if message["role"] == "assistant":
            opening = self.openings.of_answer(conversation, text, regions[0], index)
            self.answers_without_prefix += opening.lacks_prefix
        else:
            opening = self.openings.of_other(conversation, trace, index)
        end = self._end_of(conversation, text, regions[0], opening, index)
        spans = [(opening.at, end)]
        if self.probe.has_generation:
            blocks = trace.blocks.get(index, [])
            if not blocks:
                raise BadRow("template", f"message {index} is trained but is in no generation block of {self.name}")
            spans = [(max(a, opening.at), min(b, end)) for a, b in blocks if b > opening.at and a < end]
            if spans and self.rules.from_next:
                spans[-1] = (spans[-1][0], end)
            spans = joined(spans)
        written = "".join(text[a:b] for a, b in spans)
        missing = missing_text(written, message)
        if missing is not None:
            raise BadRow(
                "template", f"message {index}: template {self.name} leaves out {shown(missing)}{self._advice(message)}"
            )
        return spans, opening.graft

    def _advice(self, message: Mapping[str, Any]) -> str:
        thinks = any(message.get(name) for name in THINKING_FIELDS) or "</think>" in message["content"]
        return (
            ', which is a part of the answer; history = "as-rendered" trains each turn as the last one'
            if thinks
            else ""
        )

    def _end_of(self, conversation: Conversation, text: str, region: Span, opening: Opening, index: int) -> int:
        """Where what is trained of a message ends."""
        message, rules = conversation.messages[index], self.rules
        if message["role"] != "assistant":
            return other_end(text, opening.at, region[1], rules, self.specials, message)
        last = index == len(conversation.messages) - 1
        end = answer_end(text, opening.at, region, rules, self.specials, message)
        if end is None and last:
            region = (region[0], len(text))
            end = answer_end(text, opening.at, region, rules, self.specials, message)
        if end is None and rules.from_next and not last:
            following = self.specials.pattern.match(text, region[1])
            if following and following.group() in rules.terminators:
                return following.end()
        if end is None:
            return self._end_without_terminator(text, region, opening, last, message, index)
        rest = text[end : region[1]].strip()
        if rest and rest != rules.eos and not (last and rest == (rules.header + rules.generation_prefix).strip()):
            until = self.probe.prompt(conversation.messages[: index + 1], conversation.tools)
            if until is None or not until.startswith(text[:end]) or self._ends_with(conversation, index) != text[:end]:
                raise BadRow("template", f"message {index}: {rest[:40]!r} follows the terminator")
        return end

    def _ends_with(self, conversation: Conversation, index: int) -> str:
        """The text of the conversation up to a message, without what follows its terminator."""
        written = self.probe.text(conversation.messages[: index + 1], conversation.tools).rstrip()
        header = (self.rules.header + self.rules.generation_prefix).strip()
        return written.removesuffix(header).rstrip() if header else written

    def _end_without_terminator(
        self, text: str, region: Span, opening: Opening, last: bool, message: Mapping[str, Any], index: int
    ) -> int:
        rules = self.rules
        found = any(token in text[opening.at : region[1]] for token in rules.terminators)
        missing = missing_text(text[opening.at : region[1]], dict(message))
        if missing is not None:
            raise BadRow(
                "template", f"message {index}: template {self.name} leaves out {shown(missing)}{self._advice(message)}"
            )
        if found and not rules.from_next:
            raise BadRow(
                "template",
                f"message {index}: the model would stop before it has said all: {text[opening.at : region[1]][:60]!r}",
            )
        demanded = rules.last_terminator if last else rules.terminator
        if last and rules.appended and not found:
            return before_gap(text, opening.at, len(text), rules.last_gap)
        if demanded is not None:
            raise BadRow("template", f"message {index} ends without {demanded}: {text[opening.at : region[1]][-40:]!r}")
        return before_gap(text, opening.at, region[1], rules.gap)


def with_defaults(text: str, variables: Mapping[str, Any]) -> str:
    """The Jinja text with values for variables that are not given, so that an exported model is prompted as it was trained."""
    if not variables:
        return text
    defaults = "".join(
        f"{{% set {name} = {name} if {name} is defined else {json.dumps(value, ensure_ascii=False)} %}}"
        for name, value in sorted(variables.items())
    )
    return defaults + "{{ '' }}" + text  # the last part keeps a newline that the text may begin with


def split_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """What an answer thinks, without tags, and what it says; ("", content) without a thought."""
    content: str = message["content"]
    thought: str = message.get("reasoning_content") or message.get("thinking") or ""
    if not thought and "</think>" in content:
        thought, content = content.split("</think>", 1)
        thought = thought.lstrip().removeprefix("<think>").strip("\n")
        content = content.lstrip("\n")
    return thought, content


def joined(spans: Sequence[Span]) -> list[Span]:
    """The spans, with those that touch as one."""
    made: list[Span] = []
    for start, end in spans:
        if made and made[-1][1] == start:
            made[-1] = (made[-1][0], end)
        else:
            made.append((start, end))
    return made
