"""What would stop a run on a cluster, found before a GPU is asked for, in one table.

    make doctor RECIPE=olmo3-7b CLUSTER=ai2-jupiter     exit status 1 when a line is red

Each check is one function that returns rows (state, what, found, next command). What the recipe and this machine's files
show costs well under two seconds and asks nobody; a scheduler is asked only by `make doctor`. Launchers run the same checks
for their stage and refuse on a red line. Standard library, but for memory and hours, which need NumPy and are left out
without it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sft import inputs, manifest, paths, plan, presets, recipe, schema
from sft.errors import SftError
from sft.hashcache import HashCache
from sft.launch import handback
from sft.launch.processes import processes

OK, NOTE, RED, LEFT = "ok", "note", "RED", "-"
ASSUMED_MFU = (0.25, 0.40, 0.55)  # low, middle, high, where no earlier run on this kind of GPU has measured one
ASK_S = 10  # for Slurm's answer
MEASURED_BAND = 0.15  # of a measured one: another sequence length or cluster load moves it about that much


@dataclass(frozen=True)
class Row:
    state: str
    what: str
    found: str
    next: str = ""


@dataclass(frozen=True)
class Case:
    """What is examined: a run on a cluster, and which stages the answer matters for."""

    place: plan.Place
    recipe: recipe.Recipe
    cluster: schema.Cluster
    stages: tuple[str, ...] = schema.STAGES

    @property
    def run(self) -> Path:
        return self.place.runs / self.recipe.run

    @property
    def file(self) -> str:
        return f"env/{self.place.cluster}.toml"

    def needs(self, *stages: str) -> bool:
        return not set(self.stages).isdisjoint(stages)

    @property
    def far(self) -> bool:
        """Whether jobs see other disks than this machine."""
        return self.cluster.launcher != "local" and not self.cluster.shared_disk

    @property
    def training(self) -> schema.Hardware:
        return self.recipe.hardware(self.place.cluster, "train")

    @property
    def ranks(self) -> int:
        return self.training.nodes * processes(self.training, self.cluster)[0]

    @property
    def prepared(self) -> dict[str, Any] | None:
        """What prepare says of the data, when it is done."""
        try:
            return json.loads((self.run / "prepare" / "dataset.json").read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def steps(self) -> int | None:
        """Optimizer steps: stated, or about those that the prepared tokens fill; None before prepare."""
        train, data = self.recipe.train, self.prepared
        if train.steps or data is None or not data.get("tokens"):
            return train.steps or None
        return max(1, round(train.epochs * data["tokens"] / train.global_batch_tokens))

    @property
    def model(self) -> presets.ModelConfig | None:
        """The geometry, or None while the vocabulary is only known to a tokenizer that was not read yet."""
        found = presets.resolve(self.recipe.model, int((self.prepared or {}).get("vocab_size") or 0))
        return found if found.vocab_size else None


# --- the checks -------------------------------------------------------------------------------------------------------


def data(case: Case) -> Iterator[Row]:
    """Sources, tokenizer and base are there, for this machine and for jobs."""
    r = case.recipe
    remote = [s.path for s in r.prepare.sources if inputs.is_remote(s.path)]
    for stage, what in (("prepare", "data"), ("sync", "base weights")):
        if not case.needs(stage):
            continue
        named = r.model.base if stage == "sync" else ", ".join(remote)
        try:
            files = plan.named_files(case.place, r, stage)
        except SftError as e:
            yield Row(RED, what, str(e).partition(": ")[2].partition("; next: ")[0], str(e).partition("; next: ")[2])
            continue
        size = sum(file.stat().st_size for _, file in files)
        if files:
            yield Row(OK, what, f"{len(files)} files, {_bytes(size)}")
            if stage == "prepare" and remote:
                yield Row(LEFT, what, f"{named}: not asked, read where {stage} runs")
            local = [n for n, f in files if not f.resolve().is_relative_to(plan.REPO / "recipes")]
            if case.far and stage in case.cluster.stages and local and not case.cluster.data:
                yield Row(RED, what, f"{local[0]} is a file of this machine: jobs on {case.place.cluster} do not see it",
                          f"say where they see DATA with data = \"/…\" in {case.file}, or name gs:// or hf://")  # fmt: skip
        elif named:
            yield Row(LEFT, what, f"{named}: not asked, read where {stage} runs")
        else:
            yield Row(NOTE, what, "random weights: no [model] base")
        for path in [*(remote if stage == "prepare" else [named])]:
            if path.startswith("hf://") and "@" not in path:
                yield Row(NOTE, what, f"{path} names no revision: what the hub has on that day", f"{path}@<commit>")


def tokenizer(case: Case) -> Iterator[Row]:
    """Data and base weights are of one tokenizer."""
    name, base = case.recipe.prepare.tokenizer, case.recipe.model.base
    if not base:
        return
    if name == base:
        yield Row(OK, "tokenizer", f"the base's own ({name})")
    elif inputs.is_remote(name) or inputs.is_remote(base):
        yield Row(NOTE, "tokenizer", f"{name} and {base} are compared when sync has both")
    else:
        files = [paths.find(case.place.roots, f, case.recipe.file) / "tokenizer.json" for f in (name, base)]
        if not all(f.is_file() for f in files):
            yield Row(NOTE, "tokenizer", f"{files[1].parent} has no tokenizer.json to compare with")
        elif manifest.hash_file(files[0]) != manifest.hash_file(files[1]):
            yield Row(RED, "tokenizer", f"{files[0]} and {files[1]} differ",
                      f"[prepare] tokenizer = \"{base}\", and make prepare again")  # fmt: skip
        else:
            yield Row(OK, "tokenizer", "the same tokenizer.json in data and base")


def storage(case: Case) -> Iterator[Row]:
    """What is done of the run, and where its dataset is."""
    where = case.place.storage(case.cluster)
    states = plan.states(case.place, case.recipe, HashCache(case.place.cache))
    done = [s for s, state in states.items() if not state.stale]
    away = sorted({at for s in done if (at := handback.elsewhere(case.run / s)[0])})
    yield Row(OK, "stages done", (", ".join(done) or "none") + (f"; made in {', '.join(away)}" if away else ""))
    if "://" in where:
        yield Row(LEFT, "storage", f"{where}: not asked, sync does")
    elif case.far:
        mounted = [m.partition(":")[2] for m in case.cluster.mounts]
        seen = any(where == m or where.startswith(m + "/") for m in mounted)
        yield Row(OK if seen else RED, "storage", where + ("" if seen else f" is on none of the mounts: {', '.join(mounted) or 'none'}"),
                  "" if seen else f"correct storage or mounts in {case.file}")  # fmt: skip
        here = [s for s in ("sync",) if s not in case.cluster.stages and case.needs("sync")]
        if here and not any(Path(m).is_dir() for m in mounted if where == m or where.startswith(m + "/")):
            yield Row(
                RED,
                "storage",
                f"sync runs here, where {where} is not mounted",
                f'put "sync" among stages in {case.file}',
            )
    else:
        parent = next(p for p in (Path(where), *Path(where).absolute().parents) if p.exists())
        able = parent.is_dir() and os.access(parent, os.W_OK)
        yield Row(OK if able else RED, "storage", f"{where}" + ("" if able else f": {parent} cannot be written"),
                  "" if able else f"correct storage in {case.file}, or the folder's permissions")  # fmt: skip


def batch(case: Case) -> Iterator[Row]:
    """Packs, ranks and microbatches work out."""
    train, hardware, ranks = case.recipe.train, case.training, case.ranks
    micro = hardware.microbatch_tokens or train.seq_len
    groups = max(1, ranks // hardware.context_degree)
    packs = train.global_batch_tokens // train.seq_len
    who = f"{hardware.nodes} node{'s' * (hardware.nodes > 1)} x {ranks // hardware.nodes} processes"
    whole = f"{packs} packs of {train.seq_len:,} tokens in a step, {who}"
    if train.global_batch_tokens % (micro * groups):
        yield Row(RED, "batch", f"{whole}: {train.global_batch_tokens:,} tokens are not a multiple of {groups} x {micro:,}",
                  f"global_batch_tokens={max(1, round(train.global_batch_tokens / (micro * groups))) * micro * groups}, or other nodes, processes or microbatch_tokens")  # fmt: skip
    else:
        yield Row(OK, "batch", f"{whole}, {train.global_batch_tokens // (micro * groups)} microbatches each")
    if (case.run / "prepare" / "data").is_dir() and not handback.elsewhere(case.run / "prepare")[1]:
        try:
            from sft.packing.arithmetic import check

            found = check(case.run / "prepare", case.recipe, hardware, case.cluster)
            yield Row(OK, "steps", f"{found.steps.steps:,}, {found.steps.warmup_steps:,} of them warm-up")
        except SftError as e:
            yield _red("steps", e)
        except ImportError:
            pass
    elif case.steps:
        yield Row(OK, "steps", f"{case.steps:,}" + ("" if train.steps else " or so, packing aside"))
    else:
        yield Row(LEFT, "steps", "not known before prepare", f"make prepare RECIPE={case.recipe.name}")


def intervals(case: Case) -> Iterator[Row]:
    """Saving, validating and evaluating happen when they are meant to; the warm-up ends."""
    train, steps = case.recipe.train, case.steps
    if train.ephemeral_every and train.ephemeral_every >= train.save_every:
        yield Row(NOTE, "intervals", f"ephemeral_every = {train.ephemeral_every} is not below save_every = {train.save_every}: it adds nothing",
                  "ephemeral_every=0, or a smaller one")  # fmt: skip
    if train.ephemeral_every and train.save_every % train.ephemeral_every:
        yield Row(NOTE, "intervals", f"save_every = {train.save_every} is not a multiple of ephemeral_every = {train.ephemeral_every}:"
                  " saves follow each other closely", f"ephemeral_every={train.save_every // 2 or 1}")  # fmt: skip
    if train.validate_every and not case.recipe.prepare.validation_fraction:
        yield Row(NOTE, "validation", "no validation split: no validation loss", "[prepare] validation_fraction = 0.01")
    every = getattr(case.recipe.evaluate, "every", 0)
    if every and every < train.save_every:
        yield Row(NOTE, "intervals", f"[evaluate] every = {every} is below save_every = {train.save_every}: only kept steps are evaluated",
                  f"save_every={every}")  # fmt: skip
    for name in ("save_every", "validate_every") if steps else ():
        value = getattr(train, name)
        if steps and value > steps:
            yield Row(NOTE, "intervals", f"{name} = {value} is beyond the last step ({steps}): at the end only")
    if train.warmup_fraction >= 1:
        yield Row(
            RED,
            "warm-up",
            "warmup_fraction = 1: the learning rate is never reached before the end",
            "warmup_fraction=0.03",
        )
    elif train.warmup_fraction > 0.5:
        yield Row(NOTE, "warm-up", f"{train.warmup_fraction:.0%} of the steps are warm-up", "warmup_fraction=0.03")
    elif steps and train.warmup_fraction and not round(train.warmup_fraction * steps):
        yield Row(NOTE, "warm-up", f"{train.warmup_fraction:.0%} of {steps} steps is none", "warmup_fraction=0")
    else:
        yield Row(
            OK,
            "warm-up",
            f"{round(train.warmup_fraction * steps)} of {steps:,} steps"
            if steps
            else f"{train.warmup_fraction:.0%} of the steps",
        )


def memory(case: Case) -> Iterator[Row]:
    """One GPU holds what training puts on it."""
    model, limit = case.model, case.cluster.gpu_memory_gb
    if model is None:
        yield Row(LEFT, "memory", "the vocabulary is not known before prepare")
        return
    from sft.training import memory

    found = memory.plan(model, case.recipe.train, case.training, case.ranks, limit)
    most = sorted(found.parts.items(), key=lambda p: -p[1])[:3]
    text = f"{found.total / 1e9:.1f} GB per GPU ({', '.join(f'{n} {b / 1e9:.1f}' for n, b in most)}), recompute {found.recompute}"
    if not limit:
        yield Row(NOTE if case.cluster.launcher != "local" else LEFT, "memory", f"{text}; what a GPU holds is not stated",
                  f"gpu_memory_gb in {case.file}" if case.cluster.launcher != "local" else "")  # fmt: skip
        return
    try:
        memory.require(found, model, case.recipe.train, case.training, case.ranks)
    except SftError as e:
        yield _red("memory", e)
    else:
        yield Row(OK, "memory", f"{text}, of {limit:g} GB")


def hours(case: Case) -> Iterator[Row]:
    """How long training takes, from its FLOPs and a share of the GPUs' peak."""
    model, steps = case.model, case.steps
    if model is None or not steps:
        yield Row(LEFT, "hours", "not known before prepare")
        return
    from sft.training import flops

    peak = case.cluster.gpu_tflops or flops.peak_tflops(case.cluster.gpu)
    train, lengths = case.recipe.train, case.prepared or {}
    mean = lengths["tokens"] / lengths["documents"] if lengths.get("documents") else train.seq_len
    per_token = flops.flops_per_token(model, (min(mean, train.seq_len) + 1) / 2)
    total = per_token * steps * train.global_batch_tokens
    if not peak:
        yield Row(
            LEFT, "hours", f"{total:.2g} FLOPs; the GPU's peak is not known", f"gpu and gpu_tflops in {case.file}"
        )
        return
    measured = measured_mfu(case.place.runs, case.recipe.model.preset, case.cluster.gpu)
    low, middle, high = (
        (measured * (1 - MEASURED_BAND), measured, measured * (1 + MEASURED_BAND)) if measured else ASSUMED_MFU
    )
    one = total / (case.ranks * peak * 1e12) / 3600
    text = f"{_hours(one / middle)} ({_hours(one / high)} to {_hours(one / low)}), {one / middle * case.ranks:,.1f} GPU hours"
    yield Row(OK, "hours", f"{text}, at an MFU of {middle:.0%} {'measured before' if measured else 'assumed'}")


