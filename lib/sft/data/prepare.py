"""The prepare stage: chat data to token ids, loss mask and document boundaries, with the proof that the masks are right.

In:  the [prepare] table of a recipe.
Out: in `stage.out`: data/ (and validation/), dataset.json, proof.json, preview.json, rejects.jsonl (and contaminated.jsonl, near_duplicates.jsonl).

There are three steps. A kill -9 can interrupt each of them, and the next run continues:

1. Sources are resolved to files with a sha256 and cut into chunks (sft.sources.input_files).
2. Worker processes encode every chunk that is missing in the token cache, at full length (sft.data.tokencache). The cache is
   keyed by everything that decides the tokens (content, tokenizer, template, …), so weights, seed and splits reuse it.
3. The mix selects documents (sft.data.mix). They are written in their order (sft.data.materialise): the same bytes for any
   number of workers.

SHARD=i/n does step 2 for every n-th chunk and publishes nothing. SHARD=merge/n checks all n parts and does step 3.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sft.data import describe, shards
from sft.data.decontaminate import Screen
from sft.data.mix import Mixed, mix
from sft.data.preparation import Preparation, SourceIndex
from sft.data.report import source_lines
from sft.data.shard import Shard
from sft.formats import dataset, preview, proof, rejects
from sft.formats.dataset import NearDuplicates, PrepareMetrics, SplitSize
from sft.formats.proof import Proof
from sft.formats.record import Record
from sft.runner.stage import Result, Stage
from sft.sources.unpack import new_file


def prepare_part(stage: Stage, shard: Shard) -> Path:
    """Encodes one part of the chunks into the cache and returns its manifest. Publishes nothing."""
    work = Preparation(stage, shard)
    work.check_tokenizer_first()
    with work.locked():
        work.encode()
        work.screen()
        file = shards.record(work)
    stage.log(
        f"part {shard.part} of {shard.parts}: {len(work.mine)} chunks are in {work.cache}; then: SHARD=merge/{shard.parts}"
    )
    return file


def prepare(stage: Stage, shard: Shard | None = None) -> Result:
    """The stage from its sources to its files. With SHARD=merge/n all parts must have been encoded.

    Raises SftError. Then nothing is published.
    """
    work = Preparation(stage, shard or Shard())
    table, out = work.table, stage.out
    work.check_tokenizer_first()
    with work.locked():
        if work.shard.parts:
            shards.check(work)
        else:
            work.encode()
        hits, screen = work.screen()
        with work.timed("mix"):
            indexes, pools = work.collect(hits)
        work.trim_cache()
    with work.timed("mix"):
        near_duplicates, near_examples = work.near_duplicates(indexes, pools)
        mixed = mix(pools, table.sources, table.seed, deduplicate=table.deduplicate)
        del pools
    _log_mix(work, mixed, indexes)
    shutil.rmtree(out / "validation", ignore_errors=True)
    with work.timed("write"):
        splits = {"data": work.write("data", mixed.data, indexes)}
        if len(mixed.validation):
            splits["validation"] = work.write("validation", mixed.validation, indexes)
    with work.timed("check"):
        work.encoder.save_tokenizer(out / "data" / "tokenizer")
        work.check_tokenizer(out / "data" / "tokenizer")
    files = _write_records(work, mixed, indexes, splits, screen, near_duplicates, near_examples)
    metrics = _metrics(work, splits["data"], sum(index.rejects.total for index in indexes))
    return Result([*splits, *files], metrics.to_metrics(), work.hashes)


def _log_mix(work: Preparation, mixed: Mixed, indexes: Sequence[SourceIndex]) -> None:
    """Logs what became of every source's rows, and warnings about rejects, and about sources and splits that are empty."""
    log, table = work.log, work.table
    for source, files, entry, index in zip(table.sources, work.inputs, mixed.report, indexes, strict=True):
        for line in source_lines(source, files, entry, index.rejects, index.rows_read):
            log(line)
    if table.validation_fraction and not len(mixed.validation):
        log(
            f"warning: validation_fraction {table.validation_fraction} holds out none of {len(mixed.data)} conversations"
        )
    if reason := work.encoder.identity.olmo_core_obstacle:
        log(f"data/ is for training here, not for OLMo-core: {reason}")


def _write_records(
    work: Preparation,
    mixed: Mixed,
    indexes: Sequence[SourceIndex],
    splits: dict[str, SplitSize],
    screen: Screen | None,
    near_duplicates: NearDuplicates | None,
    near_examples: dict[int, int],
) -> list[str]:
    """Writes the JSON and JSONL files and returns their names."""
    out = work.stage.out
    proven = describe.proof(work, indexes)
    records: dict[str, Record] = {
        dataset.NAME: describe.dataset(work, mixed, indexes, splits, screen, near_duplicates),
        proof.NAME: proven,
        preview.NAME: describe.preview(out / "data", work.encoder.vocabulary),
    }
    lists: dict[str, Iterable[Record]] = {rejects.REJECTS: work.rejects()}
    if screen is not None:
        lists[rejects.CONTAMINATED] = describe.contaminated(work, indexes, screen)
    if near_duplicates is not None:
        lists[rejects.NEAR_DUPLICATES] = describe.near_rows(work, indexes, near_examples)
    _log_turns(work.log, proven, work.table.generation_prefix == "rendered")
    for name, record in records.items():
        record.write(out / name)
    for name, rows in lists.items():
        with new_file(out / name) as file:
            for row in rows:
                file.write(rejects.to_lines([row]))
    return [*records, *lists]


def _log_turns(log: Callable[[str], None], proven: Proof, rendered: bool) -> None:
    """Logs by how much `history = "as-rendered"` grows a source, how many of its trained answers are empty, and how many begin without what
    the generation prompt ends in, unless the recipe wants them as `rendered`."""
    for source in proven.sources:
        if empty := source.encoded.get("empty_answers", 0):
            log(
                f"warning: {source.path}: {empty:,} trained answers are empty, so only their ends are trained; next:"
                ' empty_answers = "reject" in [prepare] leaves such rows out'
            )
        if bare := not rendered and source.encoded.get("answers_without_prompt", 0):
            log(
                f"warning: {source.path}: {bare:,} trained answers begin without the opening of thoughts that the generation prompt ends in, so the"
                " model is prompted in another way than it is trained; next: put <think> before their contents"
            )
        added, tokens = source.encoded.get("turns_tokens_added", 0), source.encoded.get("tokens", 0)
        if added:
            log(
                f"{source.path}: one document per trained turn: {tokens:,} tokens, {tokens / (tokens - added):.2f} times those of"
                " one document per conversation"
            )


def _metrics(work: Preparation, data: SplitSize, rejected: int) -> PrepareMetrics:
    encoded_by, chunks_redone = work.encoders()
    return PrepareMetrics(
        documents=data.documents,
        tokens=data.tokens,
        labels=data.labels,
        rejected=rejected,
        encoded_tokens=work.encoded_tokens,
        tokenizer=work.encoder.identity.tokenizer,
        encoded_by=encoded_by,
        chunks_redone=chunks_redone,
        tokenizer_commit=work.tokenizer_commit,
        seconds={step: round(seconds, 3) for step, seconds in work.seconds.items()},
        cpu_seconds={step: round(work.cpu_seconds[step], 3) for step in ("resolve", "encode", "mix", "write")},
    )
