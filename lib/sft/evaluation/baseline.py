"""Scores a model that no run has trained (the base, or any other) under a recipe's tasks, template and sampling.

In:  prepare's tokenizer, template and validation split; the model: [model] base, or a Hugging Face folder, gs:// or hf://org/name.
Out: runs/<run>-baseline/evaluate with the files of the evaluate stage, so that `make compare` and the report read it like a run.

The model gets the tokenizer files and the chat template that training uses, and ends its replies at the same terminators.
Run: make baseline RECIPE=… [MODEL=…], or python stages/baseline.py runs/<run> [--model …]. No training is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.export.convert import evaluation_template
from sft.export.tokenizer_files import copy_tokenizer_files
from sft.formats import manifest, results
from sft.formats.dataset import DatasetInfo
from sft.formats.manifest import Input, Manifest
from sft.runner import plan
from sft.runner.publish import provenance
from sft.runner.stage import Stage
from sft.storage.base_weights import BaseWeights, find_base_weights


def score(stage: Stage, model: str = "") -> Path:
    """Scores the model and returns the folder of its scores. `stage` is sync, as a follower. Raises SftError."""
    if stage.recipe.evaluate.harness != "lm-eval":
        raise SftError(
            f"[evaluate] harness = {stage.recipe.evaluate.harness!r}: a baseline needs lm-eval; next: set location"
        )
    began = datetime.now(UTC)
    name = model or stage.recipe.model.base
    if not name:
        raise SftError(
            f"{stage.recipe.file}: training starts from random weights, which have no baseline; next: make baseline"
            f" RECIPE={stage.recipe.name} MODEL=folder"
        )
    found = find_base_weights(name, lambda path, what: _folder(stage, path, what), stage.cache, stage.log)
    run = stage.place.runs / (stage.recipe.run + results.BASELINE + (f"-{found.label}" if model else ""))
    inputs = _inputs(stage, found)
    options = stage.recipe.config("evaluate")
    config = {**options, "baseline": found.label}
    key = manifest.key("evaluate", plan.VERSIONS["evaluate"], config, [i.sha256 for i in inputs])
    if _is_current(run / "evaluate", key):
        stage.log(f"{run / 'evaluate'}: up to date")
        return run / "evaluate"
    out = run / ".work" / f"evaluate-{key[7:23]}"
    folder = out / "work" / "model"
    assemble(
        found.folder.root,
        stage.folder("prepare"),
        folder,
        evaluation_template(stage.recipe.convert.eval_template, stage.find),
    )
    result = evaluate.score(stage, folder, out, stage.recipe.hardware(stage.place.cluster, "evaluate"))
    shutil.rmtree(out / "work")
    outputs = manifest.describe(out, result.outputs)
    Manifest(
        schema=manifest.SCHEMA,
        stage="evaluate",
        run=run.name,
        key=key,
        config=config,
        inputs=inputs,
        outputs=outputs,
        metrics=result.metrics,
        cluster=stage.place.cluster,
        version=plan.VERSIONS["evaluate"],
        provenance=provenance(sys.argv, began),
    ).write(out / manifest.NAME)
    shutil.rmtree(run / "evaluate", ignore_errors=True)
    os.rename(out, run / "evaluate")
    return run / "evaluate"


def _folder(stage: Stage, path: str, what: str) -> Path:
    """A folder by its path on this machine, or under DATA."""
    return Path(path) if Path(path).is_dir() else stage.find(path, what)


def _inputs(stage: Stage, found: BaseWeights) -> tuple[Input, ...]:
    """The weights and what the questions depend on: prepare, task files and their data."""
    made = manifest.load(stage.folder("prepare") / manifest.NAME)
    root = found.folder.root
    files = [f for f in sorted(root.iterdir()) if f.suffix == ".safetensors" or f.name == "config.json"]
    weights = [Input(file=f"{found.label}/{f.name}", bytes=f.stat().st_size, sha256=stage.sha256(f)) for f in files]
    tasks = [Input(file=name, bytes=f.stat().st_size, sha256=stage.sha256(f))
             for name, f in plan.named_files(stage.place, stage.recipe, "evaluate")]  # fmt: skip
    return (Input(file="prepare", sha256=made.digest), *weights, *tasks)


def _is_current(folder: Path, key: str) -> bool:
    """Whether a folder has the scores of this key, undamaged."""
    try:
        return manifest.load(folder / manifest.NAME).key == key and manifest.is_whole(folder)
    except (FileNotFoundError, SftError):
        return False


def assemble(source: Path, prepared: Path, folder: Path, template: str) -> None:
    """Makes the folder that is scored: links to the weights of `source`, the tokenizer and template of training.

    Raises SftError for a folder without Hugging Face weights and for a tokenizer with more ids than the model has rows.
    """
    weights = sorted([*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")])
    config = source / "config.json"
    if not weights or not config.is_file():
        raise SftError(
            f"{source}: no Hugging Face model (config.json and *.safetensors); next: make to-hf SRC={source} DST=folder,"
            " and make baseline MODEL=folder"
        )
    facts = DatasetInfo.of(prepared).facts
    rows = json.loads(config.read_text(encoding="utf-8")).get("vocab_size", 0)
    if rows < facts.vocab_size:
        raise SftError(
            f"{config}: vocab_size = {rows}, and the tokenizer of training has {facts.vocab_size} ids: the model has never seen"
            " the new tokens; next: name a model with this tokenizer with MODEL="
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (config, *weights):
        (folder / file.name).symlink_to(file.resolve())
    copy_tokenizer_files(prepared / "data" / "tokenizer", folder)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    stops = sorted({*facts.terminator_ids, facts.eos_id})
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": facts.pad_id}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
