"""Weights of bases, added tokens and adapters: what is read, what is refused and with which words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bases
import tiny_export
from bases import read
from sft.checkpoint import olmo_core
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.formats.dataset import TokenIds
from sft.model.model import Transformer
from sft.recipe import schema
from sft.recipe.architecture import LongRope, ModelConfig
from sft.recipe.base_config import BaseFacts, read_base
from sft.recipe.inputs import TOKENIZER_FILES
from sft.recipe.presets import PRESETS
from sft.recipe.resolve import resolve
from sft.sync import base_check
from sft.training import initial_weights

# --- weights ------------------------------------------------------------------------------------------------------


def saved(folder: Path, change: Any = None, file: str = "model.safetensors") -> tuple[Path, dict[str, torch.Tensor]]:
    """A base whose tensors were changed, and its tensors before."""
    from safetensors.torch import load_file, save_file

    bases.write(folder, "llama2")
    tensors = load_file(folder / "model.safetensors")
    changed = change(dict(tensors)) if change else tensors
    (folder / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(changed, folder / file)
    else:
        save_file(changed, folder / file)
    return folder, tensors


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(4)},
         "4 tensors ignored: rotary frequencies"),
        (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "without the prefix _orig_mod."),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, "without the prefix module."),
        (lambda t: {k.removeprefix("model."): v for k, v in t.items()}, "with the prefix model."),
        (lambda t: {f"model.{k}": v for k, v in t.items()}, "under another prefix"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors"])
def test_weights_are_read_in_their_forms_and_that_is_reported(
    tmp_path: Path, change: Any, note: str, file: str
) -> None:
    folder, wanted = saved(tmp_path, change, file)
    weights = HfFolder(folder)
    assert any(note in line for line in weights.notes), weights.notes
    assert all(torch.equal(weights[weights.family.ours(name)], value) for name, value in wanted.items())
    assert len(weights) == len(wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype_is_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, wanted = saved(tmp_path, lambda t: {k: v.to(dtype) for k, v in t.items()})
    weights = HfFolder(folder)
    for name, value in wanted.items():
        assert torch.equal(weights[weights.family.ours(name)].float(), value.to(dtype).float())


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 1.5})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    base = read_base(folder)
    assert base
    with pytest.raises(
        SftError, match=r"tie_word_embeddings: True, but lm_head.weight is not model.embed_tokens.weight"
    ):
        HfFolder(folder).check(base.config)


def test_numbers_of_a_bin_file_that_are_not_floats_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(
        tmp_path, lambda t: t | {"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "pytorch_model.bin"
    )
    with pytest.raises(
        SftError, match=r"model.norm.weight: dtype int8, packed or quantised weights, expected one of BF16"
    ):
        HfFolder(folder)


def test_a_file_without_an_output_matrix_says_what_ties_it(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    base = read_base(folder)
    assert base
    with pytest.raises(SftError, match=r"tie_word_embeddings: False, but no file has lm_head.weight; next: set tie"):
        HfFolder(folder).check(base.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"score.weight": torch.ones(2)}, "tensor score.weight: not a parameter of llama"),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)},
            "weight_scale_inv: belongs to quantised weights, which are not supported",
        ),
        (lambda t: t | {"_orig_mod.lm_head.weight": torch.ones(2)}, "are both lm_head.weight"),
        (
            lambda t: t | {"model.norm.weight": torch.ones(48, dtype=torch.int32)},
            "dtype I32, packed or quantised weights",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(SftError, match=message):
        HfFolder(saved(tmp_path, change)[0])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("should-not-exist"),))


def test_a_pickle_with_code_in_it_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SftError, match=r"pytorch_model.bin: not readable by torch's restricted unpickler"):
        HfFolder(folder)
    assert not Path("should-not-exist").exists()


def test_a_folder_without_weights_says_what_it_has_instead(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.gguf")
    with pytest.raises(SftError, match=r"no model.safetensors or pytorch_model.bin, but weights.gguf"):
        HfFolder(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SftError, match="a PEFT adapter, not a model"):
        HfFolder(folder)
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(
        SftError, match=r"a PEFT adapter.*if the adapter is already merged.* remove adapter_config.json"
    ):
        HfFolder(folder)  # transformers would read the adapter's base
    (folder / "adapter_config.json").unlink()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(POINTER)
        with pytest.raises(SftError, match=rf"{name}: a git-lfs pointer, not the file; next: git lfs pull"):
            HfFolder(folder)


def test_of_several_sets_of_weights_transformers_set_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, tensors = saved(tmp_path)
    shard, name = "model-00001-of-00001.safetensors", "model.norm.weight"
    for file in (shard, "consolidated.safetensors"):
        save_file({key: 2 * value for key, value in tensors.items()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    weights = HfFolder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(weights[weights.family.ours(name)], theirs)
    assert weights.notes == [
        f"model.safetensors.index.json, consolidated.safetensors, {shard} ignored: the weights are read from model.safetensors"
    ]


@pytest.mark.parametrize(
    ("change", "word"), [(lambda t: t.to_sparse(), "sparse"), (lambda t: t.to("meta"), "without values")]
)
def test_tensors_that_have_no_rows_to_read_are_refused(tmp_path: Path, change: Any, word: str) -> None:
    folder, _ = saved(tmp_path, lambda t: t | {"lm_head.weight": change(t["lm_head.weight"])}, "pytorch_model.bin")
    with pytest.raises(SftError, match=rf"pytorch_model.bin: tensor lm_head.weight: {word}"):
        HfFolder(folder)


def test_rows_of_new_tokens_are_the_mean_with_a_little_noise_and_padding_is_zero(tmp_path: Path) -> None:
    folder, tensors = saved(tmp_path)
    base = read_base(folder)
    assert base
    config = resolve(schema.Model(base="b"), bases.ROWS + 6, base)
    said: list[str] = []
    models = [Transformer(config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initial_weights.initialise(model, config, folder, seed, bases.ROWS + 6, said.append)
    first, again, other = (m.state_dict() for m in models)
    for name, theirs in (
        ("embeddings.weight", "model.embed_tokens.weight"),
        ("lm_head.w_out.weight", "lm_head.weight"),
    ):
        table = tensors[theirs]
        new, padding = first[name][bases.ROWS : bases.ROWS + 6], first[name][bases.ROWS + 6 :]
        distance = (new - table.mean(0)).std() / table.std()
        assert 0.1 < distance < 0.3 and not padding.any()
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
        assert torch.equal(first[name][: bases.ROWS], table)
        assert any(f"{name}: rows 96 to 101 are new" in line for line in said)
    assert not torch.equal(first["embeddings.weight"][96], first["embeddings.weight"][97])


def test_facts_of_a_hugging_face_base_reach_a_run_that_starts_from_its_step(tmp_path: Path) -> None:
    described = olmo_core.step_config(read().config, TokenIds(), BaseFacts(100, 256, 1, False))
    (tmp_path / "config.json").write_text(json.dumps(described))
    found = read_base(tmp_path)
    assert found and found.facts == BaseFacts(100, 256, 1, False)


def test_a_model_config_survives_json() -> None:
    long = LongRope((1.0, 2.0), (3.0, 4.0), 64, 1.1)
    for config in (*PRESETS.values(), ModelConfig(2, 8, 2, 1, 4, 8, 9, rope_scaling=long, rope_layers=(True, False))):
        assert ModelConfig.from_value(json.loads(json.dumps(config.to_value()))) == config


# --- added tokens -------------------------------------------------------------------------------------------------


def test_added_tokens_are_ids_of_tokenizer_and_table(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from sft.chat.added_tokens import add_tokens, with_tokens

    facts = tiny_export.tokenizer(tmp_path / "tokenizer")
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    made = add_tokens(tmp_path / "tokenizer", ("<|tool|>", "<|end tool|>"), TOKENIZER_FILES, tmp_path / "cache")
    assert made == add_tokens(tmp_path / "tokenizer", ("<|tool|>", "<|end tool|>"), TOKENIZER_FILES, tmp_path / "cache")
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before
    assert (made / "tokenizer.json").read_bytes() == with_tokens(before, ("<|tool|>", "<|end tool|>"), "x")[0]
    found = AutoTokenizer.from_pretrained(made)
    first = facts.vocab_size
    assert len(found) == first + 2
    assert found.encode("Paris<|tool|>42<|end tool|>", add_special_tokens=False)[-1] == first + 1
    assert found.decode([first, 5], skip_special_tokens=True) == found.decode([5])
    with pytest.raises(SftError, match=r"add_tokens: '<\|pad\|>' is a token already, id 3"):
        add_tokens(tmp_path / "tokenizer", ("<|pad|>",), TOKENIZER_FILES, tmp_path / "cache")
    with pytest.raises(SftError, match="every token once, and none empty"):
        add_tokens(tmp_path / "tokenizer", ("a new one", "a new one"), TOKENIZER_FILES, tmp_path / "cache")


def test_rows_of_added_tokens_are_new_also_where_the_bases_table_is_padded(tmp_path: Path) -> None:
    folder, tensors = saved(tmp_path)
    base = read_base(folder)
    assert base
    config = resolve(schema.Model(base="b"), bases.ROWS - 4, base)
    model = Transformer(config)
    initial_weights.initialise(model, config, folder, 0, bases.ROWS - 4, print, added=2)
    table, found = tensors["model.embed_tokens.weight"], model.embeddings.weight
    same = [torch.equal(a, b) for a, b in zip(found, table, strict=False)]
    assert same == [True] * (bases.ROWS - 6) + [False] * 2 + [True] * 4
    assert (found[bases.ROWS - 6] - table[: bases.ROWS - 6].mean(0)).std() < 0.3 * table.std()


def test_the_bases_tokenizer_with_the_added_tokens_is_the_datas(tmp_path: Path) -> None:

    from sft.chat.added_tokens import add_tokens

    facts = tiny_export.tokenizer(tmp_path / "base")
    made = add_tokens(tmp_path / "base", ("<|tool|>",), TOKENIZER_FILES, tmp_path / "cache")
    theirs = replace(facts, tokenizer=replace(facts.tokenizer, sha256=tiny_export.sha256(made / "tokenizer.json")))
    assert base_check.check_base_tokenizer(tmp_path, theirs, tmp_path / "base", added=("<|tool|>",)) == ""
    with pytest.raises(SftError, match=r"the data were made with tokenizer.json sha256"):
        base_check.check_base_tokenizer(tmp_path, theirs, tmp_path / "base", added=("<|other|>",))


# --- adapters -----------------------------------------------------------------------------------------------------

LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


def lora(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    """Writes an adapter of two matrices, as PEFT names them; returns what it adds by our names, without the scale."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (48, 48, "attention.w_q"), "mlp.down_proj": (48, 80, "feed_forward.w2")}
    stored, added = {}, {}
    for theirs, (rows, columns, ours) in shapes.items():
        a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        stored |= {f"base_model.model.model.layers.1.{theirs}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
        added[f"blocks.1.{ours}.weight"] = b @ a
    save_file(stored if tensors is None else tensors, folder / "adapter_model.safetensors")
    return added


def test_an_adapter_is_merged_into_a_step_on_request(tmp_path: Path) -> None:
    from sft.checkpoint.dcp_reader import DcpReader
    from sft.export.olmo_core_steps import to_core

    folder, _ = saved(tmp_path / "base")
    added = lora(tmp_path / "lora", use_rslora=True)
    to_core(str(folder), str(tmp_path / "step0"), tmp_path / "cache", lambda _: None, str(tmp_path / "lora"))
    made, base = DcpReader(tmp_path / "step0"), HfFolder(folder)
    for name in base:
        wanted = base[name] + 6 / 2**0.5 * added[name] if name in added else base[name]
        torch.testing.assert_close(made[name][: len(wanted)], wanted, atol=1e-6, rtol=1e-6)
    found = read_base(tmp_path / "step0")
    assert found and found.facts.rows == bases.ROWS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3', expected 'LORA'"),
        ({"use_dora": True}, r"use_dora: True, only False is supported\nnext: merge it with PEFT's merge_and_unload"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa', only True is supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 0}, "r: 0, expected a whole number"),
        ({"tensors": {"base_model.model.lm_head.weight": torch.ones(2, 2)}}, "lm_head.weight: not LoRA of a matrix"),
        ({"tensors": {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.ones(2, 48)}},
         "attention.w_q.weight: LoRA of"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from sft.checkpoint.adapter import Merged

    folder, _ = saved(tmp_path / "base")
    lora(tmp_path / "lora", **changes)
    with pytest.raises(SftError, match=message):
        Merged(HfFolder(folder), tmp_path / "lora")
