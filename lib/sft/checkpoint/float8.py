"""Weights in 8-bit floats with scales, as the values that they stand for.

In:  the stored tensors of a folder and what its config.json says about them. Out: the same tensors without the scales. A tensor that
     has a scale gives fp32 values: those of its file times its scale. Each is read and multiplied when it is needed.

The product of an 8-bit float and a scale in bf16 is exact in fp32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sft.checkpoint.weight_files import Stored
from sft.common.errors import SftError
from sft.recipe.quantisation import Float8

_SCALE = re.compile(r"(.*\.weight)_scale(_inv)?")
_NOT_OF_WEIGHTS = {
    r"(.*\.)?(input|output|activation)_scale(_ub)?": "scales of activations, which training does not quantise",
    r"(.*\.)?[qkv]_scale": "scales of a key-value cache, which training does not have",
}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Scaled:
    """A matrix of 8-bit floats whose blocks have scales. `block`: the rows and columns of a block."""

    values: Stored
    scales: Stored
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), [n, columns] in fp32."""
        height, width = self.block
        found = self.values.rows(start, stop).float()
        first, last = start // height, -(-stop // height)
        grid = self.scales.rows(first, last).float().view(last - first, -1)
        of_rows = grid[torch.arange(start, stop) // height - first]
        if found.shape[1] % width == 0:
            found.view(stop - start, -1, width).mul_(of_rows[:, :, None])
            return found
        for column, part in enumerate(found.split(width, dim=1)):
            part.mul_(of_rows[:, column, None])
        return found


def dequantised(
    stored: Mapping[str, Stored], quantised: Float8 | None, where: str
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors that a model has, and notes for the log. Raises SftError for a scale that is missing or has another shape."""
    if quantised is None:
        return dict(stored), []
    scales: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    kept: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if match := _SCALE.fullmatch(name):
            if match[1] in scales:
                raise SftError(
                    f"{where}: tensors {scales[match[1]]} and {name} scale one weight; next: name another base"
                )
            scales[match[1]] = name
        elif reason := next((why for pattern, why in _NOT_OF_WEIGHTS.items() if re.fullmatch(pattern, name)), None):
            ignored[reason] += 1
        else:
            kept[name] = tensor
    forms: Counter[str] = Counter()
    for name, tensor in kept.items():
        if tensor.dtype in _FLOAT8 or name in scales:
            kept[name] = _scaled(name, tensor, stored, scales.pop(name, None), quantised, where)
            forms[_form(kept[name])] += 1
    if scales:
        name = next(iter(scales.values()))
        raise SftError(f"{where}: tensor {name}: no file has the weight that it scales; next: fetch the folder again")
    if not forms:
        raise SftError(
            f"{where}: quantization_config: {quantised.method!r}, but no tensor has 8-bit floats; next: remove"
            " quantization_config from config.json if the weights were dequantised, or name another base"
        )
    notes = [
        f"{count} tensors of 8-bit floats dequantised to fp32 ({quantised.method}, {form})"
        for form, count in forms.items()
    ]
    notes.append(f"{len(kept) - sum(forms.values())} tensors are not quantised")
    return kept, notes + [f"{count} tensors ignored: {reason}" for reason, count in ignored.items()]


def _scaled(
    name: str, tensor: Stored, stored: Mapping[str, Stored], scale: str | None, quantised: Float8, where: str
) -> Scaled:
    """A weight with its scale. Raises SftError."""
    if scale is None:
        raise SftError(
            f"{where}: tensor {name}: {_short(tensor.dtype)} without {name}_scale_inv or {name}_scale, though config.json has"
            f" quantization_config {quantised.method!r}; next: fetch the folder again, or name another base"
        )
    if tensor.dtype not in _FLOAT8 or len(tensor.shape) != 2:
        raise SftError(
            f"{where}: tensor {name}: {_short(tensor.dtype)} {list(tensor.shape)}, expected a matrix of 8-bit floats, as there is"
            f" {scale}; next: name another base"
        )
    found, expected = stored[scale].shape, []
    for block in quantised.blocks:
        height, width = (block[0] or tensor.shape[0], block[1] or tensor.shape[1])
        grid = (-(-tensor.shape[0] // height), -(-tensor.shape[1] // width))
        if found == grid or (grid == (1, 1) and found in ((), (1,))) or (grid[1] == 1 and found == grid[:1]):
            return Scaled(tensor, stored[scale], (height, width))
        expected.append(list(grid))
    raise SftError(
        f"{where}: tensor {scale}: shape {list(found)}, expected {' or '.join(map(str, expected))} for a weight of"
        f" {list(tensor.shape)} and blocks of {' or '.join(map(str, quantised.blocks))} in quantization_config;"
        " next: correct config.json, or name another base"
    )


def _form(tensor: Stored) -> str:
    assert isinstance(tensor, Scaled)
    (rows, columns), (height, width) = tensor.shape, tensor.block
    if width < columns:
        return f"a scale for each block of {height} x {width}"
    return (
        "a scale for each tensor"
        if height >= rows
        else "a scale for each row"
        if height == 1
        else f"a scale for each {height} rows"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
