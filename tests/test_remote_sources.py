"""Datasets of the hub and of buckets: what is fetched, what is refused, and that the rows are those of the files on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.recipe.schema import Source
from sft.sources import blocks, input_files
from test_sources import ROWS, everything, resolved, write_arrow, write_jsonl


@pytest.mark.seconds
@pytest.mark.parametrize("path", ["hf://../x", "hf://a/b/c", "hf://a/b@$(x)", "s3://bucket/x"])
def test_odd_remote_names_are_refused_before_any_request(tmp_path, path):
    with pytest.raises(SftError, match="next:"):
        input_files.resolve(Source(path=path), lambda p: tmp_path / p, tmp_path)


@pytest.fixture
def no_rows_on_the_hub(monkeypatch):
    """Every dataset of the hub has one file, which only the `datasets` library can read."""
    import huggingface_hub

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="images.zip")])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)


@pytest.mark.usefixtures("no_rows_on_the_hub")
def test_a_hub_dataset_without_row_files_is_built_once_when_its_revision_is_pinned(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="hf://org/name@" + "a" * 40, split="train[:50%]", subset="main")
    for _ in range(2):
        (file,) = input_files.resolve(source, lambda p: tmp_path / p, tmp_path).files
    assert asked == [("org/name", "main", "train[:50%]", "a" * 40)]
    assert [row for chunk in input_files.cut(file) for batch in blocks.read(chunk) for row in batch.rows] == ROWS


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a/b", "train[:50%]", ""), ("a/b", "train[:50]", "")),
        (("a-b/c", "train", ""), ("a/b-c", "train", "")),
        (("a/b", "train", "x"), ("a/b", "x-train", "")),
    ],
)
@pytest.mark.usefixtures("no_rows_on_the_hub")
def test_two_pinned_hub_datasets_never_share_a_file(tmp_path, monkeypatch, one, other):
    import datasets

    def load_dataset(name, subset, split, revision):
        return datasets.Dataset.from_list([{"is": f"{name} {subset} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, split, subset in (one, other, one):
        source = Source(path=f"hf://{name}@{'a' * 40}", split=split, subset=subset)
        (file,) = input_files.resolve(source, lambda p: tmp_path / p, tmp_path).files
        (batch,) = blocks.read(input_files.cut(file)[0])
        assert batch.rows == [{"is": f"{name} {subset or None} {split}"}]


def test_a_hub_dataset_that_cannot_be_fetched_is_one_clear_error(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nmany lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    for path in ("hf://org/name", "hf://org/name@" + "a" * 40):
        with pytest.raises(SftError, match=rf"{path} \(split 'train'\): Couldn't reach the hub; next: check"):
            input_files.resolve(Source(path=path), lambda p: tmp_path / p, tmp_path)


def test_an_unpinned_hub_dataset_is_read_at_one_commit_which_is_logged_and_recorded(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    asked, said = [], []

    def load_dataset(name, subset, split, revision):
        asked.append(revision)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for commit in ("b" * 40, "b" * 40, "c" * 40):
        info = SimpleNamespace(sha=commit, siblings=[])
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, info=info, **__: info)
        (file,) = input_files.resolve(
            Source(path="hf://org/name"), lambda p: tmp_path / p, tmp_path, log=said.append
        ).files
        assert dict(file.origin) == {"commit": commit}
    assert asked == ["b" * 40, "c" * 40]
    assert all("not pinned" in line and "write @" in line for line in said) and len(said) == 3


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket as a folder; sft.storage.gcs itself has its own tests."""
    from sft.storage import transfer as storage
    from sft.storage.contract import Storage

    real = storage.open_storage
    root = tmp_path / "bucket"
    root.mkdir()

    def open_storage(where: str, cache: Path | None = None) -> Storage:
        return real(str(tmp_path / where.removeprefix("gs://")) if where.startswith("gs://") else where, cache)

    monkeypatch.setattr(storage, "open_storage", open_storage)
    return root


def test_an_object_and_the_files_under_a_prefix_are_read_from_a_bucket(tmp_path, bucket):
    (bucket / "mix" / "sub").mkdir(parents=True)
    write_jsonl(bucket / "mix" / "b.jsonl", ROWS[:5])
    write_jsonl(bucket / "mix" / "sub" / "c.jsonl", ROWS[5:9])
    (bucket / "mix" / "_notes.jsonl").write_text("{}")
    (bucket / "mix" / "README").write_text("no rows")
    (bucket / "saved").mkdir()
    (bucket / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}], "_split": null}')
    write_arrow(bucket / "saved" / "data.arrow", ROWS[:3])
    write_jsonl(bucket / "saved" / "other.jsonl", ROWS[3:])
    (bucket / "saved" / "saved").rename(bucket / "other")
    assert everything(tmp_path, "gs://bucket/saved")[0] == ROWS[:3]
    assert everything(tmp_path, "gs://bucket/mix")[0] == ROWS[:9]
    assert everything(tmp_path, "gs://bucket/mix/b.jsonl")[0] == ROWS[:5]
    said: list[str] = []
    found = input_files.resolve(
        Source(path="gs://bucket/mix"), lambda p: tmp_path / p, tmp_path / "cache", log=said.append
    ).files
    assert all(set(dict(f.origin)) == {"crc32c", "generation"} for f in found)
    assert any("gs://bucket/mix: a change in the bucket" in line for line in said)
    assert [f.name for f in resolved(tmp_path, "gs://bucket/mix/")] == [
        "gs://bucket/mix/b.jsonl",
        "gs://bucket/mix/sub/c.jsonl",
    ]


