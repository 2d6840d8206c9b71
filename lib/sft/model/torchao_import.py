"""How torchao, an optional package, is imported: an error of ours without it, and no reports of kernels that a machine lacks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from sft.common.errors import SftError


@contextlib.contextmanager
def importing_torchao(option: str, instead: str) -> Iterator[None]:
    """Around the imports from torchao. `option` needs it, and `instead` does not. Raises SftError where it is not installed."""
    for noisy in ("torchao", "torch.utils._pytree"):  # they report kernels and calls that do not concern this machine
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        raise SftError(
            f"[train] {option} needs the package torchao ({error}); next: pip install -e '.[lowbit]', or {instead}"
        ) from error
