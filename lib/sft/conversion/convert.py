"""The convert stage: a training checkpoint to a Hugging Face folder that is proven equal before it is published.

In:  the final step folder of train (OLMo-core's layout), train's tokenizer folder, prepare's dataset.json.
Out: model/     sharded safetensors (vocabulary cut to the tokenizer), config.json, generation_config.json, the tokenizer
                with its chat template, README.md; AutoModelForCausalLM and AutoTokenizer load it
     gate.json  what was compared before publishing (sft.conversion.gate)

Weights are read, cast and written a piece at a time: memory does not grow with the model.
Run: make convert RECIPE=…, or python stages/convert.py runs/<run>.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.conversion import hf
from sft.conversion.stream import prefetched
from sft.errors import SftError
from sft.presets import ModelConfig, resolve
from sft.training.tensors import Tensors, Weights

if TYPE_CHECKING:
    from sft.schema import Convert, Model
    from sft.stage import Result, Stage

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Everything a tokenizer folder may hold; nothing else of train's folder is published.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PIECE_ELEMENTS = 1 << 20  # values that are read, cast and written at once: they stay in the processor's cache
# A chat model also ends its turn on these where the tokenizer has them as special tokens.
_CHAT_ENDS = ("<|im_end|>", "<|endoftext|>")


def convert(stage: Stage) -> Result:
    """The stage: export, prove, publish."""
    from sft.conversion import card
    from sft.conversion.gate import check
    from sft.stage import Result

    facts = hf.read_json(stage.folder("prepare") / "dataset.json")
    step = final_step(stage.folder("train"))
    config = model_config(stage.recipe.model, facts, step)
    options, weights = stage.recipe.convert, Tensors(step)
    trained = (step.parent / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    template = evaluation_template(options.eval_template, stage.find) or trained
    stage.say(f"{step.name}: {config.parameters:,} parameters to {options.dtype}")
    model = stage.out / "model"
    shutil.rmtree(model, ignore_errors=True)
    size = export(weights, config, facts, step.parent / "tokenizer", model, options, template, stage.say)
    gate = check(model, weights, config, facts, trained, options, stage.say)
    weights.close()
    write_json(stage.out / "gate.json", gate)
    (model / "README.md").write_text(card.of_run(stage.run, stage.recipe, gate), encoding="utf-8")
    metrics = {
        "step": int(step.name.removeprefix("step")),
        "parameters": config.parameters,
        "bytes": size,
        "template": {
            "name": options.eval_template or "as trained",
            "sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "gate": gate["summary"],
    }
    return Result(outputs=["model", "gate.json"], metrics=metrics)


def evaluation_template(name: str, find: Callable[[str, str], Path]) -> str:
    """The text of [convert] eval_template: a name of sft.data.templates or a .jinja file; "" where there is none."""
    from sft.data.templates import FAMILIES
    from sft.inputs import is_template_file

    if is_template_file(name):
        return find(name, "convert.eval_template").read_text(encoding="utf-8")
    if name and name not in FAMILIES:
        raise SftError(
            f"[convert] eval_template = {name!r}: none of {', '.join(FAMILIES)}, nor a .jinja file; next: correct it"
        )
    return FAMILIES[name].jinja if name else ""


def final_step(train: Path) -> Path:
    """The step folder that train's manifest names as the last; never guessed from what happens to lie there."""
    file = train / "manifest.json"
    step = hf.read_json(file).get("metrics", {}).get("final_step")
    if not isinstance(step, int):
        raise SftError(f"{file}: metrics.final_step: {step!r}, expected a number; next: make train again")
    folder = train / f"step{step}"
    if not (folder / "model_and_optim" / ".metadata").is_file():
        raise SftError(f"{folder}: no checkpoint (model_and_optim/.metadata), though {file} names step {step}")
    return folder


def model_config(model: Model, facts: Mapping[str, Any], step: Path) -> ModelConfig:
    """The architecture that was trained: the recipe's, and the checkpoint's own config.json must agree with it."""
    from sft.conversion import core

    config = resolve(model, int(facts["vocab_size"]))
    saved = core.model_config(step / "config.json")
    for name in (field.name for field in fields(config) if field.name != "init_std"):
        if getattr(saved, name) != getattr(config, name):
            raise SftError(
                f"{step / 'config.json'}: {name}: {getattr(saved, name)}, the recipe's [model] says {getattr(config, name)};"
                " next: make train again, or correct [model]"
            )
    return config


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    bytes: int


