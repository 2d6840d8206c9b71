"""The chat templates that TRL and axolotl ship, under 24 kinds of conversations: nothing is silently wrong."""

from __future__ import annotations

from collections import Counter

import pytest

import peers
from template_cells import cells

TRL = ("trl", "1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396")
AXOLOTL = ("axolotl", "0.19.0", "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "history", "right"), [(TRL, "whole", 1200), (TRL, "as-rendered", 1250), (AXOLOTL, "whole", 500)]
)
def test_no_cell_is_silently_wrong(package: tuple[str, str, str], history: str, right: int) -> None:
    folder = peers.pypi_package(*package)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.jinja"))}
    found = [(name, cell) for name, text in texts.items() for cell in cells(name, text, {"history": history})]
    assert [(name, cell) for name, cell in found if cell.verdict == "wrong"] == []
    counts = Counter(cell.verdict for _, cell in found)
    assert counts["right"] >= right, counts
    refusals = [cell.why for _, cell in found if cell.verdict in ("refused", "usable")]
    assert all(refusals)
