"""make import-config: a recipe from another trainer's configuration, and what of it is not carried over.

    python stages/import_config.py axolotl.yml [--recipe NAME] [--trainer NAME] [--gpus N]

In:  a file that `sft.importing.reading` reads. Out: recipes/NAME.toml, and a list of every key: used, needing nothing, or left.
Exit status 1 if no valid recipe can be written; then no file is.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from sft.common import columns
from sft.common.errors import SftError
from sft.common.files import write_atomic
from sft.common.paths import REPO
from sft.importing import options, reading, sources
from sft.importing.config import Config
from sft.importing.draft import Draft
from sft.importing.names import DEFAULTS, NAMES
from sft.recipe import recipe, typed
from sft.runner.cli import SETTINGS, program

USAGE = "make import-config"
TITLES = {"trl": "TRL", "automodel": "NeMo Automodel", "olmo-core": "OLMo-core's SFT script"}
OTHER_LOSSES = re.compile(r"DPO|PPO|KTO|ORPO|Reward|ForwardKL", re.IGNORECASE)


@dataclass
class Imported:
    """A valid recipe's name and text, and what became of each key."""

    name: str
    text: str
    config: Config


def convert(file: Path, name: str = "", trainer: str = "", gpus: int = 0, cluster: str = "local") -> Imported:
    """Reads a configuration and makes the recipe's text. Raises SftError if it has no valid recipe."""
    trainer, values = reading.read(file, trainer)
    name = name or re.sub(r"[^a-z0-9.-]+", "-", file.stem.lower()).strip(".-") or "imported"
    if not typed.NAME.fullmatch(name):
        raise SftError(f"RECIPE={name}: a name is lower-case letters, digits, '.' and '-'; next: choose another")
    names = NAMES.get(trainer, {})
    config = Config(trainer, values, {n: key for n, key in names.items() if key in values or n not in values})
    _refuse_other_methods(file, config)
    stated = set(values)
    _add_defaults(config)
    draft = Draft()
    _fill(config, draft, cluster, gpus, name)
    assert not config.open, config.open  # every key has an end
    for key in [k for k in config.values if k not in stated]:
        _note_default(config, key)
    title = TITLES.get(trainer, trainer)
    for is_there, what, lacks in (
        (draft.sources, "dataset", "has no dataset that can be read"),
        (draft.get("model", "base"), "model", "names no model"),
    ):
        if not is_there:
            raise SftError(f"{file}: {title}'s configuration {lacks}{_why(config, what)}; next: {_next(trainer, what)}")
    head = f"From {file.name}, a configuration of {title}: {len(config.used)} of its {len(stated)} keys are here."
    text = draft.text(head)
    _check(name, text, file)
    return Imported(name, text, config)


def _next(trainer: str, what: str) -> str:
    """What to do about a configuration without data or model. OLMo-core's are in the commands of two scripts."""
    if trainer != "olmo-core":
        return "write a recipe with make new"
    script = {"dataset": "convert_sft_data_for_olmocore.py", "model": "Olmo-sft.py"}[what]
    return f"add the command of {script} to the file, which needs both, or write a recipe with make new"


def _fill(config: Config, draft: Draft, cluster: str, gpus: int, name: str) -> None:
    sources.model(config, draft)
    options.adapters(config, draft)
    sources.template(config, draft)
    sources.training_split(config, draft)
    sources.datasets(config, draft)
    options.packing(config)
    options.batch(config, draft, cluster, gpus)
    options.length_of_training(config, draft)
    if (value := config.get("learning_rate")) is not None:
        options.put(config, draft, "learning_rate", "train", "lr", value)
    options.schedule(config, draft)
    options.optimizer(config, draft)
    options.precision(config, draft)
    options.intervals(config, draft)
    options.trackers(config, draft, name)
    options.plugins(config)
    options.olmo_core(config, draft, name)
    options.seeds(config, draft)
    options.plain_options(config, draft, cluster)
    draft.put("evaluate", "suite", "quick", "there is none elsewhere: choose tasks or another suite")
    config.added["[evaluate] suite"] = "quick: the other configuration has no evaluation of this kind"


