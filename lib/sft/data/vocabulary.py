"""A tokenizer folder: its facts, its identity, and the proof that transformers rebuilds the same tokenizer.

In: a folder with tokenizer.json and tokenizer_config.json. Out: `Vocabulary` (special tokens, bytes of every id, hash and canary ids),
and `save` and `check_rebuilt` for the folder that travels with the data. tokenizer.json decides; what transformers makes of
tokenizer_config.json is only compared with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sft.common.errors import SftError
from sft.data.align import Ids, VocabularyTable
from sft.data.compiled import WORD, words_of
from sft.data.normalization import Normalizer
from sft.data.vocabulary_checks import NAMED_TOKENS, by_id, check_ids, check_tokens
from sft.recipe.inputs import OTHER_TEMPLATES, named_templates

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
CONFIG, TOKENS_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
PROCESSORS = "chat_template.json"
"""Where the processors of older transformers saved the template."""


def read_text(path: Path, what: str, advice: str) -> str:
    """A text file in UTF-8. Raises SftError that names the file; `what` it is for and `advice` are parts of the message."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SftError(f"{path}: {what}: cannot be read: {error.strerror}; next: {advice}") from None
    except UnicodeDecodeError as error:
        raise SftError(f"{path}: {what}: not UTF-8: {error}; next: {advice}") from None


