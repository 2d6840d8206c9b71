"""Evaluation by AI2's harnesses: the experiment against what the ancestor's scripts submit, and scores out of what returns.

The expected command lines and fields were written down from the ancestor's documented command (cloud.md, its README) and
from reading allenai/open-instruct: scripts/submit_eval_jobs.py, submit_eval_jobs_old.py and scripts/eval/oe-eval.sh.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from types import SimpleNamespace

import pytest
import yaml

from beaker_place import Place, place  # noqa: F401 - a fixture
from conftest import REPO
from published import publish
from sft.common.errors import SftError
from sft.evaluation import collected, compare
from sft.formats import manifest
from sft.formats.harness import ASKED, IDENTITY, RETURNED, AskedTasks
from sft.formats.job import FOLDER
from sft.formats.results import EvaluateMetrics, Results
from sft.launch import job
from sft.launch.beaker import harnesses, scheduler
from sft.recipe.clusters import load_cluster

pytestmark = pytest.mark.server

LOCATION = "/ann/checkpoints/path-to-model/step3710-hf"  # below the mount
FIELDS = f'location = "WEKA{LOCATION}"\nmax_length = 32768\nmodel_name = "MODEL-NAME"'
IMAGE = 'evaluate_image = "ann/image"\nworkspace = "ai2/team"\nretries = 2\npriority = "high"\ngpus_per_node = 8'


def spec_of(place: Place, evaluate: str, brings: str = "") -> dict:  # noqa: F811
    place.workspace.recipe("x", 'tasks = ["one"]', evaluate.replace("WEKA", place.weka))
    if "evaluate_image" not in place.cluster.read_text():
        harness = brings or ("oe-eval" if '"oe-eval"' in evaluate else "olmo-eval")
        place.edit('workspace = "ai2/team"', f'evaluate_harness = "{harness}"\n{IMAGE}')
        place.cluster.write_text(
            place.cluster.read_text() + '[evaluate_secrets]\nHF_TOKEN = "HF_TOKEN"\nOPENAI_API_KEY = "openai_api_key"\n'
        )
    place.server.secrets |= {"HF_TOKEN": "h", "openai_api_key": "o"}
    place.push()
    made = job.Job.parse(
        ["runs/x", "evaluate", ".venv/bin/python", "stages/evaluate.py", "runs/x", "--cluster", "beaker-test"],
        strict=False,
    )
    return yaml.safe_load(scheduler.BeakerScheduler(made.folder, made.cluster).render(made).partition("\n")[2])


def test_olmo_eval_is_the_ancestors_new_submission_field_by_field(place):  # noqa: F811
    body = spec_of(place, f'tasks = ["aime_2025:pass_at_32", "gsm8k"]\nharness = "olmo-eval"\n{FIELDS}')
    task = body["tasks"][0]
    assert task["command"] + task["arguments"] == [
        "olmo-eval", "run", "-m", place.weka + LOCATION, "--harness", "default", "-o", "provider.kind=vllm_server",
        "-o", "provider.max_model_len=32768", "-t", "aime_2025:pass_at_32", "-t", "gsm8k",
        "--num-gpus", "1", "--output-dir", "/results",
    ]  # fmt: skip
    assert body["version"] == "v2" and body["budget"] == "ai2/oe-test" and body["retry"] == {"allowedTaskRetries": 2}
    assert len(body["tasks"]) == 1
    assert task["image"] == {"beaker": "ann/image"} and task["result"] == {"path": "/results"}
    assert task["resources"]["gpuCount"] == 1
    assert task["constraints"] == {"cluster": ["ai2/jupiter"]}
    assert (
        task["context"]["priority"] == "high" and task["context"]["autoResume"] is True
    )  # --preemptible, as it is said now
    assert {"mountPath": place.weka, "source": {"weka": "oe-test"}} in task["datasets"]
    environment = {e["name"]: e.get("value", e.get("secret")) for e in task["envVars"]}
    assert environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    assert environment["HF_TOKEN"] == "HF_TOKEN" and environment["OPENAI_API_KEY"] == "openai_api_key"


def test_oe_eval_is_the_ancestors_documented_command_field_by_field(place):  # noqa: F811
    """--run_oe_eval_experiments --skip_oi_evals --evaluate_on_weka --oe_eval_max_length 32768 --process_output r1_style"""
    body = spec_of(place, f'tasks = ["OLMO_3"]\nharness = "oe-eval"\nprocess_output = "r1_style"\n{FIELDS}')
    assert len(body["tasks"]) == 17
    assert [harnesses.folder_of(t["name"]) for t in body["tasks"]] == [f"{n:03d}" for n in range(17)]
    model = {"model_path": place.weka + LOCATION, "max_length": 32768, "process_output": "r1_style"}
    for task in body["tasks"]:
        words = task["command"] + task["arguments"]
        given = dict(zip(words[1::2], words[2::2], strict=False))
        name = given["--task"]
        assert words[0] == "oe-eval" and given["--model"] == "MODEL-NAME"
        assert given["--model-type"] == "vllm" and given["--batch-size"] == "10000" and given["--gpus"] == "1"
        tools = {"metadata": {"extra_eval_config": {"model_name": "allenai/general-tool-use-dev"}}}
        assert json.loads(given["--model-args"]) == model | (tools if name == "bfcl_all::std" else {})
        assert json.loads(given["--task-args"]) == {
            "generation_kwargs": {"max_gen_toks": 32768, "truncate_context": False}
        }
        environment = {e["name"]: e.get("value") for e in task["envVars"]}
        assert environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
        assert ("MAX_TOKENS" in environment) == (name == "bfcl_all::std")
    choice = spec_of(place, f'tasks = ["TULU_3_DEV"]\nharness = "oe-eval"\n{FIELDS}')["tasks"]
    by_name = {t["arguments"][t["arguments"].index("--task") + 1]: t for t in choice}
    without_vllm = by_name["truthfulqa::tulu"]["arguments"]
    assert "--model-type" not in without_vllm and without_vllm[without_vllm.index("--batch-size") + 1] == "1"
    assert (
        by_name["truthfulqa::tulu"]["resources"]["gpuCount"] == 2
        and by_name["gsm8k::tulu"]["resources"]["gpuCount"] == 1
    )


def test_olmo_evals_revision_and_longest_reply_are_the_scripts_flags(place):  # noqa: F811
    """--location allenai/OLMo-2 --revision v1.0/a --sampling_max_tokens 512: -o provider.revision=, -o max_tokens= after each -t"""
    fields = 'location = "hf://allenai/OLMo-2@v1.0/a"\nmax_length = 4096\nmax_reply_tokens = 512'
    task = spec_of(place, f'tasks = ["aime", "gsm8k"]\nharness = "olmo-eval"\n{fields}')["tasks"][0]
    words = task["command"] + task["arguments"]
    assert words[2:] == [
        "-m", "allenai/OLMo-2", "--harness", "default", "-o", "provider.kind=vllm_server", "-o", "provider.max_model_len=4096",
        "-o", "provider.revision=v1.0/a", "-t", "aime", "-o", "max_tokens=512", "-t", "gsm8k", "-o", "max_tokens=512",
        "--num-gpus", "1", "--output-dir", "/results",
    ]  # fmt: skip
    assert "timeout" not in task


def test_oe_evals_defaults_are_those_of_open_instructs_script(place):  # noqa: F811
    """--process_output r1_style by default, --beaker-timeout 48h, --beaker-retries 2, --push-datalake, twice the GPUs for reasoning."""
    plain = 'harness = "oe-eval"\nlocation = "allenai/OLMo-2@main"\nmax_length = 4096'
    body = spec_of(place, f'tasks = ["SAFETY_EVAL_REASONING", "gsm8k::tulu"]\n{plain}')
    safety, words = (task["arguments"] for task in body["tasks"])
    assert body["retry"] == {"allowedTaskRetries": 2}
    assert {task["timeout"] for task in body["tasks"]} == {48 * 3600 * 10**9}
    assert [task["resources"]["gpuCount"] for task in body["tasks"]] == [2, 1] and safety[
        safety.index("--gpus") + 1
    ] == "2"
    assert json.loads(words[words.index("--model-args") + 1])["process_output"] == "r1_style"
    assert words[words.index("--revision") + 1] == "main"
    assert "--push-datalake" in words and "--datalake-tags" not in words
    more = 'process_output = "none"\nstop_sequences = ["</a>", "\\n\\n"]\nmax_reply_tokens = 99\ndatalake_tags = {run_id = "r1", step = "7"}'
    (task,) = spec_of(place, f'tasks = ["gsm8k::tulu"]\n{plain}\n{more}')["tasks"]
    words = task["arguments"]
    assert "process_output" not in json.loads(words[words.index("--model-args") + 1])
    assert json.loads(words[words.index("--task-args") + 1]) == {
        "generation_kwargs": {"max_gen_toks": 99, "truncate_context": False, "stop_sequences": ["</a>", "\n\n"]}
    }
    assert words[words.index("--datalake-tags") + 1] == "run_id=r1,step=7"
    place.edit('workspace = "ai2/team"', 'time = "2h"\nevaluate_retries = 0\nworkspace = "ai2/team"')
    body = spec_of(place, f'tasks = ["gsm8k::tulu"]\n{plain}\ndatalake = false')
    assert body["tasks"][0]["timeout"] == 7200 * 10**9 and "retry" not in body
    assert "--push-datalake" not in body["tasks"][0]["arguments"]


@pytest.mark.parametrize("file", sorted((REPO / "env").glob("ai2-*.toml")), ids=lambda f: f.stem)
def test_the_shipped_clusters_install_olmo_eval_as_open_instruct_does(file):
    cluster = load_cluster(file)
    weka = "oe-eval-default:/weka/oe-eval-default" in cluster.mounts
    assert weka == (file.stem != "ai2-augusta")
    cache = " --cache-dir /weka/oe-eval-default/olmo-eval-pypi-cache" if weka else ""
    assert cluster.evaluate_install[-2:] == (
        f"uv pip install{cache} -e '.[vllm]'",
        f"uv pip install{cache} --upgrade 'vllm[runai]>=0.19.0' 'transformers>=5.4.0'",
    )
    assert cluster.evaluate_install[-3] == "cd /opt/olmo-eval && git checkout --quiet main"
    assert cluster.evaluate_retries == 2 and cluster.budget == "ai2/oe-other"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            'harness = "lm-eval"\nstop_sequences = ["x"]',
            "'stop_sequences' in [evaluate]: only harness = 'oe-eval' reads it",
        ),
        ('harness = "olmo-eval"\ndatalake = false', "'datalake' in [evaluate]: only harness = 'oe-eval' reads it"),
        ('harness = "oe-eval"\ndatalake_tags = {run_id = "a,b"}', "'a,b' is not a word without spaces, ',' and '='"),
        ('harness = "oe-eval"\ndatalake = false\ndatalake_tags = {a = "b"}', "datalake = false pushes nothing"),
    ],
)
def test_fields_of_oe_eval_are_refused_where_nothing_reads_them(place, fields, message):  # noqa: F811
    with pytest.raises(SftError, match=re.escape(message)):
        spec_of(place, f'tasks = ["gsm8k"]\n{fields}')


@pytest.mark.parametrize(
    ("location", "path", "mounted"),
    [
        ("01KPTSPMHGEZVYCDNR0XBVJCGZ", "/model", "01KPTSPMHGEZVYCDNR0XBVJCGZ"),
        ("beaker://ann/a-model", "/model", "ann/a-model"),
        ("allenai/OLMo-2-1124-7B-Instruct", "allenai/OLMo-2-1124-7B-Instruct", None),
        ("hf://allenai/OLMo-2", "allenai/OLMo-2", None),
        ("gs://ai2-llm/m", "gs://ai2-llm/m", None),
        ("", "WEKA/ann/runs/x/convert/model", None),
    ],
)
def test_every_kind_of_location(place, location, path, mounted):  # noqa: F811
    body = spec_of(place, f'tasks = ["gsm8k"]\nharness = "olmo-eval"\nlocation = "{location}"\nmax_length = 4096')
    task = body["tasks"][0]
    assert task["arguments"][task["arguments"].index("-m") + 1] == path.replace("WEKA", place.weka)
    assert (
        {"mountPath": "/model", "source": {"beaker": mounted}} in task["datasets"]
        if mounted
        else "/model" not in json.dumps(task["datasets"])
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('tasks = ["gsm8k; rm -rf /"]\nharness = "olmo-eval"', "is not a task's name"),
        ('tasks = ["-o"]\nharness = "oe-eval"', "is not a task's name"),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nlocation = "/x $(id)"', "a path, gs://"),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nlocation = "/weka/other/m"', "do not see it"),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nlocation = "../m"', "a path, gs://"),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nlocation = "a/b@-o"\nmax_length = 9', "a path, gs://"),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nprocess_output = "r1_style"', "decide that themselves"),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nsystem_prompt = "Be terse."', "system_prompt: olmo-eval's tasks"),
        ('tasks = ["gsm8k"]\nharness = "oe-eval"\nsystem_prompt = "Be terse."', "system_prompt: oe-eval's tasks"),
        (
            'tasks = ["gsm8k"]\nharness = "oe-eval"\nseed = 7\nmin_stop_rate = 0.9\nvalidation_documents = 0',
            "seed, min_stop_rate, validation_documents: oe-eval's tasks",
        ),
        ('tasks = ["gsm8k"]\nharness = "olmo-eval"\nlocation = "org/name"', "next: set max_length"),
        ('tasks = ["gsm8k"]\nharness = "oe-eval"\nlocation = "org/name"', "next: set max_length"),
    ],
)
def test_what_cannot_be_asked_is_refused(place, fields, message):  # noqa: F811
    with pytest.raises(SftError, match=message):
        spec_of(place, fields)


def test_a_harness_that_the_image_does_not_bring_is_refused(place):  # noqa: F811
    with pytest.raises(SftError, match=r"install olmo-eval, but .* names oe-eval; next:"):
        spec_of(place, 'tasks = ["gsm8k"]\nharness = "oe-eval"', brings="olmo-eval")


# --- a whole evaluation -----------------------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env python3
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
name = sys.argv[sys.argv.index("-t") + 1]
scores = [1, 0, 1, 1]
rows = [{"doc_id": i, "model_output": [{"text": "yes"}], "instance_metrics": {"accuracy": {"exact": s}}} for i, s in enumerate(scores)]
(out / "predictions" / "m").mkdir(parents=True)
(out / "predictions" / "m" / (name + "_abcdef-predictions.jsonl")).write_text("".join(json.dumps(r) + chr(10) for r in rows))
task = {"task": name, "metrics": {"accuracy": {"exact": 0.75}}, "num_instances": 4, "primary_metric": "accuracy:exact", "task_hash": "00abcdef"}
(out / "metrics.json").write_text(json.dumps({"tasks": [task], "errors": []}))
print("evaluated", name)
"""


