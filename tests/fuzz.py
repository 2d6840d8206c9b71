"""make fuzz [N=1000] [ONLY=part of a name]: inputs of every kind, as hypothesis makes and damages them: used, or refused with an error of ours.

    .venv/bin/python tests/fuzz.py [N] [part of a name]

In:  TARGETS, each with a strategy of inputs and a check. A check returns whether the input was used, or raises SftError where it is refused.
     It asserts what must hold of a used input, by readers that this project did not write where there are some.
Out: a table of target, cases, used, refused, seconds. For any other exception, an assertion that fails, or HANG_S seconds without an end:
     the smallest input that hypothesis finds, and exit status 1.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import functools
import gzip
import importlib
import io
import json
import lzma
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sft.__main__
import sft.formats
from checkout import REPO
from published import publish
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.record import Record
from sft.recipe import clusters, recipe, schema
from sft.recipe.options import names_of
from sft.runner.make_words import READERS

HANG_S = 60
Strategy = st.SearchStrategy[Any]

# --- values and damages --------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
VALUES: Strategy = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3), max_leaves=6
)
HOSTILE = [
    "", " ", "..", "../x", "/etc/passwd", "~/x", "a b", "a'b", 'a"b', "a\\b", "a\nb", "$(touch CANARY)", "`touch CANARY`", ";touch CANARY",
    "|touch CANARY", "&touch CANARY", ">CANARY", "$$x", "$x", "%s", "{}", "*", "?", "-", "--help", "-rf", "é", "\u202e", "x" * 300, "runs/x/../y",
    "hf://", "gs://", "gs:///x", "s3://b/x", "hf://org/name@", "1e400", "nan", "0", "-1", "true", "#", "=", "a=b", ",", "@x", "x:y", "x//y",
]  # fmt: skip
"""Texts that other programs read otherwise: paths, words of shells, Make and options."""
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=12)
TOML_VALUES = (
    st.sampled_from(
        [
            "0", "-1", "1e400", "nan", "-inf", "true", '""', "[]", "[[]]", "[1, 'a']", "{}", "{a = 1}", "{a = {b = []}}", "1979-05-27", "07:32:00",
            "1979-05-27T07:32:00Z", "9" * 40, "0xff", "1_000", '"\\u0000"', "'''\n'''", "[{path = 1}]", "[{}]", "1e-320", "-0.0",
        ]
    )
    | st.integers().map(str) | st.floats().map(str) | TEXTS.map(json.dumps)
)  # fmt: skip


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """The bytes with some of them changed, removed, added or cut off; or not damaged at all."""
    for _ in range(draw(st.integers(0, 3))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 1, 1, 2, 8, 1 << 30]))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + size :]
    return data


@st.composite
def edited(draw: Any, text: str, pieces: Strategy) -> str:
    """The text with pieces put in or in place of others."""
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    for _ in range(draw(st.integers(0, 4))):
        at, size = draw(st.integers(0, len(words))), draw(st.sampled_from([0, 0, 1, 3, 20]))
        words[at : at + size] = [draw(pieces)]
    return "".join(words)


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """A JSON value with another value or none at some places."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 2))):
        places = list(_places(value))
        if not places:
            return value
        owner, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 3)) == 0:
            del owner[key]
        else:
            owner[key] = draw(VALUES | TEXTS)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield value, key
        yield from _places(below)


# --- recipes, cluster files, words -----------------------------------------------------------------------------------------


@st.composite
def toml(draw: Any, files: Sequence[Path], fields: Sequence[str]) -> str:
    """A file of ours with values, fields and characters that are not."""
    lines = draw(st.sampled_from(files)).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        name, equals, _ = lines[at].partition("=")
        if equals and draw(st.booleans()):
            lines[at] = f"{name}= {draw(TOML_VALUES)}"
        elif draw(st.integers(0, 4)):
            lines.insert(at + 1, f"{draw(st.sampled_from(fields))} = {draw(TOML_VALUES)}")
        else:
            lines.insert(at + 1, draw(st.text(max_size=20)))
    return "\n".join(lines)


def same(found: Any, given: Any) -> bool:
    """Whether a field has the value that a file gives it."""
    if isinstance(given, list):
        return len(found) == len(given) and all(map(same, found, given))
    if isinstance(given, dict) and not isinstance(found, dict):
        return all(same(getattr(found, names_of(type(found))[name].name), value) for name, value in given.items())
    return bool(found == (float(given) if isinstance(found, float) and isinstance(given, int) else given))


