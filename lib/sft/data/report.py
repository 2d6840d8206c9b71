"""What prepare tells on the terminal about each source: its files, and what became of its rows.

In:  the files, the rejects and the mix of a source. Out: lines. The rows that were found are those rejected, duplicates, contaminated,
near-duplicates, held out, and those of which the weight takes some or all. Where a row makes several documents, the line says how many, and
all but the rejected ones are documents.
"""

from __future__ import annotations

from collections.abc import Iterator

from sft.common.strings import first_names
from sft.data.row_names import RejectTally
from sft.formats.dataset import SourceMix
from sft.formats.rejects import REJECTS
from sft.recipe.schema import Source
from sft.sources.input_files import SourceFiles


def source_lines(source: Source, files: SourceFiles, mix: SourceMix, rejects: RejectTally, found: int) -> Iterator[str]:
    """The lines of one source. A source with rejects has a warning, also when the stage succeeds. `found`: its rows."""
    if files.found > len(files.files):
        parts = [
            f"{len(names)} {what}: {first_names(names)}"
            for what, names in (("of other splits or subsets", files.other_splits), ("ignored", files.ignored))
            if names
        ]
        yield f"{mix.path}: reads {len(files.files)} of {files.found} files; {'; '.join(parts)}"
    yield _rows(source, files, mix, rejects, found)
    if rejects.total:
        first = rejects.first
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.reasons.most_common())
        yield (
            f"warning: {mix.path}: {rejects.total} of {found} rows cannot be used ({reasons}); the first is {first.file} row"
            f" {first.row}: {first.reason}: {first.detail}; all are in {REJECTS}"
        )
    if not mix.taken and mix.weight and mix.found:
        yield f"warning: {mix.path}: weight {mix.weight} and its caps leave none of {mix.found} documents"


def _rows(source: Source, files: SourceFiles, mix: SourceMix, rejects: RejectTally, found: int) -> str:
    """What became of the rows. Two kinds are left out where there are none, so that the line stays short."""
    rejected = f"rejected {rejects.total}" + (f" ({rejects.first.reason})" if rejects.total else "")
    usable = found - rejects.total
    if usable != mix.found:
        rejected += f", {usable} usable, which make {mix.found} documents"
    parts = [f"duplicates {mix.duplicates}"]
    if mix.contaminated:
        parts.append(f"contaminated {mix.contaminated}")
    if mix.near_duplicates:
        parts.append(f"near-duplicates {mix.near_duplicates}")
    parts += [f"held out {mix.held_out}", f"taken {mix.taken} of {mix.available}"]
    limits = [f"{name} {limit}" for name in ("max_documents", "max_tokens") if (limit := getattr(source, name))]
    if mix.weight != 1 or limits:
        parts[-1] += f" ({', '.join([f'weight {mix.weight}', *limits])})"
    if mix.validation != mix.held_out:
        copies = f" ({mix.validation_copies} others repeat one of them)" if mix.validation_copies else ""
        parts.append(f"in validation {mix.validation}{copies}")
    count = len(files.files)
    colon = "," if usable == mix.found else ":"
    return f"{mix.path}: found {found} row{'s' * (found != 1)} in {count} file{'s' * (count != 1)}: {rejected}{colon} {', '.join(parts)}"
