"""The commands behind Make that need no environment: python -m sft plan|show|why|new|fields|verify|diff|compare.

    make show RECIPE=smoke          ->  python -m sft show --recipe smoke
    make why RECIPE=smoke lr=1e-3   ->  python -m sft why --recipe smoke --overrides 'lr=1e-3'

Standard library only, because the environment does not exist yet when Make first calls it. Exit status 0, 1 with a message
that names the next command, or 2 for wrong arguments (argparse). Programs of the environment use sft.runner.cli.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an old interpreter reads this file first
    sys.exit(
        f"error: Python {sys.version.split()[0]} is too old; next: install Python >= 3.11 and run make PYTHON=python3.11 …"
    )

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from sft.common import columns
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.formats import manifest
from sft.formats import run as run_format
from sft.formats.run import RunFile
from sft.recipe import recipe, row_fields, schema, time_limit, typed
from sft.recipe.edit import set_field, to_toml
from sft.recipe.options import name_of
from sft.runner import asked, make_words, plan, references, runs
from sft.runner.make_words import MAKE_VARIABLES, OF_A_RUN, split_overrides

RECIPES = plan.REPO / "recipes"


def runs_of(args: argparse.Namespace) -> list[recipe.Recipe]:
    """The runs of a command: each recipe in RECIPE= with the overrides, and each run whose manifest is a goal."""
    place = args.place
    found = {}
    for name in args.recipe.split():
        r = recipe.load(typed.find(RECIPES, name, "recipe"), args.fields, place.cluster)
        found[r.run] = r
    root = os.path.normpath(place.runs) + "/"
    for goal in (os.path.normpath(g) for g in args.goals.split()):
        if goal.startswith(root) and goal.endswith("/" + manifest.NAME):
            run = goal.removeprefix(root).split("/")[0]
            if run not in found:
                found[run] = plan.load_run(place, run, args.fields)
    return list(found.values())


def _words_of_setup(place: plan.Place) -> list[str]:
    """What the cluster's file says of the environment. Set-up reads it; the commands that need the file report its errors."""
    with contextlib.suppress(SftError):
        cluster = place.load_cluster()
        return [f"{name}:{value}" for name in ("torch", "python") if (value := getattr(cluster, name))]
    return []


def command_plan(args: argparse.Namespace) -> None:
    """One line of words for Make: plan-ok, environment:<digest>, torch:<build>, python:<program>, set:<override>,
    launcher-<stage>:<launcher>, detach:<stage>, tool:job, run:<run>, model:<run>, stale:<run>/<stage>, reuse:<run>/<stage>:<origin>."""
    goals = [g.split("/")[-2] if g.endswith(manifest.NAME) else g for g in args.goals.split()]
    asked.check_goals(args.goals.split(), asked.known_goals(plan.REPO / "Makefile"), _recipe_names())
    make_words.check_needs(args.overrides, goals)
    args.fields = make_words.with_model(args.overrides, goals, args.fields, args.place.runs)
    question = _question(args, goals)
    words = ["plan-ok", f"environment:{plan.environment_digest()}", *_words_of_setup(args.place)]
    if {"to-hf", "to-core"} & set(goals):
        make_words.check_characters(args.fields)
        words += _words_of_tool(args, goals, question)
    elif question.takes_none or set(goals) <= {"new"} or set(goals) == {"sweep"}:
        if goals != ["sweep"]:  # its fields have several values each
            question.resolve(args.fields)
    else:
        make_words.check_characters(args.fields)
        args.fields = question.resolve(args.fields)
        words += [*(f"set:{f}" for f in args.fields), *_words_of_runs(args, goals, question)]
    print(" ".join(words))