def check_recipe(folder: Path, text: str) -> bool:
    file = folder / "fuzzed.toml"
    file.write_text(text, encoding="utf-8")
    made = recipe.load(file)
    for name in ("prepare", "model", "train", "convert"):
        given = tomllib.loads(text).get(name, {})
        assert same(getattr(made, name), given), f"[{name}] is {getattr(made, name)}, and the file says {given}"
    for stage in made.stages:
        json.dumps(made.config(stage))
        made.hardware("local", stage)
    assert made.run and made.loss_weights is not None
    return True


def check_cluster(folder: Path, text: str) -> bool:
    file = folder / "fuzzed.toml"
    file.write_text(text, encoding="utf-8")
    made, given = clusters.load_cluster(file), tomllib.loads(text)
    assert same(made, given), f"{made}, and the file says {given}"
    return True


def escaped(word: str) -> str:
    """A word as $(MAKEOVERRIDES) has it."""
    return re.sub(r"([\\\s])", r"\\\1", word.replace("$", "$$"))


WORDS = st.lists(
    st.builds("{}={}".format, st.sampled_from([*READERS, *recipe.FIELDS]) | TEXTS, TEXTS | TOML_VALUES), max_size=3
)
GOALS = st.lists(
    st.sampled_from(
        ["prepare", "train", "all", "show", "steps", "sweep", "dry-run", "evaluate", "nothing", "soup", "cp"]
    ),
    max_size=2,
)


def check_words(folder: Path, words: tuple[list[str], list[str], str]) -> bool:
    """The planner in this process, with Make's variables and goals: what it prints is read by Make and the shell without quotes."""
    overrides, goals, name = words
    said, old = io.StringIO(), signal.getsignal(signal.SIGPIPE)
    line = [
        "sft",
        "plan",
        "--goals",
        " ".join(goals),
        "--overrides",
        " ".join(map(escaped, overrides)),
        "--recipe",
        name,
    ]
    try:
        with (
            unittest.mock.patch.object(sys, "argv", [*line, "--runs", str(folder / "runs")]),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(io.StringIO()) as warned,
        ):
            sft.__main__.main()
    except SystemExit as end:
        if end.code in (0, None):
            raise AssertionError("the plan ended early without an error") from None
        message = str(end.code) if isinstance(end.code, str) else warned.getvalue()
        assert message.startswith(("error: ", "usage: ")), message
        raise SftError(message) from None
    finally:
        signal.signal(signal.SIGPIPE, old)
    found = said.getvalue()
    assert found.startswith("plan-ok ") and re.fullmatch(r"[A-Za-z0-9_.,+/:@= -]+\n", found), found
    return True


VARIABLES = {
    "show": ("RECIPE", "CLUSTER", "DATA", "RUNS"), "why": ("RECIPE", "MODEL"), "verify": ("RUN", "RUNS"), "diff": ("A", "B"),
    "compare": ("A", "B", "C"), "delete": ("RUN",), "new": ("FROM",), "runs": ("RUNS", "CLUSTER", "DATA"), "doctor": ("RECIPE", "RUNS"),
}  # fmt: skip
PLAIN = ["smoke", "local", "runs", "gsm8k"]


@st.composite
def commands(draw: Any) -> list[str]:
    goal = draw(st.sampled_from(list(VARIABLES)))
    names = draw(st.lists(st.sampled_from(VARIABLES[goal]), min_size=1, max_size=2, unique=True))
    return [goal, *(f"{name}={draw(TEXTS | st.sampled_from(PLAIN))}".replace("\x00", "") for name in names)]


def check_make(folder: Path, words: list[str]) -> bool:
    """The real Make: no value of a variable is run by the shell, and none ends in a traceback."""
    canary = folder / "CANARY"
    line = [word.replace("CANARY", str(canary)) for word in words]
    done = subprocess.run(
        ["make", "-s", f"PYTHON={sys.executable}", *line],
        cwd=REPO, capture_output=True, text=True, timeout=HANG_S, check=False, errors="replace",
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"},
    )  # fmt: skip
    assert not canary.exists(), f"{line} ran a command"
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    if done.returncode:
        raise SftError(done.stderr)
    return True


# --- files between stages --------------------------------------------------------------------------------------------------


