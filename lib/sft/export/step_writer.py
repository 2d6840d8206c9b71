"""Writes a step folder that training and OLMo-core read, from weights that are read while they are written.

In:  weights by our names (a Hugging Face folder, the mean of steps), their shapes in the step.
Out: stepN/model_and_optim/ in torch's DCP layout, fp32, without optimizer state; config.json, .metadata.json, train/rank0.pt,
     tokenizer/ and manifest.json. Needs no process group. Memory does not grow with the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from sft.checkpoint.dcp_reader import DcpReader, Weights
from sft.common.errors import SftError
from sft.common.files import write_json
from sft.export.blocks import all_finite, row_blocks
from sft.export.tokenizer_files import copy_tokenizer_files
from sft.formats import manifest
from sft.formats.manifest import StepManifest
from sft.formats.steps import METADATA, StepMetadata

CHUNK_BYTES = 64 << 20
"""Size of a stored chunk of a tensor."""


class _StreamingPlanner(DefaultSavePlanner):
    """Plans chunks of rows, as the ranks of a sharded run would store them, and reads each one when it is written."""

    def __init__(self, weights: Weights, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        super().__init__()
        self.weights, self.shapes, self.origin = weights, shapes, origin

    def create_local_plan(self) -> planner.SavePlan:
        items = [item for name, shape in self.shapes.items() for item in _write_items(name, shape)]
        self.mappings = {f"model.{name}": ("model", name) for name in self.shapes}
        self.plan = planner.SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: planner.WriteItem) -> Tensor:
        assert write_item.index.offset is not None and write_item.tensor_data is not None
        name, start = write_item.index.fqn.removeprefix("model."), write_item.index.offset[0]
        values = padded_rows(self.weights, name, start, start + write_item.tensor_data.chunk.sizes[0])
        if not all_finite(values):
            raise SftError(f"{self.origin}: {name}: NaN or infinity from row {start} on; next: fetch the weights again")
        return values


def _write_items(name: str, shape: tuple[int, ...]) -> list[planner.WriteItem]:
    """The chunks of a tensor: consecutive rows, of about CHUNK_BYTES in fp32."""
    properties = metadata.TensorProperties(dtype=torch.float32)
    rows = max(1, CHUNK_BYTES // 4 // max(1, torch.Size(shape[1:]).numel()))
    items = []
    for number, start in enumerate(range(0, shape[0], rows)):
        offset = torch.Size((start, *(0,) * (len(shape) - 1)))
        size = torch.Size((min(rows, shape[0] - start), *shape[1:]))
        chunk = planner.TensorWriteData(metadata.ChunkStorageMetadata(offset, size), properties, torch.Size(shape))
        index = metadata.MetadataIndex(f"model.{name}", offset, number)
        items.append(planner.WriteItem(index=index, type=planner.WriteItemType.SHARD, tensor_data=chunk))
    return items


def write_step_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]], step: Path, origin: str) -> None:
    """Writes model_and_optim/ of a step in fp32; rows beyond those of `weights` are zero.

    `origin` names the weights in messages. Raises SftError for NaN and infinity, OSError for a failing disk.
    """
    writer = FileSystemWriter(step / "model_and_optim", single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():  # one process without a group is intended
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            save({}, storage_writer=writer, planner=_StreamingPlanner(weights, shapes, origin), no_dist=True)
    except CheckpointException as error:
        reason = next((f[0] for f in error.failures.values()), error)
        raise (
            reason if isinstance(reason, SftError | OSError) else SftError(f"{step}: could not be written: {reason}")
        ) from error


def check_step_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]], step: Path, what: str) -> None:
    """Reads a written step back and compares every value. `what` names the weights. Raises SftError for a difference."""
    written = DcpReader(step)
    for name, shape in shapes.items():
        for start, stop in row_blocks(shape):
            if not torch.equal(written.rows(name, start, stop), padded_rows(weights, name, start, stop)):
                raise SftError(f"{step}: {name}: not {what}; next: check that disk and run it again")
    written.close()


def padded_rows(weights: Weights, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor in fp32; rows that it does not have are zero. A tied head is the embedding."""
    if name == "lm_head.w_out.weight" and name not in weights:
        name = "embeddings.weight"
    shape = weights.shape(name)
    values = torch.zeros(stop - start, *shape[1:])
    if start < shape[0]:
        values[: shape[0] - start] = weights.rows(name, start, min(stop, shape[0]))
    return values


def write_step_files(step: Path, tokenizer: Path | None) -> None:
    """Writes .metadata.json, train/rank0.pt and the tokenizer of a step. `tokenizer`: a tokenizer folder."""
    write_json(step / METADATA, StepMetadata().to_value())
    (step / "train").mkdir()
    torch.save({}, step / "train" / "rank0.pt")
    if tokenizer:
        (step / "tokenizer").mkdir()
        copy_tokenizer_files(tokenizer, step / "tokenizer")


def write_step_manifest(step: Path) -> None:
    """Writes manifest.json, with all files of the step. Training counts the step as number 0."""
    names = sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())
    record = StepManifest(StepManifest.SCHEMA, 0, manifest.describe(step, names))
    write_json(step / manifest.NAME, record.to_value())
