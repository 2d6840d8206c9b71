"""The config.json of a run's base, where this machine has it. Standard library only.

A base under DATA is read there. A remote one is read where sync put it, if that is a disk of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sft.common import paths
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.remote import NAME, Remote, SyncMetrics
from sft.recipe import recipe
from sft.recipe.architecture import DynamicRope, LongRope, ModelConfig
from sft.recipe.base_config import Base, read_base, tokenizer_of
from sft.recipe.base_tokenizer import class_differences, compared, number_of_ids, read_tokenizer
from sft.recipe.differences import Difference, mismatch
from sft.recipe.families import family
from sft.recipe.inputs import is_elsewhere
from sft.recipe.resolve import resolve


def find_base(roots: Sequence[Path], run: Path, r: recipe.Recipe) -> Base | None:
    """The base of the run in the folder `run`; None for random weights, a base that is not here yet, and one without config.json.

    Raises SftError for a missing folder and for a config that is not supported.
    """
    name, ignore = r.model.base, r.model.ignore_config
    if not name:
        return None
    if not is_elsewhere(name):
        return read_base(paths.find(roots, name, f"{r.file}: [model] base"), ignore)
    folder = _synced(run / "sync")
    return read_base(folder, ignore) if folder else None


def _check_ranks(config: ModelConfig, r: recipe.Recipe) -> None:
    """Raises SftError for scaling by the length of documents on ranks that share a row."""
    for cluster, stages in r.on.items():
        degree = stages["train"].context_degree if "train" in stages else 1
        if degree > 1 and isinstance(config.rope_scaling, DynamicRope | LongRope):
            raise SftError(
                f"'context_degree' in [on.{cluster}.train] = {degree}: {type(config.rope_scaling).__name__} depends on the"
                " length of documents, which a part of a row does not show; next: context_degree = 1"
            )


_OTHER_TOKENIZER = "set [prepare] tokenizer to the base's tokenizer, or choose another [model] base"


def _check_tokenizer(roots: Sequence[Path], r: recipe.Recipe, base: Base) -> None:
    """Raises SftError for a [prepare] tokenizer under DATA that cannot be the base's. Sync compares the others."""
    name = r.prepare.tokenizer
    if is_elsewhere(name):
        return
    ours = paths.find(roots, name, f"{r.file}: [prepare] tokenizer") / "tokenizer.json"
    if not ours.is_file():
        return
    where, then = f"'tokenizer' in [prepare] = {name!r}: {ours}", _OTHER_TOKENIZER
    if not is_elsewhere(r.model.base):
        theirs = tokenizer_of(paths.find(roots, r.model.base, f"{r.file}: [model] base"))
        if theirs is None:
            _check_unproven(r, base, ours, where)
        elif ours.read_bytes() != theirs.read_bytes():
            rows = compared(read_tokenizer(theirs), read_tokenizer(ours))
            raise SftError(mismatch(f"{where} is not the base's {theirs}", rows, then))
        else:
            then = (
                "choose another [model] base: an export of this one would encode otherwise than its own tokenizer.json"
            )
    kind = family(base.config)
    if kind.own_tokenizer and (rows := class_differences(read_tokenizer(ours), kind)):
        problem = f"{where} is not a tokenizer of {kind.model_type}: transformers loads it with that family's class"
        raise SftError(mismatch(problem, rows, then, ("field", f"class of {kind.model_type}", "tokenizer")))


def _check_unproven(r: recipe.Recipe, base: Base, ours: Path, where: str) -> None:
    """Raises SftError for a base without tokenizer.json, unless the recipe says that it is the same one and its table has a
    row for every id."""
    if r.model.base_tokenizer != "unchecked":
        raise SftError(
            f"'base' in [model] = {r.model.base!r}: no tokenizer.json, so that its tokenizer cannot be proven to be the one of"
            " the data; next: copy the base's tokenizer.json into it, or, if you know that it is the same, set [model]"
            ' base_tokenizer = "unchecked"'
        )
    if base.facts.rows and (ids := number_of_ids(read_tokenizer(ours))) > base.facts.rows:
        row = Difference("vocab_size", f"{base.facts.rows:,}", f"{ids:,} ids", "another [prepare] tokenizer")
        heads = ("field", "base", "tokenizer")
        raise SftError(mismatch(f"{where} has more ids than {base.where}", [row], _OTHER_TOKENIZER, heads))


def _synced(sync: Path) -> Path | None:
    """The folder of a finished sync's base on this machine."""
    try:
        storage = SyncMetrics.of(manifest.load(sync / manifest.NAME), str(sync)).storage
        base = Remote.read(sync / NAME).base
    except (OSError, SftError):
        return None
    if base is None or "://" in storage or not (Path(storage) / base).is_dir():
        return None
    return Path(storage) / base


def check_base(roots: Sequence[Path], run: Path, r: recipe.Recipe) -> None:
    """Raises SftError for a local base that is not supported, whose architecture the recipe contradicts, or whose tokenizer
    is not the data's."""
    try:
        base = find_base(roots, run, r)
        if base is not None:
            check_found(base, r)
            _check_tokenizer(roots, r, base)
    except SftError as error:
        text = str(error)
        raise SftError(text if text.startswith(r.file) else f"{r.file}: {text}") from error


def check_found(base: Base, r: recipe.Recipe, tokenizer_size: int = 0) -> ModelConfig:
    """The architecture of a base that is here, checked: by the planner, or by sync for a base that only jobs see. Raises SftError."""
    config = resolve(r.model, tokenizer_size, base)
    _check_ranks(config, r)
    return config
