"""What editors and shells get: JSON Schemas that agree with our own checks, and a completion that bash runs."""

from __future__ import annotations

import itertools
import json
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest

from conftest import REPO
from sft.recipe import json_schema, recipe
from sft.runner import completion

RECIPE = jsonschema.Draft7Validator(json_schema.recipe_schema())
CLUSTER = jsonschema.Draft7Validator(json_schema.cluster_schema())
MINIMAL = '[prepare]\ntokenizer = "t"\n[[prepare.sources]]\npath = "a.jsonl"\n[evaluate]\ntasks = ["one"]\n'


def test_the_committed_schemas_are_what_make_schema_writes() -> None:
    for name, text in json_schema.files().items():
        assert (REPO / name).read_text(encoding="utf-8") == text, f"{name}: next: make schema"


@pytest.mark.parametrize("checker", [RECIPE, CLUSTER], ids=["recipe", "cluster"])
def test_the_schemas_are_schemas(checker: jsonschema.Draft7Validator) -> None:
    checker.check_schema(checker.schema)


@pytest.mark.parametrize("folder", ["recipes", "env"])
def test_every_recipe_and_cluster_file_is_valid_and_names_its_schema(folder: str) -> None:
    checker, name = (RECIPE, "recipe") if folder == "recipes" else (CLUSTER, "cluster")
    for file in sorted((REPO / folder).glob("*.toml")):
        text = file.read_text(encoding="utf-8")
        comment = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
        assert comment[-1] == f"#:schema ./{name}.schema.json", file  # editors read it in the first comment
        checker.validate(tomllib.loads(text))


@pytest.mark.parametrize(
    ("line", "valid"),
    [
        ("[train]\nlr = 1e-4", True), ("[train]\nlr = 1", True), ("[train]\nlr = 0.0", False), ("[train]\nlr = 'a'", False),
        ("[train]\nlrr = 1", False), ("[train]\nschedule = 'wsd'", True), ("[train]\nschedule = 'wds'", False),
        ("[train]\nbetas = [0.9, 0.95]", True), ("[train]\nbetas = [0.9]", False), ("[train]\nbetas = [0.9, 1.5]", False),
        ("[model]\nrope_scaling = {rope_type = 'yarn', factor = 4.0, original_max_position_embeddings = 64}", True), ("[model]\nn_layers = 0", False),
        ("[train]\ndeterministic = 1", False), ("[on.local.train]\nmicrobatch_tokens = 16384", True),
        ("[on.local.prepare]\nmicrobatch_tokens = 1", False), ("[on.local.trian]\nnodes = 1", False), ("[optimizer]\nlr = 1", False),
    ],
)  # fmt: skip
def test_the_schema_of_recipes_agrees_with_our_own_checks(tmp_path: Path, line: str, valid: bool) -> None:
    text = f"{MINIMAL}{'' if '[model]' in line else '[model]' + chr(10) + 'preset = ' + chr(34) + 'olmo3-tiny' + chr(34)}\n{line}\n"
    text = text if "[model]\nrope" not in line and "[model]\nn_" not in line else f'{text}preset = "olmo3-tiny"\n'
    (tmp_path / "x.toml").write_text(text)
    assert RECIPE.is_valid(tomllib.loads(text)) == valid
    try:
        recipe.load(tmp_path / "x.toml")
    except recipe.SftError:
        assert not valid, line
    else:
        assert valid, line


def complete(line: str) -> list[str]:
    text = completion.script(REPO, ["train", "evaluate", "tune"], ["RECIPE", "CLUSTER"])
    words = line.replace("=", " = ").split(" ")
    code = (
        f'{text}\nCOMP_LINE="{line}"; COMP_POINT={len(line)}; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}\n'
        '_olmo_sft_make; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("make tra", {"train", "train_roles=", "train_turns=", "train_only=", "trackio_project="}),
        ("make train RECIPE=smol", {"smollm2-gsm8k", "smollm2-methods"}),
        ("make train schedule=co", {"cosine", "constant"}), ("make train CLUSTER=loc", {"local"}),
    ],
)  # fmt: skip
def test_bash_completes_goals_recipes_clusters_and_choices(line: str, found: set[str]) -> None:
    assert set(complete(line)) == found


def test_the_committed_schema_is_json() -> None:
    assert json.loads((REPO / json_schema.RECIPE).read_text())["additionalProperties"] is False
