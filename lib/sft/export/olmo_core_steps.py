"""OLMo-core's step folders outside of a run: to a Hugging Face folder, and back to a step that training starts from.

    make to-hf   SRC=stepN DST=folder     the architecture is in its config.json; the tokenizer is in it or beside it
    make to-core SRC=folder DST=step0     fp32, vocabulary padded to a multiple of 128

SRC and DST may be gs://… or s3://…, and SRC of to-core also hf://org/name[@revision]; remote folders pass through the cache. Both directions
stream, so memory does not grow with the model, and verify what they wrote before it gets its final name. They need no process
group and no GPU.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer

from sft.checkpoint.adapter import Merged
from sft.checkpoint.dcp_reader import DcpReader, Weights
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.olmo_core import base_facts, config_of_step, named_tokens, step_config
from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.files import write_json
from sft.common.library_logs import quiet_libraries
from sft.common.paths import BUCKETS
from sft.export import card, gate
from sft.export.convert import about_quantisation, with_length
from sft.export.logits import compare_logits, sample_layers
from sft.export.places import Log, local_folder, new_folder, scratch_folder
from sft.export.step_writer import check_step_weights, write_step_files, write_step_manifest, write_step_weights
from sft.export.tokenizer_files import tokenizer_beside
from sft.export.write import Trained, export
from sft.formats.dataset import TokenIds, TokenizerFacts
from sft.formats.gate import GateRecord, LogitCheck
from sft.formats.record import to_json
from sft.model import hf
from sft.recipe import typed
from sft.recipe.architecture import ModelConfig
from sft.recipe.base_config import read_hf_config
from sft.recipe.resolve import with_positions
from sft.recipe.schema import Convert, Prepare
from sft.runner.cli import program

VOCABULARY_MULTIPLE = 128
"""OLMo-core pads the rows of the embedding to a multiple of this."""
_TEXT = "The capital of France is Paris. 17 plus 25 is 42. Red, yellow and blue are the primary colours.\n"


def to_hf(
    source: str, target: str, options: Convert, tokenizer: str, template: str, cache: Path, log: Log
) -> GateRecord:
    """Exports an OLMo-core step, checks the export and publishes it at `target`. Returns the gate's record.

    `tokenizer` is a folder, or "" for the one in the step or beside it. `template` is the chat template that the model was trained
    with: a name, a template file, or "tokenizer". Raises SftError.
    """
    from sft.data.tokenize import Encoder  # start-up: a second, which to-core does without

    with new_folder(target, cache, log) as out:
        step = local_folder(source, cache, log)
        config = config_of_step(step / "config.json")
        trained_base = base_facts(step / "config.json")
        options, lines = with_length(options, config, trained_base, 0)
        for line in [*lines, *about_quantisation(options, trained_base)]:
            log(line)
        folder = (
            local_folder(tokenizer, cache, log, "TOKENIZER") if tokenizer else _find_tokenizer(step, source, cache, log)
        )
        encoder = Encoder(folder, Prepare(tokenizer=str(folder), sources=(), template=template), Path)
        facts, text = encoder.identity, encoder.template.text
        _check_ids(step / "config.json", facts, config)
        weights = DcpReader(step)
        with scratch_folder(cache) as work:
            encoder.save_tokenizer(work)
            export(Trained(weights, config, facts, work, trained_base), text, options, out, log)
        record = gate.check(out, weights, config, facts, text, options, log)
        weights.close()
        (out / "README.md").write_text(card.of_checkpoint(source, facts, record), encoding="utf-8")
    return record


def to_core(source: str, target: str, cache: Path, log: Log, adapter: str = "") -> LogitCheck:
    """Writes a Hugging Face folder as a step of OLMo-core, checks the step and publishes it at `target`. Raises SftError.

    `adapter` is a folder with a LoRA adapter of PEFT, which is merged into the weights. The logits are compared before that.
    """
    with new_folder(target, cache, log) as out:
        folder = HfFolder(local_folder(source, cache, log))
        described = with_positions(read_hf_config(folder.config, str(folder.path / "config.json")))
        theirs = described.config
        folder.check(theirs)
        for note in folder.notes:
            log(note)
        weights: Weights = folder
        if adapter:
            weights = Merged(folder, local_folder(adapter, cache, log, "ADAPTER"))
            log(f"{adapter}: merged into {len(weights.pairs)} matrices, scale {weights.scale:g}")
        config = replace(theirs, vocab_size=-(-theirs.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
        out.mkdir(parents=True)
        write_step_weights(weights, step_shapes(config), out, str(folder.path))
        write_json(out / "config.json", step_config(config, _token_ids(folder), described.facts))
        write_step_files(out, folder.path if (folder.path / "tokenizer.json").is_file() else None)
        log(f"step written: {config.parameters:,} parameters in fp32")
        logits = check_step(folder, config, out, log, weights)
        write_step_manifest(out)
        folder.close()
    return logits


def check_step(
    folder: HfFolder, config: ModelConfig, step: Path, log: Log, weights: Weights | None = None
) -> LogitCheck:
    """Checks a step that was made from a Hugging Face folder. Raises SftError.

    1. The step's tensors have the folder's values, or those of `weights`; rows beyond its vocabulary are zero.
    2. The step's config.json reads back as the same architecture.
    3. The training code computes the logits that transformers computes, over a sample of layers.
    """
    shapes = step_shapes(config)
    written = DcpReader(step)
    hf.check_shapes({name: written.shape(name) for name in written}, shapes, str(step))
    written.close()
    check_step_weights(weights or folder, shapes, step, "the folder's values")
    if config_of_step(step / "config.json") != config:
        raise SftError(f"{step / 'config.json'}: does not read back as what was written; next: report it")
    layers = sample_layers(config.n_layers)
    logits = compare_logits(folder, folder, config, _documents(folder.path, config), layers)
    log(
        f"every value compared; logits agree with transformers' to {logits.max_difference:.1e} of {logits.max_logit:.1f}"
        f" over layers {', '.join(map(str, layers))}"
    )
    return logits


def step_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of an OLMo-core step. It stores a tied head a second time."""
    shapes = hf.shapes(config)
    return {**shapes, "lm_head.w_out.weight": shapes[hf.head_name(config)]}