OLMES = """#!/usr/bin/env python3
import json, pathlib, sys, time
out, name = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1]), sys.argv[sys.argv.index("--task") + 1]
both = pathlib.Path("MEETING")  # neither goes on before the other is there: they run at once
(both / name).touch()
until = time.monotonic() + 900
while len(list(both.iterdir())) < 2:
    assert time.monotonic() < until
    time.sleep(0.02)
scores = [1, 0, 1, 1] if name.startswith("gsm8k") else [0, 1]
rows = [{"doc_id": i, "native_id": i, "metrics": {"exact_match": s}, "label": "4", "model_output": [{"continuation": "4"}]} for i, s in enumerate(scores)]
config = {"primary_metric": "exact_match", "metadata": {"alias": name}}
told = {"task_name": name, "task_hash": "a" * 32, "task_config": config, "num_instances": len(rows), "metrics": {"exact_match": sum(scores) / len(scores)}}
(out / "task-000-x-metrics.json").write_text(json.dumps(told))
(out / "task-000-x-predictions.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in rows))
"""


def arrange(place, monkeypatch, name: str, program: str, evaluate: str) -> None:  # noqa: F811
    """The stand-in of a harness in the jobs' PATH; a recipe whose evaluation asks for it; an export made on this machine."""
    tool = place.server.folder / "bin" / name
    tool.parent.mkdir()
    tool.write_text(program)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    (place.root / "stages" / "evaluate.py").write_text(
        "from sft.evaluation.evaluate import evaluate\nfrom sft.runner.stage import main\nmain('evaluate', evaluate)\n"
    )
    spec_of(place, evaluate)
    place.edit('workspace = "ai2/team"', 'workspace = "ai2/team"\nstages = ["evaluate"]')
    convert = place.root / "stages" / "convert.py"
    convert.write_text(convert.read_text().replace("(stage.out / 'out')", "(stage.out / 'model').mkdir(exist_ok=True)\n    (stage.out / 'model' / 'config.json').write_text('{}')\n    (stage.out / 'out')").replace("['out']", "['out', 'model']"))  # fmt: skip
    place.push()


