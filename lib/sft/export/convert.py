"""The convert stage: a training checkpoint to a Hugging Face folder that is checked before it is published.

In:  the final or the best step folder of train (OLMo-core's layout), train's tokenizer folder, prepare's dataset.json; the base for a
     step with LoRA adapters.
Out: model/     sharded safetensors (vocabulary cut to the tokenizer), config.json, generation_config.json, the tokenizer
                with its chat template, README.md; AutoModelForCausalLM and AutoTokenizer load it
     adapter/   LoRA only: the adapter in PEFT's format; model/ has it merged into the base
     gate.json  what was compared before publishing (sft.export.gate)

Weights are read, cast and written in blocks of rows, so memory does not grow with the model.
Run: make convert RECIPE=…, or python stages/convert.py runs/<run>.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sft.checkpoint import olmo_core
from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.lora_step import Merged, open_step
from sft.checkpoint.step_folder import damage
from sft.common.errors import SftError
from sft.export import card
from sft.export.gate import check
from sft.export.peft_adapter import FOLDER, write_adapter
from sft.export.write import Trained, export
from sft.formats import manifest
from sft.formats.dataset import DatasetInfo
from sft.formats.gate import NAME, CarriedTemplate, ConvertMetrics, GateRecord
from sft.formats.metrics import TrainMetrics
from sft.formats.steps import BEST, named_step
from sft.recipe.architecture import ModelConfig, differing_fields
from sft.recipe.base_config import Base, BaseFacts
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.differences import Difference, mismatch
from sft.recipe.inputs import is_template_file, read_template
from sft.recipe.resolve import DEFAULT_LENGTH, resolve, supported_length
from sft.recipe.schema import Convert, Model
from sft.runner.stage import Result, Stage


def convert(stage: Stage) -> Result:
    """The stage: writes the folder, runs the gate, writes gate.json and the model card."""
    facts = DatasetInfo.of(stage.folder("prepare")).facts
    step = chosen_step(stage.folder("train"), stage.recipe.convert)
    config = trained_config(stage.recipe.model, facts.vocab_size, step)
    made = export_step(stage, step, config, step.parent / "tokenizer", stage.out / "model")
    made.gate.write(stage.out / NAME)
    (stage.out / "model" / "README.md").write_text(
        card.of_run(stage.run, stage.recipe, made.gate, published=False), encoding="utf-8"
    )
    return Result(outputs=["model", NAME, *made.more], metrics=made.metrics(step).to_metrics())


@dataclass(frozen=True)
class Exported:
    """A step as a Hugging Face folder, with the record of its gate. `size`: bytes of the weights. `more`: names of folders
    beside it."""

    gate: GateRecord
    parameters: int
    size: int
    template: CarriedTemplate
    more: tuple[str, ...] = ()

    def metrics(self, step: Path) -> ConvertMetrics:
        """The metrics of convert's manifest. `step`: the step's folder, whose name has its number."""
        number = re.search(r"step(\d+)$", step.name)
        return ConvertMetrics(
            step=int(number[1]) if number else 0,
            parameters=self.parameters,
            bytes=self.size,
            template=self.template,
            gate=self.gate.summary,
        )


def export_step(
    stage: Stage, step: Path, config: ModelConfig, tokenizer: Path, target: Path, own_template: str = ""
) -> Exported:
    """Exports a step to the folder `target` and runs the gate. Raises SftError.

    tokenizer: the folder that training used, with its template. own_template: the text for [convert] eval_template = "model".
    """
    facts = DatasetInfo.of(stage.folder("prepare")).facts
    options = stage.recipe.convert
    weights = open_step(step, lambda: stage.base, config, stage.recipe.train.seed, lambda file: stage.sha256(file))
    trained = (tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    template = own_template or evaluation_template(options.eval_template, stage.find) or trained
    trained_base = olmo_core.base_facts(step / "config.json")
    options, lines = with_length(
        options, config, trained_base, stage.recipe.train.seq_len, extended=stage.recipe.model.names_scaling
    )
    stage.log(f"{step.name}: {config.parameters:,} parameters to {options.dtype}")
    for line in [*lines, *about_quantisation(options, trained_base)]:
        stage.log(line)
    shutil.rmtree(target, ignore_errors=True)
    size = export(Trained(weights, config, facts, tokenizer, trained_base), template, options, target, stage.log)
    record = check(target, weights, config, facts, trained, options, stage.log)
    more = write_peft(stage, weights, target.parent / FOLDER)
    weights.close()
    name = options.eval_template or "as trained"
    carried = CarriedTemplate(name, hashlib.sha256(template.encode()).hexdigest())
    return Exported(record, config.parameters, size, carried, more)


def write_peft(stage: Stage, weights: DcpReader | Merged, folder: Path) -> tuple[str, ...]:
    """Writes the adapter in PEFT's format. Returns the folder's name, or nothing for a step without one."""
    shutil.rmtree(folder, ignore_errors=True)
    if not isinstance(weights, Merged):
        return ()
    if why := write_adapter(weights, stage.recipe.model.base, folder):
        stage.log(f"no adapter in PEFT's format: {why}; model/ has it merged")
        return ()
    size = (folder / "adapter_model.safetensors").stat().st_size
    stage.log(f"{folder}: the adapter in PEFT's format, {size / 1e6:.1f} MB")
    return (folder.name,)


def evaluation_template(name: str, find: Callable[[str, str], Path]) -> str:
    """The text of [convert] eval_template, a name or a template file; "" for "". Raises SftError for an unknown name."""
    if is_template_file(name):
        return read_template(find(name, "convert.eval_template"))
    if name and name not in TEMPLATES:
        raise SftError(
            f"[convert] eval_template = {name!r}: none of {', '.join(TEMPLATES)}, nor a .jinja, .jinja2 or .j2 file;"
            " next: correct it"
        )
    return TEMPLATES[name].jinja if name else ""


def chosen_step(train: Path, options: Convert) -> Path:
    """The step folder that [convert] checkpoint names. Raises SftError if it is not there, or damaged."""
    final = final_step(train)
    best = named_step(train, BEST)
    if options.checkpoint == "final" or best == final:
        return final
    if best is None:  # the planner has found the file BEST
        raise SftError(f"{train / BEST}: names no step; next: checkpoint = 'final' in [convert], or restore the file")
    if problems := damage(best):  # train's manifest does not list its files
        raise SftError(f"{train / BEST} names {best.name}: {problems[0]}; next: restore it, or checkpoint = 'final'")
    return best


def final_step(train: Path) -> Path:
    """The step folder that train's manifest names as the final one. Raises SftError if it has no checkpoint."""
    file = train / manifest.NAME
    step = TrainMetrics.of(manifest.load(file), str(file)).final_step
    folder = train / f"step{step}"
    if not (folder / "model_and_optim" / ".metadata").is_file():
        raise SftError(
            f"{folder}: no checkpoint (model_and_optim/.metadata), although {file} names step {step}; next: copy the step back, or remove {file} and make train again"
        )
    return folder


