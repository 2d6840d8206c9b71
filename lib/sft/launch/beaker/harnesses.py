"""Evaluation by AI2's own harnesses on Beaker: the experiments that open-instruct's scripts submit, as lists of arguments.

`[evaluate] harness = "olmo-eval"` runs `olmo-eval run -m MODEL --harness default -o provider.kind=vllm_server … -t TASK…` as
one task; `"oe-eval"` runs the older tool, with one Beaker task for each of its tasks. The options come from
allenai/open-instruct (scripts/submit_eval_jobs.py, submit_eval_jobs_old.py, eval/oe-eval.sh), except `trust_remote_code`,
which those scripts set and an export does not need: it contains no code. sft.evaluation.collected reads the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from beaker import BeakerExperimentSpec, BeakerTaskSpec

from sft.common import paths
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.elsewhere import Elsewhere
from sft.formats.harness import ASKED, IDENTITY, RETURNED, AskedTasks
from sft.launch import far
from sft.launch.beaker import specification
from sft.launch.job import Job
from sft.recipe.base_config import longest_input
from sft.recipe.resolve import DEFAULT_LENGTH
from sft.runner import plan

MODEL = "/model"
INSTALL = (
    'set -euo pipefail; sft_home="$PWD" sft_lines=("${@:2:$1}") sft_command=("${@:2+$1}"); set --;'
    ' for sft_line in "${sft_lines[@]}"; do eval "$sft_line"; done; cd "$sft_home"; exec "${sft_command[@]}"'
)
"""Runs COUNT LINE… COMMAND…: the lines that prepare the image, in the shell that becomes the harness. The arguments are never
pasted into it."""
_HUB = r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)?"
_TASK = r"[A-Za-z0-9][A-Za-z0-9_.:@+-]*"
SUITES = {
    "OLMO_3": (
        "mmlu:cot::hamish_zs_reasoning_deepseek", "popqa::hamish_zs_reasoning_deepseek",
        "bbh:cot::hamish_zs_reasoning_deepseek_v2", "gpqa:0shot_cot::qwen3-instruct",
        "zebralogic::hamish_zs_reasoning_deepseek", "agi_eval_english:0shot_cot::hamish_zs_reasoning_deepseek",
        "minerva_math::hamish_zs_reasoning_deepseek", "omega_500:0-shot-chat_deepseek",
        "aime:zs_cot_r1::pass_at_32_2024_deepseek", "aime:zs_cot_r1::pass_at_32_2025_deepseek",
        "codex_humanevalplus:0-shot-chat::tulu-thinker_deepseek", "mbppplus:0-shot-chat::tulu-thinker_deepseek",
        "livecodebench_codegeneration::tulu-thinker_deepseek_no_think_tags",
        "alpaca_eval_v3::hamish_zs_reasoning_deepseek", "ifeval::hamish_zs_reasoning_deepseek",
        "ifeval_ood::tulu-thinker-deepseek", "bfcl_all::std",
    ),
    "OLMO_3_UNSEEN": (
        "mmlu_pro:0shot_cot::tulu3", "livecodebench_codegeneration::tulu-thinker-hidden_no_think_tags", "ifbench::tulu",
    ),
    "TULU_3_DEV": (
        "gsm8k::tulu", "bbh:cot-v1::tulu", "drop::llama3", "minerva_math::tulu", "codex_humaneval::tulu",
        "codex_humanevalplus::tulu", "ifeval::tulu", "popqa::tulu", "mmlu:mc::tulu", "mmlu:cot::summarize",
        "alpaca_eval_v3::tulu", "truthfulqa::tulu",
    ),
    "TULU_3_UNSEEN": (
        "agi_eval_english:0shot_cot::tulu3", "gpqa:0shot_cot::tulu3", "mmlu_pro:0shot_cot::tulu3",
        "deepmind_math:0shot_cot-v3::tulu3", "bigcodebench_hard::tulu", "gpqa:0shot_cot::llama3.1",
        "mmlu_pro:cot::llama3.1", "bigcodebench::tulu",
    ),
    "SAFETY_EVAL": ("safety::olmo3",),
    "SAFETY_EVAL_REASONING": ("safety_reasoning::olmo3",),
}  # fmt: skip
"""oe-eval's task suites as scripts/eval/oe-eval.sh lists them. The name of a suite in [evaluate] tasks stands for its tasks."""
CHOICE = ("mmlu:mc::tulu", "truthfulqa::tulu")
"""Multiple choice, which runs without vLLM: batches of 1 on twice the GPUs."""
LONG_REPLIES = SUITES["SAFETY_EVAL_REASONING"]
"""They run on twice the GPUs, too."""
TOOLS = "bfcl_all::std"
OE_EVAL_HOURS = 48
"""The time limit of a task of oe-eval, where neither the recipe nor the cluster's file has one. Beaker counts nanoseconds."""
LM_EVAL_ONLY = (
    "system_prompt", "seed", "validation_documents", "backend", "task_dir", "data", "num_fewshot", "fewshot_as_multiturn",
    "temperature", "top_p", "samples", "thinking", "max_thought_tokens", "by_task", "plain_text",
)  # fmt: skip
REFUSED = {"olmo-eval": (*LM_EVAL_ONLY, "process_output"), "oe-eval": (*LM_EVAL_ONLY, "min_stop_rate")}
"""Options that a harness would silently ignore: its tasks decide the matter, or its records do not contain it."""


