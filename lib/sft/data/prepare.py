"""The prepare stage: chat data to token ids, label mask and document boundaries, with the proof that the masks are right.

In: the [prepare] table of a recipe. Out, in `stage.out`: data/ (and validation/), dataset.json, proof.json, preview.json,
rejects.jsonl. Three steps, each of which a kill -9 can interrupt and the next run continues:

1. Sources are resolved to files with a sha256 and cut into chunks (sft.data.sources).
2. Every chunk that the token cache lacks is encoded at full length by worker processes (sft.data.tokencache). The cache is keyed
   by content, tokenizer, template and what else decides the tokens, so weights, seed and splits never tokenise again.
3. The mix picks documents (sft.data.mix) and writes them in their order (sft.data.dataset): the same bytes for any number of workers.

SHARD=i/n does step 2 for every n-th chunk and publishes nothing; SHARD=merge/n checks all n parts and does step 3.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.common.files import write_atomic
from sft.data import describe, shards
from sft.data.interop import olmo_core_obstacle
from sft.data.mix import mix
from sft.data.shard import Shard
from sft.formats import dataset as dataset_format
from sft.formats import preview as preview_format
from sft.formats import proof as proof_format
from sft.formats import rejects
from sft.formats.dataset import PrepareMetrics
from sft.formats.record import Record
from sft.recipe import inputs

if TYPE_CHECKING:
    from sft.runner.stage import Result, Stage
from sft.data.preparation import Preparation


def prepare_part(stage: Stage, shard: Shard) -> Path:
    """Encodes one part of the chunks into the cache and returns its manifest. Publishes nothing."""
    work = Preparation(stage, shard)
    with work.locked():
        work.encode()
        work.screen()
        file = shards.record(work)
    stage.log(
        f"part {shard.part} of {shard.parts}: {len(work.mine)} chunks are in {work.cache}; then: SHARD=merge/{shard.parts}"
    )
    return file


def prepare(stage: Stage, shard: Shard | None = None) -> Result:
    """The whole stage; with SHARD=merge/n the encoding must be there already. Raises SftError; then nothing is published."""
    from sft.runner.stage import Result

    work = Preparation(stage, shard or Shard())
    table, out = work.table, stage.out
    with work.locked():
        if work.shard.parts:
            shards.check(work)
        else:
            work.encode()
        hits, screen = work.screen()
        with work.timed("mix"):
            found = work.collect(hits)
        work.trim_cache()
    with work.timed("mix"):
        pools = [f.pool for f in found]
        mixed = mix(
            pools,
            table.sources,
            table.seed,
            deduplicate=table.deduplicate,
            validation_fraction=table.validation_fraction,
        )
    for entry in mixed.report:
        stage.log("  ".join(f"{name} {value}" for name, value in dataclasses.asdict(entry).items()))
        if not entry.taken and entry.weight and entry.found:
            stage.log(
                f"warning: {entry.path}: weight {entry.weight} and its caps leave none of {entry.found} documents"
            )
    if table.validation_fraction and not len(mixed.validation):
        stage.log(
            f"warning: validation_fraction {table.validation_fraction} holds out none of {len(mixed.data)} conversations"
        )
    if reason := olmo_core_obstacle(work.encoder.identity):
        stage.log(f"data/ is for training here, not for OLMo-core: {reason}")
    shutil.rmtree(out / "validation", ignore_errors=True)
    with work.timed("write"):
        splits = {"data": work.write("data", mixed.data, found)}
        if len(mixed.validation):
            splits["validation"] = work.write("validation", mixed.validation, found)
    with work.timed("check"):
        work.encoder.save_tokenizer(out / "data" / "tokenizer")
        work.check_tokenizer(out / "data" / "tokenizer")
    records: dict[str, Record] = {
        dataset_format.NAME: describe.dataset(work, mixed, found, splits, screen),
        proof_format.NAME: describe.proof(work, found),
        preview_format.NAME: describe.preview(out / "data", work.encoder.vocabulary),
    }
    rejected = [reject for source in found for reject in source.rejects]
    lists: dict[str, Sequence[Record]] = {rejects.REJECTS: rejected}
    if screen is not None:
        lists[rejects.CONTAMINATED] = describe.contaminated(work, found, screen)
    for name, record in records.items():
        record.write(out / name)
    for name, rows in lists.items():
        write_atomic(out / name, rejects.to_lines(rows))
    encoded_by, chunks_redone = work.encoders()
    metrics = PrepareMetrics(
        documents=splits["data"].documents,
        tokens=splits["data"].tokens,
        labels=splits["data"].labels,
        rejected=len(rejected),
        encoded_tokens=work.encoded_tokens,
        tokenizer=work.encoder.identity.tokenizer,
        encoded_by=encoded_by,
        chunks_redone=chunks_redone,
        tokenizer_commit=work.tokenizer.name if inputs.is_remote(table.tokenizer) else None,
        seconds={step: round(seconds, 3) for step, seconds in work.seconds.items()},
        cpu_seconds={step: round(work.cpu_seconds[step], 3) for step in ("resolve", "encode", "mix", "write")},
    )
    return Result([*splits, *records, *lists], metrics.to_metrics(), work.hashes)
