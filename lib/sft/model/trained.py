"""Which parameters a training changes, by name and shape, and which it only reads. No torch.

In:  an architecture and [train]. Out: `trained_shapes`, `frozen_shapes` and `lora_shapes`, {name: shape}.

A pattern of a recipe names parts of a parameter's name: `attention` and `attention.w_q` in every block, `blocks.0-7` the first
eight blocks, `*_norm` all norms of that name. Its parts must match consecutive parts of the name; `*` and `?` stand for any
characters within a part.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from sft.common.errors import SftError
from sft.model.hf import shapes
from sft.recipe.architecture import ModelConfig
from sft.recipe.families import PROJECTIONS
from sft.recipe.schema import Train

Shapes = Mapping[str, tuple[int, ...]]
LORA_A, LORA_B = "lora_a", "lora_b"
"""Names of an adapter's factors, beside `weight`: A [rank, columns] and B [rows, rank]."""
_PUBLISHED = {theirs.rpartition(".")[2]: ours for ours, theirs in PROJECTIONS.items()}
"""{"q_proj": "attention.w_q", …}: transformers' and PEFT's names of the matrices."""


@lru_cache(maxsize=1 << 14)  # the plans that a choice of hardware numbers makes ask the same
def matches(pattern: str, name: str) -> bool:
    """Whether the parts of a pattern match consecutive parts of a name."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_matches_part, wanted, parts[start:])) for start in starts)


def _matches_part(wanted: str, part: str) -> bool:
    if (span := re.fullmatch(r"(\d+)-(\d+)", wanted)) and part.isdecimal():
        return int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)


def select(patterns: Sequence[str], names: Iterable[str], field: str) -> list[str]:
    """The names that one of the patterns matches. Raises SftError for a pattern that matches none. `field`: of [train]."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            known = sorted({part for name in names for part in _runs(name)})
            near = [_PUBLISHED.get(pattern.rpartition(".")[2], "")]
            near = [n for n in near if n] or difflib.get_close_matches(pattern, known, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            example = ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.|\.weight$", "", name) for name in names))
            raise SftError(
                f"[train] {field}: {pattern!r} matches no parameter{hint} (there are {example}); next: correct it"
            )
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def _runs(name: str) -> Iterable[str]:
    """Consecutive parts of a name, joined: what a pattern without wildcards can be."""
    parts = name.removesuffix(".weight").split(".")
    return (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))


def lora_targets(config: ModelConfig, train: Train) -> list[str]:
    """Names of the matrices that get an adapter: `blocks.0.attention.w_q.weight` … Empty for another method.

    Raises SftError for a target that no matrix has.
    """
    if train.method != "lora":
        return []
    # A convolution's weights have three dimensions.
    found = {name: shape for name, shape in shapes(config).items() if name.startswith("blocks.") and len(shape) == 2}
    return select(train.lora_targets, found, "lora_targets") if train.lora_targets else list(found)


def lora_shapes(config: ModelConfig, train: Train) -> dict[str, tuple[int, ...]]:
    """The shapes of all adapters."""
    every, found = shapes(config), dict[str, tuple[int, ...]]()
    for name in lora_targets(config, train):
        (rows, columns), module = every[name], name.removesuffix("weight")
        found |= {module + LORA_A: (train.lora_rank, columns), module + LORA_B: (rows, train.lora_rank)}
    return found


def trained_names(config: ModelConfig, train: Train) -> list[str]:
    """The model's own parameters that are trained, all of them with another method than LoRA. Raises SftError for an unknown
    pattern, and where nothing is left to train."""
    names = list(shapes(config))
    if train.train_only:
        return select(train.train_only, names, "train_only")
    if not train.freeze:
        return names
    frozen = set(select(train.freeze, names, "freeze"))
    if len(frozen) == len(names):
        raise SftError(f"[train] freeze = {list(train.freeze)}: nothing is left to train; next: remove a pattern")
    return [name for name in names if name not in frozen]


def trained_shapes(config: ModelConfig, train: Train) -> Shapes:
    """What the optimizer changes."""
    if train.method == "lora":
        return lora_shapes(config, train)
    every = shapes(config)
    return {name: every[name] for name in trained_names(config, train)}


def frozen_shapes(config: ModelConfig, train: Train) -> Shapes:
    """What stays as it is."""
    trained = {} if train.method == "lora" else trained_shapes(config, train)
    return {name: shape for name, shape in shapes(config).items() if name not in trained}


def flops_change(config: ModelConfig, train: Train) -> float:
    """Training FLOPs of a token beyond those of full training: three passes of the adapters, less the gradients of the frozen
    matrices in the blocks."""
    frozen = (s for name, s in frozen_shapes(config, train).items() if name.startswith("blocks.") and len(s) == 2)
    added = sum(math.prod(shape) for shape in lora_shapes(config, train).values())
    return 6.0 * added - 2.0 * sum(math.prod(shape) for shape in frozen)


def matched(table: Mapping[str, float], names: Sequence[str], default: float, field: str) -> dict[str, float]:
    """{name: the value of the last pattern that matches it, or the default}. Raises SftError for a pattern without a match."""
    found = dict.fromkeys(names, default)
    for pattern, value in table.items():
        found |= dict.fromkeys(select([pattern], names, field), value)
    return found


def selection_lines(config: ModelConfig, train: Train) -> list[str]:
    """What every pattern of [train] matched, for the log."""
    names, lines = list(shapes(config)), list[str]()
    trained = list(trained_shapes(config, train))
    every = {name: math.prod(shape) for name, shape in {**shapes(config), **lora_shapes(config, train)}.items()}
    for field, among in (("freeze", names), ("train_only", names), ("lr_factors", trained), ("weight_decays", trained)):
        for pattern in getattr(train, field):
            found = select([pattern], among, field)
            lines.append(f"{field}: {pattern!r} is {len(found)} tensors, {sum(every[n] for n in found):,} parameters")
    return lines