def _words_of_runs(args: argparse.Namespace, goals: list[str], question: asked.Asked) -> list[str]:
    """Words for the goals that make or show stages. Raises SftError where they cannot be made."""
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", str(args.place.runs)):
        raise SftError(
            f"RUNS={args.place.runs}: the path may have letters, digits and _./+- only, because Make and the shell read it;"
            " next: choose another folder"
        )
    needs_run = [g for g in goals if g in OF_A_RUN]
    shard = make_words.variable(args.overrides, "SHARD")
    found, words = runs_of(args), list[str]()
    if "baseline" in goals and found:
        found, goals = _baseline(args, found, goals), ["evaluate"]
        words += [f"set:{recipe.MODEL}={found[0].convert.model}"] * (not question.other_model)
    wanted = [s for s in schema.STAGES if s in goals or not {"all", "smoke"}.isdisjoint(goals)]
    if found:
        cluster = args.place.load_cluster()
        asked.check_here(goals, cluster, args.place.cluster)
        words += [f"launcher-{s}:{cluster.launcher if s in cluster.stages else 'local'}" for s in schema.STAGES]
        words += _detached(args, wanted)
    if shard and (beyond := [g for g in needs_run if g != "prepare"]):
        raise SftError(
            f"make {beyond[0]} SHARD={shard}: SHARD is for prepare; next: make prepare … SHARD={shard}, then SHARD=merge/n"
        )
    if needs_run and not found:
        raise SftError(f"make {needs_run[0]}: which recipe? next: make {needs_run[0]} RECIPE=… (one of {_recipes()})")
    for run in found:
        words += _words_of_model(run, goals)
        _check_time_limits(run, wanted, cluster, args.place)
        words += _words_of_work(args, run, goals, question)
    return words


def _words_of_model(run: recipe.Recipe, goals: Sequence[str]) -> list[str]:
    """The word for a run that evaluates a model that it does not train."""
    if not run.convert.model:
        return []
    if others := [g for g in goals if g in ("sync", "train", "watch", *asked.HERE)]:
        raise SftError(
            f"{run.file}: [convert] model = {run.convert.model!r}: this run trains nothing, so make {others[0]} has nothing to make; next: make evaluate"
        )
    return [f"model:{run.run}"]


def _check_time_limits(run: recipe.Recipe, wanted: Sequence[str], cluster: schema.Cluster, place: plan.Place) -> None:
    for stage in set(wanted) & set(cluster.stages):
        time_limit.check_limit(cluster, run.hardware(place.cluster, stage))
    if "train" in wanted and "train" in cluster.stages:
        time_limit.check_notice(cluster, run.hardware(place.cluster, "train"))


def _words_of_work(
    args: argparse.Namespace, run: recipe.Recipe, goals: Sequence[str], question: asked.Asked
) -> list[str]:
    """Which stages of a run are to be made, and which are those of other runs. Prints what could not be checked."""
    work = plan.work(args.place, run, [question.dry_run if g == "dry-run" else g for g in goals])
    for line in work.unchecked:
        print(columns.for_terminal(f"note: {line}"), file=sys.stderr)
    retrain = make_words.variable(args.overrides, "RETRAIN") not in ("", "0") or "train" not in question.chain
    retrain |= set(goals) <= {"steps", *asked.HERE}  # these do not train the run
    if "train" in work.stale and not retrain:
        _refuse_to_start_again(args, run)
    words = [f"run:{run.run}", *(f"stale:{run.run}/{stage}" for stage in (*work.stale, *work.reused))]
    return words + [f"reuse:{run.run}/{stage}:{origin.parent.name}" for stage, origin in work.reused.items()]


def _words_of_tool(args: argparse.Namespace, goals: list[str], question: asked.Asked) -> list[str]:
    """Words for make to-hf and to-core: with a CLUSTER that has a scheduler, they are jobs. Raises SftError."""
    if len(goals) > 1:
        raise SftError(f"make {' '.join(goals)}: {goals[0]} takes no other goal; next: make them one by one")
    cluster = args.place.load_cluster()
    launched = cluster.launcher != "local"
    numbers = [f for f in args.fields if launched and f.partition("=")[0] in typed.HARDWARE_FIELDS]
    others = [f for f in args.fields if f not in numbers]
    if unread := [f for f in others if f.partition("=")[0] in typed.HARDWARE_FIELDS]:
        raise SftError(
            f"override {unread[0]!r}: {goals[0]} is no job with CLUSTER={args.place.cluster}; next: remove it, or name a CLUSTER with a scheduler"
        )
    job = ["tool:job", *_detached(args, goals)] * launched
    return [*(f"set:{f}" for f in (*numbers, *question.resolve(others))), *job]


