"""Rows to token ids and label masks: `Encoder(tokenizer_dir, prepare, find).encode(rows, source)`.

In: rows of a source. Out: `Encoded`, flat arrays over documents. A batch goes through four steps, each a pass without a
Python loop over tokens:

    1. each row becomes a conversation and is rendered once into runs: untrained, trained, untrained, …   (sft.chat.rows, sft.chat.template)
    2. all texts are encoded in one call                                                             (sft.data.vocabulary)
    3. the ids are followed through the text: their bytes, put together, must be it, and a document ends where its text does.
       Which run a token lies in is the mask; one that straddles the edge of a run is not trained: part of it is scaffold
    4. special tokens are counted; a document with more than its template wrote holds special-token text in its content,
       and is encoded again so that this text stays text

`encode_plain` takes lines of JSON or columns of Arrow and does the first step without Python objects for the plain rows  (sft.data.fast.plain)

    text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello.<|endoftext|>
    runs    └──────────────── untrained ────────────────────────┘  └──── trained ────┘
    mask     0           0   0 0 0         0 0           0        0   1    1 1
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sft.chat.rows import BadRow, Conversation, RowReader
from sft.chat.special_tokens import SpecialTokens
from sft.chat.template import JinjaTemplate, known_templates, load_template
from sft.common.errors import SftError
from sft.data.batch import Batch, Reject, cut, foreign, name_conversation, spread
from sft.data.blocks import Block, Columns, Piece
from sft.data.compiled import TRAINED, WORD
from sft.data.dataset import trained_runs
from sft.data.fast.plain import PlainRows
from sft.data.vocabulary import Engine, Ids, Offsets, Vocabulary, Walk, check_rebuilt, read_text
from sft.formats.dataset import Template, TokenizerFacts, TokenizerFile
from sft.recipe.chat_templates import TEMPLATES
from sft.recipe.inputs import is_template_file
from sft.recipe.schema import Prepare, Source

PARITY_CHARACTERS = 1000
TOO_DEEP = ("bad_value", "nested too deeply")


@dataclass
class Encoded:
    """Documents, one after another. `tokens` are ids with the bit TRAINED. `rows[d]` is the input row of document d, `labels[d]` the trained tokens in its mask,
    `conversations[d]` the digest of what it says (`name_conversation`)."""

    tokens: Ids
    lengths: Offsets
    rows: Offsets
    labels: Offsets
    conversations: npt.NDArray[np.uint64]
    rejects: list[Reject]
    engine: str
    proof: dict[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> Ids:
        return self.tokens & ~TRAINED

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        return self.tokens >= TRAINED


def sums(counted: npt.NDArray[np.bool_], starts: Offsets) -> Offsets:
    """How many are true in each document."""
    return np.add.reduceat(counted, starts, dtype=np.int64) if len(starts) else starts


class Encoder:
    """One tokenizer, one template, one set of rules. Pickles as its arguments, so that worker processes can have it."""

    def __init__(
        self,
        tokenizer_dir: Path,
        prepare: Prepare,
        find: Callable[[str], Path] | None = None,
        template_text: str | None = None,
    ) -> None:
        self.folder, self.prepare = Path(tokenizer_dir), prepare
        self.vocabulary = Vocabulary(self.folder)
        self.specials = SpecialTokens(list(self.vocabulary.specials))
        self.engine = Engine(self.vocabulary, prepare.encoder if self.vocabulary.byte_level else "tokenizers")
        if not self.vocabulary.byte_level:
            self.engine.why = "the tokens of this tokenizer have no fixed bytes"
        name = prepare.template
        text = None if name in TEMPLATES else template_text or self._template_text(name, find)
        self.template_text = text
        self.template = load_template(name, text, self.vocabulary.variables, self.vocabulary.eos, self.specials)
        self.terminator_ids = sorted(
            {self.vocabulary.specials[text] for text in self.template.terminators if text in self.vocabulary.specials}
        )
        self.readers: dict[str, RowReader] = {}
        self.plain_rows: dict[str, PlainRows | None] = {}
        self.last_read: tuple[Source | None, Any] = (None, None)
        self.plain: Tokenizer | None = None
        # Every occurrence of a special token's text becomes that token, unless two of them can overlap.
        self.countable = not self.specials.can_overlap

    def __reduce__(self) -> Any:
        return Encoder, (self.folder, self.prepare, None, self.template_text)

    def _template_text(self, name: str, find: Callable[[str], Path] | None) -> str:
        if name == "tokenizer":
            text = self.vocabulary.chat_template()
            if text is None:
                raise SftError(
                    f"prepare.template: 'tokenizer', but {self.folder} has no chat template; next: name one of {', '.join(known_templates())}"
                )
            return text
        if not is_template_file(name) or find is None:
            raise SftError(
                f"prepare.template: {name!r} is neither 'tokenizer', nor a .jinja, .jinja2 or .j2 file, nor one of {', '.join(known_templates())};"
                " next: choose one of them"
            )
        return read_text(find(name), "prepare.template", "name a Jinja file in UTF-8")

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
            template=Template(template.name, hashlib.sha256(template.text.encode()).hexdigest()),
        )

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer folder that goes with the data. Follow with `check_saved` once per run: it takes seconds."""
        self.vocabulary.save(Path(folder), self.template.text)

    def check_saved(self, folder: Path) -> None:
        """Demands that transformers, loading the saved folder, gives the same ids and renders the same text."""
        check_rebuilt(Path(folder))
        from transformers import AutoTokenizer

        rebuilt = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        turns = (("user", "1 + 1?"), ("assistant", "2"), ("user", "Sure?\n"), ("assistant", " Yes."))
        messages = [{"role": role, "content": content} for role, content in turns]
        ours = "".join(self.template.render(Conversation(messages, [False, True, False, True], None, False))[0])
        theirs = str(rebuilt.apply_chat_template(messages, tokenize=False))
        if ours != theirs + (self.vocabulary.eos if self.template.eos_appended else ""):
            raise SftError(
                f"{folder}: transformers renders {theirs[-80:]!r} where the data was rendered as {ours[-80:]!r}; next: a template must not depend on the day"
                f" (strftime_now) or on the library; correct it"
            )

    def reader(self, source: Source) -> RowReader:
        key = repr(sorted(source.columns.items()))
        if key not in self.readers:
            self.readers[key] = RowReader(self.prepare, source, "<think>" in self.template.generation_prefix)
        return self.readers[key]

    def read(self, row: Any, source: Source) -> Conversation:
        """One row as a conversation. Raises BadRow."""
        if self.last_read[0] is not source:
            self.last_read = (source, self.reader(source))
        return self.last_read[1].read(row)

    def compile(self, kinds: Container[str] = ("jsonl",)) -> None:
        """Compiles what worker processes then find compiled, once on each kind of machine, for files of these kinds."""
        row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
        for source in self.prepare.sources if self.vocabulary.byte_level else ():
            if "jsonl" in kinds:
                self.encode_plain(Block.of(json.dumps(row).encode() + b"\n"), source)
            if "parquet" in kinds or "arrow" in kinds:
                self.encode_plain(Columns.of([row]), source)
            self.encode([], source)

    def encode(self, rows: Sequence[Any], source: Source) -> Encoded:
        batch = self._render(rows, self.reader(source).read)
        batch.lay_out()
        if not self.vocabulary.byte_level:
            return self._encode_by_offsets(batch)
        engine, checked, walk = self.engine.name, 0, None
        if self.engine.fast is not None:
            walk = self._encode_fast(batch, source)
            checked = -1 if walk is None else self._parity(batch.data, batch.ends, walk, batch.escaped)
        redone = checked < 0
        if walk is None or redone:
            engine, checked, walk = "tokenizers", 0, self._encode_slowly(batch, source)
        proven = set(batch.rows)  # rows whose ids were found to decode to their text
        if self.template.boundaries == "eos" and (bad := self._inner_eos(walk)):
            walk = self._drop(batch, bad, walk.ids, walk.offsets)
        encoded = self._finish(batch, walk, engine, checked, proven)
        encoded.proof["redone_batches"] = int(redone)
        return encoded

    def encode_plain(self, piece: Piece, source: Source) -> tuple[Encoded | None, list[int]]:
        """The documents of the plain rows of a piece, and the numbers of the others, which are for `encode`."""
        key = repr(sorted(source.columns.items()))
        if key not in self.plain_rows:
            usable = self.engine.fast is not None and (self.countable or self.prepare.special_text == "token")
            self.plain_rows[key] = PlainRows.of(self.template, self.reader(source)) if usable else None
        plain = self.plain_rows[key]
        if plain is None:
            return None, list(range(piece.count))
        text, odd = plain.read(piece)
        ends = text.edges[text.first[1:] - 1]
        walk = self.vocabulary.follow(self._fast_ids(text.data, ends), text.padded, text.first, text.edges)
        checked = -1 if walk is None else self._parity(text.data, ends, walk)
        if walk is None or checked < 0:
            return None, sorted([*odd, *text.rows.tolist()])
        good = (walk.labels > 0) & np.isin(walk.last, self.terminator_ids)
        if self.prepare.special_text != "token":
            good &= walk.specials == text.specials
        if self.template.boundaries == "eos":
            good &= walk.ended
        rows, conversations, lacking = text.rows, text.conversations, text.lacking
        if not good.all():
            odd = sorted([*odd, *rows[~good].tolist()])
            walk, rows, conversations, lacking = walk.only(good), rows[good], conversations[good], lacking[good]
        proof = self._proof(walk, len(rows), 0, checked, int(lacking.sum()))
        proof["redone_batches"] = 0
        made = Encoded(walk.tokens, walk.lengths, rows, walk.labels, conversations, [], self.engine.name, proof)
        return made, odd

    def _render(self, rows: Sequence[Any], read: Callable[[Any], Conversation]) -> Batch:
        batch = Batch(rows, conversations=[0] * len(rows))
        render = self.template.render
        # Named templates write the same scaffold whatever the content; Jinja text may look at it, so it must not see
        # special-token text that it would take for its own.
        careful = isinstance(self.template, JinjaTemplate) or not self.countable
        careful = careful and self.prepare.special_text != "token"
        before, system = self.template.answers_without_prefix, self.prepare.system
        runs_of, specials_of, rows_of, conversations = batch.runs, batch.specials, batch.rows, batch.conversations
        for index, row in enumerate(rows):
            try:
                conversation = read(row)
                conversations[index] = name_conversation(conversation.messages, system)
                if careful and self.specials.are_in(conversation):
                    runs, specials = self._render_escaped(batch, conversation, len(runs_of))
                else:
                    runs, specials = render(conversation)
            except BadRow as error:
                batch.reject(index, error.reason, error.detail)
                continue
            except RecursionError:
                batch.reject(index, *TOO_DEEP)
                continue
            runs_of.append(runs)
            specials_of.append(specials)
            rows_of.append(index)
        batch.unprompted = self.template.answers_without_prefix - before
        return batch

    def _render_escaped(self, batch: Batch, conversation: Conversation, document: int) -> tuple[list[str], int]:
        """Renders with special-token text replaced, remembers how to restore it, and returns the runs as they should read."""
        if self.prepare.special_text == "reject":
            raise BadRow("special_text", "special-token text in the content")
        if not self.vocabulary.byte_level:
            raise BadRow(
                "special_text", "special-token text in the content, which this kind of tokenizer cannot keep as text"
            )
        escaped, back = self.specials.escape(conversation)
        runs, specials = self.template.render(escaped)
        batch.escaped[document] = (runs, back)
        return list(map(back, runs)), specials

    def _fast_ids(self, data: bytes, ends: Offsets) -> Ids:
        # Where a special token ends every document, one text may follow another without changing its tokens.
        joined = self.template.boundaries == "eos"
        return self.engine.encode_joined(data) if joined else self.engine.encode(cut(data, ends))[0]

    def _encode_fast(self, batch: Batch, source: Source) -> Walk | None:
        """The tokens of all documents by the fast encoder; None when they do not decode to the documents' text."""
        walk = self._prove(batch, self._fast_ids(batch.data, batch.ends))
        return None if walk is None else self._keep_special_text(batch, source, walk)

    def _encode_slowly(self, batch: Batch, source: Source) -> Walk:
        """The tokens of all documents by `tokenizers`. Documents that these do not decode to are left out."""
        ids, offsets = self.engine.encode_slowly([data.decode() for data in batch.cut()])
        tokens = self._prove(batch, ids)
        if tokens is None or not np.array_equal(tokens.offsets, offsets):
            spans = zip(batch.cut(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            bad = [document for document, (data, a, b) in enumerate(spans) if self.vocabulary.decode(ids[a:b]) != data]
            wrong = ("proof", "the ids do not decode to the rendered text")
            tokens = self._drop(batch, dict.fromkeys(bad, wrong), ids, offsets)
        return self._keep_special_text(batch, source, tokens)

    def _prove(self, batch: Batch, ids: Ids) -> Walk | None:
        """The ids, when they spell the text of all documents and end where each of them ends."""
        text = np.frombuffer(
            bytearray(batch.data) + bytes(WORD), dtype=np.uint8
        )  # writable, as what plain rows are written to
        return self.vocabulary.follow(ids, text, batch.first, batch.edges)

    def _keep_special_text(self, batch: Batch, source: Source, tokens: Walk) -> Walk:
        """Encodes anew the documents whose content holds special-token text, so that it stays text."""
        if self.prepare.special_text == "token":
            return tokens
        bad = self._find_escaped(batch, source, tokens)
        if bad:
            tokens = self._drop(batch, bad, tokens.ids, tokens.offsets)
        return self._replace_escaped(batch, tokens) if batch.escaped else tokens

    def _find_escaped(self, batch: Batch, source: Source, tokens: Walk) -> dict[int, tuple[str, str]]:
        """Renders anew the documents with more special tokens than their template wrote; returns those that cannot be."""
        bad: dict[int, tuple[str, str]] = {}
        for document in np.flatnonzero(tokens.specials != np.array(batch.specials, dtype=np.int64)).tolist():
            if document in batch.escaped:
                continue
            try:
                self._render_escaped(batch, self.reader(source).read(batch.source_rows[batch.rows[document]]), document)
            except BadRow as error:
                bad[document] = (error.reason, error.detail)
            except RecursionError:
                bad[document] = TOO_DEEP
        return bad

    def _drop(self, batch: Batch, bad: Mapping[int, tuple[str, str]], ids: Ids, offsets: Offsets) -> Walk:
        """Takes documents out of the batch and out of its tokens, which must spell the others' text."""
        lengths = np.diff(offsets)
        keep = batch.drop(bad)
        batch.lay_out()
        tokens = self._prove(batch, ids[np.repeat(keep, lengths)])
        assert tokens is not None, "proven documents without their neighbours are proven"
        return tokens

    def _inner_eos(self, walk: Walk) -> dict[int, tuple[str, str]]:
        """The documents that do not end in the only EOS they have; with special_text = "token" a row can be such."""
        why = f"{self.vocabulary.eos} stands inside the conversation, where readers would end the document"
        return dict.fromkeys(np.flatnonzero(~walk.ended).tolist(), ("eos_inside", why))

    def _replace_escaped(self, batch: Batch, tokens: Walk) -> Walk:
        """Encodes the documents in `batch.escaped` segment by segment: between the template's special tokens, all is text."""
        if self.plain is None:
            self.plain = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self.plain.encode_special_tokens = True
        documents = sorted(batch.escaped)
        segments: list[list[str]] = []
        for document in documents:
            runs, back = batch.escaped[document]
            parts = self.specials.split.split("".join(runs))
            segments.append([part if index % 2 else back(part) for index, part in enumerate(parts)])
        plain = self.plain.encode_batch_fast(
            [part for parts in segments for part in parts[::2]], add_special_tokens=False
        )
        encoded = iter(plain)
        pieces: list[Ids] = []
        lengths = np.diff(tokens.offsets)
        at = 0
        for document, parts in zip(documents, segments, strict=True):
            numbers: list[int] = []
            for index, part in enumerate(parts):
                numbers.extend([self.vocabulary.specials[part]] if index % 2 else next(encoded).ids)
            pieces += (tokens.ids[at : tokens.offsets[document]], np.array(numbers, dtype=np.uint32))
            at, lengths[document] = int(tokens.offsets[document + 1]), len(numbers)
        ids = np.concatenate([*pieces, tokens.ids[at:]])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        proven = self._prove(batch, ids)
        if proven is not None:
            return proven
        bad = [d for d in documents if self.vocabulary.decode(ids[offsets[d] : offsets[d + 1]]) != batch.cut()[d]]
        wrong = ("proof", "the ids do not decode to the rendered text")
        return self._drop(batch, dict.fromkeys(bad, wrong), ids, offsets)

    def _parity(self, data: bytes, ends: Offsets, walk: Walk, without: Container[int] = ()) -> int:
        """How many documents `tokenizers` was asked about too; -1 when it gave other ids for one of them."""
        documents, share = len(ends), self.prepare.parity_sample
        if share <= 0 or not documents:
            return 0
        wanted = max(1, round(share * documents))
        # Other scripts are where encoders differ: half of the sample comes from the documents that have them.
        others = spread(foreign(data, ends), (wanted + 1) // 2)
        chosen = {*others, *spread(range(documents), wanted - len(others) if wanted < documents else wanted)}
        chosen = {document for document in chosen if document not in without}
        texts = {d: data[ends[d - 1] if d else 0 : ends[d]].decode() for d in chosen}
        # A special token cuts the text, so what stands before one can be compared alone: long documents stay cheap.
        cuts = {document: self.specials.pattern.search(text, PARITY_CHARACTERS) for document, text in texts.items()}
        parts = [text if (cut := cuts[d]) is None else text[: cut.start()] for d, text in texts.items()]
        right = self.vocabulary.tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        for (document, cut), expected in zip(cuts.items(), right, strict=True):
            start, end = walk.offsets[document : document + 2].tolist()
            if walk.ids[start : end if cut is None else start + len(expected.ids)].tolist() != expected.ids:
                return -1
        return len(chosen)

    def _encode_by_offsets(self, batch: Batch) -> Encoded:
        """For tokenizers whose tokens have no fixed bytes: the whole text, and the offsets that `tokenizers` reports."""
        texts = ["".join(runs) for runs in batch.runs]
        encodings = [self.vocabulary.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        bad: dict[int, tuple[str, str]] = {}
        proven: set[int] = set()
        for document, (encoding, text) in enumerate(zip(encodings, texts, strict=True)):
            special = int(self.vocabulary.is_special[encoding.ids].sum())
            if self.prepare.special_text != "token" and special != batch.specials[document]:
                bad[document] = (
                    "special_text",
                    "special-token text in the content, which this kind of tokenizer cannot keep as text",
                )
            if self.vocabulary.unk_id in encoding.ids:
                bad.setdefault(document, ("unknown_token", "text that the tokenizer has no token for would be lost"))
            spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            covered = np.zeros(len(text) + 1, dtype=np.int64)
            np.add.at(covered, spans[:, 0], 1)
            np.add.at(covered, spans[:, 1], -1)
            if not all(text[gap].isspace() for gap in np.flatnonzero(np.cumsum(covered)[:-1] <= 0).tolist()):
                bad.setdefault(document, ("proof", "the tokens do not cover the rendered text"))
            else:
                proven.add(batch.rows[document])
        encodings = [encoding for encoding, kept in zip(encodings, batch.drop(bad), strict=True) if kept]
        ids = np.array(list(chain.from_iterable(encoding.ids for encoding in encodings)), dtype=np.uint32)
        offsets = np.cumsum([0, *(len(encoding.ids) for encoding in encodings)])
        masks = [np.zeros(0, dtype=bool)]
        straddled = []
        for encoding, runs in zip(encodings, batch.runs, strict=True):
            spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            edges = np.cumsum([0, *map(len, runs)])
            start_run = np.searchsorted(edges, spans[:, 0], side="right") - 1
            end_run = np.searchsorted(edges, spans[:, 1], side="left") - 1
            masks.append((start_run == end_run) & (start_run % 2 == 1))
            masks[-1][:1] = False  # the first token would be predicted from the document before it in a pack
            straddled.append(int((start_run < end_run).sum()))
        mask, starts = np.concatenate(masks), offsets[:-1]
        _, stops = trained_runs(mask)
        last = np.concatenate([[0], stops])[np.searchsorted(stops, offsets[1:], side="right")] - 1
        is_eos = ids == self.vocabulary.eos_id
        eoses = sums(is_eos, starts) | np.where(is_eos[offsets[1:] - 1], TRAINED, 0)
        walk = Walk(
            ids, np.where(mask, ids | TRAINED, ids), offsets, sums(mask, starts), np.array(batch.specials),
            np.array(straddled, dtype=np.int64), ids[last], eoses.astype(np.uint32),
        )  # fmt: skip
        if self.template.boundaries == "eos" and (inner := self._inner_eos(walk)):
            walk = walk.only(batch.drop(inner))
        return self._finish(batch, walk, "tokenizers", 0, proven)

    def _finish(self, batch: Batch, walk: Walk, engine: str, checked: int, proven: set[int]) -> Encoded:
        """Leaves out documents with nothing to train, or whose training would not end in a terminator: a reject for each."""
        escaped = len(batch.escaped)
        empty = ("nothing_to_train", "no token of the conversation is trained")
        endless = ("no_terminator", "the last trained token is no terminator, so the model would not learn to stop")
        bad = dict.fromkeys(np.flatnonzero(~np.isin(walk.last, self.terminator_ids)).tolist(), endless)
        bad |= dict.fromkeys(np.flatnonzero(walk.labels <= 0).tolist(), empty)
        if bad:
            walk = walk.only(batch.drop(bad))
        proof = self._proof(walk, len(set(batch.rows) & proven), escaped, checked, batch.unprompted)
        rows = np.array(batch.rows, dtype=np.int64)
        conversations = np.array(batch.conversations, dtype=np.uint64)[rows]
        rejects = sorted(batch.rejects, key=lambda item: item.row)
        return Encoded(walk.tokens, walk.lengths, rows, walk.labels, conversations, rejects, engine, proof)

    def _proof(self, walk: Walk, proven: int, escaped: int, checked: int, unprompted: int) -> dict[str, int]:
        proof = {
            "documents": len(walk.labels),
            "documents_proven": proven,
            "tokens": len(walk.ids),
            "labels": int(walk.labels.sum()),
            "escaped_documents": escaped,
            "straddling_tokens": int(walk.straddled.sum()),
            "parity_documents": checked,
        }
        if self.template.generation_prefix:
            proof["answers_without_prompt"] = unprompted
        return proof