def submit_and_wait(place) -> None:  # noqa: F811
    done = place.workspace.make("evaluate", "RECIPE=x", "CLUSTER=beaker-test", "DETACH=1")
    assert "is detached" in done.stdout and not (place.run / "evaluate").exists()
    place.wait_for_jobs()


def test_scores_come_back_through_beaker_and_the_stage_is_done(place, monkeypatch):  # noqa: F811
    arrange(place, monkeypatch, "olmo-eval", STAND_IN, 'tasks = ["gsm8k"]\nharness = "olmo-eval"')
    submit_and_wait(place)
    place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test")
    made = manifest.load(place.run / "evaluate" / "manifest.json")
    score = EvaluateMetrics.of(made, "evaluate").tasks["gsm8k"]["accuracy:exact"]
    assert score.value == 0.75 and score.n == 4 and score.interval == "wilson"
    assert score.stderr == pytest.approx(statistics.stdev([1, 0, 1, 1]) / math.sqrt(4))
    assert manifest.is_whole(place.run / "evaluate") and (place.run / "evaluate" / "samples" / "gsm8k.jsonl").is_file()
    exported = [d.message.name for d in place.server.datasets.values() if "export" in d.message.name]
    assert len(exported) == 1  # the export of this machine travelled
    assert (
        "up to date" in place.workspace.make("why", "RECIPE=x", "CLUSTER=beaker-test").stdout.split("x/evaluate: ")[1]
    )


