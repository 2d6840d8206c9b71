"""Supervised finetuning of OLMo models: five stages that talk through files on disk. `sft.api` is the Python API."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.api import Run as Run
    from sft.api import load_model as load_model
    from sft.api import pack as pack
    from sft.api import prepare as prepare


API = ("Run", "load_model", "pack", "prepare")


def __getattr__(name: str) -> Any:
    """The names of the API, which are loaded when they are first used: the planner imports this package before NumPy is there."""
    if name not in API:
        raise AttributeError(f"module 'sft' has no attribute {name!r}")
    return getattr(importlib.import_module("sft.api"), name)
