"""The steps of the prepare stage: encode chunks into the token cache, screen them, index them, and write splits.

In:  the stage and its [prepare] table. Out: a `Preparation`, whose methods sft.data.prepare calls in order.

The token cache has a folder for each combination of tokenizer, template and options that decide the tokens. Its files are
named by the content of their chunk, so other weights, seeds and splits reuse them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft.chat.added_tokens import add_tokens
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.locks import lock
from sft.common.machine import cores
from sft.data import accounting, workers
from sft.data import near_duplicates as near
from sft.data.chunks import ChunkJob, EncodeChunk, Progress, ScreenChunk
from sft.data.decontaminate import SHORTEST, Screen
from sft.data.materialise import materialise
from sft.data.mix import Pool, Selection, held_out
from sft.data.placement import CachedSource, Placement
from sft.data.row_names import RejectTally, RowNames
from sft.data.shard import Shard, digest
from sft.data.token_check import TokenCheck
from sft.data.tokencache import TEMPORARY, Summary, is_intact, read_index, read_summary, trim, use
from sft.data.tokenize import Encoder
from sft.formats.chunks import ScreenHits
from sft.formats.dataset import NearDuplicates, NearPair, SplitSize
from sft.formats.proof import WrittenSplit
from sft.formats.record import to_json
from sft.formats.rejects import RejectedRow
from sft.recipe import inputs
from sft.recipe.schema import Prepare, Source
from sft.runner.stage import Stage
from sft.sources import blocks, input_files
from sft.sources.small_files import cut_into_jobs
from sft.storage import hub

ENCODING_VERSION = 16
"""Raise it when a change of code gives other tokens or loss masks for the same input. Caches are then made again."""
SKETCH_VERSION = 2
"""Raise it when a change of code gives other sketches for the same input."""
SCREENING_VERSION = 2
"""Raise it when a change of code finds other copies of evaluation texts in the same input."""
BYTES_PER_WORKER = 2 << 20  # starting a worker costs about as much as encoding this many bytes
COMPILING_S = 2.0  # loading compiled code takes less
COMPILED_BYTES = 8_000_000
"""Of rows: fewer are encoded by Python, which takes seconds; compiling the code for rows takes a minute on a new machine."""
REJECT_EXAMPLES = 5
NEAR_EXAMPLES = 1000
"""Near-duplicates that are listed, for each pair of sources."""
GIVE_UP_ROWS = 1000


class Repeat(NamedTuple):
    """A document that repeats an evaluation text: its file and row (from 1), and the number of the text."""

    file: str
    row: int
    text: int


@dataclass(frozen=True)
class SourceIndex:
    """The encoded documents of one source: their places in the token cache, and the rows that were read and rejected."""

    cached: CachedSource
    """The files are those of Preparation.jobs_of[source]."""
    repeats: list[Repeat]
    rows_read: int
    rejects: RejectTally


class Preparation:
    """One run of the stage. The constructor resolves the sources; each method is one step."""

    def __init__(self, stage: Stage, shard: Shard):
        self.stage, self.shard = stage, shard
        self.table = stage.recipe.prepare
        self.log = stage.log
        source = resolve_tokenizer(self.table, stage)
        self.tokenizer_commit = source.name if inputs.is_remote(self.table.tokenizer) else None
        self.tokenizer = with_added_tokens(source, self.table, stage)
        self.encoder = Encoder(self.tokenizer, self.table, stage.find)
        self.encoded_tokens = 0
        self.seconds = {"resolve": 0.0, "start": 0.0, "encode": 0.0, "mix": 0.0, "write": 0.0, "check": 0.0}
        self.cpu_seconds = dict.fromkeys(self.seconds, 0.0)
        with self.timed("resolve"):
            self.inputs = [
                input_files.resolve(s, stage.find, stage.cache, stage.sha256, self.log) for s in self.table.sources
            ]
        input_files.warn_of_shared(self.table.sources, self.inputs, self.log)
        self.encode_key = digest(self._encoding())
        self.cache = stage.cache / "tokens" / self.encode_key
        self.cache.mkdir(parents=True, exist_ok=True)
        self.jobs_of = [self._jobs(i, found.files) for i, found in enumerate(self.inputs)]
        unique = {job.name: job for jobs in reversed(self.jobs_of) for job in jobs}
        self.jobs = [
            dataclasses.replace(job, number=n) for n, job in enumerate(unique[name] for name in sorted(unique))
        ]
        self.summaries: dict[str, Summary] = {}
        self.canaries_agreed = 0
        self.checks: dict[str, WrittenSplit] = {}
        self.hashes: dict[str, str] = {}  # sha256 of the files of the splits

    def _encoding(self) -> dict[str, Any]:
        """Everything but the rows that decides tokens and loss masks; the identity of the encoder includes the tokenizer."""
        table = _token_options(self.table)
        del table["tokenizer"]
        return {"encoding": ENCODING_VERSION, "identity": to_json(self.encoder.identity), "options": table}

    def _jobs(self, number: int, files: Sequence[input_files.InputFile]) -> list[ChunkJob]:
        source = self.table.sources[number]
        options = _token_options(source)
        return [
            ChunkJob(0, number, chunks, f"{digest([_content(chunks), options])}-{chunks[0].index:06d}.tok")
            for chunks in cut_into_jobs(files)
        ]

    @property
    def mine(self) -> list[ChunkJob]:
        """The jobs of this process: all of them, or every n-th with SHARD=i/n."""
        return self.jobs if self.shard.part is None else self.jobs[self.shard.part :: self.shard.parts]

    def workers(self, jobs: Sequence[ChunkJob]) -> int:
        """The number of worker processes for these jobs."""
        work = sum(job.bytes for job in jobs)
        return max(1, min(self.threads, len(jobs), work // BYTES_PER_WORKER))

    @property
    def threads(self) -> int:
        return self.stage.hardware.threads or cores()

    # --- encoding -------------------------------------------------------------------------------------------------

    def encode(self) -> None:
        """Writes every missing or damaged file of the token cache. Raises SftError for a source with too many rejects."""
        missing = self._missing()
        if not missing:
            return
        todo, count = sum(j.bytes for j in missing), self.workers(missing)
        engine = self.encoder.engine
        if engine.fast is None and self.table.encoder != "tokenizers":
            self.log(f"warning: encoding with tokenizers, many times slower than gigatoken: {engine.fallback_reason}")
        self.log(f"encoding {len(missing)} chunks ({todo / 1e6:,.1f} MB) with {count} worker{'s' * (count > 1)}")
        kinds = {job.chunks[0].file.kind for job in missing}
        self.encoder.compiles = todo >= COMPILED_BYTES
        compiling = time.monotonic()
        self.encoder.compile(kinds)
        if (took := time.monotonic() - compiling) > COMPILING_S:
            self.log(f"compiled the passes over bytes and tokens, once on machines of this kind: {took:.0f} s")
        progress = Progress(self.log, "encoding", todo)
        totals: list[Counter[str]] = [Counter() for _ in self.table.sources]
        starting = time.monotonic()
        began: dict[int, float] = {}  # by worker
        for job, (summary, done) in workers.work(EncodeChunk, (self.encoder, self.cache, kinds), missing, count):
            began[done.worker] = min(done.began, began.get(done.worker, done.began))
            progress.began = sum(began.values()) / len(began)  # the time until workers run is not encoding
            progress.add(job.bytes, summary.tokens)
            self.cpu_seconds["encode"] += done.cpu
            totals[job.source].update(rows=summary.rows, rejected=summary.rejected, bytes=job.bytes)
            accounting.refuse_unread(self.table.sources[job.source], accounting.total([summary]), summary.rows)
            self._check_hopeless(job, summary, totals[job.source])
        self.seconds["start"] = progress.began - starting
        self.seconds["encode"] = time.monotonic() - progress.began
        self.encoded_tokens = progress.tokens
        self.log(f"encoded {progress.rate()}, after {self.seconds['start']:.1f} s of starting workers")

    def _missing(self) -> list[ChunkJob]:
        """This process's jobs without an intact file in the token cache."""
        mine = self.mine
        summaries = {job.name: read_summary(self.cache / job.name) for job in mine}
        damaged = {n for n, s in summaries.items() if s is not None and not is_intact(self.cache / n, s)}
        for name in damaged:
            self.log(f"{self.cache / name}: damaged in the token cache; encoding it again")
        missing = [job for job in mine if summaries[job.name] is None or job.name in damaged]
        if len(missing) < len(mine):
            present = sum(j.bytes for j in mine) - sum(j.bytes for j in missing)
            self.log(
                f"token cache: {len(mine) - len(missing)} of {len(mine)} chunks are there ({present / 1e6:,.1f} MB)"
            )
        return missing

    def _check_hopeless(self, job: ChunkJob, summary: Summary, totals: Counter[str]) -> None:
        """Stops early when a source must exceed its share of rejects: a wrong column name must not cost hours. `totals`: of the source so far."""
        rows, rejected = totals["rows"], totals["rejected"]
        all_bytes = sum(j.bytes for j in self.jobs_of[job.source])
        limit = self.table.max_reject_fraction * rows * all_bytes / max(1, totals["bytes"])
        if rejected >= GIVE_UP_ROWS and rejected > 2 * limit and summary.rejects:
            first = summary.rejects[0]
            raise SftError(
                f"{job.chunks[0].file.name}: {rejected} of the first {rows} rows cannot be used, more than"
                f" max_reject_fraction = {self.table.max_reject_fraction} can allow; e.g. {first.reason}: {first.detail}\n"
                f"    {first.example[:200]}\nnext: correct the source or its columns"
            )

    # --- reading the cache -----------------------------------------------------------------------------------------

    def screen(self) -> tuple[dict[str, tuple[tuple[int, int], ...]], Screen | None]:
        """The rows that repeat evaluation texts, {chunk file: ((row, text), …)}, and the screen that found them."""
        if not self.table.decontaminate:
            return {}, None
        rows = []
        digests = []
        for path in self.table.decontaminate:
            found = input_files.resolve(
                Source(path=path), self.stage.find, self.stage.cache, log=self.log, every_split=True
            )
            for file in found.files:
                digests.append(file.sha256)
                for number, row in blocks.rows_of(file):
                    if isinstance(row, blocks.Reject):
                        raise SftError(
                            f"{file.name}: row {number}: {row.reason}: {row.detail}; next: fix the evaluation file"
                        )
                    rows.append((f"{file.name}:{number}", row))
        screen = Screen(rows, self.table.decontaminate_ngram, self.table.decontaminate_overlap)
        if not screen.texts:
            raise SftError(
                f"[prepare] decontaminate: no text of {', '.join(self.table.decontaminate)} can be searched for: {screen.too_short}"
                f" have fewer than {min(SHORTEST, screen.n)} words, {screen.shared} are shared by many rows; next: name files with"
                " evaluation texts"
            )
        self.log(
            f"decontaminating against {len(screen.texts):,} evaluation texts; not covered: {screen.too_short:,} of fewer than"
            f" {min(SHORTEST, screen.n)} words and {screen.shared:,} that many rows share"
        )
        cache = (
            self.stage.cache
            / "screens"
            / digest([SCREENING_VERSION, digests, screen.n, screen.overlap, self.encode_key])
        )
        cache.mkdir(parents=True, exist_ok=True)
        missing = [job for job in self.mine if not (cache / f"{job.name}.json").is_file()]
        readers = [self.encoder.reader(source) for source in self.table.sources]
        progress = Progress(self.log, "decontaminating", sum(j.bytes for j in missing))
        for job, _ in workers.work(ScreenChunk, (screen, cache, readers), missing, self.workers(missing)):
            progress.add(job.bytes)
        return {job.name: ScreenHits.read(cache / f"{job.name}.json").hits for job in self.mine}, screen

    def near_duplicates(
        self, indexes: Sequence[SourceIndex], pools: Sequence[Pool]
    ) -> tuple[NearDuplicates | None, dict[int, int]]:
        """Finds conversations that nearly repeat an earlier one, and marks them in the pools if the recipe drops them. Returns how many
        there are, and the first of them: {document: the earlier one}."""
        if self.table.near_duplicates == "ignore":
            return None, {}
        cache = self.stage.cache / "sketches" / digest([SKETCH_VERSION, near.NGRAM, near.VALUES, self.encode_key])
        cache.mkdir(parents=True, exist_ok=True)
        missing = [job for job in self.jobs if not (cache / f"{job.name}.npy").is_file()]
        readers = [self.encoder.reader(source) for source in self.table.sources]
        progress = Progress(self.log, "comparing", sum(j.bytes for j in missing))
        arguments = (cache, self.cache, readers)
        for job, _ in workers.work(near.SketchChunk, arguments, missing, self.workers(missing)):
            progress.add(job.bytes)
        files = [cache / f"{job.name}.npy" for jobs in self.jobs_of for job in jobs]
        counts = np.concatenate([np.diff(index.cached.first) for index in indexes])
        repeats = near.find(near.Sketches(files, np.cumsum([0, *counts])), self.table.near_duplicate_similarity)
        if self.table.history == "as-rendered":
            ends_of = np.cumsum(counts)
            for job, part in zip(
                (job for jobs in self.jobs_of for job in jobs), np.split(repeats, ends_of[:-1]), strict=True
            ):
                part[:] = near.spread(part, read_index(self.cache / job.name, self._summary(job))["row"])
        ends = np.cumsum([len(pool.lengths) for pool in pools])
        shown = near.examples(repeats, ends.tolist(), NEAR_EXAMPLES)
        examples = dict(zip(shown.tolist(), repeats[shown].tolist(), strict=True))
        paths = [source.path for source in self.table.sources]
        pairs = tuple(
            NearPair(paths[a], paths[b], documents) for (a, b), documents in near.pairs(repeats, ends.tolist()).items()
        )
        drops = self.table.near_duplicates == "drop"
        for pair in pairs:
            self.log(
                f"near-duplicates: {pair.documents} of {pair.later} nearly repeat one of {pair.earlier}"
                + ", and are dropped" * drops
            )
        if drops:
            for pool, part in zip(pools, np.split(repeats, ends[:-1]), strict=True):
                pool.near[:] = part >= 0
        return NearDuplicates(self.table.near_duplicate_similarity, drops, pairs), examples

    def collect(self, hits: dict[str, tuple[tuple[int, int], ...]]) -> tuple[list[SourceIndex], list[Pool]]:
        """Reads the index of every source from the token cache. Raises SftError for missing files and too many rejects.

        The pools are for the mix and need most of the memory; drop them after it.
        """
        found = [self._collect(i, hits) for i in range(len(self.inputs))]
        return [index for index, _ in found], [pool for _, pool in found]

    def _collect(self, number: int, hits: dict[str, tuple[tuple[int, int], ...]]) -> tuple[SourceIndex, Pool]:
        jobs = self.jobs_of[number]
        summaries = [self._summary(job) for job in jobs]
        first = np.cumsum([0, *(summary.documents for summary in summaries)])
        pool = Pool.empty(int(first[-1]), self.table.deduplicate)
        rows = RowNames(self.table.sources[number].path)
        rejects = RejectTally()
        usable: set[str] = set()  # files
        repeats: list[Repeat] = []
        held = [pool.held_digests]
        for job, summary, begin, end in zip(jobs, summaries, first[:-1].tolist(), first[1:].tolist(), strict=True):
            index = read_index(self.cache / job.name, summary)
            pool.lengths[begin:end], pool.conversations[begin:end] = index["length"], index["conversation"]
            pool.held[begin:end] = held_out(index["group"], self.table.validation_fraction)
            held.append(index["digest"][pool.held[begin:end], 0])
            if self.table.deduplicate:
                pool.digests[begin:end] = index["digest"]
            rows.enter(job, summary)
            for reject in rows.rejects(summary):
                rejects.add(reject)
            summary.rejects = []  # they are read again when they are written
            documents = np.diff(np.searchsorted(index["row"], [0, *rows.ends]))
            usable.update(name for name, count in zip(rows.files, documents.tolist(), strict=True) if count)
            text_of = dict(hits.get(job.name, ()))
            for i in np.flatnonzero(np.isin(index["row"], list(text_of))).tolist() if text_of else ():
                pool.excluded[begin + i] = True
                repeats.append(Repeat(*rows.name(int(index["row"][i])), text_of[int(index["row"][i])]))
        pool.held_digests = np.concatenate(held)
        rows_read = sum(summary.rows for summary in summaries)
        counts = accounting.total(summaries)
        accounting.refuse_unread(self.table.sources[number], counts, rows_read)
        accounting.refuse_quoted(self.table.sources[number], counts)
        written = self.encoder.reader(self.table.sources[number]).counter.written
        for line in accounting.report(self.table.sources[number], counts, written):
            self.log(line)
        self._check_rejects(number, rows_read, rejects, usable)
        return SourceIndex(CachedSource(first, pool.lengths), repeats, rows_read, rejects), pool

    def _summary(self, job: ChunkJob) -> Summary:
        """The footer of a job's file. Raises SftError for a missing one."""
        summary = read_summary(self.cache / job.name)
        if summary is None:
            raise SftError(f"{self.cache / job.name}: missing in the token cache; next: run it again")
        self.summaries[job.name] = summary
        return summary

    def rejects(self) -> Iterator[RejectedRow]:
        """All rejected rows, source after source."""
        for source, jobs in zip(self.table.sources, self.jobs_of, strict=True):
            rows = RowNames(source.path)
            for job in jobs:
                summary = self._summary(job)
                rows.enter(job, summary)
                yield from rows.rejects(summary)
                summary.rejects = []

    def _check_rejects(self, number: int, rows_read: int, rejects: RejectTally, usable: Container[str]) -> None:
        path = self.table.sources[number].path
        if not rows_read:
            raise SftError(f"{path}: holds no row; next: correct the path")
        for file in self.inputs[number].files if rejects.total < rows_read else ():
            if file.name not in usable:
                found = rejects.first_in.get(file.name)
                why = f"; row {found.row}: {found.reason}: {found.detail}" if found else ""
                raise SftError(
                    f"{file.name}: holds no usable row{why}; next: correct or remove the file, or name it in the source's"
                    " ignore_files"
                )
        if rejects.total <= self.table.max_reject_fraction * rows_read and rejects.total < rows_read:
            return
        lines = [
            f"{path}: {rejects.total} of {rows_read} rows cannot be used, more than max_reject_fraction = {self.table.max_reject_fraction}"
        ]
        for reason, count in rejects.reasons.most_common(REJECT_EXAMPLES):
            first = rejects.examples[reason][0]
            lines.append(
                f"  {count} × {reason}: e.g. {first.file} row {first.row}: {first.detail}\n      {first.example[:200]}"
            )
        raise SftError(
            "\n".join([*lines, "next: correct the rows or the source's columns, or raise max_reject_fraction"])
        )

    # --- writing --------------------------------------------------------------------------------------------------

    def write(self, name: str, chosen: Selection, found: Sequence[SourceIndex]) -> SplitSize:
        """Writes the chosen documents into stage.out/name, numbered in their order."""
        folder = self.stage.out / name
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have left one
        placement = Placement(chosen, [source.cached for source in found])
        check = TokenCheck(f"[prepare] {name}", self.encoder.identity)
        progress = Progress(self.log, f"writing {name}", placement.tokens)
        files = [self.cache / job.name for jobs in self.jobs_of for job in jobs]
        written, hashes = materialise(
            folder, self.encoder.identity.vocab_size, files, placement, check, progress, self.threads
        )
        self.hashes |= {f"{name}/{file}": sha256 for file, sha256 in hashes.items()}
        self.checks[name] = check.finish()
        return written

    def encoders(self) -> tuple[dict[str, int], int]:
        """The documents by encoder, and the number of chunks that were encoded again after the fast encoder failed."""
        notes: Counter[str] = Counter()
        for summary in self.summaries.values():
            notes.update(summary.notes)
        redone = sum(bool(summary.notes.get("redone_batches")) for summary in self.summaries.values())
        if redone:
            self.log(f"warning: {redone} of {len(self.summaries)} chunks were encoded again: gigatoken gave other ids")
        by = "documents_by_"
        return {name.removeprefix(by): n for name, n in sorted(notes.items()) if name.startswith(by)}, redone

    def check_tokenizer_first(self) -> None:
        """`check_tokenizer` before rows are encoded, with a folder that is removed again."""
        with self.timed("check"), tempfile.TemporaryDirectory() as made:
            self.encoder.save_tokenizer(Path(made))
            self.check_tokenizer(Path(made))

    def check_tokenizer(self, folder: Path) -> None:
        """Raises SftError unless transformers reads the saved folder as this code does.

        As that takes seconds, the cache remembers the contents that passed.
        """
        version = importlib.metadata.version("transformers")
        files = {p.name: hash_file(p) for p in folder.iterdir()}
        passed = self.stage.cache / "tokenizers" / digest([version, files, to_json(self.encoder.identity)])
        if not passed.exists():
            self.encoder.check_saved(folder)
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
        self.canaries_agreed = len(self.encoder.identity.tokenizer.canaries)

    def trim_cache(self) -> None:
        """Deletes old files from the token caches of all runs beyond cache_gb. Files that this run uses are kept."""
        use(self.cache / job.name for job in self.jobs)
        if most := self.stage.hardware.cache_gb:
            removed, freed = trim(self.cache.parent, most * 10**9, time.time())
            if removed:
                self.log(
                    f"token cache: {removed} chunks ({freed / 1e9:,.1f} GB) that were unused for longest are deleted: cache_gb = {most}"
                )

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the time of the block to a step."""
        began, cpu = time.monotonic(), time.process_time()
        yield
        self.seconds[step] += time.monotonic() - began
        self.cpu_seconds[step] += time.process_time() - cpu

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time fills this cache. The parts of an array job write different files of it."""
        name = "lock" if self.shard.part is None else f"lock-{self.shard.part}-of-{self.shard.parts}"
        with lock(self.cache / name, wait=True):
            an_hour_ago = time.time() - 3600  # older files are of a killed run
            for file in self.cache.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime < an_hour_ago:
                        file.unlink()
            yield


def _token_options(table: Prepare | Source) -> dict[str, Any]:
    """The options that can change the tokens of a row. A new option counts unless it is declared with selects=True."""
    fields = [f for f in dataclasses.fields(table) if f.metadata["key"] and not f.metadata["selects"]]
    return {f.name: getattr(table, f.name) for f in fields}


def _content(chunks: Sequence[input_files.Chunk]) -> list[tuple[str, str, int, int]]:
    """What the rows of a job depend on."""
    return [(c.file.sha256, c.file.kind, c.start, c.stop) for c in chunks]


def resolve_tokenizer(prepare: Prepare, stage: Stage) -> Path:
    """The tokenizer's folder. One from the hub (hf://…) is in a folder of the cache that is named by its commit."""
    path = prepare.tokenizer
    if not inputs.is_remote(path):
        return stage.find(path)
    return hub.cached(path, f"[prepare] tokenizer {path}", stage.log, inputs.tokenizer_files(prepare))


def with_added_tokens(folder: Path, table: Prepare, stage: Stage) -> Path:
    """The tokenizer's folder, or a copy in the cache that has `add_tokens` as well."""
    return (
        add_tokens(folder, table.add_tokens, inputs.tokenizer_files(table), stage.cache) if table.add_tokens else folder
    )