def test_two_tasks_of_oe_eval_run_at_once_and_a_lost_result_breaks_the_evaluation(place, monkeypatch):  # noqa: F811
    meeting = place.server.folder / "meeting"
    meeting.mkdir()
    tasks = 'tasks = ["gsm8k::tulu", "popqa::tulu"]\nharness = "oe-eval"'
    arrange(place, monkeypatch, "oe-eval", OLMES.replace("MEETING", str(meeting)), tasks)
    submit_and_wait(place)
    assert len(place.experiment.tasks) == len(place.server.runs) == 2
    lost = list(place.server.runs.values())[1]
    del place.server.datasets[lost.dataset]  # somebody has removed it
    done = place.workspace.make("collect", "RECIPE=x", "CLUSTER=beaker-test", ok=False)
    output = done.stdout + done.stderr
    assert f"the results of the job {lost.message.id} were deleted" in output
    assert (
        "\n  popqa::tulu: was requested and did not return\n" in output and "gsm8k::tulu: exact_match 0.750" in output
    )
    assert not (place.run / "evaluate").exists()
    place.workspace.make("evaluate", "RECIPE=x", "CLUSTER=beaker-test")
    assert len(place.server.experiments) == 2
    tasks = EvaluateMetrics.of(manifest.load(place.run / "evaluate" / "manifest.json"), "evaluate").tasks
    assert [tasks[name]["exact_match"].value for name in ("gsm8k::tulu", "popqa::tulu")] == [0.75, 0.5]
    assert [tasks[name]["exact_match"].n for name in ("gsm8k::tulu", "popqa::tulu")] == [4, 2]


