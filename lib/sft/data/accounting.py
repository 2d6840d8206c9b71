"""What became of the fields of a source's rows: `refuse_unread`, `SourceFields` for proof.json, and a line for the terminal.

In:  `FieldCounts` of a source. Out: an SftError for a source with a field that nothing reads, or the counts by what became of each field.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

from sft.chat.fields import FieldCounts
from sft.common.errors import SftError
from sft.data.tokencache import Summary
from sft.formats.proof import SourceFields
from sft.recipe.row_fields import is_harmless
from sft.recipe.schema import Source

SHOWN_NAMES = 12
OF_CALLS = (".tool_calls", ".function_call", ".function")


def total(summaries: Iterable[Summary]) -> FieldCounts:
    """The counts of all chunks of a source."""
    counts = FieldCounts()
    for summary in summaries:
        counts.add_all(summary.fields, summary.unread, summary.quoted)
    return counts


def refuse_unread(source: Source, counts: FieldCounts, rows: int) -> None:
    """Raises SftError when a field holds something and nothing reads it. `rows`: how many were read so far."""
    if not counts.unread:
        return
    lines = [f"{source.path}: fields hold something, and nothing reads them; their content would be lost:"]
    lines += [
        f"    {name or json.dumps(name)} ({counts.rows[name]:,} of {rows:,} rows), e.g. {example}"
        for name, example in sorted(counts.unread.items())
    ]
    ignore = ", ".join(json.dumps(name, ensure_ascii=False) for name in (*source.ignore, *sorted(counts.unread)))
    raise SftError(
        "\n".join(
            [*lines, f"next: rename them with `columns`, or add to this source in the recipe: ignore = [{ignore}]"]
        )
    )


def refuse_quoted(source: Source, counts: FieldCounts) -> None:
    """Raises SftError when every text of a column is a JSON string in quotes, unless the source keeps them."""
    if source.quoted_texts == "keep" or not (found := counts.all_quoted):
        return
    lines = [
        f"{source.path}: every text of these columns is a JSON string, and its quotes and escapes would be trained:"
    ]
    lines += [f"    {name}: all {counts.quoted[name][0]:,} rows, e.g. {text}" for name, text in sorted(found.items())]
    raise SftError(
        "\n".join(
            [
                *lines,
                'next: store the texts themselves, or add quoted_texts = "keep" to this source if they are meant so',
            ]
        )
    )


def describe(source: Source, counts: FieldCounts, written: Collection[tuple[str, str]]) -> SourceFields:
    """The fields by what became of them. `written`: see `sft.chat.fields.FieldCounter`."""
    names = {field for field, _ in written}
    kinds: dict[str, dict[str, int]] = {"read": {}, "ignored": {}, "harmless": {}}
    for name, rows in sorted(counts.rows.items()):
        if name in source.ignore:
            kind = "ignored"
        elif field := optional_field(name):
            kind = "read" if field in names else "harmless"
        else:
            kind = "harmless" if is_harmless(name) else "read"
        kinds[kind][name] = rows
    return SourceFields(**kinds)


def optional_field(name: str) -> str:
    """The field of a message or of a call, if it is one that is read only where the template writes it; else ""."""
    inside, _, field = name.rpartition(".")
    if field == "id":
        return field if inside.endswith(OF_CALLS) else ""
    return field if inside and field in ("name", "tool_call_id") and not inside.endswith(OF_CALLS) else ""


def report(source: Source, counts: FieldCounts, written: Collection[tuple[str, str]]) -> list[str]:
    """Lines for the terminal: the fields that were read, ignored and passed over, and names of the recipe that no row has."""
    fields = describe(source, counts, written)
    count = len(fields.read)
    lines = [f"{source.path}: reads {count} field{'s' * (count != 1)}; make preview and proof.json list them"]
    kinds = {"ignored by name": fields.ignored, "without training content": fields.harmless}
    lines += [f"  {kind}: {shown(names)}" for kind, names in kinds.items() if names]
    if counts.all_quoted:
        lines.append(f"  kept in quotes: {', '.join(sorted(counts.all_quoted))}")
    if unused := sorted(set(source.ignore) - set(fields.ignored)):
        lines.append(f"warning: {source.path}: ignore names {', '.join(unused)}, which holds nothing in any used row")
    for name, column in sorted(source.columns.items()):
        if column not in counts.rows:
            lines.append(
                f"warning: {source.path}: columns reads {name} from {column}, which holds nothing in any used row"
            )
    return lines


def shown(names: dict[str, int]) -> str:
    """The names with their rows, the first ones when there are many."""
    texts = [f"{name or json.dumps(name)} {rows:,}" for name, rows in names.items()]
    more = len(texts) - SHOWN_NAMES
    return ", ".join(texts[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
