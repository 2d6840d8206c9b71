"""Hugging Face repositories at one commit: base weights, tokenizers and datasets.

In:  hf://org/name[@revision], and the recipe's name for it (`what`, for messages).
Out: `resolve`: the commit that the revision means now, with a warning if the revision is not a commit
     `snapshot`: the repository's files in a folder, each compared with the hash that the hub reports
     `cached`: some of its files in the hub client's own cache, in a folder named by the commit
     `same_as_hub`: whether a local file has the hash that the hub reports
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors

from sft.common.errors import SftError
from sft.storage.checksums import checksums_of
from sft.storage.local import LocalStorage

# Other forms of the same weights.
NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite"]
SMALL = (".json", ".jinja")
"""Endings of the files that say what a model is."""
PICKLED = "pytorch_model*.bin"
"""Weights that are fetched where a repository has no safetensors. Only the restricted unpickler reads them."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repo:
    """A repository at one commit."""

    name: str
    commit: str


def parse(url: str, what: str) -> tuple[str, str]:
    """(org/name, revision or ""). Raises SftError for an invalid name, before any request."""
    name, _, revision = url.removeprefix("hf://").partition("@")
    names = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and re.fullmatch(r"[\w./-]*", revision)
    if not url.startswith("hf://") or not names or ".." in url:
        raise SftError(f"{what}: {url!r} is not hf://org/name or hf://org/name@revision; next: correct it")
    return name, revision


def resolve(url: str, what: str, log: Callable[[str], None], kind: str = "model") -> Repo:
    """The repository at the commit of the revision. Asks the hub unless the revision is a commit. kind: "model" or "dataset"."""
    name, revision = parse(url, what)
    if COMMIT.fullmatch(revision):
        return Repo(name, revision)
    with reaching(what):
        api = huggingface_hub.HfApi()
        info = api.model_info if kind == "model" else api.dataset_info
        commit = str(info(name, revision=revision or None).sha)
    _warn(url, revision, commit, log)
    return Repo(name, commit)


def snapshot(repo: Repo, folder: Path, what: str, check: Callable[[Path], None] = lambda _: None) -> None:
    """Downloads a model's files to `folder`. Deletes and reports files that differ from what the hub reports. Raises SftError.

    `check` gets the folder before the weights are downloaded.
    """
    with reaching(what):
        info = huggingface_hub.HfApi().model_info(repo.name, revision=repo.commit, files_metadata=True)
        left_out = not_fetched([stated.rfilename for stated in info.siblings or []])
        download = partial(huggingface_hub.snapshot_download, repo.name, revision=repo.commit, local_dir=folder)
        download(ignore_patterns=left_out, allow_patterns=[f"*{end}" for end in SMALL])
    check(folder)
    with reaching(what):
        download(ignore_patterns=left_out)
    wrong = []
    for stated in info.siblings or []:
        file = LocalStorage(folder).path(stated.rfilename)
        if file.is_file() and same_as_hub(file, stated) is False:  # files of NOT_FETCHED were not downloaded
            file.unlink()
            wrong.append(f"{file} differs from what the hub reports; it was deleted")
    if wrong:
        raise SftError("\n".join(wrong) + "\nnext: run it again")


def not_fetched(names: Sequence[str]) -> list[str]:
    """The patterns of a repository's files that are left out. A repository without safetensors keeps its .bin files."""
    pickled = [name for name in names if fnmatch.fnmatchcase(name, PICKLED)]
    if not pickled or any(fnmatch.fnmatchcase(name, "model*.safetensors") for name in names):
        return NOT_FETCHED
    others = [glob.escape(name) for name in names if name.endswith(".bin") and name not in pickled]
    return [*(pattern for pattern in NOT_FETCHED if pattern != "*.bin"), *others]


class DatasetFiles:
    """The files of a dataset's repository at one commit. They are fetched into the hub client's cache.

    Where the hub cannot be reached, the commit's snapshot in that cache answers.
    """

    def __init__(self, repo: Repo, what: str, stated: dict[str, Any], snapshot: Path | None) -> None:
        """`stated`: the hub's `RepoSibling` of each file, or None for a file of a snapshot without one."""
        self.repo, self.what, self.stated, self.snapshot = repo, what, stated, snapshot

    @classmethod
    def at(cls, repo: Repo, what: str, log: Callable[[str], None]) -> DatasetFiles:
        """Asks the hub. Raises SftError for an unknown repository, and when neither the hub nor the cache answers."""
        with reaching(what):
            try:
                info = huggingface_hub.HfApi().dataset_info(repo.name, revision=repo.commit, files_metadata=True)
                return cls(repo, what, {s.rfilename: s for s in info.siblings or []}, None)
            except huggingface_hub.errors.HfHubHTTPError:
                raise  # the hub answers: the repository or the commit does not exist, or is private
            except Exception as error:  # the client raises many kinds of errors without a network
                found = _cached_snapshot(repo)
                if found is None:
                    raise
                log(
                    f"warning: {what}: the hub does not answer ({type(error).__name__}); reading the snapshot in {found}, which"
                    " has only the files that were fetched before"
                )
                names = [p.relative_to(found).as_posix() for p in sorted(found.rglob("*")) if p.is_file()]
                return cls(repo, what, dict.fromkeys(names), found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.stated)

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        return (self.fetch((name,)) / name).read_bytes()

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder that has these files. Raises SftError for a file that differs from what the hub reports."""
        if self.snapshot is not None:
            return self.snapshot
        with reaching(self.what):
            folder = Path(
                huggingface_hub.snapshot_download(
                    self.repo.name,
                    repo_type="dataset",
                    revision=self.repo.commit,
                    allow_patterns=[glob.escape(name) for name in names],
                )
            )
        for name in names:
            if not (folder / name).is_file():
                raise SftError(f"{self.what}: {name} was not fetched; next: run it again")
            if same_as_hub(folder / name, self.stated[name]) is False:
                raise SftError(
                    f"{self.what}: {folder / name} differs from what the hub reports; next: delete it and run it again"
                )
        return folder


def _cached_snapshot(repo: Repo) -> Path | None:
    """The folder of a commit in the hub client's cache."""
    try:
        found = huggingface_hub.snapshot_download(
            repo.name, repo_type="dataset", revision=repo.commit, local_files_only=True
        )
    except Exception:  # the client raises several kinds of errors for a missing snapshot
        return None
    return Path(found)


def cached(url: str, what: str, log: Callable[[str], None], names: Sequence[str]) -> Path:
    """The files `names` in the hub client's cache; works offline too. The folder's name is the commit."""
    name, revision = parse(url, what)
    with reaching(what):
        found = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(names)))
    if not COMMIT.fullmatch(revision):
        _warn(url, revision, found.name, log)
    return found


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turns any error of the hub's libraries (network, unknown name or split, permission, bad files) into one SftError."""
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
        f"warning: {url}: not pinned to a commit; {revision or 'main'!r} means {commit} now, and runs do not notice when it"
        f" changes; next: write @{commit} after the name"
    )


def same_as_hub(file: Path, stated: Any) -> bool | None:
    """Whether a local file has the hash in the hub's `RepoSibling`; None if the hub reports no hash.

    The hub reports the SHA-256 of large files (LFS), and git's blob id of small ones.
    """
    lfs, blob_id = getattr(stated, "lfs", None), getattr(stated, "blob_id", None)
    if lfs is not None:
        return checksums_of(file).sha256 == str(lfs.sha256)
    if not blob_id:
        return None
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == str(blob_id)
