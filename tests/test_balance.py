"""sft.packing.balance: costs follow the model's windows; dealing loses no pack, wastes no time, and never changes a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.dataset import DOCUMENT
from sft.model.flops import attention_flops, attention_pairs, token_flops
from sft.packing.balance import deal, deal_in_order, idle, pack_costs
from sft.packing.packs import pack_documents
from sft.recipe.presets import PRESETS


def test_attention_pairs_count_what_every_token_sees():
    for length in (1, 5, 8, 9, 30):
        for window in (0, 1, 3, 8, 40):
            seen = sum(min(i + 1, window or length) for i in range(length))
            assert attention_pairs(length, window) == seen


def test_windowed_layers_cost_less_and_every_fourth_layer_is_full():
    olmo2, olmo3 = PRESETS["olmo2-7b"], PRESETS["olmo3-7b"]
    assert attention_flops([4096], olmo2) == attention_flops([4096], olmo3)
    long2, long3 = attention_flops([32768], olmo2)[0], attention_flops([32768], olmo3)[0]
    full, windowed = attention_pairs(32768, 0), attention_pairs(32768, 4096)
    assert long3 / long2 == pytest.approx((8 * full + 24 * windowed) / (32 * full))


def test_the_linear_part_is_twice_the_matrix_parameters():
    model = PRESETS["olmo3-7b"]
    norms = model.n_layers * (2 * model.n_heads * model.head_dim + 2 * model.d_model)
    matrices = model.parameters - norms - model.d_model * (2 * model.vocab_size + 1)
    assert token_flops(model) == 2 * matrices


def packs(lengths: np.ndarray, seq_len: int = 32768):
    documents = np.zeros(len(lengths), dtype=DOCUMENT)
    documents["length"], documents["labels"] = lengths, np.maximum(lengths // 2, 1)
    return pack_documents(documents, seq_len)


def test_the_cost_of_a_pack_is_that_of_its_documents_and_trained_tokens():
    model = PRESETS["olmo3-tiny"]
    index = packs(np.array([100, 60, 30, 30]), 128)
    for pack, cost in enumerate(pack_costs(index, model)):
        segments = index.pack(pack)
        expected = token_flops(model) * 128 + sum(attention_flops(n, model) for n in segments["length"])
        assert cost == pytest.approx(expected + 2 * model.d_model * model.vocab_size * segments["labels"].sum())


def test_the_costs_of_some_packs_are_those_among_all():
    index, model = packs(np.arange(2, 128), 128), PRESETS["olmo3-tiny"]
    some = np.array([3, 0, len(index) - 1, 3])
    assert pack_costs(index, model, some) == pytest.approx(pack_costs(index, model)[some])
    assert len(pack_costs(index, model, some[:0])) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=100),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
)
def test_every_pack_is_dealt_once_and_microbatches_are_as_few_as_can_be(costs, ranks, each, in_order):
    dealt = deal_in_order(len(costs), ranks, each) if in_order else deal(costs, ranks, each)
    assert dealt.shape == (-(-len(costs) // (ranks * each)), ranks, each)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(len(costs)))
    full = dealt[:-1]
    assert (full >= 0).all(), "only the last microbatch may have empty slots"


def test_dealing_in_order_gives_every_rank_the_columns_of_olmo_core():
    dealt = deal_in_order(48, 4, 3)
    for rank in range(4):
        assert dealt[:, rank].ravel().tolist() == list(range(48))[rank::4]


def test_equal_packs_wait_for_nobody_and_one_dear_pack_is_seen():
    assert idle(np.ones(64), deal(np.ones(64), 8)) == (0.0, 0.0)
    each, once = idle([3, 1, 1, 1], deal_in_order(4, 2))
    assert each == pytest.approx(1 - 6 / (2 * (3 + 1))) and once == pytest.approx(1 - 6 / (2 * 4))


def test_ranks_have_even_shares_of_a_step_too():
    costs = np.random.default_rng(0).lognormal(0, 0.4, 64)
    assert idle(costs, deal(costs, 8))[1] < 0.02


@pytest.mark.seconds
@pytest.mark.parametrize(("ranks", "microbatches", "goal"), [(8, 8, 0.03), (32, 4, 0.08)])
def test_mixed_data_and_full_attention_wait_little(ranks: int, microbatches: int, goal: float):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.lognormal(6.5, 1, 60_000), rng.lognormal(9.2, 0.8, 4_500)]).clip(4, 32768).astype(int)
    costs = pack_costs(packs(lengths), PRESETS["olmo2-7b"])
    batch = ranks * microbatches
    steps = [costs[rng.permutation(len(costs))[:batch]] for _ in range(20)]
    ours = np.mean([idle(c, deal(c, ranks))[0] for c in steps])
    random = np.mean([idle(c, deal_in_order(batch, ranks))[0] for c in steps])
    assert ours <= goal < 0.15 < random


def test_several_packs_a_microbatch_wait_less_than_one():
    costs = np.random.default_rng(1).lognormal(0, 0.5, 64)
    assert idle(costs, deal(costs, 8, 4))[0] < idle(costs, deal(costs, 8, 1))[0]