def test_a_bucket_without_rows_is_reported_by_name(tmp_path, bucket):
    (bucket / "empty").mkdir()
    for path in ("gs://bucket/empty", "gs://bucket/empty/x.jsonl"):
        with pytest.raises(SftError, match=path):
            resolved(tmp_path, path)


class Hub:
    """The hub's client, answered by a folder: what it lists, and what was fetched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.folder, self.fetched = folder, []
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def info(self, *_: object, **__: object) -> SimpleNamespace:
        names = [p.relative_to(self.folder).as_posix() for p in sorted(self.folder.rglob("*")) if p.is_file()]
        large = {n: SimpleNamespace(sha256=hash_file(self.folder / n)) for n in names}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, lfs=large[n], blob_id=None) for n in names])

    def download(self, _: str, allow_patterns: list[str], **__: object) -> str:
        self.fetched += allow_patterns
        return str(self.folder)


PINNED = "hf://org/name@" + "a" * 40


def test_a_hub_datasets_own_files_are_read_as_local_ones(tmp_path, monkeypatch):
    rows = [
        {"messages": "a"},
        {"messages": [{"role": 1}], "x": {"y": None}},
        {"messages": None},
    ]  # `datasets` would unify the types
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    (repo / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/[tv]*.jsonl\n---\n")
    write_jsonl(repo / "data" / "train.jsonl", rows)
    write_jsonl(repo / "data" / "other.jsonl", ROWS)
    hub = Hub(repo, monkeypatch)
    found = input_files.resolve(Source(path=PINNED), lambda p: tmp_path / p, tmp_path / "cache")
    (file,) = found.files
    assert everything(tmp_path, PINNED) == everything(tmp_path, "repo") == (rows, [])
    assert hub.fetched[:2] == ["README.md", "data/train.jsonl"] and found.other_splits == ("data/other.jsonl",)
    assert file.name == f"{PINNED}/data/train.jsonl" and dict(file.origin) == {"commit": "a" * 40}
    with pytest.raises(SftError, match=r"split 'train\[:50%\]': the splits are train"):
        input_files.resolve(Source(path=PINNED, split="train[:50%]"), lambda p: tmp_path / p, tmp_path)


def test_a_fetched_file_that_differs_from_the_hubs_hash_is_refused(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    hub = Hub(tmp_path, monkeypatch)
    info = hub.info()
    info.siblings[0].lfs.sha256 = "0" * 64
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: info)
    with pytest.raises(SftError, match=r"a\.jsonl differs from what the hub reports"):
        resolved(tmp_path, PINNED)


def test_without_a_network_the_clients_own_snapshot_answers_with_a_warning(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "hub" / "datasets--org--name" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "hub" / "datasets--org--name" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    write_jsonl(blobs / "0123", ROWS)
    (snapshot / "train.jsonl").symlink_to("../../blobs/0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def fail(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    said: list[str] = []
    found = input_files.resolve(Source(path=PINNED), lambda p: tmp_path / p, tmp_path / "cache", log=said.append)
    assert [f.name for f in found.files] == [f"{PINNED}/train.jsonl"] and "the hub does not answer" in said[0]
    assert (
        everything(tmp_path, f"hub/datasets--org--name/snapshots/{'a' * 40}")
        == everything(tmp_path, PINNED)
        == (ROWS, [])
    )


def test_the_same_rows_from_the_hub_and_from_disk_give_the_same_bytes(tmp_path, monkeypatch):
    """`datasets` would make JSON text of columns of two types, and fill structs with nulls."""
    from preparing import contents, stage
    from sft.data import prepare

    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    other = {"type": "function", "function": {"name": "calc", "arguments": {"x": [4, None]}}}
    rows = [
        {"messages": turns("rain?", {"role": "assistant", "content": "", "tool_calls": [call]})},
        {
            "messages": turns(
                [{"type": "text", "text": "sum?"}], {"role": "assistant", "content": "", "tool_calls": [other]}
            )
        },
        {"messages": turns('line1\nline2 "x" é', {"role": "assistant", "content": "plain"})},
    ]
    repo = tmp_path / "repo"
    repo.mkdir()
    write_jsonl(repo / "train.jsonl", rows)
    Hub(repo, monkeypatch)
    for path, out in (("repo", "disk"), (PINNED, "hub")):
        prepare.prepare(stage(tmp_path, sources=(Source(path=path),), out=out, cache=f"cache-{out}"))
    disk, hub = (contents(tmp_path / out / "data") for out in ("disk", "hub"))
    assert disk == hub and len(disk) > 4


def turns(question: object, answer: dict) -> list[dict]:
    return [{"role": "user", "content": question}, answer]