class HarnessModel(NamedTuple):
    """The model that a harness evaluates."""

    name: str  # as the harness names it
    mounts: dict[str, str]  # {path: Beaker dataset}
    uploads: dict[str, Path]  # {name of a Beaker dataset: the folder to upload before submission}
    revision: str = ""  # of a model on the hub


class HarnessTask(NamedTuple):
    """One Beaker task of an evaluation."""

    name: str
    gpus: int
    variables: dict[str, str]
    command: list[str]


def is_harness(job: Job) -> bool:
    """Whether the job is an evaluation by one of AI2's harnesses instead of the stage's own command."""
    return job.stage == "evaluate" and job.recipe.evaluate.harness != "lm-eval"


def tasks_of(job: Job) -> list[str]:
    """The names of the tasks, suites expanded, each once. Raises SftError for a name that no task can have."""
    options = job.recipe.evaluate
    named = [
        t for name in options.tasks for t in (SUITES.get(name, (name,)) if options.harness == "oe-eval" else (name,))
    ]
    for name in named:
        if not re.fullmatch(_TASK, name):
            raise SftError(f"{job.recipe.file}: [evaluate] tasks: {name!r} is not a task's name; next: correct it")
    return list(dict.fromkeys(named))


def model_of(job: Job, user: str) -> HarnessModel:
    """The model at [evaluate] location: a path on a mount, gs://… or s3://…, org/name[@revision] on the hub, or beaker://dataset.

    An empty location is the run's own export. Raises SftError for any other form, and for a path that jobs do not see.
    """
    options, file = job.recipe.evaluate, job.recipe.file
    place = options.location
    if match := re.fullmatch(r"(?:beaker://)?([0-9A-Z]{26})|beaker://([A-Za-z0-9_-]+/[A-Za-z0-9_.-]+)", place):
        return HarnessModel(MODEL, {MODEL: match[1] or match[2]}, {})
    if place:
        place = paths.for_user(place).removeprefix("hf://")
        if match := re.fullmatch(rf"({_HUB})@([A-Za-z0-9_.][A-Za-z0-9_./-]*)", place):
            return HarnessModel(match[1], {}, {}, match[2])
        if not re.fullmatch(
            rf"(/|gs://|s3://)[A-Za-z0-9_.-]+(/[A-Za-z0-9_.@=+-]+)*|{_HUB}", place
        ) or ".." in place.split("/"):
            raise SftError(
                f"{file}: [evaluate] location = {options.location!r}: a path, gs://…, s3://…, org/name[@revision] or beaker://… is expected; next: correct it"
            )
        if place.startswith("/"):
            _check_mounted(job, place)
        return HarnessModel(place, {}, {})
    return _exported_model(job, user)


def _exported_model(job: Job, user: str) -> HarnessModel:
    """The run's own export: where convert made it, or as a dataset that is uploaded first. Raises SftError."""
    folder = job.run / "convert"
    elsewhere = Elsewhere.of(folder)
    where = elsewhere.where
    remote = f"{far.stored_run(job)}/convert"
    if where.startswith(paths.BUCKETS) or remote in (where, str(folder.absolute())):
        return HarnessModel(f"{where or remote}/model", {}, {})
    if elsewhere.outputs:
        _check_mounted(job, where)
        return HarnessModel(f"{where}/model", {}, {})
    try:
        made = manifest.load(folder / manifest.NAME)
    except FileNotFoundError:  # in a dry run
        return HarnessModel(f"{remote}/model", {}, {})
    dataset = f"olmo-sft-export-{made.digest[:16]}"
    return HarnessModel(MODEL, {MODEL: f"{user}/{dataset}"}, {dataset: folder / "model"})


