"""The model card: where a model came from, in the format of the Hugging Face hub.

In:  a run's manifests, prepare's dataset.json, the recipe, the gate's record, scores if there are any.
Out: the text of README.md. It has no dates and no hosts, so the same content gives the same card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.dataset import DatasetInfo, TokenizerFacts
from sft.formats.gate import GateRecord
from sft.formats.results import EvaluateMetrics
from sft.recipe import schema
from sft.recipe.recipe import Recipe
from sft.runner import plan

BEFORE = schema.STAGES[: schema.STAGES.index("convert")]
"""The stages before an export."""
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)")


def of_run(run: Path, recipe: Recipe, gate: GateRecord, published: bool = True) -> str:
    """README.md of a run's export. It has scores if evaluate has run on this export. published: False while convert makes the export;
    what is in its place then is an earlier one, and the card says nothing of it.
    """
    info = DatasetInfo.of(run / "prepare")
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft"]}
    front["tags"] = ["sft", recipe.model.preset] if recipe.model.preset else ["sft"]
    base = _HUB.match(recipe.model.base)
    sources = [m[1] for s in info.sources if (m := _HUB.match(s.path))]
    front |= {"base_model": base[1]} if base else {}
    front |= {"datasets": list(dict.fromkeys(sources))} if sources else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {recipe.run}", ""]
    start = f"`{recipe.model.base}`" if recipe.model.base else "random weights"
    geometry = f", geometry `{recipe.model.preset}`" if recipe.model.preset else ""
    lines += [f"Supervised finetuning of {start}{geometry}.", ""]
    lines += (_scores(run) if published else []) + _data(info)
    if recipe.convert.eval_template:
        lines += [f"The folder carries another template, to evaluate with: `{recipe.convert.eval_template}`.", ""]
    lines += _gate(gate)
    lines += ["## Recipe", "", *[f"* override: `{key} = {value}`" for key, value in recipe.overrides]]
    text = (plan.REPO / recipe.file).read_text(encoding="utf-8").rstrip()
    lines += ["", "```toml", text, "```", "", *_chain(run, schema.STAGES if published else BEFORE)]
    return "\n".join(lines) + "\n"


def of_checkpoint(source: str, facts: TokenizerFacts, gate: GateRecord) -> str:
    """README.md of an export outside of a run."""
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    ends = ", ".join(map(str, facts.terminator_ids))
    about = [f"Exported from the OLMo-core checkpoint `{source}`; a reply ends with token {ends}.", ""]
    return "\n".join(front + about + _gate(gate))


def _scores(run: Path) -> list[str]:
    """The table of results; nothing if evaluate has not run on this export."""
    try:
        made = manifest.load(run / "evaluate" / manifest.NAME)
        convert = manifest.load(run / "convert" / manifest.NAME).digest
    except (FileNotFoundError, SftError):
        return []
    if manifest.Input(manifest=f"../convert/{manifest.NAME}", sha256=convert) not in made.inputs:
        return []
    lines = ["## Scores", "", "| task | metric | value | 95 % interval | n |", "| --- | --- | ---: | --- | ---: |"]
    scores = EvaluateMetrics.of(made, str(run / "evaluate" / manifest.NAME))
    for task, metrics in scores.tasks.items():
        for name, score in metrics.items():
            interval = f"{score.low:.4f} to {score.high:.4f}" if score.bounds else ""
            lines.append(f"| {task} | {name} | {score.value:.4f} | {interval} | {score.n} |")
    if loss := scores.validation:
        lines.append(f"| held-out conversations | loss | {loss.loss:.4f} | | {loss.documents} |")
    return [*lines, ""]


def _data(info: DatasetInfo) -> list[str]:
    lines = ["## Data", "", "| source | conversations | tokens | trained tokens |", "| --- | ---: | ---: | ---: |"]
    for source in info.sources:
        lines.append(f"| `{source.path}` | {source.documents:,} | {source.tokens:,} | {source.labels:,} |")
    name, ends = info.facts.template.name, ", ".join(map(str, info.facts.terminator_ids))
    return [*lines, "", f"Chat template `{name}`; a reply ends with token {ends}.", ""]


def _gate(gate: GateRecord) -> list[str]:
    tensors, logits = gate.tensors, gate.logits
    which = f"layers {', '.join(map(str, logits.which))}" if gate.gate == "fast" else "every layer"
    lines = [
        "## Proof of the export",
        "",
        f"* {tensors.count} tensors, each equal to the checkpoint's value in {tensors.dtype}.",
        f"* Logits agree with the training code's to {logits.max_difference:.1e} (largest {logits.max_logit:.1f}) on"
        f" {logits.tokens} packed tokens, over {which}.",
    ]
    if logits.rounding_kl:
        lines.append(f"* Rounding to {tensors.dtype} costs {logits.rounding_kl:.2e} nats a token.")
    if gate.chats:
        ended = sum(chat.stopped for chat in gate.chats)
        lines.append(f"* {ended} of {len(gate.chats)} greedy replies to fixed questions end by themselves.")
    return [*lines, ""]


def _chain(run: Path, stages: Sequence[str]) -> list[str]:
    """The digests of the stages' manifests. Each manifest names its inputs by hash, so the last one covers them all."""
    lines = ["## Provenance", "", "| stage | sha256 of what was made, and from what |", "| --- | --- |"]
    for stage in stages:
        try:
            lines.append(f"| {stage} | `{manifest.load(run / stage / manifest.NAME).digest}` |")
        except (FileNotFoundError, SftError):
            continue
    return lines