def every(cls: type[Record]) -> list[type[Record]]:
    return [
        sub for child in cls.__subclasses__() for sub in (child, *every(child)) if sub.__module__.startswith("sft.")
    ]


for module in pkgutil.iter_modules(sft.formats.__path__):
    importlib.import_module(f"sft.formats.{module.name}")
FORMATS = sorted({cls.__name__: cls for cls in every(Record)}.items())


def objects(cls: type[Record]) -> Strategy:
    """JSON objects with the fields of a format, or others, with values of any type."""
    names = st.sampled_from([*cls.__dataclass_fields__, "format", "schema", "other"])
    return st.dictionaries(names, VALUES | st.just(1), max_size=12)


def contents(cls: type[Record]) -> Strategy:
    """Bytes of any kind for a file of a format."""
    return st.binary(max_size=60) | (objects(cls) | VALUES).map(lambda v: json.dumps(v).encode())


def check_format(_: Path, case: tuple[type[Record], bytes]) -> bool:
    try:
        case[0].from_bytes(case[1], "the/file")
    except SftError as error:
        assert str(error).startswith("the/file: ") and "next: " in str(error), error
        raise
    return True


@functools.cache
def stage(folder: Path) -> dict[str, Any]:
    """The manifest of a published stage that is in the folder, as JSON."""
    made = folder / "x" / "prepare"
    (made / "data").mkdir(parents=True)
    (made / "data" / "a.npy").write_bytes(b"12345")
    (made / "b.json").write_text("{}")
    publish(made, ["data", "b.json"], stage="prepare", run="x", config={"a": [1, {"b": None}]}, metrics={"rows": 3})
    value: dict[str, Any] = json.loads((made / manifest.NAME).read_text())
    return value


def check_manifest(folder: Path, case: tuple[dict[str, Any], bool]) -> bool:
    """A manifest with other values, with the old seal or with its own."""
    value, sealed = case
    made = folder / "x" / "prepare"
    if sealed and isinstance(value, dict):
        value["seal"] = manifest.seal(value)
    (made / manifest.NAME).write_text(json.dumps(value))
    found = manifest.load(made / manifest.NAME)
    assert sealed or value.get("seal") is None or value == stage(folder), (
        "a changed manifest was believed"
    )  # old ones have no seal
    broken = manifest.broken_outputs(made, found.outputs)
    assert broken or all(
        (made / o.path).is_file() and (made / o.path).resolve().is_relative_to(made) for o in found.outputs
    )
    manifest.strays(made, found.outputs)
    return not broken


# --- datasets and packs ----------------------------------------------------------------------------------------------------


@functools.cache
def dataset(folder: Path) -> Path:
    """A small dataset that is in the folder."""
    import training

    training.write_split(folder / "data", 30, 1)
    return folder / "data"


@st.composite
def broken_datasets(draw: Any, folder: Path) -> tuple[str, bytes]:
    """(name of a file, its other bytes): any bytes, or a valid index with another number."""
    import numpy as np

    name = draw(
        st.sampled_from(["documents.npy", "documents.npy", *(p.name for p in sorted(dataset(folder).iterdir()))])
    )
    data = (dataset(folder) / name).read_bytes()
    if name != "documents.npy" or draw(st.booleans()):
        return name, draw(damaged(data))
    rows = np.load(io.BytesIO(data)).copy()
    field = draw(st.sampled_from(rows.dtype.names))
    number = draw(st.integers(0, 80) | st.integers(0, int(np.iinfo(rows.dtype[field]).max)))
    rows[field][draw(st.integers(0, len(rows) - 1))] = number
    out = io.BytesIO()
    np.save(out, rows)
    return name, out.getvalue()


def check_dataset(folder: Path, case: tuple[str, bytes]) -> bool:
    """A dataset that opens has each token in one document, and is packed and loaded, or refused on the way."""
    from sft.data.dataset import Dataset
    from sft.packing.packs import pack_dataset

    name, data = case
    file = dataset(folder) / name
    whole = file.read_bytes()
    file.write_bytes(data)
    try:
        made = Dataset.open(file.parent)
        assert sum(len(ids) for ids, _ in made) == made.tokens == sum(made.ids(p).size for p in range(made.parts))
        index = pack_dataset(made, 64)
        assert int(index.segments["length"].sum()) <= made.tokens
        load_packs(made, index)
    finally:
        file.write_bytes(whole)
    return True


