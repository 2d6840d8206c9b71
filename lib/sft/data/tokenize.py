"""Rows to token ids and loss masks: `Encoder(tokenizer_dir, prepare, find).encode(rows, source)`.

In: rows of a source. Out: `Encoded`, flat arrays over documents. A batch takes four steps, none with a Python loop over tokens:

    1. Each row becomes a conversation, which is rendered once into runs: untrained, trained, …    sft.chat, sft.data.render
    2. All texts are encoded in one call.                                                          sft.data.engine
    3. The ids are followed through the text: their bytes must spell it. The run of a token
       decides whether it is a target.                                                             sft.data.align
    4. Documents with special-token text in their content are encoded again, so that it stays
       text.                                                                                       sft.data.byte_encoder

Tokenizers whose tokens have no fixed bytes take `sft.data.offset_encoder` instead of steps 2 to 4. `encode_plain` takes lines of JSON or
columns of Arrow; for plain rows it does step 1 without Python objects (sft.data.fast).

    text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello.<|endoftext|>
    runs    └──────────────── untrained ────────────────────────┘  └──── trained ────┘
    mask     0           0   0 0 0         0 0           0        0   1    1 1
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sft.chat.fields import FieldCounts
from sft.chat.rows import Conversation, RowReader
from sft.chat.spans import common_prefix
from sft.chat.template import TemplateOptions, known_templates, load_template
from sft.common.errors import SftError
from sft.data.align import Alignment, Ids, Offsets
from sft.data.batch import Fault, RenderedBatch, changed_documents
from sft.data.byte_encoder import ByteLevelEncoder
from sft.data.compiled import TRAINED
from sft.data.engine import Engine
from sft.data.fast.plain import PlainRows
from sft.data.offset_encoder import OffsetEncoder
from sft.data.ranges import keep_ranges
from sft.data.render import Renderer
from sft.data.vocabulary import Vocabulary, check_rebuilt, read_text
from sft.formats.dataset import TemplateFacts, TokenizerFacts, TokenizerFile
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.inputs import check_template_text, is_template_file, own_template
from sft.recipe.schema import Prepare, Source
from sft.sources.blocks import Block, ColumnBlock, LineBlock, Reject

NO_TARGETS = Fault("nothing_to_train", "no token of the conversation is trained")
NO_TERMINATOR = Fault("no_terminator", "the last trained token is no terminator, so the model would not learn to stop")


@dataclass
class Encoded:
    """Documents, one after another."""

    tokens: Ids
    """[tokens] The ids, each with the bit TRAINED when it is a target."""
    lengths: Offsets
    """[documents] Tokens."""
    rows: Offsets
    """[documents] The input row of each document."""
    num_targets: Offsets
    """[documents] Trained tokens."""
    conversations: npt.NDArray[np.uint64]
    """[documents] The hash of each conversation, see `conversation_hashes`."""
    groups: npt.NDArray[np.uint64]
    """[documents] The hash of its group."""
    rejects: list[Reject]
    engine: str
    proof: dict[str, int] = field(default_factory=dict)
    """Counts of what was proven; they are summed over all batches."""

    @property
    def ids(self) -> Ids:
        return self.tokens & ~TRAINED

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """[tokens] Whether each token is a target."""
        return self.tokens >= TRAINED


class Encoder:
    """One tokenizer, one template, one set of rules. It pickles as its arguments, so that worker processes can receive it."""

    def __init__(
        self,
        tokenizer_dir: Path,
        prepare: Prepare,
        find: Callable[[str], Path] | None = None,
        template_text: str | None = None,
        compiles: bool = True,
    ) -> None:
        """`compiles` = False: rows are few, and Python encodes them sooner than their code compiles."""
        self.compiles = compiles
        self.folder, self.prepare = Path(tokenizer_dir), prepare
        self.vocabulary = vocabulary = Vocabulary(self.folder)
        self.engine = Engine(vocabulary, prepare.encoder if vocabulary.byte_level else "tokenizers")
        if not vocabulary.byte_level:
            self.engine.fallback_reason = "the tokens of this tokenizer have no fixed bytes"
        name = prepare.template
        self.template_text = None if name in TEMPLATES else template_text or self._template_text(name, find)
        self.template = load_template(
            name,
            self.template_text,
            vocabulary.template_variables,
            vocabulary.eos,
            list(vocabulary.specials),
            [text for text in vocabulary.added if text not in vocabulary.specials],
            TemplateOptions(prepare.date, prepare.template_variables, prepare.generation_prefix, prepare.history),
        )
        self.specials = self.template.specials
        vocabulary.treat_as_special(self.specials.texts)
        self.terminator_ids = sorted(
            {vocabulary.specials[text] for text in self.template.terminators if text in vocabulary.specials}
        )
        self.renderer = Renderer(prepare, self.template, self.specials, vocabulary.byte_level, vocabulary.normalizer)
        self.byte_level_encoder = ByteLevelEncoder(
            prepare, vocabulary, self.engine, self.renderer, joined=self.template.boundaries == "eos"
        )
        self.offset_encoder = OffsetEncoder(prepare, vocabulary)
        self.readers: dict[str, RowReader] = {}
        self.plain_rows: dict[str, PlainRows | None] = {}

    def __reduce__(self) -> Any:
        return Encoder, (self.folder, self.prepare, None, self.template_text, self.compiles)

    def _template_text(self, name: str, find: Callable[[str], Path] | None) -> str:
        if own := own_template(name):
            texts = self.vocabulary.chat_templates()
            if own not in texts:
                found = f"; it has {', '.join(f'tokenizer:{other}' for other in texts)}" if texts else ""
                raise SftError(
                    f"prepare.template: {name!r}, but {self.folder} has no {'chat template' if own == 'default' else own}{found};"
                    f" next: name one of {', '.join([*(f'tokenizer:{other}' for other in texts), *known_templates()])}"
                )
            return check_template_text(texts[own], f"{self.folder}: its template {own!r}")
        if not is_template_file(name) or find is None:
            raise SftError(
                f"prepare.template: {name!r} is neither 'tokenizer', nor a .jinja, .jinja2 or .j2 file, nor one of"
                f" {', '.join(known_templates())}; next: choose one of them"
            )
        file = find(name)
        return check_template_text(read_text(file, "prepare.template", "name a Jinja file in UTF-8"), str(file))

    @property
    def identity(self) -> TokenizerFacts:
        """The facts of the tokenizer and the template that dataset.json records."""
        vocabulary, template = self.vocabulary, self.template
        canaries = {text: tuple(ids) for text, ids in vocabulary.canaries().items()}
        return TokenizerFacts(
            vocab_size=vocabulary.size,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            terminator_ids=tuple(self.terminator_ids),
            boundaries="eos" if template.boundaries == "eos" else "index",
            eos_appended=template.eos_appended,
            tokenizer=TokenizerFile(vocabulary.sha256, canaries),
            template=TemplateFacts(template.name, hashlib.sha256(template.text.encode()).hexdigest()),
        )

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer folder that goes with the data. Call `check_saved` once per run afterwards: it takes seconds."""
        self.vocabulary.save(Path(folder), self.template.text)

    def check_saved(self, folder: Path) -> None:
        """Demands that transformers gives the same ids and renders the same text from the saved folder. Raises SftError."""
        from transformers import AutoTokenizer  # start-up: transformers takes a second

        rebuilt = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        turns = (("user", "1 + 1?"), ("assistant", "2"), ("user", "Sure?\n"), ("assistant", " Yes."))
        messages = [{"role": role, "content": content} for role, content in turns]
        if self.template.needs_tools:
            check_rebuilt(Path(folder))
            return
        ours = self.template.verbatim(Conversation(messages, [False, True, False, True], None, False))
        check_rebuilt(Path(folder), [ours])
        theirs = str(rebuilt.apply_chat_template(messages, tokenize=False))
        if ours != theirs:
            raise SftError(
                f"{folder}: transformers renders {different(theirs, ours)!r} where the data was rendered as {different(ours, theirs)!r}; next: a template"
                " must not depend on the library; correct it"
            )

    def reader(self, source: Source) -> RowReader:
        key = _columns_key(source)
        if key not in self.readers:
            opens_thinking = "<think>" in self.template.generation_prefix
            template = self.template
            self.readers[key] = RowReader(
                self.prepare,
                source,
                opens_thinking,
                template.renamed_roles(),
                template.field_of_thoughts(),
                template.written_names(),
            )
        return self.readers[key]

    def take_counts(self, source: Source) -> FieldCounts:
        """The counts of the source's fields since the last call."""
        counter = self.reader(source).counter
        counts, counter.counts = counter.counts, FieldCounts()
        return counts

    def compile(self, kinds: Container[str] = ("jsonl",)) -> None:
        """Compiles the code for files of these kinds, once on each kind of machine. Worker processes then load what was compiled."""
        row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
        for source in self.prepare.sources if self.compiles and self.vocabulary.byte_level else ():
            if "jsonl" in kinds:
                self.encode_plain(LineBlock.of(json.dumps(row).encode() + b"\n"), source)
            if "parquet" in kinds or "arrow" in kinds:
                self.encode_plain(ColumnBlock.of([row]), source)
            self.encode([], source)

    def encode(self, rows: Sequence[Any], source: Source) -> Encoded:
        """The documents of rows, and a reject for each row that makes none."""
        reader = self.reader(source)
        read = reader.read
        batch = self.renderer.render(rows, reader.read_counted)
        batch.lay_out()
        encoder = self.byte_level_encoder if self.vocabulary.byte_level else self.offset_encoder
        encoded = encoder.encode(batch, read)
        alignment = self._drop_inner_eos(batch, encoded.alignment)
        alignment = keep_ranges(batch, alignment, self.vocabulary.table.lengths) if batch.ranges else alignment
        num_escaped = len(batch.escaped)
        alignment = self._drop_untrainable(batch, alignment)
        proven = sum(map(encoded.proven.__contains__, batch.rows))
        proof = self._proof(alignment, proven, num_escaped, encoded.parity_documents, batch.answers_without_prefix)
        proof["merged_answers"] = encoded.merged_answers
        if self.prepare.history == "as-rendered":
            proof["turns_tokens_added"] = tokens_added(alignment.lengths, batch.rows)
        proof["normalized_documents"] = batch.num_normalized
        proof["empty_answers"] = sum(batch.empty_answers)
        if encoded.redone is not None:
            proof["redone_batches"] = int(encoded.redone)
        for row in sorted(set(batch.rows)):
            if (held := batch.held[row]) is not None:
                reader.counter.counts.add(held)
        documents = np.array(batch.rows, dtype=np.int64)
        return Encoded(
            alignment.tokens,
            alignment.lengths,
            documents,
            alignment.num_targets,
            np.array(batch.hashes, dtype=np.uint64)[documents],
            np.array(batch.groups, dtype=np.uint64)[documents],
            sorted(batch.rejects, key=lambda reject: reject.row),
            encoded.engine,
            proof,
        )

    def _drop_inner_eos(self, batch: RenderedBatch, alignment: Alignment) -> Alignment:
        """Without the documents that do not end in their only EOS; with special_text = "token" a row can make such a document."""
        bad = np.flatnonzero(~alignment.ends_in_only_eos).tolist() if self.template.boundaries == "eos" else []
        fault = Fault(
            "eos_inside", f"{self.vocabulary.eos} is inside the conversation, where readers would end the document"
        )
        return alignment.only(batch.drop(dict.fromkeys(bad, fault))) if bad else alignment

    def _drop_untrainable(self, batch: RenderedBatch, alignment: Alignment) -> Alignment:
        """Drops documents that have no targets, and documents whose last target is not a terminator."""
        terminated = np.isin(alignment.last_target, self.terminator_ids)
        bad = dict.fromkeys(np.flatnonzero(~terminated).tolist(), NO_TERMINATOR)
        bad |= dict.fromkeys(np.flatnonzero(alignment.num_targets <= 0).tolist(), NO_TARGETS)
        return alignment.only(batch.drop(bad)) if bad else alignment

    def encode_plain(self, block: Block, source: Source) -> tuple[Encoded | None, list[int]]:
        """The documents of the plain rows of a block, and the numbers of the other rows, which are for `encode`."""
        plain = self._plain_rows(source) if self.prepare.history == "whole" else None
        if plain is None:
            return None, list(range(block.count))
        text, odd = plain.read(block)
        encoder = self.byte_level_encoder
        if changed := changed_documents(self.vocabulary.normalizer, text.data, text.ends):
            odd = sorted([*odd, *text.rows[changed].tolist()])
            text = text.without(changed)
        ends = text.ends
        alignment = encoder.align(encoder.encode_text(text.data, ends), text.padded, text.first_run, text.run_ends)
        checked, num_merged = None, np.zeros(0, dtype=np.int64)
        if alignment is not None:
            num_merged, merged = alignment.num_merged, np.flatnonzero(alignment.num_merged).tolist()
            checked = encoder.parity(text.data, ends, alignment, set(merged))
            if merged and checked is not None:
                ids = encoder.separate(text.data, text.first_run, text.run_ends, alignment, merged)
                alignment = None if ids is None else encoder.align(ids, text.padded, text.first_run, text.run_ends)
        if alignment is None or checked is None:
            return None, sorted([*odd, *text.rows.tolist()])
        good = (alignment.num_targets > 0) & np.isin(alignment.last_target, self.terminator_ids)
        if self.prepare.special_text != "token":
            good &= alignment.num_specials == text.num_specials
        if self.template.boundaries == "eos":
            good &= alignment.ends_in_only_eos
        rows, hashes, groups = text.rows, text.hashes, text.groups
        answers, empty = text.answers_without_prefix, text.empty_answers
        if not good.all():
            odd = sorted([*odd, *rows[~good].tolist()])
            alignment, rows, hashes, groups = alignment.only(good), rows[good], hashes[good], groups[good]
            answers, empty = answers[good], empty[good]
        plain.count(rows)
        proof = self._proof(alignment, len(rows), 0, checked, int(answers.sum()))
        proof |= {"redone_batches": 0, "empty_answers": int(empty.sum()), "merged_answers": int(num_merged[good].sum())}
        encoded = Encoded(
            alignment.tokens,
            alignment.lengths,
            rows,
            alignment.num_targets,
            hashes,
            groups,
            [],
            self.engine.name,
            proof,
        )
        return encoded, odd

    def _plain_rows(self, source: Source) -> PlainRows | None:
        key = _columns_key(source)
        if key not in self.plain_rows:
            can_count = self.renderer.countable or self.prepare.special_text == "token"
            usable = self.compiles and self.engine.fast is not None and can_count
            self.plain_rows[key] = PlainRows.of(self.template, self.reader(source)) if usable else None
        return self.plain_rows[key]

    def _proof(
        self, alignment: Alignment, proven: int, escaped: int, checked: int, answers_without_prefix: int
    ) -> dict[str, int]:
        proof = {
            "documents": len(alignment.num_targets),
            "documents_proven": proven,
            "tokens": len(alignment.ids),
            "labels": int(alignment.num_targets.sum()),
            "escaped_documents": escaped,
            "straddling_tokens": int(alignment.num_straddling.sum()),
            "merged_answers": 0,
            "parity_documents": checked,
        }
        if self.template.generation_prefix:
            proof["answers_without_prompt"] = answers_without_prefix
        return proof


def tokens_added(lengths: Offsets, rows: Sequence[int]) -> int:
    """The tokens of all documents of a row beyond those of its longest, summed over the rows: what a document for each turn costs."""
    longest: dict[int, int] = {}
    for row, length in zip(rows, lengths.tolist(), strict=True):
        longest[row] = max(length, longest.get(row, 0))
    return int(lengths.sum()) - sum(longest.values())


def different(text: str, other: str) -> str:
    """The part of a text that begins shortly before it differs from the other."""
    start = len(common_prefix([text, other]))
    return text[max(0, start - 20) : start + 60]


def _columns_key(source: Source) -> str:
    """Sources with the same columns share a reader."""
    return repr((sorted(source.columns.items()), source.ignore, source.validation_group))
