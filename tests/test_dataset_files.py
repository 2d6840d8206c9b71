"""Which files of a dataset are read: exactly the files of its split, wherever it is stored, and every other file is named."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from sft.common.errors import SftError
from sft.common.files import check_pointer
from sft.recipe import inputs
from sft.recipe.dataset_files import Choice, Tree, candidates, local_tree, select
from sft.recipe.file_names import row_format, split_of

WHAT = "[prepare] sources: d"


def tree(names: str, **texts: str) -> Tree:
    """A tree of names, separated by spaces; `texts` are the contents of files, with '_' for '.' in their names."""
    contents = {name.replace("_", ".", 1) if name == "README_md" else name: text for name, text in texts.items()}
    return Tree(tuple(names.split()), lambda name: contents[name].encode())


def chosen(names: str, split: str = "train", subset: str = "", ignore: tuple[str, ...] = (), **texts: str) -> list[str]:
    return list(select(tree(names, **texts), Choice(split, subset, ignore), WHAT).files)


def selected(root: Path, split: str = "train"):
    return select(local_tree(root, WHAT), Choice(split), WHAT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"), ("A.JSONL", "jsonl"), ("d/a.ndjson", "ndjson"), ("a.json.gz", "json.gz"), ("a.jsonl.ZST", "jsonl.zst"),
        ("a.csv.xz", "csv.xz"), ("a.tsv.bz2", "tsv.bz2"), ("a.parquet", "parquet"), ("a.parquet.gz", None), ("a.gz", None),
        ("a.txt", None), ("jsonl", None), ("a.v2.jsonl", "jsonl"),
    ],
)  # fmt: skip
def test_formats_by_name(name, expected):
    assert row_format(name) == expected


def test_without_a_word_for_a_split_all_files_are_train():
    assert chosen("a.jsonl b.jsonl.zst sub/c.csv") == ["a.jsonl", "b.jsonl.zst", "sub/c.csv"]
    with pytest.raises(SftError, match="no file or folder names a split"):
        chosen("a.jsonl b.jsonl", split="test")
    with pytest.raises(SftError, match="no subsets"):
        chosen("a.jsonl", subset="nope")


@pytest.mark.parametrize(("split", "expected"), [
    ("train", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
    ("test", ["data/test-00000-of-00001.parquet"]), ("validation", ["data/dev.jsonl"]), ("val", ["data/dev.jsonl"]),
])  # fmt: skip
def test_the_split_chooses_by_names(split, expected):
    names = "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet data/dev.jsonl"
    assert chosen(names, split) == expected


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(SftError, match=r"split 'tets': the splits are test, train; did you mean 'test'\?"):
        chosen("train.jsonl test.jsonl", split="tets")


def test_a_file_of_no_split_beside_others_is_refused_or_ignored():
    with pytest.raises(SftError, match=r'extra.jsonl: no split in the name.*ignore_files = \["extra.jsonl"\]'):
        chosen("train.jsonl test.jsonl extra.jsonl")
    assert chosen("train.jsonl test.jsonl extra.jsonl", ignore=("extra.*",)) == ["train.jsonl"]


def test_what_is_not_read_is_named():
    with pytest.raises(SftError, match=r"cannot read 2 of its files: b.zip, c.jsonl.lz4"):
        chosen("a.jsonl b.zip c.jsonl.lz4 README.md LICENSE .gitattributes", README_md="no front matter")
    with pytest.raises(SftError, match="no file with rows"):
        chosen("README.md", README_md="")


@pytest.mark.parametrize(("others", "line"), [
    ("b.zip c.zip", '["b.zip", "c.zip"]'),
    (" ".join(f"x/{i}.zip" for i in range(30)) + " y.zip odd", '["odd", "**/*.zip"]'),
    (" ".join(f"{i}.tar.gz" for i in range(21)), None),
])  # fmt: skip
def test_the_line_to_add_is_for_all_files_that_are_not_read(others, line):
    """Many files are named by a pattern, which must not match a file with rows."""
    names = f"a.jsonl b.jsonl.gz {others}"
    with pytest.raises(SftError) as refused:
        chosen(names)
    found = re.search(r"ignore_files = (\[.*?\]) to the source", str(refused.value))[1]
    assert found == (line or json.dumps(sorted(others.split())))
    assert chosen(names, ignore=tuple(json.loads(found))) == ["a.jsonl", "b.jsonl.gz"]


def test_a_folder_of_token_ids_is_told_apart_from_rows():
    """Its tokenizer.json and .csv.gz would be read as rows."""
    with pytest.raises(SftError, match=r"token_ids_part_0000.npy has token ids, .* make import-config FROM="):
        chosen("labels_mask_part_0000.npy token_ids_part_0000.csv.gz token_ids_part_0000.npy tokenizer/tokenizer.json")


def test_a_saved_dataset_is_what_its_state_lists(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list([{"messages": "x"}] * 4)
    saved.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(b"rows of map()")
    assert list(selected(tmp_path / "one", "train").files) == ["data-00000-of-00001.arrow"]
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(SftError, match=r"listed in state.json and missing"):
        selected(tmp_path / "one", "train")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    found = selected(tmp_path / "two", "test")
    assert (
        found.files == ("test/data-00000-of-00001.arrow",) and "train/data-00000-of-00001.arrow" in found.other_splits
    )
    with pytest.raises(SftError, match=r"split 'dev': the splits are train, test"):
        selected(tmp_path / "two", "dev")
    with pytest.raises(SftError, match="split 'test': the folder holds one saved dataset"):
        selected(tmp_path / "one", "test")


def saved_as(split: str, folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list([{"n": 1}], split=datasets.Split(split)).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(("saved", "asked"), [("test", "train"), ("train_sft", "train"), ("train+test", "train"), ("train", "test")])  # fmt: skip
def test_a_saved_dataset_of_another_split_is_refused(tmp_path, saved, asked):
    folder = saved_as(saved, tmp_path / "mix" / "a")
    for root in (folder, tmp_path / "mix"):
        with pytest.raises(SftError, match=rf"split '{asked}': .*"):
            selected(root, asked)
    assert len(selected(folder, saved).files) == 1


def test_a_saved_dataset_of_the_split_is_read(tmp_path):
    assert selected(saved_as("train[:10%]", tmp_path / "one")).files == ("data-00000-of-00001.arrow",)
    assert selected(saved_as("validation", tmp_path / "two"), "dev").files == ("data-00000-of-00001.arrow",)
    assert len(selected(saved_as("test", tmp_path / "mix" / "test"), "test").files) == 1


SHARD_README = "---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n"


@pytest.mark.parametrize("readme", ["", SHARD_README])
def test_a_missing_shard_is_named(readme):
    names = "README.md data/train-00000-of-00003.jsonl data/train-00002-of-00003.jsonl"
    with pytest.raises(SftError, match=r"missing files: data/train-00001-of-00003\.jsonl; next: fetch"):
        chosen(names, README_md=readme)
    assert len(chosen(names, ignore=("data/train-00001-of-00003.jsonl",), README_md=readme)) == 2
    assert len(chosen(names + " data/train-00001-of-00003.jsonl", README_md=readme)) == 3


@pytest.mark.parametrize(("names", "absent"), [
    ("c4.00000-of-00002.json.gz c4.00001-of-00002.json.gz", ""), ("c4.00000-of-00002.json.gz c4.00001-of-00002.json.gz.sha256", "c4.00001"),
    ("a_1_of_2.csv a_2_of_2.csv", ""), ("a_1_of_2.csv", "a_0_of_2"), ("a-00000-of-00002-12ab.parquet a-00001-of-00002-34cd.parquet", ""),
    ("train-0-of-1.jsonl test-0-of-2.jsonl", ""), ("x/a-0-of-2.jsonl y/a-1-of-2.jsonl", "x/a-1-of-2"),
])  # fmt: skip
def test_the_shards_that_a_name_demands(names, absent):
    if not absent:
        chosen(names)
    else:
        with pytest.raises(SftError, match=f"missing files: {absent}"):
            chosen(names)


def test_a_readme_inside_a_folder_that_chooses_files_is_refused():
    names, readme = "a/README.md a/v1/x.jsonl a/v2/x.jsonl b.jsonl", SHARD_README

    def files(*ignore: str) -> tuple[str, ...]:
        return select(Tree(tuple(names.split()), lambda _: readme.encode()), Choice("train", "", ignore), WHAT).files

    with pytest.raises(SftError, match=r"a/README\.md has configs.*name the folder a as a source of its own"):
        files()
    assert len(files("a/README.md")) == 3
    assert files("a/v1/*", "a/v2/*") == ("b.jsonl",)
    readme = "no front matter"
    assert len(files()) == 3


README = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/train-*.parquet
  - split: test
    path: ["en/test-*.parquet"]
- config_name: de
  data_files: "de/**"
---
# Card
"""
NAMES = "README.md en/train-0.parquet en/train-1.parquet en/test-0.parquet de/a.jsonl de/more/b.jsonl"