def load_packs(made: Any, index: Any) -> None:
    """Every microbatch of one pass over the packs."""
    import numpy as np

    from sft.packing.loader import Loader, SpecialIds
    from sft.packing.steps import StepPlan
    from sft.recipe.presets import PRESETS

    if len(index):
        loader = Loader(StepPlan.once(index, 1), made, SpecialIds(1, 0), PRESETS["olmo3-tiny"])
        for number in range(min(3, len(index))):
            loader.microbatch(np.array([number]))


@functools.cache
def packs(folder: Path) -> tuple[Any, Path, dict[str, bytes]]:
    """(dataset, the folder of its packs in a cache, the files of that folder)."""
    from sft.data.dataset import Dataset
    from sft.packing.packs import pack_dataset

    made = Dataset.open(dataset(folder))
    pack_dataset(made, 64, cache=folder / "cache", identity="x")
    (found,) = (folder / "cache").iterdir()
    return made, found, {p.name: p.read_bytes() for p in sorted(found.iterdir())}


@st.composite
def broken_packs(draw: Any, folder: Path) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(packs(folder)[2])))
    return name, draw(damaged(packs(folder)[2][name]))


def check_packs(folder: Path, case: tuple[str, bytes]) -> bool:
    """A damaged index in the cache is made again; what is used is always the right one."""
    from sft.packing.packs import PackIndex, pack_dataset

    made, place, files = packs(folder)
    fresh = pack_dataset(made, 64)
    shutil.rmtree(place, ignore_errors=True)  # other maps of the files stay as they are
    place.mkdir()
    for name, data in (files | dict([case])).items():
        (place / name).write_bytes(data)
    used = True
    try:
        loaded = PackIndex.load(place)
        assert loaded.digest == fresh.digest and (loaded.segments == fresh.segments).all()
    except SftError:
        used = False
    found = pack_dataset(made, 64, cache=folder / "cache", identity="x")
    assert found.digest == fresh.digest and (found.segments == fresh.segments).all()
    return used


# --- chat templates --------------------------------------------------------------------------------------------------------

# Not among them: the whole list of messages as one text. Inside an answer's turn it is trained as the answer's text (RESULTS.md).
PIECES = st.sampled_from(
    [
        "{{ eos_token }}", "{% if true %}", "{% endif %}", "{{ undefined_thing }}", "{{ m.content }}", "{{ 1 / 0 }}", "{% break %}",
        "{{ raise_exception('x') }}", "{{ messages[0].__class__ }}", "{% for x in range(3) %}{% endfor %}", "| upper", "| trim", "| tojson", "[::-1]",
        "{{ strftime_now('%Y') }}", "{% set x = 1 %}", "{% generation %}", "{% endgeneration %}", "content", "role", "'assistant'", "{#", "<|im_end|>",
        "{% include 'x' %}", "{% macro f() %}", "{{ ''.join(messages) }}", "not ", "- 1", "+ 'x'", ".get('x')", "\ufeff",
    ]
) | st.text(max_size=4)  # fmt: skip


@functools.cache
def conversation() -> Any:
    from sft.chat.rows import RowReader

    source = schema.Source(path="x")
    row = {
        "messages": [
            {"role": r, "content": c}
            for r, c in (
                ("system", "Be brief."),
                ("user", "é 1"),
                ("assistant", "ok"),
                ("user", "2"),
                ("assistant", "yes"),
            )
        ]
    }
    return row, RowReader(schema.Prepare(tokenizer="t", sources=(source,)), source).read(row)


