"""The ways to train that bench_peers compares: each takes some steps over the same documents and says what it needed.

In:  a `Job`: an architecture, documents of one draw, rows of `seq_len` tokens, the number of steps. Out: `Numbers`, which every way fills.
Weights are fp32, products bf16 on a GPU and fp32 on a CPU, AdamW is fused with fp32 moments, one update for all documents of a step.
"""

from __future__ import annotations

import importlib.util
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sft.checkpoint.olmo_core import step_config
from sft.data.dataset import Dataset
from sft.formats.dataset import TokenIds
from sft.model.flops import attention_flops, head_flops, token_flops
from sft.model.hf import hf_config
from sft.model.utilisation import flops_per_token, mean_attended
from sft.recipe.architecture import ModelConfig

REPO = Path(__file__).resolve().parents[1]
PACKAGES = {
    "trl": "1.16.0", "peft": "0.21.2", "liger_kernel": "0.8.5", "triton": "3.7.1",
    "torchtitan": "0.3.0", "spmd_types": "0.2.3", "tyro": "1.0.17", "docstring_parser": "0.17.0",
}  # fmt: skip
"""Of PyPI, in .peers/ once `fetch` has got them, each in a folder of its own."""
RATE, BETAS = 1e-5, (0.9, 0.95)

Document = tuple[Tensor, Tensor]  # ids and labels, -100 where a token is not trained
Row = dict[str, Tensor]


class Missing(Exception):
    """Why a way cannot run here."""


@dataclass(frozen=True)
class Job:
    config: ModelConfig
    documents: Sequence[Document]  # of one step
    seq_len: int
    packs: int
    steps: int  # timed, after one that warms up
    device: torch.device
    compiled: bool
    recompute: bool


@dataclass
class Numbers:
    """What a way needed. Times are those of the steps, the first one apart."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)  # of the rows of one step, padding included
    began: float = 0.0
    first_end: float = 0.0  # of the first step, by the clock of the day
    own_flops: float = 0.0  # of a step, by the way's own formula; 0 where it has none
    notes: str = ""

    def start(self, device: torch.device) -> None:
        wait(device)
        self.began = time.monotonic()

    def end(self, device: torch.device, loss: float | None = None) -> None:
        wait(device)
        self.seconds.append(time.monotonic() - self.began)
        self.first_end = self.first_end or time.time()
        if loss is not None:
            self.losses.append(loss)

    def report(self, job: Job, started: float, before: int) -> dict[str, Any]:
        """`started`: when the process was, by the clock of the day. `before`: its resident set then, in kB."""
        tokens = sum(len(ids) for ids, _ in job.documents)
        labels = sum(int((labels[1:] != -100).sum()) for _, labels in job.documents)
        lengths = [len(ids) for ids, _ in job.documents]
        forward = token_flops(job.config) * tokens + head_flops(job.config) * labels
        flops = 3 * (forward + float(attention_flops(lengths, job.config).sum()))
        took = statistics.median(self.seconds[1:])
        return {
            "tokens_per_s": tokens / took,
            "trained_tokens_per_s": labels / took,
            "tflops": flops / took / 1e12,
            "tflops_of_rows": sum(row_flops(job.config, width) for width in self.widths) / took / 1e12,
            **({"tflops_own": self.own_flops / took / 1e12} if self.own_flops else {}),
            "padding": 1 - tokens / sum(self.widths),
            "loss": self.losses[0],
            "memory_gb": memory_gb(before),
            "start_s": self.first_end - started,
            "notes": self.notes,
        }


def row_flops(config: ModelConfig, width: int) -> float:
    """Training FLOPs of a row as OLMo-core 3.0 counts them: attention over the row, and the head for every token."""
    windows = (mean_attended([width], window) for window in (0, config.window))
    return width * flops_per_token(config, *windows)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_gb(before: int) -> float:
    """10^9 bytes at the peak: of the allocator on a GPU, else what the resident set grew by."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9


