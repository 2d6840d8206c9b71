"""The house style of prose: plain English in documents, messages and the meanings of fields (make check).

    python tests/prose.py [FILE …]       prints "file:line: fault" for each fault, and exits with 1 where there is one

A sentence has at most WORDS words, one semicolon and one colon. A paragraph has at most PARAGRAPH words. Words of RIDDLES have a
plainer one beside them. Code, tables of code, links' addresses and headings count as nothing. Standard library only.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
WORDS, PARAGRAPH = 30, 100
RELATIVES = 3
"""So many of which, whose and that in one sentence are hard to follow."""
RECORDS = {"RESULTS.md"}
"""Records of measurements: entries keep their words, and only riddles are looked for."""
RIDDLES = {
    r"whom": "who",
    r"that which": "what",
    r"whosever|whoever's": "anyone's",
    r"whence|thence|hence|thereof|therein|wherein|whereby|thereby": "say it in two sentences",
    r"in place of": "instead of",
    r"anew": "again",
    r"aloud": "say what is printed",
    r"lest": "so that … not",
    r"but for": "except for",
    r"with a word": "and says so",
    r"without a word": "silently",
    r"as of now|at the present time": "now",
    r"in order to": "to",
    r"due to the fact that": "because",
    r"utili[sz]e[sd]?|utili[sz]ing": "use",
    r"prior to": "before",
    r"is able to|are able to": "can",
    r"it should be noted that|please note that": "say it",
    r"whatsoever|howsoever": "any",
    r"upon": "on",
    r"for ever": "forever",
    r"of one's own|one's own": "your own",
    r"to and fro|as it were|so to speak": "leave it out",
    r"telegraphic": "short",
    r"hand(?:s|ed)? back|handback": "return, results",
    r"wires": "transport",
    r"stepwise": "llama3_rope",
    r"leader_first": "on_rank0",
    r"is told|are told": "is printed, is logged",
    r"tells how": "says how",
    r"makes nothing of": "does not …",
    r"lies? as": "is stored as",
    r"is no part of": "is not part of",
    r"counts for nobody": "is not counted",
    r"nobody reads": "nothing reads",
    r"where there is none": "if there is none",
    r"where there are any": "if there are any",
}
"""{pattern of a word or phrase: what to write}, from the style of the project."""
ANY = re.compile(rf"\b(?:{'|'.join(RIDDLES)})\b", re.IGNORECASE)
INVERSIONS = r"(?:Of (?:a|an|the|those|these|which|what|sources?|tasks?|servers?|checkpoints?)\b[^.,]*, |Behind (?:a|an|the) |Nor |Neither (?:is|are|does) )"
"""Sentences that begin with what they end in."""


def main(names: list[str]) -> int:
    found = [fault for path in (map(Path, names) if names else sources()) for fault in faults(path.resolve())]
    for fault in found:
        print(fault)
    if found:
        print(
            f"prose: {len(found)} faults; next: write shorter, plainer sentences (CONTRIBUTING.md, Prose)",
            file=sys.stderr,
        )
    return int(bool(found))


def sources() -> list[Path]:
    """The documents, and the code whose messages people read."""
    documents = [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / ".github").rglob("*.md")]
    return sorted([*documents, *(REPO / "lib" / "sft").rglob("*.py"), REPO / "Makefile"])


def faults(path: Path) -> Iterator[str]:
    """ "file:line: fault" for each fault of a file."""
    name = path.relative_to(REPO) if path.is_relative_to(REPO) else path
    text = path.read_text(encoding="utf-8")
    record = path.name in RECORDS
    if path.suffix == ".py":
        pieces: Iterator[tuple[int, str]] = messages(text) if ANY.search(text) else iter(())
    elif path.name == "Makefile":
        pieces = ((n, line.partition("## ")[2]) for n, line in enumerate(text.splitlines(), 1) if "## " in line)
    else:
        pieces = blocks(text)
    for line, piece in pieces:
        judged = judge(piece) if path.suffix == ".md" and not record else riddles(piece)
        yield from (f"{name}:{line}: {fault}" for fault in judged)


def judge(text: str) -> Iterator[str]:
    """The faults of one paragraph, item or cell."""
    if (words := count(text)) > PARAGRAPH:
        yield f"a paragraph of {words} words; at most {PARAGRAPH}: split it, or make a list or a table"
    for sentence in sentences(text):
        shown = " ".join(sentence.split()[:6]) + " …"
        if (words := count(sentence)) > WORDS:
            yield f"a sentence of {words} words, at most {WORDS}: {shown}"
        for sign, most in ((";", 1), (": ", 2)):
            if sentence.count(sign) > most:
                yield f"{sentence.count(sign)} of {sign.strip()!r} in one sentence: {shown}"
        if len(re.findall(r"\b(?:which|whose|that)\b", sentence)) > RELATIVES:
            yield f"a chain of which and that: {shown}"
        if re.match(INVERSIONS, sentence):
            yield f"an inversion, begin with who does it: {shown}"
    yield from riddles(text)


def riddles(text: str) -> Iterator[str]:
    for pattern, better in RIDDLES.items() if ANY.search(text) else ():
        if match := re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
            yield f"{match[0]!r}; write: {better}"


def count(text: str) -> int:
    """Words of prose. Code is one word."""
    return len(re.findall(r"[^\W_][\w'’.,-]*|`", re.sub(r"`", "", text))) + text.count("`")


def sentences(text: str) -> list[str]:
    """A text in sentences. A period before a small letter, and that of an abbreviation, end none."""
    safe = re.sub(r"\b(e\.g|i\.e|vs|etc|Fig|No)\.", lambda m: m[0].replace(".", "\0"), text)
    return [
        s.replace("\0", ".") for s in re.split(r"(?<=[.!?])[\"')*\]]*\s+(?=[\"'(\[*]*[A-Z0-9`…])", safe) if s.strip()
    ]


def plain(text: str) -> str:
    """Markdown without its signs: code as a backtick, links as their words."""
    text = re.sub(r"`[^`]*`", "`", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)|<[^>]*>", "", " ".join(text.split()))


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each paragraph, list item and cell of Markdown, without code and headings."""
    lines, fenced, start, held = text.splitlines(), False, 0, []  # held: the lines of the block so far
    for number, line in enumerate([*lines, ""], 1):
        fence = line.lstrip().startswith("```")
        code = fenced or fence or (line.startswith("    ") and not held)
        ends = code or not line.strip() or line.startswith("#") or line.lstrip().startswith("|")
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        if held and (ends or item):
            yield start, plain("\n".join(held))
            held = []
        if fence:
            fenced = not fenced
        elif line.lstrip().startswith("|") and not fenced:
            yield from ((number, plain(cell)) for cell in line.strip().strip("|").split(" | "))
        elif not ends:
            start = start if held else number
            held.append(line[item.end() :] if item else line)


def messages(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what code says: the texts of raised errors, of calls like `warn`, and the meanings of options."""
    spoken = {"warn", "warning", "info", "note", "error", "opt", "print", "RED", "log", "say"}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in spoken or name.endswith("Error"):
            for value in [*node.args, *(k.value for k in node.keywords)]:
                for part in ast.walk(value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                        yield part.lineno, re.sub(r"`[^`]*`", "`", part.value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
