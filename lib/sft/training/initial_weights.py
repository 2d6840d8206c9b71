"""Training's first weights.

In:  the architecture, the synced base folder (or None = random weights). Out: `initialise` fills the model.

A base is an OLMo-core step folder (only its weights are read, neither optimizer state nor hyper-parameters) or a
Hugging Face folder. The rows of tokens that the base does not have start as the mean of its rows with a little noise. Rows
that only pad the table start as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sft.checkpoint.dcp_reader import DcpReader, weights_folder
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.model import hf
from sft.model.adapters import set_base
from sft.model.model import initial_value
from sft.model.noise import named_generator
from sft.recipe.architecture import ModelConfig
from sft.recipe.differences import Difference, mismatch

NOISE = 0.2
"""Standard deviation of the noise of a new row, as a share of that of the table's values.

The mean of a table is near zero in some models. A row without noise is then far shorter than the others, and the norm before
the first layer multiplies its gradient by the inverse of its length: with 2 of 100 tokens new, the first step's gradient norm was up to
2.2 times the usual one without noise, 1.2 times at 0.2 and 1.06 times at 0.5 (tiny Llama and Qwen 3, random tables). Longer noise
takes an output row further away from the mean, which is the best guess for a new token.
"""


def initialise(
    model: nn.Module,
    config: ModelConfig,
    base: Path | None,
    seed: int,
    ids: int = 0,
    log: Callable[[str], None] = print,
    added: int = 0,
) -> str:
    """Fills every tensor of the model but its adapters, one complete tensor at a time. Returns the origin of the weights in words.

    `ids` is the number of the tokenizer's ids; the last `added` of them are new to the base, even if its table is padded and
    has their rows. Raises SftError.
    """
    if base is None:
        for name, shape in hf.shapes(config).items():
            set_base(model, name, initial_value(name, shape, config.init_std, seed))
        return f"random weights, seed {seed}"
    if (weights_folder(base) / ".metadata").is_file():
        tensors = DcpReader(base)
        _check_shapes({name: tensors.shape(name) for name in hf.without_tied_head(tensors, config)}, config, base)
        _fill(model, config, tensors.__getitem__, base, New(ids, added, seed, log))
        return f"weights of the OLMo-core checkpoint {base}"
    if (base / "config.json").is_file():
        folder = HfFolder(base)
        folder.check(config)
        for note in folder.notes:
            log(f"{base}: {note}")
        _fill(model, config, folder.__getitem__, base, New(ids, added, seed, log))
        folder.close()
        return f"weights of the Hugging Face folder {base}"
    raise SftError(
        f"{base}: neither an OLMo-core checkpoint (model_and_optim/.metadata) nor a Hugging Face folder (config.json);"
        " next: correct [model] base"
    )


@dataclass(frozen=True)
class New:
    """Rows of the vocabulary that a base does not have: those of the tokenizer's `ids`, and rows that pad the table. The
    last `added` ids are new in any case."""

    ids: int
    added: int
    seed: int
    log: Callable[[str], None]

    def fill(self, name: str, table: Tensor, rows: int) -> Tensor:
        """The table [n, d] with `rows` rows, in its dtype: new_rows for new ids of the tokenizer, zeros for other new rows."""
        known = min(len(table), self.ids - self.added) if self.ids else len(table)
        made = torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])])
        if self.ids > known and (self.added or self.ids > len(table)):
            made[known : self.ids] = new_rows(name, table[:known], self.ids - known, self.seed).to(table.dtype)
            self.log(
                f"{name}: rows {known:,} to {self.ids - 1:,} are new: the mean of the base's {known:,} rows, with noise of"
                f" {NOISE:g} of their deviation"
            )
        return made


def new_rows(name: str, table: Tensor, count: int, seed: int) -> Tensor:
    """fp32 [count, d]: the mean of the table's rows, and noise from (seed, name).

    The mean is summed in fp64 and rounded to bf16, so that it is the same on every rank and number of threads.
    """
    exact = table.double()
    mean = exact.mean(0).bfloat16().float()
    deviation = exact.std().bfloat16().float()
    generator = named_generator(seed, name)
    return mean + NOISE * deviation * torch.randn(count, *table.shape[1:], generator=generator)


def _fill(model: nn.Module, config: ModelConfig, read: Callable[[str], Tensor], base: Path, new: New) -> None:
    """Copies every tensor, and makes the rows of the vocabulary that the base does not have. Raises SftError for values
    that are not finite."""
    for name, shape in hf.shapes(config).items():
        value = read(name)
        if not value.isfinite().all():
            raise SftError(f"{base}: {name} has values that are not finite; next: fetch the weights again")
        if name in hf.VOCAB_ROWS:
            value = new.fill(name, value, shape[0])
        set_base(model, name, value)


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, base: Path) -> None:
    vocab = found.get("embeddings.weight", (config.vocab_size,))[0]
    if vocab > config.vocab_size:
        row = Difference("vocab_size", str(vocab), str(config.vocab_size), f"vocab_size = {vocab}")
        raise SftError(mismatch(f"{base}: the table of the vocabulary has more rows than the model", [row], "set it"))
    hf.check_shapes(found, hf.shapes(config, vocab), str(base))
