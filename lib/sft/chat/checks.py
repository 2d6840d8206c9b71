"""Rejects rows that a Jinja template does not write completely, or writes in another order.

In: a conversation and the `Trace` of its rendering. Out: nothing, or BadRow with what is missing. What an answer leaves out is checked
where its spans are computed, in `sft.chat.template`.
"""

from __future__ import annotations

from sft.chat.probe import ANSWER, SAID, TemplateProbe, made_up_tools
from sft.chat.rows import BadRow, Conversation, Message
from sft.chat.trace import Trace
from sft.chat.words import WORD, missing_text, missing_words, tool_texts
from sft.recipe.schema import ROLES

# A template that does not know these fields of a message silently leaves them out.
FIELDS = ("functions", "function_calls", "tool_calls", "reasoning_content", "thinking")
THINKING_FIELDS = ("reasoning_content", "thinking")
SYSTEM_ROLES = ("system", "developer")
MOST_ANSWERS = 10_000
"""Answers of the probe that are remembered."""
SHOWN = 60


class RowChecks:
    """The checks of one template."""

    def __init__(self, probe: TemplateProbe) -> None:
        self.probe = probe
        self.writes: dict[tuple[str, str, bool], bool] = {}  # what the probe found out about fields and contents
        self.own_words = ""

    def prompt_differs_with_tools(self) -> bool:
        """Whether the template writes something else before an answer than in the prompt for it when there are tools."""
        key = ("prompt", "", True)
        if key not in self.writes:
            question, answer = {"role": "user", "content": SAID}, {"role": "assistant", "content": ANSWER}
            prompt = self.probe.prompt([question], made_up_tools()) or ""
            try:
                text = self.probe.text([question, answer], made_up_tools())
            except BadRow:
                text = ""
            before = text.partition(ANSWER)[0]
            self.writes[key] = (
                SAID in prompt and SAID in before and prompt.partition(SAID)[0] != before.partition(SAID)[0]
            )
        return self.writes[key]

    def check_order(self, conversation: Conversation, trace: Trace) -> None:
        """Raises BadRow when the template writes messages in another order; system messages may be anywhere."""
        end = 0
        for index, message in enumerate(conversation.messages):
            regions = trace.regions.get(index, [])
            if regions and message["role"] not in SYSTEM_ROLES:
                if regions[0][0] < end:
                    raise BadRow(
                        "template", f"template {self.probe.name} writes messages in another order than the row's"
                    )
                end = regions[-1][1]

    def check_tools(self, conversation: Conversation) -> None:
        if not conversation.tools:
            return
        with_system = any(message["role"] == "system" for message in conversation.messages)
        key = ("tools", "", with_system)
        if key not in self.writes:
            self.writes[key] = self.probe.writes_tools(with_system)
        if not self.writes[key]:
            raise BadRow(
                "template", f"tools: template {self.probe.name} leaves it out, or leaves out the content beside it"
            )

    def check_fields(self, conversation: Conversation, index: int) -> None:
        """Raises BadRow when the template leaves out a field of the message. Thinking only counts where it is trained."""
        message = conversation.messages[index]
        if len(message) == 2:
            return
        self._check_calls(message, index, bool(conversation.tools))
        for name in FIELDS:
            if name not in message or (name in THINKING_FIELDS and not conversation.train[index]):
                continue
            key = (name, message["role"], bool(message["content"]))
            if not self._writes_field(key, bool(conversation.tools)):
                raise BadRow(
                    "template",
                    f"message {index}: {name}: template {self.probe.name} leaves it out, or leaves out the content beside it",
                )

    def _writes_field(self, key: tuple[str, str, bool], with_tools: bool) -> bool:
        """What the probe says about a field. Some templates write calls only where there are tools."""
        known = (f"{key[0]} {with_tools}", *key[1:])
        if known not in self.writes:
            self.writes[known] = self.probe.writes_field(*key, with_tools)
        return self.writes[known]

    def _check_calls(self, message: Message, index: int, with_tools: bool) -> None:
        """Raises BadRow when the template writes only one of several calls."""
        if len(message.get("tool_calls") or ()) < 2:
            return
        key = (f"two calls {with_tools}", "", bool(message["content"]))
        if key not in self.writes:
            self.writes[key] = self.probe.writes_two_calls(key[2], with_tools)
        if not self.writes[key]:
            raise BadRow(
                "template", f"message {index}: template {self.probe.name} leaves out a call where there are several"
            )

    def check_prompts(self, conversation: Conversation, trace: Trace, untrained: str) -> None:
        """Raises BadRow when the template leaves out something of an untrained message or of the tools. What an untrained answer
        thought may be left out, as it is at inference."""
        for index, message in enumerate(conversation.messages):
            if conversation.train[index]:
                continue
            regions = trace.regions.get(index, [])
            written = "\n".join(trace.text[slice(*region)] for region in regions) if regions else untrained
            thinking = message["role"] != "assistant"
            missing = missing_text(written, message, thinking)
            is_own = bool(regions) and missing is None
            if missing is not None and regions:
                missing = missing_text(untrained, message, thinking)
            if missing is None and not self._is_written(conversation, index, is_own):
                missing = message["content"]
            if missing is not None:
                answers = "\n".join(trace.region_text(i) for i, train in enumerate(conversation.train) if train)
                is_inside = regions == [] and missing_text(answers, message, thinking) is None
                fault = f"writes {shown(missing)} inside an answer" if is_inside else f"leaves out {shown(missing)}"
                raise BadRow("template", f"message {index} ({message['role']}): template {self.probe.name} {fault}")
        lost = missing_words(untrained, tool_texts(conversation.tools)) if conversation.tools else None
        if lost is not None:
            raise BadRow("template", f"tools: template {self.probe.name} leaves out {shown(lost)}")

    def _is_written(self, conversation: Conversation, index: int, is_own: bool) -> bool:
        """Whether the template writes the content of a message that is in the text. `is_own`: in the message's own part of it.

        A content elsewhere, or one that the template's own text contains, may stand there by chance: the template is asked whether it
        writes another content in its place. The answer is remembered for conversations of the same roles.
        """
        content = conversation.messages[index]["content"].strip()
        if not content or (is_own and f" {' '.join(content.split())} " not in self.scaffold()):
            return True
        roles = ",".join(message["role"] for message in conversation.messages)
        key = (f"content {index}", roles, bool(conversation.tools))
        if key not in self.writes:
            if len(self.writes) > MOST_ANSWERS:
                self.writes.clear()
            self.writes[key] = self.probe.writes_content(conversation, index)
        return self.writes[key]

    def scaffold(self) -> str:
        """The words that the template writes around the contents of a plain conversation, with a space before and after each."""
        if not self.own_words:
            texts = [trace.text for _, trace in self.probe.conversations()]
            words = WORD.findall(" ".join([*texts, *ROLES]))
            self.own_words = (
                f" {' '.join(word for word in words if len(word) > 1)} "  # contents of the probe have one letter
            )
        return self.own_words


def shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
