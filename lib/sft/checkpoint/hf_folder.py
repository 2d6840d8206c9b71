"""Reads the weights of a Hugging Face folder a few rows at a time.

In:  a folder with config.json and weights (sft.checkpoint.weight_files). Out: tensors under our names.

    weights = HfFolder(path)                                     # checks that every file of the index exists
    weights.check(config)                                      # every tensor exactly once, with its shape
    weights["blocks.0.attention.w_q.weight"]                   # one tensor
    weights.rows("embeddings.weight", 100, 200)                # some rows of one
    weights.notes                                              # what was ignored or renamed, for the log

Names may have a prefix that wrappers add, or lack `model.`, as the folder of a model without its head does. Stored rotary
frequencies are ignored, because they are computed from config.json. 8-bit floats with scales are read as the values that they
stand for (sft.checkpoint.float8).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.checkpoint.float8 import dequantised
from sft.checkpoint.weight_files import DTYPES, Joined, Stored, open_files
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.model import hf
from sft.recipe.architecture import ModelConfig, differing_fields
from sft.recipe.base_config import find_family, read_hf_config
from sft.recipe.config_reader import ConfigReader, EveryKey
from sft.recipe.differences import Difference, mismatch
from sft.recipe.families import Family
from sft.recipe.quantisation import read_quantisation
from sft.recipe.resolve import recipe_field

__all__ = ["DTYPES", "HfFolder"]
_MAY_DIFFER = ("rope_scaling", "scale_windowed", "init_std", "vocab_size", "family")
_ROWS = 8192
"""Rows of the vocabulary that are compared at once."""
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Prefixes of torch.compile, DDP and FSDP, which may stand anywhere in a name."""
_IGNORED = {
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)": "rotary frequencies, which config.json determines",
    r"(.*\.)?attention\.(bias|masked_bias)": "causal masks",
}


_QUANTISED = re.compile(
    r".*(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_zero_point|qweight|qzeros|scales|g_idx|SCB)"
)
"""Names of the scales and codes that quantised weights come with."""


@dataclass(frozen=True)
class _Place:
    """Rows [start, start + shape[0]) of a stored tensor."""

    stored: Stored
    start: int
    shape: tuple[int, ...]


