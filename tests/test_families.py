"""Bases of every family: read whole, computed as transformers' class computes them, exported as transformers writes them."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bases
import tiny_export
from sft.checkpoint import olmo_core
from sft.checkpoint.hf_folder import HfFolder, plain_names
from sft.export import gate, logits, write
from sft.formats.dataset import TokenIds
from sft.model.model import Transformer
from sft.recipe.base_config import Base, BaseFacts, find_family, read_base
from sft.recipe.families import FAMILIES
from sft.recipe.resolve import resolve
from sft.recipe.schema import Convert, Model

LENGTHS = (90, 33, 7)  # longer and shorter than the window (16) and the original context (64)


def read(folder: Path) -> Base:
    found = read_base(folder)
    assert found is not None
    return found


def ours(folder: Path, base: Base) -> Transformer:
    """Our model with a folder's weights."""
    weights = HfFolder(folder)
    weights.check(base.config)
    made = Transformer(base.config)
    made.load_state_dict({name: weights[name] for name, _ in made.named_parameters()})
    weights.close()
    return made


def documents() -> list[Tensor]:
    # The row of the padding token has no gradient in transformers.
    return [torch.randint(5, bases.ROWS, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def packed(rows: list[Tensor]) -> dict[str, Any]:
    lengths = [len(d) for d in rows]
    return {
        "input_ids": torch.cat(rows),
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_len": max(lengths),
    }


@pytest.mark.seconds
@pytest.mark.parametrize("name", bases.CASES)
def test_logits_loss_and_gradients_are_those_of_transformers_class(tmp_path: Path, name: str) -> None:
    """Packed; transformers computes every document alone, by a new model, since some scalings remember the longest one."""
    bases.write(tmp_path, name)
    theirs, base = bases.model(name), read(tmp_path)
    model = ours(tmp_path, base)
    total, wanted = [], []
    for document in documents():
        if theirs.model.rotary_emb is not None:
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=theirs.config)
        wanted.append(theirs(input_ids=document[None], use_cache=False).logits[0])
        total.append(F.cross_entropy(wanted[-1][:-1], document[1:], reduction="sum"))
    count = sum(LENGTHS) - len(LENGTHS)
    expected = torch.stack(total).sum() / count
    expected.backward()
    batch = packed(documents())
    found, _ = model(**batch)
    torch.testing.assert_close(found, torch.cat(wanted), atol=2e-5, rtol=1e-4)
    starts = batch["cu_seqlens"].tolist()
    rows = torch.cat([torch.arange(a, b - 1) for a, b in itertools.pairwise(starts)])
    loss, _ = model(**batch, target_rows=rows, target_ids=batch["input_ids"][rows + 1], loss_denominator=float(count))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    family = find_family(theirs.config.to_dict(), "")
    seen = 0
    for theirs_name, gradient in gradients.items():
        parts = [model.get_parameter(part).grad for part in family.parts(theirs_name)]
        torch.testing.assert_close(
            torch.cat(parts), gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=theirs_name: f"{n}: {m}"
        )
        seen += len(parts)
    assert seen == len(list(model.parameters()))


@pytest.mark.parametrize("name", bases.CASES)
def test_the_old_and_the_new_form_of_a_config_are_the_same_model(tmp_path: Path, name: str) -> None:
    bases.write(tmp_path / "new", name)
    bases.write(tmp_path / "old", name, old_form=True)
    assert read(tmp_path / "old").config == read(tmp_path / "new").config


def joined(weights: dict[str, Tensor]) -> None:
    """Joins the convolutions of a Gated DeltaNet: transformers' save_pretrained divides them in thirds, whatever they are."""
    for name in [n for n in weights if ".q_conv1d." in n]:
        parts = [name.replace(".q_conv1d.", f".{part}_conv1d.") for part in "qkv"]
        weights[name.replace(".q_", ".")] = torch.cat([weights.pop(part) for part in parts])


@pytest.mark.parametrize("name", bases.CASES)
def test_a_recipe_that_names_only_its_base_changes_nothing_of_it(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    kind, changes = bases.CASES[name]
    AutoConfig.for_model(kind, **json.loads(json.dumps(bases.SIZES | changes))).save_pretrained(tmp_path)
    base = read(tmp_path)
    resolved = resolve(Model(base="b"), 0, base)
    assert replace(resolved, vocab_size=base.config.vocab_size) == base.config


@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.keys.get("sliding_window", 0)])
def test_a_window_of_no_tokens_is_refused(tmp_path: Path, kind: str) -> None:
    from sft.common.errors import SftError

    changes = {"sliding_window": 0} | ({"use_sliding_window": True} if kind.startswith("qwen") else {})
    described = {**bases.SIZES, "model_type": kind, **changes}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(SftError, match="sliding_window: 0, expected a number of tokens, or null"):
        read_base(tmp_path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_replaces_the_pre_tokenizer_of_the_families_that_say_so(tmp_path: Path, kind: str) -> None:
    from sft.chat.loaded_tokenizer import check_for_family
    from sft.common.errors import SftError

    facts = tiny_export.tokenizer(tmp_path)
    canaries = facts.tokenizer.canaries
    always = replace(FAMILIES[kind], own_tokenizer=True)
    if FAMILIES[kind].own_tokenizer:
        with pytest.raises(
            SftError, match=r"Qwen2Tokenizer of transformers encodes .* next: set \[prepare\] tokenizer"
        ):
            check_for_family(tmp_path, canaries, FAMILIES[kind])
    else:
        check_for_family(tmp_path, canaries, always)


def test_logits_that_are_not_finite_are_named_so() -> None:
    from sft.common.errors import SftError

    pack, rows = logits.Pack.of([[1, 2]]), torch.zeros(2, 4)
    assert logits.differences(rows + 1, rows + 1, pack, "b", 0, "") == (0.0, 1.0, 1.0)
    with pytest.raises(SftError, match="b: logits are not finite: a weight is NaN"):
        logits.differences(rows.fill_(torch.nan), rows, pack, "b", 0, "")


def test_a_config_that_transformers_refuses_is_an_error_that_names_it() -> None:
    from sft.common.errors import SftError

    with pytest.raises(SftError, match=r"b/config.json: transformers builds no model from it: .*hidden_size"):
        logits.meta_hf_model({**bases.SIZES, "model_type": "llama", "hidden_size": "48"}, None, "b/config.json")


@pytest.mark.seconds
@pytest.mark.parametrize("name", bases.CASES)
def test_an_export_has_the_bits_and_the_configuration_that_transformers_writes(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig

    base_folder = tmp_path / "base"
    bases.write(base_folder, name)
    base = read(base_folder)
    facts = replace(tiny_export.tokenizer(tmp_path / "tokenizer"), vocab_size=bases.ROWS - 5, eos_id=3, pad_id=4)
    weights = HfFolder(base_folder)
    options = Convert(dtype="float32", max_position_embeddings=base.facts.max_positions)
    trained = write.Trained(weights, base.config, facts, tmp_path / "tokenizer", base.facts)
    write.export(trained, "", options, tmp_path / "model", lambda _: None)
    weights.close()
    ours, theirs = (load_file(at / "model.safetensors") for at in (tmp_path / "model", base_folder))
    names, _ = plain_names(theirs, find_family(json.loads((base_folder / "config.json").read_text()), ""), "")
    theirs = {plain: theirs[name] for plain, name in names.items()}
    joined(ours), joined(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (AutoConfig.from_pretrained(at).to_dict() for at in (tmp_path / "model", base_folder))
    for key in ("rope_parameters", "rope_scaling"):  # compared by what they compute, below
        ours.pop(key, None), theirs.pop(key, None)
    differing = {k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)}
    assert differing <= {"_name_or_path", "rope_theta", "sliding_window", "max_window_layers", "partial_rotary_factor"}
    if any(base.config.windows):
        assert ours["sliding_window"] == theirs["sliding_window"]
    assert read(tmp_path / "model").config == base.config
    exported = HfFolder(tmp_path / "model")
    gate.check_tensors(exported, HfFolder(base_folder), replace(base.config, vocab_size=bases.ROWS), torch.float32)
    rows = [d.tolist() for d in documents()]
    check = logits.compare_logits(exported, HfFolder(base_folder), base.config, rows, range(4))
    assert check.max_difference < 1e-4 * check.max_logit


@pytest.mark.parametrize("name", bases.CASES)
def test_a_step_keeps_the_model_and_what_an_export_needs_of_its_base(tmp_path: Path, name: str) -> None:
    bases.write(tmp_path, name)
    base = read(tmp_path)
    (tmp_path / "step.json").write_text(json.dumps(olmo_core.step_config(base.config, TokenIds(90, 3, 4), base.facts)))
    assert olmo_core.config_of_step(tmp_path / "step.json") == base.config
    assert olmo_core.base_facts(tmp_path / "step.json") == base.facts
    assert base.facts == BaseFacts(bases.ROWS, base.facts.max_positions, None, base.config.rope_scaling is not None)


@pytest.mark.parametrize("name", bases.CASES)
def test_what_olmo_core_builds_from_a_step_computes_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step's config.json has OLMo-core's `model`; otherwise it has none, and OLMo-core refuses it."""
    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    from olmo_core.nn.transformer import TransformerConfig

    bases.give_olmo_core_kernels(monkeypatch)
    bases.write(tmp_path, name)
    base = read(tmp_path)
    written = olmo_core.step_config(base.config, TokenIds())
    if "model" not in written:
        assert written["architecture"]
        return
    model = ours(tmp_path, base)
    described = TransformerConfig.from_dict(written["model"])
    assert described.num_params == base.config.parameters
    oracle = described.build(init_device="cpu")
    oracle.load_state_dict({"lm_head.w_out.weight": model.embeddings.weight, **model.state_dict()})
    document = documents()[0]
    torch.testing.assert_close(model(**packed([document]))[0], oracle(document[None])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_values_of_missing_keys_are_those_of_transformers_class(kind: str) -> None:
    """A config with sizes only, and the same with every value that transformers fills in."""
    from transformers import AutoConfig

    from sft.recipe.base_config import read_hf_config

    sizes = {
        k: bases.SIZES[k]
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    sizes |= {"hidden_size": 1024, "num_attention_heads": 32, "initializer_range": 0.02}
    filled = AutoConfig.for_model(kind, **sizes).to_dict()
    short = read_hf_config({"model_type": kind, **sizes}, "short")
    long = read_hf_config({k: v for k, v in filled.items() if v is not None or k == "sliding_window"}, "long")
    assert short.config == long.config
    assert short.facts == long.facts


@pytest.mark.parametrize("kind", FAMILIES)
def test_null_is_refused_where_transformers_refuses_it(kind: str) -> None:
    """The planner would otherwise take a default, and a job would end at its comparison with transformers."""
    from transformers import AutoConfig

    from sft.common.errors import SftError
    from sft.recipe.base_config import read_hf_config

    def refuses(read: Any, error: type[Exception], config: dict[str, Any]) -> bool:
        try:
            read(config)
        except error:
            return True
        return False

    filled = AutoConfig.for_model(kind, **bases.SIZES).to_dict()
    for name in filled:
        config = filled | {name: None}
        theirs = refuses(lambda c: AutoConfig.for_model(**c), Exception, config)
        unused = name.endswith(("dropout", "pdrop")) or name.startswith(("linear_a_log", "linear_dt"))
        if theirs and not unused:
            assert refuses(lambda c: read_hf_config(c, "base"), SftError, config), name


@pytest.mark.parametrize("name", ["olmo3 yarn", "smollm3 windows", "phi4 mini", "llama dynamic", "qwen2"])
def test_a_base_is_compared_with_its_own_class_before_training(tmp_path: Path, name: str) -> None:
    from sft.export.base_gate import check_base

    bases.write(tmp_path, name)
    base = read(tmp_path)
    found = check_base(tmp_path, base, [d.tolist() for d in documents()])
    assert found.documents[0] > base.config.window and found.max_difference < 1e-4 * found.max_logit


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("olmo3 yarn", {"rope_scaling": None}), ("qwen2 windows", {"window": 0}), ("smollm3", {"rope_layers": (True,)}),
     ("llama2", {"rope_theta": 5e5}), ("phi4 mini", {"rotary_dim": 0, "rope_scaling": None}), ("llama2", {"norm_eps": 1e-2})],
)  # fmt: skip
def test_a_base_that_is_read_wrongly_does_not_start_a_training(
    tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    from sft.common.errors import SftError
    from sft.export.base_gate import check_base

    bases.write(tmp_path, name)
    base = read(tmp_path)
    misread = replace(base, config=replace(base.config, **wrong))
    with pytest.raises(SftError, match=r"logits differ by .*does not compute the base as transformers does"):
        check_base(tmp_path, misread, [d.tolist() for d in documents()])


def core_step(folder: Path, name: str) -> Base:
    """An OLMo-core step of a case."""
    import torch.distributed.checkpoint as dcp

    pytest.importorskip("olmo_core", reason="ai2-olmo-core is not installed (extra 'interop')")
    bases.write(folder / "hf", name)
    base = read(folder / "hf")
    step = folder / "step0"
    step.mkdir()
    (step / "config.json").write_text(json.dumps(olmo_core.step_config(base.config, TokenIds())))
    state = {key: value.detach() for key, value in ours(folder / "hf", base).state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=str(step / "model_and_optim"), no_dist=True)
    return read(step)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "wrong"), [("olmo3 yarn", {"rope_scaling": None}), ("llama3", {"norm_eps": 1e-2}), ("qwen3", {"rope_theta": 5e5})]
)  # fmt: skip
def test_an_olmo_core_base_is_compared_with_olmo_cores_model_before_training(
    tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    from sft.common.errors import SftError
    from sft.export.core_gate import check_core_base

    base, rows = core_step(tmp_path, name), [d.tolist() for d in documents()]
    found = check_core_base(tmp_path / "step0", base, rows)
    assert not isinstance(found, str) and found.max_difference < 1e-4 * found.max_logit
    misread = replace(base, config=replace(base.config, **wrong))
    with pytest.raises(SftError, match=r"logits differ by .*does not compute the base as OLMo-core does"):
        check_core_base(tmp_path / "step0", misread, rows)


def test_an_olmo_core_base_that_cannot_be_compared_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.export.core_gate import check_core_base

    base = core_step(tmp_path, "llama2")
    monkeypatch.setitem(sys.modules, "olmo_core.nn.transformer", None)
    assert "ai2-olmo-core is not installed" in str(check_core_base(tmp_path / "step0", base, [[5, 6]]))
    (tmp_path / "step0" / "config.json").write_text(json.dumps({olmo_core.core_config.OURS: base.config.to_value()}))
    assert "no description of OLMo-core's" in str(check_core_base(tmp_path / "step0", base, [[5, 6]]))


@pytest.mark.parametrize("name", ["llama2", "qwen3", "olmo2"])
def test_new_tokens_leave_the_first_gradient_at_its_usual_size(tmp_path: Path, name: str) -> None:
    """2 of 100 tokens are new, the table has a mean near zero."""
    from sft.training import initial_weights

    bases.write(tmp_path, name)
    base = read(tmp_path)
    config = resolve(Model(base="b"), bases.ROWS + 4, base)

    def norm(new: bool) -> float:
        model = Transformer(config)
        initial_weights.initialise(model, config, tmp_path, 0, bases.ROWS + 4, lambda _: None)
        rows = [torch.randint(5, bases.ROWS, (100,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
        for i, row in enumerate(rows):
            row[[3, 53]] = bases.ROWS + i if new else row[[3, 53]]
        targets = torch.cat([torch.arange(100 * i, 100 * i + 99) for i in range(4)])
        batch = packed(rows)
        labels = {"target_rows": targets, "target_ids": batch["input_ids"][targets + 1], "loss_denominator": 396.0}
        loss, _ = model(**batch, **labels)
        loss.backward()
        return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    assert norm(new=True) < 1.35 * norm(new=False)