def _check_mounted(job: Job, path: str) -> None:
    mounted = [m.partition(":")[2] for m in job.cluster.mounts]
    if not any(path == m or path.startswith(m + "/") for m in mounted):
        raise SftError(
            f"{path}: jobs on {job.place.cluster} do not see it; they see {', '.join(mounted) or 'no mount'}; next: add its"
            f" bucket to mounts in env/{job.place.cluster}.toml, or convert on this cluster"
        )


def harness_experiment(job: Job, user: str) -> BeakerExperimentSpec | None:
    """The experiment of an evaluation by one of AI2's harnesses; None for any other job. Raises SftError."""
    if not is_harness(job):
        return None
    options, cluster = job.recipe.evaluate, job.cluster
    specification.check_cluster(job.place.cluster, cluster)
    if not cluster.evaluate_image:
        raise SftError(
            f"env/{job.place.cluster}.toml: 'evaluate_image' is missing; next: name an image that has {options.harness}"
        )
    if cluster.evaluate_harness != options.harness:
        raise SftError(
            f"env/{job.place.cluster}.toml: evaluate_image and evaluate_install install {cluster.evaluate_harness}, but [evaluate]"
            f" names {options.harness}; next: another harness, or a copy of this file with an image of {options.harness} and"
            f' evaluate_harness = "{options.harness}"'
        )
    _check_supported(job)
    model, gpus = model_of(job, user), max(1, job.gpus)
    planned = _olmo_eval if options.harness == "olmo-eval" else _oe_eval
    tasks = [_beaker_task(job, task, model) for task in planned(job, model, gpus)]
    return specification.wrap(job, tasks, cluster.evaluate_retries)


def _beaker_task(job: Job, planned: HarnessTask, model: HarnessModel) -> BeakerTaskSpec:
    cluster, words = job.cluster, planned.command
    task = specification.task(job, planned.name, planned.variables, model.mounts, planned.gpus)
    task.image.beaker = cluster.evaluate_image
    if task.timeout is None and job.recipe.evaluate.harness == "oe-eval":
        task.timeout = OE_EVAL_HOURS * 3600 * 10**9
    for variable, secret in cluster.evaluate_secrets.items():
        task = task.with_env_var(variable, secret=paths.for_user(secret))
    if install := cluster.evaluate_install:
        task.command = ["bash", "-c", INSTALL, "install", str(len(install)), *install]
        task.arguments = words
    else:
        task.command, task.arguments = words[:1], words[1:]
    return task


def _check_supported(job: Job) -> None:
    """Raises SftError for options that the harness would silently ignore."""
    options = job.recipe.evaluate
    fields = [f for f in dataclasses.fields(options) if f.name in REFUSED[options.harness]]
    changed = [f.name for f in fields if getattr(options, f.name) not in (f.default, {})]
    if changed:
        raise SftError(
            f"{job.recipe.file}: [evaluate] {', '.join(changed)}: {options.harness}'s tasks decide that themselves; next: remove"
            " it, or choose a variant of the task that does so"
        )


def _max_length(job: Job) -> int:
    options = job.recipe.evaluate
    if options.location and not options.max_length:
        raise SftError(
            f"{job.recipe.file}: [evaluate] max_length = 0: the longest input of the model at {options.location} is not"
            " known here; next: set max_length"
        )
    return options.max_length or job.recipe.convert.max_position_embeddings or _exported_length(job)


def _exported_length(job: Job) -> int:
    """The longest input that the export states. Raises SftError if it is needed from config.json and that file is missing."""
    file = job.run / "convert" / "model" / "config.json"
    if not job.recipe.model.base:
        return DEFAULT_LENGTH
    if not file.is_file():
        raise SftError(
            f"{file}: no such file. The longest input of the model is read from it; next: set [evaluate] max_length, or [convert]"
            " max_position_embeddings"
        )
    return longest_input(file)