def _detached(args: argparse.Namespace, wanted: Sequence[str]) -> list[str]:
    """detach:<stage> for the last of them, where DETACH= asks for it."""
    asked_for = make_words.variable(args.overrides, "DETACH") not in ("", "0")
    return [f"detach:{wanted[-1]}"] if wanted and asked_for else []


def _baseline(args: argparse.Namespace, found: list[recipe.Recipe], goals: list[str]) -> list[recipe.Recipe]:
    """The run that scores the base of a recipe, or MODEL=."""
    if len(goals) > 1 or len(found) > 1:
        raise SftError("make baseline: one recipe and no other goal are expected; next: make baseline RECIPE=x")
    if not found or found[0].convert.model:
        return found
    r = found[0]
    if not r.model.base:
        raise SftError(
            f"{r.file}: training starts from random weights, which have no baseline; next: make baseline RECIPE={r.name} MODEL=folder"
        )
    return [recipe.load(Path(r.file), [*args.fields, f"{recipe.MODEL}={r.model.base}"], args.place.cluster)]


def _refuse_to_start_again(args: argparse.Namespace, r: recipe.Recipe) -> None:
    """Raises SftError where training would set a finished one aside only because it is to be longer."""
    if not (args.place.runs / r.run / "train" / manifest.NAME).is_file():
        return
    from sft.runner import extension  # start-up: most trainings are new

    if found := extension.find(args.place, r):
        raise extension.refuse(found, r)


def _question(args: argparse.Namespace, goals: list[str]) -> asked.Asked:
    """What was asked for. A recipe that is broken is reported where it is loaded."""
    cluster = args.place.load_cluster() if args.recipe else schema.Cluster(storage="")
    found: list[recipe.Recipe] = []
    with contextlib.suppress(SftError):
        found = runs_of(args) if goals != ["sweep"] else []
    other_model = bool(found) and all(r.convert.model for r in found)
    dry_run = make_words.variable(args.overrides, "STAGE") or ("evaluate" if other_model else "train")
    if "dry-run" in goals and dry_run not in schema.STAGES:
        raise SftError(f"make dry-run STAGE={dry_run}: no such stage; next: one of {', '.join(schema.STAGES)}")
    watches = any(r.evaluate.every for r in found)
    return asked.Asked(goals, cluster, args.place.cluster, dry_run, other_model=other_model, watches=watches)


def command_show(args: argparse.Namespace) -> None:
    """The resolved recipe with the origin of each value, its model, and the state of each stage."""
    from sft.runner.show import show  # start-up: the planner does without

    args.fields = make_words.with_model(args.overrides, ["report"], args.fields, args.place.runs)
    for r in _one_or_more(args):
        show(args.place, r)


def command_why(args: argparse.Namespace) -> None:
    """Each stage of each run: done, or the reasons why it would run."""
    args.fields = make_words.with_model(args.overrides, ["report"], args.fields, args.place.runs)
    for r in _one_or_more(args):
        work = plan.work(args.place, r, [])
        for stage in (*r.stages, "report"):
            reused = f"reuses {work.reused[stage]}" if stage in work.reused else "up to date"
            print(f"{r.run}/{stage}: {'; '.join(work.stale.get(stage, [])) or reused}")


def command_reuse(args: argparse.Namespace) -> None:
    """Makes a stage of a run a reference to the same stage of another run, which the planner found. Make calls this."""
    from sft.common.locks import lock  # start-up: the planner locks nothing

    fields = make_words.with_model(args.overrides, ["report"], args.fields, args.place.runs)
    if args.run.endswith(recipe.BASELINE) and fields == args.fields:
        own = plan.load_run(args.place, args.run.removesuffix(recipe.BASELINE), fields)
        fields = [*fields, f"{recipe.MODEL}={own.model.base}"]
    if os.environ.get("DRY_RUN"):
        print(f"[{args.stage}] would reuse {args.place.runs / args.origin / args.stage}")
        return
    r = plan.load_run(args.place, args.run, fields)
    run, origin = args.place.runs / r.run, args.place.runs / args.origin / args.stage
    (run / ".work").mkdir(parents=True, exist_ok=True)
    with lock(run / ".work" / f"{args.stage}.lock"):
        references.refer(run, args.stage, origin)
        RunFile(r.name, tuple(f"{k}={v}" for k, v in r.overrides)).write(run / run_format.NAME)
    print(f"[{args.stage}] reuses {origin}", flush=True)


