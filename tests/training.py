"""A stage to train in, without Make: a synthetic dataset, a tiny recipe, and `run`, the target of a test's process.

The dataset's documents count upwards from a random id, so that a tiny model learns them within a few steps.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import pydoc
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import made_data
from patience import PATIENCE
from published import publish
from sft.checkpoint.step_folder import DcpReader
from sft.common.files import hash_file
from sft.data.dataset_writer import DatasetWriter
from sft.formats.dataset import SplitSize
from sft.formats.metrics import StepRecord, read_metrics, read_steps
from sft.formats.remote import Remote
from sft.recipe import presets, schema
from sft.runner import plan

VOCAB, EOS, PAD = 120, 1, 0
# Half of a training's time goes into its layers: one with a window and one without.
presets.PRESETS["two-layers-tiny"] = dataclasses.replace(
    presets.PRESETS["olmo3-tiny"], n_layers=2, window_layers=(True, False)
)
MODEL: dict[str, Any] = {
    "preset": "two-layers-tiny",
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "hidden": 64,
    "window": 8,
}
TRAIN: dict[str, Any] = {
    "seq_len": 64, "global_batch_tokens": 256, "steps": 12, "lr": 3e-3, "precision": "fp32",
    "save_every": 100, "ephemeral_every": 3, "validate_every": 6,
}  # fmt: skip
HARDWARE: dict[str, Any] = {"microbatch_tokens": 128}  # two packs: half as many forward passes


def write_split(folder: Path, documents: int, seed: int) -> SplitSize:
    rng = np.random.default_rng(seed)
    with DatasetWriter(folder, VOCAB, part_tokens=4096) as writer:
        for number in range(documents):
            length = int(rng.integers(4, 60))
            ids = (int(rng.integers(2, VOCAB)) + np.arange(length)) % (VOCAB - 2) + 2
            ids[-1] = EOS
            mask = np.arange(length) >= (length - 1 if number % 3 == 0 else rng.integers(1, length))
            writer.add(ids, mask, [length], source=number % 2)
        return SplitSize(writer.num_documents, writer.num_tokens, writer.num_targets)


def write_dataset(folder: Path) -> Path:
    """A synced dataset of two sources, with a validation split."""
    tokenizer = folder / "data" / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    splits = {"data": write_split(folder / "data", 120, 1), "validation": write_split(folder / "validation", 20, 2)}
    facts = made_data.facts(VOCAB, EOS, PAD, hash_file(tokenizer / "tokenizer.json"))
    sources = [made_data.source_summary("odd"), made_data.source_summary("even")]
    made_data.dataset_info(facts, sources, splits).write(folder / "dataset.json")
    publish(folder, ["data", "validation", "dataset.json"], stage="prepare", run="fake", key="sha256:0")
    return folder


def run_folder(folder: Path, dataset: Path) -> Path:
    """The folder of a run over a dataset that is there."""
    folder.mkdir(exist_ok=True)
    (folder / "dataset").symlink_to(dataset)
    return folder


@dataclasses.dataclass
class FakeRecipe:
    model: schema.Model
    train: schema.Train
    evaluate: schema.Evaluate = dataclasses.field(default_factory=schema.Evaluate)
    prepare: schema.Prepare = dataclasses.field(default_factory=lambda: schema.Prepare(tokenizer="tok", sources=()))
    run: str = "fake"
    loss_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    name: str = "fake"
    file: str = "recipes/fake.toml"


class FakeStage:
    """What sft.training.train uses of sft.runner.stage.Stage."""

    def __init__(
        self,
        folder: Path,
        base: Path | None = None,
        hardware: dict[str, Any] | None = None,
        storage: str = "",
        **fields: Any,
    ) -> None:
        model = {k.removeprefix("model_"): fields.pop(k) for k in list(fields) if k.startswith("model_")}
        weights = fields.pop("loss_weights", {})
        table = schema.Train(**(TRAIN | fields))
        self.recipe = FakeRecipe(schema.Model(**(MODEL | model)), table, loss_weights=weights)
        self.place = plan.Place(folder.parent)
        self.hardware = schema.Hardware(**(HARDWARE if hardware is None else hardware))
        self.cluster = schema.Cluster(storage="")
        self.dataset = folder / "dataset"
        self.base = base
        self.out = folder / "train"
        self.out.mkdir(parents=True, exist_ok=True)
        self.cache = folder / "cache"
        self.identity = "0123456789abcdef"
        self.storage = storage or str(folder)
        self.remote = Remote("dataset", None, ())

    def log(self, text: str) -> None:
        print(f"[train] {text}", flush=True)

    def sha256(self, file: Path) -> str:
        return hash_file(file)


def train_here(folder: Path, fields: dict[str, Any]) -> int:
    """The stage on this rank; exit status as sft.training.train's."""
    from sft.common.errors import SftError
    from sft.common.process import AGAIN, OUT_OF_MEMORY
    from sft.model.parallel import SharedError, join
    from sft.training.loop import Requeue
    from sft.training.out_of_memory import StartAgain
    from sft.training.train import train_stage

    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    base = fields.pop("base", None)
    if fault := fields.pop("fault", None):
        arm(**fault)
    world = join(threads=1)
    try:
        stage = FakeStage(folder, Path(base) if base else None, fields.pop("hardware", None), **fields)
        result = train_stage(stage, world, lambda: bool(asked))  # type: ignore[arg-type]
        if world.is_rank0:
            (folder / "result.json").write_text(json.dumps(result.metrics))
    except Requeue:
        return AGAIN
    except StartAgain as again:
        print(f"[train] warning: {again}", flush=True)
        return OUT_OF_MEMORY
    except SftError as error:
        if world.is_rank0 or not isinstance(error, SharedError):
            print(f"[train] error: {error}", flush=True)
        return 1
    finally:
        world.close()
    return 0


