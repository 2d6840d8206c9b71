"""Which files of a folder, a hub repository or a prefix of a bucket hold the rows of a dataset.

In:  the names of all files (`Tree`), and the `split`, `subset` and `ignore_files` of a [[prepare.sources]] table.
Out: the names of the files to read (`FileSelection`), in the order of their names. Every other file is ignored by name, belongs to
     another split, or the dataset is refused with the file's name.

A dataset means the same wherever it is stored. The rules, first match wins:

1. dataset_dict.json (`DatasetDict.save_to_disk`): `split` names one of its folders, which rule 2 reads.
2. state.json (`Dataset.save_to_disk`): exactly the files that it lists.
3. README.md with `configs` (a hub repository): the files of the configuration `subset` and of `split`.
4. Other folders: where a folder or file has a split's name in it (train, validation, test …), the files of `split`; else all files.

The planner calls `candidates` while Make parses, so this needs the standard library only. A README's `configs` are YAML, which the
planner cannot read: its list then holds the files of all configurations and the README, and prepare selects from them.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sft.common.errors import SftError
from sft.common.strings import first_names
from sft.recipe.edit import to_toml
from sft.recipe.file_names import (
    CACHES,
    DESCRIPTIONS,
    DOCUMENTATION,
    absent,
    glob,
    is_hidden,
    kinds,
    known_split,
    row_format,
    split_of,
)

CORRECT = "next: correct the source in [[prepare.sources]]"
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]+")
"""The name that `push_to_hub` gives a file of a split."""

READING_OPTIONS = (
    "sep", "delimiter", "names", "column_names", "header", "usecols", "skiprows", "nrows", "skipfooter", "quotechar", "quoting", "escapechar",
    "comment", "encoding", "field", "columns", "filters",
)  # fmt: skip
"""Options of the `datasets` library in a configuration that change which rows and columns a file has."""
MOST_LISTED = 20
"""Names of unread files that the advice lists."""


@dataclass(frozen=True)
class Tree:
    """The files of a folder or repository by relative name, and how to read a small one of them.

    `linked_folders` are symbolic links to folders. They are refused, because what they hold would be left out.
    """

    names: tuple[str, ...]
    read: Callable[[str], bytes]
    linked_folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileSelection:
    """Files to read, files of other splits or subsets, and files that are ignored by name."""

    files: tuple[str, ...]
    other_splits: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def found(self) -> int:
        """The number of all files."""
        return len(self.files) + len(self.other_splits) + len(self.ignored)


@dataclass(frozen=True)
class Choice:
    """What a source says about its files. `split` None means the rows of all splits."""

    split: str | None = "train"
    subset: str = ""
    ignore_files: tuple[str, ...] = ()


def candidates(tree: Tree, choice: Choice, what: str) -> list[str]:
    """The files that decide what `select` returns, and those that it may return. Needs no YAML. Raises SftError."""
    names = _sorted(tree.names)
    if _has_configs(tree, names):
        return [name for name in names if name == "README.md" or (row_format(name) and not is_hidden(name))]
    selection = select(tree, choice, what)
    return list(selection.files)


def select(tree: Tree, choice: Choice, what: str) -> FileSelection:
    """The files of a dataset. `what` opens every message. Raises SftError for a dataset that no rule reads completely."""
    selection = _select(tree, choice, what)
    if missing := absent(tree.names, selection.files, choice.ignore_files):
        raise SftError(
            f"{what}: missing files: {first_names(missing)}; next: fetch them, or add ignore_files with their names to the source"
        )
    return selection


def _select(tree: Tree, choice: Choice, what: str) -> FileSelection:
    names = _sorted(tree.names)
    if tokens := [name for name in names if fnmatch.fnmatchcase(name.rpartition("/")[2], "token_ids_part_*.npy")]:
        raise SftError(
            f"{what}: {tokens[0]} has token ids, and a source has conversations; next: name the conversations that it was made of:"
            " make import-config FROM=script writes a recipe from the commands of convert_sft_data_for_olmocore.py and Olmo-sft.py in one file"
        )
    if "dataset_dict.json" in names:
        return _saved_dict(tree, names, choice, what)
    if "state.json" in names:
        return _saved(tree, names, "", choice, what)
    if _has_configs(tree, names):
        return _of_config(tree, names, _configs(_front_matter(tree), what), choice, what)
    rows, ignored = _sort_out(tree, names, choice.ignore_files, what)
    if choice.subset:
        raise SftError(f"{what}: subset {choice.subset!r}: the dataset has no subsets; {CORRECT}")
    _refuse_nested_configs(tree, rows, names, choice.ignore_files, what)
    selection = _of_split(rows, ignored, choice.split, what)
    _check_saved_splits(tree, selection.files, choice, what)
    return selection


def check_single(name: str, choice: Choice, what: str) -> None:
    """Checks the options of a source whose path is one file. Raises SftError for an option that cannot apply."""
    if row_format(name) is None:
        raise SftError(f"{what}: {kinds()}; next: convert it or name another file")
    if choice.subset:
        raise SftError(f"{what}: subset {choice.subset!r}: the path is one file; {CORRECT}")
    if choice.split not in (None, "train") and known_split(choice.split) != split_of(name):
        raise SftError(f"{what}: split {choice.split!r}: the path is one file, which is read whole; {CORRECT}")
    if choice.ignore_files:
        raise SftError(f"{what}: ignore_files {list(choice.ignore_files)}: the path is one file; {CORRECT}")


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name.split("/"))


def _sort_out(tree: Tree, names: Sequence[str], ignore: Sequence[str], what: str) -> tuple[list[str], list[str]]:
    """(files with rows, files that are ignored by name). Raises SftError that lists every other file."""
    rows: list[str] = []
    ignored: list[str] = []
    unread: list[str] = []
    passed = [glob(pattern) for pattern in ignore]
    listed = _listed(tree, names, what)
    for name in names:
        last = name.lower().rpartition("/")[2]
        described = last in DESCRIPTIONS or any(fnmatch.fnmatchcase(last, pattern) for pattern in CACHES)
        unlisted = row_format(name) is not None and name not in listed.get(name.rpartition("/")[0], (name,))
        if is_hidden(name) or described or unlisted or any(p.fullmatch(name) for p in passed):
            ignored.append(name)
        elif row_format(name):
            rows.append(name)
        elif _is_documentation(name):
            ignored.append(name)
        else:
            unread.append(name)
    links = [f"{n}/ (a link to a folder)" for n in tree.linked_folders if not any(p.fullmatch(n) for p in passed)]
    _check_ignored(ignore, [*names, *tree.linked_folders, *absent(names, names)], what)
    if unread or links:
        example = _patterns_of([*unread, *tree.linked_folders], rows)
        raise SftError(
            f"{what}: cannot read {len(unread + links)} of its files: {first_names(unread + links)}; {kinds()}; next: convert or remove"
            f" them, or add ignore_files = {example} to the source"
        )
    if not rows:
        raise SftError(f"{what}: no file with rows; {kinds()}; {CORRECT}")
    return rows, ignored


def _patterns_of(unread: Sequence[str], read: Collection[str]) -> str:
    """`ignore_files` for all of these names, as TOML: the names, or where they are many, patterns that match none of the files to read."""
    made = {name: name if len(unread) <= MOST_LISTED else "**/*" + PurePosixPath(name).suffix for name in unread}
    taken = {pattern for pattern in set(made.values()) if any(map(glob(pattern).fullmatch, read))}
    return to_toml(list(dict.fromkeys(name if p in taken else p for name, p in made.items())))


def _is_documentation(name: str) -> bool:
    last = name.lower().rpartition("/")[2]
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in DOCUMENTATION)


def _listed(tree: Tree, names: Sequence[str], what: str) -> dict[str, tuple[str, ...]]:
    """{folder: the files of the saved dataset in it}, for the saved datasets inside a folder."""
    tops = [name.removesuffix("state.json") for name in names if name.endswith("/state.json") and not is_hidden(name)]
    return {top[:-1]: _saved(tree, names, top, Choice(None), what).files for top in tops}


def _check_ignored(ignore: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raises SftError for a pattern that no file matches: a wrong name must not be taken for an answer."""
    for pattern in ignore:
        if not any(map(glob(pattern).fullmatch, names)):
            raise SftError(f"{what}: ignore_files: no file matches {pattern!r}{_near(pattern, names)}; {CORRECT}")


