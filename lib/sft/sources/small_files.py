"""Small files share a job: `cut_into_jobs` cuts the files of a source into jobs, and `read_job` reads the chunks of one.

A job has a fixed cost of some milliseconds, which thousands of small files would pay one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from sft.sources import input_files
from sft.sources.blocks import Block, ColumnBlock, LineBlock, read_blocks
from sft.sources.input_files import Chunk, InputFile


def cut_into_jobs(files: Sequence[InputFile]) -> Iterator[tuple[Chunk, ...]]:
    """The chunks of each job, in the order of the files.

    Files of one chunk that is smaller than MIN_CHUNK_BYTES follow each other in a job of about that size. Files of one job have
    one kind. The jobs depend on the content of the files alone. Raises SftError for a broken file.
    """
    waiting: list[Chunk] = []
    size = 0
    for file in files:
        chunks = input_files.cut(file)
        small = len(chunks) == 1 and chunks[0].bytes < input_files.MIN_CHUNK_BYTES
        if waiting and (not small or size >= input_files.MIN_CHUNK_BYTES or waiting[0].file.kind != file.kind):
            yield tuple(waiting)
            waiting, size = [], 0
        if small:
            waiting += chunks
            size += chunks[0].bytes
        else:
            yield from ((chunk,) for chunk in chunks)
    if waiting:
        yield tuple(waiting)


def read_job(chunks: Sequence[Chunk], counts: list[int]) -> Iterator[Block]:
    """The blocks of several chunks, whose rows are numbered on. Small blocks are joined.

    Appends to `counts` the number of rows of each chunk, blank lines included.
    """
    if len(chunks) == 1:
        counts.append(0)
        for block in read_blocks(chunks[0]):
            counts[0] = block.first + block.count
            yield block
        return
    first = 0
    waiting: list[Block] = []
    for chunk in chunks:
        counts.append(0)
        for block in read_blocks(chunk):
            if waiting and not _can_follow(waiting[-1], block):
                yield from _joined(waiting)
                waiting = []
            waiting.append(dataclasses.replace(block, first=first))
            first += block.count
            counts[-1] += block.count
    yield from _joined(waiting)


def _can_follow(last: Block, block: Block) -> bool:
    if isinstance(last, LineBlock) and isinstance(block, LineBlock):
        return not last.too_long and not block.too_long
    if isinstance(last, ColumnBlock) and isinstance(block, ColumnBlock):
        return bool(last.arrow.schema.equals(block.arrow.schema))
    return False


def _joined(blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks as one, or as few."""
    if len(blocks) == 1:
        yield blocks[0]
    elif blocks and isinstance(blocks[0], LineBlock):
        yield LineBlock.of(b"".join(b.lines for b in blocks if isinstance(b, LineBlock)), blocks[0].first)
    elif blocks:
        import pyarrow as pa  # start-up: pyarrow takes 0.3 s, and JSON lines do not need it

        first = blocks[0].first
        batches = [b.arrow for b in blocks if isinstance(b, ColumnBlock)]
        for batch in pa.Table.from_batches(batches).combine_chunks().to_batches():
            yield ColumnBlock(batch, first)
            first += batch.num_rows
