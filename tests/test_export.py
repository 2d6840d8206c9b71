"""The dataset for OLMo-core's own scripts: the same documents, or a refusal with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preparing import conversation, stage, write_rows
from sft.common.errors import SftError
from sft.data import prepare
from sft.data.dataset import Dataset
from sft.export.olmo_core_dataset import olmo_core_export

PATTERNS = ("token_ids_part_*.npy", "labels_mask_part_*.npy")


def prepared(root: Path, template: str):
    write_rows(root / "rows.jsonl", [conversation(i) for i in range(100)])
    s = stage(root, template=template)
    prepare.prepare(s)
    return s


def test_olmo_core_finds_no_file_of_documents_that_it_would_take_apart(tmp_path: Path):
    s = prepared(tmp_path, "tulu")
    data = Dataset.open(s.out / "data")
    made = json.loads((s.out / "dataset.json").read_bytes())
    assert made["boundaries"] == "index" and len(data) == 100
    assert sum(int((ids == made["eos_id"]).sum()) for ids, _ in data) > len(data)
    assert not [p for pattern in (*PATTERNS, "*.csv.gz") for p in (s.out / "data").glob(pattern)]
    assert [line for line in s.said if "not for OLMo-core" in line and "'tulu' writes EOS" in line]
    with pytest.raises(SftError, match=r"not for OLMo-core: template 'tulu' writes EOS .* inside conversations"):
        olmo_core_export(s.out, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_an_export_holds_the_documents_that_olmo_core_counts(tmp_path: Path):
    pytest.importorskip("olmo_core")
    from olmo_core.data import NumpyPackedFSLDataset

    s = prepared(tmp_path, "olmo")
    folder = tmp_path / "exported"
    assert olmo_core_export(s.out, folder) > 10_000
    made = json.loads((folder / "dataset.json").read_bytes())
    theirs = NumpyPackedFSLDataset(
        *sorted(folder.glob(PATTERNS[0])), label_mask_paths=sorted(folder.glob(PATTERNS[1])), sequence_length=1024,
        pad_token_id=made["pad_id"], eos_token_id=made["eos_id"], vocab_size=made["vocab_size"],
        dtype=Dataset.open(s.out / "data").dtype.type, generate_doc_lengths=True,
    )  # fmt: skip
    theirs.work_dir = tmp_path / "work"
    theirs.prepare()
    packs = [theirs[i] for i in range(len(theirs))]
    lengths = [int(n) for pack in packs for n in pack["doc_lens"].tolist() if n]
    padded = sum(int(pack["input_ids"][-1]) == made["pad_id"] for pack in packs)
    assert len(lengths) - padded == made["splits"]["data"]["documents"] == 100
    assert sorted(p.name for p in (folder / "tokenizer").iterdir())[0] == "chat_template.jinja"
    with pytest.raises(SftError, match="exists; next: name a new folder"):
        olmo_core_export(s.out, folder)
