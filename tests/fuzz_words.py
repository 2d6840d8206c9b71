"""Inputs of make fuzz that people write: recipes, cluster files, Make's words and variables, chat templates."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import sft.__main__
import sft.formats
from checkout import REPO
from fuzz_values import HANG_S, TEXTS, TOML_VALUES
from sft.common.errors import SftError
from sft.recipe import clusters, recipe, schema
from sft.recipe.options import names_of
from sft.runner.make_words import READERS

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


# --- chat templates --------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        "{{ eos_token }}", "{% if true %}", "{% endif %}", "{{ undefined_thing }}", "{{ m.content }}", "{{ 1 / 0 }}", "{% break %}",
        "{{ raise_exception('x') }}", "{{ messages[0].__class__ }}", "{% for x in range(3) %}{% endfor %}", "| upper", "| trim", "| tojson", "[::-1]",
        "{{ strftime_now('%Y') }}", "{% set x = 1 %}", "{% generation %}", "{% endgeneration %}", "content", "role", "'assistant'", "{#", "<|im_end|>",
        "{% include 'x' %}", "{% macro f() %}", "{{ ''.join(messages) }}", "{{ messages }}", "not ", "- 1", "+ 'x'", ".get('x')", "\ufeff",
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
