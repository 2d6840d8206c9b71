"""The files that prepare and packing write: what is written is read back, and other files are refused with the next command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import made_data
from preparing import conversation, stage, write_rows
from sft.common.errors import SftError
from sft.data import prepare
from sft.formats import dataset, preview, proof, rejects
from sft.formats.chunks import ChunkFile, PartManifest, ScreenHits
from sft.formats.dataset import DatasetInfo, PrepareMetrics
from sft.formats.packs import PackHeader, PackingLosses
from sft.formats.preview import Preview
from sft.formats.proof import Proof
from sft.formats.record import Record
from sft.formats.rejects import ContaminatedRow, RejectedRow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PrepareMetrics]:
    """prepare's folder with every file, and its metrics."""
    root = tmp_path_factory.mktemp("prepared")
    write_rows(root / "rows.jsonl", [*map(conversation, range(30)), "{"])
    write_rows(root / "test.jsonl", [conversation(3)])
    made = stage(root, decontaminate=("test.jsonl",))
    result = prepare.prepare(made)
    return made.out, PrepareMetrics.from_value(result.metrics, "metrics")


@pytest.mark.parametrize(("kind", "name"), [(DatasetInfo, dataset.NAME), (Proof, proof.NAME), (Preview, preview.NAME)])
def test_a_file_of_prepare_is_read_back_with_the_same_bytes(prepared: Any, kind: type[Record], name: str) -> None:
    file = prepared[0] / name
    assert kind.read(file).to_bytes() == file.read_bytes()


@pytest.mark.parametrize(("kind", "name"), [(RejectedRow, rejects.REJECTS), (ContaminatedRow, rejects.CONTAMINATED)])
def test_rows_that_were_left_out_are_read_back_with_the_same_bytes(
    prepared: Any, kind: type[Record], name: str
) -> None:
    data = (prepared[0] / name).read_bytes()
    rows = [kind.from_bytes(line, name) for line in data.splitlines()]
    assert rows and rejects.to_lines(rows) == data


def test_the_metrics_of_prepare_agree_with_its_dataset(prepared: Any) -> None:
    folder, metrics = prepared
    info = DatasetInfo.of(folder)
    size = info.splits["data"]
    assert (metrics.documents, metrics.tokens, metrics.labels) == (size.documents, size.tokens, size.labels)
    assert metrics.tokenizer == info.facts.tokenizer and metrics.rejected == info.sources[0].rejected == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size: a whole number is expected, not 'many'; next: make prepare again"),
        ({"boundaries": "space"}, "boundaries: one of 'eos', 'index' is expected"),
        ({"extra": 1}, "unknown field extra"),
        ({"format": 3}, "format 3 is newer; this code reads format 2; next: update this checkout"),
        ({"format": 3, "eos_id": None}, "format 3 is newer"),
        ({"eos_id": None}, "eos_id: a whole number is expected"),
    ],
)
def test_another_dataset_json_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    info = made_data.dataset_info(made_data.facts(10, 1, 0), [made_data.source_summary("x")])
    (tmp_path / dataset.NAME).write_text(json.dumps({**info.to_value(), **change}))
    with pytest.raises(SftError) as error:
        DatasetInfo.of(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / dataset.NAME}: ") and message in str(error.value)


def test_files_of_the_version_before_are_read(prepared: Any, tmp_path: Path) -> None:
    info = made_data.dataset_info(made_data.facts(10, 1, 0), [made_data.source_summary("x")]).to_value()
    later = ("near_duplicates", "held_out", "files_of_other_splits", "files_ignored")
    sources = [{k: v for k, v in source.items() if k not in later} for source in info["sources"]]
    old = {**{k: v for k, v in info.items() if k != "format"}, "sources": sources}
    (tmp_path / dataset.NAME).write_text(json.dumps(old))
    assert DatasetInfo.of(tmp_path).sources[0].near_duplicates == 0
    value = json.loads((prepared[0] / proof.NAME).read_bytes())
    sources = [{k: v for k, v in source.items() if k != "fields"} for source in value["sources"]]
    (tmp_path / proof.NAME).write_text(json.dumps({**value, "format": 2, "sources": sources}))
    assert Proof.read(tmp_path / proof.NAME).sources[0].fields.read == {}


def test_an_older_proof_is_refused(prepared: Any, tmp_path: Path) -> None:
    value = json.loads((prepared[0] / proof.NAME).read_bytes())
    (tmp_path / proof.NAME).write_text(json.dumps({**value, "format": 1}))
    with pytest.raises(
        SftError, match="format 1 is older or unknown; this code reads format 3; next: make prepare again"
    ):
        Proof.read(tmp_path / proof.NAME)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (PartManifest((ChunkFile("a.tok", 3, "ab"),)), '{\n "format": 1,\n "chunks": [\n  {\n   "file": "a.tok",\n   "bytes": 3,\n   "sha256": "ab"\n  }\n ]\n}'),
        (ScreenHits(((1, 2), (3, 4))), '{"hits": [[1, 2], [3, 4]]}'),
    ],
)  # fmt: skip
def test_files_in_the_cache_keep_their_bytes(tmp_path: Path, record: Record, text: str) -> None:
    record.write(tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == text and type(record).read(tmp_path / "x.json") == record


def test_the_header_of_packs_is_read_back(tmp_path: Path) -> None:
    header = PackHeader(64, "split", "ab", PackingLosses(1, 2, 3, 4, 5, 6, 7, 8, True))
    header.write(tmp_path / "index.json")
    assert PackHeader.read(tmp_path / "index.json") == header
    assert list(json.loads((tmp_path / "index.json").read_text())) == ["seq_len", "policy", "digest", "losses"]
