"""OLMo-core's step folders outside of a run: to a Hugging Face folder, and back to a step that training starts from.

    make to-hf   SRC=stepN DST=folder     its config.json says the architecture; the tokenizer lies in it or beside it
    make to-core SRC=folder DST=step0     fp32, vocabulary padded to a multiple of 128

SRC and DST may be gs://…, SRC of to-core also hf://org/name[@revision]; remote ones pass through the cache. Both directions
stream (memory does not grow with the model) and prove what they wrote before it has its final name. No process group, no GPU.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata, planner

from sft.checkpoint.dcp_reader import DcpReader, Weights
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.olmo_core import model_config, step_config
from sft.common.errors import SftError
from sft.common.files import sync_folder
from sft.export import card, gate
from sft.export.rows import TOKENIZER_FILES, finite, pieces, write_json
from sft.export.write import export
from sft.formats import manifest
from sft.formats.dataset import TokenIds, TokenizerFacts
from sft.formats.gate import GateRecord, LogitCheck
from sft.formats.manifest import StepManifest
from sft.formats.record import to_json
from sft.formats.steps import METADATA, StepMetadata
from sft.model import hf
from sft.recipe.presets import ModelConfig
from sft.recipe.schema import Convert, Prepare
from sft.runner.cli import program
from sft.storage.base_weights import find_base
from sft.storage.contract import FileCopy
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage, transfer

Log = Callable[[str], None]
_CHUNK = 64 << 20  # bytes of one stored piece of a tensor
_TEXT = "The capital of France is Paris. 17 plus 25 is 42. Red, yellow and blue are the primary colours.\n"


def to_hf(
    source: str, target: str, options: Convert, tokenizer: str, template: str, cache: Path, log: Log
) -> GateRecord:
    """Exports an OLMo-core step, proves it and publishes it at `target`; returns the gate's report."""
    from sft.data.tokenize import Encoder

    with arriving(target, cache, log) as out:
        step = _bring(source, cache, log)
        config = model_config(step / "config.json")
        folder = _bring(tokenizer, cache, log) if tokenizer else _tokenizer_of(step, source, cache, log)
        encoder = Encoder(
            folder, Prepare(tokenizer=str(folder), sources=(), template=template), lambda path: Path(path)
        )
        facts, text = encoder.identity, encoder.template.text
        _check_ids(step / "config.json", facts, config)
        weights = DcpReader(step)
        with _scratch(cache) as work:
            encoder.save_tokenizer(work)
            export(weights, config, facts, work, out, options, text, log)
        report = gate.check(out, weights, config, facts, text, options, log)
        weights.close()
        (out / "README.md").write_text(card.of_checkpoint(source, facts, report), encoding="utf-8")
    return report