def check_template(_: Path, text: str) -> bool:
    """A template that is taken writes what transformers writes, and trains nothing that another role says."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from chat_samples import EOS, SPECIALS
    from sft.chat.rows import BadRow
    from sft.chat.template import TemplateOptions, load_template

    options = TemplateOptions(generation_prefix="rendered")  # "prompt" writes what the generation prompt gives
    made = load_template("fuzzed.jinja", text, {"eos_token": EOS}, EOS, SPECIALS, options=options)
    row, read = conversation()
    try:
        runs, _ = made.render(read)
    except BadRow as error:
        raise SftError(f"row: {error.reason}: {error}") from None
    render = functools.partial(render_jinja_template, chat_template=text, eos_token=EOS)
    (theirs,), _ = render([row["messages"]])
    rest = "".join(runs[1:]).removesuffix(EOS).rstrip()
    if rest and not theirs.startswith(
        runs[0]
    ):  # a document begins as the model is asked, where that shows another history
        (prompt,), _ = render([row["messages"][:2]], add_generation_prompt=True)
        assert prompt.startswith(runs[0]) and rest in theirs, (runs, prompt, theirs)
    else:
        assert theirs.startswith(runs[0]) and theirs[len(runs[0]) :].startswith(rest), (runs, theirs)
    trained = "".join(runs[1::2])
    assert "Be brief" not in trained and "é 1" not in trained, trained
    return True


@functools.cache
def templates() -> list[str]:
    from jinja_samples import TEXTS as texts

    return list(texts.values())


# --- sources ---------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"q{i} é", "completion": "a" * (i % 7)} for i in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@functools.cache
def packed() -> dict[str, bytes]:
    """The rows as files of every kind."""
    import bz2

    import pyarrow as pa
    import pyarrow.parquet as pq

    table, out, arrow = pa.Table.from_pylist(ROWS), io.BytesIO(), io.BytesIO()
    pq.write_table(table, out, row_group_size=16, compression="none", write_page_checksum=True)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table, 16)
    return {
        "x.jsonl": LINES, "x.json": json.dumps(ROWS).encode(), "x.jsonl.gz": gzip.compress(LINES, mtime=0), "x.jsonl.bz2": bz2.compress(LINES),
        "x.jsonl.xz": lzma.compress(LINES), "x.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
        "x.csv": b"prompt,completion\n" + b"".join(f"{r['prompt']},{r['completion']}\n".encode() for r in ROWS),
        "x.parquet": out.getvalue(), "x.arrow": arrow.getvalue(), "x.tar": tar(gzip.compress(LINES)),
    }  # fmt: skip


def tar(data: bytes) -> bytes:
    """An archive with one file of rows."""
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("x.jsonl.gz")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@st.composite
def sources_(draw: Any) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(packed())))
    return name, draw(damaged(packed()[name]))


def rows_of(folder: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """(rows, rejects) as prepare reads them."""
    from sft.data import blocks, sources

    shutil.rmtree(folder / "cache", ignore_errors=True)
    found, rejects = list[dict[str, Any]](), 0
    for file in sources.resolve(
        schema.Source(path=name), lambda p: folder / p, folder / "cache", log=lambda _: None
    ).files:
        for chunk in sources.cut(file):
            for batch in blocks.read(chunk):
                found += batch.rows
                rejects += len(batch.rejects)
    return found, rejects


def check_source(folder: Path, case: tuple[str, bytes]) -> bool:
    """No row is lost: a compressed file that is taken has all its rows, and every line of others is a row or a reject."""
    name, data = case
    (folder / name).unlink(missing_ok=True)  # a map of the old one may live on
    (folder / name).write_bytes(data)
    rows, rejects = rows_of(folder, name)
    if name.endswith((".gz", ".bz2", ".xz")):  # each has a checksum
        assert rows == ROWS and not rejects, f"{len(rows)} rows of {len(ROWS)}, and {rejects} rejects"
    elif name.endswith(".zst"):
        assert len(rows) + rejects >= 1 and (rows == ROWS or len(data) == len(packed()[name])), len(rows)
    elif name.endswith(".jsonl"):
        lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        assert len(rows) + rejects == len(lines), f"{len(rows)} rows, {rejects} rejects of {len(lines)} lines"
    elif name.endswith(".json") and data.lstrip()[:1] == b"[":
        assert len(rows) + rejects == len(json.loads(data)), len(rows)
    return True


# --- checkpoints -----------------------------------------------------------------------------------------------------------


@functools.cache
def weights(folder: Path) -> dict[str, bytes]:
    """A DCP checkpoint and safetensors of the same tensors, {name: bytes}. The folder has the checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    tensors = {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.ones(5, dtype=torch.bfloat16)}
    place = folder / "step1" / "model_and_optim"
    with contextlib.redirect_stderr(io.StringIO()):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(place), no_dist=True)
    (folder / "hf").mkdir()
    save_file({"a": tensors["model.a"], "b": tensors["model.b"]}, folder / "hf" / "model.safetensors")
    files = [*sorted(place.iterdir()), folder / "hf" / "model.safetensors"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@st.composite
def broken_weights(draw: Any, folder: Path) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(weights(folder))))
    return name, draw(damaged(weights(folder)[name]))


