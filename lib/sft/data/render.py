"""Rows to rendered documents: `Renderer.render` turns each row into a conversation and renders it once.

In: rows of a source. Out: a `RenderedBatch`: runs of text, untrained and trained in turn. A row that cannot be used becomes a reject.
Special-token text in a message is kept as text, is turned into the token, or rejects the row, as `prepare.special_text` says.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from sft.chat.details import DETAIL, PlacedRange, place
from sft.chat.rows import BadRow, Conversation
from sft.chat.skeleton import Skeletons
from sft.chat.special_tokens import BLOCK_SIZE, PRIVATE_BLOCKS, SpecialTokens
from sft.chat.template import JinjaTemplate, Template
from sft.data.batch import Fault, RenderedBatch, conversation_hashes
from sft.data.normalization import Normalizer
from sft.recipe.schema import Prepare

TOO_DEEP = Fault("bad_value", "nested too deeply")
WHOLE = -1
"""A document that trains all that its row trains."""
Read = Callable[[Any], Conversation]
"""Reads a row. Raises BadRow."""


class Renderer:
    """One template and the recipe's rule for special-token text. `byte_level` says whether the tokenizer can keep such text;
    `normalizer` says how the tokenizer spells texts."""

    def __init__(
        self, prepare: Prepare, template: Template, specials: SpecialTokens, byte_level: bool, normalizer: Normalizer
    ) -> None:
        self.template, self.specials, self.byte_level, self.normalizer = template, specials, byte_level, normalizer
        self.special_text, self.system = prepare.special_text, prepare.system
        self.skeletons = Skeletons(template) if isinstance(template, JinjaTemplate) else None
        self.takes_variables = getattr(template, "takes_variables", False)
        self.turn_by_turn = prepare.history == "as-rendered"
        # Every occurrence of a special token's text becomes that token, unless two of them can overlap.
        self.countable = not specials.can_overlap
        # Named templates write the same scaffold whatever the content is. Jinja text may look at the content, so it must not see
        # special-token text that it could take for its own.
        self.escapes_first = self.special_text != "token" and (
            isinstance(template, JinjaTemplate) or not self.countable
        )

    def render(self, rows: Sequence[Any], read: Read) -> RenderedBatch:
        """The rows' documents, without the byte layout (`RenderedBatch.lay_out`)."""
        hashes, groups = [0] * len(rows), [0] * len(rows)
        batch = RenderedBatch(rows, hashes=hashes, groups=groups, held=[None] * len(rows), normalizer=self.normalizer)
        before = self.template.answers_without_prefix
        for index, row in enumerate(rows):
            first = len(batch.runs)
            try:
                conversation = read(row)
                batch.held[index] = conversation.held
                if conversation.variables and not self.takes_variables:
                    raise BadRow("chat_template_kwargs", f"template {self.template.name} takes no variables of rows")
                batch.hashes[index], batch.groups[index] = conversation_hashes(conversation.messages, self.system)
                turns = trained_turns(conversation) if self.turn_by_turn else (WHOLE,)
                for turn in turns:
                    runs, num_specials = self._render(batch, conversation, turn)
                    batch.runs.append(runs)
                    batch.num_specials.append(num_specials)
            except (BadRow, RecursionError) as error:
                del batch.runs[first:], batch.num_specials[first:]
                batch.escaped = {document: found for document, found in batch.escaped.items() if document < first}
                batch.ranges = {document: found for document, found in batch.ranges.items() if document < first}
                fault = Fault(error.reason, error.detail) if isinstance(error, BadRow) else TOO_DEEP
                batch.reject(index, *fault)
                continue
            batch.rows += [index] * len(turns)
            batch.turns += turns
            batch.empty_answers += [conversation.empty_answers, *[0] * (len(turns) - 1)]
        batch.answers_without_prefix = self.template.answers_without_prefix - before
        return batch

    def _render(self, batch: RenderedBatch, conversation: Conversation, turn: int) -> tuple[list[str], int]:
        if turn != WHOLE:
            conversation = until(conversation, turn)
        runs, num_specials = self._render_whole(batch, conversation)
        if any(conversation.train[index] for index in conversation.details):
            batch.ranges[len(batch.runs)] = self._place(conversation, runs)
        return runs, num_specials

    def _place(self, conversation: Conversation, runs: Sequence[str]) -> list[PlacedRange]:
        """Where the ranges of the row's train_detail are. Raises BadRow."""
        if not self.byte_level:
            raise BadRow(DETAIL, f"{DETAIL}: the tokens of this tokenizer have no fixed bytes, so ranges have no place")
        indexes = [index for index in conversation.details if conversation.train[index]]
        present = set("".join(runs))
        free = (chr(code) for code in range(PRIVATE_BLOCKS[1] + BLOCK_SIZE, 0x110000) if chr(code) not in present)
        marks = "".join(itertools.islice(free, len(indexes)))
        marked = copy.copy(conversation)
        marked.messages = list(map(dict, conversation.messages))
        for index, mark in zip(indexes, marks, strict=True):
            marked.messages[index]["content"] = mark
        before = self.template.answers_without_prefix
        if self.escapes_first and self.specials.are_in(marked):
            escaped, restore = self.specials.escape(marked)
            written = list(map(restore, self.template.render(escaped)[0]))
        else:
            written = self.template.render(marked)[0]
        self.template.answers_without_prefix = before
        contents = [conversation.messages[index]["content"] for index in indexes]
        placed = place(runs, written, marks, contents, [conversation.details[index] for index in indexes])
        if placed is None:
            raise BadRow(
                DETAIL,
                f"message {indexes[0]}: {DETAIL}: template {self.template.name} does not write the content as it is, so its ranges have no place",
            )
        return placed

    def _render_whole(self, batch: RenderedBatch, conversation: Conversation) -> tuple[list[str], int]:
        if self.skeletons is not None and (rendered := self.skeletons.render(conversation)) is not None:
            return rendered
        if self.escapes_first and self.specials.are_in(conversation):
            return self.render_escaped(batch, conversation, len(batch.runs))
        return self.template.render(conversation)

    def render_escaped(self, batch: RenderedBatch, conversation: Conversation, document: int) -> tuple[list[str], int]:
        """Renders with special-token text escaped, and stores in the batch how to restore it. Returns the restored runs, and the
        number of special tokens in the scaffold. Raises BadRow where such text is refused."""
        if self.special_text == "reject":
            raise BadRow("special_text", "special-token text in the content")
        if not self.byte_level:
            raise BadRow(*SPECIAL_TEXT_LOST)
        escaped, restore = self.specials.escape(conversation)
        runs, num_specials = self.template.render(escaped)
        batch.escaped[document] = (runs, restore)
        return list(map(restore, runs)), num_specials


def trained_turns(conversation: Conversation) -> list[int]:
    """The messages of a conversation that are trained."""
    return [index for index, train in enumerate(conversation.train) if train]


def until(conversation: Conversation, turn: int) -> Conversation:
    """The conversation up to a message. Only that message is trained."""
    made = copy.copy(conversation)
    made.messages = conversation.messages[: turn + 1]
    made.train = [False] * turn + [True]
    made.details = {index: spans for index, spans in conversation.details.items() if index == turn}
    return made


SPECIAL_TEXT_LOST = Fault(
    "special_text", "special-token text in the content, which this kind of tokenizer cannot keep as text"
)
