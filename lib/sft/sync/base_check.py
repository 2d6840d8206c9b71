"""What must agree between a base and the data: sync compares it before it copies weights, and training again.

In:  the base's folder, dataset.json, the recipe's [model]. Out: SftError at the first disagreement, or a warning in words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sft.chat.added_tokens import with_tokens
from sft.chat.loaded_tokenizer import check_for_family
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.formats.dataset import DatasetInfo, TokenizerFacts
from sft.recipe.base_config import is_hf_folder, read_base, tokenizer_of
from sft.recipe.base_tokenizer import compared, parse, read_tokenizer
from sft.recipe.core_config import NamedTokens, named_tokens
from sft.recipe.differences import Difference, mismatch
from sft.recipe.families import family
from sft.recipe.recipe import Recipe
from sft.recipe.resolve import resolve
from sft.runner.bases import check_found


def check_base(recipe: Recipe, dataset: Path, base: Path) -> None:
    """Raises SftError for a base that training or convert would refuse because of its config.json, or of the data's tokenizer.

    A base without config.json shows nothing before its weights are read.
    """
    published = read_base(base, recipe.model.ignore_config)
    if published is None:
        return
    facts = DatasetInfo.of(dataset).facts
    config = check_found(published, recipe, facts.vocab_size)
    unchecked = recipe.model.base_tokenizer == "unchecked"
    check_base_tokenizer(dataset, facts, base, unchecked, recipe.prepare.add_tokens)
    check_for_family(dataset / "data" / "tokenizer", facts.tokenizer.canaries, family(config))


def check_weights(recipe: Recipe, dataset: Path, base: Path) -> None:
    """Raises SftError for a Hugging Face folder whose tensors are not its config's, by the names and shapes in its files."""
    published = read_base(base, recipe.model.ignore_config)
    if published is None or not is_hf_folder(base):
        return
    from sft.checkpoint.hf_folder import HfFolder  # start-up: torch takes seconds

    folder = HfFolder(base)
    try:
        folder.check(resolve(recipe.model, DatasetInfo.of(dataset).facts.vocab_size, published))
    finally:
        folder.close()


def check_base_tokenizer(
    dataset: Path,
    facts: TokenizerFacts,
    base: Path | None,
    unchecked: bool = False,
    added: Sequence[str] = (),
) -> str:
    """Raises SftError if the base's tokenizer is not the one that the data were made with.

    Compares the hash of tokenizer.json. A base without one is refused, or, with `unchecked`, compared by the vocabulary
    size and end token of its config.json. `added`: [prepare] add_tokens, which the base's tokenizer does not have. Returns a
    warning, or "".
    """
    if base is None:
        return ""
    ours = facts.tokenizer.sha256.removeprefix("sha256:")
    found = tokenizer_of(base)
    if found is not None:
        content = found.read_bytes()
        theirs = hashlib.sha256(with_tokens(content, added, str(found))[0] if added else content).hexdigest()
        if theirs != ours:
            raise SftError(_another_tokenizer(dataset, ours, theirs, found, content))
        return ""
    _check_named_tokens(base / "config.json", facts)
    problem = (
        f"{base} has no tokenizer.json. Its tokenizer could not be proven to be the one of the data (sha256 {ours})"
    )
    if not unchecked:
        raise SftError(
            f"{problem}; next: copy the base's tokenizer.json into it, or, if you know that it is the same, set"
            ' [model] base_tokenizer = "unchecked"'
        )
    return problem


def _another_tokenizer(dataset: Path, ours: str, theirs: str, found: Path, content: bytes) -> str:
    """The message about two tokenizer.json files, with the parts in which they differ."""
    file = dataset / "data" / "tokenizer" / "tokenizer.json"
    rows = [Difference("tokenizer.json", f"sha256 {theirs[:16]}…", f"sha256 {ours[:16]}…")]
    if file.is_file():
        rows += compared(parse(content, str(found)), read_tokenizer(file))
    return mismatch(
        f"{dataset / 'dataset.json'}: the data were made with tokenizer.json sha256 {ours}, the base's is {theirs} ({found})",
        rows,
        "set [prepare] tokenizer to the base's tokenizer, or choose another [model] base",
        ("field", "base", "data"),
    )


def _check_named_tokens(file: Path, facts: TokenizerFacts) -> None:
    """Compares the tokens in a config.json, if there is one. OLMo-core's has the tokenizer's size, Hugging Face's the
    padded number of rows of the embedding. Raises SftError."""
    if not file.is_file():
        return
    config = read_json(file)
    core = NamedTokens() if "model_type" in config else named_tokens(config, str(file))
    if core != NamedTokens():
        prefix, size, end = "dataset.tokenizer.", core.vocab_size, core.eos_id
    else:
        prefix, size, end = "", config.get("vocab_size"), config.get("eos_token_id")
    rows = []
    if isinstance(size, int) and (size < facts.vocab_size or (prefix and size != facts.vocab_size)):
        rows.append(Difference(f"{prefix}vocab_size", str(size), str(facts.vocab_size)))
    if end is not None and facts.eos_id not in (end if isinstance(end, list) else [end]):
        rows.append(Difference(f"{prefix}eos_token_id", str(end), str(facts.eos_id)))
    if rows:
        problem = f"{file}: the base's tokenizer is not the one that the data were made with"
        raise SftError(
            mismatch(problem, rows, "set [prepare] tokenizer to the base's tokenizer", ("field", "base", "data"))
        )
