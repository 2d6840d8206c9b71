"""The names of columns and message fields: those that prepare reads, and those that carry no training content. Standard library only.

Every other field of a row that holds something makes prepare refuse the source, until the recipe names it in the source's `ignore`.
So does a field of the second kind that holds more than such a field does: a long text, bytes, or an object with other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLAGS = ("train", "weight", "loss", "loss_mask", "trainable", "training", "masked", "label", "train_on_turn")
"""Whether a message is trained. `masked` says the opposite of the others. In a column they are a list with one flag for each message."""
THINKING = ("reasoning_content", "thinking", "reasoning", "reasoning_details")
MESSAGE_FIELDS = frozenset(
    (
        "role", "content", "from", "value", "name", "functions", "function_calls", "function_call", "tool_calls", "tool_call_id", "refusal",
        "train_detail", *THINKING, *FLAGS,
    )
)  # fmt: skip
"""The fields of a message that are read."""
PART_FIELDS = frozenset(("type", "text"))
DETAIL_FIELDS = frozenset(("type", "text", "format", "id", "index", "signature"))
CALL_FIELDS = frozenset(("id", "type", "function", "name", "arguments"))
FUNCTION_FIELDS = frozenset(("name", "arguments"))
"""The fields of content parts, of reasoning_details (its signature is the provider's), of tool calls and of their functions that are read."""

HARMLESS: dict[str, tuple[str, ...]] = {
    "identifiers": (
        "_id", "conversation_id", "guid", "id", "idx", "index", "message_id", "parent_id", "row", "row_idx", "signature", "turn",
        "turn_identifier", "uid", "user_id", "uuid", "unnamed", "unnamed: 0", "__index_level_0__",
    ),
    "origin and kind": (
        "categories", "category", "data_source", "dataset", "dataset_name", "dataset_source", "domain", "domains", "license", "meta", "metadata",
        "origin", "original_dataset", "provenance", "source", "source_dataset", "source_file", "split", "subdomain", "subset", "tags",
        "source_url", "task_category", "task_name", "task_type", "topic", "topics", "url", "urls",
    ),
    "scores and labels": (
        "complexity", "confidence", "deleted", "detoxify", "detoxify_moderation", "difficulty", "downvotes", "flagged", "grade",
        "helpfulness", "is_correct", "is_safe", "level", "likes", "logprob", "logprobs", "moderation", "openai_moderation", "perplexity", "ppl",
        "quality", "rank", "rating", "ratings", "redacted", "review_result", "reward", "rewards", "score", "scores", "synthetic", "toxic",
        "toxicity", "upvotes", "verified", "votes",
    ),
    "languages and places": ("accept-language", "country", "hashed_ip", "header", "lang", "language", "languages", "locale"),
    "times": ("created", "created_at", "created_date", "create_time", "date", "datetime", "time", "timestamp", "update_time", "updated_at"),
    "models and sampling": (
        "engine", "finish_reason", "generated_by", "generator", "max_tokens", "model", "model_name", "models", "provider", "stop_reason",
        "system_fingerprint", "teacher", "temperature", "top_p", "usage", "user-agent",
    ),
    "counts": (
        "char_count", "completion_tokens", "length", "n_tokens", "n_turns", "prompt_tokens", "review_count", "token_count", "total_tokens",
        "word_count",
    ),
    "hashes": ("checksum", "hash", "md5", "sha1", "sha256"),
    "annotators": ("annotator", "annotators", "labeler", "reviewer", "worker"),
    "hints for servers": ("cache_control", "parallel_tool_calls"),
}  # fmt: skip
"""Columns, and fields of messages, that carry no training content, by kind. Capitals do not matter."""
HARMLESS_CHARACTERS = 200
"""The texts in a harmless field have no more characters together."""
MEDIA = (
    "attachment", "audio", "clip", "document", "figure", "file", "image", "img", "media", "pdf", "photo", "picture", "screenshot", "speech",
    "thumbnail", "video",
)  # fmt: skip
"""A name with one of these words may point to content. It is harmless only if HARMLESS has it."""
HARMLESS_ENDINGS = (
    "_count",
    "_date",
    "_hash",
    "_id",
    "_lang",
    "_language",
    "_score",
    "_scores",
    "_timestamp",
    "_uuid",
)
HARMLESS_BEGINNINGS = ("num_",)
"""Columns only: a field of a message has a name that HARMLESS has."""
_HARMLESS = frozenset(name for names in HARMLESS.values() for name in names)


def is_harmless(name: str) -> bool:
    """Whether a field of this name is known to carry no training content. A field of messages is named <column>.<field>."""
    inside, _, name = name.lower().rpartition(".")
    if name in _HARMLESS:
        return True
    return (
        not inside and not has_media(name) and (name.endswith(HARMLESS_ENDINGS) or name.startswith(HARMLESS_BEGINNINGS))
    )


def has_media(name: str) -> bool:
    """Whether a name, in small letters, has a word for content that is not text."""
    return any(word in name for word in MEDIA)


def is_short(value: Any) -> bool:
    """Whether a harmless field may hold this: a number, a date, a short text, or lists and objects of them whose fields are harmless."""
    return _room_left(value, HARMLESS_CHARACTERS) >= 0


def _room_left(value: Any, room: int) -> int:
    """The characters that are left after a value; -1 for a value that is not short."""
    if isinstance(value, str):
        return max(-1, room - len(value))
    if isinstance(value, Mapping):
        for name, held in value.items():
            is_text = isinstance(held, (str, list, tuple, Mapping)) and bool(held)
            if not isinstance(name, str) or (has_media(name.lower()) if not is_text else not is_harmless(name)):
                return -1
            room = _room_left(held, room)
    elif isinstance(value, (list, tuple)):
        for held in value:
            room = _room_left(held, room)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        return -1
    return room


def describe() -> list[str]:
    """Lines for `make fields`."""
    lines = [f"   {kind:24} {', '.join(names)}" for kind, names in HARMLESS.items()]
    endings = ", ".join(f"*{ending}" for ending in HARMLESS_ENDINGS)
    beginnings = ", ".join(f"{beginning}*" for beginning in HARMLESS_BEGINNINGS)
    return [*lines, f"   {'names like':24} {endings}, {beginnings}"]
