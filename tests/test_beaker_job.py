"""env/beaker-job.sh by itself: secrets that clients read from files."""

from __future__ import annotations

import configparser
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from conftest import REPO

CONFIG = "[default]\nregion = us-east-1\n\n[profile other]\nregion = us-west-2\n"
CREDENTIALS = "[default]\naws_access_key_id = AK $HOME `x`\naws_secret_access_key = a'b\"c\\n%\n"
SHOW = 'cp "$AWS_CONFIG_FILE" ../config; cp -p "$AWS_SHARED_CREDENTIALS_FILE" ../credentials; cp "$GOOGLE_APPLICATION_CREDENTIALS" ../google'


def job(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "code").mkdir(exist_ok=True)
    with tarfile.open(folder / "code" / "code.tar", "w"):
        pass
    known = {"PATH": os.environ["PATH"], "HOME": str(folder), "SFT_CODE": str(folder / "code"), "SFT_TOOL": "1"}
    return subprocess.run(
        ["bash", str(REPO / "env" / "beaker-job.sh"), "runs/x", "train", "0", "bash", "-c", SHOW],
        cwd=folder, env={**known, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_secrets_of_aws_and_google_become_files_that_only_the_user_reads(tmp_path: Path) -> None:
    done = job(tmp_path, AWS_CONFIG=CONFIG, AWS_CREDENTIALS=CREDENTIALS, GOOGLE_CREDENTIALS='{"type": "x"}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "config").read_text() == CONFIG + "\n"
    assert (tmp_path / "google").read_text() == '{"type": "x"}\n'
    file = tmp_path / "credentials"
    assert file.read_text() == CREDENTIALS + "\n" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "AK" not in done.stdout + done.stderr
    assert not (tmp_path / ".aws").exists()  # a home that has files of its own keeps them
    read = configparser.RawConfigParser()
    read.read(file)
    assert read["default"]["aws_secret_access_key"] == "a'b\"c\\n%"


def test_botocore_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = pytest.importorskip("botocore.session")
    job(tmp_path, AWS_CONFIG=CONFIG, AWS_CREDENTIALS=CREDENTIALS, GOOGLE_CREDENTIALS="{}")
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "olmo-sft" / ".aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "olmo-sft" / ".aws-credentials"))
    found = session.Session()
    assert found.get_config_variable("region") == "us-east-1"
    assert found.get_credentials().access_key == "AK $HOME `x`"


def test_a_file_that_is_named_already_is_kept(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).write_text(name)
    done = job(tmp_path, AWS_CONFIG=CONFIG, AWS_CONFIG_FILE=str(tmp_path / "mine"), AWS_CREDENTIALS=CREDENTIALS,
               GOOGLE_CREDENTIALS="{}")  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "config").read_text() == "mine"
