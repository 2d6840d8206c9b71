"""dataset.json: what prepare made, from which files, and with which tokenizer and template. Standard library only.

    {"format": 2, "dtype": "uint32",
     "vocab_size": 100278, "eos_id": 100257, "pad_id": 100277, "terminator_ids": [100265, 100257],
     "boundaries": "eos", "eos_appended": true,
     "tokenizer": {"sha256": "…", "canaries": {"text": [ids]}}, "template": {"name": "olmo", "sha256": "…"},
     "sources": [{"path", "weight", "found", …, "files": [{"name", "sha256"}]}],
     "splits": {"data": {"documents", "tokens", "labels"}, "validation": …},
     "lengths": {"mean", "p50", "p90", "p99", "max", "up_to"}, "decontamination": {…}, "near_duplicates": {…}}

The keys from `vocab_size` to `template` are the fields of `TokenizerFacts`, which training, export and the gate use.
`PrepareMetrics` are the metrics in prepare's manifest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from sft.formats.record import Record, build, to_json

NAME = "dataset.json"


class TokenIds(NamedTuple):
    """The numbers that an OLMo-core config names a tokenizer by. None where they are not known."""

    vocab_size: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


@dataclass(frozen=True)
class TokenizerFile:
    """tokenizer.json: its hash (hex), and the ids of texts on which encoders are known to differ."""

    sha256: str
    canaries: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TemplateFacts:
    """The chat template: its name in the recipe, and the hash (hex) of its text."""

    name: str
    sha256: str


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer and the template of a dataset.

    `vocab_size` is the number of ids. `terminator_ids` are the tokens that end an assistant turn in the template.
    `boundaries` is "eos" when EOS ends every document and occurs nowhere else, and "index" when only documents.npy says
    where documents end. `eos_appended`: prepare writes EOS after the text of the template.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    terminator_ids: tuple[int, ...]
    boundaries: Literal["eos", "index"]
    eos_appended: bool
    tokenizer: TokenizerFile
    template: TemplateFacts

    @property
    def ids(self) -> TokenIds:
        return TokenIds(self.vocab_size, self.eos_id, self.pad_id)

    @property
    def olmo_core_obstacle(self) -> str:
        """The reason why OLMo-core would read other documents than were written; '' if it reads the same."""
        if self.boundaries == "eos":
            return ""
        return (
            f"template {self.template.name!r} writes EOS (id {self.eos_id}) inside conversations, and OLMo-core "
            "ends a document at every EOS: it would split each conversation"
        )


@dataclass(frozen=True)
class SourceFile:
    """An input file. Remote files also have the commit (hub), or checksum and generation (bucket), that was read."""

    name: str
    sha256: str
    commit: str | None = None
    crc32c: str | None = None
    generation: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceMix:
    """What the mix took from one source. All but `weight` count documents.

    `found` is the sum of `duplicates`, `contaminated`, `near_duplicates`, `held_out` and `available`. `validation` are in the
    validation split, `validation_copies` are not, because they repeat one that is; `taken` are in the training split, each copy counted.
    """

    path: str
    weight: int | float
    found: int
    duplicates: int
    contaminated: int
    near_duplicates: int = 0
    """0 in format 1, as `held_out`."""
    held_out: int = 0
    validation: int
    validation_copies: int = 0
    available: int
    taken: int


@dataclass(frozen=True, kw_only=True)
class SourceSummary(SourceMix):
    """One source of a dataset. `rows` and `rejected` count input rows; the others make `found` documents, one each unless `history` is
    "as-rendered". `documents` and `tokens` count what was taken, and `labels` its trained tokens. `files` were read; the others of the dataset are named too."""

    rows: int
    rejected: int
    documents: int
    tokens: int
    labels: int
    files: tuple[SourceFile, ...]
    files_of_other_splits: tuple[str, ...] = ()
    files_ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitSize:
    """The size of a split. `labels` counts trained tokens."""

    documents: int
    tokens: int
    labels: int


@dataclass(frozen=True)
class LengthHistogram:
    """Lengths of training documents in tokens. `up_to` has (limit, documents, tokens) for each power of two."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    up_to: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class NotCovered:
    """Evaluation texts that decontamination does not look for."""

    too_short: int
    shared_by_many_rows: int


@dataclass(frozen=True)
class Decontamination:
    """The evaluation files, how copies of their texts were found, and how many documents were dropped."""

    files: tuple[str, ...]
    ngram: int
    overlap: float
    texts: int
    not_covered: NotCovered
    dropped: int


@dataclass(frozen=True)
class NearPair:
    """`documents` of the source `later` nearly repeat one of `earlier`. Both are the sources' paths."""

    earlier: str
    later: str
    documents: int


@dataclass(frozen=True)
class NearDuplicates:
    """Conversations that nearly repeat an earlier one, exact copies included, by pairs of sources."""

    similarity: float
    dropped: bool
    pairs: tuple[NearPair, ...]


@dataclass(frozen=True)
class DatasetInfo(Record):
    """dataset.json. `dtype` is the NumPy name of the token files' integers."""

    VERSION: ClassVar[int] = 2
    OLDEST: ClassVar[int] = 1
    NEXT: ClassVar[str] = "make prepare again"
    dtype: str
    facts: TokenizerFacts
    sources: tuple[SourceSummary, ...]
    splits: dict[str, SplitSize]
    lengths: LengthHistogram
    decontamination: Decontamination | None = None
    near_duplicates: NearDuplicates | None = None

    @classmethod
    def of(cls, folder: Path) -> DatasetInfo:
        """dataset.json of prepare's folder or of a synced dataset. Raises FileNotFoundError or SftError."""
        return cls.read(folder / NAME)

    @classmethod
    def parse(cls, value: Any) -> Self:
        cls.check_version(value)
        names = {field.name for field in dataclasses.fields(TokenizerFacts)}
        facts = build(TokenizerFacts, {k: v for k, v in value.items() if k in names}, "")
        rest = {k: v for k, v in value.items() if k not in names}
        return super().parse({**rest, "facts": to_json(facts)})

    def to_value(self) -> dict[str, Any]:
        value = to_json(self)
        head = {"format": self.VERSION, "dtype": value.pop("dtype"), **value.pop("facts")}
        return {**head, **value}


@dataclass(frozen=True, kw_only=True)
class PrepareMetrics(Record):
    """The metrics in prepare's manifest.

    `documents`, `tokens` and `labels` (trained tokens) are of the training split, `rejected` counts input rows.
    `encoded_tokens` were encoded by this attempt; the others came from the cache. `encoded_by` counts documents by
    encoder. `tokenizer_commit` is the commit of a tokenizer from the hub. `seconds` and `cpu_seconds` are by step.
    """

    NEXT: ClassVar[str] = "make prepare again"
    documents: int
    tokens: int
    labels: int
    rejected: int
    encoded_tokens: int
    tokenizer: TokenizerFile
    encoded_by: dict[str, int]
    chunks_redone: int
    tokenizer_commit: str | None = None
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]

    def to_metrics(self) -> dict[str, Any]:
        """The metrics as JSON values, for the manifest."""
        return dict(to_json(self))
