"""Reads tensors of a torch DCP folder (ours or OLMo-core's), without a process group and without running foreign code.

In:  stepN/ or stepN/model_and_optim/, written by any number of ranks.
Out: `DcpReader`, a mapping from name to tensor, which also reads some rows of a tensor, or the part that a rank holds.
     Memory is that of the result and a block of 32 MB.

DCP's `.metadata` is a pickle. It is read by an unpickler that accepts a dozen plain classes and nothing else. Every
stored chunk is a zip written by torch.save, whose pickle is read with weights_only. Values that are read from first to
last are compared with its CRC-32.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sft.common.errors import SftError

BLOCK = 32 << 20  # bytes read at once
_Overlap = tuple[metadata.ChunkStorageMetadata, tuple[slice, ...], tuple[slice, ...]]

_ALLOWED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, collections.OrderedDict,
    )
}  # fmt: skip
_ALLOWED |= {
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
_ALLOWED |= {("torch", str(d).removeprefix("torch.")): d for d in (torch.float32, torch.float64, torch.bfloat16)}
_ALLOWED |= {
    ("torch", str(d).removeprefix("torch.")): d for d in (torch.float16, torch.int64, torch.int32, torch.uint8)
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata") from None


def read_metadata(step: Path) -> metadata.Metadata:
    """The DCP metadata of a step folder or of a DCP folder. Raises SftError. Runs no foreign code."""
    file = weights_folder(step) / ".metadata"
    try:
        with file.open("rb") as f:
            found = _Restricted(f).load()
        if isinstance(found, metadata.Metadata):
            _check_fields(found)
    except FileNotFoundError:
        raise SftError(f"{file}: no such file; {step} is not a checkpoint; next: name a step folder") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise SftError(
            f"{file}: not readable as checkpoint metadata: {type(error).__name__}: {error};"
            " next: fetch that file again from a trusted source"
        ) from error
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise SftError(
            f"{file}: holds {type(found).__name__}, expected a DCP Metadata with storage data; next: fetch it again"
        )
    return found


def _check_fields(found: metadata.Metadata) -> None:
    """Raises ValueError, or what a missing field raises, unless every tensor and every location has its fields: unpickling sets
    whichever fields a file names."""
    for index, info in found.storage_data.items():
        numbers = (info.offset, info.length, *(index.offset or ()))
        if not isinstance(index.fqn, str) or not isinstance(info.relative_path, str) or not all(map(_is_size, numbers)):
            raise ValueError(f"the location of {index.fqn!r} is {info!r}")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        held = 0
        for chunk in entry.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
                raise ValueError(f"{name!r} of {tuple(entry.size)} has a chunk of {tuple(chunk.sizes)}")
            held += math.prod(chunk.sizes)
        sizes = [*entry.size, *(n for chunk in entry.chunks for n in (*chunk.offsets, *chunk.sizes))]
        if (
            not isinstance(entry.properties.dtype, torch.dtype)
            or not all(map(_is_size, sizes))
            or held != math.prod(entry.size)
        ):
            raise ValueError(f"{name!r} of {tuple(entry.size)} has chunks of {held} values")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def weights_folder(step: Path) -> Path:
    """The DCP folder of a step folder, or the folder itself where it is DCP's."""
    nested = step / "model_and_optim"
    return nested if nested.is_dir() or not (step / ".metadata").is_file() else step


class Weights(Protocol):
    """Tensors by our names, from any kind of file: the source of an export, and what it is compared with."""

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        ...