# --- broken ones ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    """collect(files, asked) on what a harness would have returned: {path: a table, or a list of rows}."""

    def run(files: dict, asked: dict[str, str], harness: str = "olmo-eval", where=tmp_path) -> EvaluateMetrics:
        returned = where / FOLDER / RETURNED
        files = {IDENTITY: "same", **files}
        for name, content in files.items():
            file = returned / name
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = content if isinstance(content, list) else [content]
            text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in lines)
            file.write_text(text)
        AskedTasks(asked).write(returned / ASKED)
        (where / "evaluate").mkdir(exist_ok=True)
        options = SimpleNamespace(harness=harness, max_empty_fraction=0.1, min_stop_rate=0.5)
        it = SimpleNamespace(
            recipe=SimpleNamespace(evaluate=options), run=where, identity="same", out=where / "evaluate", log=print
        )
        result = collected.collect(it)
        publish(it.out, result.outputs, metrics=result.metrics)
        return EvaluateMetrics.from_value(result.metrics, "metrics")

    return run


def returned(metrics: dict, rows: list[dict]) -> dict:
    """Files of olmo-eval for one task t."""
    return {"evaluate/metrics.json": metrics, "evaluate/predictions/m/t-predictions.jsonl": rows}


T = {"t": "evaluate"}


def row(score: float, text: str = "x") -> dict:
    return {"model_output": [{"text": text}], "instance_metrics": {"acc": {"s": score}}}


def task(value: float, n: int) -> dict:
    return {
        "tasks": [{"task": "t", "metrics": {"acc": {"s": value}}, "num_instances": n, "primary_metric": "acc:s"}],
        "errors": [],
    }


def scores(metrics: dict, primary: str | None = "acc:s", twice: bool = False) -> dict:
    entry = {"task": "t", "metrics": metrics, "num_instances": 1, "primary_metric": primary}
    return {"tasks": [entry, entry] if twice else [entry], "errors": []}


def test_a_mean_of_the_predictions_has_their_error(stage):
    score = stage(returned(task(0.3, 3), [row(0.1), row(0.3), row(0.5)]), T).tasks["t"]["acc:s"]
    assert score.stderr == pytest.approx(0.2 / math.sqrt(3)) and score.n == 3 and score.interval == "normal"


