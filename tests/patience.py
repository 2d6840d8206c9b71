"""How long a test waits for a process or a state before it gives up.

It is a guard against tests that hang and no claim about speed: a busy machine may be many times slower than an idle one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds."""


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