def _add_defaults(config: Config) -> None:
    """What the other trainer does where its configuration is silent, where ours would do something else."""
    defaults = dict(DEFAULTS[config.trainer])
    if config.has("warmup_steps"):
        defaults.pop("warmup_ratio", None)
    if config.has("adam_beta1") or config.has("adam_beta2"):
        defaults.pop("adam_betas", None)
    if config.has("packed_sequence_size"):
        defaults.pop("max_seq_length", None)
    for name, value in defaults.items():
        if not config.has(name) and not config.has(config.key(name)):
            config.values[config.key(name)] = value


def _note_default(config: Config, key: str) -> None:
    """A default is no key of the configuration: it is listed with what was added."""
    what = config.used.pop(key, None)
    config.skipped.pop(key, None)
    config.left.pop(key, None)
    if what:
        field = what.partition(" (")[0]
        config.added[field] = f"the default of {TITLES.get(config.trainer, config.trainer)}"
    del config.values[key]


def _refuse_other_methods(file: Path, config: Config) -> None:
    """Raises SftError for training that is not supervised finetuning."""
    for key in ("rl", "reward_model", "process_reward_model"):
        if config.has(key) and config.values[key] is not False:
            raise SftError(
                f"{file}: {key} = {config.values[key]!r}: this project does supervised finetuning only; next: write a recipe with make new"
            )
    for key in ("loss._component_", "loss_fn._target_", "loss"):
        text = str(config.values.get(key, ""))
        if OTHER_LOSSES.search(text):
            raise SftError(
                f"{file}: {key} = {text}: this project does supervised finetuning only; next: write a recipe with make new"
            )
        if re.search(r"CrossEntropy|CEWith|LinearCE|masked_ce|FusedLinear", text):
            config.skip(key, "the loss is the cross entropy of the trained tokens")


def _why(config: Config, word: str) -> str:
    """The reasons that were given for the keys of a table."""
    reasons = {f"{key}: {why}" for key, why in config.left.items() if word in key}
    return f" ({min(reasons)})" if reasons else ""


def _check(name: str, text: str, file: Path) -> None:
    """Raises SftError if the recipe is not valid."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.toml"
        target.write_text(text, encoding="utf-8")
        try:
            recipe.load(target)
        except SftError as error:
            reasons = str(error).replace(f"{target}: ", "").partition("\nnext:")[0]
            raise SftError(
                f"{file}: no valid recipe follows from it:\n{reasons}\nnext: correct these keys there, or write a recipe with make new"
            ) from None


def listing(imported: Imported) -> str:
    """Every key with what became of it, in three parts, and what the recipe has beside them."""
    config = imported.config
    lines = [f"recipes/{imported.name}.toml: of {len(config.values)} keys, in the recipe: {len(config.used)};"
             f" need nothing here: {len(config.skipped)}; not carried over: {len(config.left)}"]  # fmt: skip
    for title, ends in (("in the recipe", config.used), ("not carried over", config.left), ("added", config.added)):
        if ends:
            lines += ["", title, *(columns.hanging(f"  {key}  ", what) for key, what in ends.items())]
    if config.skipped:
        lines += ["", "needs nothing here"]
        lines += [
            columns.hanging("  ", f"{', '.join(keys)}: {why}") for why, keys in _by_reason(config.skipped).items()
        ]
    return "\n".join([*lines, "", f"next: read recipes/{imported.name}.toml, then make doctor RECIPE={imported.name}"])


def _by_reason(ends: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, why in ends.items():
        found.setdefault(why, []).append(key)
    return found


@program("import-config", USAGE)
@click.command(context_settings=SETTINGS)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--recipe", "name", default="", metavar="NAME", help="Name of the recipe; else the file's.")
@click.option(
    "--trainer",
    default="",
    metavar="NAME",
    help=f"One of {', '.join(reading.TRAINERS)}, where the file does not show it.",
)
@click.option(
    "--gpus",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="GPUs that trained with it, all machines together.",
)
@click.option("--cluster", default="local", metavar="NAME", help="Cluster whose microbatch is set.", show_default=True)
def main(file: Path, name: str, trainer: str, gpus: int, cluster: str) -> None:
    """Writes a recipe for what another trainer's configuration says, and lists by name what is not carried over."""
    imported = convert(file, name, trainer, gpus, cluster)
    target = REPO / "recipes" / f"{imported.name}.toml"
    if target.exists():
        raise SftError(f"{target}: exists already; next: RECIPE= and another name")
    write_atomic(target, imported.text.encode())
    print(listing(imported))
