"""[convert] model: a model that this run has not trained, as a folder that can be scored.

In:  prepare's tokenizer and template; the model: a step or a Hugging Face folder, wherever it is (sft.runner.models).
Out: a step is exported and passes the gate like one of this run; of a Hugging Face folder there are links to the weights.

Both get the tokenizer files, the chat template and the terminators of prepare, so that the scores of several models can be compared.
[convert] eval_template = "model" takes the model's own template. A model with another tokenizer is refused: the held-out
conversations and the terminators would mean something else to it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from sft.checkpoint import olmo_core
from sft.checkpoint.weight_files import weight_files
from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.export import card
from sft.export.convert import convert, evaluation_template, export_step
from sft.export.tokenizer_files import copy_tokenizer_files, tokenizer_beside
from sft.formats import manifest
from sft.formats.dataset import DatasetInfo, TokenizerFacts
from sft.formats.gate import NAME
from sft.formats.manifest import StepManifest
from sft.recipe.base_config import read_hf_config
from sft.recipe.config_reader import ConfigReader, EveryKey
from sft.recipe.inputs import named_templates
from sft.recipe.resolve import with_positions
from sft.runner import models
from sft.runner.stage import Result, Stage
from sft.storage.base_weights import find_base_weights
from sft.sync.base_check import check_base_tokenizer

TEMPLATE = "chat_template.jinja"


def convert_any(stage: Stage) -> Result:
    """The convert stage: exports the final step of this run's training, or the step that [convert] model names."""
    if not (name := stage.recipe.convert.model):
        return convert(stage)
    step, commit = find(stage)
    if not is_step(step):
        raise SftError(
            f"{stage.recipe.file}: [convert] model = {name!r}: a Hugging Face folder already; next: make evaluate RECIPE="
            f"{stage.recipe.name} MODEL={name}, or make to-core SRC={name}"
        )
    facts = DatasetInfo.of(stage.folder("prepare")).facts
    _check_tokenizer(stage, step, facts)
    config = olmo_core.config_of_step(step / "config.json")
    tokenizer = stage.folder("prepare") / "data" / "tokenizer"
    model = stage.out / "model"
    made = export_step(stage, step, config, tokenizer, model, _own_template(stage, step))
    made.gate.write(stage.out / NAME)
    (model / "README.md").write_text(card.of_checkpoint(name, facts, made.gate), encoding="utf-8")
    metrics = replace(made.metrics(Path(name)), model_commit=commit)
    return Result(outputs=["model", NAME], metrics=metrics.to_metrics())


def assemble(stage: Stage, target: Path) -> tuple[list[str], str]:
    """Makes the folder `target` that evaluate scores. Returns the files that it wrote to `stage.out` beside it, and the hub's
    commit of the model ("" for other places). Raises SftError."""
    found, commit = find(stage)
    prepared = stage.folder("prepare")
    facts = DatasetInfo.of(prepared).facts
    _check_tokenizer(stage, found, facts)
    tokenizer = prepared / "data" / "tokenizer"
    if is_step(found):
        config = olmo_core.config_of_step(found / "config.json")
        made = export_step(stage, found, config, tokenizer, target, _own_template(stage, found))
        made.gate.write(stage.out / NAME)
        return [NAME], commit
    own = _own_template(stage, found)
    template = own or evaluation_template(stage.recipe.convert.eval_template, stage.find)
    trained = (tokenizer / TEMPLATE).read_text(encoding="utf-8")
    if not own and (theirs := template_of(found)) and theirs.strip() != (template or trained).strip():
        stage.log('its own chat template differs from the one it is asked with; eval_template="model" takes its own')
    link(found, tokenizer, facts, target, template, _own_stops(found) if own else ())
    return [], commit


def is_step(folder: Path) -> bool:
    """Whether a folder is a step of OLMo-core's layout."""
    return (folder / "model_and_optim" / ".metadata").is_file()


