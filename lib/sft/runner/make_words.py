"""The words on Make's command line: its variables, and the fields of a recipe among them. Standard library only.

split_overrides("RECIPE=x lr=1e-4")      ->  ["lr=1e-4"]
variable("RECIPE=x", "RECIPE")           ->  "x"
with_model(overrides, goals, fields, runs)       MODEL=… as the field of a recipe that it stands for
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.common.errors import SftError
from sft.common.strings import first_names
from sft.recipe import recipe, schema
from sft.runner import models

OF_A_RUN = (
    *schema.STAGES, "report", "all", "preview", "steps", "lr-range", "overfit", "watch", "export", "push-hub", "card",
    "dry-run", "baseline", "cancel", "collect", "fetch", "sweep", "show", "why", "doctor", "extend",
)  # fmt: skip
"""Goals of Make that need RECIPE=."""
_MADE = (*schema.STAGES, "all", "smoke")
"""Goals that make stages."""
READERS: dict[str, tuple[str, ...]] = {
    "RECIPE": (*OF_A_RUN, "smoke", "new", "import-config"), "CLUSTER": (*OF_A_RUN, "smoke", "new", "import-config", "setup", "to-hf", "to-core"), "DATA": (*OF_A_RUN, "smoke", "new", "chat", "serve"),
    "RUNS": (), "PYTHON": (), "TORCH": (), "DRY_RUN": (), "MODEL": (),
    "ALLOW_DIRTY": (*_MADE, "sweep", "baseline", "watch", "dry-run", "doctor", "to-hf", "to-core"),
    "GPU_WAIT": (*_MADE, "sweep", "baseline", "watch", "lr-range", "overfit"), "RETRAIN": (*_MADE, "sweep"), "DETACH": (*_MADE, "baseline", "to-hf", "to-core"),
    "SHARDS": (*_MADE, "sweep"), "SHARD": _MADE, "CHECK": ("sync", "cp", "fetch"), "STAGE": ("dry-run", "fetch", "soak"), "FROM": ("new", "fetch", "import-config"), "TRAINER": ("import-config",), "GPUS": ("import-config",),
    "A": ("diff", "compare"), "B": ("diff", "compare"), "C": ("compare",), "ANYWAY": ("compare",),
    "RUN": ("verify", "delete", "archive", "soup", "chat", "serve"), "YES": ("delete", "archive", "extend"), "GOAL": ("sweep",), "JOBS": ("sweep",),
    "STEPS": ("soup", "lr-range", "overfit"), "WEIGHTS": ("soup",), "STEP": ("chat", "serve"), "TOKENS": ("chat",), "START": ("serve",), "SOURCE": ("preview",), "ROW": ("preview",),
    "SRC": ("cp", "to-hf", "to-core"), "DST": ("cp", "to-hf", "to-core", "export", "archive", "soup"), "ADAPTER": ("to-core", "serve"),
    "TOKENIZER": ("to-hf",), "TEMPLATE": ("to-hf",), "REPO": ("push-hub",), "PUSH": ("push-hub", "fetch"), "DELETE": ("cp",), "NO_CLOBBER": ("cp",),
    "TESTS": ("test", "test-quick", "compiled"), "ONLY": ("mutants", "flip", "fuzz", "bench-check"), "N": ("soak", "flip", "fuzz"), "SEED": ("soak",),
    "LOW": ("lr-range",), "HIGH": ("lr-range",), "BOUND": ("overfit",),
}  # fmt: skip
"""The variables of the Makefile and of the scripts that it runs (tests/test_cli.py compares), each with the goals that read it;
() for those that every goal takes."""
MAKE_VARIABLES = tuple(READERS)
FLAGS = {
    **dict.fromkeys(("YES", "ANYWAY", "TOKENS", "START", "CHECK", "DELETE", "NO_CLOBBER"), ("1",)),
    "PUSH": ("1", "public"),
}
"""The values of variables that only ask for something: `YES=0` must not delete."""
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "soup": (("STEPS", "DST"), 'make soup RUN=x STEPS="100 200" DST=folder'),
    "cp": (("SRC", "DST"), "make cp SRC=gs://bucket/prefix DST=folder"),
    "to-hf": (("SRC", "DST"), "make to-hf SRC=runs/x/train/step300 DST=folder"),
    "to-core": (("SRC", "DST"), "make to-core SRC=hf://org/name DST=step0"),
    "export": (("DST",), "make export RECIPE=x DST=folder"),
    "verify": (("RUN",), "make verify RUN=x; make runs lists them"),
    "delete": (("RUN",), "make delete RUN=x; make runs lists them"),
    "archive": (("RUN", "DST"), "make archive RUN=x DST=x.tar"),
    "diff": (("A", "B"), "make diff A=x B=y; make runs lists them"),
    "compare": (("A", "B"), "make compare A=x B=y; make runs lists them"),
    "push-hub": (("REPO",), "make push-hub RECIPE=x REPO=org/name"),
    "new": (("FROM", "RECIPE"), "make new FROM=smoke RECIPE=my-exp lr=1e-4"),
    "import-config": (("FROM",), "make import-config FROM=axolotl.yml RECIPE=my-exp GPUS=8"),
    "sweep": (("RECIPE",), 'make sweep RECIPE=x lr="1e-5 3e-5"'),
}
"""The variables that a goal cannot do without, and a command that has them."""
_PLAIN, _ONLY = (
    re.compile(r"[A-Za-z0-9_.,+/:@=-]+"),
    "only letters, digits and _.,+/:@=- are possible on the command line",
)
TALKING = ("chat", "serve")
"""Goals with a MODEL= of their own."""
WITH_MODEL = (
    "convert", "evaluate", "all", "report", "dry-run", "baseline", "cancel", "collect", "fetch", "card", "push-hub", "show", "why", "doctor",
)  # fmt: skip
"""Goals of a run that can be one of another model."""


def _words(text: str) -> Iterator[tuple[str, str]]:
    """(name, value) of each word of $(MAKEOVERRIDES), in which Make escapes spaces and doubles dollar signs."""
    for word in re.findall(r"(?:\\.|[^\s\\])+", text):
        name, _, value = re.sub(r"\\(.)", r"\1", word).replace("$$", "$").partition("=")
        yield name.rstrip(":+?!"), value


def split_overrides(text: str) -> list[str]:
    """The recipe's fields among Make's command-line variables ($(MAKEOVERRIDES)): the lower-case ones, as `field=value`.

    Raises SftError for an unknown upper-case name that resembles a variable or a field.
    """
    fields: list[str] = []
    for name, value in _words(text):
        if name.upper() in MAKE_VARIABLES and name not in (*MAKE_VARIABLES, *recipe.FIELDS):
            raise SftError(
                f"make: {name}={value}: Make's own variables are upper case; did you mean {name.upper()}={value}?"
            )
        if name[:1].islower() or (not name[:1].isalpha() and name[:1] != "_"):
            fields.append(f"{name.lstrip('-.')}={value}")  # other trainers write --learning_rate=…
        elif name not in MAKE_VARIABLES and name.lower() in recipe.FIELDS:
            raise SftError(
                f"make: {name}={value}: a recipe's field is lower case; did you mean {name.lower()}={value}?"
            )
        elif name not in MAKE_VARIABLES and (near := difflib.get_close_matches(name, MAKE_VARIABLES, n=1, cutoff=0.7)):
            raise SftError(
                f"make: no variable {name}={value}; did you mean {near[0]}=? (lower case names a recipe's field)"
            )
        elif name not in MAKE_VARIABLES:
            print(
                f"note: {name}={value} is no variable of this Makefile; programs get it in their environment",
                file=sys.stderr,
            )
    return fields


def variable(overrides: str, name: str) -> str:
    """The value of a variable on Make's command line, or in the environment."""
    return given(overrides, name) or os.environ.get(name, "")


