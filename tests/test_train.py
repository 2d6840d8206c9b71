"""The trainer as a process: the same gradient on any ranks, exact resume, signals, bad steps, reports."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import training
from patience import PATIENCE
from sft.checkpoint import olmo_core, step_folder
from sft.checkpoint.dcp_reader import DcpReader
from sft.common.errors import SftError
from sft.data.dataset import Dataset
from sft.formats.dataset import DatasetInfo, TokenIds
from sft.formats.metrics import InitialValidation, StepRecord, read_metrics
from sft.formats.steps import is_ephemeral, named_step
from sft.model import model as model_module
from sft.model.parallel import World, make_deterministic
from sft.packing.packs import pack_dataset
from sft.recipe.base_config import read_base
from sft.recipe.schema import Hardware, Train
from sft.sync import base_check
from sft.training import build, initial_weights
from sft.training.stopwatch import Stopwatch
from training import assert_same_bits, curve, finish, kill, records, run_folder, start, tensors, train, wait_for

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here")


@pytest.mark.slow
def test_training_learns_and_reports(folder: Path) -> None:
    out = train(folder, steps=20, lr=1e-2)
    found = records(folder)
    assert [r.step for r in found] == list(range(1, 21))
    assert found[-1].loss < 0.8 * found[0].loss
    assert [r.step for r in found if r.validation_loss is not None] == [6, 12, 18, 20]
    assert set(found[0].sources) == set(found[5].validation_sources) == {"odd", "even"}
    for r in found:
        weights = r.sources.values()
        assert min(weights) <= r.loss <= max(weights)
        assert 0 <= r.padding < 1
        assert r.tokens_per_s > 0
    assert "step 20/20" in out
    assert "ETA 0:00:0" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["final_step"] == 20
    assert result["loss"] == found[-1].loss
    assert result["validation_loss"] < result["first_validation_loss"] < result["initial_validation_loss"]
    names = {p.name for p in (folder / "train").iterdir()}
    assert names - {".steps.lock"} == {
        ".metrics",
        "step20",
        "metrics.jsonl",
        "tokenizer",
        "LATEST",
        "BEST",
    }  # the ephemeral ones are gone
    assert (folder / "train" / "tokenizer" / "tokenizer.json").is_file()
    assert not step_folder.damage(folder / "train" / "step20")


@pytest.mark.seconds
def test_processes_are_forked_with_the_modules_of_training_and_of_the_tests_loaded() -> None:
    """A preloaded module that is not found is skipped without a word, and every process then imports it for itself."""
    code = "import sys; sys.exit(not {'torch', 'sft.training.train', 'training', 'pytest'} <= set(sys.modules))"
    process = training.SERVER.Process(target=exec, args=(code,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0


@pytest.mark.processes
def test_the_number_of_ranks_and_microbatches_changes_the_result_by_rounding_only(folder: Path, dataset: Path) -> None:
    """Few packs, so that ranks get very different numbers of labels, and in the last batch none at all."""
    plans: list[tuple[int, dict[str, Any]]] = [
        (1, {"microbatch_tokens": 64}),
        (1, {"microbatch_tokens": 256}),
        (2, {"microbatch_tokens": 64, "recompute": "full"}),
        (4, {"microbatch_tokens": 64, "shard_degree": 2}),
    ]
    results = []
    packs = len(pack_dataset(Dataset.open(dataset / "data"), 64))
    for number, (ranks, hardware) in enumerate(plans):
        here = run_folder(folder / str(number), dataset)
        train(here, ranks=ranks, steps=0, epochs=17 / packs, lr=1e-3, hardware=hardware)
        described = json.loads((here / "result.json").read_text())["data"]
        assert described["steps"] == 5
        assert described["last_batch_packs"] == 1  # of four: three of four ranks have no label
        results.append(here)
    steps = len(records(results[0]))
    weights = [dict(DcpReader(r / "train" / f"step{steps}")) for r in results]
    for result, found in zip(results[1:], weights[1:], strict=True):
        for ours, theirs in zip(records(result), records(results[0]), strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
            assert ours.labels == theirs.labels
        for name, value in found.items():
            torch.testing.assert_close(value, weights[0][name], atol=2e-5, rtol=1e-3)


@pytest.mark.processes
def test_the_ranks_measure_how_unevenly_they_computed(folder: Path, dataset: Path) -> None:
    packs = len(pack_dataset(Dataset.open(dataset / "data"), 64))
    train(folder, ranks=2, steps=0, epochs=5 / packs, hardware={"microbatch_tokens": 64})
    *_, last = records(folder)
    assert last.imbalance_expected == pytest.approx(0.5)  # the only pack of the last batch is one rank's
    assert all(r.imbalance is not None and 0 <= r.imbalance < 1 for r in records(folder))


def test_a_stopwatch_compares_seconds_of_the_blocks_over_ranks() -> None:
    def three_times_mine(times: torch.Tensor) -> torch.Tensor:
        times[1] = 3 * times[0]
        return times

    world = types.SimpleNamespace(
        size=2, rank=0, device=torch.device("cpu"), sum=three_times_mine, gather=lambda name: [name] * 2
    )
    block = torch.nn.Linear(256, 256)
    watch = Stopwatch([block], cast(World, world))
    block(torch.randn(4096, 256))
    lap = watch.lap()
    assert len(lap) == 1 and watch.lap() == []
    assert watch.imbalance(lap) == pytest.approx(1 - (1 + 3) / 2 / 3)
    assert watch.imbalance([]) == 0.0  # a rank that had nothing to do, beside one that had nothing either


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of twelve steps that nobody stopped, on one rank. A test changes nothing in it."""
    made = run_folder(tmp_path_factory.mktemp("whole") / "run", dataset)
    train(made)
    return made


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_resume_on_other_ranks_keeps_data_order_and_state(folder: Path, whole: Path, before: int, after: int) -> None:
    process = start(folder, steps=12, ranks=before)
    wait_for(folder, 7, process)
    kill(process, signal.SIGKILL)
    assert "continuing from" in train(folder, steps=12, ranks=after)
    for ours, theirs in zip(curve(folder), curve(whole), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_asks_to_be_run_again_and_loses_nothing(folder: Path, dataset: Path, ranks: int) -> None:
    fields: dict[str, Any] = {"ephemeral_every": 0, "ranks": ranks}
    whole = run_folder(folder / "whole", dataset)
    train(whole, **fields)
    slow = {"at": "sft.training.loop.report_step", "call": 0, "kind": "slow"}  # the signal comes before the end
    process = start(folder, fault=slow, **fields)
    wait_for(folder, 4, process)
    kill(process, signal.SIGTERM)
    finish(process, folder, 75)
    assert (folder / "train" / ".requeue").exists()
    [(step, saved)] = step_folder.steps(folder / "train")
    assert 4 <= step < 12
    assert is_ephemeral(saved)
    assert f"continuing from {saved}" in train(folder, **fields)
    assert not (folder / "train" / ".requeue").exists()
    assert_same_bits(folder / "train" / "step12", whole / "train" / "step12")


def validations(train: Path) -> list[tuple[int, float]]:
    """(finished steps, validation loss) wherever it was measured. Step 0 is the starting weights."""
    records = read_metrics(train / "metrics.jsonl")
    first = [(r.after_step or 0, r.initial_validation_loss) for r in records if isinstance(r, InitialValidation)]
    steps = [r for r in records if isinstance(r, StepRecord)]
    return first + [(r.step, r.validation_loss) for r in steps if r.validation_loss is not None]


STOPPED = {
    "SIGTERM before a permanent step": (75, 4, {"at": "sft.training.loop.report_step", "call": 3, "kind": "term"}),
    "SIGTERM before a step that nothing else saves": (75, 4, {"at": "sft.training.loop.report_step", "call": 1, "kind": "term"}),
    "killed between LATEST and BEST": (-9, 4, {"at": "sft.checkpoint.step_folder.mark_best", "call": 1, "kind": "kill"}),
}  # fmt: skip


# The rate changes no weight, so that every validation measures the same and the first saved one stays the best.
CONSTANT: dict[str, Any] = {"steps": 8, "save_every": 4, "ephemeral_every": 0, "validate_every": 2, "lr": 1e-30}


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of CONSTANT that nobody stopped."""
    made = run_folder(tmp_path_factory.mktemp("constant") / "run", dataset)
    train(made, **CONSTANT)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("moment", STOPPED)
def test_best_and_the_validation_losses_are_those_of_a_run_that_nobody_stopped(
    folder: Path, constant: Path, moment: str
) -> None:
    status, best, fault = STOPPED[moment]
    train(folder, status=status, fault=fault, **CONSTANT)
    assert "continuing from" in train(folder, **CONSTANT)
    assert curve(folder) == curve(constant)
    measured = [validations(run / "train") for run in (folder, constant)]
    assert measured[0] == measured[1]
    assert [step for step, _ in measured[0]] == [0, 2, 4, 6, 8]  # the starting weights once, also after a resume
    assert len({loss for _, loss in measured[0]}) == 1
    assert named_step(folder / "train", "BEST") == folder / "train" / f"step{best}"
    assert (folder / "train" / "BEST").read_text() == (constant / "train" / "BEST").read_text()


@pytest.mark.seconds
def test_steps_that_are_not_finite_are_skipped_then_stop_the_run_naming_the_last_good_checkpoint(folder: Path) -> None:
    # A rate of 1e30 overflows the weights' products at once; the weights that are saved stay finite.
    out = train(folder, status=1, lr=1e30, warmup_fraction=0.0, steps=40, max_skipped=4, ephemeral_every=1)
    assert "4 steps in a row" in out
    assert "last good checkpoint: " + str(folder / "train" / "step") in out
    assert "SKIPPED" in out
    for _, step in step_folder.steps(folder / "train"):
        assert all(value.isfinite().all() for value in DcpReader(step).values())
    bad = [r for r in records(folder) if r.skipped]
    assert len(bad) == 4
    assert not all(math.isfinite(loss) for loss in (bad[-1].sources or {}).values())

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in (folder / "train" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.seconds
def test_a_corrupt_step_is_passed_over_with_a_warning(folder: Path) -> None:
    train(folder, steps=12, save_every=4)
    out = folder / "train"
    good = tensors(out / "step12")
    shard = next((out / "step12" / "model_and_optim").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (out / "step8" / "manifest.json").write_text('{"schema": 1, "outp')
    said = train(folder, steps=12, save_every=4)
    assert f"warning: {out / 'step12'}: skipped: {shard} has sha256" in said
    assert f"warning: {out / 'step8'}: skipped: " in said
    assert f"continuing from {out / 'step4'}" in said
    assert all(torch.equal(good[k], v) for k, v in tensors(out / "step12").items())


@pytest.mark.seconds
def test_a_finished_run_trains_no_further_step(folder: Path, whole: Path) -> None:
    shutil.copytree(whole / "train", folder / "train")
    before = records(folder)
    assert "step 1" not in train(folder).replace("step12", "").split("continuing")[1]
    assert records(folder) == before


@pytest.mark.seconds
def test_an_epoch_that_is_extended_by_another_ends_in_the_bits_of_two(folder: Path, dataset: Path) -> None:
    """What `make extend` lets go on: the schedule must not depend on the length, so it is constant and has no warm-up."""
    fields: dict[str, Any] = {
        "steps": 0, "schedule": "constant", "warmup_fraction": 0.0, "epoch_tail": "drop", "global_batch_tokens": 1024,
        "ephemeral_every": 0, "validate_every": 0,
    }  # fmt: skip
    whole = run_folder(folder / "whole", dataset)
    train(whole, epochs=2.0, **fields)
    train(folder, epochs=1.0, **fields)
    steps = json.loads((folder / "result.json").read_text())["final_step"]
    assert f"continuing from {folder / 'train' / f'step{steps}'}" in train(folder, epochs=2.0, **fields)
    ours, theirs = (
        [{**r, "validation_loss": 0} for r in curve(f)] for f in (folder, whole)
    )  # the first ended with one
    assert ours == theirs and len(ours) == 2 * steps
    assert_same_bits(folder / "train" / f"step{2 * steps}", whole / "train" / f"step{2 * steps}")


@pytest.mark.seconds
def test_weights_come_from_an_olmo_core_step_without_its_optimizer(folder: Path, dataset: Path) -> None:
    first = run_folder(folder / "first", dataset)
    train(first, lr=1e-2)
    step = first / "train" / "step12"
    train(folder, base=str(step), steps=1, lr=1e-9, warmup_fraction=0.0)
    ours, theirs = DcpReader(folder / "train" / "step1"), DcpReader(step)
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-7) for k in theirs)
    moments = DcpReader(folder / "train" / "step1", "optim.state.")
    assert moments["lm_head.norm.weight.step"].item() == 1
    group = records(folder)[0]
    assert group.lr == 1e-9
    last = records(first)[-1]
    assert group.loss < last.loss + 0.5


def test_another_tokenizer_than_the_bases_is_refused_with_both_hashes(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"version": "2.0"}')
    facts = DatasetInfo.of(folder / "dataset").facts
    with pytest.raises(SftError) as error:
        base_check.check_base_tokenizer(folder / "dataset", facts, other)
    assert facts.tokenizer.sha256 in str(error.value)
    assert base_check.hashlib.sha256(b'{"version": "2.0"}').hexdigest() in str(error.value)
    shutil.copy(folder / "dataset" / "data" / "tokenizer" / "tokenizer.json", other)
    assert base_check.check_base_tokenizer(folder / "dataset", facts, other) == ""
    assert base_check.check_base_tokenizer(folder / "dataset", facts, None) == ""
    (other / "tokenizer.json").unlink()
    with pytest.raises(SftError, match="could not be proven") as error:
        base_check.check_base_tokenizer(folder / "dataset", facts, other)
    assert facts.tokenizer.sha256 in str(error.value)
    assert "could not be proven" in base_check.check_base_tokenizer(folder / "dataset", facts, other, unchecked=True)
    size, end = facts.vocab_size, facts.eos_id
    for said, field in (
        ({"vocab_size": size + 8, "eos_token_id": [7, end]}, ""),  # Hugging Face pads the embedding
        ({"vocab_size": size - 1, "eos_token_id": end}, rf"vocab_size +{size - 1} +{size}"),
        ({"vocab_size": size, "eos_token_id": end + 1}, rf"eos_token_id +{end + 1} +{end}"),
        ({"dataset": {"tokenizer": {"vocab_size": size, "eos_token_id": end}}}, ""),
        (
            {"dataset": {"tokenizer": {"vocab_size": size + 8, "eos_token_id": end}}},
            rf"dataset.tokenizer.vocab_size +{size + 8} +{size}",
        ),
        ({"dataset": {"tokenizer": "dolma2"}}, "dataset: tokenizer: 'dolma2', expected a table"),
        ({"dataset": {"tokenizer": {"eos_token_id": "x"}}}, "eos_token_id: 'x', expected a whole number"),
        ([], "expected an object"),
    ):
        (other / "config.json").write_text(json.dumps(said))
        if not field:
            assert "could not be proven" in base_check.check_base_tokenizer(
                folder / "dataset", facts, other, unchecked=True
            )
            continue
        with pytest.raises(SftError, match=field):  # what is known to differ is refused in any case
            base_check.check_base_tokenizer(folder / "dataset", facts, other, unchecked=True)


@pytest.mark.seconds
def test_half_precision_compute_keeps_fp32_weights(folder: Path, dataset: Path) -> None:
    train(folder, precision="bf16", steps=8, lr=2e-3)
    step = DcpReader(folder / "train" / "step8")
    assert {step.dtype(n) for n in step} == {torch.float32}
    exact = run_folder(folder / "exact", dataset)
    train(exact, steps=8, lr=2e-3)
    for ours, theirs in zip(records(folder), records(exact), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-2)


def test_a_base_of_another_architecture_is_refused(tmp_path: Path) -> None:
    from sft.recipe import resolve, schema

    config = resolve.resolve(schema.Model(**training.MODEL), training.VOCAB)
    described = olmo_core.step_config(replace(config, window=16), TokenIds())
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = schema.Model(**training.MODEL)
    with pytest.raises(SftError, match=r"field .*\nwindow +16 +window = 8 +window = 16, or remove window"):
        resolve.resolve(model, training.VOCAB, read_base(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(olmo_core.step_config(config, TokenIds())))
    assert resolve.resolve(model, training.VOCAB, read_base(tmp_path)) == config
    with pytest.raises(SftError, match="neither an OLMo-core checkpoint"):
        initial_weights.initialise(torch.nn.Linear(1, 1), config, tmp_path / "nothing", 0)


def test_deterministic_turns_on_what_torch_cublas_and_nccl_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "hardware"),
    [
        ("cpu", {"recompute": "selected"}),
        pytest.param("cuda", {"recompute": "selected", "compile": "never"}, marks=[pytest.mark.gpu, NO_GPU]),
        pytest.param("cuda", {"compile": "always"}, marks=[pytest.mark.gpu, NO_GPU]),
    ],
)
def test_a_deterministic_run_ends_in_the_same_bits_twice_and_after_a_kill(
    folder: Path, dataset: Path, device: str, hardware: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {
        "steps": 12, "ephemeral_every": 2, "deterministic": True, "device": device, "hardware": hardware,
        "precision": "fp32" if device == "cpu" else "bf16", "skip_sigmas": 6.0, "z_loss": 1e-4,
    }  # fmt: skip
    whole = run_folder(folder / "whole", dataset)
    train(whole, **fields)
    process = start(folder, **fields)
    wait_for(folder, 5, process)
    kill(process, signal.SIGKILL)
    assert "continuing from" in train(folder, **fields)
    assert_same_bits(folder / "train" / "step12", whole / "train" / "step12")
    assert curve(folder) == curve(whole)


@pytest.mark.parametrize(
    ("wanted", "device", "precision", "missing", "settled"),
    [
        ("auto", "cuda", "bf16", "", "always"),
        ("auto", "cuda", "bf16", "a C compiler", "never"),
        ("auto", "cuda", "fp32", "", "never"),
        ("auto", "cpu", "bf16", "", "never"),
        ("always", "cpu", "fp32", "a C compiler", "always"),
        ("never", "cuda", "bf16", "", "never"),
    ],
)
def test_a_gpu_in_bf16_compiles_where_it_can(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, precision: str, missing: str, settled: str
) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda: missing)
    recipe = types.SimpleNamespace(train=Train(precision=precision))
    stage: Any = types.SimpleNamespace(hardware=Hardware(compile=wanted), recipe=recipe)
    hardware, why = build.resolve_compile(stage, World(0, 1, 0, torch.device(device)))
    assert hardware == Hardware(compile=settled)
    assert why == (missing if (wanted, device) == ("auto", "cuda") else "")


def test_what_a_compiler_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton", "gcc"}
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(model_module.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(model_module.os.path, "exists", lambda path: "Python.h" in found)
    monkeypatch.delenv("CC", raising=False)
    assert model_module.missing_compiler().endswith("Python.h")
    found.add("Python.h")
    assert model_module.missing_compiler() == ""
    found.remove("gcc")
    assert model_module.missing_compiler() == "a C compiler"
    monkeypatch.setenv("CC", "zig cc")
    assert model_module.missing_compiler() == ""
    found.remove("triton")
    assert model_module.missing_compiler() == "the package triton"


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize(
    "hardware",
    [
        {},
        {"compile": "always", "recompute": "selected"},
        {"compile": "never"},
        {"compile": "never", "recompute": "full"},
    ],
)
def test_one_gpu_trains_in_bf16_along_the_cpus_fp32_curve(
    folder: Path, dataset: Path, hardware: dict[str, Any]
) -> None:
    host = run_folder(folder / "host", dataset)
    train(host, steps=12)
    train(folder, steps=12, device="cuda", precision="bf16", hardware=hardware)
    for ours, theirs in zip(records(folder), records(host), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-2)
    assert (records(folder)[-1].memory_gb or 0) > 0
    # The host is ahead of the device: where it waits, before a save, the device's time counts and not the host's.
    seconds = [r.seconds for r in records(folder)[4:]]
    assert min(seconds) > 0.2 * statistics.median(seconds)