class HfFolder(Mapping[str, torch.Tensor]):
    """The weights of a Hugging Face folder under our names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.family = find_family(self.config, str(path / "config.json"))
        self._stack = ExitStack()
        where = str(path / "config.json")
        files, self.notes = open_files(path, self._stack)
        quantised = read_quantisation(ConfigReader(self.config, where, EveryKey()))
        stored, notes = dequantised(files, quantised, str(path))
        self.notes += notes
        self._where: dict[str, _Place] = {}
        names, notes = plain_names(stored, self.family, str(path))
        self.notes += notes
        for name, tensor in self._joined({name: stored[key] for name, key in names.items()}).items():
            for ours, place in self._split(name, tensor).items():
                self._where[ours] = place

    def _joined(self, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """The tensors, with a Gated DeltaNet's three convolutions as the one that transformers' class has. Its
        save_pretrained divides that one in thirds, which are not those of queries, keys and values."""
        found, groups = dict(tensors), {part: name for name, parts in self.family.joined.items() for part in parts}
        for name in tensors:
            ours = self.family.parts(name)
            match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", ours[0])
            if len(ours) > 1 or match is None or match[2] not in groups:
                continue
            module = f"model.layers.{match[1]}.{groups[match[2]]}.weight"
            parts = [self.family.theirs(part) for part in self.family.parts(module)]
            if all(part in found for part in parts):
                found[module] = Joined(tuple(found.pop(part) for part in parts))
        return found

    def _split(self, name: str, stored: Stored) -> dict[str, _Place]:
        """Our tensors in one of theirs: one, or those that a family stores as the rows of one."""
        parts = self.family.parts(name)
        if len(parts) == 1:
            return {parts[0]: _Place(stored, 0, stored.shape)}
        sizes = self._part_rows(len(parts), stored.shape[0], name)
        starts = [sum(sizes[:i]) for i in range(len(parts))]
        return {
            part: _Place(stored, start, (size, *stored.shape[1:]))
            for part, start, size in zip(parts, starts, sizes, strict=True)
        }

    def _part_rows(self, parts: int, rows: int, name: str) -> list[int]:
        """The rows of each part of a fused tensor: queries, keys and values, or the two factors of SwiGLU; or the channels
        of a Gated DeltaNet's convolution."""
        mixer = read_hf_config(self.config, str(self.path), ignore=EveryKey()).config.gated_delta
        if parts == 2:
            sizes = [rows // 2] * 2
        elif mixer:
            sizes = [mixer.keys, mixer.keys, mixer.values]
        else:
            heads = int(self.config["num_attention_heads"])
            kv = int(self.config.get("num_key_value_heads") or heads)
            width = int(self.config.get("head_dim") or int(self.config["hidden_size"]) // heads)
            sizes = [heads * width, kv * width, kv * width]
        if sum(sizes) != rows:
            raise SftError(f"{self.path}: {name}: {rows} rows, expected {sum(sizes)}; next: name another base")
        return sizes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        at = self._where[name]
        return at.stored.rows(at.start + start, at.start + stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].stored.dtype

    def check(self, config: ModelConfig) -> None:
        """Raises SftError unless the folder has exactly the tensors of this architecture. It may have fewer rows of the
        vocabulary than the model, but as many as its config.json says."""
        where = str(self.path / "config.json")
        # Unsupported keys are refused where a run's architecture is resolved. A finetuning may extend the context
        # (rope_scaling), and needs no weights at random (init_std).
        base = read_hf_config(self.config, where, ignore=EveryKey())
        described, said_by_recipe = base.config, ("rope_layers", "rope_theta") if base.positions_unsaid else ()
        different = [
            Difference(name, repr(getattr(described, name)), repr(getattr(config, name)), _to_write(name, described))
            for name in differing_fields(described, config, ignore=(*_MAY_DIFFER, *said_by_recipe))
        ]
        rows = described.vocab_size
        if rows > config.vocab_size:
            different.append(Difference("vocab_size", str(rows), str(config.vocab_size), f"vocab_size = {rows}"))
        if different:
            raise SftError(
                mismatch(
                    f"{where}: the recipe's [model] is not the base's architecture",
                    different,
                    "write what the last column says; the base decides what the model is",
                )
            )
        found = {name: self.shape(name) for name in hf.without_tied_head(self, config)}
        if not config.tied and "lm_head.w_out.weight" not in found and len(found) == len(hf.shapes(config)) - 1:
            raise SftError(
                f"{where}: tie_word_embeddings: {self.config.get('tie_word_embeddings')}, but no file has lm_head.weight;"
                " next: set tie_word_embeddings = true in it if the output matrix is the embedding, or fetch the missing"
                " file"
            )
        hf.check_shapes(found, hf.shapes(config, rows), str(self.path))
        if config.tied:
            self._check_tied_head(where)

    def _check_tied_head(self, where: str) -> None:
        """Raises SftError for a second output matrix that is not the embedding. Versions of transformers disagree about which
        one counts."""
        head, table = "lm_head.w_out.weight", "embeddings.weight"
        if head not in self:
            return
        same = self.shape(head) == self.shape(table)
        for start in range(0, self.shape(table)[0] if same else 0, _ROWS):
            stop = min(start + _ROWS, self.shape(table)[0])
            same = same and torch.equal(self.rows(head, start, stop).float(), self.rows(table, start, stop).float())
        if not same:
            raise SftError(
                f"{where}: tie_word_embeddings: True, but lm_head.weight is not model.embed_tokens.weight; next: set"
                " tie_word_embeddings = false in it if lm_head.weight is the output matrix, or remove that tensor"
            )

    def close(self) -> None:
        self._stack.close()


def _to_write(name: str, described: ModelConfig) -> str:
    """What a recipe writes in [model] to agree with its base about a field."""
    field = recipe_field(name)
    return "remove preset" if field == "preset" else f"{field} = {getattr(described, name)!r}"


def plain_names(stored: Collection[str], family: Family, where: str) -> tuple[dict[str, str], list[str]]:
    """{transformers' name: name in the file}, and notes about ignored and renamed tensors.

    Raises SftError for a tensor that is not the model's, and for two that would have the same name.
    """
    found: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    renamed: Counter[str] = Counter()
    for key in stored:
        name = key
        for wrapper in _WRAPPERS:
            if wrapper in name:
                name = name.replace(wrapper, "")
                renamed[f"without the prefix {wrapper}"] += 1
        if reason := next((why for pattern, why in _IGNORED.items() if re.fullmatch(pattern, name)), None):
            ignored[reason] += 1
            continue
        plain = _known(name, family)
        if plain is None and _QUANTISED.fullmatch(name):
            raise SftError(
                f"{where}: tensor {key}: belongs to quantised weights, which are not supported without a quantization_config"
                " in config.json that says how; next: fetch the base's own config.json, or choose the base with weights that"
                " are not quantised"
            )
        if plain is None:
            raise SftError(
                f"{where}: tensor {key}: not a parameter of {family.model_type}; next: name a base of the model_type that"
                " its config.json says, or one without further heads and adapters"
            )
        if plain != name:
            renamed[_renaming(name, plain)] += 1
        if plain in found:
            raise SftError(f"{where}: tensors {found[plain]} and {key} are both {plain}; next: name another base")
        found[plain] = key
    notes = [f"{count} tensors ignored: {reason}" for reason, count in ignored.items()]
    notes += [f"{count} tensors read {how}" for how, count in renamed.items()]
    return found, notes


def _renaming(name: str, plain: str) -> str:
    """How a tensor's name was changed, for the log."""
    if plain in (f"model.{name}", name.removeprefix("model.")):
        return "with the prefix model." if plain.startswith("model.") else "under another prefix"
    return "under the names of the published folders"


def _known(name: str, family: Family) -> str | None:
    """The published name of a tensor, which may have another one, or whose prefix `model.` may be missing or there twice."""
    for candidate in (name, f"model.{name}", name.removeprefix("model.")):
        try:
            parts = family.parts(candidate)
        except KeyError:
            continue
        return family.theirs(parts[0]) if len(parts) == 1 else candidate
    return None
