"""The first ten steps of every recipe whose model fits this machine, through `make train` itself.

In:  recipes/*.toml, and nothing from the network. A recipe whose files are all here runs as it is. Where a preset says the model,
     data, tokenizer and weights that are not here are made: conversations of the smoke data joined to a long tail of lengths, the smoke
     tokenizer with the model's own vocabulary size, random weights. [train] and the numbers of [on.local.train] stay the recipe's, but for the
     batch, which is at most MICROBATCHES of every group of ranks.
Out: a line for every recipe, and one JSON object on the last line. Exit status 1 where a run failed.
Run: make bench-first-steps, or .venv/bin/python benchmarks/bench_first_steps.py [--recipes smoke olmo2-1b] [--steps 10]
     [--as-written] (the recipe as it is, from the hub and DATA) [--keep FOLDER] (the copy of the checkout that make ran in, with its logs)

"Around the steps" is the time of `make train` that is no step: imports, packing, weights, the validations, the save. Speed is the median of the steps
after the first. Memory is the allocator's peak, beside what was planned. A CPU trains the small models alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft.common.errors import SftError
from sft.formats.metrics import NAME, read_attempts, read_steps
from sft.model import memory
from sft.packing.steps import context_groups
from sft.recipe import presets, recipe
from sft.recipe.clusters import load_cluster
from sft.recipe.recipe import Recipe
from sft.recipe.resolve import resolve
from sft.runner.processes import processes

REPO = Path(__file__).resolve().parents[1]
MICROBATCHES = 4
CPU_PARAMETERS = 50_000_000
"""A CPU takes minutes for ten steps of a larger model."""
VOCABULARY = 100_352
"""Of presets that leave it to the tokenizer: dolma2's, rounded up."""


class Skipped(Exception):
    """Why a recipe is not run."""


@dataclass(frozen=True)
class Planned:
    """What is known of a recipe before it runs."""

    loaded: Recipe
    ranks: int
    batch_tokens: int
    planned_gb: float  # of a GPU; 0 on a CPU
    made: bool  # data, tokenizer and weights are made here
    vocab_size: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(file.stem for file in (REPO / "recipes").glob("*.toml"))
    parser.add_argument("--recipes", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--as-written", action="store_true")
    parser.add_argument("--keep", type=Path, default=None)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = copied((args.keep or Path(temporary)) / "checkout")
        for name in args.recipes:
            try:
                found[name] = run(place, name, args)
            except Skipped as reason:
                found[name] = {"skipped": str(reason)}
            print(f"{name:24} {show(found[name])}", flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"bench": "first-steps", "gpu": gpu, "torch": torch.__version__, "recipes": found}))
    ran = [one for one in found.values() if "skipped" not in one]
    return int(not ran or any("failed" in one for one in ran))


def copied(target: Path) -> Path:
    """The tracked files of this checkout with its environment, in a new folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, target / name)
    (target / ".venv").symlink_to((REPO / ".venv").resolve())
    return target


def plan(name: str, as_written: bool) -> Planned:
    """Whether a recipe can run here. Raises Skipped."""
    loaded = recipe.load(REPO / "recipes" / f"{name}.toml")
    missing = [] if as_written else list(not_here(loaded))
    if missing and not loaded.model.preset:
        raise Skipped(f"{missing[0]} is not on this machine, and no preset says the model; next: --as-written")
    preset = presets.PRESETS.get(loaded.model.preset)
    size = loaded.model.vocab_size or (preset and preset.vocab_size) or VOCABULARY
    config = resolve(replace(loaded.model, base="", vocab_size=size), size) if preset else None
    cluster, hardware = load_cluster(REPO / "env" / "local.toml"), loaded.hardware("local", "train")
    gpus = torch.cuda.device_count()
    if config is not None and not gpus and config.parameters > CPU_PARAMETERS:
        raise Skipped(f"{config.parameters:,} parameters; a CPU trains models of up to {CPU_PARAMETERS:,}")
    ranks, planned = processes(hardware, cluster)[0], 0.0
    microbatch = hardware.microbatch_tokens or loaded.train.seq_len
    groups = max(1, ranks // hardware.context_degree)
    if config is not None and gpus:
        gb = torch.cuda.get_device_properties(0).total_memory / 1e9
        room = memory.plan(config, loaded.train, hardware, ranks, gb)
        try:
            groups = context_groups(config, loaded.train, hardware, ranks)
            memory.require(room, config, loaded.train, hardware, ranks)
        except SftError as error:
            raise Skipped(str(error)) from error
        planned = (room.total - room.parts[memory.LIBRARIES]) / 1e9
    batch = min(loaded.train.global_batch_tokens, groups * microbatch * MICROBATCHES)
    return Planned(loaded, ranks, batch // (groups * microbatch) * groups * microbatch, planned, bool(missing), size)


def not_here(loaded: Recipe) -> Iterator[str]:
    """What the recipe names and this machine does not have."""
    folders = [*filter(None, os.environ.get("DATA", "").split(":")), str(REPO / "recipes")]
    names = (loaded.model.base, loaded.prepare.tokenizer, *(source.path for source in loaded.prepare.sources))
    for name in filter(None, names):
        if "://" in name or not any((Path(folder) / name).exists() for folder in folders):
            yield name


def run(place: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prepares, syncs, then times `make train`. Raises Skipped."""
    planned = plan(name, args.as_written)
    if planned.made:
        write(place / "recipes", name, planned, args.steps)
    words = [f"steps={args.steps}", f"global_batch_tokens={planned.batch_tokens}"]
    log = place.parent / f"{name}.log"
    for goal, overrides in (("sync", []), ("train", words)):
        began = time.monotonic()
        with log.open("ab") as file:
            command = ["make", "--no-print-directory", goal, f"RECIPE={name}", *overrides]
            clean = {
                k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("MFLAGS", "PYTHONPATH")
            }
            code = subprocess.run(command, cwd=place, env=clean, stdout=file, stderr=file, check=False).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-12:]
            return {"failed": f"make {goal} exits with {code}", "log": last}
    [folder] = (place / "runs").glob(f"{name}_*/train")
    return measured(folder, planned, time.monotonic() - began)