@pytest.mark.parametrize(
    ("metrics", "rows", "message"),
    [
        (task(0.0, 0), [], "no instances"),
        (task(0.5, 4), [row(1), row(0)], "2 predictions of 4 instances"),
        (task(0.5, 2), [], "no predictions"),
        (task(0.0, 2), [row(0, ""), row(0, " ")], "100% of 2 replies are empty"),
        (task(0.0, 2), [{"instance_metrics": {"acc": {"s": 0}}}] * 2, "no reply text found"),
        (task(float("nan"), 1), [row(0)], "acc:s is nan"),
        (task(None, 1), [row(0)], "acc:s is nan"),
        (scores({"acc": {"s": None}, "f1": {"s": 0.0}}), [row(0)], "acc:s is nan"),
        (scores({"f1": {"s": 0.0}}), [row(0)], "primary metric acc:s is missing"),
        (scores({"acc": {"s": 0.0}, "f1": {"s": 0.0}}, primary=None), [row(0)], "the harness names none"),
        (scores({"acc": {"s": 0.0}}, twice=True), [row(0)], "t: returned twice"),
        (task(float("inf"), 1), [row(0)], "is inf"),
        ({"tasks": [], "errors": []}, [], "t: was requested and did not return"),
        ({**task(0.5, 2), "errors": [{"task": "u", "error": "boom"}]}, [row(1), row(0)], "boom"),
    ],
)
def test_a_broken_task_has_no_score(stage, metrics, rows, message):
    with pytest.raises(SftError, match=message):
        stage(returned(metrics, rows), T)


def test_how_replies_ended_is_reported_where_the_harness_records_it(stage, tmp_path):
    def ended(reason: str, tokens: int) -> dict:
        return {**row(1), "model_output": [{"text": "x", "finish_reason": reason, "completion_tokens": tokens}]}

    stage(returned(task(1, 2), [ended("stop", 5), ended("length", 30)]), T)
    facts = Results.read(tmp_path / "evaluate/results.json").tasks["t"].generation
    assert facts.n == 2 and facts.stop_rate == 0.5 and facts.tokens.max == 30
    with pytest.raises(SftError, match=r"t: 33% of 3 replies stop by themselves, min_stop_rate is 0\.5"):
        stage(returned(task(1, 3), [ended("stop", 5), ended("length", 30), ended("length", 30)]), T)


