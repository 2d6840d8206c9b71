"""make fuzz [N=1000] [ONLY=part of a name]: inputs of every kind, as hypothesis makes and damages them: used, or refused with an error of ours.

    .venv/bin/python tests/fuzz.py [N] [part of a name]

In:  TARGETS, each with a strategy of inputs and a check. A check returns whether the input was used, or raises SftError where it is refused.
     It asserts what must hold of a used input, by readers that this project did not write where there are some.
Out: a table of target, cases, used, refused, seconds. For any other exception, an assertion that fails, or HANG_S seconds without an end:
     the smallest input that hypothesis finds, and exit status 1.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkout import REPO
from fuzz_files import (
    FORMATS,
    broken_datasets,
    broken_packs,
    broken_weights,
    check_dataset,
    check_format,
    check_manifest,
    check_packs,
    check_source,
    check_weights,
    contents,
    sources_,
    stage,
)
from fuzz_values import HANG_S, Strategy, changed, edited
from fuzz_words import (
    GOALS,
    PIECES,
    WORDS,
    check_cluster,
    check_make,
    check_recipe,
    check_template,
    check_words,
    commands,
    templates,
    toml,
)
from sft.common.errors import SftError
from sft.recipe import recipe, schema
from sft.recipe.options import names_of


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