def test_configurations_of_a_readme():
    assert chosen(NAMES, README_md=README) == ["en/train-0.parquet", "en/train-1.parquet"]
    assert chosen(NAMES, "test", "en", README_md=README) == ["en/test-0.parquet"]
    assert chosen(NAMES, subset="de", README_md=README) == ["de/a.jsonl", "de/more/b.jsonl"]
    with pytest.raises(SftError, match=r"subset 'fr': the subsets are en, de"):
        chosen(NAMES, subset="fr", README_md=README)
    with pytest.raises(SftError, match=r"subset 'en', split 'dev': the splits are train, test"):
        chosen(NAMES, "dev", README_md=README)
    with pytest.raises(SftError, match=r"no file matches 'en/test-\*.parquet"):
        chosen("README.md en/train-0.parquet de/a.jsonl", "test", README_md=README)


A, B = "- config_name: a\n  data_files: a.jsonl\n", "- config_name: b\n  data_files: b.jsonl\n"


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (A + "  sep: ';'\n", r"subset 'a': README.md sets sep = ';', and nothing here reads it"),
        (A + A, "several subsets 'a'"),
        (A + "  default: true\n" + B + "  default: true\n", "several defaults: a, b"),
    ],
)
def test_a_readme_that_is_not_followed_completely_is_refused(configs, message):
    with pytest.raises(SftError, match=message):
        chosen("README.md a.jsonl b.jsonl", README_md=f"---\nconfigs:\n{configs}---\n")


