"""A copy of training's state in host memory, which a save beside training writes while training goes on.

In:  the live tensors of sft.checkpoint.step_folder.snapshot, plain or sharded, on any device.
Out: the same entries over one stretch of host memory, which the next copy reuses: this rank's parts alone, 12 bytes for each
     parameter it holds. On CUDA the memory is pinned, so that it fills at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sft.common.errors import SftError

ALIGN = 64  # bytes at which every tensor begins


class HostCopy:
    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """`state` with its tensors as they are now. The copy before it is overwritten. Raises SftError where memory cannot be pinned."""
        tensors = [_local(v) for part in state.values() for v in part.values() if isinstance(v, Tensor)]
        self._reserve(sum(_stretch(t) for t in tensors), any(t.is_cuda for t in tensors))
        copied, at = {}, 0
        for name, part in state.items():
            copied[name] = dict(part)
            for key, value in part.items():
                if isinstance(value, Tensor):
                    local = _local(value)
                    host = self._host(local, at)
                    host.copy_(local, non_blocking=True)
                    copied[name][key] = self._whole(host, value) if isinstance(value, DTensor) else host
                    at += _stretch(local)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _reserve(self, size: int, pin: bool) -> None:
        if len(self._memory) == size:
            return
        self.close()
        self._memory = torch.empty(size, dtype=torch.uint8)
        # torch's own pinned memory comes in powers of two, up to twice what is needed.
        if pin and (error := int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 1))):
            raise SftError(
                f"[train] async_save: {size:,} bytes of host memory could not be pinned (CUDA error {error});"
                " next: ulimit -l unlimited, or async_save=false"
            )
        self._pinned = pin

    def _host(self, local: Tensor, at: int) -> Tensor:
        """Memory of its own for DCP, which clones whatever is a view of something larger."""
        if not local.numel():
            return torch.empty(local.shape, dtype=local.dtype)
        flat = torch.frombuffer(self._memory.numpy(), dtype=local.dtype, count=local.numel(), offset=at)
        return flat.view(local.shape)

    def _whole(self, host: Tensor, value: DTensor) -> DTensor:
        """This rank's part as a part of the whole, over the same ranks' host memories."""
        mesh = value.device_mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)
        return DTensor.from_local(
            host, self._meshes[mesh], value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )

    def close(self) -> None:
        """Gives the memory back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _stretch(local: Tensor) -> int:
    return -(-local.numel() * local.element_size() // ALIGN) * ALIGN