class DcpReader(Mapping[str, Tensor]):
    """The tensors of a DCP folder whose names start with `prefix`, under their names without it.

    Raises SftError for a step that holds LoRA adapters without their base, unless the caller asks for `adapters`.
    """

    def __init__(self, step: Path, prefix: str = "model.", adapters: bool = False) -> None:
        self.folder = weights_folder(step)
        self.prefix = prefix
        found = read_metadata(step)
        self._storage = found.storage_data
        self._entries: dict[str, metadata.TensorStorageMetadata] = {
            name.removeprefix(prefix): entry
            for name, entry in found.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
        }
        if not adapters and any(name.endswith(".lora_a") for name in self._entries):
            raise SftError(
                f"{step}: holds LoRA adapters and not the model that they belong to; next: make convert RECIPE=<its run>, whose"
                " model/ has them merged"
            )
        self._files: dict[str, BinaryIO] = {}
        self._opened: tuple[str, dict[torch.Size, _Chunk]] = ("", {})  # the chunks of the tensor read last

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].properties.dtype

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        value = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._fill(name, value, (0,) * value.dim())
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        entry = self._entries[name]
        value = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
        self._fill(name, value, (start, *(0,) * (value.dim() - 1)))
        return value

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies a stored tensor into a plain or sharded one of the same shape. A rank reads only its part. Raises
        SftError."""
        if name not in self._entries:
            raise SftError(f"{self.folder}: no tensor {self.prefix}{name}")
        if tuple(target.shape) != self.shape(name):
            raise SftError(
                f"{self.folder}: {self.prefix}{name}: shape {self.shape(name)}, the model has {tuple(target.shape)}"
            )
        with torch.no_grad():
            self._fill(name, *_local(target))

    def files_of(self, name: str, target: Tensor) -> set[str]:
        """The names of the shards that `read_into` would read."""
        local, offset = _local(target)
        chunks = [stored for stored, _, _ in self._overlaps(name, local.shape, offset)]
        return {self._location(name, stored).relative_path for stored in chunks}

    def _fill(self, name: str, target: Tensor, offset: tuple[int, ...]) -> None:
        """Fills `target`, a part of the tensor that starts at `offset`, from all stored chunks that overlap it."""
        if self._opened[0] != name:
            self._opened = (name, {})
        filled = 0
        for stored, ours, theirs in self._overlaps(name, target.shape, offset):
            self._chunk(name, stored).copy(target[ours], theirs)
            filled += math.prod(s.stop - s.start for s in ours)
        if filled != target.numel():
            raise SftError(
                f"{self.folder}: {self.prefix}{name}: chunks hold {filled} of {target.numel()} values;"
                " next: fetch the complete checkpoint again"
            )

    def _overlaps(self, name: str, shape: Sequence[int], offset: Sequence[int]) -> Iterator[_Overlap]:
        """The stored chunks that hold values of the part of a tensor with this shape and start: (chunk, where in the part, where
        in the chunk)."""
        for stored in self._entries[name].chunks:
            theirs, ours = [], []
            for at, size, start, length in zip(stored.offsets, stored.sizes, offset, shape, strict=True):
                low, high = max(at, start), min(at + size, start + length)
                theirs.append(slice(low - at, max(high, low) - at))
                ours.append(slice(low - start, max(high, low) - start))
            if math.prod(s.stop - s.start for s in ours):
                yield stored, tuple(ours), tuple(theirs)

    def _location(self, name: str, stored: metadata.ChunkStorageMetadata) -> Any:
        """Where a chunk is stored. Raises SftError."""
        key = self.prefix + name
        info = self._storage.get(metadata.MetadataIndex(key, stored.offsets))
        if info is None:
            raise SftError(
                f"{self.folder}/.metadata: has no location of {key} at {stored.offsets}; next: fetch it again"
            )
        if getattr(info, "transform_descriptors", None) or not re.fullmatch(r"[\w.-]+", info.relative_path):
            raise SftError(f"{self.folder}/.metadata: {key}: unusable location {info.relative_path!r}")
        return info

    def _chunk(self, name: str, stored: metadata.ChunkStorageMetadata) -> _Chunk:
        if stored.offsets in self._opened[1]:
            return self._opened[1][stored.offsets]
        key, info = self.prefix + name, self._location(name, stored)
        file = self.folder / info.relative_path
        try:
            if info.relative_path not in self._files:
                self._files[info.relative_path] = file.open("rb")
            chunk = _Chunk(self._files[info.relative_path], info.offset, info.length, f"{file}: {key}")
        except FileNotFoundError:
            raise SftError(f"{file}: missing; next: fetch the complete checkpoint again") from None
        except SftError:
            raise
        except Exception as error:  # a damaged zip can raise nearly anything
            raise SftError(f"{file}: {key}: not readable: {error}; next: fetch that file again") from error
        if chunk.shape != stored.sizes:
            raise SftError(f"{file}: {key}: a chunk of {tuple(chunk.shape)}, listed as {tuple(stored.sizes)}")
        self._opened[1][stored.offsets] = chunk
        return chunk


def _local(target: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a tensor that this rank holds, and where it starts."""
    if not isinstance(target, DTensor):
        return target, (0,) * target.dim()
    _, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return target.to_local(), tuple(offset)


