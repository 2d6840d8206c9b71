"""The whole pipeline, for real: make smoke from the repository as it stands, into a folder of runs of its own.

It trains a real (tiny) model, exports it and scores it, so this one module takes about a minute and a half on two cores.
"""

import json
import math
import os
import re
import resource
import shutil
import subprocess

import pytest

import warm
from conftest import REPO
from patience import PATIENCE
from sft.formats import manifest

pytestmark = pytest.mark.slow

# The smoke tasks have 4 choices and free answers: chance is 0.25 and 0. A trained smoke model must be above it by far
# more than its error: 0.25 here is about five standard errors of the choice task.
MARGIN = 0.25


def make(runs, *args, ok=True):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    done = subprocess.run(
        ["make", *args, f"RUNS={runs}"],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make(folder, "smoke")
    return folder


def read(runs, stage):
    return manifest.load(runs / "smoke" / stage / "manifest.json")


def test_smoke_makes_every_stage_and_the_report_and_they_verify(runs):
    out = make(runs, "verify", "RUN=smoke").stdout
    made = re.findall(r"^(\w+) +\d+ files verified", out, re.M)
    assert made == ["prepare", "sync", "train", "convert", "evaluate", "report"] and "not made" not in out
    html = next((runs / "smoke/report").glob("*.html")).read_text()
    assert '<figure class="chart"' in html and not re.search(r"""(src|href)=["']https?://""", html)


def test_a_second_smoke_runs_nothing_within_a_second(runs):
    make(runs, "smoke")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = make(runs, "smoke").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # a busy machine takes longer, and needs no more work
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert "stages/" not in out
    make(runs, "-q", "smoke")


def test_the_loss_falls_by_more_than_half_and_the_validation_loss_follows(runs):
    lines = [json.loads(line) for line in (runs / "smoke/train/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:10]) / 10
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validation[-1] < validation[0] and math.isfinite(validation[-1])


def test_the_scores_are_above_chance_by_the_margin_and_carry_their_errors(runs):
    tasks = json.loads((runs / "smoke/evaluate/results.json").read_text())["tasks"]
    for name, metric, chance in (("smoke_choice", "acc", 0.25), ("smoke_generate", "exact_match", 0.0)):
        score = tasks[name]["metrics"][metric]
        assert score["n"] >= 40 and score["stderr"] is not None
        assert score["value"] > chance + MARGIN, f"{name}: {score}"
        assert score["low"] > chance, f"{name}: chance is inside the 95 % interval of {score}"
    asked = read(runs, "evaluate").metrics["asked"]
    assert set(asked["tasks"]) == {"smoke_choice", "smoke_generate"} and len(asked["template_sha256"]) == 64
    assert all(len(h["task_sha256"]) == len(h["samples_sha256"]) == 64 for h in asked["tasks"].values())


def test_the_export_is_a_hugging_face_model_that_answers_and_stops(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = read(runs, "convert")
    folder = runs / "smoke/convert"
    config = next(
        folder / e.path for e in made.outputs if e.path.endswith("config.json") and "generation" not in e.path
    )
    model = AutoModelForCausalLM.from_pretrained(config.parent)
    tokenizer = AutoTokenizer.from_pretrained(config.parent)
    assert model.config.model_type == "olmo3" and model.config.sliding_window == 64
    chat = [
        {"role": "system", "content": "You are the guide of Eastmere Zoo."},
        {"role": "user", "content": "What does the viper eat?"},
    ]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "The viper eats" in tokenizer.decode(out, skip_special_tokens=True)
    assert out[-1].item() in set(model.generation_config.eos_token_id if isinstance(model.generation_config.eos_token_id, list)
                                 else [model.generation_config.eos_token_id])  # fmt: skip


def test_olmo_core_loads_the_checkpoint_and_gives_our_logits(runs):
    pytest.importorskip("olmo_core")
    import torch
    from olmo_core.distributed.checkpoint import load_model_and_optim_state
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.transformer import TransformerConfig
    from transformers import AutoModelForCausalLM

    step = next((runs / "smoke/train").glob("step200"))
    config = TransformerConfig.from_dict(json.loads((step / "config.json").read_text())["model"])
    config.block.sequence_mixer.backend = AttentionBackendName.torch
    model = config.build(init_device="cpu")
    load_model_and_optim_state(step / "model_and_optim", model)
    export = next(p.parent for p in (runs / "smoke/convert").rglob("model*.safetensors"))
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    ids = torch.randint(0, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids)[..., : reference.config.vocab_size], reference(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_editing_lr_would_restage_training_only(runs):
    out = make(runs, "-n", "evaluate", "RECIPE=smoke", "lr=1e-3").stdout
    assert re.findall(r"stages/(\w+)\.", out) == ["train", "convert", "evaluate"]  # the sibling reuses prepare and sync
    assert "runs/smoke_lr" not in out and f"{runs}/smoke_lr-1e-3" in out  # a sibling run, the old one stays
    make(runs, "-q", "smoke")


def test_a_sibling_run_shares_the_prepared_data_and_a_short_training_resumes(runs, tmp_path, monkeypatch):
    warm.write_python(tmp_path / "python")
    monkeypatch.setenv("SFT_PYTHON", str(tmp_path / "python"))  # make smoke has started new ones
    overrides = ["RECIPE=smoke", "steps=6", "train.seed=1"]
    make(runs, "train", *overrides, "processes=2", "save_every=3", "microbatch_tokens=512")
    run = runs / "smoke_steps-6_train.seed-1"
    a, b = (r / "prepare/data/token_ids_part_0000.npy" for r in (runs / "smoke", run))
    assert a.samefile(b)
    final = manifest.load(run / "train/manifest.json")
    shutil.rmtree(run / "train/step6")
    (run / "train/manifest.json").unlink()
    out = make(runs, "train", *overrides, "processes=2", "save_every=3", "microbatch_tokens=512").stdout
    assert "step3" in out
    again = manifest.load(run / "train/manifest.json")
    shards = [{e.path: e.sha256 for e in m.outputs if e.path.endswith(".distcp")} for m in (final, again)]
    assert shards[0] == shards[1] and shards[0], "a resumed run ends in the same bytes"


def test_the_notebook_runs_on_it(runs, monkeypatch, capsys):
    """Every cell of docs/first-run.ipynb, in this process. Its own `make smoke` finds the finished stages."""
    monkeypatch.chdir(REPO)
    for name in [name for name in os.environ if name.startswith("MAKE") or name == "MFLAGS"]:
        monkeypatch.delenv(name)
    cells = json.loads((REPO / "docs/first-run.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert 'runs = Path("runs")' in code[0] and not any(cell.get("outputs") for cell in cells)
    names = {}
    for text in code:
        exec(compile(text.replace('Path("runs")', f"Path({str(runs)!r})"), "docs/first-run.ipynb", "exec"), names)
    shown = capsys.readouterr().out
    assert re.search(r"assistant\n⟦.*<\|im_end\|>⟧\n<\|im_start\|>user", shown, re.DOTALL)
    assert "200 steps: loss 7.6" in shown and "smoke_choice: acc" in shown
    trained, others = map(float, re.search(r"step 200: ([\d.]+) nats a trained token, ([\d.]+)", shown).groups())
    assert trained < 1 < others  # the questions were only read