def measured_mfu(runs: Path, preset: str, gpu: str) -> float | None:
    """The median MFU of the latest run of this preset that measured one on this type of GPU."""
    wanted = set(re.findall(r"\w+", gpu.upper()))
    files = sorted(runs.glob("[a-z0-9]*/train/metrics.jsonl"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files[:20]:
        try:
            config = json.loads((file.parent / manifest.NAME).read_bytes())["config"]
            if config["model"]["preset"] != preset:
                continue
            lines = file.read_text().splitlines()
            device = [json.loads(line)["device"] for line in lines if '"device"' in line][-1:]  # of the last attempt
            if not device or not wanted or not wanted <= set(re.findall(r"\w+", device[0].upper())):
                continue
            records = [json.loads(line) for line in lines[-200:] if '"mfu"' in line]
            values = [r["mfu"] for r in records if isinstance(r.get("mfu"), float) and r["mfu"] > 0]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if values:
            return median(values)
    return None


def disk(case: Case) -> Iterator[Row]:
    """Checkpoints fit where they are written."""
    model, train, steps = case.model, case.recipe.train, case.steps
    if model is None:
        yield Row(LEFT, "checkpoints", "the vocabulary is not known before prepare")
        return
    moments = 2 if getattr(train, "optimizer", "adamw") == "adamw8bit" else 8
    one = model.parameters * (4 + moments)
    if steps is None:
        yield Row(LEFT, "checkpoints", f"{_bytes(one)} each; how many is not known before prepare")
        return
    keep = getattr(train, "keep", 0)
    permanent = math.ceil(steps / train.save_every)
    count = (min(permanent, keep) if keep else permanent) + (1 if train.ephemeral_every else 0)
    text = f"{count} of {_bytes(one)}, {_bytes(count * one)} in all"
    if keep and case.recipe.evaluate.every:
        text += ", and those that wait for their evaluation"
    if case.far and "train" in case.cluster.stages:
        yield Row(LEFT, "checkpoints", f"{text}, in {paths.for_user(case.cluster.runs) or 'storage'}: not measured")
        return
    folder = next(p for p in (case.run, *case.run.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    there = sum(
        f.stat().st_size for f in (case.run / "train").glob("step*/**/*") if f.is_file()
    )  # of a run to go on with
    fits = free + there > 1.05 * count * one
    kept = f", {_bytes(there)} of them there" if there else ""
    yield Row(OK if fits else RED, "checkpoints", f"{text}{kept}; {_bytes(free)} free in {folder}",
              "" if fits else "keep=2, a larger save_every, or RUNS= on another disk")  # fmt: skip


def scheduler(case: Case) -> Iterator[Row]:
    """What the launcher needs of this machine and of the cluster's file, without asking anybody."""
    cluster = case.cluster
    if cluster.launcher == "local":
        return
    if cluster.launcher == "slurm":
        found = shutil.which("sbatch")
        then = "type this on a login node of the cluster"
        yield Row(
            LEFT if found else RED,
            "scheduler",
            f"{found}: not asked" if found else "sbatch: not found",
            "" if found else then,
        )
        return
    try:
        from sft.launch import beaker_spec, code

        beaker_spec.user()
        beaker_spec.check_cluster(case.place.cluster, cluster)
        for stage in set(case.stages) & set(cluster.stages):
            beaker_spec.check_time(case.recipe, case.place.cluster, stage)
        yield Row(
            OK,
            "scheduler",
            f"Beaker: {', '.join(cluster.clusters)}, workspace {cluster.workspace}, budget {cluster.budget}",
        )
        yield Row(OK, "code", _shipped(code.describe(plan.REPO, cluster.code)))
    except SftError as e:
        about = (case.file, "SFT_USER", "[on.")
        yield _red("scheduler" if any(word in str(e) for word in about) else "code", e)


def _shipped(shipped: Any) -> str:
    return f"commit {shipped.commit[:12]} " + (
        f"from {shipped.repository}" if shipped.repository else "as a Beaker dataset"
    )


def evaluation(case: Case) -> Iterator[Row]:
    """The harness and its model are within reach of the cluster."""
    options = case.recipe.evaluate
    if options.harness == "lm-eval":
        return
    if case.cluster.launcher != "beaker":
        yield Row(RED, "evaluation", f"harness = {options.harness!r} runs on Beaker, {case.file} has launcher = {case.cluster.launcher!r}",
                  "another CLUSTER, or harness = \"lm-eval\"")  # fmt: skip
    elif not case.cluster.evaluate_image:
        yield Row(RED, "evaluation", f"no image that has {options.harness}", f"evaluate_image in {case.file}")
    elif case.cluster.evaluate_harness != options.harness:
        yield Row(RED, "evaluation", f"{case.file} brings {case.cluster.evaluate_harness}, the recipe asks for {options.harness}",
                  f'harness = "{case.cluster.evaluate_harness}", or an image and evaluate_harness = "{options.harness}" there')  # fmt: skip
    else:
        yield Row(
            OK,
            "evaluation",
            f"{options.harness} in {case.cluster.evaluate_image}, {len(options.tasks)} tasks or suites",
        )


def _ask_slurm(case: Case) -> Iterator[Row]:
    """Whether Slurm would take a job like training's; nothing is submitted."""
    cluster, hardware = case.cluster, case.training
    gpus = hardware.gpus if hardware.gpus >= 0 else cluster.gpus_per_node
    options = {"nodes": hardware.nodes, "gpus-per-node": gpus, "cpus-per-task": hardware.cpus, "account": cluster.account,
               "partition": hardware.partition or cluster.partition, "qos": cluster.qos,
               "time": hardware.time or cluster.time}  # fmt: skip
    command = [
        "sbatch",
        "--test-only",
        *(f"--{k}={v}" for k, v in options.items() if v),
        *cluster.sbatch,
        "--wrap=true",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as e:
        yield Row(NOTE, "sbatch", f"Slurm was not asked: {e}", "make doctor again")
        return
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no answer"]
    if done.returncode:
        yield Row(RED, "sbatch", lines[-1], f"correct {case.file} or [on.{case.place.cluster}.train]")
    else:
        yield Row(OK, "sbatch", lines[-1])


def account(case: Case) -> Iterator[Row]:
    """Beaker has the account, workspace, budget, images, clusters and secrets. Asks Beaker what a launch asks."""
    if case.cluster.launcher == "slurm" and shutil.which("sbatch"):
        yield from _ask_slurm(case)
    if case.cluster.launcher != "beaker":
        return
    from sft.launch import beaker

    if not beaker.has_token():
        yield Row(
            RED,
            "secrets",
            "no token of Beaker here",
            "BEAKER_TOKEN=…, or beaker configure; see https://beaker.org/user",
        )
        return
    harness = case.needs("evaluate") and case.recipe.evaluate.harness != "lm-eval" and bool(case.cluster.evaluate_image)
    try:
        asked = beaker.Scheduler(case.run / ".jobs", case.cluster)
        problems, gpus = asked.missing(case.file, harness), asked.gpus()
    except (SftError, beaker.LostConnection) as e:
        yield _red("secrets", e)
        return
    if gpus and case.training.gpus and case.cluster.gpus_per_node:
        told = bool(case.cluster.gpu)
        then = "" if told else f"gpu, gpu_memory_gb and gpu_tflops in {case.file}: for the lines memory and hours"
        yield Row(OK if told else NOTE, "GPUs", "; ".join(gpus), then)
    for line in problems:
        found, _, then = line.removeprefix(f"{case.file}: ").partition("; next: ")
        yield Row(RED, "secrets", found, then or f"correct {case.file}, or what it names on Beaker")
    if not problems:
        secrets = ", ".join(paths.for_user(s) for s in case.cluster.secrets.values()) or "none"
        yield Row(OK, "secrets", f"{secrets}; workspace, budget, image and clusters are there")


Check = Callable[[Case], Iterator[Row]]
CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (data, ("prepare", "sync")),
    (tokenizer, ("prepare", "sync", "train")),
    (storage, ("sync", "train")),
    (batch, ("train",)),
    (intervals, ("train",)),
    (memory, ("train",)),
    (hours, ("train",)),
    (disk, ("train",)),
    (scheduler, schema.STAGES),
    (evaluation, ("evaluate",)),
)


def examine(case: Case, ask: bool = False) -> list[Row]:
    """The rows of every check that matters for the case's stages. `ask`: also those that ask a scheduler."""
    rows = []
    for check, stages in CHECKS:
        if case.needs(*stages):
            try:
                rows += list(check(case))
            except SftError as e:
                rows.append(_red(check.__name__, e))
            except ModuleNotFoundError as e:
                rows.append(Row(LEFT, check.__name__, f"not checked: {e.name} is not installed", "make setup"))
    return rows + (list(account(case)) if ask else [])


def table(rows: Sequence[Row]) -> str:
    wide = max((len(r.what) for r in rows), default=0)
    lines = []
    for r in rows:
        lines.append(f"{r.state:4}  {r.what:{wide}}  {r.found}")
        if r.next and r.state != OK:
            lines.append(f"{'':4}  {'':{wide}}  next: {r.next}")
    return "\n".join(lines)


def require(place: plan.Place, r: recipe.Recipe, stage: str) -> None:
    """What a launcher asks before it starts a stage: raises SftError with every red line."""
    red = [row for row in examine(Case(place, r, place.load_cluster(), (stage,))) if row.state == RED]
    if red:
        lines = "\n".join(f"{row.what}: {row.found}; next: {row.next}" for row in red)
        raise SftError(f"{lines}\nmake doctor RECIPE={r.name} CLUSTER={place.cluster} shows all checks")


def _red(what: str, e: Exception) -> Row:
    found, _, then = (
        str(e).rpartition("; next: ")
        if "; next: " in str(e)
        else (str(e).partition("\nnext: ")[0], "", str(e).partition("\nnext: ")[2])
    )
    return Row(RED, what, found.replace("\n", "; "), then)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _hours(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