def taken(dataset: Dataset, numbers: Any) -> list[Document]:
    found = []
    for number in numbers:
        ids, mask = dataset[int(number)]
        tokens = torch.from_numpy(ids.astype(np.int64))
        found.append((tokens, torch.where(torch.from_numpy(mask.copy()), tokens, -100)))
    return found


# --- rows -----------------------------------------------------------------------------------------------------------------


def padded(job: Job, batch: int) -> Iterator[Row]:
    """`batch` documents in random order, padded to the longest of them."""
    order = np.random.default_rng(0).permutation(len(job.documents))
    for start in range(0, len(order), batch):
        ids, labels = zip(*(job.documents[i] for i in order[start : start + batch]), strict=True)
        width = max(map(len, ids))
        lengths = torch.tensor([len(i) for i in ids])
        yield {
            "input_ids": torch.stack([nn.functional.pad(i, (0, width - len(i))) for i in ids]),
            "labels": torch.stack([nn.functional.pad(i, (0, width - len(i)), value=-100) for i in labels]),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }


def packs(job: Job) -> list[list[Document]]:
    """The documents of a step by first fit decreasing, in rows of at most seq_len tokens."""
    rows: list[list[Document]] = []
    for document in sorted(job.documents, key=lambda d: -len(d[0])):
        for row in rows:
            if sum(len(ids) for ids, _ in row) + len(document[0]) <= job.seq_len:
                row.append(document)
                break
        else:
            rows.append([document])
    return rows


def packed(job: Job) -> Iterator[Row]:
    """Rows of whole documents, told by position_ids where they begin."""
    for chosen in packs(job):
        yield {
            "input_ids": torch.cat([ids for ids, _ in chosen])[None],
            "labels": torch.cat([nn.functional.pad(labels[1:], (1, 0), value=-100) for _, labels in chosen])[None],
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in chosen])[None],
        }


# --- ways -----------------------------------------------------------------------------------------------------------------


def hf_model(job: Job, kernel: str = "sdpa") -> nn.Module:
    from transformers import AutoModelForCausalLM

    shape = hf_config(job.config, vocab_size=job.config.vocab_size, max_position_embeddings=65536, dtype="float32")
    torch.manual_seed(0)
    with job.device:
        model: nn.Module = AutoModelForCausalLM.from_config(shape, attn_implementation=kernel, dtype=torch.float32)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.train()


def transformers_loop(job: Job, rows: Callable[[Job], Iterator[Row]], recompute: bool) -> Numbers:
    """transformers' own class under bf16 autocast, with its own loss over full logits."""
    model, found = hf_model(job), Numbers()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)
    batches = list(rows(job))
    found.widths = [row["input_ids"].shape[1] for row in batches for _ in range(row["input_ids"].shape[0])]
    labels = sum(int((row["labels"][:, 1:] != -100).sum()) for row in batches)
    found.own_flops = 6 * sum(found.widths) * model.num_parameters(exclude_embeddings=True)  # type: ignore[operator]

    def loss_of(row: Row) -> Tensor:
        moved = {name: value.to(job.device) for name, value in row.items()}
        loss: Tensor = model(**moved, num_items_in_batch=labels).loss
        return loss

    train_steps(job, found, model, optimizer, batches, loss_of)
    return found


def train_steps(
    job: Job,
    found: Numbers,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
) -> None:
    """Trains the steps, each over all batches, with autocast on a GPU. `loss_of`: a batch's part of the step's loss."""
    for _ in range(job.steps + 1):
        found.start(job.device)
        total = torch.zeros((), device=job.device)
        for batch in batches:
            with torch.autocast(job.device.type, torch.bfloat16, enabled=job.device.type == "cuda"):
                loss = loss_of(batch)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.end(job.device, total.item())


