"""A tokenizer folder: its facts, its encoders, its identity, and the proof that transformers rebuilds the same tokenizer.

In: a folder with tokenizer.json and tokenizer_config.json. Out: `Vocabulary` (special tokens, bytes of every token, hash and
canary ids), `Engine` (texts to ids, by gigatoken where it is importable and understands the tokenizer, else by `tokenizers`),
and `save` / `check_rebuilt` for the folder that travels with the data. tokenizer.json is the truth: what transformers
makes of tokenizer_config.json is only compared with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sft.common.errors import SftError
from sft.data.compiled import TRAINED, WORD, walk, words_of

# Where pre-tokenizers are known to differ: contractions, digit groups, runs of spaces and newlines, tabs, accents, CJK,
# joined emoji, code, and a number next to letters.
CANARIES = (
    "It's the 1234567th time, isn't it? I'LL see 3.14159.",
    "  two spaces,\ttab\n\n\nthree newlines \n and   a tail   ",
    "naïve café — übergroß, Ελληνικά, русский, 日本語の文章、한국어",
    "👩‍👩‍👧‍👦 e\u0301 \u200b ﬁ",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 22, 333, 4444]}\r\n",
    "http://example.org/a_b?c=d&e=%20 3km 10x A1B2",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Walk:
    """What following the ids through their text finds. `tokens` are ids with the bit TRAINED; `offsets[d]` is the first token of
    document d, then the number of all; the others have one entry for each document."""

    ids: Ids
    tokens: Ids
    offsets: Offsets
    labels: Offsets  # trained tokens
    specials: Offsets  # special tokens
    straddled: Offsets  # edges of runs inside a token, which is then not trained
    last: Ids  # the last id that is trained
    eoses: Ids  # how often EOS stands in it, plus TRAINED when it is the last token

    @property
    def ended(self) -> npt.NDArray[np.bool_]:
        """The documents that end in the only EOS they have."""
        return self.eoses == (TRAINED | 1)

    @property
    def lengths(self) -> Offsets:
        return np.diff(self.offsets)

    def only(self, keep: npt.NDArray[np.bool_]) -> Walk:
        """The documents that are kept."""
        lengths = self.lengths
        tokens = np.repeat(keep, lengths)
        return Walk(
            self.ids[tokens], self.tokens[tokens], np.cumsum([0, *lengths[keep]]), self.labels[keep], self.specials[keep],
            self.straddled[keep], self.last[keep], self.eoses[keep],
        )  # fmt: skip


def read_text(path: Path, what: str, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SftError(f"{path}: {what}: cannot be read: {error.strerror}; next: {advice}") from None
    except UnicodeDecodeError as error:
        raise SftError(f"{path}: {what}: not UTF-8: {error}; next: {advice}") from None


class Vocabulary:
    """The facts of a tokenizer folder, read from its files without transformers."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise SftError(
                f"{path}: not found; prepare.tokenizer = {str(folder)!r} must be a folder with tokenizer.json; next: save the tokenizer there"
                " with transformers' save_pretrained"
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SftError(f"{path}: cannot be read: {error.strerror}; next: make it readable") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.json: dict[str, Any] = json.loads(data)
            self.tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise SftError(f"{path}: not a tokenizer: {error}; next: fetch the file again") from None
        self.config = self._config("tokenizer_config.json")
        self.variables = self._variables()
        added = self.json.get("added_tokens") or []
        self.added = {token["content"]: int(token["id"]) for token in added}
        self.specials = {token["content"]: int(token["id"]) for token in added if token["special"]}
        self.size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos, self.eos_id = self._named("eos_token")
        if self.eos not in self.specials:
            self.specials[self.eos] = self.eos_id
        pad = self.variables.get("pad_token")
        self.pad_id = self.eos_id if pad is None else self._named("pad_token")[1]
        self.byte_level = self._byte_level(added)
        self.token_bytes = self._token_bytes() if self.byte_level else []
        self.lengths = np.array(list(map(len, self.token_bytes)), dtype=np.uint16)
        self.where = np.cumsum(self.lengths, dtype=np.uint32) - self.lengths
        self.spelled = np.frombuffer(b"".join(self.token_bytes) + bytes(WORD), dtype=np.uint8)
        self.words = np.frombuffer(b"".join(token[:WORD].ljust(WORD, b"\0") for token in self.token_bytes), dtype="<u8")
        unknown = self.json["model"].get("unk_token")
        self.unk_id = self.json["model"].get("unk_id") if unknown is None else self.tokenizer.token_to_id(unknown)
        self.first_special = min(self.specials.values())
        self.is_special = np.zeros(self.size, dtype=bool)
        self.is_special[list(self.specials.values())] = True

    def _config(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            return {}
        try:
            config = json.loads(read_text(path, "prepare.tokenizer", "fetch the file again"))
        except (ValueError, RecursionError) as error:
            raise SftError(f"{path}: not JSON: {error}; next: fetch the file again") from None
        if not isinstance(config, dict):
            raise SftError(f"{path}: holds {type(config).__name__}, not an object; next: fetch the file again")
        return config

    def _variables(self) -> dict[str, str]:
        """The named special tokens, which templates read as eos_token, bos_token, …"""
        found: dict[str, str] = {}
        for source in (self._config("special_tokens_map.json"), self.config):
            for name in NAMED:
                value = source.get(name)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    found[name] = value
        return found

    def _named(self, name: str) -> tuple[str, int]:
        text = self.variables.get(name)
        number = None if text is None else self.tokenizer.token_to_id(text)
        if text is None or number is None:
            raise SftError(
                f"{self.folder}/tokenizer_config.json: {name} is {text!r}, which is not a token of tokenizer.json; next: name one that is"
            )
        return text, number

    def _byte_level(self, added: list[dict]) -> bool:
        """Whether every token stands for fixed bytes, wherever it occurs, and special tokens cut the text around them cleanly."""
        model, pre, normalizer = self.json["model"], self.json.get("pre_tokenizer"), self.json.get("normalizer")
        parts = [] if pre is None else pre.get("pretokenizers", [pre])
        levels = [part for part in parts if part["type"] == "ByteLevel"]
        decoder = self.json.get("decoder") or {}
        return (
            normalizer is None
            and model["type"] == "BPE"
            and not model.get("byte_fallback")
            and decoder.get("type") == "ByteLevel"
            and len(levels) == 1
            and not levels[0].get("add_prefix_space", True)
            and all(part["type"] in ("ByteLevel", "Split", "Digits", "Punctuation") for part in parts)
            and not any(
                token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"] for token in added
            )
        )

    def _token_bytes(self) -> list[bytes]:
        """The bytes of every id. Byte-level vocabularies spell each byte as one printable character."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in set(printable)]
        spelled = {chr(byte): byte for byte in printable} | {
            chr(256 + index): byte for index, byte in enumerate(others)
        }
        table = [b""] * self.size
        for text, number in self.json["model"]["vocab"].items():
            try:
                table[number] = bytes([spelled[char] for char in text])
            except KeyError:
                table[number] = text.encode()  # a special token that also stands in the model's vocabulary
        for text, number in self.added.items():
            table[number] = text.encode()
        return table

    def follow(self, ids: Ids, text: npt.NDArray[np.uint8], first: Offsets, edges: Offsets) -> Walk | None:
        """The ids with their mask, when they spell `text`, less the WORD bytes behind it, and each document ends where a token does.
        `first` and `edges` are the runs of documents as `sft.data.batch.Batch` has them."""
        documents = len(first) - 1
        made = Walk(
            ids, np.empty(len(ids), dtype=np.uint32), np.empty(documents + 1, dtype=np.int64), *np.empty((3, documents), dtype=np.int64),
            *np.empty((2, documents), dtype=np.uint32),
        )  # fmt: skip
        followed = (not len(ids) or int(ids.max()) < self.size) and walk(
            ids, self.words, self.lengths, self.where, words_of(self.spelled), np.uint32(self.first_special), self.is_special,
            np.uint32(self.eos_id), words_of(text), first, edges,
            made.tokens, made.offsets, made.labels, made.specials, made.straddled, made.last, made.eoses,
        )  # fmt: skip
        return made if followed else None

    def decode(self, ids: Ids) -> bytes:
        table = self.token_bytes
        return b"".join([table[number] for number in ids.tolist()])

    def text(self, ids: Ids) -> str:
        """For people: what is no whole character shows as a replacement character."""
        if self.byte_level:
            return self.decode(ids).decode(errors="replace")
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def chat_template(self) -> str | None:
        """The folder's own template: chat_template.jinja, else the configuration's."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            return read_text(path, "prepare.template", "fetch the file again")
        own = self.config.get("chat_template")
        if isinstance(own, list):
            own = next((item.get("template") for item in own if item.get("name") == "default"), None)
        return own if isinstance(own, str) else None

    def canaries(self) -> dict[str, list[int]]:
        texts = (*CANARIES, *(f"a{text}b {text}" for text in list(self.specials)[:4]))
        return {text: self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts}

    def save(self, folder: Path, template: str) -> None:
        """Writes the tokenizer folder that travels with the data: this tokenizer.json, byte for byte, and the template trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes((self.folder / "tokenizer.json").read_bytes())
        config = {
            key: value
            for key, value in self.config.items()
            if key not in ("chat_template", "auto_map", "tokenizer_class")
        }
        config.update(self.variables)
        # The generic class reads tokenizer.json as it stands; a model's own class may rebuild the pre-tokenizer
        # from its code and then cut text differently.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def check_rebuilt(folder: Path, texts: Sequence[str] = ()) -> dict[str, list[int]]:
    """Loads `folder` with transformers and demands the ids that its tokenizer.json gives. Returns the canaries that agreed."""
    from transformers import AutoTokenizer

    vocabulary = Vocabulary(folder)
    rebuilt = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    wanted = vocabulary.canaries()
    for text in texts:
        wanted[text] = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    for text, ids in wanted.items():
        got = rebuilt(text, add_special_tokens=False)["input_ids"]
        if got != ids:
            raise SftError(
                f"{folder}: transformers rebuilds this tokenizer as {type(rebuilt).__name__}, which gives {got[:12]} for {text[:40]!r}"
                f" where tokenizer.json gives {ids[:12]}; next: set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
            )
    if (rebuilt.eos_token_id, len(rebuilt)) != (vocabulary.eos_id, vocabulary.size):
        raise SftError(
            f"{folder}: transformers rebuilds this tokenizer with eos {rebuilt.eos_token_id} and {len(rebuilt)} tokens, tokenizer.json has"
            f" {vocabulary.eos_id} and {vocabulary.size}; next: correct tokenizer_config.json"
        )
    return wanted


class Engine:
    """Encodes texts, special-token text in them included, into one flat array of ids and the offsets of each text."""

    def __init__(self, vocabulary: Vocabulary, wanted: str) -> None:
        self.vocabulary = vocabulary
        self.name, self.why = "tokenizers", "the recipe asks for tokenizers"
        self.fast: Any = None
        if wanted == "tokenizers":
            return
        try:
            import gigatoken

            self.fast = gigatoken.Tokenizer(str(vocabulary.folder / "tokenizer.json"))
            # Its first encoding is the first to need all that it depends on.
            self.why = "" if self._canaries_agree() else "gigatoken gives other ids for the canary texts"
        except ImportError as error:
            self.why = f"gigatoken is not importable: {error}"
        except Exception as error:  # what it cannot read it refuses in many ways
            self.why = f"gigatoken cannot read this tokenizer: {error}"
        if self.why:
            self.fast = None
        else:
            self.name = "gigatoken"
        if self.fast is None and wanted == "gigatoken":
            raise SftError(f'prepare.encoder = "gigatoken": {self.why}; next: set it to "auto"')

    def _canaries_agree(self) -> bool:
        wanted = self.vocabulary.canaries()
        ids, offsets = self.encode([text.encode() for text in wanted])
        return all(
            ids[a:b].tolist() == expected
            for a, b, expected in zip(offsets[:-1], offsets[1:], wanted.values(), strict=True)
        )

    def encode(self, texts: list[bytes] | list[str]) -> tuple[Ids, Offsets]:
        """By the fastest encoder there is. It takes UTF-8, so bytes spare it a conversion."""
        if self.fast is None:
            return self.encode_slowly([text if isinstance(text, str) else text.decode() for text in texts])
        layout = self.fast.encode_batch(texts).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data, dtype=np.uint32)
        return ids[offsets[0] : offsets[-1]], offsets - offsets[0]

    def encode_joined(self, data: bytes) -> Ids:
        """Documents that special tokens part, as one text: a batch has a fixed cost of a tenth of a millisecond."""
        return np.asarray(self.fast.encode(data), dtype=np.uint32)

    def encode_slowly(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """By `tokenizers`: the reference that the fast encoder is compared with."""
        encoded = [item.ids for item in self.vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        return np.fromiter(chain.from_iterable(encoded), dtype=np.uint32, count=int(offsets[-1])), offsets
