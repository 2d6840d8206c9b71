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
from sft.recipe.inputs import is_remote
from sft.recipe.resolve import resolve


def find_base(roots: Sequence[Path], run: Path, r: recipe.Recipe) -> Base | None:
    """The base of the run in the folder `run`; None for random weights, a base that is not here yet, and one without config.json.

    Raises SftError for a missing folder and for a config that is not supported.
    """
    name, ignore = r.model.base, r.model.ignore_config
    if not name:
        return None
    if not is_remote(name):
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


def _check_tokenizer(roots: Sequence[Path], r: recipe.Recipe) -> None:
    """Raises SftError for a base and a [prepare] tokenizer under DATA with different tokenizer.json files. Sync compares the
    others."""
    if is_remote(r.model.base) or is_remote(r.prepare.tokenizer):
        return
    ours = paths.find(roots, r.prepare.tokenizer, f"{r.file}: [prepare] tokenizer") / "tokenizer.json"
    theirs = tokenizer_of(paths.find(roots, r.model.base, f"{r.file}: [model] base"))
    if theirs is not None and ours.is_file() and ours.read_bytes() != theirs.read_bytes():
        raise SftError(
            f"'tokenizer' in [prepare] = {r.prepare.tokenizer!r}: {ours} is not the base's {theirs};"
            " next: set [prepare] tokenizer to the base's tokenizer, or choose another [model] base"
        )


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
            _check_ranks(resolve(r.model, 0, base), r)
            _check_tokenizer(roots, r)
    except SftError as error:
        text = str(error)
        raise SftError(text if text.startswith(r.file) else f"{r.file}: {text}") from error