def check_weights(folder: Path, case: tuple[str, bytes]) -> bool:
    """The readers of checkpoints, without the hashes that come before them."""
    from contextlib import ExitStack

    from sft.checkpoint.dcp_reader import DcpReader
    from sft.checkpoint.weight_files import open_files

    for name, data in (weights(folder) | dict([case])).items():
        (folder / name).write_bytes(data)
    if case[0].startswith("hf"):
        with ExitStack() as stack:
            files, _ = open_files(folder / "hf", stack)
            for stored in files.values():
                assert stored.shape is not None
        return True
    for name, tensor in DcpReader(folder / "step1").items():
        assert tensor.numel() in (5, 12), name
    return True


# --- the runner ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A kind of input. `cases(folder)` makes inputs, `check(folder, input)` uses one. `cost`: cases that one of these is worth."""

    name: str
    cases: Callable[[Path], Strategy]
    check: Callable[[Path, Any], bool]
    cost: int = 1


RECIPES = sorted((REPO / "recipes").glob("*.toml"))
CLUSTERS = sorted((REPO / "env").glob("*.toml"))
TARGETS = (
    Target("recipes", lambda _: toml(RECIPES, list(recipe.FIELDS)), check_recipe),
    Target("cluster files", lambda _: toml(CLUSTERS, list(names_of(schema.Cluster))), check_cluster),
    Target("words of Make, planned", lambda _: st.tuples(WORDS, GOALS, st.sampled_from(["smoke", "", "olmo3-7b", "nothing", "smoke gsm8k"])), check_words, 4),
    Target("variables of Make, run", lambda _: commands(), check_make, 50),
    Target("formats between stages", lambda _: st.sampled_from([cls for _, cls in FORMATS]).flatmap(lambda cls: st.tuples(st.just(cls), contents(cls))), check_format),
    Target("manifests", lambda folder: st.tuples(changed(stage(folder)), st.booleans()), check_manifest),
    Target("documents and boundaries", broken_datasets, check_dataset, 4),
    Target("indices of packs", broken_packs, check_packs, 4),
    Target("chat templates", lambda _: st.sampled_from(templates()).flatmap(lambda text: edited(text, PIECES)), check_template, 10),
    Target("sources of every kind", lambda _: sources_(), check_source, 2),
    Target("weights and their metadata", broken_weights, check_weights, 2),
)  # fmt: skip


class Hang(Exception):
    """An input took HANG_S seconds."""


def _hang(*_: object) -> None:
    raise Hang(f"no end after {HANG_S} s")


def fuzz(target: Target, count: int, folder: Path, stop: Callable[[], bool] = lambda: False) -> Counter[str]:
    """{"used": n, "refused": n} of `count` inputs of a target. Raises what hypothesis found, with its smallest input."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=count < 100,
    )
    @given(case=target.cases(folder))
    def run(case: Any) -> None:
        old = signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            seen["used" if target.check(folder, case) else "refused"] += 1
        except SftError:
            seen["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)

    run()
    return seen


def main(words: Sequence[str]) -> int:
    """`words`: the number of cases, then a part of a target's name."""
    if not words or not words[0].isdigit():
        sys.exit(f"fuzz: N={' '.join(words[:1])}: a whole number is expected; next: make fuzz N=1000")
    count, only = int(words[0]), " ".join(words[1:])
    if not any(only in target.name for target in TARGETS):
        sys.exit(f"fuzz: ONLY={only}: no such input; next: one of {', '.join(t.name for t in TARGETS)}")
    faulthandler.enable()
    failed = 0
    print(f"{'input':32}{'cases':>8}{'used':>8}{'refused':>9}{'seconds':>9}", flush=True)
    for target in TARGETS:
        if only not in target.name:
            continue
        began, cases = time.monotonic(), max(5, count // target.cost)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            try:
                seen = fuzz(target, cases, Path(folder).resolve())
            except Exception as error:
                failed += 1
                print(f"{target.name:32}FAILED", flush=True)
                print("".join(traceback.format_exception(error, limit=-6))[-6000:], flush=True)
                continue
        print(
            f"{target.name:32}{seen.total():>8,}{seen['used']:>8,}{seen['refused']:>9,}{time.monotonic() - began:>9.1f}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
