"""The copy that a save beside training writes: the values of its moment, in memory that the next one reuses."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sft.common.errors import SftError
from sft.training.host_copy import HostCopy

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


def test_memory_is_pinned_once_and_released_or_the_log_says_that_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's runtime stands in: what it is asked for, without a GPU."""
    calls: list[tuple[int, ...]] = []
    answer = 0

    def register(*args: int) -> int:
        calls.append(args)
        return answer

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda *args: calls.append(args))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    copy = HostCopy()
    copy._reserve(1000, True)
    copy._reserve(1000, True)
    address = copy._memory.data_ptr()
    copy.close()
    assert calls == [(address, 1000, 1), (address,)]
    answer = 2
    with pytest.raises(SftError, match=r"1,000 bytes .* could not be pinned \(CUDA error 2\); .*async_save=false"):
        copy._reserve(1000, True)


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
    host = HostCopy()._distributed(torch.ones(2, 4), value)
    assert (host.shape, host.placements, host.device_mesh.device_type) == (value.shape, value.placements, "cpu")
    assert torch.equal(host.device_mesh.mesh, mesh.mesh)
    assert torch.equal(host.to_local(), torch.ones(2, 4))