def trained_config(model: Model, vocab_size: int, step: Path) -> ModelConfig:
    """The architecture of a step. Raises SftError if the recipe's [model] describes another one."""
    file = step / "config.json"
    saved = olmo_core.config_of_step(file)
    if model.base:
        # The base decided. What the recipe says as well was compared with it before training, and is compared again.
        resolve(model, vocab_size, Base(saved, olmo_core.base_facts(file) or BaseFacts(), str(file)))
        return saved
    config = resolve(model, vocab_size)
    rows = [
        Difference(name, repr(getattr(saved, name)), repr(getattr(config, name)))
        for name in differing_fields(saved, config, ignore=("init_std",))
    ]
    if rows:
        raise SftError(
            mismatch(
                f"{file}: the recipe's [model] is not the architecture of the step",
                rows,
                "make train again, or correct [model]",
                ("field", "step"),
            )
        )
    return config


def about_quantisation(options: Convert, base: BaseFacts | None) -> list[str]:
    """What the export of a base with quantised weights has in their place."""
    if base is None or not base.quantised:
        return []
    return [
        f"the base's weights were quantised ({base.quantised}) and dequantised for training: the export is {options.dtype},"
        " and its config.json has no quantization_config"
    ]


def with_length(
    options: Convert, config: ModelConfig, base: BaseFacts | None, seq_len: int, extended: bool = False
) -> tuple[Convert, list[str]]:
    """The options with max_position_embeddings decided, and what is to be reported about it.

    The base's own value is the default, also where its scaling would reach further. `extended`: the recipe names another
    scaling, whose reach is the default then.
    """
    supported = supported_length(config, base) if base else None
    own = base.max_positions if base and base.scaled and not extended else supported
    length = options.max_position_embeddings or own or DEFAULT_LENGTH
    lines = [
        f"max_position_embeddings = {length:,}"
        + (", the base's" if not options.max_position_embeddings and supported else "")
    ]
    if supported and length > supported:
        lines.append(
            f"warning: max_position_embeddings = {length:,}, but the base supports {supported:,} tokens with its rotary scaling"
        )
    if length < seq_len:
        lines.append(f"warning: max_position_embeddings = {length:,} is less than the seq_len of training, {seq_len:,}")
    return replace(options, max_position_embeddings=length), lines