@pytest.mark.parametrize(
    "config",
    [
        '{data_dir: ./sub, data_files: "*.jsonl"}', "{data_dir: sub/, data_files: [{split: train, path: [./a.jsonl]}]}",
        "{data_dir: .}", '{data_files: "**"}', '{data_files: "sub/*"}', '{data_files: ["[!a].jsonl", "**/a.jsonl"]}',
    ],
)  # fmt: skip
def test_the_datasets_library_follows_a_readme_to_the_same_files(tmp_path, config):
    from datasets import load_dataset_builder

    for name in ("a.jsonl", "b.jsonl", "sub/a.jsonl", "sub/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- {config[0]}config_name: default, {config[1:]}\n---\n")
    found = load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / ".cache")).config.data_files["train"]
    assert list(selected(tmp_path, "train").files) == sorted(str(Path(file).relative_to(tmp_path)) for file in found)


def test_a_split_that_a_readme_names_twice_has_the_files_of_both():
    files = "".join(f"  - split: train\n    path: {name}.jsonl\n" for name in "ab")
    readme = f'---\n"configs":\n- config_name: a\n  data_files:\n{files}---\n'
    assert chosen("README.md a.jsonl b.jsonl c.jsonl", README_md=readme) == ["a.jsonl", "b.jsonl"]


def test_the_planner_takes_the_files_of_all_configurations_and_needs_no_yaml(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    assert candidates(tree(NAMES, README_md=README), Choice(), WHAT) == sorted(
        NAMES.split(), key=lambda n: n.split("/")
    )
    assert candidates(tree("train.jsonl test.jsonl"), Choice(), WHAT) == ["train.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        "train.jsonl sub/test.jsonl validation-00000-of-00001.jsonl", "my_train.jsonl my_test.jsonl", "train-0.jsonl train-1.jsonl dev.jsonl",
        "data/train/a.jsonl data/test/b.jsonl", "train2024.jsonl test2024.jsonl", "training/x.jsonl evaluation/y.jsonl",
        "data/train-00000-of-00001.jsonl data/test_sft-00000-of-00001.jsonl", "a/train.jsonl b/train.jsonl", "x.jsonl y.jsonl",
        "contest.jsonl pretrain.jsonl", "test/train.jsonl dev/a.jsonl", "train/dev_set.jsonl", "latest/a.jsonl",
        "data/part-00000-of-00002.jsonl data/part-00001-of-00002.jsonl", "val_1.jsonl train_1.jsonl",
    ],
)  # fmt: skip
def test_the_datasets_library_finds_the_same_splits(tmp_path, names):
    from datasets.data_files import DataFilesDict, get_data_patterns

    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    found = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path))
    theirs = {str(s): sorted(str(Path(f).relative_to(tmp_path)) for f in files) for s, files in found.items()}
    ours = {}
    for split in ("train", "validation", "test", "test_sft", "part"):
        with contextlib.suppress(SftError):
            ours[split] = list(selected(tmp_path, split).files)
    assert ours == theirs


