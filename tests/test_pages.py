"""The pages in a real browser: nothing is cut off, nothing is logged as an error, on a phone and a desk, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
from browser import Browser, NoBrowser
from sft.reporting import report
from test_report import whole_run

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    """One browser for all pages."""
    try:
        browser.program()
    except NoBrowser as error:
        pytest.skip(f"no browser to look at pages with: {error}")
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(report.page(whole_run(folder / "smoke")))
    return {"report": folder / "report.html"}


@pytest.mark.parametrize("name", ["report"])
def test_nothing_overflows_and_nothing_is_logged_at_any_width_or_theme(
    opened: Browser, pages: dict[str, Path], name: str
) -> None:
    for width in WIDTHS:
        for dark in (False, True):
            seen = opened.look(pages[name], width=width, dark=dark)
            assert (seen.overflows, seen.errors) == ([], []), f"{name} at {width} px, {'dark' if dark else 'light'}"


def test_an_overflow_an_error_and_a_request_are_found(opened: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body><pre>"
        + "x" * 400
        + "</pre><script>console.error('no')</script><img src=http://a.invalid/>"
    )
    seen = opened.look(page, width=390)
    assert seen.overflows and "no" in seen.errors[0] and any("asks for http://a.invalid" in e for e in seen.errors)
