"""Evaluation by AI2's harnesses: the experiment against what the ancestor's scripts submit, and a whole evaluation.

The expected command lines and fields were written down from the ancestor's documented command (cloud.md, its README) and
from reading allenai/open-instruct: scripts/submit_eval_jobs.py, submit_eval_jobs_old.py and scripts/eval/oe-eval.sh.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics

import pytest
import yaml

from beaker_place import Place, place  # noqa: F401 - a fixture
from conftest import REPO
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.results import EvaluateMetrics
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


def test_a_task_that_doubles_the_gpus_of_a_whole_node_is_refused(place):  # noqa: F811
    fields = f'tasks = ["mmlu:mc::tulu"]\nharness = "oe-eval"\n{FIELDS}\n[on.beaker-test.evaluate]\ngpus = '
    with pytest.raises(
        SftError,
        match=re.escape("mmlu:mc::tulu runs on twice the GPUs, 16, and a node of beaker-test has 8; next: gpus=4"),
    ):
        spec_of(place, fields + "8")
    assert spec_of(place, fields + "4")["tasks"][0]["resources"]["gpuCount"] == 8


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
    more += '\nhf_save_dir = "ann/evals//results/m"\nwandb_run_path = "ann/sft/abc123"'
    (task,) = spec_of(place, f'tasks = ["gsm8k::tulu"]\n{plain}\n{more}')["tasks"]
    words = task["arguments"]
    assert "process_output" not in json.loads(words[words.index("--model-args") + 1])
    assert json.loads(words[words.index("--task-args") + 1]) == {
        "generation_kwargs": {"max_gen_toks": 99, "truncate_context": False, "stop_sequences": ["</a>", "\n\n"]}
    }
    assert words[words.index("--datalake-tags") + 1] == "run_id=r1,step=7"
    assert words[words.index("--hf-save-dir") + 1] == "ann/evals//results/m"  # as oe-eval.sh's HF_UPLOAD_ARG
    assert words[words.index("--wandb-run-path") + 1] == "ann/sft/abc123"
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
        (
            'harness = "olmo-eval"\nhf_save_dir = "a/b//c"',
            "'hf_save_dir' in [evaluate]: only harness = 'oe-eval' reads it",
        ),
        (
            'harness = "oe-eval"\nhf_save_dir = "evals"',
            "'hf_save_dir' in [evaluate] = 'evals': org/name//folder is expected",
        ),
        ('harness = "oe-eval"\nwandb_run_path = "a/b"', "= 'a/b': entity/project/run_id is expected"),
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
        ("s3://ai2-llm/m", "s3://ai2-llm/m", None),
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