def _of_split(rows: list[str], ignored: list[str], split: str | None, what: str) -> FileSelection:
    """Rule 4: by words in names."""
    if split is None:
        return FileSelection(tuple(rows), ignored=tuple(ignored))
    shards = [_SHARD.fullmatch(name) for name in rows]
    named = {n: m[1] for n, m in zip(rows, shards, strict=True) if m} if all(shards) else {n: split_of(n) for n in rows}
    found = _sorted({s for s in named.values() if s})
    if unclear := [name for name, s in named.items() if " or " in s]:
        raise SftError(
            f"{what}: {first_names(unclear)}: the name says {named[unclear[0]]}; next: rename it, or name one file or folder as the path"
        )
    if not found:
        if known_split(split) != "train":
            raise SftError(f"{what}: split {split!r}: no file or folder names a split, so all are 'train'; {CORRECT}")
        return FileSelection(tuple(rows), ignored=tuple(ignored))
    if unnamed := [name for name, s in named.items() if not s]:
        raise SftError(
            f"{what}: {first_names(unnamed)}: no split in the name, although others have one ({', '.join(found)}); next: name one file or"
            f" folder as the path, or add ignore_files = {_patterns_of(unnamed, set(rows) - set(unnamed))} to the source"
        )
    wanted = split if split in found else known_split(split)
    if wanted not in found:
        raise SftError(f"{what}: split {split!r}: the splits are {', '.join(found)}{_near(split, found)}; {CORRECT}")
    chosen = tuple(name for name, s in named.items() if s == wanted)
    return FileSelection(chosen, tuple(n for n in rows if named[n] != wanted), tuple(ignored))