class Vocabulary:
    """The facts of a tokenizer folder, read from its files without transformers. Raises SftError for a file that cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        data = self._read_tokenizer(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.json: dict[str, Any] = json.loads(data)
            self.tokenizer = _loaded(data.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise SftError(f"{path}: not a tokenizer: {error}; next: fetch the file again") from None
        self.config = self._config(CONFIG)
        self.template_variables = self._named_tokens()
        added = self.json.get("added_tokens") or []
        self.added = {token["content"]: int(token["id"]) for token in added}
        self.specials = {token["content"]: int(token["id"]) for token in added if token["special"]}
        vocab = self.json["model"]["vocab"]  # an object of ids, or a list of (token, score) in the order of ids
        largest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        self.size = max(largest, *self.added.values(), -1) + 1
        check_ids(self.tokenizer, self.json, path)
        check_tokens(self.tokenizer, self._read_by_transformers())
        self.eos, self.eos_id = self._named_token("eos_token")
        if self.eos not in self.specials:
            self.specials[self.eos] = self.eos_id
        self.pad_id = self._named_token("pad_token")[1] if "pad_token" in self.template_variables else self.eos_id
        self.normalizer = Normalizer.of(self.json) or Normalizer()
        self.byte_level = has_token_bytes(self.json)
        self.token_bytes = self._token_bytes() if self.byte_level else []
        unknown = self.json["model"].get("unk_token")
        self.unk_id = self.json["model"].get("unk_id") if unknown is None else self.tokenizer.token_to_id(unknown)
        self.is_special = np.zeros(self.size, dtype=np.bool_)
        self.is_special[list(self.specials.values())] = True

    def treat_as_special(self, texts: Sequence[str]) -> None:
        """Counts added tokens as special that tokenizer.json does not declare special. Call it before `table` is read."""
        self.specials |= {text: self.added[text] for text in texts if text not in self.specials}
        self.is_special[list(self.specials.values())] = True

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer to which the text of a special token is only text."""
        tokens = [
            {**token, "special": token["content"] in self.specials} for token in self.json.get("added_tokens") or []
        ]
        made = _loaded(json.dumps({**self.json, "added_tokens": tokens}))
        made.encode_special_tokens = True
        return made

    def _read_tokenizer(self, path: Path) -> bytes:
        if not path.is_file():
            raise SftError(
                f"{path}: not found; prepare.tokenizer = {str(self.folder)!r} must be a folder with tokenizer.json; next: save the"
                " tokenizer there with transformers' save_pretrained"
            )
        try:
            return path.read_bytes()
        except OSError as error:
            raise SftError(f"{path}: cannot be read: {error.strerror}; next: make it readable") from None

    def _config(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty when it is missing."""
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

    def _read_by_transformers(self) -> dict[Path, dict[str, Any]]:
        """The configurations that transformers reads tokens of: it leaves out the older files where the new one lists the tokens."""
        found = {self.folder / CONFIG: self.config}
        if "added_tokens_decoder" not in self.config:
            found[self.folder / TOKENS_MAP] = self._config(TOKENS_MAP)
            found[self.folder / ADDED] = by_id(self._config(ADDED))
        return found

    def _named_tokens(self) -> dict[str, str]:
        """The texts of eos_token, bos_token, …, which templates read as variables."""
        found: dict[str, str] = {}
        for file, source in ((TOKENS_MAP, self._config(TOKENS_MAP)), (CONFIG, self.config)):
            for name in NAMED_TOKENS:
                value = source.get(name)
                value = value.get("content") if isinstance(value, dict) else value
                if not isinstance(value, str | None):
                    raise SftError(
                        f"{self.folder / file}: {name} = {value!r}, expected the text of a token; next: correct it"
                    )
                if value and value != found.get(name, value) and "added_tokens_decoder" not in self.config:
                    raise SftError(
                        f"{self.folder}: {name} is {found[name]!r} in {TOKENS_MAP} and {value!r} in {CONFIG}; next: make them"
                        " agree (transformers takes the first)"
                    )
                if value is not None:
                    found[name] = value
        return found

    def _named_token(self, name: str) -> tuple[str, int]:
        """The text and the id of a named token."""
        text = self.template_variables.get(name)
        token_id = None if text is None else self.tokenizer.token_to_id(text)
        if text is None or token_id is None:
            raise SftError(
                f"{self.folder}/tokenizer_config.json: {name} is {text!r}, which is not a token of tokenizer.json; next: name one that is"
            )
        return text, token_id

    def _token_bytes(self) -> list[bytes]:
        """The bytes of every id in the text as the tokenizer spells it (`Normalizer`)."""
        table = [b""] * self.size
        spell = self._spell_bytes() if self.normalizer.marks_spaces else self._spell_byte_level()
        for text, token_id in self.json["model"]["vocab"].items():
            table[token_id] = spell(text)
        for text, token_id in self.added.items():
            table[token_id] = self.normalizer.spell(text).encode()
        return table

    def _spell_bytes(self) -> Callable[[str], bytes]:
        """How a vocabulary of characters spells its tokens: a byte that has no character is a token such as <0x0A>."""
        bytes_of = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        return lambda text: bytes_of.get(text) or self.normalizer.spell(text).encode()

    def _spell_byte_level(self) -> Callable[[str], bytes]:
        """How a byte-level vocabulary spells its tokens: it writes each byte as one printable character (GPT-2)."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in set(printable)]
        byte_of = {chr(byte): byte for byte in printable} | {
            chr(256 + index): byte for index, byte in enumerate(others)
        }

        def spell(text: str) -> bytes:
            try:
                return bytes([byte_of[char] for char in text])
            except KeyError:
                return text.encode()  # a special token that is also in the model's vocabulary

        return spell

    @functools.cached_property
    def table(self) -> VocabularyTable:
        """The bytes of every id as arrays, for `sft.data.align`. Only of a byte-level tokenizer."""
        lengths = np.array(list(map(len, self.token_bytes)), dtype=np.uint16)
        first_bytes = b"".join(token[:WORD].ljust(WORD, b"\0") for token in self.token_bytes)
        return VocabularyTable(
            words=np.frombuffer(first_bytes, dtype="<u8"),
            lengths=lengths,
            starts=np.cumsum(lengths, dtype=np.uint32) - lengths,
            bytes_words=words_of(np.frombuffer(b"".join(self.token_bytes) + bytes(WORD), dtype=np.uint8)),
            first_special=np.uint32(min(self.specials.values())),
            is_special=self.is_special,
            eos_id=np.uint32(self.eos_id),
        )

    def decode(self, ids: Ids) -> bytes:
        """The bytes of the ids. Only of a byte-level tokenizer."""
        table = self.token_bytes
        return b"".join([table[token_id] for token_id in ids.tolist()])

    def text(self, ids: Ids) -> str:
        """The ids as text for people: an incomplete character is shown as a replacement character."""
        if self.byte_level:
            return self.decode(ids).decode(errors="replace")
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def chat_templates(self) -> dict[str, str]:
        """The folder's own templates by name: files first, then the configuration's, then a processor's. Most folders have one, "default"."""
        found: dict[str, str] = {}
        for file in (PROCESSORS, CONFIG):
            found |= named_templates(self._config(file).get("chat_template"), str(self.folder / file))
        files = {path.stem: path for path in sorted((self.folder / OTHER_TEMPLATES).glob("*.jinja"))}
        files["default"] = self.folder / "chat_template.jinja"
        return found | {
            name: read_text(path, "prepare.template", "fetch the file again")
            for name, path in files.items()
            if path.exists()
        }

    def canaries(self) -> dict[str, list[int]]:
        """Texts on which tokenizers are known to differ, with the ids that this one gives."""
        texts = (*CANARIES, *(f"a{text}b {text}" for text in list(self.specials)[:4]))
        return {text: self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts}

    def save(self, folder: Path, template: str) -> None:
        """Writes the tokenizer folder that travels with the data: this tokenizer.json, byte for byte, and the template of the data."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes((self.folder / "tokenizer.json").read_bytes())
        config = {
            key: value
            for key, value in self.config.items()
            if key not in ("chat_template", "auto_map", "tokenizer_class")
        }
        config.update(self.template_variables)
        # The generic class reads tokenizer.json unchanged. A model's own class may build the pre-tokenizer from its code and
        # then split text differently.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _loaded(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Its truncation and padding do not count: transformers sets both with each call."""
    made = Tokenizer.from_str(text)
    made.no_truncation()
    made.no_padding()
    return made


def has_token_bytes(tokenizer: dict[str, Any]) -> bool:
    """Whether each token spells fixed bytes wherever it occurs, and special tokens do not change the text around them.

    `tokenizer`: the content of tokenizer.json. True for byte-level vocabularies (GPT-2, Llama 3, Qwen) and for vocabularies of
    characters that fall back to bytes and put no space before a text (Gemma).
    """
    model, pre, normalizer = tokenizer["model"], tokenizer.get("pre_tokenizer"), Normalizer.of(tokenizer)
    if normalizer is None or model["type"] != "BPE":
        return False
    parts = [] if pre is None else pre.get("pretokenizers", [pre])
    kinds = [part["type"] for part in parts]
    decoder = tokenizer.get("decoder") or {}
    if normalizer.marks_spaces:
        steps = [step["type"] for step in decoder.get("decoders", ())]
        fixed = (
            bool(model.get("byte_fallback"))
            and steps == ["Replace", "ByteFallback", "Fuse"]
            and set(kinds) <= {"Split"}
        )
    else:
        levels = [part for part in parts if part["type"] == "ByteLevel"]
        fixed = (
            not model.get("byte_fallback")
            and decoder.get("type") == "ByteLevel"
            and len(levels) == 1
            and not levels[0].get("add_prefix_space", True)
            and set(kinds) <= {"ByteLevel", "Split", "Digits", "Punctuation"}
        )
    return fixed and not any(
        token["lstrip"]
        or token["rstrip"]
        or token["single_word"]
        or ((token["normalized"] or token["special"]) and normalizer.spell(token["content"]) != token["content"])
        for token in tokenizer.get("added_tokens") or []
    )


def check_rebuilt(folder: Path, texts: Sequence[str] = ()) -> dict[str, list[int]]:
    """Loads `folder` with transformers and demands the ids of its tokenizer.json. Returns the texts that agreed with their ids.

    Raises SftError when transformers builds another tokenizer.
    """
    from transformers import AutoTokenizer  # start-up: transformers takes a second

    vocabulary = Vocabulary(folder)
    rebuilt = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    expected = vocabulary.canaries()
    for text in texts:
        expected[text] = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    is_generic = vocabulary.config.get("tokenizer_class") == "PreTrainedTokenizerFast"
    remedy = (
        f"correct what {CONFIG} says otherwise than tokenizer.json, such as added_tokens_decoder or split_special_tokens"
        if is_generic
        else f"set tokenizer_class to PreTrainedTokenizerFast in {CONFIG}"
    )
    for text, ids in expected.items():
        got = rebuilt(text, add_special_tokens=False)["input_ids"]
        if got != ids:
            at = next((i for i, (a, b) in enumerate(zip(got, ids, strict=False)) if a != b), min(len(got), len(ids)))
            at = max(0, at - 3)
            got, ids, text = got[at:], ids[at:], str(rebuilt.decode(ids[at : at + 12]))
            raise SftError(
                f"{folder}: transformers rebuilds this tokenizer as {type(rebuilt).__name__}, which gives {got[:12]} for {text[:40]!r}"
                f" where tokenizer.json gives {ids[:12]}; next: {remedy}"
            )
    if (rebuilt.eos_token_id, len(rebuilt)) != (vocabulary.eos_id, vocabulary.size):
        raise SftError(
            f"{folder}: transformers rebuilds this tokenizer with eos {rebuilt.eos_token_id} and {len(rebuilt)} tokens, tokenizer.json has"
            f" {vocabulary.eos_id} and {vocabulary.size}; next: correct tokenizer_config.json"
        )
    return expected