@pytest.mark.parametrize(
    ("harness", "file", "content", "message"),
    [
        ("olmo-eval", "metrics.json", {"tasks": [{}]}, "field tasks.0.task is missing"),
        ("olmo-eval", "metrics.json", {"tasks": ["x"]}, "tasks.0: an object is expected, not 'x'"),
        ("olmo-eval", "metrics.json", {"tasks": 3}, "tasks: a list is expected, not 3"),
        ("olmo-eval", "metrics.json", {"errors": 3}, "errors: a list is expected, not 3"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "num_instances": "x"}]}, "tasks.0.num_instances: a whole number"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "metrics": [1]}]}, "tasks.0.metrics: an object is expected"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "metrics": {"acc": 1}}]}, "tasks.0.metrics.acc: an object"),
        ("olmo-eval", "metrics.json", {"tasks": [{"task": "t", "task_hash": 3}]}, "tasks.0.task_hash: a string"),
        ("olmo-eval", "metrics.json", "[" * 100_000, "not JSON"),
        ("olmo-eval", "metrics.json", [], "not JSON"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [row(1), 3], "an object is expected"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", '\n{"half', "not JSON"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"model_output": 3}], "model_output: a list is expected"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"model_output": ["x"]}], "model_output.0: an object is"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"instance_metrics": [1]}], "instance_metrics: an object is"),
        ("olmo-eval", "predictions/m/t-predictions.jsonl", [{"model_output": [{"sum_logits": 10**400}]}], "a float can have"),
        ("oe-eval", "task-000-t-metrics.json", {"metrics": [1]}, "metrics: an object is expected"),
        ("oe-eval", "task-000-t-metrics.json", {"num_instances": "x"}, "num_instances: a whole number"),
        ("oe-eval", "task-000-t-metrics.json", {"task_config": "x"}, "task_config: an object is expected"),
        ("oe-eval", "task-000-t-metrics.json", {"task_config": {"metadata": 3}}, "task_config.metadata: an object is"),
        ("oe-eval", "task-000-t-metrics.json", {"task_config": {"primary_metric": []}}, "task_config.primary_metric: a string"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_harness_is_refused_with_its_name_and_key(stage, tmp_path, harness, file, content, message):
    files = returned(task(1, 1), [row(1)]) if harness == "olmo-eval" else {}
    with pytest.raises(SftError, match=re.escape(message)) as error:
        stage(files | {f"evaluate/{file}": content}, T, harness)
    assert re.search(rf"/evaluate/{re.escape(file)}(:\d+)?: damaged: .*; next: make evaluate again$", str(error.value))
    assert not (tmp_path / "evaluate" / "results.json").exists()


def test_a_score_beyond_a_float_is_no_score(stage):
    with pytest.raises(SftError, match="t: acc:s is inf"):
        stage(returned(task(10**400, 1), [row(10**400)]), T)


def test_other_fields_of_a_harness_are_skipped_and_a_prediction_keeps_them(stage, tmp_path):
    metrics = task(1, 1) | {"version": 9}
    metrics["tasks"][0] |= {"latency": {"p50": 1}}
    stage(returned(metrics, [{**row(1), "trace": [1], "record": 2}]), T)
    sample = json.loads((tmp_path / "evaluate/samples/t.jsonl").read_text())
    assert sample["trace"] == [1] and sample["record"] == 2


def test_a_harness_that_returned_nothing_is_reported(tmp_path):
    with pytest.raises(SftError, match="has returned nothing for this evaluation; next:"):
        collected.returned(tmp_path, "x", "olmo-eval")


def test_suites_are_written_out_for_oe_eval_only():
    options = SimpleNamespace(harness="olmo-eval", tasks=("OLMO_3", "gsm8k", "gsm8k"))
    made = SimpleNamespace(recipe=SimpleNamespace(evaluate=options, file="x"))
    assert harnesses.tasks_of(made) == ["OLMO_3", "gsm8k"]
    options.harness = "oe-eval"
    assert len(harnesses.tasks_of(made)) == 18
    assert list(harnesses.asked(made).values()) == [f"{n:03d}" for n in range(18)]


def test_a_suite_of_olmo_eval_is_named_by_its_summary(stage):
    asked = {"s": "evaluate", "u": "evaluate"}
    with pytest.raises(SftError, match="\\n  u: was requested and did not return\\n") as error:
        stage(returned({**task(1, 1), "summary": {"t": {}, "s": {"score": 1}}}, [row(1)]), asked)
    assert "  s:" not in str(error.value)


# --- oe-eval: files as OLMES's run_eval.py names and fills them -----------------------------------------------------------


def olmes(where: str, name: str, alias: str, metrics: dict, rows: list[dict], number: int = 0) -> dict:
    """{path: content} of one task: its metrics.json names the task's configuration; replies are rows of predictions.jsonl."""
    stem = f"{where}/task-{number:03d}-{name}"
    config = {"task_name": name, "primary_metric": "exact_match", "metadata": {"alias": alias}}
    metrics = {"task_name": name, "task_hash": "a" * 32, "model_hash": "b" * 32, "model_config": {}, "task_config": config,
            "num_instances": len(rows), "metrics": metrics, "task_idx": number}  # fmt: skip
    return {f"{stem}-metrics.json": metrics, f"{stem}-predictions.jsonl": rows, f"{where}/metrics.json": {"tasks": []}}


def reply(number: int, score: float, text: str = "So 4.") -> dict:
    return {"doc_id": number, "native_id": f"id_{number}", "metrics": {"exact_match": score}, "label": "4",
            "model_output": [{"continuation": text, "num_tokens": 3, "sum_logits": -1.5}]}  # fmt: skip


def choice(number: int, score: int) -> dict:
    return {"doc_id": number, "native_id": number, "metrics": {"exact_match": score}, "label": 1,
            "model_output": [{"sum_logits": -1.0, "num_tokens": 1}, {"sum_logits": -2.0, "num_tokens": 1}]}  # fmt: skip


def both(score: float | None) -> dict:
    return {"exact_match": score, "primary_score": score}


def test_every_task_of_oe_eval_has_its_score_though_their_files_have_the_same_names(stage, tmp_path):
    asked = {"gsm8k::tulu": "000", "gsm8k::zs": "001", "agi_eval_english:1shot::olmes": "002"}
    files = {
        **olmes("000", "gsm8k", "gsm8k::tulu", both(0.5), [reply(0, 1), reply(1, 0)]),
        **olmes("001", "gsm8k", "gsm8k::zs", {**both(0.0), "extra": {"tokens": 3}}, [reply(0, 0)]),
        **olmes("002", "agi_eval_lsat-ar", "agi_eval_lsat-ar:1shot::olmes", both(1.0), [choice(0, 1)]),
        **olmes("002", "agi_eval_sat-math", "agi_eval_sat-math:1shot::olmes", both(0.0), [choice(0, 0)], number=1),
    }
    found = stage(files, asked, "oe-eval")
    hashes = found.hashes.tasks
    assert {name: score["exact_match"].value for name, score in found.tasks.items()} == {
        "gsm8k::tulu": 0.5, "gsm8k::zs": 0.0, "agi_eval_lsat-ar:1shot::olmes": 1.0, "agi_eval_sat-math:1shot::olmes": 0.0,
    }  # fmt: skip
    assert all(list(score) == ["exact_match"] for score in found.tasks.values())
    assert found.tasks["gsm8k::tulu"]["exact_match"].stderr == pytest.approx(0.5) and list(hashes) == list(found.tasks)
    assert hashes["gsm8k::tulu"].task_sha256 == "a" * 32
    assert hashes["gsm8k::tulu"].samples_sha256 != hashes["gsm8k::zs"].samples_sha256
    assert len((tmp_path / "evaluate" / "samples" / "gsm8k_tulu.jsonl").read_text().splitlines()) == 2


OLMES_FINE = olmes("000", "gsm8k", "gsm8k::tulu", both(0.0), [reply(0, 0)])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (OLMES_FINE, "b: was requested and did not return"),
        (OLMES_FINE | olmes("001", "b", "b", both(None), [reply(0, 0)]), "b: exact_match is nan"),
        (OLMES_FINE | olmes("001", "b", "b", {"exact_match": None, "f1": 0.0}, [reply(0, 0)]), "b: exact_match is nan"),
        (OLMES_FINE | olmes("001", "b", "b", {"f1": 0.0}, [reply(0, 0)]), "b: the primary metric primary_score is missing"),
        (OLMES_FINE | olmes("001", "b", "b", both(0.0), []), "b: no instances"),
        (OLMES_FINE | olmes("001", "b", "b", both(0.0), [reply(0, 0, "")]), "b: 100% of 1 replies are empty"),
        (OLMES_FINE | olmes("001", "b", "c", both(0.0), [reply(0, 0)]) | olmes("001", "d", "c", both(0.0), [reply(0, 0)], 1),
         "c: returned twice"),
    ],
)  # fmt: skip
def test_a_broken_task_of_oe_eval_has_no_score(stage, tmp_path, files, message):
    with pytest.raises(SftError, match=message) as error:
        stage(files, {"a": "000", "b": "001"}, "oe-eval")
    assert "\n  a:" not in str(error.value) and not (tmp_path / "evaluate" / "results.json").exists()