def test_a_hub_cache_links_into_its_own_blobs(tmp_path):
    snapshot = tmp_path / "datasets--o--n" / "snapshots" / "0123"
    blobs = tmp_path / "datasets--o--n" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "a.jsonl").symlink_to("../../blobs/abc")
    assert local_tree(snapshot, WHAT).names == ("a.jsonl",)
    snapshot.with_name("4567").mkdir(), (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    with pytest.raises(SftError, match=r"next: name datasets--o--n/snapshots/0123$"):
        local_tree(snapshot.parents[1], WHAT)
    (tmp_path / "outside").write_text("{}")
    (snapshot / "b.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(SftError, match="leaves"):
        local_tree(snapshot, WHAT)


def test_a_linked_folder_is_named(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_text("{}")
    (tmp_path / "more").symlink_to("real")
    with pytest.raises(SftError, match=r"more/ \(a link to a folder\)"):
        selected(tmp_path, "train")


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    with pytest.raises(SftError, match=r"a\.jsonl is a link to (itself|nothing)"):
        local_tree(tmp_path, WHAT)


def test_a_pipe_is_refused(tmp_path):
    __import__("os").mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(SftError, match="neither a file nor a folder"):
        local_tree(tmp_path, WHAT)


def test_a_git_lfs_pointer_is_named(tmp_path):
    file = tmp_path / "b.jsonl"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n")
    with pytest.raises(SftError, match="git-lfs pointer, not the file; next: git lfs pull"):
        check_pointer(file, "b.jsonl")
    Path(file).write_text("{}\n")
    check_pointer(file, "b.jsonl")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.jsonl", "train"), ("x/Training-1.jsonl", "train"), ("test2024.parquet", "test"), ("dev/a.jsonl", "validation"),
        ("trainData.jsonl", "train"), ("testData.jsonl", "test"), ("tests/b.jsonl", "test"), ("sft_heldout.jsonl", "test"), ("held-out/a.csv", "test"),
        ("Holdout.jsonl", "test"), ("held_out.jsonl", "test"), ("validate/a.jsonl", "validation"), ("EVALSet.jsonl", "test"), ("testset.jsonl", "test"), ("dataset.jsonl", ""),
        ("test/train.jsonl", "test"), ("contest.jsonl", ""), ("train/test/a.jsonl", "train or test"), ("evaluation.v2.csv", "test"), ("train_test.jsonl", "train or test"),
    ],
)  # fmt: skip
def test_the_split_that_a_name_says(name, expected):
    assert split_of(name) == expected


def test_a_name_that_says_two_splits_is_refused():
    with pytest.raises(SftError, match=r"train_test\.jsonl: the name says train or test"):
        chosen("train_test.jsonl dev.jsonl")


def test_shards_that_push_to_hub_wrote_may_have_splits_of_any_name():
    names = "data/train_sft-00000-of-00001.parquet data/test_sft-00000-of-00001.parquet"
    assert chosen(names, "train_sft") == ["data/train_sft-00000-of-00001.parquet"]
    with pytest.raises(SftError, match="split 'train': the splits are test_sft, train_sft"):
        chosen(names)


def test_documentation_is_ignored_only_where_it_holds_no_rows():
    found = select(tree("license.jsonl LICENSE README.md card.png", README_md=""), Choice(), WHAT)
    assert (
        found.files == ("license.jsonl",)
        and set(found.ignored) == {"LICENSE", "README.md", "card.png"}
        and found.found == 4
    )


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(SftError, match=r"no file matches 'extar.\*'"):
        chosen("a.jsonl extra.jsonl", ignore=("extar.*",))


def test_saved_datasets_inside_a_folder_are_what_their_states_list(tmp_path):
    import datasets

    for name in ("one", "two"):
        datasets.Dataset.from_list([{"n": 1}]).save_to_disk(tmp_path / name)
    (tmp_path / "one" / "data-00001-of-00002.arrow").write_bytes(b"of an earlier save")
    found = selected(tmp_path)
    assert found.files == ("one/data-00000-of-00001.arrow", "two/data-00000-of-00001.arrow")
    assert "one/data-00001-of-00002.arrow" in found.ignored


def test_files_outside_of_a_readmes_patterns_are_named_and_a_file_that_cannot_be_read_is_refused():
    found = select(tree(NAMES + " more.zip", README_md=README), Choice(), WHAT)
    assert found.ignored == ("README.md", "more.zip") and found.other_splits == (
        "de/a.jsonl",
        "de/more/b.jsonl",
        "en/test-0.parquet",
    )
    with pytest.raises(SftError, match=r"subset 'de': de/c\.txt: named by README\.md and not read"):
        chosen(NAMES + " de/c.txt", subset="de", README_md=README)
    assert chosen(NAMES + " de/c.txt", subset="de", ignore=("de/*.txt",), README_md=README) == [
        "de/a.jsonl",
        "de/more/b.jsonl",
    ]


@pytest.mark.parametrize("files", ["[a.jsonl]", "{train: a.jsonl}", "[{split: train, path: [a.jsonl]}]", "a.jsonl"])
def test_every_form_of_data_files(files):
    readme = f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"
    assert chosen("README.md a.jsonl b.jsonl", README_md=readme) == ["a.jsonl"]


def test_the_folder_of_a_configuration():
    readme = "---\nconfigs:\n- config_name: default\n  data_dir: ./en\n---\n"
    assert chosen("README.md en/train.jsonl en/test.jsonl de/train.jsonl", README_md=readme) == ["en/train.jsonl"]


def test_hidden_folders_are_not_looked_into_and_the_hubs_own_folder_names_the_snapshot(tmp_path):
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "x.jsonl").symlink_to("/etc/passwd")
    (tmp_path / "a.jsonl").write_text("{}")
    assert selected(tmp_path).ignored == (".git",)
    (tmp_path / "snapshots" / "0123").mkdir(parents=True), (tmp_path / "blobs").mkdir()
    with pytest.raises(SftError, match=r"next: name .*/snapshots/0123"):
        local_tree(tmp_path, WHAT)