def command_new(args: argparse.Namespace) -> None:
    """Copies a recipe to a new name with changed fields. Comments and layout stay."""
    source = typed.find(RECIPES, args.copy_from, "recipe")
    if not typed.NAME.fullmatch(args.recipe):
        raise SftError(
            f"make new RECIPE={args.recipe!r}: a name is lower-case letters, digits, '.' and '-'; next: choose another"
        )
    target = RECIPES / f"{args.recipe}.toml"
    if target.exists():
        raise SftError(f"{target}: exists already; next: choose another RECIPE= or edit it")
    recipe.load(source, args.fields, args.place.cluster)
    text = source.read_text(encoding="utf-8")
    for override in args.fields:
        name, _, value = override.partition("=")
        path = recipe.locate(name, args.place.cluster, [])
        assert path is not None  # load() above has checked it
        text = set_field(text, ".".join(path[:-1]), path[-1], value)
    write_atomic(target, text.encode())
    try:
        recipe.load(target, (), args.place.cluster)
    except SftError:
        target.unlink()
        raise
    print(f"{target.relative_to(plan.REPO)}\nnext: edit it, then make show RECIPE={args.recipe}")


def command_fields(args: argparse.Namespace) -> None:
    """Every option with its default, meaning, choices and launchers. A '*' marks those that change a result."""
    for title, cls in [*((f"[{t}]", c) for t, c in schema.TABLES.items()), ("[[prepare.sources]]", schema.Source),
                       ("[on.<cluster>.<stage>]", schema.Hardware), ("env/<cluster>.toml", schema.Cluster)]:  # fmt: skip
        print(f"\n{title}")
        for f in dataclasses.fields(cls):
            default = (
                "{}" if f.default is dataclasses.MISSING else "preset's" if f.default is None else to_toml(f.default)
            )
            default = "required" if f.metadata.get("required") else default
            mark = "*" if f.metadata["key"] and cls not in (schema.Hardware, schema.Cluster) else " "
            choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
            readers = "".join(f" [{reader}]" for reader in (*f.metadata["launchers"], *f.metadata["stages"]))
            print(columns.hanging(f" {mark} {name_of(f):24} {default:14} ", f"{f.metadata['doc']}{choices}{readers}"))
    print("\ncolumns and message fields that prepare passes over, because they carry no training content")
    print("\n".join(map(columns.wrapped, row_fields.describe())))


def command_help(args: argparse.Namespace) -> None:
    """The goals of the Makefile with what they do."""
    for line in (plan.REPO / "Makefile").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            print(f"\n{columns.wrapped(line[3:])}")
        elif match := re.match(r"([a-z][a-z %-]*):.*?## (.*)", line):
            print(columns.hanging(f"  make {match[1]:15} ", match[2]))


def command_verify(args: argparse.Namespace) -> None:
    """Hashes every output of a run and follows its manifests."""
    from sft.runner.verify import verify  # start-up: the planner does without

    verify(runs.run_folder(args.place, args.run, "RUN"), args.place.cache)


def command_runs(args: argparse.Namespace) -> None:
    """A table of all runs, the newest first."""
    from sft.runner import listing  # start-up: the planner does without

    print(listing.listing(args.place.runs))


def command_extend(args: argparse.Namespace) -> None:
    """Lets a finished training go on with more epochs or steps. Without --yes it only says what it would do."""
    from sft.runner import extension  # start-up: the planner does without

    for r in _one_or_more(args):
        found = extension.find(args.place, r)
        if found is None:
            raise SftError(
                f"{args.place.runs / r.run}/train: no finished training that differs from {r.file} only in epochs or steps;"
                f" next: raise one of them there, or make why RECIPE={r.name}"
            )
        if others := extension.referred(found):
            raise SftError(
                f"{found.folder}: {', '.join(others)} refer to it; next: delete them, or copy the recipe: make new"
            )
        print(
            f"{found.line}; they stay, and it goes on from step {found.step} with its optimizer state and data position"
        )
        if found.cost:
            print(found.cost)
        print("the learning rate follows the schedule of the new length from there")
        if args.yes:
            extension.extend(found)
        print(f"next: make train RECIPE={r.name}" if args.yes else "nothing was done; next: the same with YES=1")