def export(
    weights: Weights,
    config: ModelConfig,
    facts: Mapping[str, Any],
    tokenizer: Path,
    target: Path,
    options: Convert,
    template: str,
    say: Callable[[str], None] = print,
) -> int:
    """Writes the whole folder `target`; returns the bytes of the weights. Raises SftError for an unusable checkpoint.

    `template` is the chat template that the folder carries; the tokenizer's own must be the one trained with.
    """
    vocab = int(facts["vocab_size"])
    target.mkdir(parents=True)
    size = write_weights(weights, config, vocab, target, options.dtype, int(options.shard_gb * 1e9), say)
    stops = stop_ids(facts, tokenizer)
    made = hf.hf_config(
        config,
        vocab_size=vocab,
        max_position_embeddings=options.max_position_embeddings,
        dtype=options.dtype,
        eos_token_id=int(facts["eos_id"]),
        pad_token_id=int(facts["pad_id"]),
    )
    write_json(target / "config.json", hf.config_json(made))
    generation = {
        "do_sample": False,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": int(facts["pad_id"]),
    }
    write_json(target / "generation_config.json", generation)
    copy_tokenizer(tokenizer, target, facts)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return size


def stop_ids(facts: Mapping[str, Any], tokenizer: Path) -> list[int]:
    """Ids that end a reply: the trained terminators first, then end-of-text and the ends of turns that are special tokens."""
    file = tokenizer / "tokenizer.json"
    special = {t.get("content"): t.get("id") for t in hf.read_json(file).get("added_tokens", []) if t.get("special")}
    ids = [int(i) for i in facts["terminator_ids"]]
    if not ids:
        raise SftError(
            "dataset.json: terminator_ids: empty; the model was never trained to stop; next: make prepare again"
        )
    ids += [int(facts["eos_id"])] + [int(special[name]) for name in _CHAT_ENDS if name in special]
    return list(dict.fromkeys(ids))


def copy_tokenizer(source: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Copies the tokenizer as it was trained with, byte for byte, after checking that it is that one."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name, wanted in (
        ("tokenizer.json", facts["tokenizer"]["sha256"]),
        ("chat_template.jinja", facts["template"]["sha256"]),
    ):
        file = source / name
        if not file.is_file():
            raise SftError(
                f"{file}: missing; the export needs what the model was trained with; next: make prepare again"
            )
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != wanted.removeprefix("sha256:"):
            raise SftError(f"{file}: sha256 {found}, dataset.json has {wanted}: not what the model was trained with")


def write_weights(
    weights: Weights,
    config: ModelConfig,
    vocab: int,
    target: Path,
    dtype: str,
    shard_bytes: int,
    say: Callable[[str], None] = print,
) -> int:
    """Writes model*.safetensors and the index, a piece of a tensor at a time; returns the bytes of the tensors.

    Checks on the way that every tensor is there once, with its shape, and finite before and after the cast; rows beyond
    the tokenizer's are read and checked, and left out.
    """
    kind = hf.family(config)
    padded, cut = hf.shapes(config), hf.shapes(config, vocab)
    hf.check_shapes({name: weights.shape(name) for name in hf.once(weights, config)}, padded, "the checkpoint")
    width = DTYPES[dtype].itemsize
    shards: list[list[_Entry]] = [[]]
    for name, shape in cut.items():
        size = torch.Size(shape).numel() * width
        if shards[-1] and sum(e.bytes for e in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(_Entry(name, shape, size))
    total = sum(e.bytes for shard in shards for e in shard)
    free = shutil.disk_usage(target).free
    if free < total * 1.02:
        raise SftError(
            f"{target}: the weights need {total:,} bytes, {free:,} are free; next: free space and run it again"
        )
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (target / name).open("wb") as file:
            file.write(_header(shard, kind, dtype))
            places = [(entry, *piece) for entry in shard for piece in pieces(padded[entry.name])]
            read = (partial(weights.rows, entry.name, start, stop) for entry, start, stop in places)
            for (entry, start, _), exact in zip(places, prefetched(read), strict=True):
                file.write(_cast(exact, entry, start, dtype).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        weight_map |= {kind.theirs(entry.name): name for entry in shard}
        done += sum(entry.bytes for entry in shard)
        say(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / "model.safetensors.index.json", index)
    return total


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Stretches of rows with about _PIECE_ELEMENTS values each."""
    step = max(1, _PIECE_ELEMENTS // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _cast(exact: torch.Tensor, entry: _Entry, start: int, dtype: str) -> torch.Tensor:
    """Rows of a tensor, from `start` on, in the export's dtype, those beyond the entry's left out. Refuses NaN and infinity."""
    made = exact[: max(0, entry.shape[0] - start)].to(DTYPES[dtype])
    if not finite(exact) or (dtype != "float32" and not finite(made)):
        why = (
            f"too large for {dtype}; next: export as bfloat16"
            if finite(exact)
            else "the checkpoint is damaged or diverged; next: see metrics.jsonl, and convert an earlier step"
        )
        raise SftError(f"the checkpoint: {entry.name}: NaN or infinity from row {start} on: {why}")
    return made


def finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity. The extremes tell, and need no second tensor."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _header(entries: list[_Entry], kind: hf.Family, dtype: str) -> bytes:
    """The head of a safetensors file: length, then JSON with dtype, shape and byte range of every tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[kind.theirs(entry.name)] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.bytes],
        }
        start += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, data: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