def _token_ids(folder: HfFolder) -> TokenIds:
    eos = folder.config.get("eos_token_id")
    return TokenIds(
        int(folder.config["vocab_size"]), eos[0] if isinstance(eos, list) else eos, folder.config.get("pad_token_id")
    )


def _documents(folder: Path, config: ModelConfig) -> list[list[int]]:
    """Three documents as token ids; the first is longer than the sliding window. Plain text, as a base has no template."""
    file = folder / "tokenizer.json"
    longest = config.window + 64 if config.window else 512
    if file.is_file():
        ids = Tokenizer.from_file(str(file)).encode(_TEXT, add_special_tokens=False).ids
    else:
        ids = list(range(min(97, config.vocab_size // 2)))
    return [(ids * (longest // len(ids) + 1))[:longest], ids, ids[: len(ids) // 2]]


def _check_ids(file: Path, facts: TokenizerFacts, config: ModelConfig) -> None:
    """Refuses a tokenizer that contradicts the step's config.json. Raises SftError."""
    trained = named_tokens(file)
    for name, theirs, ours in (
        ("vocab_size", trained.vocab_size, facts.vocab_size),
        ("eos_token_id", trained.eos_id, facts.eos_id),
        ("pad_token_id", trained.pad_id, facts.pad_id),
    ):
        if theirs not in (None, ours):
            raise SftError(
                f"{file}: dataset.tokenizer.{name}: {theirs}, the tokenizer has {ours};"
                " next: name the step's own with TOKENIZER="
            )
    if facts.vocab_size > config.vocab_size:
        raise SftError(
            f"{file}: model.vocab_size: {config.vocab_size}, the tokenizer has {facts.vocab_size} ids;"
            " next: name the step's own with TOKENIZER="
        )


def _find_tokenizer(step: Path, source: str, cache: Path, log: Log) -> Path:
    """The tokenizer folder of a step: in it, the step itself, or beside it; also beside it in a bucket. Raises SftError."""
    if (step / "tokenizer.json").is_file() and not (step / "tokenizer" / "tokenizer.json").is_file():
        return step
    if found := tokenizer_beside(step):
        return found
    if source.startswith(BUCKETS):
        return local_folder(source.rstrip("/").rsplit("/", 1)[0] + "/tokenizer", cache, log)
    raise SftError(f"{step}: no tokenizer/ in it or beside it; next: name its folder with TOKENIZER=")


_CACHE = click.option(
    "--cache", type=click.Path(path_type=Path), default="runs/.cache", help="Where remote folders are copied to."
)


@program("to-hf", "stages/to_hf.py")
@click.argument("source")
@click.argument("target")
@click.argument("options", nargs=-1, metavar="[FIELD=VALUE]...")
@_CACHE
@click.option("--tokenizer", default="", metavar="FOLDER", help="Tokenizer of the step. Default: in it or beside it.")
@click.option(
    "--template", default="tokenizer", help="Chat template that was trained: a name or a .jinja, .jinja2 or .j2 file."
)
def to_hf_program(
    source: str, target: str, options: tuple[str, ...], cache: Path, tokenizer: str, template: str
) -> None:
    """Converts the OLMo-core step SOURCE (folder or gs://…) to the new Hugging Face folder TARGET. FIELD=VALUE sets a
    field of [convert]."""
    log = _logger("to-hf")
    quiet_libraries(cache / "to-hf.log")
    report = to_hf(source, target, _options(options), tokenizer, template, cache, log)
    log(f"{target}: {json.dumps(to_json(report.summary))}")


@program("to-core", "stages/to_core.py")
@click.argument("source")
@click.argument("target")
@_CACHE
@click.option("--adapter", default="", metavar="FOLDER", help="LoRA adapter of PEFT that is merged into the weights.")
def to_core_program(source: str, target: str, cache: Path, adapter: str) -> None:
    """Converts the Hugging Face folder SOURCE (also gs://… or hf://org/name[@revision]) to the new OLMo-core step TARGET."""
    log = _logger("to-core")
    quiet_libraries(cache / "to-core.log")
    to_core(source, target, cache, log, adapter)
    log(f"{target}: a base for [model] base, here or in OLMo-core")


def _logger(name: str) -> Log:
    return lambda text: say(f"[{name}] {text}")


def _options(fields: Sequence[str]) -> Convert:
    """[convert] from field=value. Raises SftError with a line for every problem."""
    problems: list[str] = []
    data: dict[str, Any] = {}
    hints = typing.get_type_hints(Convert)
    for text in fields:
        name, _, value = text.partition("=")
        data[name] = typed.parse_value(value, hints.get(name, str))
    made: Convert = typed.build(Convert, data, "convert", problems)
    if problems:
        raise SftError("\n".join(problems) + "\nnext: correct it; `make fields` lists every field")
    return made