def _saved_dict(tree: Tree, names: Sequence[str], choice: Choice, what: str) -> FileSelection:
    """Rule 1."""
    _refuse_saved_options(choice, what)
    value = _json(tree, "dataset_dict.json", what)
    splits = value.get("splits") if isinstance(value, dict) else None
    if not isinstance(splits, list) or not splits or not all(isinstance(s, str) for s in splits):
        raise SftError(f"{what}: dataset_dict.json is damaged: no list of splits; next: save the dataset again")
    if choice.split is not None and choice.split not in splits:
        raise SftError(
            f"{what}: split {choice.split!r}: the splits are {', '.join(splits)}{_near(choice.split, splits)}; {CORRECT}"
        )
    read = splits if choice.split is None else [choice.split]
    files = tuple(name for split in read for name in _saved(tree, names, f"{split}/", Choice(None), what).files)
    others = tuple(n for n in names if n.split("/")[0] in splits and n.split("/")[0] not in read)
    return FileSelection(files, others, tuple(n for n in names if n not in {*files, *others}))


def _saved(tree: Tree, names: Sequence[str], top: str, choice: Choice, what: str) -> FileSelection:
    """Rule 2. `top` is the folder of the saved dataset, with a slash, or ''."""
    _refuse_saved_options(choice, what)
    if f"{top}state.json" not in names:
        raise SftError(f"{what}: {top}state.json is missing; next: save the dataset again")
    value = _json(tree, f"{top}state.json", what)
    try:
        listed = [f"{top}{entry['filename']}" for entry in value["_data_files"]]
        saved_split = value.get("_split")
    except (KeyError, TypeError, AttributeError):
        raise SftError(f"{what}: {top}state.json is damaged: no _data_files; next: save the dataset again") from None
    _check_saved_split(saved_split, choice.split, f"{top}state.json", what)
    if missing := [name for name in listed if name not in names]:
        raise SftError(
            f"{what}: {first_names(missing)}: listed in {top}state.json and missing; next: copy the folder again"
        )
    return FileSelection(tuple(listed), ignored=tuple(n for n in names if n not in listed))


def _check_saved_split(saved: Any, split: str | None, state: str, what: str) -> None:
    """Raises SftError unless a saved dataset has the split. 'train[:10%]' is a part of 'train'. Without a name it is 'train'."""
    parts = {re.sub(r"\[.*\]$", "", part.strip()) for part in str(saved or "train").split("+")}
    if split not in (None, saved) and {known_split(part) for part in parts} != {known_split(str(split))}:
        named = (
            f"of split {saved!r}; next: set split = {json.dumps(saved)}" if saved else f"of no named split; {CORRECT}"
        )
        raise SftError(f"{what}: split {split!r}: the folder holds one saved dataset ({state}) {named}")


def _check_saved_splits(tree: Tree, files: Sequence[str], choice: Choice, what: str) -> None:
    """Raises SftError for a saved dataset inside a folder that says another split than the names do."""
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in files):
        if f"{folder}/state.json" in tree.names:
            saved = _json(tree, f"{folder}/state.json", what).get("_split")
            _check_saved_split(saved, choice.split if saved else None, f"{folder}/state.json", what)


def _refuse_nested_configs(
    tree: Tree, rows: Sequence[str], names: Sequence[str], ignore: Sequence[str], what: str
) -> None:
    """Raises SftError for a folder inside this one whose README.md chooses among its files, unless `ignore` matches the README.md."""
    for name in names:
        folder = name.removesuffix("README.md")
        chooses = name.endswith("/README.md") and any(row.startswith(folder) for row in rows)
        if chooses and not any(glob(pattern).fullmatch(name) for pattern in ignore) and _has_configs(tree, names, name):
            raise SftError(
                f"{what}: {name} has configs, which choose the files of that folder; next: name the folder {folder[:-1]} as a source of"
                f' its own, or read all of its files with ignore_files = ["{name}"]'
            )


