"""TODO sft.data.preparation"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.machine import cores
from sft.data import blocks, sources, workers
from sft.data.chunks import EncodeChunk, Job, Progress, ScreenChunk
from sft.data.decontaminate import SHORTEST, Screen
from sft.data.materialise import Documents, materialise
from sft.data.mix import Pool, Selection
from sft.data.shard import Shard, digest
from sft.data.token_check import TokenCheck
from sft.data.tokencache import TEMPORARY, Summary, is_intact, read_index, read_summary, trim, use
from sft.formats.chunks import ScreenHits
from sft.formats.dataset import SplitSize
from sft.formats.proof import WrittenSplit
from sft.formats.record import to_json
from sft.formats.rejects import RejectedRow
from sft.recipe import inputs
from sft.recipe.schema import Source
from sft.storage import hub

if TYPE_CHECKING:
    from sft.runner.stage import Stage

ENCODING = 5
"""Raised when code changes make other tokens or masks of the same input: the cache is then made again."""
SCREENING = 2
"""Raised when code changes find other copies of evaluation texts in the same input."""
MIX_FIELDS = {"sources", "seed", "validation_fraction", "max_reject_fraction", "deduplicate"}
MIX_FIELDS |= {"decontaminate", "decontaminate_ngram", "decontaminate_overlap"}
MIX_SOURCE_FIELDS = {"path", "weight", "split", "subset", "max_documents", "max_tokens"}
"""What decides which documents are taken, not what their tokens are. Every other option is part of the cache's key."""
BYTES_PER_WORKER = 2 << 20  # starting a worker costs about what encoding this much costs
COMPILING_S = 2.0  # loading what was compiled takes less
REJECT_EXAMPLES = 5
GIVE_UP_ROWS = 1000


@dataclass(frozen=True)
class SourceIndex:
    """The encoded documents of one source: where each lies, and what was read and rejected."""

    chunk: np.ndarray  # [documents] position in Preparation.jobs_of[source]
    start: np.ndarray
    labels: np.ndarray
    rows: np.ndarray  # number of the row in its file, from 1
    repeats: np.ndarray  # number of the evaluation text a document repeats, or -1
    pool: Pool
    read: int
    rejects: list[RejectedRow]


