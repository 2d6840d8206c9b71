"""The order of writes: what is published was flushed before, and its name after. Seen from outside, by every call of the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO, Workspace
from events import Call, Events, disorder
from patience import PATIENCE

WAYS = {
    "write_atomic": "from sft.common.files import write_atomic; write_atomic(out / 'f', b'x' * 100)",
    "a direct file": "from sft.common.direct_io import DirectFile; f = DirectFile(out / 'f'); f.write(b'x' * 9000); f.close(); sync_folder(out)",
    "a file of a storage": "LocalStorage(out).write('a/b/f', b'x')",
    "a copy": "(out / 'from').mkdir(); s = out / 'from/f'; s.write_bytes(b'x' * 100); [os.fsync(os.open(p, os.O_RDONLY)) for p in (s, s.parent, out)]\n"
    "transfer([FileCopy('f', 'to/f', 100, hash_file(s))], LocalStorage(s.parent), LocalStorage(out / 'there'), print)",
    "a mark": "from sft.formats.identity import write_identity; write_identity(out, '0' * 64)",
    "a step's metrics": "from sft.training.metrics import MetricsWriter; from published import step_record\n"
    "m = MetricsWriter(out, 0, 9, print); m.write(step_record(1)); m.seal(1); os._exit(0)",
}  # fmt: skip
START = """
import os, sys
from pathlib import Path
from sft.common.files import hash_file, sync_folder
from sft.storage.contract import FileCopy
from sft.storage.local import LocalStorage
from sft.storage.transfer import transfer
out = Path(sys.argv[1])
"""


def run(events: Events, program: str, *words: str, status: int = 0) -> None:
    environment = {
        **os.environ,
        **events.environment,
        "PYTHONPATH": f"{REPO / 'lib'}:{REPO / 'tests'}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == status, done.stdout + done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_flushed_before_its_name_and_the_name_after(tmp_path: Path, way: str) -> None:
    root = tmp_path / "out"
    root.mkdir()
    events = Events(tmp_path, root)
    run(events, START + WAYS[way], str(root))
    calls = events.calls()
    assert any(call.what == "rename" for call in calls)
    assert disorder(calls) == []


SAVE = """
import sys
from pathlib import Path
import torch
from sft.checkpoint import step_folder
from sft.model.parallel import join
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
out = Path(sys.argv[1])
step_folder.save(out, 1, step_folder.snapshot(model, optimizer), {"tokens": 1}, {}, join(threads=1), ephemeral=False)
"""


@pytest.mark.processes
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    root = tmp_path / "train"
    root.mkdir()
    events = Events(tmp_path, root)
    run(events, SAVE, str(root))
    calls = events.calls()
    assert {Path(name).name for c in calls for name in (c.path, c.to)} >= {
        "rank0.pt",
        ".metadata",
        "__0_0.distcp.partial",
    }
    assert disorder(calls) == []
    assert [Path(c.to).name for c in calls if c.what == "rename"][-1] == "step1"


@pytest.mark.parametrize("shared", [False, True])
def test_a_stage_is_on_the_disk_before_it_is_published_and_its_manifest_comes_last(
    workspace: Workspace, shared: bool
) -> None:
    """The file is written by a stage that flushes nothing itself."""
    (workspace.root / "stages/prepare.py").write_text(
        "from sft.runner.stage import Result, main\n"
        "def body(stage):\n    (stage.out / 'a').mkdir(exist_ok=True)\n    (stage.out / 'a' / 'f').write_text('x')\n    return Result(['a'])\n"
        f"main('prepare', body, shared={shared})\n"
    )
    events = Events(workspace.root, (workspace.root / "runs").resolve())
    (workspace.root / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "stages/prepare.py", "runs/x"], cwd=workspace.root, capture_output=True, text=True, check=False,
        env={**os.environ, **events.environment, "PYTHONPATH": "lib"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = events.calls()
    assert disorder(calls, leave=[".lock", ".log", "hashes.json"]) == []
    top = str((workspace.root / "runs/x").resolve())
    renames = [c for c in calls if c.what == "rename" and c.to == f"{top}/prepare"]
    manifests = [c for c in calls if c.to.endswith("/manifest.json")]
    assert len(renames) == 1 and manifests and manifests[-1].number < renames[0].number
    written = [c.number for c in calls if c.what in ("open", "write", "link") and c.path.endswith("a/f")]
    assert written and max(written) < manifests[-1].number


def test_what_the_rules_see() -> None:
    def of(*calls: tuple[str, ...]) -> list[str]:
        return disorder(Call(n, 1, what, path, to[0] if to else "") for n, (what, path, *to) in enumerate(calls))

    good = [("open", "/r/.f"), ("write", "/r/.f"), ("fsync", "/r/.f"), ("rename", "/r/.f", "/r/f"), ("fsync", "/r")]
    assert of(*good) == []
    assert "was not flushed before" in of(*good[:2], *good[3:])[0]
    assert of(*good[:4]) == ["/r/f: its folder was not flushed at all"]
    assert of(*good[:2]) == ["/r/.f was not flushed at all"]
    made = [("create", "/r/a"), ("fsync", "/r/a")]
    assert of(*made, *good) == of(*made, ("unlink", "/r/a")) == []
    assert of(*made, ("rename", "/r", "/s"), ("fsync", "/")) == ["/r/a: its folder was not flushed before /r became /s"]
    assert of(*made, ("rename", "/r/.m", "/r/manifest.json"), ("fsync", "/r")) == [
        "/r/a: its folder was not flushed before the manifest"
    ]


@pytest.mark.seconds
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "EFBIG", "short"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, fault: str) -> None:
    root = tmp_path / "out"
    root.mkdir()
    program = (
        "import sys\nfrom pathlib import Path\nfrom sft.common.files import write_atomic\nfrom sft.common.process import report_errors\n"
        "with report_errors('x'):\n    write_atomic(Path(sys.argv[1]), b'new' * 50)\n"
    )
    events = Events(tmp_path, root)
    run(events, program, str(root / "f"))
    assert (root / "f").read_bytes() == b"new" * 50
    count = len(events.calls())
    for at in range(1, count + 1):
        (root / "f").write_text("old")
        events.arm(at, fault)
        try:
            run(events, program, str(root / "f"), status=0 if fault == "short" else 1)
        except AssertionError as error:
            raise AssertionError(f"event {at}: {error}") from error
        assert (root / "f").read_bytes() in ({b"new" * 50} if fault == "short" else {b"old", b"new" * 50})
        assert [p.name for p in root.iterdir()] == ["f"]
