"""backend = "server": a loopback server with OpenAI's API gives the scores, replies and losses of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api_server import serving
from evaluating import ANYTHING, lines, make_place
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.evaluation.server_model import find_served
from sft.recipe import recipe
from sft.recipe.schema import Evaluate, Hardware
from test_by_task import with_table

OPTIONS = replace(ANYTHING, tasks=("capitals", "colours"), backend="server")
DOCUMENTS = [([5, 6, 7, 8, 9], [False, True, False, True, True]), ([5, 6], [False, False])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_place(tmp_path_factory.mktemp("server"), stops='"e"')


def opened(place: SimpleNamespace, options: Evaluate) -> Any:
    return evaluate.open_model(place.root / "model", options, Hardware(), "")


@pytest.mark.seconds
def test_a_server_gives_the_scores_replies_and_losses_of_transformers(place: SimpleNamespace, tmp_path: Path) -> None:
    with serving(place.root / "model") as server:
        model = opened(place, replace(OPTIONS, base_url=server.url))
        found = evaluate.run_tasks(model, OPTIONS, place.tasks, place.data, tmp_path / "server", print)
        losses = list(model.losses(DOCUMENTS))
    assert not found.broken and model.about.backend == "server"
    assert all(
        isinstance(ids, list) for body in server.requests for ids in body["prompt"]
    )  # our template wrote the prompts
    own = evaluate.run_tasks(place.model, OPTIONS, place.tasks, place.data, tmp_path / "hf", print)
    for task, result in own.results.items():
        assert found.results[task].generation == result.generation
        for metric, score in result.metrics.items():
            assert found.results[task].metrics[metric].value == pytest.approx(score.value, abs=1e-9)
    theirs, ours = (lines(tmp_path / f"{name}/samples/capitals.jsonl") for name in ("server", "hf"))
    assert [(s["replies"], s["ended_by"], s["tokens"]) for s in theirs] == [
        (s["replies"], s["ended_by"], s["tokens"]) for s in ours
    ]
    assert losses == [(pytest.approx(loss, abs=1e-5), n) for loss, n in place.model.losses(DOCUMENTS)]


@pytest.mark.seconds
def test_a_server_without_log_probabilities_of_prompts_is_refused_where_they_are_needed(
    place: SimpleNamespace, tmp_path: Path
) -> None:
    with serving(place.root / "model", scores_prompts=False) as server:
        model = opened(place, replace(OPTIONS, base_url=server.url))
        options = replace(OPTIONS, tasks=("capitals",), limit=1)
        assert not evaluate.run_tasks(model, options, place.tasks, place.data, tmp_path, print).broken
        with pytest.raises(SftError, match=r"base_url = .*no log-probabilities of a prompt .*, which a task compares"):
            evaluate.run_tasks(model, replace(options, tasks=("colours",)), place.tasks, place.data, tmp_path, print)
        with pytest.raises(SftError, match="which the losses of held-out conversations and of plain text need"):
            list(model.losses(DOCUMENTS))


@pytest.mark.seconds
def test_a_server_with_another_model_or_out_of_reach_is_refused(place: SimpleNamespace, tmp_path: Path) -> None:
    with serving(place.root / "model", name="tiny") as server:
        assert find_served(place.root / "model", server.url, "") == ("tiny", True)  # its root is the export's folder
        assert find_served(tmp_path, server.url, "tiny").name == "tiny"
        with pytest.raises(SftError, match=f"the server has tiny, not {tmp_path}; next: vllm serve"):
            find_served(tmp_path, server.url, "")
        with pytest.raises(SftError, match="the server has tiny, not served_model = 'huge'"):
            find_served(place.root / "model", server.url, "huge")
        url = server.url
    with pytest.raises(SftError, match=r"no list of models at .*/v1/models.*next: start the server"):
        find_served(place.root / "model", url, "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('backend = "server"', "'base_url' in .evaluate. is missing: backend = 'server' needs the address"),
        ('base_url = "http://h/v1/completions"', "'base_url' in .* only backend = 'server' reads it"),
        ('backend = "server"\nbase_url = "http://h/v1/chat/completions"', "would write prompts with a template of its own"),
        ('backend = "server"\nbase_url = "h:8000"', "an address such as http://127.0.0.1:8000/v1/completions"),
        ('backend = "sglang"', "one of auto, hf, vllm, server is expected; SGLang: start its server"),
    ],
)  # fmt: skip
def test_a_server_that_a_recipe_cannot_mean_is_refused(tmp_path: Path, fields: str, message: str) -> None:
    with pytest.raises(SftError, match=message):
        recipe.load(with_table(tmp_path, "", fields))
