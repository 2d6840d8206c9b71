"""Chat templates: a conversation to text, and which parts of that text the model learns to emit.

In: a template by name (`sft.chat.named`), as a file of Jinja text, or the tokenizer's own. Out: `render(conversation)` returns runs
of text, untrained and trained in turn. Every conversation is rendered once. The runs follow from the structure of the rendering:
a named template has a table of turns; a Jinja template is compiled with trace events (`sft.chat.trace`) at the top of its loop over
the messages and at its {% generation %} blocks, so its output says which message wrote which part. `sft.chat.spans` computes what
is trained of a message's part. No text is ever searched for content, so no content can move a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jinja2

from sft.chat.named import NamedTemplate
from sft.chat.probe import TemplateProbe, TwoTurns
from sft.chat.rows import BadRow, Conversation
from sft.chat.spans import TurnRules, answer_spans, common_prefix, other_spans, to_runs
from sft.chat.special_tokens import SpecialTokens
from sft.chat.trace import Span, Trace
from sft.common.errors import SftError
from sft.recipe.chat_templates import TEMPLATES

# A template that does not know these fields of a message silently leaves them out.
FIELDS = ("functions", "function_calls", "tool_calls", "reasoning_content", "thinking")
THINKING_FIELDS = ("reasoning_content", "thinking")
SYSTEM_ROLES = ("system", "developer")


class Template(Protocol):
    """What the encoder needs of a template."""

    name: str
    text: str
    """The Jinja text, which is exported with the model."""
    boundaries: str
    """'eos' when every document ends in the only EOS that it contains, else 'index'."""
    eos_appended: bool
    """The Jinja text writes no EOS, so `render` appends one."""
    terminators: list[str]
    """The special tokens that end an assistant's turn."""
    generation_prefix: str
    """What the generation prompt writes after the header of the turn, such as <think>."""
    answers_without_prefix: int
    """Trained answers so far that did not begin with the generation prefix."""

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """Runs of text, untrained and trained in turn, and the number of special tokens in the scaffold. Raises BadRow."""
        ...


def load_template(
    name: str, text: str | None, variables: Mapping[str, str], eos: str, specials: SpecialTokens
) -> Template:
    """`text` is the Jinja text of a template that is not one of the named ones."""
    if text is None:
        return NamedTemplate(name, eos, specials.texts)
    return JinjaTemplate(name, text, variables, eos, specials)


def known_templates() -> list[str]:
    return sorted(TEMPLATES)


