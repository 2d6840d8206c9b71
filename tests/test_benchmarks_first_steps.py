"""Which recipes `make bench-first-steps` runs, on a CPU and on a GPU, and the recipe that it writes where data is not here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench_first_steps as bench
from conftest import REPO
from sft.recipe import recipe

NAMES = sorted(file.stem for file in (REPO / "recipes").glob("*.toml"))


def chosen(names: list[str]) -> tuple[dict[str, bench.Planned], dict[str, str]]:
    """What runs, and why the others do not."""
    runs, skipped = {}, {}
    for name in names:
        try:
            runs[name] = bench.plan(name, as_written=False)
        except bench.Skipped as reason:
            skipped[name] = str(reason)
    return runs, skipped


def test_a_cpu_runs_the_small_recipes_and_names_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    runs, skipped = chosen(NAMES)
    assert set(runs) == {"gsm8k", "smoke", "smoke-hybrid", "smoke-lora"}
    assert [name for name, planned in runs.items() if planned.made] == ["gsm8k"]
    assert "a CPU trains models of up to 50,000,000" in skipped["olmo2-7b"]
    assert skipped["smollm2-gsm8k"].startswith("hf://HuggingFaceTB/SmolLM2-135M-Instruct is not on this machine")


@pytest.mark.slow
def test_a_gpu_runs_what_its_memory_holds_and_names_the_planners_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(bench, "processes", lambda *_: (1, 1))
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=150e9, name="NVIDIA H200")
    )
    runs, skipped = chosen(["olmo2-1b", "olmo2-32b", "smoke"])
    assert {"olmo2-1b", "smoke"} == set(runs)
    assert "GB per GPU are needed on 1 GPUs of 150.0 GB" in skipped["olmo2-32b"] and "next: " in skipped["olmo2-32b"]
    one = runs["olmo2-1b"]
    assert one.batch_tokens == 4 * 8192 and 0 < one.planned_gb < 138 and one.made


def test_the_recipe_that_is_written_is_the_recipes_own_but_for_its_files(tmp_path: Path) -> None:
    (tmp_path / "smoke").symlink_to(REPO / "recipes/smoke")
    (tmp_path / "olmo3-7b.toml").write_bytes((REPO / "recipes/olmo3-7b.toml").read_bytes())
    loaded = recipe.load(REPO / "recipes/olmo3-7b.toml")
    bench.write(tmp_path, "olmo3-7b", bench.Planned(loaded, 1, 32768, 0.0, True, 100278), steps=2)
    made = recipe.load(tmp_path / "olmo3-7b.toml")
    assert made.train == loaded.train and made.on["local"] == loaded.on["local"]
    assert (made.model.preset, made.model.base, made.model.vocab_size) == ("olmo3-7b", "", 100278)
    lines = [json.loads(line) for line in (tmp_path / "olmo3-7b.jsonl").read_text().splitlines()]
    assert len(lines) > 20 and sum(len(m["content"]) for line in lines for m in line["messages"]) > 4 * 3 * 32768
