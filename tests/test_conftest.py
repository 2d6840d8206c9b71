"""What tests/conftest.py makes of tests: which of them coverage traces, and what they are called."""

from __future__ import annotations

import gzip
import sys

import pytest

from conftest import TRACED_CASES


def is_traced() -> bool:
    return type(sys.gettrace()).__module__.startswith("coverage")


@pytest.mark.slow
def test_a_slow_test_is_not_traced() -> None:
    assert not is_traced()


@pytest.mark.parametrize("case", range(TRACED_CASES + 1))
def test_the_first_cases_of_a_test_are_traced(request: pytest.FixtureRequest, case: int) -> None:
    assert is_traced() == (case < TRACED_CASES and bool(request.config.getoption("cov_source", default=None)))


@pytest.mark.parametrize("content", [gzip.compress(b"")])  # with the time in it
def test_bytes_are_no_part_of_a_name(request: pytest.FixtureRequest, content: bytes) -> None:
    assert request.node.name == "test_bytes_are_no_part_of_a_name[content]"
