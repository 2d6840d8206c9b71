"""Reads the weights of a Hugging Face folder a few rows at a time.

In:  a folder with config.json and safetensors, in one file or in several with an index. Out: tensors under our names.

    weights = HfFolder(path)                                     # checks that every file of the index exists
    weights.check(config)                                      # every tensor exactly once, with its shape
    weights["blocks.0.attention.w_q.weight"]                   # one tensor
    weights.rows("embeddings.weight", 100, 200)                # some rows of one

Files are read and never mapped: pages of a mapped file count as memory of the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from sft.checkpoint.dcp_reader import read_values
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.model import hf
from sft.recipe.presets import ModelConfig, differing_fields, recipe_field

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class _Place:
    file: BinaryIO
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class HfFolder(Mapping[str, torch.Tensor]):
    """The weights of a Hugging Face folder under our names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.family = hf.find_family(self.config, str(path / "config.json"))
        index = path / "model.safetensors.index.json"
        if index.is_file():
            listed: dict[str, str] = read_json(index).get("weight_map", {})
            files = sorted(set(listed.values()))
        else:
            listed, files = {}, ["model.safetensors"]
        self._stack = ExitStack()
        self._where: dict[str, _Place] = {}
        for name in files:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+\.safetensors", name):
                raise SftError(f"{index}: weight_map: {name!r} is not the plain name of a .safetensors file")
            file = path / name
            if not file.is_file():
                raise SftError(
                    f"{file}: missing" + (f", named by {index.name}" if listed else "; fetch the weights again")
                )
            handle = self._stack.enter_context(file.open("rb"))
            for key, (dtype, shape, offset) in _header(file).items():
                if listed and listed.get(key) != name:
                    raise SftError(f"{file}: tensor {key}: the index puts it in {listed.get(key)!r}")
                try:
                    ours = self.family.ours(key)
                except KeyError:
                    raise SftError(f"{file}: tensor {key}: not a parameter of {self.family.model_type}") from None
                if dtype not in DTYPES:
                    raise SftError(f"{file}: tensor {key}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
                if ours in self._where:
                    raise SftError(f"{file}: tensor {key}: present twice")
                self._where[ours] = _Place(handle, offset, shape, DTYPES[dtype])
        if absent := sorted(set(listed) - {self.family.theirs(name) for name in self._where}):
            raise SftError(f"{index}: {len(absent)} tensors are in no file, the first is {absent[0]}")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        at = self._where[name]
        row = torch.Size(at.shape[1:]).numel()
        values = read_values(at.file, at.offset + start * row * at.dtype.itemsize, (stop - start) * row, at.dtype)
        return values.view(stop - start, *at.shape[1:])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].dtype

    def check(self, config: ModelConfig) -> None:
        """Raises SftError unless the folder holds exactly this architecture. The vocabulary may be smaller than the
        model's."""
        found = hf.model_config(self.config, str(self.path / "config.json"))
        # A finetuning may extend the context (yarn), and needs no weights at random (init_std). The vocabulary is
        # checked below.
        for name in differing_fields(found, config, ignore=("yarn", "init_std", "vocab_size")):
            raise SftError(
                f"{self.path / 'config.json'}: {name}: {getattr(found, name)}, the recipe's [model] says "
                f"{getattr(config, name)}; correct [model] {recipe_field(name)}"
            )
        vocab = found.vocab_size
        if vocab > config.vocab_size:
            raise SftError(
                f"{self.path / 'config.json'}: vocab_size: {vocab}, the recipe's [model] has {config.vocab_size} rows; "
                f"set vocab_size = {vocab}"
            )
        hf.check_shapes(
            {name: self.shape(name) for name in hf.without_tied_head(self, found)}, hf.shapes(found), str(self.path)
        )

    def close(self) -> None:
        self._stack.close()


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """{name: (dtype, shape, offset in the file)}. The safetensors library checks the file first."""

    try:
        with safe_open(file, framework="pt"), file.open("rb") as read:
            size = int.from_bytes(read.read(8), "little")
            header = json.loads(read.read(size))
    except (SafetensorError, OSError) as error:
        raise SftError(
            f"{file}: not readable as safetensors: {error}; next: fetch the file or make it again"
        ) from error
    return {
        key: (entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }
