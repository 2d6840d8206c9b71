"""make import-config: every key of other trainers' own examples has one end, and what is written is a valid recipe."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peers
from conftest import REPO
from sft.common.errors import SftError
from sft.importing import importer, names
from sft.importing.config import Config
from sft.recipe import recipe

AXOLOTL = ("axolotl", "0.19.0", "136d623f04c909c5149d7f5dbd4a0e215014ab4c3617cce9d64010b5b8ca609d")
TRL = ("trl", "1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396")
TORCHTUNE = ("torchtune", "0.6.1", "bcbc4ee9774b5c5829a5ff13df851e0b0e32416c018af8db53faa3472ac256e7")
AUTOMODEL = ("nemo_automodel", "0.7.0", "37b8397a73c17e4a8bffd0cd3becc0507abecc1ebfea3b3eb6468eed57ba6674")
TRANSFORMERS = REPO / ".venv" / "lib"


def convert(folder: Path, name: str, text: str, **how: Any) -> importer.Imported:
    file = folder / name
    file.write_text(text)
    return importer.convert(file, **how)


def fields(imported: importer.Imported) -> dict[str, Any]:
    return tomllib.loads(imported.text)


def check_ends(config: Config) -> None:
    ends = [*config.used, *config.skipped, *config.left]
    assert sorted(ends) == sorted(config.values), "every key has one end"
    assert all([*config.used.values(), *config.skipped.values(), *config.left.values()]), "and a reason"


def import_all(files: Iterator[Path]) -> tuple[int, list[str]]:
    """(how many gave a recipe, the errors of the others)."""
    valid, errors = 0, []
    for file in files:
        try:
            check_ends(importer.convert(file).config)  # which has loaded the recipe
            valid += 1
        except SftError as error:
            errors.append(str(error))
    return valid, errors


@pytest.mark.slow
def test_every_key_of_axolotls_examples_is_used_or_listed() -> None:
    folder = peers.pypi_package(*AXOLOTL, source=True) / "axolotl-0.19.0" / "examples"
    valid, errors = import_all(f for f in sorted(folder.rglob("*.y*ml")) if "base_model" in f.read_text())
    reasons = ("supervised finetuning only", "no dataset that can be read")
    assert valid >= 230
    assert [e for e in errors if not any(r in e for r in reasons)] == []


@pytest.mark.slow
def test_every_key_of_torchtunes_configurations_is_used_or_listed() -> None:
    folder = peers.pypi_package(*TORCHTUNE) / "recipes" / "configs"
    valid, errors = import_all(sorted(folder.rglob("*.yaml")))
    assert valid >= 120
    assert [e for e in errors if "supervised finetuning only" not in e and "no dataset that can be read" not in e] == []


def literals(file: Path, name: str) -> dict[str, Any]:
    """{field: default} of a dataclass or pydantic class in a file that is not imported; None for defaults that are no literal."""
    (found,) = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    defaults: dict[str, Any] = {}
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        value = node.value
        if isinstance(value, ast.Call):
            value = next((k.value for k in value.keywords if k.arg == "default"), None)
        try:
            defaults[node.target.id] = ast.literal_eval(value) if value is not None else None
        except ValueError:
            defaults[node.target.id] = None
    return defaults


def signature(file: Path, name: str) -> dict[str, Any]:
    """{parameter: default} of the __init__ of a class."""
    (found,) = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    (init,) = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    given = init.args.args[-len(init.args.defaults) :]
    return {
        a.arg: ast.literal_eval(d)
        for a, d in zip(given, init.args.defaults, strict=True)
        if isinstance(d, ast.Constant | ast.Tuple)
    }


def installed(package: str, file: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / file


@pytest.mark.seconds
def test_trls_defaults_are_those_of_its_classes(tmp_path: Path) -> None:
    folder = peers.pypi_package(*TRL) / "trl" / "trainer"
    theirs = {**literals(installed("transformers", "training_args.py"), "TrainingArguments"),
              **literals(folder / "model_config.py", "ModelConfig"), **literals(folder / "sft_config.py", "SFTConfig")}  # fmt: skip
    ours = {names.NAMES["trl"].get(k, k): v for k, v in names.DEFAULTS["trl"].items()}
    ours["warmup_steps"] = ours.pop("warmup_ratio")
    ours["adam_beta1"], ours["adam_beta2"] = ours.pop("adam_betas")
    assert {name: theirs[name] for name in ours} == ours
    stated = {k: v for k, v in theirs.items() if v is not None}
    lines = "\n".join(f"{k}: {v!r}".replace("False", "false").replace("True", "true") for k, v in stated.items())
    config = convert(tmp_path, "all.yaml", f"{lines}\nmodel_name_or_path: a/b\ndataset_name: c/d\n").config
    check_ends(config)
    assert len(config.values) > 90


@pytest.mark.seconds
def test_defaults_of_axolotl_torchtune_and_automodel_are_those_of_their_classes() -> None:
    folder = peers.pypi_package(*AXOLOTL, source=True) / "axolotl-0.19.0" / "src" / "axolotl" / "utils" / "schemas"
    theirs = {**literals(folder / "training.py", "HyperparametersConfig"), **literals(folder / "config.py", "AxolotlInputConfig"),
              **literals(folder / "peft.py", "LoraConfig")}  # fmt: skip
    ours = {names.NAMES["axolotl"].get(k, k): v for k, v in names.DEFAULTS["axolotl"].items()}
    for name in (
        "num_epochs",
        "lr_scheduler",
        "weight_decay",
        "sequence_len",
        "micro_batch_size",
        "gradient_accumulation_steps",
    ):
        assert theirs[name] == ours[name], name
    adamw = signature(installed("torch", "optim/adamw.py"), "AdamW")
    for trainer in ("torchtune", "automodel"):
        found = names.DEFAULTS[trainer]
        assert (tuple(found["adam_betas"]), found["adam_epsilon"], found["weight_decay"]) == (
            adamw["betas"], adamw["eps"], adamw["weight_decay"],
        )  # fmt: skip
    wheel = peers.pypi_package(*AUTOMODEL) / "nemo_automodel" / "components"
    steps = literals(wheel / "training" / "step_scheduler.py", "StepSchedulerConfig")
    lora = literals(wheel / "_peft" / "lora.py", "PeftConfig")
    found = names.DEFAULTS["automodel"]
    assert (found["global_rows"], found["num_train_epochs"]) == (steps["global_batch_size"], steps["num_epochs"])
    assert (found["lora_r"], found["lora_alpha"], found["lora_dropout"]) == (
        lora["dim"],
        lora["alpha"],
        lora["dropout"],
    )


def test_the_command_of_trls_own_documentation(tmp_path: Path) -> None:
    text = (peers.pypi_package(*TRL) / "trl" / "scripts" / "sft.py").read_text()
    command = re.findall(r"```bash\n(python .*?)```", text, re.DOTALL)[1]
    imported = convert(tmp_path, "trl.sh", command, gpus=4)
    check_ends(imported.config)
    found = fields(imported)
    train = found["train"]
    assert found["model"]["base"] == "hf://Qwen/Qwen2-0.5B"
    assert found["prepare"]["sources"] == [{"path": "hf://trl-lib/Capybara"}]
    assert (train["method"], train["lora_rank"], train["lora_alpha"], train["lr"]) == ("lora", 32, 16.0, 2e-4)
    assert train["global_batch_tokens"] == 2 * 8 * 4 * 1024
    assert (train["epochs"], train["validate_every"], train["schedule"]) == (1.0, 100, "linear")
    assert "eos_token" in imported.config.left and "push_to_hub" in imported.config.skipped


PAGE = """
gantry run --cluster ai2/neptune --budget ai2/x -- uv run python scripts/data/convert_sft_data_for_olmocore.py \\
    --dataset_mixer_list allenai/a 1.0 allenai/b 0.5 --tokenizer_name_or_path /weka/x-hf --output_dir /weka/data \\
    --visualize True --chat_template_name olmo --max_seq_length 16384
BASE_CKPT="/weka/step11921"
python src/scripts/train/sft/Olmo-sft.py launch my-run $BASE_CKPT ai2/jupiter-cirrascale-2 \\
    --trainer.callbacks.wandb.enabled=True --trainer.max_duration.value=2 --train_module.optim.lr=1e-4 \\
    --launch.priority=high --seq_len=32768 --launch.num_gpus=8 --num_nodes=1 --budget ai2/x --model_name olmo3-7b \\
    --dataset_path /weka/data
"""


def test_the_page_of_commands_is_one_recipe(tmp_path: Path) -> None:
    imported = convert(tmp_path, "page.sh", PAGE)
    check_ends(imported.config)
    found = fields(imported)
    assert found["model"] == {"base": "/weka/step11921", "preset": "olmo3-7b"}
    assert found["prepare"]["template"] == "olmo" and found["prepare"]["tokenizer"] == "/weka/x-hf"
    assert found["prepare"]["sources"] == [
        {"path": "hf://allenai/a", "weight": 1.0},
        {"path": "hf://allenai/b", "weight": 0.5},
    ]
    assert found["train"] == {"seq_len": 32768, "epochs": 2.0, "lr": 1e-4, "wandb_project": "page"}
    assert {"max_seq_length", "launch.priority", "cluster", "budget"} <= imported.config.left.keys()


@pytest.mark.parametrize(
    ("part", "lacks", "script"),
    [(0, "names no model", "Olmo-sft.py"), (1, "no dataset that can be read", "convert_sft_data_for_olmocore.py")],
)
def test_one_command_of_the_page_alone_says_which_one_is_needed_too(
    tmp_path: Path, part: int, lacks: str, script: str
) -> None:
    data, _, training = PAGE.partition("BASE_CKPT")
    with pytest.raises(SftError, match=rf"{lacks}.*; next: add the command of {script} to the file"):
        convert(tmp_path, "page.sh", (data, "BASE_CKPT" + training)[part])


OPEN_INSTRUCT = """
accelerate launch --mixed_precision bf16 --num_processes 8 --use_deepspeed open_instruct/finetune.py \\
    --model_name_or_path meta-llama/Llama-3.1-8B --max_seq_length 4096 --per_device_train_batch_size 1 \\
    --gradient_accumulation_steps 16 --learning_rate 5e-06 --num_train_epochs 2 --with_tracking --seed 123 \\
    --dataset_mixer_list allenai/tulu-3-sft-mixture 100 --checkpointing_steps epoch
"""


def test_a_command_of_open_instruct(tmp_path: Path) -> None:
    imported = convert(tmp_path, "tulu.sh", OPEN_INSTRUCT)
    check_ends(imported.config)
    found = fields(imported)
    assert found["train"]["global_batch_tokens"] == 16 * 8 * 4096
    assert (found["train"]["lr"], found["train"]["warmup_fraction"], found["train"]["data_seed"]) == (5e-6, 0.03, 123)
    assert found["prepare"]["sources"] == [{"path": "hf://allenai/tulu-3-sft-mixture", "weight": 100}]
    assert "checkpointing_steps" in imported.config.left


AUTOMODEL_YAML = """
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 8, local_batch_size: 1, max_steps: 200, ckpt_every_steps: 50, val_every_steps: 25}
model: {_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: allenai/x, torch_dtype: bfloat16}
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, match_all_linear: true, dim: 16, exclude_modules: ["*lm_head*"]}
optimizer: {_target_: torch.optim.AdamW, lr: 1.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.0}
lr_scheduler: {lr_decay_style: cosine, lr_warmup_steps: 20, min_lr: 1.0e-5}
packed_sequence: {packed_sequence_size: 2048}
loss_fn: {_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}
dataset:
  _target_: nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset
  path_or_dataset_id: data/train.jsonl
  column_mapping: {question: q, answer: a}
"""


def test_a_configuration_of_automodel(tmp_path: Path) -> None:
    imported = convert(tmp_path, "nemo.yaml", AUTOMODEL_YAML)
    check_ends(imported.config)
    train = fields(imported)["train"]
    assert (train["global_batch_tokens"], train["steps"], train["seq_len"]) == (8 * 2048, 200, 2048)
    assert (train["warmup_fraction"], train["final_lr_fraction"], train["betas"]) == (
        0.1,
        pytest.approx(0.1),
        [0.9, 0.95],
    )
    assert (train["method"], train["lora_rank"], train["save_every"], train["validate_every"]) == ("lora", 16, 50, 25)
    assert fields(imported)["prepare"]["sources"] == [
        {"path": "data/train.jsonl", "columns": {"prompt": "q", "completion": "a"}}
    ]
    assert set(imported.config.left) == {"peft.exclude_modules"}


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (REPO / "docs" / "import-config.md").read_text()
    (theirs,), (ours,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "toml"))
    imported = convert(tmp_path, "example.yml", theirs)
    assert imported.text.partition("\n\n")[2] == ours
    assert list(imported.config.left) == ["warmup_steps"]


BASE = "base_model: a/b\ndatasets: [{path: c/d, type: chat_template}]\nsequence_len: 1024\nlearning_rate: 1e-4\n"


@pytest.mark.parametrize(
    ("more", "field", "value"),
    [
        ("warmup_steps: 10\nmax_steps: 100", "warmup_fraction", 0.1),
        ("lr_scheduler: constant_with_warmup", "schedule", "constant"),
        ("optimizer: adamw_bnb_8bit", "optimizer", "adamw8bit"),
        ("bf16: false", "precision", "fp32"),
        ("adapter: lora\nlora_target_modules: [q_proj, v_proj]", "lora_targets", ["attention.w_q", "attention.w_v"]),
        ("save_steps: 0.1\nmax_steps: 50", "save_every", 5),
        ("micro_batch_size: 3", "global_batch_tokens", 3072),
    ],
)
def test_values_are_worked_out(tmp_path: Path, more: str, field: str, value: Any) -> None:
    imported = convert(tmp_path, "a.yml", BASE + more)
    check_ends(imported.config)
    assert fields(imported)["train"][field] == value


@pytest.mark.parametrize(
    ("more", "key", "reason"),
    [
        ("warmup_steps: 10", "warmup_steps", "make steps prints"),
        ("lr_scheduler: one_cycle", "lr_scheduler", "not one_cycle"),
        ("optimizer: muon", "optimizer", "not muon"),
        ("sample_packing: false", "sample_packing", "always packed"),
        ("no_such_option: 7", "no_such_option", "no such field"),
        ("unfrozen_parameters: [lm_head]", "unfrozen_parameters", "train_only"),
        ("save_steps: 0.1", "save_steps", "not a fraction"),
        ("lora_dropout: 2\nadapter: lora", "lora_dropout", "at most"),
        ("dataset_processes: 4\nfp16: true", "fp16", "bf16 or fp32"),
        ("shuffle_merged_datasets: false", "shuffle_merged_datasets", "no such field"),
    ],
)
def test_what_has_no_counterpart_is_listed_with_its_reason(tmp_path: Path, more: str, key: str, reason: str) -> None:
    config = convert(tmp_path, "a.yml", BASE + more).config
    check_ends(config)
    assert reason in config.left[key]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yml", "rl: dpo\n" + BASE, "supervised finetuning only"),
        ("a.yml", "a: [", "not valid YAML"),
        ("a.json", "{", "not valid JSON"),
        ("a.yml", "lr: 1", "TRAINER="),
        ("a.yml", "base_model: a/b", "no dataset"),
        ("a.sh", "echo hello", "no command of a known training program"),
        ("a.sh", PAGE + OPEN_INSTRUCT, "training commands are in it"),
        ("a.yml", BASE + "adapter: lora\ntokens: ['<x>']\nval_set_size: 0.9", ""),
    ],
)
def test_what_gives_no_recipe_is_an_error(tmp_path: Path, name: str, text: str, said: str) -> None:
    if not said:  # values that a field cannot have are left out, and the recipe is valid
        assert {"tokens", "val_set_size"} <= convert(tmp_path, name, text).config.left.keys()
        return
    with pytest.raises(SftError, match=said):
        convert(tmp_path, name, text)


def test_the_program_writes_the_recipe_once_and_lists_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(importer, "REPO", tmp_path)
    file = tmp_path / "My_Exp.yml"
    file.write_text(BASE + "no_such_option: 7\n")
    assert importer.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "recipes/my-exp.toml: of 6 keys, in the recipe: 5; need nothing here: 0; not carried over: 1"
    )
    assert all(key in text for key in importer.convert(file).config.values)
    loaded = recipe.load(tmp_path / "recipes" / "my-exp.toml")
    assert dataclasses.asdict(loaded)["train"]["lr"] == 1e-4
    with pytest.raises(SystemExit, match="exists already"):
        importer.main([str(file)])
