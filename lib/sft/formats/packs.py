"""index.json of cached packs, and the figures of a run's steps. Standard library only.

    cache/packs/packs-<digest>/index.json   {"seq_len", "policy", "digest", "losses": {…}}

Rank 0 of a training writes the folder, and the other ranks read it. `StepSummary` is "data" in train's metrics, and
`DataPosition` is what a checkpoint records of the data it has consumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sft.formats.record import Record


@dataclass(frozen=True)
class PackingLosses:
    """What packing left out. "Pieces" are segments of documents; "labels" are trained tokens.

    The tokens and labels of segments without a trained token count as lost too.
    """

    documents: int
    """Documents in the dataset; `tokens` and `labels` are the sums over them."""
    tokens: int
    labels: int
    long_documents: int
    """Documents that are longer than a pack."""
    pieces: int
    """Segments that were packed."""
    unlabelled_pieces: int
    """Segments that were left out, because they would cost compute and train nothing."""
    tokens_lost: int
    labels_lost: int
    exact: bool
    """False: trained tokens of cut documents are estimated, because the loss masks were not available."""
    shortest: int | None = None
    """Where no segment was packed: the tokens of the shortest document."""


@dataclass(frozen=True)
class PackHeader(Record):
    """The header of a saved `PackIndex`. `digest` covers the arrays too."""

    NEXT: ClassVar[str] = "delete the folder; the packs are then made again"
    ASCII: ClassVar[bool] = True
    END: ClassVar[str] = ""
    seq_len: int
    policy: str
    digest: str
    losses: PackingLosses


@dataclass(frozen=True)
class TokensPerStep:
    """Trained tokens of a step over the steps of a run."""

    min: int
    mean: float
    max: int


@dataclass(frozen=True)
class StepSummary(Record):
    """A run's steps in numbers: "data" in the metrics of train's manifest.

    `fill` is the share of the packs' positions that hold tokens of documents; `padding` counts positions of all steps.
    "unlabelled_pieces" are segments without a trained token, which are left out.
    """

    NEXT: ClassVar[str] = "make train again"
    steps: int
    warmup_steps: int
    epochs: float
    packs: int
    packs_per_batch: int
    packs_dropped_per_epoch: int
    last_batch_packs: int
    order: str
    seq_len: int
    tokens: int
    padding: int
    padding_fraction: float
    fill: float
    trained_tokens: int
    trained_tokens_per_step: TokensPerStep
    documents: int
    documents_per_pack: float
    long_documents: int
    long_documents_policy: str
    unlabelled_pieces: int
    tokens_lost: int
    tokens_lost_fraction: float
    trained_tokens_lost: int
    trained_tokens_lost_fraction: float
    exact: bool
    digest: str


@dataclass(frozen=True)
class DataPosition(Record):
    """Where the data are after `step` steps. `plan` is the digest of the `StepPlan`."""

    NEXT: ClassVar[str] = "start a new run"
    step: int
    packs: int
    epoch: int
    pack_in_epoch: int
    plan: str