def measured(train: Path, planned: Planned, wall_s: float) -> dict[str, Any]:
    """The numbers of a finished training."""
    steps, [header] = read_steps(train / NAME), read_attempts(train / NAME)
    later = steps[1:] or steps
    used = [step.mfu for step in later if step.mfu is not None]
    peaks = [step.memory_gb for step in steps if step.memory_gb is not None]
    return {
        "made": planned.made,
        "ranks": planned.ranks,
        "steps": len(steps),
        "batch_tokens": planned.batch_tokens,
        "loss": [steps[0].loss, steps[-1].loss],
        "skipped_steps": sum(bool(step.skipped) for step in steps),
        "recompute": header.recompute,
        "out_of_memory": header.out_of_memory,
        "around_s": wall_s - sum(step.seconds for step in steps),
        "first_step_s": steps[0].seconds,
        "tokens_per_s": statistics.median(step.tokens_per_s for step in later),
        "trained_tokens_per_s": statistics.median(step.labels / step.seconds for step in later),
        "mfu": statistics.median(used) if used else None,
        "memory_gb": max(peaks, default=None),
        "planned_gb": planned.planned_gb or None,
    }


def show(found: Mapping[str, Any]) -> str:
    if "skipped" in found:
        return textwrap.fill(f"skipped: {found['skipped']}", 76, subsequent_indent="    ")
    if "failed" in found:
        return "\n    ".join([f"FAILED: {found['failed']}", *found["log"]])
    line = (
        f"{found['steps']} steps, loss {found['loss'][0]:.2f} to {found['loss'][1]:.2f}, {found['tokens_per_s']:,.0f} tok/s"
        f", first {found['first_step_s']:.1f} s, around {found['around_s']:.0f} s"
    )
    more = ["over made data"] if found["made"] else []
    if found["mfu"] is not None:
        more += [f"MFU {found['mfu']:.1%}, {found['memory_gb']:.1f} GB, planned {found['planned_gb'] or 0:.1f}"]
    return "\n    ".join([line, *more])


def write(recipes: Path, name: str, planned: Planned, steps: int) -> None:
    """The recipe's file in the copy, over made data, and that data."""
    file, loaded = recipes / f"{name}.toml", planned.loaded
    tables = tomllib.loads(file.read_text())
    keep = {
        field: value
        for field, value in tables["model"].items()
        if field not in ("base", "ignore_config", "base_tokenizer")
    }
    model = keep | {"vocab_size": planned.vocab_size}
    validation = (
        {"validation_fraction": loaded.prepare.validation_fraction} if loaded.prepare.validation_fraction else {}
    )
    prepare = {"tokenizer": "smoke/tokenizer", "template": "olmo", "sources": [{"path": f"{name}.jsonl"}], **validation}
    written = {"model": model, "prepare": prepare, "train": tables["train"], "evaluate": {"tasks": ["smoke_choice"]}}
    if "local" in tables.get("on", {}):
        written["on.local.train"] = tables["on"]["local"]["train"]
    file.write_text(
        "".join(
            f"[{table}]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in fields.items())
            for table, fields in written.items()
        )
    )
    with (recipes / f"{name}.jsonl").open("w") as out:
        out.writelines(f"{line}\n" for line in conversations(recipes / "smoke" / "train.jsonl", planned, steps))


def toml(value: Any) -> str:
    """A value of a recipe: a string, number, list or table."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def conversations(smoke: Path, planned: Planned, steps: int) -> Iterator[str]:
    """Lines of JSON: questions and answers of the smoke data, joined to lognormal lengths, for all steps and a little more. A
    character is at most one token."""
    rows = [json.loads(line)["messages"] for line in smoke.read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row if message.get("content")]
    rng, left = np.random.default_rng(0), 1.2 * planned.batch_tokens * (steps + 1)
    while left > 0:
        wanted = min(int(rng.lognormal(7.0, 1.0)), planned.loaded.train.seq_len // 2)
        words = " ".join(texts[i] for i in rng.integers(len(texts), size=max(2, wanted // 8)))[: 4 * wanted]
        cut = max(1, len(words) // 3)
        yield json.dumps(
            {"messages": [{"role": "user", "content": words[:cut]}, {"role": "assistant", "content": words[cut:]}]}
        )
        left -= len(words) / 5


if __name__ == "__main__":
    sys.exit(main())