def to_core(source: str, target: str, cache: Path, log: Log) -> LogitCheck:
    """Writes a Hugging Face folder as OLMo-core's step, proves it and publishes it at `target`; returns what was compared."""
    with arriving(target, cache, log) as out:
        folder = HfFolder(_bring(source, cache, log))
        found = hf.model_config(folder.config, str(folder.path / "config.json"))
        folder.check(found)
        config = replace(found, vocab_size=-(-found.vocab_size // 128) * 128)
        said = folder.config
        eos = said.get("eos_token_id")
        ids = TokenIds(found.vocab_size, eos[0] if isinstance(eos, list) else eos, said.get("pad_token_id"))
        (out / "train").mkdir(parents=True)
        write_step(folder, step_shapes(config), out, str(folder.path))
        write_json(out / "config.json", step_config(config, ids))
        StepMetadata().write(out / METADATA)
        torch.save({}, out / "train" / "rank0.pt")
        if (folder.path / "tokenizer.json").is_file():
            (out / "tokenizer").mkdir()
            for name in TOKENIZER_FILES:
                if (folder.path / name).is_file():
                    shutil.copyfile(folder.path / name, out / "tokenizer" / name)
        log(f"step written: {config.parameters:,} parameters in fp32")
        report = check_step(folder, config, out, log)
        names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        record = StepManifest(manifest.SCHEMA, 0, manifest.describe(out, names))
        write_json(out / manifest.NAME, record.to_value())
        folder.close()
    return report


def check_step(folder: HfFolder, config: ModelConfig, step: Path, log: Log) -> LogitCheck:
    """The step's values are the folder's, rows beyond its vocabulary are zero, and our reading of config.json computes what
    transformers computes. Raises SftError."""
    written = DcpReader(step)
    shapes = step_shapes(config)
    hf.check_shapes({name: written.shape(name) for name in written}, shapes, str(step))
    for name, shape in shapes.items():
        for start, stop in pieces(shape):
            if not torch.equal(written.rows(name, start, stop), _padded(folder, name, start, stop)):
                raise SftError(f"{step}: {name}: not the folder's values; next: check that disk and run it again")
    written.close()
    if model_config(step / "config.json") != config:
        raise SftError(f"{step / 'config.json'}: does not read back as what was written; next: report it")
    layers = gate.sample_layers(config.n_layers)
    logits = gate.check_logits(folder, folder, config, _documents(folder.path, config), layers)
    log(
        f"every value compared; logits agree with transformers' to {logits.max_difference:.1e} of {logits.max_logit:.1f}"
        f" over layers {', '.join(map(str, layers))}"
    )
    return logits


def _documents(folder: Path, config: ModelConfig) -> list[list[int]]:
    """Token ids of running text (a base has no template), the first document longer than the window."""
    file = folder / "tokenizer.json"
    longest = config.window + 64 if config.window else 512
    if file.is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(file)).encode(_TEXT, add_special_tokens=False).ids
    else:
        ids = list(range(min(97, config.vocab_size // 2)))
    return [(ids * (longest // len(ids) + 1))[:longest], ids, ids[: len(ids) // 2]]


def step_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of an OLMo-core step, which holds a tied head a second time."""
    shapes = hf.shapes(config)
    return {**shapes, "lm_head.w_out.weight": shapes[hf.head_name(config)]}


class _Planner(dcp.DefaultSavePlanner):
    """Plans a step whose tensors are read when they are written, in pieces as the ranks of a sharded run would write them."""

    def __init__(self, weights: Weights, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        super().__init__()
        self.weights, self.shapes, self.origin = weights, shapes, origin

    def create_local_plan(self) -> planner.SavePlan:
        properties = metadata.TensorProperties(dtype=torch.float32)
        items = []
        for name, shape in self.shapes.items():
            rows = max(1, _CHUNK // 4 // max(1, torch.Size(shape[1:]).numel()))
            for number, start in enumerate(range(0, shape[0], rows)):
                offset = torch.Size((start, *(0,) * (len(shape) - 1)))
                size = torch.Size((min(rows, shape[0] - start), *shape[1:]))
                items.append(
                    planner.WriteItem(
                        index=metadata.MetadataIndex(f"model.{name}", offset, number),
                        type=planner.WriteItemType.SHARD,
                        tensor_data=planner.TensorWriteData(
                            metadata.ChunkStorageMetadata(offset, size), properties, torch.Size(shape)
                        ),
                    )
                )
        self.mappings = {f"model.{name}": ("model", name) for name in self.shapes}
        self.plan = planner.SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: planner.WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None and write_item.tensor_data is not None
        name, start = write_item.index.fqn.removeprefix("model."), write_item.index.offset[0]
        values = _padded(self.weights, name, start, start + write_item.tensor_data.chunk.sizes[0])
        if not finite(values):
            raise SftError(f"{self.origin}: {name}: NaN or infinity from row {start} on; next: fetch the weights again")
        return values


def write_step(weights: Weights, shapes: Mapping[str, tuple[int, ...]], out: Path, origin: str) -> None:
    """model_and_optim/ of a step: the weights in fp32, missing rows of the vocabulary as zeros. `origin`: for messages."""
    writer = dcp.FileSystemWriter(out / "model_and_optim", single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():  # one process without a group is what was meant
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            dcp.save({}, storage_writer=writer, planner=_Planner(weights, shapes, origin), no_dist=True)
    except dcp.api.CheckpointException as error:
        reason = next((f[0] for f in error.failures.values()), error)
        raise (
            reason if isinstance(reason, SftError | OSError) else SftError(f"{out}: could not be written: {reason}")
        ) from error


def _padded(weights: Weights, name: str, start: int, stop: int) -> torch.Tensor:
    if name == "lm_head.w_out.weight" and name not in weights:
        name = "embeddings.weight"  # tied
    there = weights.shape(name)
    values = torch.zeros(stop - start, *there[1:])
    if start < there[0]:
        values[: there[0] - start] = weights.rows(name, start, min(stop, there[0]))
    return values


def _check_ids(file: Path, facts: TokenizerFacts, config: ModelConfig) -> None:
    """The tokenizer must be the one that the step was trained with, as far as its config.json tells."""
    said = hf.read_json(file).get("dataset") or {}
    said = said.get("tokenizer") or {} if isinstance(said, dict) else {}
    for name, ours in (
        ("vocab_size", facts.vocab_size),
        ("eos_token_id", facts.eos_id),
        ("pad_token_id", facts.pad_id),
    ):
        if said.get(name) not in (None, ours):
            raise SftError(
                f"{file}: dataset.tokenizer.{name}: {said[name]}, the tokenizer has {ours}; next: name the step's own with TOKENIZER="
            )
    if facts.vocab_size > config.vocab_size:
        raise SftError(
            f"{file}: model.vocab_size: {config.vocab_size}, the tokenizer has {facts.vocab_size} ids; next: name the step's own"
            " with TOKENIZER="
        )


def _tokenizer_of(step: Path, source: str, cache: Path, log: Log) -> Path:
    for folder in (step / "tokenizer", step, step.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    if source.startswith("gs://"):
        return _bring(source.rstrip("/").rsplit("/", 1)[0] + "/tokenizer", cache, log)
    raise SftError(f"{step}: no tokenizer/ in it or beside it; next: name its folder with TOKENIZER=")


def _bring(source: str, cache: Path, log: Log) -> Path:
    """A folder, or a remote one as it lies in the cache, compared with what its storage says of it."""

    def find(path: str, _: str) -> Path:
        if not Path(path).is_dir():
            raise SftError(f"{path}: no such folder; next: correct SRC=")
        return Path(path)

    return find_base(source, find, cache, log).folder.root


@contextlib.contextmanager
def arriving(target: str, cache: Path, log: Log) -> Iterator[Path]:
    """A folder to write into, which gets its final name (or goes to its bucket) when the body ends well."""
    remote = target.startswith("gs://")
    if not target or (not remote and Path(target).exists()):
        raise SftError(
            f"DST={target}: {'is there already' if target else 'missing'}; next: name a new folder with DST="
        )
    if remote:
        with _scratch(cache) as work:
            yield work / "out"
            local = LocalStorage(work / "out")
            bucket = open_storage(target, cache)
            jobs = [FileCopy(o.path, o.path, o.bytes, o.sha256) for o in manifest.describe(local.root, local.list())]
            # What says that the folder is whole travels last.
            last = [j for j in jobs if j.source in (manifest.NAME, "config.json")]
            transfer([j for j in jobs if j not in last], local, bucket, log)
            transfer(last, local, bucket, log)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.parent / f".{final.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
        for path in sorted(p for p in work.rglob("*") if p.is_dir()):
            sync_folder(path)
        sync_folder(work)
        work.rename(final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    import tempfile

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="convert-") as name:
        yield Path(name)


_CACHE = click.option(
    "--cache", type=click.Path(path_type=Path), default="runs/.cache", help="Where remote folders are copied to."
)


@program("to-hf", "stages/to_hf.py")
@click.argument("source")
@click.argument("target")
@click.argument("options", nargs=-1, metavar="[FIELD=VALUE]...")
@_CACHE
@click.option("--tokenizer", default="", metavar="FOLDER", help="Tokenizer of the step. Default: in it or beside it.")
@click.option("--template", default="tokenizer", help="Chat template that was trained: a name or a .jinja file.")
def to_hf_program(
    source: str, target: str, options: tuple[str, ...], cache: Path, tokenizer: str, template: str
) -> None:
    """Converts the OLMo-core step SOURCE (folder or gs://…) to the new Hugging Face folder TARGET. FIELD=VALUE sets a
    field of [convert]."""
    log = _logger("to-hf")
    report = to_hf(source, target, _options(options), tokenizer, template, cache, log)
    log(f"{target}: {json.dumps(to_json(report.summary))}")


@program("to-core", "stages/to_core.py")
@click.argument("source")
@click.argument("target")
@_CACHE
def to_core_program(source: str, target: str, cache: Path) -> None:
    """Converts the Hugging Face folder SOURCE (also gs://… or hf://org/name[@revision]) to the new OLMo-core step TARGET."""
    log = _logger("to-core")
    to_core(source, target, cache, log)
    log(f"{target}: a base for [model] base, here or in OLMo-core")


def _logger(name: str) -> Callable[[str], None]:
    return lambda text: print(f"[{name}] {text}", flush=True)


def _options(fields: Sequence[str]) -> Convert:
    """[convert] from field=value."""
    from sft.recipe import recipe

    problems: list[str] = []
    data: dict[str, Any] = {}
    hints = recipe.typing.get_type_hints(Convert)
    for text in fields:
        name, _, value = text.partition("=")
        data[name] = recipe.parse_value(value, hints.get(name, str))
    made = recipe._build(Convert, data, "convert", problems)
    if problems:
        raise SftError("\n".join(problems) + "\nnext: correct it; `make fields` lists every field")
    return made