def _refuse_saved_options(choice: Choice, what: str) -> None:
    if choice.subset:
        raise SftError(f"{what}: subset {choice.subset!r}: a saved dataset has no subsets; {CORRECT}")
    if choice.ignore_files:
        raise SftError(f"{what}: ignore_files: a saved dataset lists its files in state.json; {CORRECT}")


def _has_configs(tree: Tree, names: Sequence[str], readme: str = "README.md") -> bool:
    return (
        readme in names
        and re.search(r"^[\"']?configs[\"']?\s*:", _front_matter(tree, readme), re.MULTILINE) is not None
    )


def _front_matter(tree: Tree, readme: str = "README.md") -> str:
    """The YAML at the top of a README.md, or ''."""
    text = tree.read(readme).decode("utf-8-sig", "replace")
    found = re.match(r"\s*---[ \t]*\r?\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    return found[1] if found else ""


def _configs(front: str, what: str) -> dict[str, Mapping[str, Any]]:
    """{name: configuration} of a front matter. Raises SftError."""
    import yaml  # start-up: the planner runs without PyYAML and never comes here

    try:
        configs = yaml.safe_load(front)["configs"]
        if configs and all(isinstance(c, dict) and c.get("config_name") for c in configs):
            named = Counter(str(c["config_name"]) for c in configs)
            if repeated := [name for name, times in named.items() if times > 1]:
                raise SftError(f"{what}: README.md has several subsets {repeated[0]!r}; next: correct it")
            return {str(c["config_name"]): c for c in configs}
    except (yaml.YAMLError, TypeError, KeyError):
        pass
    raise SftError(f"{what}: README.md: its 'configs' cannot be read; next: correct or remove that README.md")


def _of_config(
    tree: Tree, names: Sequence[str], configs: Mapping[str, Mapping[str, Any]], choice: Choice, what: str
) -> FileSelection:
    """Rule 3."""
    default = [n for n, c in configs.items() if c.get("default") or n == "default"] or (
        list(configs) if len(configs) == 1 else []
    )
    if len(default) > 1 and not choice.subset:
        raise SftError(
            f"{what}: README.md has several defaults: {', '.join(default)}; next: name one as the source's subset"
        )
    name = choice.subset or (default[0] if default else "")
    if name not in configs:
        problem = f"subset {choice.subset!r}" if choice.subset else "several subsets and none is the default"
        raise SftError(f"{what}: {problem}: the subsets are {', '.join(configs)}{_near(name, configs)}; {CORRECT}")
    _check_ignored(choice.ignore_files, [*names, *absent(names, names)], what)
    config = configs[name]
    by_split = _patterns(config, what)
    top = posixpath.normpath(str(config.get("data_dir") or "."))
    top = "" if top == "." else f"{top}/"
    if by_split is None:  # the folder alone, or nothing: names say the split
        inside = Tree(tuple(n for n in names if n.startswith(top) and n != "README.md"), tree.read, tree.linked_folders)
        rows, ignored = _sort_out(inside, inside.names, (), f"{what} (subset {name})")
        rows = [n for n in rows if not any(glob(pattern).fullmatch(n) for pattern in choice.ignore_files)]
        chosen = _of_split(rows, ignored, choice.split, f"{what} (subset {name})").files
    else:
        inside_top = {s: [top + p.removeprefix("./") for p in patterns] for s, patterns in by_split.items()}
        chosen = _matching(names, inside_top, choice, f"{what}: subset {name!r}")
    _check_options(config, chosen, f"{what}: subset {name!r}")
    others = tuple(n for n in names if row_format(n) and not is_hidden(n) and n not in chosen)
    return FileSelection(chosen, others, tuple(n for n in names if n not in {*chosen, *others}))


def _check_options(config: Mapping[str, Any], files: Sequence[str], what: str) -> None:
    """Raises SftError for an option of the `datasets` library that reads the files otherwise than they are read here."""
    delimiters = ("\t",) if all("tsv" in str(row_format(name)) for name in files) else (",",)
    followed = {"header": (0, "infer"), "encoding": ("utf-8", "utf8"), "sep": delimiters, "delimiter": delimiters}
    for option in READING_OPTIONS:
        if config.get(option) is not None and config[option] not in followed.get(option, ()):
            raise SftError(
                f"{what}: README.md sets {option} = {config[option]!r}, and nothing here reads it; next: convert the files to .jsonl, or name"
                " one of them as the path"
            )


def _matching(names: Sequence[str], by_split: Mapping[str, list[str]], choice: Choice, what: str) -> tuple[str, ...]:
    """The files that a configuration's patterns name. Raises SftError for an unknown split, an absent file, and other formats."""
    if choice.split is not None and choice.split not in by_split:
        raise SftError(
            f"{what}, split {choice.split!r}: the splits are {', '.join(by_split)}{_near(choice.split, by_split)}; {CORRECT}"
        )
    chosen: set[str] = set()
    for pattern in [p for s, paths in by_split.items() if choice.split in (None, s) for p in paths]:
        matcher = glob(pattern)
        found = [
            n for n in names if matcher.fullmatch(n) and not ("*" in pattern and (is_hidden(n) or _is_documentation(n)))
        ]
        if not found:
            raise SftError(
                f"{what}: no file matches {pattern!r} of README.md; next: fetch the missing files, or correct README.md"
            )
        chosen.update(found)
    chosen = {n for n in chosen if not any(glob(pattern).fullmatch(n) for pattern in choice.ignore_files)}
    if unread := _sorted(n for n in chosen if row_format(n) is None):
        raise SftError(
            f"{what}: {first_names(unread)}: named by README.md and not read; {kinds()}; next: convert them, or add"
            f" ignore_files = {_patterns_of(unread, chosen - set(unread))} to the source"
        )
    return tuple(_sorted(chosen))


def _patterns(config: Mapping[str, Any], what: str) -> dict[str, list[str]] | None:
    """{split: patterns} of a configuration, in any of the forms that the hub documents; None where it names no files."""
    files = config.get("data_files")
    if files is None:
        return None
    try:
        if isinstance(files, dict):
            return {str(s): _texts(p) for s, p in files.items()}
        if isinstance(files, list) and any(isinstance(f, dict) for f in files):
            by_split: dict[str, list[str]] = {}
            for file in files:
                by_split.setdefault(str(file["split"]), []).extend(_texts(file["path"]))
            return by_split
    except (KeyError, TypeError):
        raise SftError(f"{what}: README.md: 'data_files' {str(files)[:80]} cannot be read; next: correct it") from None
    return {"train": _texts(files)}


def _texts(value: Any) -> list[str]:
    return [str(v) for v in (value if isinstance(value, list) else [value])]


def _json(tree: Tree, name: str, what: str) -> Any:
    try:
        return json.loads(tree.read(name))
    except (OSError, ValueError, KeyError) as error:
        raise SftError(f"{what}: {name} is damaged or missing ({error}); next: save the dataset again") from None


def local_tree(root: Path, what: str) -> Tree:
    """The files of a folder. Links to files may lead into the folder, and in a hub cache to its own blobs. Raises SftError.

    Hidden folders such as .git are one name each; nothing in them is read.
    """
    if (root / "snapshots").is_dir() and (root / "blobs").is_dir():
        main = root / "refs" / "main"  # the commit that was fetched last, if it was fetched by this name
        commits = sorted(p.name for p in (root / "snapshots").iterdir()) + (
            [main.read_text()] if main.is_file() else []
        )
        raise SftError(
            f"{what}: {root} is the hub's cache of a repository; next: name {root.name}/snapshots/{commits[-1] if commits else '<commit>'}"
        )
    names: list[str] = []
    linked: list[str] = []
    base = root.resolve()
    snapshots = next((p for p in (base, *base.parents) if p.parent.name == "snapshots"), None)
    inside = (base, snapshots.parents[1] / "blobs") if snapshots else (base,)
    for entry in _walk(root):
        path = Path(entry.path)
        name = path.relative_to(root).as_posix()
        if is_hidden(name):
            names.append(name)
            continue
        if entry.is_symlink():
            try:
                target = path.resolve()
            except RuntimeError:  # Python 3.13 follows as far as it can, and then the link leads to nothing
                raise SftError(f"{what}: {path} is a link to itself; next: fetch the file again") from None
            if not any(target.is_relative_to(folder) for folder in inside):
                raise SftError(f"{what}: {path} is a link that leaves {root}; next: copy the file there")
            if not target.exists():
                raise SftError(f"{what}: {path} is a link to nothing; next: fetch the file again")
            if target.is_dir():
                linked.append(name)
                continue
        if not entry.is_file():
            raise SftError(f"{what}: {path} is neither a file nor a folder; next: remove it")
        names.append(name)
    return Tree(tuple(names), lambda name: (root / name).read_bytes(), tuple(linked))


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything in a folder but its folders, except for hidden ones and links."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _walk(Path(entry.path))
            else:
                yield entry


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""
