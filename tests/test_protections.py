"""Protections that no other test holds. `make mutants` removes each protection once and looks whether a test fails."""

from __future__ import annotations

import ast
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mutants
from conftest import REPO
from sft.chat import bounds
from sft.chat.template import load_template
from sft.common import process
from sft.common.errors import SftError
from sft.common.files import remove_unfinished, write_atomic
from sft.common.locks import lock
from sft.formats import manifest
from sft.formats.manifest import Output
from sft.launch.slurm.script import directive
from sft.runner.publish import keep_only
from sft.storage import local
from sft.storage.checksums import Checksums
from sft.storage.contract import Meter

CODE = sorted(p for top in ("lib/sft", "stages") for p in (REPO / top).rglob("*.py"))
LOADERS = ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM", "AutoProcessor")


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(place, call, its dotted name) of every call in the code."""
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(REPO)}:{node.lineno}", node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call passes under this name; None if it passes none, and ... for an expression."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
    return None


@pytest.mark.seconds
def test_no_code_of_a_model_a_pickle_or_a_data_set_is_run() -> None:
    """Loaders of transformers say that they trust no code, torch.load that it reads weights only; nothing else unpickles or evaluates."""
    wrong = []
    for place, call, name in calls():
        trusting = keyword(call, "trust_remote_code")
        if trusting not in (None, False) or (
            name.rpartition(".from_pretrained")[0].rpartition(".")[2] in LOADERS and trusting is not False
        ):
            wrong.append(f"{place}: {name}: trust_remote_code")
        if (
            name in ("torch.load", "load")
            and keyword(call, "map_location")
            and keyword(call, "weights_only") is not True
        ):
            wrong.append(f"{place}: {name}: weights_only")
        if name in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "eval",
            "exec",
            "os.system",
            "yaml.load",
            "marshal.loads",
        ):
            wrong.append(f"{place}: {name}")
        if keyword(call, "shell") not in (None, False):
            wrong.append(f"{place}: {name}: shell")
    assert wrong == []


@pytest.mark.parametrize("module", ["sft/evaluation/hf_model.py", "sft/evaluation/vllm_model.py"])
def test_a_backend_says_that_it_trusts_no_code_of_a_model(module: str) -> None:
    tree = ast.parse((REPO / "lib" / module).read_text(encoding="utf-8"))
    given = [keyword(n, "trust_remote_code") for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert False in given, "the default of a library may change"


def test_a_manifest_cannot_make_the_verification_read_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "secret").write_text("s")
    for path in ("../secret", "/etc/hostname"):
        with pytest.raises(SftError, match="relative path"):
            manifest.broken_outputs(tmp_path / "stage", [Output(path, 1, "0" * 64)])
    (tmp_path / "stage/link").symlink_to("../secret")
    with pytest.raises(SftError, match="through a link"):
        manifest.broken_outputs(tmp_path / "stage", [Output("link", 1, "0" * 64)])


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        lock(tmp_path / "lock"),
        pytest.raises(SftError, match=rf"busy, held by pid {os.getpid()} on .*; next: wait for it or stop it"),
        lock(tmp_path / "lock"),
    ):
        pass


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    program = "import os, sys; from pathlib import Path; from sft.common.locks import lock\nwith lock(Path(sys.argv[1])): os._exit(0)"
    environment = {**os.environ, "PYTHONPATH": str(REPO / "lib")}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], env=environment, check=True)
    with lock(tmp_path / "lock"):
        assert f"pid {os.getpid()}" in (tmp_path / "lock").read_text()


def test_a_source_that_became_a_link_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "f").symlink_to("secret")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        local.copy_file(tmp_path / "f", tmp_path / "copy", Meter(1, 1, print))
    assert not (tmp_path / "copy").exists()


def test_a_copy_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("abc")
    monkeypatch.setattr(local, "checksums_of", lambda file: Checksums(3, "0" * 64))
    with pytest.raises(SftError, match="reading it back gave other bytes"):
        local.copy_file(tmp_path / "f", tmp_path / "copy", Meter(1, 3, print))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_an_error_of_a_disk_names_the_file_and_the_free_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    with (
        pytest.raises(SystemExit, match=r"/f: .* bytes free\); next: fix that disk"),
        process.report_errors("x", tmp_path),
    ):
        raise OSError(number, os.strerror(number), "/f")


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
    with pytest.raises(OSError, match="EIO"):
        write_atomic(tmp_path / "f", b"x")
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_stage_names_is_published(tmp_path: Path) -> None:
    for name in ("a/f", "a/g", "b/g"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/.f.x.unfinished").touch()
    remove_unfinished(tmp_path)
    assert not (tmp_path / "a/.f.x.unfinished").exists()
    keep_only(tmp_path, {"a/f"})
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["a", "a/f"]


@pytest.mark.parametrize(
    "text", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_template_reaches_nothing_but_its_arguments(text: str) -> None:
    with pytest.raises(SftError, match=r"unsafe|not safely callable"):
        load_template(
            "t", "{% for message in messages %}{{ message.content }}{% endfor %}" + text, {}, "</s>", ["</s>"]
        )


@pytest.mark.parametrize("value", ["a\nb", "a\\b", "a\x00b"])
def test_a_value_cannot_write_a_second_line_of_sbatch(value: str) -> None:
    with pytest.raises(SftError, match="cannot be given to sbatch"):
        directive("--job-name", value)


def test_a_value_of_sbatch_is_quoted() -> None:
    assert directive("--comment", 'a b"c') == '#SBATCH --comment="a b\\"c"'


LOOP = "{% for message in messages %}{{ message.content }}{% endfor %}"
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a doubling text": "{% set ns = namespace(t='x') %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t|length }}",
    "a repeated text": "{{ ('x' * 99999999999)|length }}",
    "a padded text": "{{ 'x'.center(99999999999)|length }}",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.seconds] if kind == "a doubling text" else []) for kind in ENDLESS]
)
def test_a_template_that_does_not_end_is_ended(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 0.2)
    with pytest.raises(SftError, match=r"MemoryError|takes more than"):
        load_template("t", LOOP + ENDLESS[kind], {}, "</s>", ["</s>"])


def test_bounds_of_a_template_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    with bounds.bounded():
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 0 and 0 < resource.getrlimit(resource.RLIMIT_AS)[0] < 1 << 50
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF))
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_protection_of_make_mutants_is_in_the_code_once(mutant: mutants.Mutant) -> None:
    """`make mutants` takes an hour: a row that the code has outgrown is found here."""
    assert (REPO / "lib/sft" / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert all((REPO / "tests" / name.partition("::")[0]).is_file() for name in mutant.tests.split())