def _olmo_eval(job: Job, model: HarnessModel, gpus: int) -> list[HarnessTask]:
    """One Beaker task for all tasks."""
    options = job.recipe.evaluate
    command = ["olmo-eval", "run", "-m", model.name, "--harness", "default", "-o", "provider.kind=vllm_server",
               "-o", f"provider.max_model_len={_max_length(job)}"]  # fmt: skip
    command += ["-o", f"provider.revision={model.revision}"] if model.revision else []
    for task in tasks_of(job):
        command += ["-t", task, *(["-o", f"limit={options.limit}"] if options.limit else [])]
        command += ["-o", f"max_tokens={options.max_reply_tokens}"] if options.max_reply_tokens else []
    command += ["--num-gpus", str(gpus), "--output-dir", specification.RESULTS]
    return [HarnessTask("evaluate", gpus, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, command)]


def _oe_eval(job: Job, model: HarnessModel, gpus: int) -> list[HarnessTask]:
    """One Beaker task for each of oe-eval's tasks."""
    options, made = job.recipe.evaluate, []
    length = _max_length(job)
    generation: dict[str, Any] = {"max_gen_toks": options.max_reply_tokens or length, "truncate_context": False}
    if options.stop_sequences:
        generation["stop_sequences"] = list(options.stop_sequences)
    pushed = ["--push-datalake"] if options.datalake else []
    if options.datalake_tags:
        pushed += ["--datalake-tags", ",".join(f"{name}={value}" for name, value in options.datalake_tags.items())]
    pushed += ["--hf-save-dir", options.hf_save_dir] if options.hf_save_dir else []
    pushed += ["--wandb-run-path", options.wandb_run_path] if options.wandb_run_path else []
    for number, name in enumerate(tasks_of(job)):
        choice = name in CHOICE
        wanted = gpus * 2 if choice or name in LONG_REPLIES else gpus
        if wanted > gpus and 0 < job.cluster.gpus_per_node < wanted:
            raise SftError(
                f"{job.recipe.file}: [evaluate] {name} runs on twice the GPUs, {wanted}, and a node of {job.place.cluster} has"
                f" {job.cluster.gpus_per_node}; next: gpus={job.cluster.gpus_per_node // 2}, or this task in a recipe of its own"
            )
        model_args: dict[str, Any] = {"model_path": model.name, "max_length": length}
        if options.process_output != "none":
            model_args["process_output"] = options.process_output
        variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
        if name == TOOLS:
            if not model.name.startswith(("/", *paths.BUCKETS)):
                raise SftError(
                    f"{job.recipe.file}: [evaluate] {TOOLS} needs a model in a folder, not {model.name!r}; next: a path, gs://… or s3://… as location"
                )
            model_args["metadata"] = {"extra_eval_config": {"model_name": "allenai/general-tool-use-dev"}}
            variables["MAX_TOKENS"] = str(length)
        command = ["oe-eval", "--model", options.model_name or job.run.name, "--task", name]
        command += [] if choice else ["--model-type", "vllm"]
        command += ["--batch-size", "1" if choice else "10000", "--model-args", json.dumps(model_args),
                    "--task-args", json.dumps({"generation_kwargs": generation}), "--gpus", str(wanted)]  # fmt: skip
        command += ["--revision", model.revision] if model.revision else []
        command += ["--limit", str(options.limit)] if options.limit else []
        command += [*pushed, "--run-local", "--output-dir", specification.RESULTS]
        made.append(HarnessTask(f"{number:03d}-{name}", wanted, variables, command))
    return made


def asked(job: Job) -> dict[str, str]:
    """{task asked for: the folder of the results that holds it}; see sft.formats.harness."""
    names = tasks_of(job)
    if job.recipe.evaluate.harness == "olmo-eval":
        return dict.fromkeys(names, "evaluate")
    return {name: folder_of(f"{number:03d}-{name}") for number, name in enumerate(names)}


def folder_of(task: str) -> str:
    """The folder for the results of a Beaker task: its number, or its name where it has none."""
    return task.partition("-")[0]


def record_scores(job: Job, arrived: Path) -> int:
    """Moves a harness's results into place and runs the stage here, which reads them. Returns the stage's exit status."""
    returned = job.folder / RETURNED
    if returned.exists():
        aside = job.run / ".replaced" / f"{RETURNED}-{os.getpid()}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(returned, aside)
    AskedTasks(asked(job)).write(arrived / ASKED)
    (arrived / IDENTITY).write_text(job.identity)
    os.rename(arrived, returned)
    return subprocess.run(job.command, cwd=plan.REPO, check=False).returncode