def given(overrides: str, name: str) -> str:
    """The value of a variable on Make's command line; "" for one in the environment."""
    return dict(_words(overrides)).get(name, "")


def check_needs(overrides: str, goals: Sequence[str]) -> None:
    """Raises SftError before the environment is set up or a stage runs: for a goal whose variables are missing, and for a
    variable that no goal reads."""
    for name, value in _words(overrides):
        readers = READERS.get(name, ())
        if readers and set(readers).isdisjoint(goals):
            of_run = name == "RECIPE" and not set(goals).isdisjoint(READERS["RUN"])
            meant = "RUN=, the name of a run" if of_run else f"remove it (it is for make {first_names(readers)})"
            raise SftError(f"make {' '.join(goals)}: nothing here reads {name}={value}; next: {meant}")
        if value and value not in FLAGS.get(name, (value,)):
            raise SftError(f"{name}={value}: {' or '.join(FLAGS[name])} is expected; next: {name}=1, or leave it out")
    for goal in goals:
        names, example = NEEDS.get(goal, ((), ""))
        if missing := [f"{name}=" for name in names if not variable(overrides, name)]:
            verb = "is" if len(missing) == 1 else "are"
            raise SftError(f"make {goal}: {' and '.join(missing)} {verb} missing; next: {example}")
        if goal in TALKING and not (variable(overrides, "RUN") or variable(overrides, "MODEL")):
            raise SftError(f"make {goal}: RUN= or MODEL= is missing; next: make {goal} RUN=x; make runs lists them")


def check_characters(fields: Sequence[str]) -> None:
    """Raises SftError for an override that the shell would read otherwise: the Makefile does not quote them."""
    if odd := [f for f in fields if not _PLAIN.fullmatch(f)]:
        raise SftError(f"override {odd[0]!r}: {_ONLY}; next: make new FROM=… RECIPE=…, and edit")


def with_model(overrides: str, goals: Sequence[str], fields: Sequence[str], runs: Path) -> list[str]:
    """The fields, with MODEL=… as [convert] model. Raises SftError for goals that read no other model."""
    text = given(overrides, "MODEL")
    if not text or not {*TALKING}.isdisjoint(goals):
        return list(fields)
    if other := [g for g in goals if g not in WITH_MODEL]:
        raise SftError(
            f"make {other[0]}: it reads no MODEL=; next: make evaluate RECIPE=… MODEL=…, which scores another model under the tasks"
            " of a recipe, make convert with a step, or make chat MODEL=…"
        )
    if not _PLAIN.fullmatch(named := models.named(text, runs)):
        raise SftError(f"MODEL={named}: {_ONLY}; next: name a link to it")
    return [*fields, f"{recipe.MODEL}={named}"]