def find(stage: Stage) -> tuple[Path, str]:
    """The model's folder, verified where a manifest lists its files, and its commit on the hub ("" for other places).

    A remote one is fetched to the cache. Raises SftError."""
    name = stage.recipe.convert.model
    if paths.REMOTE.match(name):
        fetched = find_base_weights(name, stage.find, stage.cache, stage.log)
        return fetched.folder.root, fetched.commit
    place = stage.place
    folder = models.folder(stage.recipe, place.runs, place.roots, stage.cluster, place.cluster, stage.name)
    if is_step(folder):
        file = folder / manifest.NAME
        broken = manifest.broken_outputs(folder, StepManifest.read(file).outputs) if file.is_file() else []
    elif name.startswith(models.RUNS):  # an export
        export = folder.parent
        broken = manifest.broken_outputs(export, manifest.load(export / manifest.NAME).outputs)
    else:
        broken = []
    if broken:
        raise SftError("\n".join(broken) + f"\nnext: make it again, or name another model than MODEL={name}")
    return folder, ""


def _check_tokenizer(stage: Stage, model: Path, facts: TokenizerFacts) -> None:
    """Raises SftError for a model whose tokenizer is not prepare's. One that shows none is reported."""
    prepared, added = stage.folder("prepare"), stage.recipe.prepare.add_tokens
    try:
        warning = check_base_tokenizer(prepared, facts, model, True, ())
    except SftError:
        if not added:
            raise
        warning = check_base_tokenizer(prepared, facts, model, True, added)  # a base, before it got the tokens
    if warning:
        stage.log(f"warning: {warning}")


def template_of(folder: Path) -> str:
    """The chat template of a model's folder or of the tokenizer beside its step; "" if there is none."""
    for place in filter(None, (folder, tokenizer_beside(folder))):
        if (place / TEMPLATE).is_file():
            return (place / TEMPLATE).read_text(encoding="utf-8")
        if (file := place / "tokenizer_config.json").is_file():
            found = named_templates(read_json(file).get("chat_template"), str(file))
            if found and "default" not in found:
                raise SftError(
                    f"{file}: chat_template: {', '.join(map(repr, found))}, and none is named 'default'; next: eval_template= a .jinja"
                    " file with the one to use"
                )
            if found.get("default"):
                return found["default"]
    return ""


def _own_template(stage: Stage, folder: Path) -> str:
    """The model's own template for [convert] eval_template = "model"; "" for other values. Raises SftError where it has none."""
    if stage.recipe.convert.eval_template != "model":
        return ""
    if not (text := template_of(folder)):
        raise SftError(
            f"{folder}: no chat template ({TEMPLATE}, or chat_template in tokenizer_config.json), and [convert] eval_template ="
            " 'model' asks for it; next: eval_template= a name or a file, or leave it out for the template of prepare"
        )
    return text


def _own_stops(folder: Path) -> tuple[int, ...]:
    """The ids that end a reply of the model, as its generation_config.json says."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    found = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if wrong := [i for i in found if type(i) is not int]:
        raise SftError(f"{file}: eos_token_id: {wrong[0]!r}, expected an id or a list of ids; next: correct the file")
    return tuple(found)


def link(
    source: Path, tokenizer: Path, facts: TokenizerFacts, folder: Path, template: str, stops: tuple[int, ...] = ()
) -> None:
    """Makes the folder that is scored: links to the weights of `source`, the tokenizer and template of training.

    Raises SftError for a folder without Hugging Face weights and for a tokenizer with more ids than the model has rows.
    """
    config = source / "config.json"
    weights = weight_files(source) if config.is_file() else []
    if not weights or weights[0].suffix != ".safetensors":
        raise SftError(
            f"{source}: neither a step (model_and_optim/) nor a Hugging Face model (config.json and *.safetensors); next: correct MODEL="
        )
    described = read_json(config)
    if described.get("model_type") == "olmo_hybrid":
        with_positions(read_hf_config(described, str(config), EveryKey()))
    rows = ConfigReader(described, str(config)).whole("vocab_size")
    if rows < facts.vocab_size:
        raise SftError(
            f"{config}: vocab_size = {rows}, and the tokenizer of training has {facts.vocab_size} ids: the model has never seen"
            " the new tokens; next: name a model with this tokenizer with MODEL="
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    index = [source / "model.safetensors.index.json"] if len(weights) > 1 else []
    for file in (config, *weights, *filter(Path.is_file, index)):
        (folder / file.name).symlink_to(file.resolve())
    copy_tokenizer_files(tokenizer, folder)
    if template:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    generation = {
        "do_sample": False,
        "eos_token_id": sorted({*facts.terminator_ids, facts.eos_id, *stops}),
        "pad_token_id": facts.pad_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