def arm(at: str, call: int, kind: str, thread: str = "", rank: int | None = None) -> None:
    """Makes a call of the function named `at` (in a thread whose name starts so, on this rank) kill the job, send it SIGTERM first,
    fail as a full disk or a full GPU does, sleep for ever or for a tenth of a second, or return another bit in its largest number. Call 0
    is every call."""
    if rank is not None and rank != int(os.environ.get("RANK", 0)):
        return
    owner, name = at.rsplit(".", 1)
    target = pydoc.locate(owner)
    function = getattr(target, name)
    calls = itertools.count(1)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name.startswith(thread) and (next(calls) == call or not call):
            if kind == "slow":
                time.sleep(0.1)
                return function(*args, **kwargs)
            if kind == "flip":
                return flipped(function(*args, **kwargs))
            if kind == "kill":
                os.killpg(0, signal.SIGKILL)
            if kind == "sleep":
                time.sleep(3600)
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")
            if kind == "disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    setattr(target, name, armed)


def flipped(value: torch.Tensor) -> torch.Tensor:
    """The same fp32 tensor with another bit in its largest number, as a processor may compute it."""
    with torch.no_grad():
        bits = value.detach().view(torch.int32).view(-1)
        bits[value.detach().view(-1).abs().argmax()] ^= 1 << 16
    return value


def gradients(folder: Path, fields: dict[str, Any]) -> int:
    """The gradients of the first and of the last step at the first weights, whole, and how often they were summed over copies of the
    weights, into <folder>/gradients.pt. With `ways`, {name: other fields}: {name: the same}, one after the other, so that
    the ranks start once."""
    from sft.model.parallel import join

    ways = fields.pop("ways", None)
    world = join(threads=1)
    # Dynamo's and autograd's graphs without a C++ compiler, which takes a minute here.
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **options: plain(module, backend="aot_eager", **options)  # type: ignore[method-assign,assignment]
    try:
        found = {}
        for name, others in (ways or {"": {}}).items():
            torch._dynamo.reset()
            options = fields | others
            found[name] = _gradients(FakeStage(folder, None, options.pop("hardware", None), **options), world)
        if world.is_rank0:
            torch.save(found if ways else found[""], folder / "gradients.pt")
    finally:
        world.close()
    return 0


