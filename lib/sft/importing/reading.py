"""Reads a configuration file of another trainer, or a shell script or text with its command line.

In:  YAML or JSON (axolotl, TRL, torchtune, NeMo Automodel, open-instruct), or a command line (TRL, open-instruct, OLMo-core's SFT script).
Out: the trainer's name and {dotted key: value}.
"""

from __future__ import annotations

import json
import re
import shlex
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sft.common.errors import SftError
from sft.importing.config import flatten

TRAINERS = ("axolotl", "trl", "torchtune", "automodel", "open-instruct", "olmo-core")
LAUNCHER = "launcher"
"""What comes before the training program on a command line, as keys below this name."""
_PROGRAMS = {
    "open_instruct/finetune.py": "open-instruct",
    "open_instruct/olmo_core_finetune.py": "open-instruct",
    "trl/scripts/sft.py": "trl",
    "scripts/sft.py": "trl",
    "sft.py": "trl",
    "Olmo-sft.py": "olmo-core",
    "OLMo-sft.py": "olmo-core",
    "convert_sft_data_for_olmocore.py": "olmo-core",
    "finetune.py": "open-instruct",
}
"""Training programs by the end of their paths; the first that fits."""
_MARKS = {
    "base_model": "axolotl",
    "step_scheduler": "automodel",
    "dataset_mixer_list": "open-instruct",
    "dataset_mixer": "open-instruct",
    "mixer_list": "open-instruct",
    "model_name_or_path": "trl",
    "per_device_train_batch_size": "trl",
}
"""Keys that only one trainer has; the first that is there."""


def read(file: Path, trainer: str = "") -> tuple[str, dict[str, Any]]:
    """(the trainer, {dotted key: value}) of a file. `trainer` says which one where the file does not show it.

    Raises SftError for a file that cannot be read, and for one whose trainer cannot be told.
    """
    if trainer and trainer not in TRAINERS:
        raise SftError(f"TRAINER={trainer}: no such trainer; next: one of {', '.join(TRAINERS)}")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SftError(f"FROM={file}: no such file; next: name the configuration of the other trainer") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SftError(f"FROM={file}: it cannot be read: {error}; next: name a file of text") from None
    if file.suffix in (".sh", ".bash", ".txt"):
        return _command(file, text, trainer)
    values = _tables(file, text)
    found = trainer or _trainer(values)
    if not found:
        raise SftError(
            f"FROM={file}: its keys do not show which trainer it is for; next: TRAINER= and one of {', '.join(TRAINERS)}"
        )
    return found, values


def _tables(file: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        raise SftError(f"FROM={file}: not valid {kind}: {' '.join(str(error).split())}; next: correct it") from None
    if not isinstance(found, Mapping) or not found:
        raise SftError(f"FROM={file}: a table of keys is expected; next: name the configuration of the other trainer")
    return flatten({str(k): v for k, v in found.items()})


def _trainer(values: Mapping[str, Any]) -> str:
    last = {key.rpartition(".")[2] for key in values}
    first = {key.partition(".")[0] for key in values}
    if "_component_" in last:
        return "torchtune"
    if "_target_" in last:
        return "automodel"
    return next((trainer for key, trainer in _MARKS.items() if key in first), "")


def _command(file: Path, text: str, trainer: str) -> tuple[str, dict[str, Any]]:
    """The options of the one training command in a script."""
    commands = [line for line in _lines(text) if trainer or _program(line)]
    if trainer and len(commands) > 1:
        commands = [line for line in commands if _program(line)] or commands
    if not commands:
        names = ", ".join(dict.fromkeys(_PROGRAMS))
        raise SftError(
            f"FROM={file}: no command of a known training program ({names}, trl sft); next: TRAINER= and one of"
            f" {', '.join(TRAINERS)}, with the command alone in the file"
        )
    programs = [_program(line) or (-1, trainer) for line in commands]
    files = {line[at].rpartition("/")[2] for line, (at, _) in zip(commands, programs, strict=True) if at >= 0}
    page = {found for _, found in programs} == {"olmo-core"} and len(files) == len(
        commands
    )  # one of them is for the data
    if len(commands) > 1 and not page:
        raise SftError(f"FROM={file}: {len(commands)} training commands are in it; next: leave one of them in the file")
    values: dict[str, Any] = {}
    for line, (at, _) in zip(commands, programs, strict=True):
        before, own = _options(line[:at] if at >= 0 else []), _options(line[at + 1 :])
        values |= {f"{LAUNCHER}.{k}": v for k, v in before.items()}
        values |= _positional(own) if programs[0][1] == "olmo-core" else own
    return trainer or programs[0][1], values


def _lines(text: str) -> list[list[str]]:
    """The words of each command: backslashes at line ends join lines, comments are gone, variables that the script sets are replaced."""
    found, variables = [], {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            words = line.split()
        if len(words) == 1 and (assigned := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
        elif words:
            found.append([string.Template(word).safe_substitute(variables) for word in words])
    return found


def _program(words: list[str]) -> tuple[int, str] | None:
    """(place of the training program in a command, its trainer)."""
    for i, word in enumerate(words):
        if word == "sft" and i and words[i - 1].rpartition("/")[2] == "trl":
            return i, "trl"
        for end, trainer in _PROGRAMS.items():
            if word == end or word.endswith(f"/{end}"):
                return i, trainer
    return None


def _options(words: list[str]) -> dict[str, Any]:
    """{name: value} of `--name value`, `--name=value`, `--name a b c` and `--flag`. Words without an option are numbered."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, sign, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if sign else True
        elif name and word not in ("--", "python"):
            held = found[name]
            found[name] = word if held is True else [*(held if isinstance(held, list) else [held]), word]
        else:
            name = ""
            found[f"word_{sum(k.startswith('word_') for k in found)}"] = word
    return found


def _positional(values: dict[str, Any]) -> dict[str, Any]:
    """The words before the options of OLMo-core's SFT script: launch, the run's name, the checkpoint and the cluster."""
    names = ("command", "run_name", "base_checkpoint", "cluster")
    return {dict(zip((f"word_{i}" for i in range(4)), names, strict=True)).get(k, k): v for k, v in values.items()}
