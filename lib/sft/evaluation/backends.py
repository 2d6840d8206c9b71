"""TODO sft.evaluation.backends"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.evaluation.hf_model import Model
from sft.evaluation.recorder import Recorder


def open_model(folder: Path, backend: str, **options: Any) -> Recorder:
    """The export behind a backend: 'hf' or 'vllm'. Raises SftError when vllm is not installed."""
    if backend == "hf":
        options.pop("gpus", None)
        options.pop("seed", None)
        return Model(folder, **options)
    try:
        from sft.evaluation.vllm_model import VllmModel
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise SftError(
            "[evaluate] backend = 'vllm': the package vllm is not installed; next, on a machine with a GPU:"
            " .venv/bin/python -m pip install -e '.[vllm]', or backend = \"hf\""
        ) from None
    return VllmModel(folder, **options)
