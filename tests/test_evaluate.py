"""sft.evaluation.evaluate: scores equal lm-eval's own and carry their errors; broken tasks have none; tasks, batches, progress."""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evaluating import ANYTHING, CHOICE, REPLY, forget_hub_settings, lines, load, plain_place, run
from sft.common import machine
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.evaluation import evaluate
from sft.evaluation.validation import validation_loss
from sft.recipe.base_config import read_hf_config
from sft.recipe.schema import Evaluate
from tiny_export import OLMO3

place = plain_place


@pytest.mark.seconds
def test_scores_are_lm_evals_own_with_n_error_and_interval(place: SimpleNamespace, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = run(place, "colours", tmp_path).metrics
    task = load("colours", place.tasks, place.data)
    lm = HFLM(pretrained=str(place.root / "model"), device="cpu", dtype="float32", batch_size=4)
    theirs = simple_evaluate(
        model=lm,
        tasks=[task],
        apply_chat_template=True,
        random_seed=1,
        bootstrap_iters=100,
        task_manager=TaskManager(include_defaults=False),
    )["results"]
    assert list(ours) == ["acc_norm", "acc"]  # the task's own order: the first is the primary metric
    for metric in ours:
        assert ours[metric].value == theirs["colours"][f"{metric},none"]
        assert ours[metric].stderr == pytest.approx(theirs["colours"][f"{metric}_stderr,none"])
        assert ours[metric].n == 12
        low, high = ours[metric].bounds or (1, 0)
        assert low < ours[metric].value < high


def test_a_model_that_computes_nonsense_is_broken_not_zero(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = place.model.model.lm_head.weight
    saved = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    try:
        with pytest.raises(evaluate.BrokenTask, match="12 of 12 documents have a likelihood that is not finite"):
            run(place, "colours", tmp_path)
    finally:
        with torch.no_grad():
            head.copy_(saved)


def test_a_prompt_that_does_not_fit_is_an_error_and_not_cut(place: SimpleNamespace, tmp_path: Path) -> None:
    place.model._max_length = 20
    try:
        with pytest.raises(SftError, match=r"a prompt of \d+ tokens leaves no room for its reply within max_length 20"):
            run(place, "capitals", tmp_path)
    finally:
        place.model._max_length = None


def test_unknown_tasks_and_missing_data_are_reported_with_the_next_step(
    place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.evaluation import tasks

    few = tasks.TaskManager(include_path=str(place.tasks), include_defaults=False)  # lm-eval's own take half a minute
    monkeypatch.setattr(tasks, "_all_tasks", lambda _: few)
    with pytest.raises(SftError, match=r"no task 'capitols' in .*similar names: capitals"):
        load("capitols", place.tasks, {})
    with pytest.raises(SftError, match=r"task colours needs the file 'colours'; next: add colours = "):
        load("colours", place.tasks, {})


def test_an_export_without_a_template_is_not_scored(tmp_path: Path) -> None:
    with pytest.raises(SftError, match=r"chat_template.jinja: missing: a chat model cannot be scored on raw text"):
        evaluate.check_template(tmp_path)


def test_validation_loss_is_the_native_models(place: SimpleNamespace, tmp_path: Path) -> None:
    from sft.data.dataset_writer import DatasetWriter
    from sft.model.model import Transformer

    rng = random.Random(0)
    lengths = [17, 70, 5]
    ids = [rng.randrange(4, 280) for _ in range(sum(lengths))]
    mask = [rng.random() < 0.4 for _ in ids]
    for start in np.cumsum([0, *lengths[:-1]]):
        mask[start] = False
    with DatasetWriter(tmp_path / "validation", 300) as writer:
        writer.add(ids, mask, lengths)
    found = validation_loss(place.model, tmp_path / "validation", limit=3, seq_len=64)
    native = Transformer(OLMO3)
    native.load_state_dict(place.weights)
    total, count, start = 0.0, 0, 0
    for length in lengths:
        n = min(length, 64)
        x = torch.tensor(ids[start : start + n])
        m = torch.tensor(mask[start : start + n])[1:]
        with torch.no_grad():
            logits, _ = native(x, torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
        logits = logits[:-1, : place.model.model.config.vocab_size][m]
        total += torch.nn.functional.cross_entropy(logits, x[1:][m], reduction="sum").item()
        count, start = count + int(m.sum()), start + length
    assert found.labels == count and found.documents == 3
    assert found.loss == pytest.approx(total / count, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found.bounds and found.stderr
    assert found.bounds[1] - found.loss == pytest.approx(1.96 * found.stderr, rel=1e-3)
    assert (found.perplexity_low, found.perplexity_high) == pytest.approx(tuple(map(math.exp, found.bounds)))


def test_the_shipped_gsm8k_tasks_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"q{i}", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(400)]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = Path(__file__).parents[1] / "recipes" / "tasks"
    data = {"gsm8k_test": file, "gsm8k_train": file}
    choice = load("gsm8k_choice", tasks, data)
    golds = []
    for doc in choice.test_docs():
        assert doc["choices"][doc["gold"]] == doc["answer"] and len(set(doc["choices"])) == 4
        golds.append(doc["gold"])
    assert np.bincount(golds).tolist() == [100] * 4
    shots = load("gsm8k_8shot", tasks, data)
    assert shots.config.num_fewshot == 8 and shots.config.doc_to_text == "{{question}}"
    chat = load("gsm8k_chat", tasks, data)
    text = "So it is 3.\n#### 1,003."
    for kept in chat._filters:
        from lm_eval.api.instance import Instance

        instance = Instance("generate_until", {}, ("", {}), 0)
        instance.resps = [text]
        kept.apply([instance])
        found = instance.filtered_resps[kept.name]
        assert chat.process_results({"question": "", "answer": "x\n#### 1003"}, [found])["exact_match"] == 1


def test_gsm8k_is_asked_in_one_turn_or_after_eight_worked_ones(place: SimpleNamespace, shared_data: Path) -> None:
    tasks = Path(__file__).parents[1] / "recipes" / "tasks"
    data = {f"gsm8k_{split}": shared_data / "gsm8k" / f"{split}.jsonl" for split in ("test", "train")}
    for name, turns in (("gsm8k_chat", 1), ("gsm8k_8shot", 9)):
        task = load(name, tasks, data)
        assert len(task.eval_docs) == 1319
        task.build_all_requests(
            limit=1, apply_chat_template=True, fewshot_as_multiturn=True,
            chat_template=place.model.apply_chat_template, tokenizer_name="x",
        )  # fmt: skip
        prompt = task.instances[0].args[0]
        assert prompt.count("<|im_start|>user\n") == turns and prompt.count("####") == turns - 1
        question = next(iter(task.test_docs()))["question"]
        assert prompt.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def test_the_format_task_scores_a_reply_by_its_instructions(place: SimpleNamespace, tmp_path: Path) -> None:
    tasks = Path(__file__).parents[1] / "recipes" / "tasks"
    options = Evaluate(tasks=("format_following",), limit=3, min_stop_rate=0, max_empty_fraction=1)
    place.model._max_length = 2000
    place.model.stop_ids, saved = (
        [*range(250)],
        place.model.stop_ids,
    )  # random weights never stop: cut their replies short
    place.model.model.generation_config.eos_token_id = place.model.stop_ids
    try:
        result = evaluate.run_task(place.model, "format_following", options, tasks, {}, tmp_path)
    finally:
        place.model._max_length, place.model.stop_ids = None, saved
        place.model.model.generation_config.eos_token_id = saved
    assert list(result.metrics) == ["strict", "loose", "strict_share", "loose_share"]
    assert all(score.n == 3 for score in result.metrics.values())


def test_local_tasks_never_ask_the_hub_and_others_may(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_hub_settings(monkeypatch)
    evaluate.go_offline(Evaluate(tasks=("colours", "arc_easy")), place.tasks, tmp_path)
    assert "HF_HUB_OFFLINE" not in os.environ
    evaluate.go_offline(Evaluate(tasks=("colours", "capitals")), place.tasks, tmp_path)
    assert [os.environ[name] for name in machine.OFFLINE] == ["1"] * 4


def test_convert_config_is_what_the_harness_loads(place: SimpleNamespace) -> None:
    assert place.model.max_length == 512
    assert place.model.stop_ids == [2, 0]
    assert read_hf_config(read_json(place.root / "model/config.json"), "config.json").config.window == OLMO3.window


@pytest.mark.seconds
@pytest.mark.parametrize("batch_size", [1, 5, 0])
def test_scores_do_not_depend_on_the_batch_size(place: SimpleNamespace, tmp_path: Path, batch_size: int) -> None:
    from sft.evaluation.hf_model import HfModel

    other = HfModel(place.root / "model", batch_size=batch_size, max_length=0, think_end=None)
    for name in ("colours", "capitals"):
        evaluate.run_task(other, name, ANYTHING, place.tasks, place.data, tmp_path / "other")
        run(place, name, tmp_path / "usual")
        for ours, theirs in zip(
            lines(tmp_path / "usual/samples" / f"{name}.jsonl"), lines(tmp_path / "other/samples" / f"{name}.jsonl"),
            strict=True,
        ):  # fmt: skip
            assert ours["scores"] == theirs["scores"] and ours["prompt"] == theirs["prompt"]
            if name == "colours":
                likelihoods = [[r[0] for r in row["replies"]] for row in (ours, theirs)]
                assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
            else:
                assert ours["replies"] == theirs["replies"]
    rows = {what: b.largest for what, b in other.batches.items()}
    assert rows == ({"replies": 5, "likelihoods": 36} if not batch_size else dict.fromkeys(rows, batch_size))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_cpus_scores(place: SimpleNamespace, tmp_path: Path) -> None:
    from sft.evaluation.hf_model import HfModel

    gpu = HfModel(place.root / "model", batch_size=0, max_length=0, think_end=None, device="cuda")
    for name in ("colours", "capitals"):
        found = evaluate.run_task(gpu, name, ANYTHING, place.tasks, place.data, tmp_path / "gpu")
        assert found.metrics == run(place, name, tmp_path / "cpu").metrics
    assert gpu.batches["likelihoods"].largest == 36 and gpu.about.device.startswith("cuda")


def test_automatic_batches_keep_to_the_budget_of_tokens_and_of_memory() -> None:
    from sft.evaluation.batches import CPU_BYTES, CPU_TOKENS, GPU_TOKENS, Batches

    cpu = Batches(0, gpu=False, bytes_per_token=1, free=lambda: 10**12)
    assert cpu.rows(100) == CPU_TOKENS // 100 and cpu.rows(10**6) == 1
    assert Batches(0, gpu=False, bytes_per_token=CPU_BYTES // 1000, free=lambda: 10**12).rows(100) == 10
    assert Batches(0, gpu=False, bytes_per_token=CPU_BYTES // 1000, free=lambda: CPU_BYTES).rows(100) == 2
    replies = Batches(0, gpu=False, bytes_per_token=1000, free=lambda: 10**9, least=16)
    assert replies.rows(1500) == 16 and replies.rows(100) == CPU_TOKENS // 100 and replies.rows(10**5) == 2
    assert replies.too_large(16) and replies.rows(1500) == 8
    gpu = Batches(0, gpu=True, bytes_per_token=1000, free=lambda: 10**9)
    for seconds in (4, 4, 9, 1):  # twice as fast, hardly faster (stop), and no growth ever after
        gpu.done(gpu.rows(1), gpu.tokens, seconds)
    assert gpu.tokens == 4 * GPU_TOKENS
    assert gpu.too_large(64) and gpu.tokens == 2 * GPU_TOKENS
    assert not gpu.too_large(1)
    assert Batches(0, gpu=True, bytes_per_token=10**6, free=lambda: 10**9).rows(100) == 5
    fixed = Batches(6, gpu=True, bytes_per_token=1, free=lambda: 0)
    assert fixed.rows(10**9) == 6 and fixed.too_large(6) and fixed.rows(1) == 3


def test_a_batch_that_does_not_fit_into_memory_is_tried_again_in_parts(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from sft.evaluation.hf_model import HfModel

    whole = run(place, "capitals", tmp_path / "a")
    model, sizes, generate = (
        HfModel(place.root / "model", batch_size=5, max_length=0, think_end=None),
        [],
        HFLM._model_generate,
    )

    def small_memory(self: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(context))
        if len(context) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", small_memory)
    logged: list[str] = []
    model.log = logged.append
    again = evaluate.run_task(model, "capitals", ANYTHING, place.tasks, place.data, tmp_path / "b")
    assert sizes == [5, 2, 2, 1] and logged == ["out of memory with 5 at once: trying fewer"]
    assert again.metrics == whole.metrics and again.generation == whole.generation


def test_items_that_fail_break_the_task(place: SimpleNamespace, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "capitals.jsonl").write_text((place.tasks / "capitals.jsonl").read_text())
    code = "def score(doc, results):\n    {}\n    return {{'exact_match': 1.0}}\n"
    text = REPLY.replace("metric_list:", "process_results: !function marks.score\nmetric_list:")
    for file, line in (
        ("raises", "assert 'Rome' not in doc['question'], 'no marks'"),
        ("skips", "if 'Rome' in doc['question']: return {}"),
    ):
        (tasks / f"marks_{file}.py").write_text(code.format(line))
        (tasks / f"{file}.yaml").write_text(
            text.replace("task: capitals", f"task: {file}").replace("marks.", f"marks_{file}.")
        )

    def one(name: str) -> Any:
        return evaluate.run_task(place.model, name, ANYTHING, tasks, {}, tmp_path)

    with pytest.raises(
        evaluate.BrokenTask, match=r"raises: AssertionError: no marks; the complete trace is in .*raises.error.txt"
    ):
        one("raises")
    assert "no marks" in (tmp_path / "work/raises.error.txt").read_text()
    with pytest.raises(evaluate.BrokenTask, match="skips: 1 of 5 documents failed: they have no exact_match"):
        one("skips")
    assert not list((tmp_path / "work").glob("*s.json"))


def test_a_task_without_documents_is_broken(place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(evaluate.BrokenTask, match='colours: ValueError: Instruction "test" corresponds to no data'):
        evaluate.run_task(place.model, "colours", ANYTHING, place.tasks, {"colours": tmp_path / "none.jsonl"}, tmp_path)


def test_the_system_prompt_stands_before_every_conversation(place: SimpleNamespace, tmp_path: Path) -> None:
    result = run(place, "capitals", tmp_path, replace(ANYTHING, system_prompt="You know maps."))
    prompts = [s["prompt"] for s in lines(tmp_path / "samples/capitals.jsonl")]
    assert all(p.startswith("<|im_start|>system\nYou know maps.<|im_end|>\n<|im_start|>user\nWhat") for p in prompts)
    assert result.samples_sha256 != run(place, "capitals", tmp_path / "without").samples_sha256


def test_as_many_held_out_conversations_as_asked_are_measured_and_kept(place: SimpleNamespace, tmp_path: Path) -> None:
    from sft.data.dataset_writer import DatasetWriter

    with DatasetWriter(tmp_path / "validation", 300) as writer:
        writer.add([5, 6, 7] * 4, [False, True, True] * 4, [3, 3, 3, 3])
    file = tmp_path / "losses.jsonl"
    found = validation_loss(place.model, tmp_path / "validation", 2, 64, file)
    losses = lines(file)
    assert found.documents == len(losses) == 2 and [c["labels"] for c in losses] == [2, 2]
    assert found.loss == pytest.approx(sum(c["loss"] for c in losses) / 4)
    assert losses[0]["item"] == losses[1]["item"]  # equal conversations have one name


def test_a_folder_of_ones_own_holds_tasks_and_hub_files_hold_their_data(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from pyarrow import Table, parquet

    from sft.common import paths

    mine = tmp_path / "data/my/tasks"
    mine.mkdir(parents=True)
    (mine / "colours.yaml").write_text(CHOICE)
    rows = [{"question": "q", "choices": ["a", "b"], "gold": 1}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "test-0.parquet")
    asked: list[Any] = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((*args, kwargs))
        return str(tmp_path / "test-0.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    path = "hf://org/colours@v2/main/test-0.parquet"
    options = Evaluate(tasks=("colours",), task_dir="my/tasks", data={"colours": path})
    folder, data = evaluate.find_tasks(options, lambda p, what: paths.find((tmp_path / "data",), p, what), "r.toml")
    assert folder == mine
    task = load("colours", folder, data)
    assert [dict(d) for d in task.test_docs()] == rows
    assert asked == [("org/colours", "main/test-0.parquet", {"repo_type": "dataset", "revision": "v2"})]
    with pytest.raises(SftError, match=r"data.colours: 'hf://colours' is not hf://org/name\[@revision\]/file"):
        load("colours", folder, {"colours": "hf://colours"})

    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("Couldn't reach the hub\nmany lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(SftError, match=r"data.colours: Couldn't reach the hub; next: check"):
        load("colours", folder, data)
    with pytest.raises(SftError, match=r"r.toml: \[evaluate\] tasks: '../x' is not a task name"):
        evaluate.find_tasks(replace(options, tasks=("../x",)), lambda p, what: tmp_path, "r.toml")


def test_progress_tells_how_far_it_is_and_when_it_ends(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.evaluation import batches, hf_model

    monkeypatch.setattr(batches, "LOG_EVERY_S", 0.0)
    logged: list[str] = []
    model = hf_model.HfModel(place.root / "model", batch_size=2, max_length=0, think_end=None)
    evaluate.run_tasks(model, replace(ANYTHING, tasks=("capitals",)), place.tasks, {}, tmp_path, logged.append)
    assert [line.split(", ETA")[0] for line in logged[:2]] == [
        "capitals: 2/5 replies, 2 at once", "capitals: 4/5 replies, 2 at once",
    ]  # fmt: skip
    assert all("ETA 0:00:0" in line for line in logged[:2]) and logged[2].startswith(
        "1/1 capitals: exact_match 0.000 [0.000"
    )
