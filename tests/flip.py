"""make flip [N=3] [ONLY=part of a name]: damages every kind of file of a finished run, and looks who finds it.

    .venv/bin/python tests/flip.py [N] [part of a name]

In:  a tiny run, prepare to report, made in a copy of this checkout. Damage: a bit at a random place, a cut at half, a deletion; N files of each kind.
Out: a table of kind (numbers and hashes in its name are N), damages, and how many `make verify` and the readers named. A kind that neither
     names must be in HARMLESS, which says why. Exit status 1 for any other.

The readers are what the next stage does first: it verifies the folders of earlier stages and the synced copy, reads the mark of training, and
the report's files.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import soak
from sft.common.errors import SftError
from sft.formats.identity import read_identity
from sft.formats.run import RunFile
from sft.reporting.run_files import RunFiles
from sft.runner.upstream import Upstream
from sft.runner.verify import verify

HARMLESS = {
    "*.lock": "names a holder; the lock itself is the kernel's",
    "*.log": "for people",
    "*/.steps.lock": "empty",
    ".cache/hashes.json": "an entry has a CRC; without one the file is read again",
    ".cache/packs/*": "the index is compared with its digest when it is read, and made again",
    ".cache/prepare/*/manifest.json": "a shared result that is not whole is made again",
    ".cache/prepare/*": "a hard link to the run's file, where it is found, or made again",
    ".cache/tokens/*": "every read is compared with its checksum, and made again",
    ".cache/datasets/*": "made again from the task's file",
    ".cache/tokenizers/*": "an empty mark of a tokenizer that was checked; it is checked again",
    "soak/train/.metrics/*": "a copy of the records, which are in the manifest",
    "soak/train/BEST": "metrics.jsonl has the losses from which it follows",
    "soak/report/*": "made again from the run",
}


def damages(file: Path, chance: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, how) of the damages of a file. An empty file can only be deleted."""
    data = file.read_bytes()
    if data:
        at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        yield "bit", lambda: rewritten(file, flipped)
        yield "cut", lambda: rewritten(file, data[: len(data) // 2])
    yield "gone", file.unlink


def rewritten(file: Path, data: bytes) -> None:
    """Other bytes in the same inode, as a bad disk has them: hard links see them too."""
    with file.open("r+b") as stream:
        stream.write(data)
        stream.truncate()


def kind(name: str) -> str:
    """The name without its numbers and hashes."""
    return re.sub(r"\d+", "N", re.sub(r"[0-9a-f]{16,}", "N", name))


def named_by_verify(run: Path, file: Path) -> bool:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            verify(run, run.parent / ".cache")
        except SftError:
            return names(said.getvalue(), file)
    return False


def names(text: str, file: Path) -> bool:
    """Whether a message has the file's name, or that of the step or stage that it makes incomplete."""
    return file.name in text or str(file.parent) in text


def named_by_reader(run: Path, file: Path) -> bool:
    """Whether one of the next stages refuses to go on, and names the file."""
    for read in readers(run):
        try:
            read()
        except (SftError, OSError) as error:
            return names(str(error), file)
    return False


def readers(run: Path) -> Iterator[Callable[[], object]]:
    for stage, earlier in (("sync", "prepare"), ("train", "sync"), ("convert", "train"), ("evaluate", "convert")):
        upstream = Upstream(run, stage, "soak", run.parent / ".cache", False, print)
        yield lambda upstream=upstream, earlier=earlier: upstream.folder(earlier)
        if stage == "train":
            yield upstream.dataset
    yield lambda: read_identity(run / "train")
    yield lambda: RunFile.read(run / "run.json")
    shown = RunFiles(run)
    yield lambda: (shown.dataset, shown.preview, shown.train, shown.steps, shown.convert, shown.gate, shown.results)


def flip(
    runs: Path, most: int, only: str = "", seed: int = 0, both: bool = True
) -> list[tuple[str, Counter[str], str]]:
    """(kind, what happened, why it is harmless or "") for every kind of file below `runs`.

    `both`: the readers also look at what `make verify` has named.
    """
    chance, kinds = random.Random(seed), defaultdict(list)
    for file in sorted(p for p in runs.rglob("*") if p.is_file() and not p.is_symlink()):
        kinds[kind(file.relative_to(runs).as_posix())].append(file)
    table = []
    for name, files in sorted(kinds.items()):
        seen: Counter[str] = Counter()
        for file in chance.sample(files, min(most, len(files))) if only in name else ():
            whole, info = file.read_bytes(), file.stat()
            for what, damage in damages(file, chance):
                damage()
                seen["damages"] += 1
                verified = named_by_verify(runs / "soak", file)
                found = verified, (both or not verified) and named_by_reader(runs / "soak", file)
                seen["verify"], seen["reader"] = seen["verify"] + found[0], seen["reader"] + found[1]
                seen["named"] += any(found)
                if what == "gone":
                    file.write_bytes(whole)
                    file.chmod(info.st_mode)
                else:
                    rewritten(file, whole)
                if not any(found):
                    seen[what] += 1
        if seen:
            why = next((why for pattern, why in HARMLESS.items() if fnmatch.fnmatchcase(name, pattern)), "")
            table.append((name, seen, why))
    return table


def main(words: Sequence[str]) -> int:
    most, only = int(words[0]) if words and words[0] else 3, " ".join(words[1:])
    with tempfile.TemporaryDirectory(prefix="flip-") as folder, soak.opened(Path(folder)) as made:
        for stage in (*soak.STAGES, "report"):
            made.undisturbed(stage)
        with contextlib.chdir(made.place):
            table = flip(made.place / "runs", most, only)
    missed = 0
    print(f"{'kind of file':58}{'damages':>8}{'verify':>7}{'reader':>7}  otherwise")
    for name, seen, why in table:
        lost = [f"{what} {seen[what]}" for what in ("bit", "cut", "gone") if seen[what]]
        wrong = bool(lost) and not why
        missed += wrong
        rest = why if lost else ""
        print(
            f"{name[:57]:58}{seen['damages']:>8}{seen['verify']:>7}{seen['reader']:>7}  {'NOT FOUND: ' + ', '.join(lost) if wrong else rest}"
        )
    print(f"{len(table) - missed} of {len(table)} kinds of files: damage is found and named, or harmless")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
