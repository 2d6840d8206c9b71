"""Launching without a commit: a user's own values of a cluster, new files that do not matter, and a working tree with edits."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from sft.common.errors import SftError
from sft.launch import code
from sft.recipe import clusters, schema


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "c.toml"
    made.write_text('launcher = "beaker"\nstorage = "/weka/x"\nworkspace = "ai2/all"\nbudget = "ai2/b"\n')
    (tmp_path / "mine").mkdir()
    return made


def test_a_users_own_values_come_before_the_shared_file_and_the_environment_before_both(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clusters.load_cluster(file).workspace == "ai2/all"
    (file.parent / "mine/c.toml").write_text('workspace = "ai2/mine"\npriority = "high"\n')
    found = clusters.load_cluster(file)
    assert (found.workspace, found.priority, found.budget) == ("ai2/mine", "high", "ai2/b")
    monkeypatch.setenv("SFT_WORKSPACE", "ai2/now")
    monkeypatch.setenv("SFT_CLUSTERS", "ai2/a,ai2/b")
    monkeypatch.setenv("SFT_ACCOUNT", "for Slurm, so this cluster does not read it")
    found = clusters.load_cluster(file)
    assert (found.workspace, found.clusters) == ("ai2/now", ("ai2/a", "ai2/b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [('storage = "/x"', "'storage' in .*mine/c.toml: only account, "), ('priority = "hgih"', "did you mean 'high'"),
     ('account = "a"', "for launcher = 'slurm' only")],
    ids=["storage", "choice", "launcher"],
)  # fmt: skip
def test_what_cannot_be_a_users_own_value_is_refused(file: Path, text: str, message: str) -> None:
    (file.parent / "mine/c.toml").write_text(text)
    with pytest.raises(SftError, match=message):
        clusters.load_cluster(file)


def test_own_values_are_fields_that_only_launchers_read() -> None:
    fields = {f.name: f for f in schema.Cluster.__dataclass_fields__.values()}
    assert all(fields[name].metadata["launchers"] for name in schema.OWN)


def test_the_secret_address_of_notices_can_be_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "s.toml").write_text('launcher = "slurm"\nstorage = "/x"\n')
    (tmp_path / "mine/s.toml").write_text('on_event = "https://example.org/s3cret"\n')
    assert clusters.load_cluster(tmp_path / "s.toml").on_event == "https://example.org/s3cret"
    monkeypatch.setenv("SFT_ON_EVENT", "htps://example.org/s3cret")
    with pytest.raises(SftError, match="'on_event' = 'htps:…': a command, or an address") as refused:
        clusters.load_cluster(tmp_path / "s.toml")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [(f'storage = "{place}"', f"'storage' = '{place}': a folder, gs://bucket/prefix or s3://bucket/prefix is expected")
     for place in ("s3:/b/x", "gs:b", "gs://", "s3:///x", "https://b.s3.amazonaws.com/x", "weka://b/x")]
    + [('storage = "$SCRATCH/x"', "~ and $NAME are not expanded"), ('storage = "~/x"', "~ and $NAME are not expanded"),
       ('storage = "{run}/x"', "{run} is not replaced, only {runs} and {user}"),
       ('storage = "/x"\nruns = "{runs}/x"', "'runs' = '{runs}/x': {runs} is not replaced, only {user}")],
)  # fmt: skip
def test_a_place_that_would_become_a_folder_of_that_name_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "s.toml").write_text(line + "\n")
    with pytest.raises(SftError) as refused:
        clusters.load_cluster(tmp_path / "s.toml")
    assert message in str(refused.value)


@pytest.mark.parametrize("place", ["{runs}/.storage", "/a b/c:d", "rel/x", "gs://b-1_2.c/{user}/x", "s3://b"])
def test_folders_and_buckets_are_places(tmp_path: Path, place: str) -> None:
    (tmp_path / "s.toml").write_text(f'storage = "{place}"\n')
    assert clusters.load_cluster(tmp_path / "s.toml").storage == place


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    (root / "lib").mkdir(parents=True)
    (root / "lib/a.py").write_text("a = 1\n")
    git(root, "init", "--quiet", "-b", "main")
    git(root, "add", "-A")
    git(root, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "a")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)


def test_new_files_that_no_job_runs_do_not_block(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("x")
    (checkout / "plots").mkdir()
    (checkout / "plots/a.png").write_text("x")
    assert code.describe(checkout, "dataset").edits == ""
    (checkout / "lib/new.py").write_text("x")
    with pytest.raises(SftError, match=r"without the changes in lib/new\.py; next: .*; or ALLOW_DIRTY=1"):
        code.describe(checkout, "dataset")


def test_a_working_tree_with_edits_travels_as_it_is_with_its_diff(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "lib/a.py").write_text("a = 2\n")
    (checkout / "lib/new.py").write_text("n = 1\n")
    (checkout / "notes.txt").write_text("x")
    monkeypatch.setenv(code.ALLOW, "1")
    shipped = code.describe(checkout, "dataset")
    assert shipped.dataset == f"olmo-sft-{shipped.commit[:16]}-{shipped.edits}" and len(shipped.edits) == 8
    with tarfile.open(code.archive(checkout, shipped, tmp_path)) as packed:
        found = {m.name: (packed.extractfile(m) or pytest.fail(m.name)).read().decode() for m in packed}
    assert found["lib/a.py"] == "a = 2\n" and found["lib/new.py"] == "n = 1\n" and "notes.txt" not in found
    assert "-a = 1\n+a = 2\n" in found[code.DIFF]
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    (tmp_path / "edits").write_text(found[code.DIFF])
    git(clone, "apply", str(tmp_path / "edits"))  # git itself takes the patch, and it gives what was shipped
    assert {p: (clone / p).read_text() for p in ("lib/a.py", "lib/new.py")} == {
        p: found[p] for p in ("lib/a.py", "lib/new.py")
    }
    (checkout / "lib/a.py").write_text("a = 3\n")
    assert code.describe(checkout, "dataset").dataset != shipped.dataset
    with pytest.raises(SftError, match="without the changes"):  # a git commit cannot carry them
        code.describe(checkout, "git")


def test_edits_of_every_kind_are_in_the_patch(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in (("lib/gone.py", b"x\n"), ("lib/tool.sh", b"echo\n"), ("lib/odd '\"$ [*]ü.bin", b"\0a")):
        (checkout / name).write_bytes(data)
    git(checkout, "add", "-A")
    git(checkout, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "b")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    (checkout / "lib/gone.py").unlink()
    (checkout / "lib/tool.sh").chmod(0o755)
    (checkout / "lib/odd '\"$ [*]ü.bin").write_bytes(b"\0b\xff")
    (checkout / "lib/end").write_text("no new line at the end")
    (checkout / "lib/[a]*.py").write_text("")
    (checkout / "lib/link").symlink_to("a.py")
    before = subprocess.run(
        ["git", "-C", str(checkout), "status", "--porcelain"], capture_output=True, check=True
    ).stdout
    (tmp_path / "edits").write_bytes(code.edits(checkout))
    git(clone, "apply", str(tmp_path / "edits"))
    kept = {
        p.name: os.readlink(p) if p.is_symlink() else (p.read_bytes(), p.stat().st_mode)
        for p in (checkout / "lib").iterdir()
    }
    assert kept == {
        p.name: os.readlink(p) if p.is_symlink() else (p.read_bytes(), p.stat().st_mode)
        for p in (clone / "lib").iterdir()
    }
    after = subprocess.run(
        ["git", "-C", str(checkout), "status", "--porcelain"], capture_output=True, check=True
    ).stdout
    assert before == after


def test_files_that_change_while_they_are_packed_are_reported(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "lib/a.py").write_text("a = 2\n")
    monkeypatch.setenv(code.ALLOW, "1")
    shipped = code.describe(checkout, "dataset")
    (checkout / "lib/a.py").write_text("a = 3\n")
    with pytest.raises(SftError, match="changed while they were packed; next: run the same make again"):
        code.archive(checkout, shipped, tmp_path)


def test_a_clean_tree_is_its_commit_also_where_edits_are_allowed(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(code.ALLOW, "1")
    shipped = code.describe(checkout, "dataset")
    assert shipped.edits == ""
    with tarfile.open(code.archive(checkout, shipped, tmp_path)) as packed:
        assert "lib/a.py" in packed.getnames() and code.DIFF not in packed.getnames()
