"""What prepare tells on the terminal about each source: its files, and what became of its rows.

In:  the files, the rejects and the mix of a source. Out: lines. The numbers of a line add up to the rows that were found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sft.common.strings import first_names
from sft.data.sources import SourceFiles
from sft.formats.dataset import SourceMix
from sft.formats.rejects import REJECTS, RejectedRow


def source_lines(files: SourceFiles, mix: SourceMix, rejects: Sequence[RejectedRow]) -> Iterator[str]:
    """The lines of one source. A source with rejects has a warning, also when the stage succeeds."""
    found = mix.found + len(rejects)
    if files.found > len(files.files):
        parts = [
            f"{len(names)} {what}: {first_names(names)}"
            for what, names in (("of other splits or subsets", files.other_splits), ("ignored", files.ignored))
            if names
        ]
        yield f"{mix.path}: {len(files.files)} of {files.found} files are read; {'; '.join(parts)}"
    reasons = Counter(reject.reason for reject in rejects)
    rejected = f" ({', '.join(f'{count} {reason}' for reason, count in reasons.most_common())})" if rejects else ""
    yield f"{mix.path}: found {found:,} rows in {len(files.files)} file{'s' * (len(files.files) != 1)}"
    yield (
        f"  rejected {len(rejects)}{rejected}, duplicates {mix.duplicates}, contaminated {mix.contaminated}, near-duplicates"
        f" {mix.near_duplicates},"
    )
    yield (
        f"  held out {mix.held_out}, available {mix.available}; taken {mix.taken} (weight {mix.weight}), in validation {mix.validation}"
    )
    if rejects:
        first = rejects[0]
        yield (
            f"warning: {mix.path}: {len(rejects)} of {found} rows are not used; the first is {first.file} row {first.row}:"
            f" {first.reason}: {first.detail}; all are in {REJECTS}"
        )
    if not mix.taken and mix.weight and mix.found:
        yield f"warning: {mix.path}: weight {mix.weight} and its caps leave none of {mix.found} documents"
