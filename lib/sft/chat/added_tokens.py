"""[prepare] add_tokens: a tokenizer folder with more special tokens.

In:  a tokenizer folder and the texts of new tokens. Out: a copy whose tokenizer.json and tokenizer_config.json have them, with
     the ids after the last one, in the recipe's order. The same input gives the same bytes, so training can make
     the base's tokenizer again and compare.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sft.common.errors import SftError
from sft.common.files import read_json, write_atomic


def with_tokens(data: bytes, tokens: Sequence[str], where: str) -> tuple[bytes, list[int]]:
    """tokenizer.json with the tokens as special ones, and their ids. Raises SftError for a token that is there already."""
    known = Tokenizer.from_str(data.decode("utf-8")).get_vocab(with_added_tokens=True)
    if there := [token for token in tokens if token in known]:
        raise SftError(
            f"{where}: [prepare] add_tokens: {there[0]!r} is a token already, id {known[there[0]]}; remove it"
        )
    if len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens):
        raise SftError(f"[prepare] add_tokens = {list(tokens)}: every token once, and none empty; correct it")
    first = max(known.values()) + 1
    content: dict[str, Any] = json.loads(data)
    ids = list(range(first, first + len(tokens)))
    added = [_entry(token) | {"id": i} for i, token in zip(ids, tokens, strict=True)]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *added]
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode("utf-8"), ids


def _entry(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def add_tokens(folder: Path, tokens: Sequence[str], names: Sequence[str], cache: Path) -> Path:
    """A folder of the cache with the files `names` of a tokenizer's folder and with the tokens. Raises SftError."""
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise SftError(f"{source}: not found; next: name a folder with tokenizer.json as [prepare] tokenizer")
    made, ids = with_tokens(source.read_bytes(), tokens, str(source))
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    files["tokenizer.json"] = made
    if "tokenizer_config.json" in files:
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {str(i): _entry(t) for i, t in zip(ids, tokens, strict=True)}
        for name in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(config.get(name), list):
                config[name] = [*config[name], *tokens]
        files["tokenizer_config.json"] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
    target = cache / "added-tokens" / digest[:32]
    if not (target / "tokenizer.json").is_file():
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            write_atomic(part / name, content)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    return target
