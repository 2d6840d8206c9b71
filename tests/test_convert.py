"""sft.export.convert and sft.export.gate: what is published loads, computes the same and stops; what is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_export
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.export import chats, convert, gate, write
from sft.formats.dataset import TokenIds
from sft.formats.gate import GateRecord
from sft.model import hf
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Convert
from tiny_export import LLAMA3, OLMO2, OLMO3, QWEN3


def quiet(_: str) -> None:
    pass


def export(
    tmp: Path, config: ModelConfig, options: Convert | None = None, weights: Any = None
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any], Convert]:
    options = options or Convert(max_position_embeddings=4096)
    facts = tiny_export.tokenizer(tmp / "tokenizer")
    weights = tiny_export.Held(tiny_export.weights(config) if weights is None else weights)
    trained = write.Trained(weights, config, facts, tmp / "tokenizer")
    write.export(trained, tiny_export.TEMPLATE, options, tmp / "model", quiet)
    return tmp / "model", weights, facts, options


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(OLMO2, "bfloat16"), (OLMO3, "bfloat16"), (OLMO3, "float32"), (QWEN3, "float32"), (LLAMA3, "bfloat16")],
    ids=["olmo2", "olmo3", "olmo3 fp32", "qwen3, tied, fp32", "llama3"],
)
def test_an_export_passes_its_gate_and_loads(tmp_path: Path, config: ModelConfig, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, weights, facts, options = export(tmp_path, config, Convert(dtype=dtype, max_position_embeddings=4096))
    report = gate.check(folder, weights, config, facts, tiny_export.TEMPLATE, options, quiet)
    assert report.tensors.count == len(weights)
    assert report.logits.documents[0] > config.window
    assert report.logits.max_difference < 1e-4 * report.logits.max_logit
    assert (report.logits.rounding_kl == 0) == (dtype == "float32")
    assert report.tokenizer.stop_ids == (2, 0)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.config.vocab_size == facts.vocab_size == model.lm_head.weight.shape[0] < config.vocab_size
    assert model.config.max_position_embeddings == 4096
    assert model.generation_config.eos_token_id == [2, 0]
    assert torch.equal(model.lm_head.weight, weights[hf.head_name(config)][: facts.vocab_size].to(model.dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_export.TEMPLATE
    assert report.chats
    for chat in report.chats:
        prompt = tokenizer(chat.prompt, add_special_tokens=False, return_tensors="pt")
        reply = model.generate(**prompt, max_new_tokens=chats.REPLY_TOKENS)[0, prompt["input_ids"].shape[1] :]
        if dtype == "float32":  # in bfloat16 a batch rounds otherwise than a row alone
            assert tokenizer.decode(reply, skip_special_tokens=True) == chat.reply
            assert (reply[-1].item() in (2, 0)) == chat.stopped
    report.write(tmp_path / "gate.json")
    assert GateRecord.read(tmp_path / "gate.json") == report


def fitted(config: ModelConfig, folder: Path, terminator: bool) -> tiny_export.Held:
    """Weights after a few steps on the gate's own questions: answers end with the terminator, or say the same again."""
    from transformers import AutoTokenizer

    from sft.model.model import Transformer, initial_values

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, positions, labels, edges = [], [], [], [0]
    for question, answer in chats.CHATS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head, reply = (tokenizer.encode(text) for text in (prompt, answer + "<|im_end|>" if terminator else answer * 4))
        labels += [(len(ids) + len(head) - 1 + i, token) for i, token in enumerate(reply)]
        ids += head + reply
        positions += range(len(head + reply))
        edges.append(len(ids))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(config)
        for name, value in initial_values(model, 0.1, 0):
            model.get_parameter(name).data.copy_(value)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        rows, wanted = (torch.tensor(column) for column in zip(*labels, strict=True))
        for _ in range(80):
            loss, _ = model(torch.tensor(ids), torch.tensor(positions), torch.tensor(edges, dtype=torch.int32),
                            max(positions) + 1, rows, wanted, float(len(rows)))  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05
    return tiny_export.Held({name: value.detach() for name, value in model.state_dict().items()})


