"""What the files of a tokenizer folder must agree about: tokens that only one of them has, or has with another id.

In: the files' contents. Out: SftError that names the file, the field and the token. transformers adds a token that tokenizer.json
lacks with a new id, and a base has no row for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sft.common.errors import SftError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def check_ids(tokenizer: Tokenizer, content: Mapping[str, Any], file: Path) -> None:
    """Raises SftError for a tokenizer.json that gives random ids, or other ids than it says."""
    if dropout := content["model"].get("dropout"):
        raise SftError(f"{file}: model.dropout = {dropout}: ids would be random; next: set it to null")
    for token in content.get("added_tokens") or ():
        text, id = token["content"], token["id"]
        if (given := tokenizer.token_to_id(text)) != id or tokenizer.id_to_token(id) != text:
            found = f"gives it {given}" if given != id else f"reads that id as {tokenizer.id_to_token(id)!r}"
            raise SftError(
                f"{file}: added_tokens: {text!r} has the id {id}, and tokenizers {found}: ids go on after the vocabulary,"
                " each once; next: correct the ids, or fetch the file again"
            )


def check_tokens(tokenizer: Tokenizer, configs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises SftError for a token of a configuration that is not in tokenizer.json. `configs` are those that transformers reads."""
    for file, config in configs.items():
        for field, text, wanted in _tokens(config):
            id = tokenizer.token_to_id(text)
            if id is None or wanted not in (None, str(id)):
                what = f"{field}: {text!r}" + (f" with the id {wanted}" if wanted else "")
                has = "is not a token" if id is None else f"has the id {id}"
                raise SftError(f"{file}: {what} {has} of tokenizer.json; next: correct it, or remove it there")


def by_id(ids: Mapping[str, Any]) -> dict[str, Any]:
    """added_tokens.json as the newer field of tokenizer_config.json."""
    return {"added_tokens_decoder": {str(id): {"content": text} for text, id in ids.items()}}


def _tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(field, text, id or None) of every token that a configuration names."""
    for field in (*NAMED_TOKENS, *MORE_TOKENS):
        value = config.get(field) or ()
        if field in NAMED_TOKENS:
            value = [value]
        for token in value.values() if isinstance(value, dict) else value:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield field, text, None
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            yield "added_tokens_decoder", token["content"], id
