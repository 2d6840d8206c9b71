"""What the names of a dataset's files say: format, split, number of a shard.

In:  names of files, relative to a folder, with slashes.
Out: a format (`row_format`), a split (`split_of`), the names of missing shards (`absent`). Nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

TEXT_FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv")
"""Formats of text. They may be compressed."""
ROW_FORMATS = (*TEXT_FORMATS, "parquet", "arrow")
COMPRESSIONS = ("gz", "zst", "xz", "bz2")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
DOCUMENTATION = (
    "readme*", "license*", "licence*", "notice*", "citation*", "changelog*", "contributing*", "*.md", "*.rst", "*.py", "*.ipynb",
    "*.yaml", "*.yml", "*.toml", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.gif", "*.pdf", "*.sha256", "*.md5", "*.crc", "_success",
    "sha256sums", "md5sums", "*.lock",
)  # fmt: skip
"""Files that describe a dataset and hold no rows, as patterns of their lower-case names."""
CACHES = ("cache-*.arrow", "tmp*.arrow")
"""What `datasets` leaves beside its files: results of `map` and `filter`."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val", "validate"),
    "test": ("test", "testing", "eval", "evaluation", "tests", "evals", "heldout", "holdout"),
}
"""Words in the name of a file or folder that name its split: those of the `datasets` library, and more that are not 'train'."""
_PART = re.compile(r"((?:.*/)?[^/]*?)(\d{1,6})([-_]of[-_])(\d{1,6})(?!\d)([^/]*)")
"""The name of one of several files: start, number, 'of', how many there are, end."""


def row_format(name: str) -> str | None:
    """'jsonl', 'json.gz', 'csv.zst', 'parquet' … by a file's name, in any case of letters; None for a file without rows."""
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    if len(parts) >= 3 and parts[-1] in COMPRESSIONS and parts[-2] in TEXT_FORMATS:
        return f"{parts[-2]}.{parts[-1]}"
    return parts[-1] if len(parts) >= 2 and parts[-1] in ROW_FORMATS else None


def stem(name: str) -> str:
    """The name of a file of rows without its format."""
    return name[: -len(row_format(name) or "")].rstrip(".") if row_format(name) else name


def is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def kinds() -> str:
    texts, others = (", ".join(f".{f}" for f in group) for group in (TEXT_FORMATS, ROW_FORMATS[len(TEXT_FORMATS) :]))
    return f"the formats are {texts}, also compressed as {', '.join('.' + c for c in COMPRESSIONS)}, and {others}"


def absent(names: Iterable[str], files: Iterable[str], ignore: Sequence[str] = ()) -> list[str]:
    """The names of files that must exist because of the names of `files`: b-00000-of-00002 lacks b-00001-of-00002.

    Numbers count from 0, or from 1 where the last one is the number of files. Files that `ignore` matches are not missing.
    """
    present: dict[tuple[str, str], dict[int, re.Match[str]]] = {}
    for name in names:
        if row_format(name) and not is_hidden(name) and (m := _PART.fullmatch(name)):
            present.setdefault((m[1], m[4]), {})[int(m[2])] = m
    wanted = {(m[1], m[4]) for m in map(_PART.fullmatch, files) if m}
    missing = []
    passed = [glob(pattern) for pattern in ignore]
    for key in sorted(wanted & present.keys()):
        numbers, total = present[key], int(key[1])
        m = next(iter(numbers.values()))
        first = 1 if total in numbers and 0 not in numbers else 0
        gaps = (f"{m[1]}{n:0{len(m[2])}d}{m[3]}{m[4]}{m[5]}" for n in range(first, first + total) if n not in numbers)
        missing += [name for name in gaps if not any(p.fullmatch(name) for p in passed)]
    return missing


def known_split(split: str) -> str:
    """'validation' for 'dev', and the like; other names stay as they are."""
    return next((known for known, words in SPLITS.items() if split.lower() in words), split)


def split_of(name: str) -> str:
    """The split that a relative name says: 'train', 'validation', 'test', or ''. 'train or test' where it says both.

    Folders count before the file's own name, as in the `datasets` library.
    """
    *folders, last = (_words(part) for part in name.split("/"))
    for words in ({word for part in folders for word in part}, set(last)):
        if said := [split for split, spellings in SPLITS.items() if words.intersection(spellings)]:
            return " or ".join(said)
    return ""


def _words(name: str) -> list[str]:
    """The lower-case words of a name: 'train' and 'data' of 'trainData', 'test' of 'testset', 'heldout' of 'held-out'."""
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    words = re.split(r"[^a-z]+", re.sub(r"\b(held|hold)[-_. ]out", r"\1out", separated.replace("_", " ")))
    return [re.sub(r"(?<=.)(set|data|split)$", "", word) for word in words]


def glob(pattern: str) -> re.Pattern[str]:
    """A pattern of the hub: `*` stays inside a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(p) or _class(p) for p in parts))


def _class(part: str) -> str:
    """A part of a pattern that is no star: a class of characters, or plain text."""
    if len(part) > 2 and part[0] == "[" and part[-1] == "]":
        inner = re.sub(r"([\\\[\]&|~])", r"\\\1", part[1:-1])
        return f"[^{inner[1:]}]" if inner[0] in "!^" else f"[{inner}]"
    return re.escape(part)
