"""Processes and devices: joins torchrun's process group, shards a model, exchanges small values between ranks.

In:  torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), or nothing for one process.
Out: a `World`. Its exchanges of host values use gloo, also where the model uses NCCL, so that they never wait for the
     GPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sft.common.errors import SftError
from sft.common.machine import cores
from sft.common.paths import STORAGE_WAIT
from sft.model.gated_delta import GatedDeltaNet


class SharedError(SftError):
    """An error that every rank raises, so that only one of them needs to print it."""


@dataclass
class World:
    """The ranks of a training and this rank's device. Unless stated otherwise, every rank calls a method at the same
    point."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: Any = None  # for host values; None = the default group

    def with_own_group(self, timeout_s: int = 1800) -> World:
        """The same ranks with a separate gloo group: for a thread beside the training loop, or for a longer timeout
        than that of `join`."""
        if not dist.is_initialized():
            return replace(self, group=None)
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def memory_gb(self) -> float:
        """Memory of this process's GPU in 10^9 bytes; 0 for a CPU, whose memory is not limited here."""
        if self.device.type != "cuda":
            return 0.0
        return float(torch.cuda.get_device_properties(self.device).total_memory) / 1e9

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a host tensor, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is True on any rank."""
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def sum_async(self, value: Tensor) -> Callable[[], Tensor]:
        """Starts summing a host tensor over ranks. The returned function waits for the result."""
        if self.size == 1:
            return lambda: value
        work = dist.all_reduce(value, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return value

        return wait

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_rank0(self, action: Callable[[], Any], share: bool = True) -> Any:
        """Runs `action` on rank 0 while the others wait, and returns its result on all ranks (None on the others unless
        `share`, for results that cannot be sent). Raises SharedError on every rank when it fails."""
        value, failure = None, ""
        if self.is_rank0:
            try:
                value = action()
            except Exception as error:
                if self.size == 1:
                    raise
                failure = str(error) if isinstance(error, SftError) else f"{type(error).__name__}: {error}"
        sent, failure = self.gather((value if share else None, failure))[0]
        if failure:
            raise SharedError(failure)
        return value if self.is_rank0 else sent

    def on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on every rank and returns all results. Raises SharedError on every rank when it fails on
        one."""
        value, failure = None, ""
        try:
            value = action()
        except Exception as error:
            if self.size == 1:
                raise
            failure = f"rank {self.rank}: {type(error).__name__}: {error}"
        outcomes = self.gather((value, failure))
        if failures := [f for _, f in outcomes if f]:
            raise SharedError("; ".join(failures))
        return [v for v, _ in outcomes]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def transfer_s(count: int) -> int:
    """Seconds that ranks wait for each other while `count` bytes are written or sent: half an hour, 10 MB/s, and as long as
    the cluster's file says for a bucket that is away."""
    return 1800 + count // 10**7 + int(os.environ.get(STORAGE_WAIT, 0))


def join(threads: int = 0, timeout_s: int = 1800) -> World:
    """Joins the process group. `threads` = CPU threads of this process; 0 divides the cores among the local
    processes."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads or max(1, cores() // local_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size > 1:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    elif device.type == "cuda":
        # One GPU uses the same code as many: FSDP keeps fp32 weights and computes in bf16.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    return World(rank, size, local_rank, device)


def make_deterministic() -> None:
    """Makes every sum of this process have a fixed order, so that the same GPUs compute the same bytes again:
    attention's backward pass, index sums, cuBLAS, and NCCL (whose sums inside a switch have no fixed order). A step
    raises RuntimeError where torch has no deterministic kernel. Call it before the first product and the first exchange
    on a GPU. On a CPU nothing changes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def shard(
    model: nn.Module,
    world: World,
    precision: str,
    shard_degree: int = 0,
    keep_gathered: str = "none",
    prefetch_layers: int = 1,
) -> nn.Module:
    """Shards parameters, gradients and optimizer state over the ranks, in one group per block and one for the rest.

    Parameters are fp32, compute is `precision`, reduction is fp32. Gradients are SUMMED: the loss is already divided by
    the number of targets in the global batch. Inputs keep their types: hidden states are `precision` from the embedding
    on, rotary tables are fp32. `shard_degree` ranks share one copy of the parameters (0 = all ranks), and the copies
    are kept equal. A mixer's `replicated()` parameters stay whole and fp32 on every rank; `sum_replicated_gradients`
    adds up their gradients. `keep_gathered` "weights" or "gradients": a block stays gathered after its forward pass, and until the
    microbatch that `begin_microbatch` says is the last. `prefetch_layers`: see `_set_prefetch`. A single process is not sharded in fp32, and where it keeps what it gathers
    (`sft.model.compute_copies`). Raises SftError when `shard_degree` does not divide the number of ranks.
    """
    if world.size == 1 and (precision == "fp32" or keep_gathered != "none"):
        return model
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = _mesh(world, shard_degree)
    compute = None if precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.get_submodule("blocks").children():
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=set(replicated(block)),
            reshard_after_forward=keep_gathered == "none",
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _set_prefetch(model, prefetch_layers)
    return model


def _set_prefetch(model: nn.Module, layers: int) -> None:
    """Gathers the weights of the next `layers` blocks while a block computes, in the forward pass and in the backward pass. The order is
    fixed before the first step, so the exchanges of all ranks follow each other alike, also where the host is slow. FSDP2 reduces the
    gradients of a block while the block before it computes."""
    blocks = list(model.get_submodule("blocks").children())
    for order, name in ((blocks, "forward"), (blocks[::-1], "backward")):
        for number, module in enumerate([model, *order]):
            getattr(module, f"set_modules_to_{name}_prefetch")(order[number : number + layers])


def begin_microbatch(model: nn.Module, keep_gathered: str, last: bool) -> None:
    """Says whether the next backward pass is the last one of a step. The last one sums gradients over copies of the weights
    (shard_degree), frees gathered weights, and, with "gradients", reduces the step's gradients."""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_all_reduce(last)
    if keep_gathered != "none":
        model.set_reshard_after_backward(last)
    if keep_gathered == "gradients":
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Frees the weights that forward passes without a backward pass have gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_replicated_gradients(model: nn.Module, world: World) -> None:
    """Replaces the gradients of parameters that no rank shards by their sum over ranks, in one exchange of fp32 values.
    Call it once a step, after the last microbatch."""
    if world.size == 1:
        return
    grads = [p.grad for p in replicated(model) if p.grad is not None]
    if not grads:
        return
    total = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(total)
    for grad, value in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(value.view_as(grad))


def replicated(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank keeps whole, of all mixers in a module."""
    found = (part for part in module.modules() if isinstance(part, GatedDeltaNet))
    return [parameter for part in found for parameter in part.replicated()]


def context_group(world: World, degree: int) -> tuple[str, int] | None:
    """(name, size) of the group of `degree` consecutive ranks that share rows of tokens with this rank; None with
    degree 1."""
    if degree == 1:
        return None
    mesh = init_device_mesh(world.device.type, (world.size // degree, degree), mesh_dim_names=("data", "context"))
    return str(mesh.get_group("context").group_name), degree


def _mesh(world: World, shard_degree: int) -> DeviceMesh:
    degree = shard_degree or world.size
    if world.size % degree:
        raise SftError(
            f"shard_degree {degree} does not divide the {world.size} processes; next: choose a divisor, or 0 for all"
        )
    if degree == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(world.device.type, (world.size // degree, degree), mesh_dim_names=names)


def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copies a complete tensor, which every rank has, into a plain or sharded parameter. Nothing is sent."""
    with torch.no_grad():
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
