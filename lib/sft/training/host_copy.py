"""A copy of training's state in host memory, which is saved while training continues.

In:  the tensors of sft.checkpoint.step_folder.snapshot, plain or sharded, on any device.
Out: the same entries in one block of host memory, which the next copy reuses. It has this rank's parts only, 12 bytes
     for each of its parameters. On CUDA the memory is pinned, so that it is filled at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sft.common.errors import SftError

ALIGN = 64  # every tensor starts at a multiple of this many bytes


class HostCopy:
    """The host memory of one copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """A copy of `state`. It overwrites the previous copy. Raises SftError if memory cannot be pinned."""
        tensors = [_local(v) for part in state.values() for v in part.values() if isinstance(v, Tensor)]
        self._reserve(sum(_padded_bytes(t) for t in tensors), any(t.is_cuda for t in tensors))
        copied, at = {}, 0
        for name, part in state.items():
            copied[name] = dict(part)
            for key, value in part.items():
                if isinstance(value, Tensor):
                    local = _local(value)
                    host = self._host(local, at)
                    host.copy_(local, non_blocking=True)
                    copied[name][key] = self._distributed(host, value) if isinstance(value, DTensor) else host
                    at += _padded_bytes(local)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _reserve(self, size: int, pin: bool) -> None:
        if len(self._memory) == size:
            return
        self.close()
        self._memory = torch.empty(size, dtype=torch.uint8)
        # torch allocates pinned memory in powers of two, which may be twice the needed size.
        if pin and (error := int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 1))):
            raise SftError(
                f"[train] async_save: {size:,} bytes of host memory could not be pinned (CUDA error {error});"
                " next: ulimit -l unlimited, or async_save=false"
            )
        self._pinned = pin

    def _host(self, local: Tensor, at: int) -> Tensor:
        """The memory of a tensor at an offset. It is not a view of a larger tensor, which DCP would clone."""
        if not local.numel():
            return torch.empty(local.shape, dtype=local.dtype)
        flat = torch.frombuffer(self._memory.numpy(), dtype=local.dtype, count=local.numel(), offset=at)
        return flat.view(local.shape)

    def _distributed(self, host: Tensor, value: DTensor) -> DTensor:
        """This rank's part as a part of the distributed tensor, on a CPU mesh of the same ranks."""
        mesh = value.device_mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)
        return DTensor.from_local(
            host, self._meshes[mesh], value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )

    def close(self) -> None:
        """Frees the memory."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _padded_bytes(local: Tensor) -> int:
    return -(-local.numel() * local.element_size() // ALIGN) * ALIGN