def command_delete(args: argparse.Namespace) -> None:
    """Deletes a run, or with a file in --dst packs it first. Without --yes it only says what it would do."""
    from sft.runner import removal  # start-up: the planner does without

    found = removal.removal(runs.run_folder(args.place, args.run, "RUN"))
    print("\n".join(found.lines()))
    if args.yes and args.dst:
        removal.archive(found, Path(args.dst))
    elif args.yes:
        removal.delete(found)
    print(
        f"{'archived in ' + args.dst if args.dst else 'deleted'}"
        if args.yes
        else "nothing was done; next: the same with YES=1"
    )


def command_archive(args: argparse.Namespace) -> None:
    """Packs a run into a file and deletes it."""
    if not args.dst:
        raise SftError("make archive: which file? next: make archive RUN=… DST=….tar YES=1")
    command_delete(args)


def command_schema(args: argparse.Namespace) -> None:
    """Writes the JSON Schemas of recipes and of cluster files, for editors."""
    from sft.recipe import json_schema  # start-up: the planner does without

    for name, text in json_schema.files().items():
        write_atomic(plan.REPO / name, text.encode())
        print(name)


def command_completion(args: argparse.Namespace) -> None:
    """Prints a bash script that completes goals, recipes, clusters and fields. zsh reads it too."""
    from sft.runner import completion  # start-up: the planner does without

    print(completion.script(plan.REPO, asked.known_goals(plan.REPO / "Makefile"), MAKE_VARIABLES))


def command_clean_cache(args: argparse.Namespace) -> None:
    """Deletes what prepare keeps between runs and can make again. Datasets, runs and downloads stay."""
    runs.clean_cache(args.place.cache)


def command_diff(args: argparse.Namespace) -> None:
    """The first stage and the fields in which two runs differ."""
    runs.diff(runs.run_folder(args.place, args.a, "A"), runs.run_folder(args.place, args.b, "B"))