class Preparation:
    """One run of the stage. Building it resolves the sources; each method is one step."""

    def __init__(self, stage: Stage, shard: Shard):
        from sft.data.tokenize import Encoder

        self.stage, self.shard = stage, shard
        self.table = stage.recipe.prepare
        self.log = stage.log
        self.tokenizer = resolve_tokenizer(self.table.tokenizer, stage)
        self.encoder = Encoder(self.tokenizer, self.table, stage.find)
        self.encoded_tokens = 0
        self.seconds = {"resolve": 0.0, "start": 0.0, "encode": 0.0, "mix": 0.0, "write": 0.0, "check": 0.0}
        self.cpu_seconds = dict.fromkeys(self.seconds, 0.0)
        with self.timed("resolve"):
            self.inputs = [
                sources.resolve(s, stage.find, stage.cache, stage.sha256, self.log) for s in self.table.sources
            ]
        self.encode_key = digest(self._encoding())
        self.cache = stage.cache / "tokens" / self.encode_key
        self.cache.mkdir(parents=True, exist_ok=True)
        self.jobs_of = [self._jobs(i, files) for i, files in enumerate(self.inputs)]
        unique = {job.name: job for jobs in reversed(self.jobs_of) for job in jobs}
        self.jobs = [
            dataclasses.replace(job, number=n) for n, job in enumerate(unique[name] for name in sorted(unique))
        ]
        self.summaries: dict[str, Summary] = {}
        self.canaries_agreed = 0
        self.checks: dict[str, WrittenSplit] = {}
        self.hashes: dict[str, str] = {}  # sha256 of the files of the splits

    def _encoding(self) -> dict[str, Any]:
        """Everything but the rows that decides tokens and masks. New options count unless named as the mix's own."""
        table = {
            f.name: getattr(self.table, f.name)
            for f in dataclasses.fields(self.table)
            if f.name not in MIX_FIELDS | {"tokenizer"} and f.metadata.get("key", True)
        }
        return {"encoding": ENCODING, "identity": to_json(self.encoder.identity), "options": table}

    def _jobs(self, number: int, files: Sequence[sources.InputFile]) -> list[Job]:
        source = self.table.sources[number]
        options = {
            f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name not in MIX_SOURCE_FIELDS
        }
        jobs = []
        for file in files:
            chunks = sources.cut(file)
            key = digest([file.sha256, file.kind, options, [(c.start, c.stop) for c in chunks]])
            jobs += [Job(0, number, chunk, f"{key}-{chunk.index:06d}.tok") for chunk in chunks]
        return jobs

    @property
    def mine(self) -> list[Job]:
        """The jobs of this process: all, or every n-th."""
        return self.jobs if self.shard.part is None else self.jobs[self.shard.part :: self.shard.parts]

    def workers(self, jobs: Sequence[Job]) -> int:
        work = sum(job.chunk.bytes for job in jobs)
        return max(1, min(self.threads, len(jobs), work // BYTES_PER_WORKER))

    @property
    def threads(self) -> int:
        return self.stage.hardware.threads or cores()

    # --- encoding -------------------------------------------------------------------------------------------------

    def encode(self) -> None:
        """Makes every missing or damaged file of the token cache. Raises SftError when a source is plainly unusable."""
        mine = self.mine
        found = {job.name: read_summary(self.cache / job.name) for job in mine}
        damaged = [n for n, s in found.items() if s is not None and not is_intact(self.cache / n, s)]
        for name in damaged:
            self.log(f"{self.cache / name}: damaged in the token cache; made again")
        missing = [job for job in mine if found[job.name] is None or job.name in damaged]
        total, todo = sum(j.chunk.bytes for j in mine), sum(j.chunk.bytes for j in missing)
        count = self.workers(missing)
        if len(missing) < len(mine):
            self.log(
                f"token cache: {len(mine) - len(missing)} of {len(mine)} chunks are there ({(total - todo) / 1e6:,.1f} MB)"
            )
        if not missing:
            return
        engine = self.encoder.engine
        if engine.fast is None and self.table.encoder != "tokenizers":
            self.log(f"warning: encoding with tokenizers, many times slower than gigatoken: {engine.fallback_reason}")
        self.log(f"encoding {len(missing)} chunks ({todo / 1e6:,.1f} MB) with {count} worker{'s' * (count > 1)}")
        began = time.monotonic()
        kinds = {job.chunk.file.kind for job in missing}
        self.encoder.compile(kinds)
        if (took := time.monotonic() - began) > COMPILING_S:
            self.log(f"compiled the passes over bytes and tokens, once on machines of this kind: {took:.0f} s")
        progress = Progress(self.log, "encoding", todo)
        arguments = (self.encoder, self.cache, kinds)
        seen = [[0, 0, 0] for _ in self.table.sources]  # rows, rejected rows, bytes
        asked = time.monotonic()
        begun: dict[int, float] = {}  # when each worker began
        for job, (summary, done) in workers.work(EncodeChunk, arguments, missing, count):
            begun[done.worker] = min(done.began, begun.get(done.worker, done.began))
            progress.began = sum(begun.values()) / len(begun)  # starting workers is not encoding
            progress.add(job.chunk.bytes, summary.tokens)
            self.cpu_seconds["encode"] += done.cpu
            counts = seen[job.source]
            counts[0] += summary.rows
            counts[1] += summary.rows - summary.documents
            counts[2] += job.chunk.bytes
            self._give_up(job, summary, *counts)
        self.seconds["start"], self.seconds["encode"] = progress.began - asked, time.monotonic() - progress.began
        self.encoded_tokens = progress.tokens
        self.log(f"encoded {progress.rate()}, after {self.seconds['start']:.1f} s of starting workers")

    def _give_up(self, job: Job, summary: Summary, rows: int, rejected: int, seen_bytes: int) -> None:
        """Stops early when a source cannot end below its share of rejects: a wrong column must not cost hours."""
        whole = sum(j.chunk.bytes for j in self.jobs_of[job.source])
        limit = self.table.max_reject_fraction * rows * whole / max(1, seen_bytes)
        if rejected >= GIVE_UP_ROWS and rejected > 2 * limit and summary.rejects:
            first = summary.rejects[0]
            raise SftError(
                f"{job.chunk.file.name}: {rejected} of the first {rows} rows are unusable, more than max_reject_fraction = "
                f"{self.table.max_reject_fraction} can allow; e.g. {first.reason}: {first.detail}\n    {first.example[:200]}\n"
                f"next: correct the source or its columns"
            )

    # --- what was encoded -----------------------------------------------------------------------------------------

    def screen(self) -> tuple[dict[str, tuple[tuple[int, int], ...]], Screen | None]:
        """Rows that repeat evaluation texts: {chunk file: [[row, text]]}."""
        if not self.table.decontaminate:
            return {}, None
        rows = []
        digests = []
        for path in self.table.decontaminate:
            for file in sources.resolve(Source(path=path), self.stage.find, self.stage.cache, log=self.log):
                digests.append(file.sha256)
                rows += [(f"{file.name}:{i}", row) for i, row in _numbered(file)]
        screen = Screen(rows, self.table.decontaminate_ngram, self.table.decontaminate_overlap)
        if not screen.texts:
            raise SftError(
                f"[prepare] decontaminate: no text of {', '.join(self.table.decontaminate)} can be looked for: {screen.too_short}"
                f" have fewer than {min(SHORTEST, screen.n)} words, {screen.shared} are shared by many rows; next: name files with"
                " evaluation texts"
            )
        self.log(
            f"decontaminating against {len(screen.texts):,} evaluation texts; not covered: {screen.too_short:,} of fewer than"
            f" {min(SHORTEST, screen.n)} words and {screen.shared:,} that many rows share"
        )
        cache = self.stage.cache / "screens" / digest([SCREENING, digests, screen.n, screen.overlap, self.encode_key])
        cache.mkdir(parents=True, exist_ok=True)
        missing = [job for job in self.mine if not (cache / f"{job.name}.json").is_file()]
        readers = [self.encoder.reader(source) for source in self.table.sources]
        progress = Progress(self.log, "decontaminating", sum(j.chunk.bytes for j in missing))
        for job, _ in workers.work(ScreenChunk, (screen, cache, readers), missing, self.workers(missing)):
            progress.add(job.chunk.bytes)
        return {job.name: ScreenHits.read(cache / f"{job.name}.json").hits for job in self.mine}, screen

    def collect(self, hits: dict[str, tuple[tuple[int, int], ...]]) -> list[SourceIndex]:
        """Reads the cache's index of every source. Raises SftError for missing files and too many rejects."""
        return [self._collect(i, hits) for i in range(len(self.inputs))]

    def _collect(self, number: int, hits: dict[str, tuple[tuple[int, int], ...]]) -> SourceIndex:
        jobs = self.jobs_of[number]
        parts, chunk, starts, rows, repeats, rejects = [], [], [], [], [], []
        read = base = 0
        for position, job in enumerate(jobs):
            if job.chunk.index == 0:
                base = 0
            summary = read_summary(self.cache / job.name)
            if summary is None:
                raise SftError(f"{self.cache / job.name}: the token cache lost this file; next: run it again")
            self.summaries[job.name] = summary
            index = read_index(self.cache / job.name, summary)
            lengths = index["length"].astype(np.int64)
            parts.append(index)
            chunk.append(np.full(len(index), position, dtype=np.uint32))
            starts.append(np.cumsum(lengths) - lengths)
            rows.append(index["row"].astype(np.int64) + base + 1)
            text_of = dict(hits.get(job.name, ()))
            repeats.append(np.full(len(index), -1, dtype=np.int32))
            for i in np.flatnonzero(np.isin(index["row"], list(text_of))) if text_of else ():
                repeats[-1][i] = text_of[int(index["row"][i])]
            name = job.chunk.file.name
            rejects += [
                RejectedRow(self.table.sources[number].path, name, r.row + base + 1, r.reason, r.detail, r.example)
                for r in summary.rejects
            ]
            read += summary.rows
            base += summary.lines
        self._check_rejects(number, read, rejects)
        index = np.concatenate(parts)
        texts = np.concatenate(repeats)
        return SourceIndex(
            chunk=np.concatenate(chunk), start=np.concatenate(starts), labels=index["labels"].astype(np.int64),
            rows=np.concatenate(rows), repeats=texts, read=read, rejects=rejects,
            pool=Pool(
                index["length"].astype(np.int64), np.ascontiguousarray(index["digest"]),
                np.ascontiguousarray(index["conversation"]), texts >= 0,
            ),
        )  # fmt: skip

    def _check_rejects(self, number: int, read: int, rejects: Sequence[RejectedRow]) -> None:
        path = self.table.sources[number].path
        if not read:
            raise SftError(f"{path}: holds no row; next: correct the path")
        if len(rejects) <= self.table.max_reject_fraction * read and len(rejects) < read:
            return
        lines = [
            f"{path}: {len(rejects)} of {read} rows are unusable, more than max_reject_fraction = {self.table.max_reject_fraction}"
        ]
        for reason, count in Counter(r.reason for r in rejects).most_common(REJECT_EXAMPLES):
            first = next(r for r in rejects if r.reason == reason)
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
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        offsets = np.cumsum([0, *(len(jobs) for jobs in self.jobs_of)])
        jobs = [job for jobs in self.jobs_of for job in jobs]
        chunk, start, length = (np.empty(len(chosen), dtype=np.int64) for _ in range(3))
        for number, source in enumerate(found):
            here = chosen.source == number
            index = chosen.index[here]
            chunk[here] = source.chunk[index] + offsets[number]
            start[here], length[here] = source.start[index], source.pool.lengths[index]
        check = TokenCheck(f"[prepare] {name}", self.encoder.identity)
        progress = Progress(self.log, f"writing {name}", int(length.sum()))
        files = [self.cache / job.name for job in jobs]
        documents = Documents(chunk, start, length, chosen.source)
        written, hashes = materialise(
            folder, self.encoder.identity.vocab_size, files, documents, check, progress, self.threads
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

    def check_tokenizer(self, folder: Path) -> None:
        """Demands that transformers reads the saved folder as we do; it takes seconds, so each folder's content once."""
        version = importlib.metadata.version("transformers")
        files = {p.name: hash_file(p) for p in folder.iterdir()}
        passed = self.stage.cache / "tokenizers" / digest([version, files, to_json(self.encoder.identity)])
        if not passed.exists():
            self.encoder.check_saved(folder)
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
        self.canaries_agreed = len(self.encoder.identity.tokenizer.canaries)

    def trim_cache(self) -> None:
        """Keeps the token caches of all runs within cache_gb; what this run uses stays whatever it weighs."""
        use(self.cache / job.name for job in self.jobs)
        if most := self.stage.hardware.cache_gb:
            removed, freed = trim(self.cache.parent, most * 10**9, time.time())
            if removed:
                self.log(
                    f"token cache: {removed} chunks ({freed / 1e9:,.1f} GB) not needed for longest are gone: cache_gb = {most}"
                )

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        began, cpu = time.monotonic(), time.process_time()
        yield
        self.seconds[step] += time.monotonic() - began
        self.cpu_seconds[step] += time.process_time() - cpu

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time fills this cache; parts of an array job write different files of it."""
        from sft.common.locks import lock

        name = "lock" if self.shard.part is None else f"lock-{self.shard.part}-of-{self.shard.parts}"
        with lock(self.cache / name, wait=True):
            an_hour_ago = time.time() - 3600  # of a killed run; a living one's file is younger
            for file in self.cache.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime < an_hour_ago:
                        file.unlink()
            yield


def resolve_tokenizer(path: str, stage: Stage) -> Path:
    """The tokenizer's folder; one that is named hf://… lies in a folder that is named by its commit."""
    if not inputs.is_remote(path):
        return stage.find(path)
    return hub.cached(path, f"[prepare] tokenizer {path}", stage.log, inputs.TOKENIZER_FILES)


def _numbered(file: sources.InputFile) -> Iterator[tuple[int, dict[str, Any]]]:
    base = 0
    for chunk in sources.cut(file):
        count = 0
        for batch in blocks.read(chunk):
            count = batch.count
            if batch.bad:
                bad = batch.bad[0]
                raise SftError(
                    f"{file.name}: row {base + bad.row + 1}: {bad.reason}: {bad.detail}; next: repair the evaluation file"
                )
            yield from ((base + n + 1, row) for n, row in zip(batch.numbers, batch.rows, strict=True))
        base += count