@pytest.mark.seconds
@pytest.mark.parametrize("terminator", [True, False])
def test_a_model_that_was_trained_to_stop_stops_in_the_gate_and_another_is_reported(
    tmp_path: Path, terminator: bool
) -> None:
    tiny_export.tokenizer(tmp_path / "tokenizer")
    weights = fitted(OLMO2, tmp_path / "tokenizer", terminator)
    folder, _, facts, options = export(tmp_path, OLMO2, weights=weights)
    said: list[str] = []
    report = gate.check(folder, weights, OLMO2, facts, tiny_export.TEMPLATE, options, said.append)
    assert report.chats
    replies = [chat.reply for chat in report.chats]
    assert [chat.stopped for chat in report.chats] == [terminator] * 3
    assert report.summary.greedy_stopped == terminator
    assert (replies == [answer for _, answer in chats.CHATS]) == terminator
    assert any(f"{3 * terminator} of 3 greedy replies stop" in line for line in said)
    if terminator:  # the same model, whose generate() would run past its terminator
        data = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**data, "eos_token_id": 0}))
        with pytest.raises(SftError, match=r"eos_token_id: \[0\] does not include the trained terminator \[2\]"):
            gate.check(folder, weights, OLMO2, facts, tiny_export.TEMPLATE, options, quiet)