class JinjaTemplate:
    """Any Hugging Face chat template. A probe conversation shows once how it writes turns.

    Raises SftError for a template from which no correct mask can be derived.
    """

    def __init__(self, name: str, text: str, variables: Mapping[str, str], eos: str, specials: SpecialTokens) -> None:
        self.name, self.text, self.eos, self.specials = name, text, eos, specials
        self.answers_without_prefix = 0
        self.writes: dict[tuple[str, str, bool], bool] = {}  # what the probe found out about fields
        try:
            self.probe = TemplateProbe(name, text, variables)
        except jinja2.TemplateError as error:
            raise SftError(f"prepare.template: {name}: {error}; next: correct the Jinja text") from None
        try:
            turns = self.probe.two_turns()
        except BadRow as error:
            raise self._refusal(
                f" cannot render a plain two-turn conversation: {error.detail}",
                f"use a template that can, or choose one of {', '.join(known_templates())}",
            ) from None
        self.rules = self._learn_rules(turns)
        self.generation_prefix = self.rules.generation_prefix
        self.terminators = list(self.rules.terminators)
        if self.probe.has_generation:
            self._check_generation_blocks(turns.trace)
        number_of_eos = turns.trace.text.count(eos)
        self.eos_appended = number_of_eos == 0
        ends_in_eos = number_of_eos == 1 and turns.trace.text.endswith(eos)
        self.boundaries = "eos" if self.eos_appended or ends_in_eos else "index"

    def _refusal(self, fault: str, advice: str) -> SftError:
        return SftError(f"prepare.template: {self.name}{fault}; next: {advice}")

    def _learn_rules(self, turns: TwoTurns) -> TurnRules:
        """The header, the generation prefix and the terminators."""
        trace = turns.trace
        for index in (1, 3):
            if len(trace.regions.get(index, [])) != 1 or turns.contents[index] not in trace.region_text(index):
                raise self._refusal(
                    f" does not write assistant message {index} once, from a loop over the messages at its top level, so no mask can"
                    " be derived from it",
                    f"write such a loop, or choose one of {', '.join(known_templates())}",
                )
        (before, after), (last_before, _) = (
            trace.region_text(index).split(turns.contents[index], 1) for index in (1, 3)
        )
        after_last = trace.text.split(turns.contents[3], 1)[1]
        prompt = self._prompt(turns)
        # Scaffold is what the generation prompt gives, but only as far as the turns really begin with it: a thinking prompt may
        # go on with <think>, which the data spells out. Without a prompt nothing is scaffold.
        header = common_prefix([prompt, before, last_before]) if prompt else ""
        if prompt and not header:
            raise self._refusal(
                f" opens an answer with {prompt!r} when prompted, but writes {before!r} before an answer in the history, so the trained"
                " text would not be what the model is asked for",
                "make the two equal",
            )
        terminator, last_terminator = self.specials.last_in_chain(after), self.specials.last_in_chain(after_last)
        if last_terminator is None:
            raise self._refusal(
                " writes no special token after the last answer, so the model would never learn to stop",
                "end assistant turns with {{ eos_token }} or the tokenizer's end-of-turn token",
            )
        found = {terminator, last_terminator, self._terminator_of_calls()}
        return TurnRules(
            header=header,
            generation_prefix=prompt[len(header) :],
            terminator=terminator,
            last_terminator=last_terminator,
            terminators=tuple(sorted(token for token in found if token)),
            gap=after if terminator is None else "",
            eos=self.eos,
        )

    def _prompt(self, turns: TwoTurns) -> str:
        """What the generation prompt adds to a question."""
        without, asked = turns.asked
        shared = len(common_prefix([without, asked]))
        for token in self.specials.pattern.finditer(asked):
            if token.start() < shared < token.end():  # both go on with special tokens that begin alike
                shared = token.start()
        return asked[shared:]

    def _terminator_of_calls(self) -> str | None:
        """The token that ends a turn of tool calls, which may be another than the one that ends an answer."""
        written = self.probe.turn_of_calls().rstrip()
        found = self.specials.pattern.findall(written)
        return found[-1] if found and written.endswith(found[-1]) else None

    def _check_generation_blocks(self, trace: Trace) -> None:
        """Refuses {% generation %} blocks that contain the header or miss the terminator."""
        for index, terminator in ((1, self.rules.terminator), (3, self.rules.last_terminator)):
            blocks = trace.blocks.get(index, [])
            header_end = trace.regions[index][0][0] + len(self.rules.header)
            if not blocks:
                raise self._refusal(f": no {{% generation %}} block in assistant message {index}", "add it")
            if blocks[0][0] < header_end:
                raise self._refusal(
                    f": the {{% generation %}} block begins with {trace.text[blocks[0][0] : header_end]!r}, which the generation"
                    " prompt already writes",
                    "move it behind the header",
                )
            if terminator is not None and terminator not in trace.text[slice(*blocks[-1])]:
                raise self._refusal(
                    f": the {{% generation %}} block ends before the terminator {terminator!r}, so the model would never learn to stop",
                    "move {% endgeneration %} behind it",
                )

    def render(self, conversation: Conversation) -> tuple[list[str], int]:
        """`conversation` must contain no special-token text (see `SpecialTokens.escape`): every special token found is scaffold."""
        trace = self.probe.trace(conversation.messages, conversation.tools)
        text, specials = trace.text, self.specials.count(trace.text)
        if self.boundaries == "eos" and text.find(self.eos) not in (-1, len(text) - len(self.eos)):
            raise BadRow("eos_inside", f"template {self.name} writes {self.eos} inside this conversation")
        self._check_tools(conversation)
        self._check_order(conversation, trace)
        spans: list[Span] = []
        for index, train in enumerate(conversation.train):
            self._check_fields(conversation, index)
            if train:
                spans += self._trained_spans(conversation, trace, index)
            else:
                self._check_written(conversation, trace, index)
        runs = to_runs(text, spans)
        if runs is None:
            raise BadRow("template", f"template {self.name} writes messages in another order than the row's")
        if "".join(runs) != text:
            raise BadRow("proof", f"the runs of template {self.name} are not the text that it rendered")
        if self.boundaries == "eos" and not text.endswith(self.eos):
            specials += 1
            runs = runs if len(runs) % 2 else [*runs, ""]
            runs[-1] += self.eos
        return runs, specials

    def _check_order(self, conversation: Conversation, trace: Trace) -> None:
        """Raises BadRow when the template writes messages in another order; system messages may be anywhere."""
        end = 0
        for index, message in enumerate(conversation.messages):
            regions = trace.regions.get(index, [])
            if regions and message["role"] not in SYSTEM_ROLES:
                if regions[0][0] < end:
                    raise BadRow("template", f"template {self.name} writes messages in another order than the row's")
                end = regions[-1][1]

    def _check_tools(self, conversation: Conversation) -> None:
        if not conversation.tools:
            return
        with_system = any(message["role"] == "system" for message in conversation.messages)
        key = ("tools", "", with_system)
        if key not in self.writes:
            self.writes[key] = self.probe.writes_tools(with_system)
        if not self.writes[key]:
            raise BadRow("template", f"tools: template {self.name} leaves it out, or leaves out the content beside it")

    def _check_fields(self, conversation: Conversation, index: int) -> None:
        """Raises BadRow when the template leaves out a field of the message. Thinking only counts where it is trained."""
        message = conversation.messages[index]
        if len(message) == 2:
            return
        for field in FIELDS:
            if field not in message or (field in THINKING_FIELDS and not conversation.train[index]):
                continue
            key = (field, message["role"], bool(message["content"]))
            if key not in self.writes:
                self.writes[key] = self.probe.writes_field(*key)
            if not self.writes[key]:
                raise BadRow(
                    "template",
                    f"message {index}: {field}: template {self.name} leaves it out, or leaves out the content beside it",
                )

    def _check_written(self, conversation: Conversation, trace: Trace, index: int) -> None:
        """Raises BadRow when the template leaves out an untrained message that says something."""
        message = conversation.messages[index]
        is_silent = not message["content"] and len(message) == 2
        if not trace.regions.get(index) and message["role"] not in SYSTEM_ROLES and not is_silent:
            raise BadRow("template", f"message {index} is not rendered by template {self.name}")

    def _trained_spans(self, conversation: Conversation, trace: Trace, index: int) -> list[Span]:
        """The spans of a message that are trained. Raises BadRow when they cannot be told from the structure."""
        message, text, regions = conversation.messages[index], trace.text, trace.regions.get(index, [])
        if len(regions) != 1:
            raise BadRow("template", f"message {index} is rendered {len(regions)} times by template {self.name}")
        start, end = regions[0]
        last = index == len(conversation.messages) - 1
        if last:
            end = len(text)
        if not self.probe.has_generation:
            blocks = [(self._opening(conversation, text, (start, end), index), end)]
        elif not (blocks := trace.blocks.get(index, [])):
            raise BadRow("template", f"message {index} is trained but is in no generation block of {self.name}")
        if message["role"] == "assistant":
            after_header = start + len(self.rules.header)
            if self.generation_prefix and not text.startswith(self.generation_prefix, after_header):
                self.answers_without_prefix += 1
            spans = answer_spans(text, blocks, after_header, self.rules, self.specials, last, index)
        else:
            spans = other_spans(text, blocks, self.rules, self.specials, index)
        written = "".join(text[a:b] for a, b in spans)
        has_calls = bool(message.get("tool_calls") or message.get("function_calls"))
        if not self.specials.pattern.sub("", written).strip() and (message["content"].strip() or has_calls):
            raise BadRow("template", f"message {index}: template {self.name} writes nothing of what it says")
        return spans

    def _opening(self, conversation: Conversation, text: str, region: Span, index: int) -> int:
        """Where the model's own text begins in a message: after the header of its turn."""
        start, end = region
        if conversation.messages[index]["role"] != "assistant":
            header = self.probe.header(conversation, index)
            if not text.startswith(header, start):
                raise BadRow("template", f"message {index} does not begin with {header!r}")
            return start + len(header)
        opening = start + len(self.rules.header)
        special = self.specials.pattern.match(text, opening, end)
        if text.startswith(self.rules.header, start) and not (special and special.group() not in self.terminators):
            return opening
        # A turn that opens differently, for example after a tool's result: the prompt for this very turn shows where it begins.
        prompt = self.probe.text(conversation.messages[:index], conversation.tools, prompt=True)
        if not text.startswith(prompt):
            prompt = prompt.removesuffix(self.generation_prefix)
        if not text.startswith(prompt):
            raise BadRow(
                "template",
                f"message {index} opens with {text[start : start + 40]!r}, but the prompt for it ends in {prompt[-40:]!r}",
            )
        return max(start, len(prompt))
