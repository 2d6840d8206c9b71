"""Configurations of bases: what is used, what is refused and with which words. Weights are in test_base_weights.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bases
import tiny_export
from bases import LLAMA, YARN, read
from sft.checkpoint import olmo_core
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.formats.dataset import TokenIds
from sft.recipe import recipe, schema
from sft.recipe.architecture import DynamicRope, LinearRope, Llama3Rope, Yarn
from sft.recipe.base_config import read_base, read_hf_config
from sft.recipe.presets import PRESETS
from sft.recipe.resolve import named_changes, resolve, supported_length
from sft.runner import bases as bases_of_runs


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearRope(2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, LinearRope(2.0)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, DynamicRope(2.0, 256)),
        ({"rope_scaling": YARN}, Yarn(4.0, old_context=64)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, Yarn(4.0, old_context=256)),
        ({"rope_scaling": YARN | {"attention_factor": Yarn(4.0).attention_factor}}, Yarn(4.0, old_context=64)),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, Yarn(4.0, old_context=64, attention=1.5)),
        ({"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
         Yarn(4.0, 16.0, 2.0, 64, truncate=False)),
        ({"rope_scaling": {**bases.LLAMA3}}, Llama3Rope(8.0, 1.0, 4.0, 64)),
        ({"rope_scaling": {**YARN}, "original_max_position_embeddings": 32}, Yarn(4.0, old_context=32)),
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"rope_type": "default"}}, None),
    ],
)  # fmt: skip
def test_rotary_scaling_is_read_in_its_forms(changes: dict[str, Any], wanted: object) -> None:
    assert read(**changes).config.rope_scaling == wanted


def test_mscale_of_both_kinds_gives_the_attention_factor_that_transformers_computes() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = YARN | {"mscale": 0.8, "mscale_all_dim": 1.2}
    found = read(rope_scaling=dict(scaling)).config.rope_scaling
    assert isinstance(found, Yarn)
    theirs = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, rope_scaling=dict(scaling))
    assert found.attention_factor == pytest.approx(ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ({"logit_scale": 0.0625}, "logit_scale: 0.0625, only 1 is supported"),
        ({"logits_scaling": 8.0}, "logits_scaling: 8.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier: 0.2"),
        ({"clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu', only 'silu' is supported"),
        ({"sliding_window": 128}, "sliding_window: 128"),
        ({"never_heard_of": 3}, "never_heard_of: 3, not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: 'gptq', expected unquantised"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"rope_theta": None}, "rope_theta: None, expected a number above 0"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_type: 'su', expected default, linear"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "type: 'linear', expected the same as rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: no field 'factor'"),
        ({"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, "rope_scaling: no field 'factor'"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters: rope_theta: None, expected a number above 0"),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim: None, expected a value: transformers refuses null"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, "partial_rotary_factor: 0.01, expected a share of the 16 dim"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5, expected a share of the 16 dim"),
        ({"model_type": "olmo3", "sliding_window": None}, "sliding_window: None, expected a window"),
        ({"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 4, "layer_types": ["sliding_attention"] * 2,
          "sliding_window": 8, "use_sliding_window": False}, "use_sliding_window: False, expected a window"),
        ({"model_type": "qwen3", "layer_types": [["full_attention"]] * 2}, "layer_types: .*expected 2 of full"),
        ({"model_type": "olmo_hybrid", "layer_types": [["full_attention"]] * 2}, "layer_types: .*expected 2 of full"),
        ({"model_type": ["llama"]}, "model_type: .*expected one of olmo2"),
        ({"architectures": 5}, "architectures: 5, expected a list with LlamaForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures: .*expected a list with"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
         "type: 'su', expected 'longrope'"),
        ({"max_position_embeddings": 1e30}, "max_position_embeddings: 1e.30, expected a whole number: transformers refuses"),
        ({"bos_token_id": [1, 2]}, r"bos_token_id: \[1, 2\], expected one id, or null"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "rope_scaling: finetuned: True"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "expected the same as rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "expected one value, not"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: .*predicts the next token"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3, expected a divisor of num_attention_heads, 4"),
        ({"hidden_size": "64"}, "hidden_size: '64', expected a whole number"),
        ({"vocab_size": None}, "no field 'vocab_size'"),
        ({"model_type": "gpt2"}, "model_type: 'gpt2', expected one of olmo2"),
        ({"model_type": "qwen2", "attention_bias": False}, "attention_bias: False, expected True"),
        ({"model_type": "olmo3", "rope_scaling": None, "rope_theta": 8e6}, "rope_theta: 8000000.0, expected 500000.0"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 2}, "layer_types: .*linear_attention"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SftError, match=f"base/config.json: .*{message}"):
        read(**changes)


def test_keys_that_say_nothing_are_ignored_by_name_and_others_only_by_the_recipe() -> None:
    harmless = {"use_cache": False, "torch_dtype": "bfloat16", "pretraining_tp": 1, "is_llama_config": True,
                "rope_interleaved": False, "auto_map": {"AutoConfig": "x.Y"}, "logit_scale": 1.0, "some_note": None}  # fmt: skip
    assert read(**harmless).config == read().config
    with pytest.raises(SftError, match=r'ignore_config = \["some_note", "other"\]'):
        read(some_note="text", other=1)
    assert read_hf_config(LLAMA | {"some_note": "text"}, "x", ignore=["some_note"]).config == read().config


def core(**changes: Any) -> dict[str, Any]:
    described = olmo_core.step_config(PRESETS["qwen3-0.6b"], TokenIds())
    model = described["model"]
    for path, value in changes.items():
        *parts, last = path.split("__")
        at = model
        for part in parts:
            at = at[part]
        at[last] = value
    return described


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"tie_word_embeddings": False}, "tied", False),
        ({"block__layer_norm__eps": 1e-5, "lm_head__layer_norm__eps": 1e-5, "block__sequence_mixer__qk_norm__eps": 1e-5},
         "norm_eps", 1e-5),
        ({"block__sequence_mixer__rope__scaling": {"_CLASS_": "olmo_core.nn.rope.PIRoPEScalingConfig", "factor": 3.0}},
         "rope_scaling", LinearRope(3.0)),
        ({"block__sequence_mixer__rope__scaling": {"_CLASS_": "olmo_core.nn.rope.ABFRoPEScalingConfig", "new_theta": 8_000_000}},
         "rope_theta", 8e6),
        ({"block__sequence_mixer__rope__scaling": {"_CLASS_": "a.YaRNRoPEScalingConfig", "factor": 2.0, "beta_fast": 16,
                                                  "beta_slow": 2, "old_context_len": 512}},
         "rope_scaling", Yarn(2.0, 16.0, 2.0, 512)),
        ({"block__sequence_mixer__rope__scaling": {"_CLASS_": "a.StepwiseRoPEScalingConfig"}},
         "rope_scaling", Llama3Rope(32.0, 1.0, 4.0, 8192)),
    ],
)  # fmt: skip
def test_an_olmo_core_base_is_read_whole(tmp_path: Path, changes: dict[str, Any], field: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(core(**changes)))
    found = read_base(tmp_path)
    assert found and getattr(found.config, field) == value
    message = rf"the recipe's \[model\] is not the base's(.|\n)*{field} +"
    with pytest.raises(SftError, match=message):
        resolve(schema.Model(preset="qwen3-0.6b", base="x"), 0, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block__sequence_mixer__clip_qkv": 8.0}, "layer 0: sequence_mixer: clip_qkv: 8.0"),
        ({"block__sequence_mixer__gate": {"granularity": "headwise"}}, "layer 0: sequence_mixer: gate"),
        ({"block__name": "peri_norm"}, "name: 'peri_norm'"),
        ({"embed_scale": 2.0}, "embed_scale: 2.0"),
        ({"lm_head__bias": True}, "bias: True"),
        ({"block__layer_norm__eps": 1e-3}, "qk_norm: eps"),
        ({"block__feed_forward__activation": "gelu"}, "activation"),
        ({"block__sequence_mixer__rope__scaling": {"_CLASS_": "a.PIRoPEScalingConfig", "attention_rescale_factor": 1.2}},
         "attention_rescale_factor: 1.2"),
        ({"block__sequence_mixer__future": 1}, "layer 0: sequence_mixer: future: 1"),
    ],
)  # fmt: skip
def test_what_an_olmo_core_base_has_beyond_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(core(**changes)))
    with pytest.raises(SftError, match=message):
        read_base(tmp_path)


HYBRID: dict[str, Any] = {
    "model_type": "olmo_hybrid", "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 30, "vocab_size": 100352, "max_position_embeddings": 32768, "rope_parameters": None,
}  # fmt: skip


def test_the_recipe_says_whether_a_hybrid_has_positions_where_its_config_has_null() -> None:
    """Olmo-Hybrid-Think-SFT-7B has null, which transformers reads as a base of 10,000; it was trained without positions."""
    base = read_hf_config(HYBRID, "b/config.json")
    assert (
        read_hf_config(HYBRID | {"rope_theta": None}, "b/config.json") == base
    )  # versions of transformers differ here
    assert resolve(schema.Model(preset="olmo-hybrid-7b", base="b"), 0, base) == PRESETS["olmo-hybrid-7b"]
    rotated = resolve(schema.Model(base="b", rope_theta=1e4), 0, base)
    assert rotated.has_positions(3) and rotated.rope_theta == 1e4
    with pytest.raises(SftError, match=r"b/config.json: rope_parameters: null: .* next: .*\[model\] preset = "):
        resolve(schema.Model(base="b"), 0, base)
    for said in ({"rope_parameters": {"rope_theta": None}}, {"rope_theta": 1e4}):
        named = read_hf_config(HYBRID | said, "b/config.json")
        assert not named.positions_unsaid
        assert resolve(schema.Model(base="b"), 0, named).has_positions(3) == (said == {"rope_theta": 1e4})


def test_a_hybrid_without_positions_is_compared_as_the_recipe_says_it(tmp_path: Path) -> None:
    from sft.export.base_gate import check_base
    from sft.export.olmo_core_steps import to_core
    from sft.export.other_model import link

    facts = tiny_export.tokenizer(tmp_path / "tokenizer")
    bases.write(tmp_path / "b", "olmo hybrid")
    file = tmp_path / "b" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": None}))
    base = read_base(tmp_path / "b")
    assert base is not None and base.positions_unsaid
    said = replace(base, config=replace(base.config, rope_layers=(False,), rope_theta=500_000.0))
    for found in (base, said):  # either is right, if it is what the weights were trained with
        HfFolder(tmp_path / "b").check(found.config)
        check_base(tmp_path / "b", found, [list(range(5, 90))])
    for action in (
        lambda: to_core(str(tmp_path / "b"), str(tmp_path / "step0"), tmp_path / "cache", print),
        lambda: link(tmp_path / "b", tmp_path / "tokenizer", facts, tmp_path / "out", ""),
    ):
        with pytest.raises(SftError, match=r'rope_parameters: null: .* in the file "rope_parameters"'):
            action()


# --- recipe and base ----------------------------------------------------------------------------------------------


def test_a_mismatch_is_a_table_of_field_base_recipe_and_what_to_write() -> None:
    model = schema.Model(preset="llama3.1-8b", base="b", rope_theta=1e4, hidden=96)
    with pytest.raises(SftError) as error:
        resolve(model, 0, read(rms_norm_eps=1e-6))
    lines = str(error.value).splitlines()
    assert lines[0] == "base/config.json: the recipe's [model] is not the base's architecture"
    assert lines[1].split("  ")[0] == "field" and lines[1].endswith("write in [model]")
    table = {line.split()[0]: line for line in lines[2:-1]}
    assert "rope_theta = 10000.0" in table["rope_theta"] and "rope_theta = 500000.0, or remove" in table["rope_theta"]
    assert "1e-05 (preset llama3.1-8b)" in table["norm_eps"] and "remove preset" in table["norm_eps"]
    assert 'rope_scaling = {rope_type = "llama3", factor = 8.0' in table["rope_scaling"]
    assert "intermediate_size" not in table and "init_std" not in table


def test_the_context_is_extended_by_name_and_that_is_reported() -> None:
    model = schema.Model(base="b", rope_scaling=dict(YARN))
    base = read()
    assert resolve(model, 0, base).rope_scaling == Yarn(4.0, old_context=64)
    assert ["rotary scaling changed by the recipe" in line for line in named_changes(model, base)] == [True]
    none = schema.Model(base="b", rope_scaling={"rope_type": "default"})
    assert resolve(none, 0, read(rope_scaling=YARN)).rope_scaling is None
    assert not named_changes(schema.Model(base="b"), base)
    with pytest.raises(SftError, match="rope_scaling and yarn_factor"):
        resolve(schema.Model(base="b", rope_scaling=dict(YARN), yarn_factor=2.0), 0, base)
    with pytest.raises(SftError, match=r"\[model\] rope_scaling: betafast: 3"):
        resolve(schema.Model(base="b", rope_scaling=YARN | {"betafast": 3}), 0, base)
    assert supported_length(resolve(model, 0, base), base.facts) == 256
    wide = schema.Model(base="b", rope_scaling=YARN | {"original_max_position_embeddings": 256})
    assert supported_length(resolve(wide, 0, base), base.facts) == 1024


@pytest.mark.parametrize(
    ("given", "model", "wanted"),
    [({}, schema.Model(base="b"), 256), (YARN | {"factor": 8.0}, schema.Model(base="b"), 256),
     ({}, schema.Model(base="b", rope_scaling=YARN | {"factor": 8.0}), 512),
     (YARN, schema.Model(base="b", rope_scaling=YARN | {"factor": 8.0}), 512)],
)  # fmt: skip
def test_an_export_has_the_bases_longest_input_unless_the_recipe_extends_it(
    given: dict[str, Any], model: schema.Model, wanted: int
) -> None:
    from sft.export.convert import with_length

    base = read(rope_scaling=given or None)
    config = resolve(model, 0, base)
    options, lines = with_length(schema.Convert(), config, base.facts, 1024, extended=model.names_scaling)
    assert options.max_position_embeddings == wanted and "less than the seq_len of training, 1,024" in lines[-1]


@pytest.mark.parametrize(
    ("rows", "ids", "asked", "wanted"),
    [(100, 0, None, 128), (100, 90, None, 128), (128, 130, None, 256), (100, 90, 640, 640)],
)
def test_the_embedding_has_a_row_for_every_id_and_every_row_of_the_base(
    rows: int, ids: int, asked: int | None, wanted: int
) -> None:
    assert resolve(schema.Model(base="b", vocab_size=asked), ids, read(vocab_size=rows)).vocab_size == wanted


def test_fewer_rows_than_the_base_has_are_refused() -> None:
    with pytest.raises(SftError, match=r"vocab_size +100 +vocab_size = 64 +vocab_size = 100, or remove it"):
        resolve(schema.Model(base="b", vocab_size=64), 0, read())


def test_a_recipe_needs_a_preset_or_a_base(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    rest = '[prepare]\ntokenizer = "t"\n[[prepare.sources]]\npath = "p.jsonl"\n[evaluate]\ntasks = ["t"]\n'
    file.write_text(f"[model]\n{rest}")
    with pytest.raises(SftError, match=r"'preset' in \[model\] is missing: random weights need one"):
        recipe.load(file)
    file.write_text(f'[model]\nbase = "b"\n{rest}')
    loaded = recipe.load(file)
    # Options that came later are not in the keys of recipes that do not use them.
    assert not {"rope_scaling", "ignore_config"} & set(loaded.config("train")["model"])
    file.write_text(f'[model]\nbase = "b"\nrope_scaling = {{rope_type = "linear", factor = 2.0}}\n{rest}')
    assert recipe.load(file).config("train")["model"]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_doctor_shows_base_and_preset_side_by_side(tmp_path: Path) -> None:
    from sft.launch.doctor import context, inputs
    from sft.runner import plan

    bases.write(tmp_path / "b", "olmo3")
    file = tmp_path / "x.toml"

    def rows(model: str) -> list[context.Row]:
        file.write_text(f'[model]\nbase = "b"\n{model}\n[prepare]\ntokenizer = "t"\n[[prepare.sources]]\npath = "p.jsonl"\n'
                        '[evaluate]\ntasks = ["t"]\n')  # fmt: skip
        place = plan.Place(tmp_path / "runs", (tmp_path,))
        return list(inputs.model(context.Context(place, recipe.load(file), schema.Cluster())))

    base, longer = rows("")
    assert base.state == "ok" and base.found.startswith(
        "base: 4 layers x 48; 4 heads (2 kv) x 12; MLP 80; 96 rows; norms after"
    )
    assert "window 16 on 3 layers" in base.found
    assert longer.state == "note" and "the base supports 512 tokens" in longer.found
    base, preset, red = rows('preset = "olmo3-tiny"')
    assert preset.found.startswith("preset olmo3-tiny: 4 layers x 128; 4 heads (2 kv) x 32")
    assert (
        red.state == "RED" and "norm_eps" in red.found and "d_model" in red.found and red.next.startswith("write what")
    )
    with pytest.raises(SftError, match=r"x.toml: .*is not the base's architecture"):
        bases_of_runs.check_base((tmp_path,), tmp_path / "runs" / "x", recipe.load(file))
