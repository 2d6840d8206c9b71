"""The texts of a tokenizer's special tokens, and content that contains such a text.

A user may write "<|endoftext|>" in a message. That text must stay text: it must become neither a special token nor a part of the
template's scaffold. `SpecialTokens.escape` therefore replaces it by private-use characters before a template is rendered, and
returns a function that restores it.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

from sft.chat.rows import BadRow, Conversation
from sft.common.strings import map_strings, strings

PRIVATE_BLOCKS = (0xF0000, 0x100000)
"""Where the stand-ins begin. There are two blocks, because a row may contain characters of one of them."""
BLOCK_SIZE = 0x1000


class SpecialTokens:
    """The special-token texts, longest first, and patterns that find them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = sorted(texts, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")

    # Made when they are needed: a tokenizer may have thousands of special tokens, of which Python makes a pattern in half a second.
    @functools.cached_property
    def chain(self) -> re.Pattern[str]:
        """Special tokens with nothing between them."""
        return re.compile(f"(?:{self.pattern.pattern})+")

    @functools.cached_property
    def split(self) -> re.Pattern[str]:
        return re.compile(f"({self.pattern.pattern})")

    @property
    def can_overlap(self) -> bool:
        """Whether a text can contain two of them that share characters. Then occurrences cannot be counted."""
        ordered = sorted(set(self.texts))  # those that begin with a text are beside it
        known, lengths, starts = set(ordered), set(map(len, ordered)), {text[:1] for text in ordered}
        for text in ordered:
            for place in (i for i, character in enumerate(text) if character in starts):
                rest = text[place:]
                if place and any(other.startswith(rest) for other in ordered[bisect_left(ordered, rest) :][:1]):
                    return True
                if any(rest[:length] in known for length in lengths if length < len(rest)):
                    return True
        return False

    def count(self, text: str) -> int:
        return len(self.pattern.findall(text))

    def edge(self, text: str, position: int) -> int:
        """`position`, or the start of the token that it would cut."""
        longest = len(self.texts[0]) if self.texts else 0
        for token in self.pattern.finditer(text, max(0, position - longest)):
            if token.start() < position < token.end():
                return token.start()
        return position

    def ending(self, text: str, eos: str) -> str | None:
        """The special token that ends a turn. `text` begins with the turn's end.

        Reads the first special tokens that follow each other directly, and returns `eos` if it is one of them, otherwise the last
        of them. If more text follows and ends in a special token, returns that token. Returns None if there is no special token.
        """
        chain = self.chain.search(text)
        if chain is None:
            return None
        found = self.pattern.findall(chain.group())
        rest = text[chain.end() :].strip()
        if rest and rest != eos:
            tokens = self.pattern.findall(rest)
            if tokens and rest.endswith(tokens[-1]):
                return str(tokens[-1])
        return eos if eos in found else str(found[-1])

    def are_in(self, conversation: Conversation) -> bool:
        """Whether the conversation itself contains special-token text."""
        search = self.pattern.search
        return any(search(text) for text in strings([conversation.messages, conversation.tools], keys=True))

    def escape(self, conversation: Conversation) -> tuple[Conversation, Callable[[str], str]]:
        """The conversation with special-token text replaced by private-use characters, and the function that restores it.

        Raises BadRow when the conversation contains private-use characters of both blocks.
        """
        present = set("".join(strings([conversation.messages, conversation.tools], keys=True)))
        base = next((b for b in PRIVATE_BLOCKS if not any(b <= ord(char) < b + BLOCK_SIZE for char in present)), None)
        if base is None or len(self.texts) > BLOCK_SIZE:
            raise BadRow("special_text", "special-token text together with private-use characters of planes 15 and 16")
        stand_in = {text: chr(base + index) for index, text in enumerate(self.texts)}
        stand_ins = re.compile(f"[{chr(base)}-{chr(base + BLOCK_SIZE - 1)}]")

        def replace(text: str) -> str:
            return self.pattern.sub(lambda match: stand_in[match.group()], text)

        def restore(text: str) -> str:
            return stand_ins.sub(lambda match: self.texts[ord(match.group()) - base], text)

        escaped = Conversation(
            [map_strings(message, replace) for message in conversation.messages],
            conversation.train,
            map_strings(conversation.tools, replace),
            conversation.flagged,
            conversation.variables,
            conversation.empty_answers,
        )
        return escaped, restore
