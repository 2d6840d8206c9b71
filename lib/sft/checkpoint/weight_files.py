"""Opens the weight files of a Hugging Face folder: safetensors or PyTorch's .bin, one file or several.

In:  a folder. Out: `open_files`: for every stored tensor a `Stored`, which reads some rows of it.

Safetensors are read and never mapped: pages of a mapped file count as memory of the process. A .bin file is a pickle. torch's
restricted unpickler reads it, which runs no code of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.checkpoint.dcp_reader import read_values
from sft.common.errors import SftError
from sft.common.files import check_pointer, read_json
from sft.common.strings import first_names

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,  # powers of two, the scales of some 8-bit floats
}
_QUANTISED = ("I8", "U8", "I32", "I16")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_NEXT = "fetch the folder again, or name another base"


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        ...


@dataclass(frozen=True)
class _InFile:
    """A tensor of a safetensors file, from `offset` on."""

    file: BinaryIO
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        row = torch.Size(self.shape[1:]).numel()
        first = self.offset + start * row * self.dtype.itemsize
        values = read_values(self.file, first, (stop - start) * row, self.dtype).view(stop - start, *self.shape[1:])
        return _to_bfloat16(values) if self.dtype.itemsize == 1 else values


def _to_bfloat16(values: Tensor) -> Tensor:
    """8-bit floats in bf16, which holds every value of theirs. A table of the 256 values takes a third of the time of torch's
    conversion."""
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(torch.bfloat16).view(torch.int16).numpy()
    return torch.from_numpy(table[values.view(torch.uint8).numpy()]).view(torch.bfloat16)


@dataclass(frozen=True)
class _InMemory:
    """A tensor of a .bin file, mapped where the file allows it."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return (self.value if self.value.dim() else self.value[None])[start:stop].clone()


@dataclass(frozen=True)
class Joined:
    """Tensors of several files as the rows of one."""

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        found, first = [], 0
        for part in self.parts:
            low, high = (min(max(edge - first, 0), part.shape[0]) for edge in (start, stop))
            if high > low:
                found.append(part.rows(low, high))
            first += part.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)


