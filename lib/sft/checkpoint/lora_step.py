"""Steps that hold LoRA adapters: which base they belong to, and their tensors merged into it.

In:  a step folder whose config.json has an "adapter" (sft.formats.adapter), and the base that training started from.
Out: `base_digest` names a base by its bytes; `Merged` is a source of weights for an export: W + scale * B A, in fp32.

Where training stored the base in fewer bits, W is what it computed with, so that the export is the model that was trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sft.checkpoint.dcp_reader import DcpReader, weights_folder
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.weight_files import weight_files
from sft.common.errors import SftError
from sft.common.files import canonical, hash_file, read_json
from sft.formats.adapter import KEY, Adapter
from sft.model import hf
from sft.model.adapters import rounded_base
from sft.model.model import initial_value
from sft.model.trained import LORA_A, LORA_B
from sft.recipe.architecture import ModelConfig


def adapter_of(step: Path) -> Adapter | None:
    """What a step's config.json says about its adapters; None for a step that holds a complete model."""
    file = step / "config.json"
    data = read_json(file)
    return Adapter.from_value(data[KEY], f"{file}: {KEY}") if KEY in data else None


def base_digest(base: Path | None, config: ModelConfig, seed: int, sha256: Callable[[Path], str] = hash_file) -> str:
    """Names the weights that training starts from: by the hashes of their files, or by what makes random ones."""
    if base is None:
        return _digest({"random": [config.to_value(), config.init_std, seed]})
    folder = weights_folder(base)
    if (folder / ".metadata").is_file():
        files = [folder / ".metadata", *folder.glob("*.distcp")]
    else:
        files = [base / "config.json", *weight_files(base)]
    return _digest({file.name: sha256(file) for file in sorted(files)})


def _digest(value: object) -> str:
    return f"sha256:{hashlib.sha256(canonical(value)).hexdigest()}"


class RandomWeights(Mapping[str, Tensor]):
    """The weights that training makes without a base, one tensor at a time."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.shapes, self.std, self.seed = hf.shapes(config), config.init_std, seed
        self._made: tuple[str, Tensor] = ("", torch.empty(0))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if self._made[0] != name:
            self._made = (name, initial_value(name, self.shapes[name], self.std, self.seed))
        return self._made[1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self[name][start:stop]

    def close(self) -> None:
        pass


def open_base(base: Path | None, config: ModelConfig, seed: int) -> RandomWeights | DcpReader | HfFolder:
    """The weights that training started from."""
    if base is None:
        return RandomWeights(config, seed)
    return DcpReader(base) if (weights_folder(base) / ".metadata").is_file() else HfFolder(base)


class Merged(Mapping[str, Tensor]):
    """The model of a step with adapters: the base's tensors, with the adapters added where there are some."""

    def __init__(self, step: Path, adapter: Adapter, base: RandomWeights | DcpReader | HfFolder, config: ModelConfig):
        self.adapter, self.base, self.config = adapter, base, config
        self.factors = DcpReader(step, adapters=True)
        self.targets = [f"{name.removesuffix(LORA_A)}weight" for name in self.factors if name.endswith(f".{LORA_A}")]
        self._made: tuple[str, Tensor] = ("", torch.empty(0))

    def __iter__(self) -> Iterator[str]:
        return iter(hf.shapes(self.config))

    def __len__(self) -> int:
        return len(hf.shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return hf.shapes(self.config)[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in fp32 where it has an adapter. The vocabulary's padding is zeros."""
        if name not in self.targets:
            held = self.base.shape(name)[0]
            found = self.base.rows(name, min(start, held), min(stop, held))
            return torch.cat([found, found.new_zeros(stop - start - len(found), *found.shape[1:])])
        if self._made[0] != name:  # complete, so that rows have the same bits in blocks of any size
            a, b = self.pair(name)
            self._made = (name, self.trained_base(name) + self.adapter.scale * (b @ a))
        return self._made[1][start:stop]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A [rank, columns] and B [rows, rank] of a matrix."""
        module = name.removesuffix("weight")
        return self.factors[module + LORA_A], self.factors[module + LORA_B]

    def trained_base(self, name: str) -> Tensor:
        """The matrix that training computed with, before the adapter is added, in fp32."""
        value = self.base.rows(name, 0, self.shape(name)[0]).float()
        return rounded_base(value, self.adapter.base_dtype)

    def close(self) -> None:
        self.factors.close()
        self.base.close()


def open_step(
    step: Path,
    base: Callable[[], Path | None],
    config: ModelConfig,
    seed: int,
    sha256: Callable[[Path], str] = hash_file,
) -> DcpReader | Merged:
    """The complete weights of a step. `base` finds the folder of the base if the step needs one. Raises SftError for another
    base than the one that the adapters were trained on."""
    adapter = adapter_of(step)
    if adapter is None:
        return DcpReader(step)
    folder = base()
    require_base(step, adapter.base, base_digest(folder, config, seed, sha256), folder)
    return Merged(step, adapter, open_base(folder, config, seed), config)


def require_base(step: Path, trained: str, found: str, base: Path | None) -> None:
    """Raises SftError if a step's adapters were trained on another base."""
    if trained != found:
        raise SftError(
            f"{step}: its adapters were trained on another base: {trained}, and {base or 'the random weights of this recipe'}"
            f" is {found}; next: restore that base, or train again from this one"
        )