def olmo_core(job: Job) -> Numbers:
    """OLMo-core's own train module and model, over its kind of batch: rows of whole documents, with their lengths."""
    if importlib.util.find_spec("olmo_core") is None:
        raise Missing("ai2-olmo-core is not installed; next: pip install -e '.[interop]'")
    from olmo_core.config import DType
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig

    cuda, found = job.device.type == "cuda", Numbers()
    fused = cuda and importlib.util.find_spec("flash_attn") is not None
    described = step_config(job.config, TokenIds(job.config.vocab_size, 1, 0))["model"]
    config = TransformerConfig.from_dict(described)
    parallel = TransformerDataParallelConfig(name=DataParallelType.fsdp, param_dtype=DType.bfloat16)
    rows = list(packed(job))
    module: Any = TransformerTrainModuleConfig(
        rank_microbatch_size=job.seq_len, max_sequence_length=job.seq_len, compile_model=job.compiled, max_grad_norm=1.0,
        optim=AdamWConfig(lr=RATE, betas=BETAS, weight_decay=0.0, fused=True), dp_config=parallel if cuda else None,
    ).build(config.build(init_device="meta"), device=job.device)  # fmt: skip
    torch.manual_seed(0)
    module.model.init_weights(max_seq_len=job.seq_len, device=job.device)
    losses: list[Tensor] = []
    module.record_metric = lambda name, value, *_, **__: None
    module.record_ce_loss = lambda value, *_, **__: losses.append(value.detach().clone())
    module._trainer = SimpleNamespace(record_metric=lambda *_, **__: None)
    found.widths = [job.seq_len] * len(rows)
    found.own_flops = row_flops(job.config, job.seq_len) * len(rows)
    found.notes = "" if fused else "attention over whole rows: document masks need flash-attn on a GPU"
    batch = core_batch(job, rows, fused)
    for _ in range(job.steps + 1):
        found.start(job.device)
        module.train_batch(
            {name: value.to(job.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        )
        module.optim_step()
        module.zero_grads()
        found.end(job.device, losses[-1].item())
    return found


def core_batch(job: Job, rows: Sequence[Row], with_lengths: bool) -> dict[str, Any]:
    """OLMo-core's batch: padded rows, which labels count, and the lengths of the documents in each row."""

    def pad(x: Tensor, value: int = 0) -> Tensor:
        return nn.functional.pad(x, (0, job.seq_len - x.shape[-1]), value=value)

    batch: dict[str, Any] = {
        "input_ids": torch.cat([pad(row["input_ids"]) for row in rows]),
        "label_mask": torch.cat([pad((row["labels"] != -100).int()) for row in rows]).bool(),
    }
    if with_lengths:
        lengths = [[len(ids) for ids, _ in chosen] for chosen in packs(job)]
        lengths = [row + [job.seq_len - sum(row)] * (sum(row) < job.seq_len) for row in lengths]
        most = max(map(len, lengths))
        batch["doc_lens"] = torch.tensor([row + [0] * (most - len(row)) for row in lengths])
        batch["max_doc_lens"] = [max(row) for row in lengths]
    return batch


def trl(job: Job, batch: int, liger: bool = False) -> Numbers:
    """TRL's SFTTrainer, whose loss is chunked; `batch` documents in a padded batch, 0 packs them by best fit."""
    needed = ["trl", *(["liger_kernel"] if liger else [])]
    needed += ["triton"] if liger and importlib.util.find_spec("triton") is None else []
    if away := absent(needed):
        raise Missing(f"{', '.join(away)} not in .peers; next: run it without --no-fetch")
    sys.path[:0] = [str(package(name)) for name in needed]
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl import pack_dataset as best_fit

    found, cuda = Numbers(), job.device.type == "cuda"
    rows = datasets.Dataset.from_list(
        [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in job.documents]
    )
    tokenizer = AutoTokenizer.from_pretrained(REPO / "recipes" / "smoke" / "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            found.start(job.device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.end(job.device)

    made = rows if batch else best_fit(rows, job.seq_len, "bfd")  # the trainer packs by itself
    found.widths = (
        [len(row) for row in made["input_ids"]]
        if not batch
        else [row["input_ids"].shape[1] for row in padded(job, batch) for _ in range(row["input_ids"].shape[0])]
    )
    each = batch or 1
    kernel, found.notes = attention_of_rows(cuda and not batch)
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out, max_length=job.seq_len, packing=not batch, per_device_train_batch_size=each, max_steps=job.steps + 1,
            gradient_accumulation_steps=-(-len(made) // each), learning_rate=RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            weight_decay=0.0, optim="adamw_torch_fused", gradient_checkpointing=job.recompute, bf16=cuda, fp16=False, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=not cuda, dataloader_pin_memory=cuda,
            use_liger_kernel=liger,
        )  # fmt: skip
        trainer = SFTTrainer(
            hf_model(job, kernel), settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]
        )
        if liger and not cuda:
            raise Missing(f"Liger's kernels need a GPU. On one they replace {', '.join(liger_parts(trainer))}")
        trainer.train()
    found.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found.own_flops = trainer.state.total_flos / (job.steps + 1)
    return found


def attention_of_rows(packed_on_gpu: bool) -> tuple[str, str]:
    """transformers' name of the attention for TRL's packed rows, and a note: kernels that know documents, where one is installed."""
    if packed_on_gpu:
        for name, kernel in (("flash_attn", "flash_attention_2"), ("kernels", "kernels-community/flash-attn2")):
            if importlib.util.find_spec(name):
                return kernel, f"attention by {kernel}"
        return "sdpa", "attention with a dense mask: neither flash-attn nor kernels is installed"
    return "sdpa", ""


def liger_parts(trainer: Any) -> list[str]:
    """Puts Liger's kernels into the trainer's model, as `train` does at its start, and says what they replaced."""
    from transformers.integrations.liger import apply_liger_kernel

    def forwards() -> dict[str, Any]:
        return {name: getattr(part.forward, "__func__", part.forward) for name, part in trainer.model.named_modules()}

    before = forwards()
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    changed = [name for name, forward in forwards().items() if forward is not before[name]]
    kinds = Counter(type(trainer.model.get_submodule(name)).__name__ for name in changed)
    return [f"{count} {kind}" for kind, count in sorted(kinds.items())]


def package(name: str) -> Path:
    return REPO / ".peers" / f"{name}-{PACKAGES[name]}"


def absent(names: Iterable[str]) -> list[str]:
    return [name for name in names if not package(name).is_dir()]


def fetch(names: Iterable[str]) -> None:
    """Unpacks the wheels; nothing is installed. Their other requirements are those of the environment. A package that cannot be
    fetched is reported, and its way says that it is missing."""
    for name in absent(names):
        version, part = PACKAGES[name], package(name).with_name(f"{package(name).name}.part")
        shutil.rmtree(part, ignore_errors=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target", str(part)]
        command = [sys.executable, "-m", "pip", "install", *options, f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"[bench] {name} {version} cannot be fetched: {last}", file=sys.stderr)
        else:
            part.rename(package(name))


def ways(batches: Sequence[int]) -> dict[str, Callable[[Job], Numbers]]:
    """{name: way}, but for ours, which is bench_peers'."""
    rows = {f"{n} a batch": partial(padded, batch=n) for n in batches}
    return {
        **{f"finetune.py, {name}": partial(transformers_loop, rows=row, recompute=True) for name, row in rows.items()},
        **{
            f"transformers, {name}": partial(transformers_loop, rows=row, recompute=False) for name, row in rows.items()
        },
        "transformers, packed": partial(transformers_loop, rows=packed, recompute=False),
        "OLMo-core": olmo_core,
        **{f"TRL, {n} a batch": partial(trl, batch=n) for n in batches},
        "TRL, packed": partial(trl, batch=0),
        "TRL, packed, Liger": partial(trl, batch=0, liger=True),
    }
