"""Model soups (arXiv 2203.05482): the mean of the weights of several checkpoints, as a step folder.

    make soup RUN=x STEPS="100 200 300" DST=folder                    kept steps of a run
    make soup STEPS="seed-1/300 seed-2/300" WEIGHTS="1 2" DST=folder  steps of several runs; also paths of step folders

In:  two or more step folders (ours or OLMo-core's) with one architecture and one tokenizer.
Out: DST in the layout that [model] base, make to-hf and OLMo-core read: weights without optimizer state, tokenizer/, soup.json
     (sources, weights, hashes) and a manifest. It is averaged in fp32 in blocks of rows, so memory does not grow with the model,
     and then read back.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from torch import Tensor

from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.olmo_core import compared_config
from sft.checkpoint.step_folder import damage
from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.paths import inside
from sft.export.places import Log, new_folder
from sft.export.step_writer import check_step_weights, write_step_files, write_step_manifest, write_step_weights
from sft.export.tokenizer_files import tokenizer_beside
from sft.formats import manifest
from sft.formats import soup as soup_format
from sft.formats.manifest import StepManifest
from sft.formats.soup import AveragedStep, Soup
from sft.runner.cli import program

SAME_RUN = "next: choose steps of one model"


class Mean:
    """The weighted mean of checkpoints, tensor by tensor and row by row, in fp32."""

    def __init__(self, parts: Sequence[DcpReader], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.parts[0].shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        total: Tensor | None = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            value = part.rows(name, start, stop).float() * weight
            total = value if total is None else total.add_(value)
        assert total is not None
        return total.div_(sum(self.weights))


def find_step(runs: Path, run: str, word: str) -> Path:
    """The step folder for one word of STEPS: a number (of `run`), <run>/<number>, or a path. Raises SftError."""
    owner, _, number = word.rpartition("/")
    if number.isdecimal() and "/" not in owner and (owner or run):
        folder = inside(runs, f"{owner or run}/train/step{number}", "STEPS")
        if not folder.is_dir():
            there = sorted(int(p.name[4:]) for p in folder.parent.glob("step*") if p.name[4:].isdecimal())
            raise SftError(
                f"STEPS: {folder}: no such step; there are {' '.join(map(str, there)) or 'none'}; next: correct STEPS="
            )
        return folder
    if not Path(word).is_dir():
        raise SftError(
            f"STEPS: {word}: neither a step number of RUN=, <run>/<number> nor a step folder; next: correct it"
        )
    return Path(word)


def check_alike(steps: Sequence[Path], parts: Sequence[DcpReader]) -> None:
    """Raises SftError for damaged steps and for steps with different architectures or tokenizers."""
    first, reference = steps[0], parts[0]
    if len({step.resolve() for step in steps}) < len(steps):
        raise SftError(
            f"STEPS: {' '.join(map(str, steps))}: a step is listed twice; next: list it once and raise its weight with WEIGHTS="
        )
    for step in steps:
        if (step / manifest.NAME).is_file() and (problems := damage(step)):
            raise SftError(f"{problems[0]}; next: choose another step")
    models = [compared_config(step / "config.json") for step in steps]
    tokenizers = [tokenizer_beside(step) for step in steps]
    hashes = [hash_file(t / "tokenizer.json") if t else None for t in tokenizers]
    for step, part, model, digest in zip(steps[1:], parts[1:], models[1:], hashes[1:], strict=True):
        names = set(reference) ^ set(part) or {n for n in reference if reference.shape(n) != part.shape(n)}
        if names:
            name = sorted(names)[0]
            ours, theirs = (t.shape(name) if name in t else "none" for t in (reference, part))
            raise SftError(f"{first} and {step} are of different models: {name} is {ours} and {theirs}; {SAME_RUN}")
        if model.described != models[0].described:
            raise SftError(f"{first / 'config.json'} and {step / 'config.json'} describe different models; {SAME_RUN}")
        if digest != hashes[0] or model.tokens != models[0].tokens:
            raise SftError(
                f"{first} and {step} have different tokenizers: tokenizer.json sha256 {hashes[0]} and {digest};"
                f" their embeddings mean different tokens; {SAME_RUN}"
            )


def soup(steps: Sequence[Path], weights: Sequence[float], target: str, cache: Path, log: Log) -> None:
    """Writes the weighted mean of `steps` to `target` (a new folder or gs://…). Raises SftError."""
    if len(steps) < 2:
        raise SftError(
            f"STEPS={' '.join(map(str, steps))}: a mean needs two steps or more; next: list more with STEPS="
        )
    if len(weights) != len(steps) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise SftError(
            f"WEIGHTS={' '.join(f'{w:g}' for w in weights)}: {len(steps)} steps need as many numbers above zero; next: correct WEIGHTS="
        )
    parts = [DcpReader(step) for step in steps]
    check_alike(steps, parts)
    mean = Mean(parts, weights)
    shapes = {name: mean.shape(name) for name in mean}
    with new_folder(target, cache, log) as out:
        out.mkdir(parents=True)
        write_step_weights(mean, shapes, out, " + ".join(map(str, steps)))
        check_step_weights(mean, shapes, out, "the mean of the steps")
        for part in parts:
            part.close()
        shutil.copyfile(steps[0] / "config.json", out / "config.json")
        write_step_files(out, tokenizer_beside(steps[0]))
        Soup(tuple(source(s, w) for s, w in zip(steps, weights, strict=True))).write(out / soup_format.NAME)
        write_step_manifest(out)
    log(
        f"{target}: the mean of {len(steps)} steps, {sum(math.prod(s) for s in shapes.values()):,} parameters, read back"
    )


def source(step: Path, weight: float) -> AveragedStep:
    """The entry of a step in soup.json."""
    file = step / manifest.NAME
    return AveragedStep(str(step), weight, StepManifest.read(file).outputs if file.is_file() else None)


@program("soup", "stages/soup.py")
@click.argument("target")
@click.argument("words", nargs=-1, required=True, metavar="STEP...")
@click.option("--run", default="", help="The run of steps that are given as a number alone.")
@click.option("--runs", type=click.Path(path_type=Path), default="runs", help="Folder of runs.")
@click.option("--weights", default="", help="One number for each step, separated by spaces. Default: all the same.")
def main(target: str, words: tuple[str, ...], run: str, runs: Path, weights: str) -> None:
    """Writes the mean of checkpoints to TARGET, a new folder or gs://…. STEP is <number>, <run>/<number> or a folder."""
    steps = [find_step(runs, run, word) for word in words]
    try:
        numbers = [float(w) for w in weights.split()] or [1.0] * len(steps)
    except ValueError:
        raise SftError(f"WEIGHTS={weights}: not numbers; next: write one for each step") from None
    soup(steps, numbers, target, runs / ".cache", lambda text: say(f"[soup] {text}"))
