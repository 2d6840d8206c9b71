"""The copy that a save beside training writes: the values of its moment, in memory that the next one reuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sft.training.hostcopy import HostCopy

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")],
)


def state(device: str, value: float) -> dict[str, dict[str, object]]:
    tensors = {
        "matrix": torch.full((300, 7), value),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "codes": torch.full((3, 3), int(value), dtype=torch.uint8),
        "step": torch.tensor(value),
        "rows of another rank": torch.empty(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).mul(value).t(),
    }
    return {"model": {n: t.to(device) for n, t in tensors.items()}, "optim": {"lr": value, "betas": (0.9, 0.95)}}


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_copy_holds_what_was_there_and_the_next_one_takes_its_memory(device: str) -> None:
    copy = HostCopy()
    live = state(device, 2.0)
    first = copy.take(live)
    before = {n: t.clone() for n, t in first["model"].items()}
    for tensor in live["model"].values():
        assert isinstance(tensor, Tensor)
        tensor.add_(1)
    for name, wanted in state("cpu", 2.0)["model"].items():
        found = first["model"][name]
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype, name  # type: ignore[attr-defined, arg-type]
        assert torch.equal(found, before[name])
        assert found.untyped_storage().nbytes() == found.nbytes  # else DCP copies it once more
        assert found.is_pinned() == (device == "cuda" and found.numel() > 0)
    assert first["optim"] == {"lr": 2.0, "betas": (0.9, 0.95)}
    second = copy.take(live)
    assert torch.equal(second["model"]["matrix"], torch.full((300, 7), 3.0))
    assert second["model"]["matrix"].data_ptr() == first["model"]["matrix"].data_ptr()
    copy.close()


@pytest.fixture
def four_gpus() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_a_part_on_a_gpu_becomes_a_part_in_host_memory(four_gpus: None) -> None:
    """A mesh of GPUs that are not here: two copies of two shards, of 5 rows the second holds 2."""
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard"))
    nowhere = torch.empty(2, 4, device="meta")
    layout = [Replicate(), Shard(0)]
    value = DTensor.from_local(nowhere, mesh, layout, run_check=False, shape=torch.Size((5, 4)), stride=(4, 1))
    host = HostCopy()._whole(torch.ones(2, 4), value)
    assert (host.shape, host.placements, host.device_mesh.device_type) == (value.shape, value.placements, "cpu")
    assert torch.equal(host.device_mesh.mesh, mesh.mesh)
    assert torch.equal(host.to_local(), torch.ones(2, 4))