@pytest.mark.parametrize(
    ("suite", "absent", "message"),
    [
        ("mmlu:mc::tulu", [3], "mmlu:mc::tulu: 56 of its 57 tasks returned; missing are the numbers 3"),
        (
            "mmlu:cot::summarize",
            [56],
            "56 of its 57 tasks returned; missing are the numbers 56",
        ),  # no gap tells of the last
        (
            "mmlu_pro:cot::llama3.1",
            range(1, 14),
            "1 of its 14 tasks returned; missing are the numbers 1, 2, 3, 4, 5, 6, 7, 8",
        ),
        ("bfcl_all::std", [0], "bfcl_all::std: 4 of its 5 tasks returned; missing are the numbers 0"),
    ],
)
def test_a_suite_without_one_of_its_tasks_is_broken_and_has_no_mean_of_the_others(
    stage, tmp_path, suite, absent, message
):
    name, _, variant = suite.partition(":")
    files = {}
    for n in range(collected.PARTS.get(name, 5)):
        if n not in absent:
            files |= olmes("000", f"{name}_{n}", f"{name}_{n}:{variant}", both(1.0), [choice(0, 1)], n)
    with pytest.raises(SftError, match=message):
        stage(files, {suite: "000"}, "oe-eval")
    assert not (tmp_path / "evaluate" / "results.json").exists()


def test_a_whole_suite_has_the_scores_of_all_its_tasks(stage):
    files = {}
    for n in range(7):
        files |= olmes("000", f"minerva_math_{n}", f"minerva_math_{n}::tulu", both(1.0), [reply(0, 1)], n)
    found = stage(files, {"minerva_math::tulu": "000"}, "oe-eval")
    assert len(found.tasks) == 7


def test_scores_of_oe_eval_are_compared_item_by_item(stage, tmp_path):
    right = {"a": [1, 1, 1, 1, 1, 1, 1, 0], "b": [0, 0, 0, 0, 0, 0, 1, 0]}
    for run, values in right.items():
        files = olmes("000", "gsm8k", "g", both(sum(values) / 8), [reply(i, v) for i, v in enumerate(values)])
        stage(files, {"gsm8k::tulu": "000"}, "oe-eval", tmp_path / run)
    only = compare.compare([tmp_path / "a", tmp_path / "b"]).rows
    assert [(r.metric, r.n, r.value) for r in only] == [("exact_match", 8, -0.75)]
    assert only[0].p == pytest.approx(2 * 0.5**6)  # six discordant pairs, all one way
    stage(
        olmes("000", "gsm8k", "g", both(1.0), [reply(i, 1) for i in range(4)]),
        {"gsm8k::tulu": "000"},
        "oe-eval",
        tmp_path / "c",
    )
    limited = compare.compare([tmp_path / "b", tmp_path / "c"])
    assert limited.rows[0].n == 4 and "only the 4 common items of 8" in " ".join(limited.notes)