def command_doctor(args: argparse.Namespace) -> None:
    """Everything that would stop each run on the cluster, in one table. Exit status 1 if a line is red."""
    environment = plan.REPO / ".venv" / "bin" / "python"
    if environment.is_file() and not _has("numpy"):
        os.environ["PYTHONPATH"] = str(plan.REPO / "lib")
        os.execv(environment, [str(environment), "-m", "sft", *sys.argv[1:]])
    from sft.launch.doctor import doctor  # start-up: the planner launches nothing
    from sft.launch.doctor.context import OK, RED, Context, Row  # start-up: the same

    args.fields = make_words.with_model(args.overrides, ["report"], args.fields, args.place.runs)
    red = 0
    for r in _one_or_more(args):
        rows = doctor.examine(Context(args.place, r, args.place.load_cluster(), r.stages, imports=True), ask=True)
        print(f"# {args.place.runs / r.run} on {args.place.cluster}")
        width = columns.WIDTH if sys.stdout.isatty() else sys.maxsize  # a file has each row on one line
        print(doctor.table([Row(OK, "recipe", r.file), *rows], width))
        red += sum(row.state == RED for row in rows)
    if red:
        raise SftError(
            f"{red} red line{'s' * (red > 1)}; next: correct {'them' if red > 1 else 'it'} before launching anything"
        )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def command_compare(args: argparse.Namespace) -> None:
    """The scores of A against those of B (and C), item by item. Writes a page into A's folder."""
    from sft.evaluation import compare  # start-up: the planner compares nothing
    from sft.reporting import comparison, trainings  # start-up: the same

    names = [("A", args.a), ("B", args.b), *(("C", name) for name in args.c.split())]
    folders = [runs.run_folder(args.place, name, variable) for variable, name in names]
    if len(set(folders)) < len(folders):
        raise SftError(
            f"{', '.join(f'{v}={n}' for v, n in names)}: a run cannot be compared with itself; next: name another run"
        )
    if not all((folder / "evaluate" / manifest.NAME).is_file() for folder in folders):
        print(trainings.text(trainings.compare(folders)))
        print(f"\n{comparison.draw(comparison.curves_page(folders), folders)}")
        print("not all of them have scores: make evaluate, then compare them again")
        return
    found = compare.compare(folders, anyway=args.anyway)
    print(compare.text(found, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    print(f"\n{comparison.draw(comparison.save(found, folders[0] / 'compare'), folders)}")


def command_sweep(args: argparse.Namespace) -> None:
    """Makes sibling runs of all combinations of values, and compares them."""
    from sft.launch import sweep  # start-up: the planner launches nothing
    from sft.reporting import comparison, sweeps  # start-up: the same

    if len(args.recipe.split()) > 1:
        raise SftError(
            f'make sweep RECIPE="{args.recipe}": one recipe is expected; next: make sweep RECIPE=x lr="1e-5 3e-5"'
        )
    file = typed.find(RECIPES, args.recipe.strip(), "recipe")
    found = sweep.siblings(file, args.fields, args.place.cluster)
    jobs = make_words.variable(args.overrides, "JOBS") or "0"
    if not jobs.isdigit():
        raise SftError(f"JOBS={jobs}: a number of runs at a time is expected; next: correct it")
    words = [f"CLUSTER={args.place.cluster}", *([f"DATA={args.data}"] if args.data else [])]
    runs, r = args.place.runs, args.recipe.strip()

    def finish() -> None:
        folders, page = [runs / sibling.run for sibling in found], runs / ".sweeps" / f"{r}.html"
        print(sweeps.best_first(folders, page) or comparison.of_trainings(folders, page), flush=True)

    sweep.sweep(args.place, r, found, make_words.variable(args.overrides, "GOAL") or "train", int(jobs), words, finish)


def _one_or_more(args: argparse.Namespace) -> list[recipe.Recipe]:
    found = runs_of(args)
    if not found:
        raise SftError(f"which recipe? next: --recipe NAME (one of {_recipes()})")
    return found


def _recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def _recipes() -> str:
    return ", ".join(_recipe_names())


def main() -> None:
    commands = {n.removeprefix("command_"): f for n, f in globals().items() if n.startswith("command_")}
    parser = argparse.ArgumentParser(
        prog="python -m sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    parser.add_argument("--recipe", default="", help="names of recipes, separated by spaces")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--data", default="", help="look up the recipe's paths here, separated by ':'")
    parser.add_argument("--cluster", default="local", help="use env/<cluster>.toml")
    parser.add_argument("--goals", default="", help="what Make was asked to make")
    parser.add_argument("--overrides", default="", help="Make's command-line variables")
    parser.add_argument("--from", dest="copy_from", default="", help="recipe that `new` copies")
    parser.add_argument("--run", default="", help="run that `verify` checks")
    parser.add_argument("--dst", default="", help="file that `archive` writes")
    parser.add_argument("--yes", action="store_true", help="`delete` and `archive` do what they say")
    parser.add_argument("--stage", default="", help="stage that `reuse` refers to")
    parser.add_argument("--origin", default="", help="run whose stage `reuse` refers to")
    parser.add_argument("--a", default="", help="first run of `diff` and `compare`")
    parser.add_argument("--b", default="", help="second run of `diff` and `compare`")
    parser.add_argument("--c", default="", help="more runs that `compare` compares with --a")
    parser.add_argument("--anyway", action="store_true", help="compare even if the prompts differ")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, lambda *_: os._exit(0))  # `make fields | head` ends quietly
    try:
        args.place = plan.Place.parse(args.runs, args.data, args.cluster)
        args.fields = split_overrides(args.overrides)
        commands[args.command](args)
    except SftError as e:
        sys.exit(columns.for_terminal(f"error: {e}"))
    except KeyboardInterrupt:
        sys.exit(130)  # see sft.common.process, which this start-up does without
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}; next: correct that path or its permissions")


if __name__ == "__main__":
    main()