def _gradients(stage: FakeStage, world: Any) -> dict[str, Any]:
    from sft.model.parallel import set_parameter
    from sft.training.build import build_run
    from sft.training.loop import accumulate
    from sft.training.optim import full_tensor

    reductions = 0
    reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        nonlocal reductions
        reductions += tensor.numel() > VOCAB  # gradients, and no statistics
        return reduce(tensor, *args, **options)

    torch.distributed.all_reduce = counted
    try:
        run, _ = build_run(stage, world)  # type: ignore[arg-type]
        for name, parameter in run.model.named_parameters():
            if name.endswith("lora_b"):  # at zero, its partner has no gradient
                set_parameter(parameter, torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
        found: dict[int, dict[str, Any]] = {}
        labels = []
        for step, batches in run.loader(0):
            if step not in (0, run.plan.steps - 1):
                continue
            loss = accumulate(run, step, batches)[0]
            labels += [batch.num_targets for batch in batches]
            grads = {n: full_tensor(p.grad).clone() for n, p in run.model.named_parameters() if p.grad is not None}
            found[step] = {**grads, "loss": world.sum(loss)}
            run.model.zero_grad(set_to_none=True)
        return {"steps": found, "labels": world.gather(labels), "reductions": reductions}
    finally:
        torch.distributed.all_reduce = reduce


def fork(ranks: int, action: Callable[[], int]) -> int:
    """Runs `action` in as many processes, with torchrun's environment; the highest exit status. One import for all."""
    if ranks == 1:
        return action()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update(
                {k: str(v) for k, v in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            )
            status = 1
            try:
                status = action()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the ranks get the signal themselves
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255 for child in children)


def run(folder: Path, fields: dict[str, Any], action: Callable[[Path, dict[str, Any]], int] | None = None) -> None:
    """A whole training run, or another `action`, as a process group of its own; its words go to <folder>/log. `config`: a
    ModelConfig in place of the tiny model's fields."""
    os.setsid()
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote, and a busy disk takes its time
    with (folder / "log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    ranks = fields.pop("ranks", 1)
    if config := fields.pop("config", None):
        presets.PRESETS["given"] = config
        fields |= {f"model_{name}": None for name in MODEL} | {"model_preset": "given"}
    os.environ.update(fields.pop("environment", {}))  # the server of processes was started before
    if fields.pop("device", "cpu") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(fork(ranks, lambda: (action or train_here)(folder, fields)))


# --- processes, from the test's side ---

# Processes are forked from a server that has imported everything once: a run then starts in milliseconds. The server searches
# PYTHONPATH alone, and skips what it does not find without a word: every process would then import it for itself.
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["sft.training.train", "training", "pytest"]
SERVER.set_forkserver_preload([*PRELOADED, "frozen"])
_HERE = Path(__file__).resolve().parent
_SEARCHED = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, dict.fromkeys([*_SEARCHED, str(_HERE.parent / "lib"), str(_HERE)]))
)


def start(folder: Path, **fields: Any) -> BaseProcess:
    # With CUDA, what the server has imported may have touched the driver, which no forked process can use then.
    context = multiprocessing.get_context("spawn") if fields.get("device") == "cuda" else SERVER
    process = context.Process(target=run, args=(folder, fields))
    process.start()
    return process


def finish(process: BaseProcess, folder: Path, status: int = 0) -> str:
    process.join(timeout=PATIENCE)
    out = (folder / "log").read_text()
    assert process.exitcode == status, out
    return out


def kill(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    while process.is_alive():
        try:
            os.killpg(process.pid, number)
            break
        except ProcessLookupError:  # it has not made its group yet
            time.sleep(0.001)
    if number == signal.SIGKILL:
        process.join(timeout=PATIENCE)


def train(folder: Path, status: int = 0, **fields: Any) -> str:
    return finish(start(folder, **fields), folder, status)


def records(folder: Path) -> list[StepRecord]:
    return read_steps(folder / "train" / "metrics.jsonl")


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl, or 0. Unlike `records` it costs little."""
    found = read_metrics(folder / "train" / "metrics.jsonl", last=1)
    return max((r.step for r in found if isinstance(r, StepRecord)), default=0)


def wait_for(folder: Path, step: int, process: BaseProcess) -> None:
    """Until metrics.jsonl holds a step."""
    deadline = time.monotonic() + PATIENCE
    metrics, size = folder / "train" / "metrics.jsonl", -1
    while True:
        found = metrics.stat().st_size if metrics.exists() else 0
        if found != size and last_step(folder) >= step:
            return
        size = found
        assert process.is_alive(), (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def tensors(step: Path) -> dict[str, torch.Tensor]:
    return dict(DcpReader(step, adapters=True)) | {f"optim {k}": v for k, v in DcpReader(step, "optim.state.").items()}


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


CURVE = ("step", "loss", "lr", "grad_norm", "labels", "tokens", "padding", "validation_loss", "sources")


def curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: getattr(r, k) for k in CURVE} for r in records(folder)]
