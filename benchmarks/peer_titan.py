"""torchtitan's own model, loss and row format over the documents of a `Job`, for bench_peers.

In:  the packages `NEEDED` of .peers/, which `peer_ways.fetch` gets. Out: `Numbers`, with the FLOPs of a step by torchtitan's own formula.

Its model is Qwen3 with the preset's sizes, the nearest to OLMo that torchtitan 0.3.0 has: its norms are before each layer, and those of queries and keys are
per head. It has no window. Rows are filled as its ChatDataset does: documents in their order, a row ends where the next one does not fit, padding is a
document of its own. The loss is its chunked one. As torchtitan on one device, blocks are compiled one by one and run under bf16 autocast.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peer_ways import BETAS, RATE, Document, Job, Missing, Numbers, absent, package, train_steps

NEEDED = ("torchtitan", "spmd_types", "tyro", "docstring_parser")
CHUNKS = 8
"""Of a row, in the loss: torchtitan's default."""


def needed() -> list[str]:
    """The packages that torchtitan imports and this environment may lack. Its modules import triton, also on a CPU."""
    return [*NEEDED, *(["triton"] if importlib.util.find_spec("triton") is None else [])]


def greedy(documents: list[Document], seq_len: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of torchtitan's ChatDataset: ids, labels of the next token, and positions, each of shape [seq_len].

    A document of n tokens has n - 1 inputs. None is longer than a row.
    """
    row: list[tuple[Tensor, Tensor, Tensor]] = []
    for ids, labels in documents:
        if row and sum(len(part[0]) for part in row) + len(ids) - 1 > seq_len:
            yield filled(row, seq_len)
            row = []
        row.append((ids[:-1], labels[1:], torch.arange(len(ids) - 1)))
    if row:
        yield filled(row, seq_len)


def filled(row: list[tuple[Tensor, Tensor, Tensor]], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row padded to seq_len."""
    left = seq_len - sum(len(part[0]) for part in row)
    padding = (torch.zeros(left, dtype=torch.long), torch.full((left,), -100), torch.arange(left))
    ids, labels, positions = (torch.cat(parts) for parts in zip(*row, padding, strict=True))
    return ids, labels, positions


def described(job: Job, inner_attention: Any) -> Any:
    """torchtitan's configuration of a Qwen3 model with the sizes of the preset."""
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

    c = job.config
    linear = {"weight": partial(nn.init.normal_, std=0.02)}

    def norm(width: int) -> Any:
        return RMSNorm.Config(normalized_shape=width, eps=c.norm_eps, param_init={"weight": nn.init.ones_})

    def block() -> Any:
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(c.d_model), ffn_norm=norm(c.d_model),
            attention=make_gqa_config(
                dim=c.d_model, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, head_dim=c.head_dim, wqkv_param_init=linear, wo_param_init=linear,
                inner_attention=inner_attention, fuse_qkv=True, qk_norm=norm(c.head_dim),
                rope=CosSinRoPE.Config(dim=c.head_dim, max_seq_len=job.seq_len, theta=float(c.rope_theta)),
            ),
            feed_forward=make_ffn_config(
                dim=c.d_model, hidden_dim=c.intermediate_size, w1_param_init=linear, w2w3_param_init=linear
            ),
        )  # fmt: skip

    return Qwen3Model.Config(
        vocab_size=c.vocab_size, dim=c.d_model, norm=norm(c.d_model), layers=[block() for _ in range(c.n_layers)],
        tok_embeddings=Embedding.Config(num_embeddings=c.vocab_size, embedding_dim=c.d_model, param_init=linear),
        lm_head=Linear.Config(in_features=c.d_model, out_features=c.vocab_size, param_init=linear),
    )  # fmt: skip


def torchtitan(job: Job) -> Numbers:
    """Its Qwen3 over its rows. Raises Missing where its packages are not there, or its loss cannot cut the rows."""
    names = needed()
    if away := absent(names):
        raise Missing(f"{', '.join(away)} not in .peers; next: run it without --no-fetch")
    if job.recompute:
        raise Missing("its recomputation is its trainer's, which is not driven here; next: without --recompute")
    if job.seq_len % CHUNKS:
        raise Missing(f"its loss needs rows of a multiple of {CHUNKS} tokens, not {job.seq_len}; next: --seq-len")
    sys.path[:0] = [str(package(name)) for name in names]
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.models.common.attention import ScaledDotProductAttention, VarlenAttention

    cuda, found = job.device.type == "cuda", Numbers()
    inner = VarlenAttention.Config() if cuda else ScaledDotProductAttention.Config()
    config = described(job, inner)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device=job.device).init_states(buffer_device=job.device)
    model.train()._skip_lm_head = True
    if job.compiled:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
    measure_loss = ChunkedLossWrapper.Config(num_chunks=CHUNKS).build()
    measure_loss.set_lm_head(model.lm_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)
    rows = list(greedy(list(job.documents), job.seq_len))
    count = torch.tensor(float(sum(int((labels != -100).sum()) for _, labels, _ in rows)), device=job.device)
    found.widths = [job.seq_len] * len(rows)
    found.own_flops = config.get_nparams_and_flops(model, job.seq_len)[1] * job.seq_len * len(rows)
    notes = ["its Qwen3 with these sizes: norms before layers, full attention in each"]
    notes += [] if cuda else ["attention over whole rows: its masks need a GPU"]
    found.notes = "; ".join(notes)

    def loss_of(row: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, labels, positions = (part[None].to(job.device) for part in row)
        masks = model.get_attention_masks(positions) if cuda else None
        loss: Tensor = measure_loss(model(ids, positions, masks), labels, count)[0]
        return loss

    train_steps(job, found, model, optimizer, rows, loss_of)
    return found
