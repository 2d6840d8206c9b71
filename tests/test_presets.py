"""The table of presets is what the generator writes from published config.json files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import huggingface_hub
import pytest

from published_configs import PUBLISHED
from sft.recipe.architecture import ModelConfig
from sft.recipe.presets import PRESETS, SOURCES, TABLE
from sft.sync import published


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub client with the published configurations."""
    for repo, revision, config in PUBLISHED.values():
        folder = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    offline = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return tmp_path


def test_the_committed_table_is_what_the_generator_writes(cache: Path) -> None:
    assert published.written(published.generate(TABLE, [])) == TABLE.read_bytes()
    named = {name: (repo, revision) for name, (repo, revision, _) in PUBLISHED.items()}
    assert {name: (row["repo"], row["revision"]) for name, row in json.loads(TABLE.read_text()).items()} == named


def test_a_preset_is_added_at_a_commit_and_only_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "presets.json"
    table.write_text("{}")
    monkeypatch.setattr(published, "TABLE", table)
    repo, revision, config = PUBLISHED["qwen3-4b"]
    assert published.main([f"mine={repo}@{revision}"]) == 0
    row = json.loads(table.read_text())["mine"]
    assert (row["repo"], row["revision"]) == (repo, revision)
    assert ModelConfig.from_value(row["architecture"]) == PRESETS["qwen3-4b"]
    assert published.main([f"mine={repo}@main"]) == 1
    assert "is not preset=org/name@<40 digits of a commit>" in capsys.readouterr().err
    file = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision / "config.json"
    file.write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    assert published.main([]) == 1
    assert f"{repo}@{revision}/config.json: final_logit_softcapping: 30.0" in capsys.readouterr().err


def test_every_published_preset_names_its_repository_and_revision() -> None:
    assert {name for name in PRESETS if not name.endswith("-tiny")} == set(SOURCES)
    assert SOURCES["qwen3-8b"] == "config.json of Qwen/Qwen3-8B at b968826d9c46dd6066d109eabc6255188de91218"
