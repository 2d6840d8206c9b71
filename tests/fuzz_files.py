"""Inputs of make fuzz that are files: those between stages, datasets, packs, sources, weights."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib
import io
import json
import lzma
import pkgutil
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import sft.__main__
import sft.formats
from fuzz_values import VALUES, Strategy, damaged
from published import publish
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.record import Record
from sft.recipe import schema

# --- files between stages --------------------------------------------------------------------------------------------------


def every(cls: type[Record]) -> list[type[Record]]:
    return [
        sub for child in cls.__subclasses__() for sub in (child, *every(child)) if sub.__module__.startswith("sft.")
    ]


for module in pkgutil.iter_modules(sft.formats.__path__):
    importlib.import_module(f"sft.formats.{module.name}")
FORMATS = sorted({cls.__name__: cls for cls in every(Record)}.items())


def objects(cls: type[Record]) -> Strategy:
    """JSON objects with the fields of a format, or others, with values of any type."""
    names = st.sampled_from([*cls.__dataclass_fields__, "format", "schema", "other"])
    return st.dictionaries(names, VALUES | st.just(1), max_size=12)


def contents(cls: type[Record]) -> Strategy:
    """Bytes of any kind for a file of a format."""
    return st.binary(max_size=60) | (objects(cls) | VALUES).map(lambda v: json.dumps(v).encode())


def check_format(_: Path, case: tuple[type[Record], bytes]) -> bool:
    try:
        case[0].from_bytes(case[1], "the/file")
    except SftError as error:
        assert str(error).startswith("the/file: ") and "next: " in str(error), error
        raise
    return True


@functools.cache
def stage(folder: Path) -> dict[str, Any]:
    """The manifest of a published stage that is in the folder, as JSON."""
    made = folder / "x" / "prepare"
    (made / "data").mkdir(parents=True)
    (made / "data" / "a.npy").write_bytes(b"12345")
    (made / "b.json").write_text("{}")
    publish(made, ["data", "b.json"], stage="prepare", run="x", config={"a": [1, {"b": None}]}, metrics={"rows": 3})
    value: dict[str, Any] = json.loads((made / manifest.NAME).read_text())
    return value


def check_manifest(folder: Path, case: tuple[dict[str, Any], bool]) -> bool:
    """A manifest with other values, with the old seal or with its own."""
    value, sealed = case
    made = folder / "x" / "prepare"
    if sealed and isinstance(value, dict):
        value["seal"] = manifest.seal(value)
    (made / manifest.NAME).write_text(json.dumps(value))
    found = manifest.load(made / manifest.NAME)
    old = value["schema"] == 1 and "seal" not in value
    assert sealed or old or value == stage(folder), "a changed manifest was believed"
    broken = manifest.broken_outputs(made, found.outputs)
    assert broken or all(
        (made / o.path).is_file() and (made / o.path).resolve().is_relative_to(made) for o in found.outputs
    )
    manifest.strays(made, found.outputs)
    return not broken


# --- datasets and packs ----------------------------------------------------------------------------------------------------


@functools.cache
def dataset(folder: Path) -> Path:
    """A small dataset that is in the folder."""
    import training

    training.write_split(folder / "data", 30, 1)
    return folder / "data"


@st.composite
def broken_datasets(draw: Any, folder: Path) -> tuple[str, bytes]:
    """(name of a file, its other bytes): any bytes, or a valid index with another number."""
    import numpy as np

    name = draw(
        st.sampled_from(["documents.npy", "documents.npy", *(p.name for p in sorted(dataset(folder).iterdir()))])
    )
    data = (dataset(folder) / name).read_bytes()
    if name != "documents.npy" or draw(st.booleans()):
        return name, draw(damaged(data))
    rows = np.load(io.BytesIO(data)).copy()
    field = draw(st.sampled_from(rows.dtype.names))
    number = draw(st.integers(0, 80) | st.integers(0, int(np.iinfo(rows.dtype[field]).max)))
    rows[field][draw(st.integers(0, len(rows) - 1))] = number
    out = io.BytesIO()
    np.save(out, rows)
    return name, out.getvalue()


def check_dataset(folder: Path, case: tuple[str, bytes]) -> bool:
    """A dataset that opens has each token in one document, and is packed and loaded, or refused on the way."""
    from sft.data.dataset import Dataset
    from sft.packing.packs import pack_dataset

    name, data = case
    file = dataset(folder) / name
    whole = file.read_bytes()
    file.write_bytes(data)
    try:
        made = Dataset.open(file.parent)
        assert sum(len(ids) for ids, _ in made) == made.documents["length"].sum() == sum(map(len, made.ids))
        index = pack_dataset(made, 64)
        assert int(index.segments["length"].sum()) <= made.documents["length"].sum()
        load_packs(made, index)
    finally:
        file.write_bytes(whole)
    return True


def load_packs(made: Any, index: Any) -> None:
    """Every microbatch of one pass over the packs."""
    import numpy as np

    from sft.packing.loader import Loader, SpecialIds
    from sft.packing.steps import StepPlan
    from sft.recipe.presets import PRESETS

    if len(index):
        loader = Loader(StepPlan.once(index, 1), made, SpecialIds(1, 0), PRESETS["olmo3-tiny"])
        for number in range(min(3, len(index))):
            loader.microbatch(np.array([number]))


@functools.cache
def packs(folder: Path) -> tuple[Any, Path, dict[str, bytes]]:
    """(dataset, the folder of its packs in a cache, the files of that folder)."""
    from sft.data.dataset import Dataset
    from sft.packing.packs import pack_dataset

    made = Dataset.open(dataset(folder))
    pack_dataset(made, 64, cache=folder / "cache", identity="x")
    (found,) = (folder / "cache").iterdir()
    return made, found, {p.name: p.read_bytes() for p in sorted(found.iterdir())}


@st.composite
def broken_packs(draw: Any, folder: Path) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(packs(folder)[2])))
    return name, draw(damaged(packs(folder)[2][name]))


def check_packs(folder: Path, case: tuple[str, bytes]) -> bool:
    """A damaged index in the cache is made again; what is used is always the right one."""
    from sft.packing.packs import PackIndex, pack_dataset

    made, place, files = packs(folder)
    fresh = pack_dataset(made, 64)
    shutil.rmtree(place, ignore_errors=True)  # other maps of the files stay as they are
    place.mkdir()
    for name, data in (files | dict([case])).items():
        (place / name).write_bytes(data)
    used = True
    try:
        loaded = PackIndex.load(place)
        assert loaded.digest == fresh.digest and (loaded.segments == fresh.segments).all()
    except SftError:
        used = False
    found = pack_dataset(made, 64, cache=folder / "cache", identity="x")
    assert found.digest == fresh.digest and (found.segments == fresh.segments).all()
    return used


# --- sources ---------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"q{i} é", "completion": "a" * (i % 7)} for i in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@functools.cache
def packed() -> dict[str, bytes]:
    """The rows as files of every kind."""
    import bz2

    import pyarrow as pa
    import pyarrow.parquet as pq

    table, out, arrow = pa.Table.from_pylist(ROWS), io.BytesIO(), io.BytesIO()
    pq.write_table(table, out, row_group_size=16, compression="none", write_page_checksum=True)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table, 16)
    return {
        "x.jsonl": LINES, "x.json": json.dumps(ROWS).encode(), "x.jsonl.gz": gzip.compress(LINES, mtime=0), "x.jsonl.bz2": bz2.compress(LINES),
        "x.jsonl.xz": lzma.compress(LINES), "x.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
        "x.csv": b"prompt,completion\n" + b"".join(f"{r['prompt']},{r['completion']}\n".encode() for r in ROWS),
        "x.parquet": out.getvalue(), "x.arrow": arrow.getvalue(), "x.tar": tar(gzip.compress(LINES)),
    }  # fmt: skip


def tar(data: bytes) -> bytes:
    """An archive with one file of rows."""
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("x.jsonl.gz")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@st.composite
def sources_(draw: Any) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(packed())))
    return name, draw(damaged(packed()[name]))


def rows_of(folder: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """(rows, rejects) as prepare reads them."""
    from sft.sources import blocks, input_files

    shutil.rmtree(folder / "cache", ignore_errors=True)
    found, rejects = list[dict[str, Any]](), 0
    for file in input_files.resolve(
        schema.Source(path=name), lambda p: folder / p, folder / "cache", log=lambda _: None
    ).files:
        for chunk in input_files.cut(file):
            for batch in blocks.read(chunk):
                found += batch.rows
                rejects += len(batch.rejects)
    return found, rejects


def check_source(folder: Path, case: tuple[str, bytes]) -> bool:
    """No row is lost: a compressed file that is taken has all its rows, and every line of others is a row or a reject."""
    name, data = case
    (folder / name).unlink(missing_ok=True)  # a map of the old one may live on
    (folder / name).write_bytes(data)
    rows, rejects = rows_of(folder, name)
    if name.endswith((".gz", ".bz2", ".xz")):  # each has a checksum
        assert rows == ROWS and not rejects, f"{len(rows)} rows of {len(ROWS)}, and {rejects} rejects"
    elif name.endswith(".zst"):
        assert len(rows) + rejects >= 1 and (rows == ROWS or len(data) == len(packed()[name])), len(rows)
    elif name.endswith(".jsonl"):
        lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        assert len(rows) + rejects == len(lines), f"{len(rows)} rows, {rejects} rejects of {len(lines)} lines"
    elif name.endswith(".json") and data.lstrip()[:1] == b"[":
        assert len(rows) + rejects == len(json.loads(data)), len(rows)
    return True


# --- checkpoints -----------------------------------------------------------------------------------------------------------


@functools.cache
def weights(folder: Path) -> dict[str, bytes]:
    """A DCP checkpoint and safetensors of the same tensors, {name: bytes}. The folder has the checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    tensors = {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.ones(5, dtype=torch.bfloat16)}
    place = folder / "step1" / "model_and_optim"
    with contextlib.redirect_stderr(io.StringIO()):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(place), no_dist=True)
    (folder / "hf").mkdir()
    save_file({"a": tensors["model.a"], "b": tensors["model.b"]}, folder / "hf" / "model.safetensors")
    files = [*sorted(place.iterdir()), folder / "hf" / "model.safetensors"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@st.composite
def broken_weights(draw: Any, folder: Path) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(weights(folder))))
    return name, draw(damaged(weights(folder)[name]))


def check_weights(folder: Path, case: tuple[str, bytes]) -> bool:
    """The readers of checkpoints, without the hashes that come before them."""
    from contextlib import ExitStack

    from sft.checkpoint.dcp_reader import DcpReader
    from sft.checkpoint.weight_files import open_files

    for name, data in (weights(folder) | dict([case])).items():
        (folder / name).write_bytes(data)
    if case[0].startswith("hf"):
        with ExitStack() as stack:
            files, _ = open_files(folder / "hf", stack)
            for stored in files.values():
                assert stored.shape is not None
        return True
    for name, tensor in DcpReader(folder / "step1").items():
        assert tensor.numel() in (5, 12), name
    return True
