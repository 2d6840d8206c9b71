"""Hugging Face repositories at one commit: bases, tokenizers and datasets.

In:  hf://org/name[@revision], and what the recipe calls it (`what`, for messages).
Out: `resolve`: the commit that the revision means now, with a warning where it is not a commit itself
     `snapshot`: the repository's files in a folder, each compared with the hash that the hub states for it
     `cached`: a few of its files in the hub client's own cache, in a folder that is named by the commit
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.storage.contract import hash_file
from sft.storage.local import LocalStorage

# Weights as pickles could run code when they are read, and the same weights are there as safetensors.
NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite"]
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repo:
    name: str
    commit: str


def parse(url: str, what: str) -> tuple[str, str]:
    """(org/name, revision or ""). Raises SftError before any request for a name that is none."""
    name, _, revision = url.removeprefix("hf://").partition("@")
    names = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and re.fullmatch(r"[\w./-]*", revision)
    if not url.startswith("hf://") or not names or ".." in url:
        raise SftError(f"{what}: {url!r} is not hf://org/name or hf://org/name@revision; next: correct it")
    return name, revision


def resolve(url: str, what: str, log: Callable[[str], None], kind: str = "model") -> Repo:
    """Asks the hub, unless the revision is a commit. kind: "model" or "dataset"."""
    name, revision = parse(url, what)
    if COMMIT.fullmatch(revision):
        return Repo(name, revision)
    with reaching(what):
        import huggingface_hub

        api = huggingface_hub.HfApi()
        info = api.model_info if kind == "model" else api.dataset_info
        commit = str(info(name, revision=revision or None).sha)
    _warn(url, revision, commit, log)
    return Repo(name, commit)


def snapshot(repo: Repo, folder: Path, what: str) -> None:
    """Brings a model's files to `folder`. A file that is not what the hub says is removed and reported."""
    with reaching(what):
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(repo.name, revision=repo.commit, files_metadata=True)
        huggingface_hub.snapshot_download(
            repo.name, revision=repo.commit, local_dir=folder, ignore_patterns=NOT_FETCHED
        )
    wrong = []
    for stated in info.siblings or []:
        file = LocalStorage(folder).path(stated.rfilename)
        if file.is_file() and not _is(file, stated):  # those of NOT_FETCHED are not there
            file.unlink()
            wrong.append(f"{file} is not what the hub says; it was removed")
    if wrong:
        raise SftError("\n".join(wrong) + "\nnext: run it again")


def cached(url: str, what: str, log: Callable[[str], None], names: Sequence[str]) -> Path:
    """The files `names` as the hub client keeps them, offline too; the folder's name is the commit."""
    name, revision = parse(url, what)
    with reaching(what):
        import huggingface_hub

        found = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(names)))
    if not COMMIT.fullmatch(revision):
        _warn(url, revision, found.name, log)
    return found


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """One clear error for whatever the hub's libraries raise: network, a missing name or split, no permission, bad files."""
    try:
        yield
    except SftError:
        raise
    except Exception as e:
        reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
        raise SftError(
            f"{what}: {reason}; next: check the name, revision and split, HF_TOKEN for a private one, and the network,"
            " or give a folder under DATA"
        ) from None


def _warn(url: str, revision: str, commit: str, log: Callable[[str], None]) -> None:
    log(
        f"warning: {url}: not pinned to a commit; {revision or 'main'!r} means {commit} now and may change, which no"
        f" run would notice: write @{commit} after the name"
    )


def _is(file: Path, stated: Any) -> bool:
    if stated.lfs is not None:
        return hash_file(file).sha256 == str(stated.lfs.sha256)
    if not stated.blob_id:
        return True
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == stated.blob_id