@pytest.mark.parametrize("config", [OLMO2, OLMO3, QWEN3, LLAMA3], ids=["olmo2", "olmo3", "qwen3, tied", "llama3"])
def test_transformers_writes_the_same_names_bits_and_configuration(tmp_path: Path, config: ModelConfig) -> None:
    """What vLLM and others load by name: save_pretrained of the same weights."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, weights, *_ = export(tmp_path, config, Convert(max_position_embeddings=9000))
    made = hf.hf_config(
        config, vocab_size=300, max_position_embeddings=9000, dtype="bfloat16", eos_token_id=0, pad_token_id=3
    )
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[hf.family(config).ours(name)][: len(parameter)])
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name].view(torch.int16), value.view(torch.int16))
    ours, theirs = (read_json(at / "config.json") for at in (folder, tmp_path / "theirs"))
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    # What else is there says the same again for readers of the older form, or nothing about the model.
    assert ours.keys() - theirs.keys() <= {"rope_theta", "rope_scaling"}


def test_files_are_byte_for_byte_those_transformers_would_read_in_any_sharding(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole, weights, *_ = export(tmp_path / "a", OLMO3)
    cut, *_ = export(tmp_path / "b", OLMO3, Convert(shard_gb=1e-4))
    files = sorted(p.name for p in cut.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one = load_file(whole / "model.safetensors")
    many = {k: v for name in files for k, v in load_file(cut / name).items()}
    assert one.keys() == many.keys() == {hf.family(OLMO3).theirs(name) for name in weights}
    assert all(torch.equal(one[k], many[k]) for k in one)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in one.values())


def test_the_fast_gate_says_that_it_took_four_layers(tmp_path: Path) -> None:
    folder, weights, facts, options = export(tmp_path, OLMO3, Convert(gate="fast"))
    report = gate.check(folder, weights, OLMO3, facts, tiny_export.TEMPLATE, options, quiet)
    assert report.summary.layers == 4 and report.summary.greedy_stopped is None
    assert report.summary.rounding_kl is None


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 40), ("rms_norm_eps", 1e-3), ("rope", "theta"), ("rope", "yarn on all layers")],
)
def test_a_config_that_computes_something_else_is_caught_by_the_logits(tmp_path: Path, field: str, value: Any) -> None:
    folder, weights, facts, options = export(tmp_path, OLMO3)
    data = json.loads((folder / "config.json").read_text())
    if field == "rope":
        rope = data["rope_parameters"]
        rope["sliding_attention"] = dict(rope["full_attention"])
        if value == "theta":
            rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 5e5}
    else:
        data[field] = value
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(SftError, match="logits differ"):
        gate.check(folder, weights, OLMO3, facts, tiny_export.TEMPLATE, options, quiet)


def test_a_flipped_bit_in_the_export_is_caught(tmp_path: Path) -> None:
    folder, weights, facts, options = export(tmp_path, OLMO3)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(SftError, match=r"lm_head.w_out.weight: not the checkpoint's values"):
        gate.check(folder, weights, OLMO3, facts, tiny_export.TEMPLATE, options, quiet)


def test_not_a_number_in_the_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    weights = tiny_export.weights(OLMO3)
    weights["blocks.1.feed_forward.w2.weight"][3, 5] = float("nan")
    with pytest.raises(SftError, match=r"blocks\.1\.feed_forward\.w2\.weight: NaN or infinity.*diverged"):
        export(tmp_path, OLMO3, weights=weights)


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights = tiny_export.weights(OLMO2)
    weights["blocks.0.attention.w_q.weight"][0, 0] = 1e6
    with pytest.raises(SftError, match="too large for float16; next: export as bfloat16"):
        export(tmp_path, OLMO2, Convert(dtype="float16"), weights)


def test_a_missing_an_extra_and_a_misshapen_tensor_are_refused(tmp_path: Path) -> None:
    weights = tiny_export.weights(OLMO3)
    norm = weights.pop("blocks.2.attention.k_norm.weight")
    with pytest.raises(SftError, match=r"1 of \d+ tensors missing, the first is blocks.2.attention.k_norm.weight"):
        export(tmp_path / "a", OLMO3, weights=weights)
    with pytest.raises(SftError, match="does not have, the first is bias"):
        export(tmp_path / "b", OLMO3, weights={**weights, "blocks.2.attention.k_norm.weight": norm, "bias": norm})
    with pytest.raises(SftError, match=r"k_norm.weight: shape \(8,\), expected \(32,\)"):
        export(tmp_path / "c", OLMO3, weights={**weights, "blocks.2.attention.k_norm.weight": norm[:8]})


def test_another_tokenizer_than_the_trained_one_is_refused(tmp_path: Path) -> None:
    facts = tiny_export.tokenizer(tmp_path / "tokenizer")
    tiny_export.tokenizer(tmp_path / "tokenizer", size=290)
    trained = write.Trained(tiny_export.weights(OLMO2), OLMO2, facts, tmp_path / "tokenizer")
    with pytest.raises(SftError, match=r"tokenizer.json: sha256 .* not what the model was trained with"):
        write.export(trained, tiny_export.TEMPLATE, Convert(), tmp_path / "model", quiet)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("generation_config.json", {"eos_token_id": 0}, r"does not include the trained terminator \[2\]"),
        ("config.json", {"pad_token_id": 1}, "pad_id: 1, dataset.json has 3"),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, "eos_token has id 2, dataset.json has 0"),
    ],
)
def test_special_tokens_that_disagree_with_training_are_refused(
    tmp_path: Path, file: str, edit: dict[str, Any], message: str
) -> None:
    folder, weights, facts, options = export(tmp_path, OLMO2)
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **edit}))
    with pytest.raises(SftError, match=message):
        gate.check(folder, weights, OLMO2, facts, tiny_export.TEMPLATE, options, quiet)


def test_a_pretokenizer_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    folder, _, facts, _ = export(tmp_path, OLMO2)
    facts = replace(facts, tokenizer=replace(facts.tokenizer, canaries={"Paris": (1, 2, 3)}))
    with pytest.raises(SftError, match=r"'Paris' as .* the pre-tokenizers differ"):
        gate.check_exported_tokenizer(folder, facts)


@pytest.mark.parametrize(
    ("field", "value"), [("d_model", 256), ("n_layers", 8), ("window", 32), ("norm_eps", 1e-5), ("rope_theta", 1e4)]
)
def test_the_checkpoints_own_architecture_must_agree_with_the_recipe(tmp_path: Path, field: str, value: Any) -> None:
    from sft.checkpoint.olmo_core import step_config
    from sft.recipe.resolve import resolve
    from sft.recipe.schema import Model

    trained = resolve(Model(preset="olmo3-tiny"), 300)
    for config in (trained, replace(trained, **{field: value})):
        (tmp_path / "config.json").write_text(json.dumps(step_config(config, TokenIds())))
        if config == trained:
            assert convert.trained_config(Model(preset="olmo3-tiny"), 300, tmp_path) == trained
    with pytest.raises(SftError, match=rf"config.json: the recipe's(.|\n)*\n{field} +\S+ +\S+\nnext: make train"):
        convert.trained_config(Model(preset="olmo3-tiny"), 300, tmp_path)


def test_the_export_equals_that_of_olmo_core(tmp_path: Path) -> None:
    pytest.importorskip("olmo_core")
    from olmo_core.nn.hf.convert import convert_state_to_hf

    config = replace(OLMO3, rope_scaling=None)
    folder, weights, *_ = export(tmp_path, config, Convert(dtype="float32"))
    made = HfFolder(folder)
    theirs = convert_state_to_hf(
        hf.hf_config(config, vocab_size=384, max_position_embeddings=64, dtype="float32"), weights
    )
    assert theirs.keys() == {made.family.theirs(name) for name in made}
    for name, tensor in theirs.items():
        found = made[made.family.ours(name)]
        assert torch.equal(found, tensor[: found.shape[0]])
