"""Warnings of Python's libraries go to a file, because the terminal is for a program's own lines. Standard library only."""

from __future__ import annotations

import logging
from pathlib import Path

OWN_HANDLERS = ("torch.utils._pytree", "transformers")
"""Loggers whose library prints to the terminal by itself."""


_FORMER: list[logging.Handler] = []
"""The handler of the call before, which the next one replaces."""


def quiet_libraries(file: Path) -> None:
    """From now on, log records of libraries and `warnings` are appended to the file, which is made with the first of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, delay=True)
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    for former in _FORMER:
        logging.getLogger().removeHandler(former)
        former.close()
    _FORMER[:] = [handler]
    logging.getLogger().addHandler(handler)
    for name in OWN_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.addHandler = _ignore  # type: ignore[method-assign]  # transformers adds its own one when it is imported
    logging.captureWarnings(True)


def _ignore(hdlr: logging.Handler) -> None:
    """In place of a logger's addHandler."""