def test_evaluation_files_are_those_of_all_splits(tmp_path):
    import datasets

    assert list(select(tree("train.jsonl test.jsonl extra.jsonl"), Choice(None), WHAT).files) == [
        "extra.jsonl",
        "test.jsonl",
        "train.jsonl",
    ]
    saved = datasets.Dataset.from_list([{"n": 1}])
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path)
    assert len(select(local_tree(tmp_path, WHAT), Choice(None), WHAT).files) == 2
    (tmp_path / "test" / "state.json").unlink()
    with pytest.raises(SftError, match=r"test/state\.json is missing"):
        selected(tmp_path, "test")


def test_a_path_that_is_one_file_takes_no_options_that_choose_files(tmp_path):
    for name in ("a.jsonl", "test.jsonl", "a.txt"):
        (tmp_path / name).write_text("{}\n")

    def read(name: str, choice: Choice) -> list[str]:
        return list(inputs.dataset_files(tmp_path / name, name, choice)[0])

    assert read("a.jsonl", Choice()) == ["a.jsonl"] and read("test.jsonl", Choice("eval")) == ["test.jsonl"]
    for name, choice in (
        ("a.jsonl", Choice("test")),
        ("a.jsonl", Choice(subset="x")),
        ("a.jsonl", Choice(ignore_files=("b",))),
        ("a.txt", Choice()),
    ):
        with pytest.raises(SftError, match=f"{name}'.*next: "):
            read(name, choice)
    __import__("os").mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(SftError, match="neither a file nor a folder"):
        read("b.jsonl", Choice())
