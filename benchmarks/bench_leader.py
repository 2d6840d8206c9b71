"""Memory of prepare's leading process for many conversations: reading the index of the token cache, the mix, and writing.

    make bench-leader                          1 and 4 million conversations of four tokens
    DOCUMENTS=10000000 make bench-leader       others, separated by commas

Out: JSON with the largest resident memory, the bytes that each conversation adds to it, and CPU seconds. The conversations are
made up, and encoding them is no part of the measurement: workers do that, in bounded memory.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sft.data import materialise
from sft.data.chunks import ChunkJob
from sft.data.compiled import TRAINED
from sft.data.dataset_writer import DatasetWriter
from sft.data.mix import mix
from sft.data.preparation import Preparation
from sft.data.shard import Shard
from sft.data.tokencache import ChunkWriter
from sft.formats.dataset import TemplateFacts, TokenizerFacts, TokenizerFile
from sft.recipe.schema import Prepare, Source
from sft.sources.input_files import Chunk, InputFile, SourceFiles

EOS, TOKENS, PER_FILE = 9, 4, 20_000
FACTS = TokenizerFacts(
    1000, EOS, 0, (EOS,), "eos", True, TokenizerFile("0" * 64, {}), TemplateFacts("made-up", "0" * 64)
)


def fill(cache: Path, documents: int) -> list[ChunkJob]:
    """Files of the token cache with so many documents of TOKENS tokens."""
    jobs: list[ChunkJob] = []
    rng = np.random.default_rng(0)
    whole = InputFile("made.jsonl", "made.jsonl", "jsonl", "0" * 64, documents)
    for first in range(0, documents, PER_FILE):
        count = min(PER_FILE, documents - first)
        tokens = rng.integers(10, 1000, count * TOKENS).astype(np.uint32)
        tokens[TOKENS - 1 :: TOKENS] = EOS | int(TRAINED)
        job = ChunkJob(len(jobs), 0, (Chunk(whole, len(jobs), first, first + count, count),), f"{len(jobs):06d}.tok")
        with ChunkWriter(cache / job.name) as writer:
            hashes = rng.integers(0, 1 << 63, (2, count), dtype=np.uint64)
            lengths, ones = np.full(count, TOKENS), np.ones(count, dtype=np.int64)
            writer.add(tokens, lengths, ones, np.arange(count), *hashes)
            writer.summary.rows = writer.summary.lines = count
            writer.summary.chunk_lines = [count]
        jobs.append(job)
    return jobs


def lead(folder: Path, documents: int, deduplicate: bool) -> dict[str, Any]:
    """Does the leader's part on the files in `folder`, and reports its memory."""
    table = Prepare(
        tokenizer="t", sources=(Source(path="made.jsonl"),), validation_fraction=0.01, deduplicate=deduplicate
    )
    work = object.__new__(Preparation)
    work.table, work.shard, work.cache, work.log = table, Shard(), folder / "cache", lambda text: None
    work.stage = SimpleNamespace(out=folder, hardware=SimpleNamespace(threads=1))  # type: ignore[assignment]
    work.encoder = SimpleNamespace(identity=FACTS)  # type: ignore[assignment]
    work.summaries, work.checks, work.hashes = {}, {}, {}
    whole = InputFile("made.jsonl", "made.jsonl", "jsonl", "0" * 64, documents)
    files = range(0, documents, PER_FILE)
    work.inputs = [SourceFiles((whole,))]
    work.jobs_of = [
        [
            ChunkJob(n, 0, (Chunk(whole, n, first, min(first + PER_FILE, documents), 1),), f"{n:06d}.tok")
            for n, first in enumerate(files)
        ]
    ]
    # Parts of half a million documents, as those of usual length have.
    vars(materialise)["DatasetWriter"] = functools.partial(DatasetWriter, part_tokens=TOKENS << 19)
    before, began = memory(), time.process_time()
    indexes, pools = work.collect({})
    after_collect = memory()
    mixed = mix(pools, table.sources, table.seed, deduplicate=deduplicate)
    del pools
    after_mix = memory()
    work.write("data", mixed.data, indexes)
    return {
        "documents": documents, "deduplicate": deduplicate, "megabytes_before": before, "after_index": after_collect, "after_mix": after_mix,
        "megabytes": memory(), "bytes_per_document": round((memory() - before) * 1e6 / documents, 1),
        "cpu_s": round(time.process_time() - began, 1),
    }  # fmt: skip


def memory() -> int:
    """The largest resident memory of this process so far, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 // 10**6


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(lead(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True")))
        return
    for text in os.environ.get("DOCUMENTS", "1000000,4000000").split(","):
        for deduplicate in (False, True):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "cache").mkdir()
                fill(folder / "cache", int(text))
                command = [sys.executable, __file__, name, text, str(deduplicate)]
                subprocess.run(command, check=True)
                shutil.rmtree(folder / "data")


if __name__ == "__main__":
    main()
