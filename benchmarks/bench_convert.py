"""What an export costs, for the 7B geometry: time against copying the same bytes, memory, and OLMo-core's converter beside it.

In:  nothing; a step with random weights is written first (29 GB; fewer layers where the disk is short) and removed at the end.
Out: a table, and one JSON object on the last line.
Run: make bench-convert    (or: python benchmarks/bench_convert.py --layers 8 --folder /a/large/disk; a hybrid:
     --preset olmo-hybrid-7b --other none)

Copy and export take turns, both from a cold page cache, as often as --minutes allows, and the best of each counts. The gate runs once:
every tensor, the logits over the layers that `gate = "fast"` takes (--gate full: all, which is hours on two cores), tokens of replies.
OLMo-core's converter holds the model several times over, so the two are compared on two layers of the 1B geometry.

Every part is a process of its own. Its memory is the kernel's high-water mark of the resident set (VmHWM): what it
allocated and what it touched of mapped files such as torch's libraries. The page cache of files that are read is not in it,
and no weights are mapped here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint.dcp_reader import DcpReader
from sft.checkpoint.hf_folder import HfFolder
from sft.checkpoint.olmo_core import config_of_step, step_config
from sft.export.step_writer import write_step_weights
from sft.formats.dataset import TokenIds
from sft.model import hf
from sft.recipe.architecture import ModelConfig
from sft.recipe.presets import PRESETS

VOCAB = 100_278
TOKENIZER = Path(__file__).parents[1] / "recipes" / "smoke" / "tokenizer"
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ROUNDS = 3
REPLY = 2  # tokens of a greedy reply: each costs as much as the next
SAMPLE = 1 << 22


class Noise:
    """Random weights: stretches of one sample, so that writing them costs little more than the disk."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = hf.shapes(config)
        self.sample = torch.empty(SAMPLE).uniform_(-0.035, 0.035, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = torch.Size((stop - start, *self.shapes[name][1:]))
        if len(shape) == 1:
            return torch.ones(shape)
        first = hash(name) % 997  # so that no two tensors are alike
        repeats = (first + shape.numel()) // SAMPLE + 1
        return self.sample.repeat(repeats)[first : first + shape.numel()].view(shape)


def write_checkpoint(step: Path, config: ModelConfig, vocab: int) -> None:
    write_step_weights(Noise(config), hf.shapes(config), step, "random weights")
    made = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**made["model"]["vocab"], **{token["content"]: token["id"] for token in made["added_tokens"]}}
    # As many ids as the real one has: OLMo-core's converter refuses another number.
    made["model"]["vocab"] = ids | {f"unused {i}": i for i in range(len(ids), vocab)}
    shutil.copytree(TOKENIZER, step.parent / "tokenizer", dirs_exist_ok=True)
    (step.parent / "tokenizer" / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    tokens = TokenIds(vocab, ids["<|endoftext|>"], ids["<|pad|>"])
    (step / "config.json").write_text(json.dumps(step_config(config, tokens)))


def export(step: Path) -> dict[str, Any]:
    from sft.common.files import write_json
    from sft.export.write import write_weights

    config, target = config_of_step(step / "config.json"), step / "model"
    vocab = json.loads((step / "config.json").read_bytes())["dataset"]["tokenizer"]["vocab_size"]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    made = hf.hf_config(config, vocab_size=vocab, max_position_embeddings=65536, dtype="bfloat16")
    began = time.monotonic()
    write_weights(DcpReader(step), config, vocab, target, "bfloat16", 5_000_000_000, lambda _: None)
    write_json(target / "config.json", hf.config_json(made))
    return {"seconds": time.monotonic() - began, "peak": peak_gb()}


def gate(step: Path, every: bool) -> dict[str, Any]:
    """The gate's parts that grow with the model, one after the other in this process, as the stage runs them."""
    from sft.export.chats import greedy_replies, trained_chats
    from sft.export.gate import check_tensors
    from sft.export.logits import compare_logits, sample_layers

    config, weights, exported = config_of_step(step / "config.json"), DcpReader(step), HfFolder(step / "model")
    layers = list(range(config.n_layers)) if every else sample_layers(config.n_layers)
    loaded = tokenizer(step)
    chats = trained_chats(loaded, TEMPLATE, config)
    parts: dict[str, Callable[[], Any]] = {
        "every tensor": lambda: check_tensors(exported, weights, config, torch.bfloat16),
        f"logits of {sum(map(len, chats)):,} packed tokens, {len(layers)} layers": lambda: compare_logits(
            exported, weights, config, chats, layers
        ),
        f"{REPLY} tokens of three replies": lambda: greedy_replies(exported, loaded, config, [0], REPLY),
    }
    found = {}
    for name, part in parts.items():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        began = time.monotonic()
        part()
        found[name] = {"seconds": time.monotonic() - began, "peak": peak_gb()}
    return found


def tokenizer(step: Path) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(step.parent / "tokenizer")
    made.chat_template = TEMPLATE
    return made


def theirs(step: Path) -> dict[str, Any]:
    """OLMo-core's converter, without its validation, as its own script calls it."""
    from olmo_core.config import DType
    from olmo_core.nn.hf.convert_checkpoint import convert_checkpoint_to_hf, load_config

    described = load_config(str(step))
    assert described is not None
    began = time.monotonic()
    convert_checkpoint_to_hf(
        original_checkpoint_path=step,
        output_path=step / "theirs",
        transformer_config_dict=described["model"],
        tokenizer_config_dict=described["dataset"]["tokenizer"],
        dtype=DType.bfloat16,
        max_sequence_length=65536,
        validate=False,
    )
    return {"seconds": time.monotonic() - began, "peak": peak_gb()}


def peak_gb() -> float:
    """High-water mark of this program alone (getrusage also counts what its parent was when it forked)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e9


def copy_seconds(step: Path) -> float:
    """Reads the checkpoint's bytes and writes as many as the export has, synced, as the export does."""
    forget(step)
    target = step / "copy"
    began = time.monotonic()
    with target.open("wb") as write:
        for source in sorted((step / "model_and_optim").glob("*.distcp")):
            with source.open("rb") as read:
                while piece := read.read(1 << 24):
                    write.write(piece[: len(piece) // 2])  # bf16 of fp32
        write.flush()
        os.fsync(write.fileno())
    seconds = time.monotonic() - began
    target.unlink()
    return seconds


def forget(step: Path) -> None:
    """Drops the checkpoint from the page cache."""
    for file in (step / "model_and_optim").glob("*.distcp"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alone(part: str, step: Path) -> dict[str, Any]:
    """One part in a process of its own: what it found."""
    forget(step)
    command = [sys.executable, __file__, "--part", part, "--folder", str(step)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\n{part}: exit {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tell(what: str, seconds: float, peak: float | None = None) -> None:
    print(f"{what:<58} {seconds:8.1f} s" + (f"   peak {peak:5.2f} GB" if peak is not None else ""), flush=True)


def compare(folder: Path, preset: str, minutes: float, vocab: int) -> dict[str, Any]:
    """Our export and OLMo-core's in turn."""
    config = replace(PRESETS[preset], n_layers=2, vocab_size=-(-vocab // 128) * 128)
    write_checkpoint(folder / "step0", config, vocab)
    print(f"{preset}, 2 layers, {config.parameters:,} parameters:")
    best: dict[str, dict[str, Any]] = {}
    there = importlib.util.find_spec("olmo_core") is not None
    for _ in range(2 if minutes else 1):
        for part in ("export", "theirs") if there else ("export",):
            found = alone(part, folder / "step0")
            shutil.rmtree(folder / "step0" / "theirs", ignore_errors=True)
            tell("  export" if part == "export" else "  OLMo-core's converter", **found)
            if found["seconds"] < best.get(part, found)["seconds"] or part not in best:
                best[part] = found
    shutil.rmtree(folder)
    ours, other = best["export"], best.get("theirs")
    return {
        "ratio_to_olmo_core": ours["seconds"] / other["seconds"] if other else None,
        "olmo_core_rss_gb": other["peak"] if other else None,
        "our_rss_gb": ours["peak"],
    }


def fitting_layers(config: ModelConfig, free: int) -> int:
    """As many layers, in groups of four, as fit: fp32, half of that for the export or the copy, and some air."""

    def size(layers: int) -> int:
        return replace(config, n_layers=layers).parameters * 6

    return max((n for n in range(4, config.n_layers + 1, 4) if size(n) < 0.95 * free), default=0)


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    result = compare(folder / "small", args.other, args.minutes, args.vocab) if args.other != "none" else {}
    full = replace(PRESETS[args.preset], vocab_size=-(-args.vocab // 128) * 128)
    layers = args.layers or fitting_layers(full, shutil.disk_usage(folder).free)
    if not layers:
        sys.exit(f"{folder}: too little free space for four layers of {args.preset}; next: --folder=/a/larger/disk")
    config, step = replace(full, n_layers=layers), folder / "step0"
    print(f"{args.preset}, {layers} of {full.n_layers} layers, {config.parameters:,} parameters:")
    at = time.monotonic()
    write_checkpoint(step, config, args.vocab)
    tell("  checkpoint written", time.monotonic() - at)
    copies: list[float] = []
    exports: list[dict[str, Any]] = []
    proof: dict[str, dict[str, Any]] = {}
    taken = 0.0
    while not copies or (len(copies) < ROUNDS and time.monotonic() - began + taken < 60 * args.minutes):
        at = time.monotonic()
        shutil.rmtree(step / "model", ignore_errors=True)  # one of the two at a time is on the disk
        copies.append(copy_seconds(step))
        tell("  copy of the same bytes", copies[-1])
        exports.append(alone("export", step))
        tell("  export", **exports[-1])
        taken = time.monotonic() - at
        if not proof:
            proof = alone(f"gate-{args.gate}", step)
            for name, found in proof.items():
                tell(f"  gate: {name}", **found)
    seconds = min(e["seconds"] for e in exports)
    return {
        "peak_rss_gb": max(part["peak"] for part in (*exports, *proof.values())),
        "ratio_to_copy": seconds / min(copies),
        **result,
        "layers": layers,
        "rounds": len(copies),
        "copy_s": copies,
        "export_s": [e["seconds"] for e in exports],
        "export_rss_gb": max(e["peak"] for e in exports),
        "gate": proof,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="default: all that the free disk takes")
    parser.add_argument("--minutes", type=float, default=10, help="no further round after this; 0 = one of each")
    parser.add_argument("--gate", choices=("fast", "full"), default="fast", help="layers whose logits are compared")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="olmo3-7b", help="the geometry")
    parser.add_argument(
        "--other", choices=("none", *PRESETS), default="olmo2-1b", help="compared with OLMo-core, two layers"
    )
    parser.add_argument("--vocab", type=int, default=VOCAB, help="tokens of the vocabulary")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        parts: dict[str, Callable[[Path], dict[str, Any]]] = {
            "export": export,
            "theirs": theirs,
            "gate-fast": lambda step: gate(step, every=False),
            "gate-full": lambda step: gate(step, every=True),
        }
        print(json.dumps(parts[args.part](args.folder)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-convert-") as name:
            result = run(Path(name), args)
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was written is removed")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
