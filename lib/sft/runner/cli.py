"""The command line of every program in the environment: arguments, help, errors, signals and exit statuses.

    @program("steps", "python -m sft.packing.arithmetic")
    @run_options
    def main(options: RunOptions) -> None:
        \"\"\"Prints the batch arithmetic of a run.\"\"\"

    if __name__ == "__main__":
        sys.exit(main())

`main()` parses sys.argv, `main(argv)` parses the given words. Exit status: 0 done, 1 an error that the user can fix (see
`sft.common.process.report_errors`), 2 wrong words, 75 run the same command again, 130 Ctrl-C, 143 SIGTERM.
The commands that Make needs before the environment exists (`python -S -m sft …`) use argparse instead.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sft.common.process import USAGE, exit_on_signals, report_errors
from sft.recipe.recipe import Recipe
from sft.runner import plan

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
COMMAND = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""Context settings of a program whose last argument is another program's command line."""
RUN_HELP = "RUN is the folder of a run, runs/<recipe>[_<field>-<value>…]. FIELD=VALUE overrides a field of the recipe."


@dataclass(frozen=True)
class RunOptions:
    """What every stage takes: the run's folder, the cluster, the DATA folders (separated by ':'), recipe overrides."""

    run: Path
    cluster: str = "local"
    data: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def place(self) -> plan.Place:
        """Raises SftError for a DATA folder that does not exist."""
        return plan.Place.parse(str(self.run.parent), self.data, self.cluster)

    def load_recipe(self) -> Recipe:
        """Raises SftError when the recipe and the overrides do not make this run."""
        return plan.load_run(self.place, self.run.name, self.overrides)


def _check_run(context: click.Context, parameter: click.Parameter, run: Path) -> Path:
    if run.parent == Path(".") and not run.is_absolute():
        raise click.BadParameter(f"{run}: the folder of a run is <runs>/<run>, e.g. runs/{run}")
    return run


_RUN_PARAMETERS = (
    click.argument("run", type=click.Path(path_type=Path), callback=_check_run),
    click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]..."),
    click.option("--cluster", default="local", metavar="NAME", help="Use env/NAME.toml.", show_default=True),
    click.option("--data", default="", metavar="FOLDERS", help="Look up the recipe's paths here, separated by ':'."),
)


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds RUN, FIELD=VALUE, --cluster and --data. The function gets them as `options`, its first argument."""

    @functools.wraps(function)
    def call(run: Path, cluster: str, data: str, overrides: tuple[str, ...], **others: Any) -> Any:
        return function(RunOptions(run, cluster, data, overrides), **others)

    decorated: Callable[..., Any] = call
    for parameter in reversed(_RUN_PARAMETERS):
        decorated = parameter(decorated)
    return decorated


def _check_checkout(script: Path) -> None:
    """Exits when a program would run another clone's code: .venv is linked, or was made there, or was moved.

    The clone is that of a script in stages/, else the folder that the command runs in.
    """
    root = script.resolve().parent.parent if script.parent.name == "stages" else Path.cwd()
    if root != plan.REPO and (root / "lib" / "sft").is_dir() and (root / "stages").is_dir():
        sys.exit(f"error: {script} would run the code of {plan.REPO}; next: export PYTHONPATH={root / 'lib'}")


@dataclass(frozen=True)
class Program:
    """A click command that ends as the module's docstring says.

    `name` is the prefix of its messages. The messages of a group's command have the command's name instead.
    """

    name: str
    usage: str
    command: click.Command
    signals: bool = True

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """The exit status: what the function returned, or 0. Other ends raise SystemExit.

        Signal handlers are set only for sys.argv: a caller with words of its own keeps its handlers.
        """
        if argv is None:
            _check_checkout(Path(sys.argv[0]))
            if self.signals:
                exit_on_signals()
        words = list(sys.argv[1:] if argv is None else argv)
        commands = self.command.commands if isinstance(self.command, click.Group) else {}
        name = words[0] if words and words[0] in commands else self.name
        with (
            report_errors(name),
            _report_usage(name, self.usage),
            self.command.make_context(self.usage, words) as context,
        ):
            return self.command.invoke(context) or 0


@contextlib.contextmanager
def _report_usage(name: str, usage: str) -> Iterator[None]:
    """A wrong command line prints the usage, the error and the next command, and exits with status 2."""
    try:
        yield
    except click.exceptions.Exit as end:  # --help
        sys.exit(end.exit_code)
    except click.UsageError as error:
        if error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        text = " ".join(error.format_message().split()).rstrip(".")
        print(f"[{name}] error: {text}; next: {usage} --help", file=sys.stderr)
        sys.exit(USAGE)


def program(
    name: str, usage: str, *, signals: bool = True, settings: dict[str, Any] | None = None
) -> Callable[[Callable[..., Any] | click.Command], Program]:
    """Makes a program of a function with click's decorators, or of a click group.

    usage: how it is called, e.g. "stages/cp.py". settings: more context settings, e.g. COMMAND.
    signals: False for a program that treats SIGTERM and Ctrl-C itself.
    """

    def make(function: Callable[..., Any] | click.Command) -> Program:
        if isinstance(function, click.Command):
            command = function
            command.context_settings = {**SETTINGS, **command.context_settings}
        else:
            command = click.command(name, context_settings={**SETTINGS, **(settings or {})})(function)
        if any(p.name == "run" for p in command.params) and any(p.name == "overrides" for p in command.params):
            command.epilog = RUN_HELP
        return Program(name, usage, command, signals)

    return make


@click.command("stage", context_settings=SETTINGS)
@run_options
def _stage(options: RunOptions) -> RunOptions:
    """One stage of a run."""
    return options


def parse_run(name: str, argv: Sequence[str]) -> RunOptions:
    """The options of the stage `name` in its command line; nothing runs. Exits with status 2 for wrong words."""
    usage = f"stages/{name}.{'sh' if name == 'train' else 'py'}"
    with _report_usage(name, usage), _stage.make_context(usage, list(argv)) as context:
        found: RunOptions = _stage.invoke(context)
    return found