def open_files(path: Path, stack: ExitStack) -> tuple[dict[str, Stored], list[str]]:
    """{name in the file: tensor} of all weights of a folder, and notes about files that were passed over.

    Raises SftError for a missing, damaged or unlisted file.
    """
    listed, files, kind = _weight_files(path)
    notes = [f"{note} ignored: the weights are read from {files[0]}" for note in _passed_over(path, files)]
    if kind == "bin":
        notes.append(f"{len(files)} .bin files read with torch's restricted unpickler")
    found: dict[str, Stored] = {}
    for name in files:
        file = path / name
        if not file.is_file():
            raise SftError(f"{file}: missing" + (", named by the index" if listed else "") + f"; next: {_NEXT}")
        tensors = safetensors(file, stack) if kind == "safetensors" else _bin(file)
        for key, tensor in tensors.items():
            if listed and listed.get(key) != name:
                raise SftError(f"{file}: tensor {key}: the index puts it in {listed.get(key)!r}; next: {_NEXT}")
            if key in found:
                raise SftError(f"{file}: tensor {key}: also in another file; next: {_NEXT}")
            found[key] = tensor
    if absent := sorted(set(listed) - set(found)):
        raise SftError(
            f"{path}: {len(absent)} tensors of the index are in no file, the first is {absent[0]}; next: {_NEXT}"
        )
    return found, notes


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of a folder. Raises SftError for a folder without any."""
    return [path / name for name in _weight_files(path)[1]]


def _passed_over(path: Path, files: list[str]) -> list[str]:
    """The names of the weight files in a folder that are not read, in one text. [] if there are none."""
    indices = [f"{files[0]}.index.json"] if (path / f"{files[0]}.index.json").is_file() else []
    others = indices + sorted(p.name for p in path.iterdir() if p.suffix in _WEIGHTS and p.name not in files)
    return [first_names(others)] if others else []


def _weight_files(path: Path) -> tuple[Mapping[str, str], list[str], str]:
    """(the index's tensors by file, file names, kind): one file, an index, or shards whose names say how many there are.
    transformers also prefers one file to an index."""
    if (path / "adapter_config.json").is_file():
        raise SftError(_adapter(path))
    for kind, stem in (("safetensors", "model"), ("bin", "pytorch_model")):
        if (path / f"{stem}.{kind}").is_file():
            return {}, [f"{stem}.{kind}"], kind
        index = path / f"{stem}.{kind}.index.json"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise SftError(f"{index}: weight_map: {listed!r}, expected a table of tensors; next: {_NEXT}")
            for name in listed.values():
                if not isinstance(name, str) or not re.fullmatch(rf"[A-Za-z0-9_.-]+\.{kind}", name):
                    raise SftError(
                        f"{index}: weight_map: {name!r} is not the plain name of a .{kind} file; next: {_NEXT}"
                    )
            return listed, sorted(set(listed.values())), kind
        shards = sorted(p.name for p in path.glob(f"{stem}-*-of-*.{kind}"))
        if shards:
            count = int(shards[0].rpartition("-of-")[2].split(".")[0])
            wanted = [f"{stem}-{i:05d}-of-{count:05d}.{kind}" for i in range(1, count + 1)]
            if shards != wanted:
                missing = sorted({*wanted} - {*shards}) or shards
                raise SftError(f"{path}: no index, and the shards are not complete: {missing[0]}; next: {_NEXT}")
            return {}, shards, kind
    others = sorted(p.name for p in path.iterdir() if p.suffix in _WEIGHTS)
    raise SftError(
        f"{path}: no model.safetensors or pytorch_model.bin"
        + (f", but {first_names(others)}" if others else "")
        + "; next: name a folder with weights that transformers loads"
    )


def _adapter(path: Path) -> str:
    """The message about an adapter_config.json. transformers then takes the folder for an adapter, whatever else it has."""
    merged = any(p.name.startswith("model") and p.suffix == ".safetensors" for p in path.iterdir())
    remove = "; or, if the adapter is already merged into these weights, remove adapter_config.json" if merged else ""
    return (
        f"{path}: adapter_config.json: a PEFT adapter, not a model; next: make to-core SRC=<its base model> ADAPTER={path}"
        f" DST=<new folder>, and [model] base = that folder{remove}"
    )


def safetensors(file: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of a file, by their names in it. Raises SftError for a damaged file and for other dtypes."""
    handle = stack.enter_context(file.open("rb"))
    found: dict[str, Stored] = {}
    for key, (dtype, shape, offset) in _header(file).items():
        if dtype not in DTYPES:
            raise SftError(_wrong_dtype(file, key, dtype, dtype in _QUANTISED))
        found[key] = _InFile(handle, offset, shape, DTYPES[dtype])
    return found


def _bin(file: Path) -> dict[str, Stored]:
    load: Callable[..., object] = torch.load
    try:
        try:
            state = load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the older format of torch.save cannot be mapped
            state = load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise SftError(
            f"{file}: not readable by torch's restricted unpickler: {str(error).splitlines()[0][:200]};"
            " next: fetch the file again, or convert it to safetensors where you trust it"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SftError(f"{file}: holds {type(state).__name__}, expected a table of tensors; next: {_NEXT}")
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_meta:
            raise SftError(f"{file}: tensor {key}: {'without values' if value.is_meta else 'sparse'}; next: {_NEXT}")
        # Causal masks of older models are truth values or bytes; their names are ignored later.
        if value.dtype not in DTYPES.values() and not str(key).endswith("bias"):
            name = str(value.dtype).removeprefix("torch.")
            raise SftError(_wrong_dtype(file, str(key), name, not value.dtype.is_complex))
    return {str(key): _InMemory(value) for key, value in state.items()}


def _wrong_dtype(file: Path, key: str, dtype: str, quantised: bool) -> str:
    what = "packed or quantised weights" if quantised else "a dtype that is not supported"
    return (
        f"{file}: tensor {key}: dtype {dtype}, {what}, expected one of {', '.join(DTYPES)};"
        f" next: choose the base with weights {'that are not quantised' if quantised else 'in one of these'}"
    )


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """{name: (dtype, shape, offset in the file)}. The safetensors library checks the file first."""
    check_pointer(file, str(file))
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