class _Chunk:
    """A stored part of a tensor. Its values are one uncompressed record of a zip, row after row."""

    def __init__(self, file: BinaryIO, offset: int, length: int, where: str) -> None:
        self.file, self.where = file, where
        view: Any = _View(file, offset, length)
        with zipfile.ZipFile(view) as archive:
            record = next((i for i in archive.infolist() if i.filename.endswith("/data/0")), None)
        view.seek(0)
        with FakeTensorMode():  # reads shape and offset, not the values
            value = torch.load(view, map_location="cpu", weights_only=True)
        if not isinstance(value, Tensor):
            raise SftError(f"{where}: holds {type(value).__name__}, expected a tensor")
        self.shape, self.dtype = value.shape, value.dtype
        self.loaded: Tensor | None = None  # the values, where they are not contiguous in the file
        self.crc = self.seen = 0
        if record is None or not value.is_contiguous() or value.storage_offset():
            view.seek(0)
            self.loaded = torch.load(view, map_location="cpu", weights_only=True)
            return
        self.record, self.size = record, value.numel() * value.dtype.itemsize
        self.offset = offset + getattr(value.untyped_storage(), "_checkpoint_offset")  # noqa: B009 (torch's, undeclared)

    def copy(self, target: Tensor, part: tuple[slice, ...]) -> None:
        """target = self[part], in rows of at most BLOCK bytes at a time."""
        if self.loaded is not None or not part:
            value = self._values(0, self.size).view(self.shape) if self.loaded is None else self.loaded
            target.copy_(value[part])
            return
        first, last = part[0].start, part[0].stop
        row = self.size // self.shape[0]
        step = max(1, BLOCK // max(1, row))
        for start in range(first, last, step):
            stop = min(start + step, last)
            values = self._values(start * row, (stop - start) * row).view(stop - start, *self.shape[1:])
            target[start - first : stop - first].copy_(values[(slice(None), *part[1:])])

    def _values(self, start: int, count: int) -> Tensor:
        raw = read_values(self.file, self.offset + start, count, torch.uint8)
        if start == self.seen:  # a reader that goes from the first byte to the last gets all of them checked
            self.crc, self.seen = zlib.crc32(raw.numpy().data, self.crc), start + count
            if self.seen == self.record.file_size and self.crc != self.record.CRC:
                raise SftError(
                    f"{self.where}: the values are not those that were written (CRC-32 differs);"
                    " next: fetch that file again"
                )
        return raw.view(self.dtype)


class _View(io.RawIOBase):
    """A range of a file as a stream."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self.length - self.at)]
        count = os.preadv(self.file.fileno(), [wanted], self.offset + self.at) if wanted else 0
        self.at += count
        return count


def read_values(file: BinaryIO, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` values at an offset of a file. Raises SftError if the file ends early."""
    raw = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    left = raw.numpy().data
    while left:
        got = os.preadv(file.fileno(), [left[: 1 << 30]], offset)
        if not got:
            raise SftError(f"{file.name}: ends {len(left):,} bytes early; next: fetch that file again")
        left, offset = left[got:], offset + got
    return raw.view(dtype)
