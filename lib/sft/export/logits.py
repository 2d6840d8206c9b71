"""Compares the logits of the training code's model with those of transformers, on packed documents.

In:  an exported Hugging Face folder, the weights it was made from, the architecture, documents as token ids, layers.
Out: `LogitCheck`; SftError if the logits differ by more than TOLERANCE. Both models are streamed from the disk one matrix at a
     time and run in fp32 on the exported values, so only a real difference shows.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft.checkpoint.dcp_reader import Weights
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.export.stream import Head, Table, stream
from sft.formats.gate import LogitCheck
from sft.model import hf
from sft.recipe.architecture import DynamicRope, LongRope, ModelConfig

if TYPE_CHECKING:
    from sft.model.model import Transformer

FAST_LAYERS = 4
"""Layers of the fast gate. Windowed and full layers alternate in groups of four."""
SPREAD = 256
"""Positions whose logits are compared, evenly spread over the pack."""
TAIL = 64
"""The last positions of every document, which are compared too."""
TOLERANCE = 1e-3
"""Largest allowed difference of a logit, as a share of the largest logit."""


def sample_layers(count: int) -> list[int]:
    """At most FAST_LAYERS layers from the first to the last, one for every position in a group of four.

    32 layers give [0, 9, 22, 31]: layers 0, 1, 2 and 3 of their groups.
    """
    if count <= FAST_LAYERS:
        return list(range(count))
    last_group = count // FAST_LAYERS - 1
    return [FAST_LAYERS * round(i * last_group / (FAST_LAYERS - 1)) + i for i in range(FAST_LAYERS)]


@dataclass(frozen=True)
class Pack:
    """Documents end to end, T tokens in all, and the R positions whose logits are compared.

    `ids` [T] are token ids, `positions` [T] restart at 0 in every document, `cu_seqlens` [documents + 1] are int32 boundaries,
    `longest` is the length of the longest document, `compared` [R] are ascending indices into the pack.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    compared: Tensor

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], compared: Tensor | None = None) -> Pack:
        """Compares SPREAD positions, and the tail of every document, where errors of packing and windows show."""
        lengths = [len(d) for d in documents]
        total, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
        if compared is None:
            tails = {i for end in ends[1:].tolist() for i in range(max(0, end - TAIL), end)}
            spread = set(torch.linspace(0, total - 1, min(SPREAD, total)).long().tolist())
            compared = torch.tensor(sorted(tails | spread))
        return cls(
            ids=torch.tensor([i for d in documents for i in d]),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens=ends.to(torch.int32),
            longest=max(lengths),
            compared=compared,
        )


def compare_logits(
    exported: HfFolder,
    weights: Weights,
    config: ModelConfig,
    documents: Sequence[Sequence[int]],
    layers: Sequence[int],
    failure: str = "the export is not the model that was trained; next: compare config.json with the recipe's [model]",
    rounding: bool = True,
) -> LogitCheck:
    """Compares native and exported logits over the given layers; both models skip the others. Raises SftError.

    With all layers and `rounding` it also measures what rounding to the export's dtype costs. `failure` says what a
    difference means, and what to do.
    """
    pack = Pack.of(documents)
    config = replace(config, vocab_size=int(exported.config["vocab_size"]))  # padding rows are not exported
    native = native_logits(config, exported, pack, layers)
    theirs = hf_logits(exported, config, pack, layers)
    difference, largest, agreement = differences(native, theirs, pack, str(exported.path), config.window, failure)
    del theirs
    return LogitCheck(
        max_difference=difference,
        max_logit=largest,
        rounding_kl=_rounding_kl(exported, weights, config, documents, pack, layers, native) if rounding else None,
        argmax_agreement=agreement,
        documents=tuple(len(d) for d in documents),
        tokens=sum(len(d) for d in documents),
        rows=len(pack.compared),
        layers=len(layers),
        which=tuple(layers),
    )


def differences(
    native: Tensor, theirs: Tensor, pack: Pack, where: str, window: int, failure: str
) -> tuple[float, float, float]:
    """(largest difference of a logit, largest logit, share of rows with the same best token) of logits [R, V].

    Raises SftError for a difference beyond TOLERANCE; `failure` says what it means, and what to do.
    """
    if not all(row.isfinite().all() for row in native):
        raise SftError(
            f"{where}: logits are not finite: a weight is NaN, infinite or too large; next: fetch the weights again, or name"
            " another base"
        )
    agreement = (native.argmax(1) == theirs.argmax(1)).float().mean().item()
    # Row by row, which needs no third tensor: there are as many logits as a matrix has weights.
    rows = torch.stack([(a - b).abs().max() for a, b in zip(native, theirs, strict=True)])
    difference, largest = rows.max().item(), max(row.abs().max().item() for row in native)
    if not difference <= TOLERANCE * largest:  # also refuses NaN
        worst = int(pack.compared[int(rows.nan_to_num(torch.inf).argmax())])
        raise SftError(
            f"{where}: logits differ by {difference:.3g} (largest logit {largest:.3g}, tolerance {TOLERANCE:g} of it), most"
            f" at token {worst} of a pack with documents of {pack.cu_seqlens.diff().tolist()} tokens and window {window}:"
            f" {failure}"
        )
    return difference, largest, agreement


def _rounding_kl(
    exported: HfFolder,
    weights: Weights,
    config: ModelConfig,
    documents: Sequence[Sequence[int]],
    pack: Pack,
    layers: Sequence[int],
    rounded: Tensor,
) -> float | None:
    """Mean KL divergence in nats per token of the export's distribution from that of the unrounded checkpoint.

    0 for a float32 export, None for a sample of layers. `rounded` are the logits [R, V] of the export. The first document, the
    longest, is left out, which saves most of the time; documents do not attend to each other, so the others' logits stay the same.
    """
    if exported.config["dtype"] == "float32":
        return 0.0
    if len(layers) != config.n_layers:
        return None
    first = len(documents[0])
    short = Pack.of(documents[1:], pack.compared[pack.compared >= first] - first)
    exact = native_logits(config, weights, short, layers)
    return sum(_kl(p, q) for p, q in zip(exact, rounded[-len(exact) :], strict=True)) / len(exact)


def _kl(exact: Tensor, rounded: Tensor) -> float:
    p, q = exact.double().log_softmax(0), rounded.double().log_softmax(0)
    return max(0.0, float((p.exp() * (p - q)).sum()))


@torch.inference_mode()
def native_logits(
    config: ModelConfig,
    weights: Weights,
    pack: Pack,
    layers: Sequence[int],
    change: Callable[[Transformer], None] = lambda _: None,
) -> Tensor:
    """fp32 logits [R, V] of sft.model.model with the given layers. `change`: what is done with the model before it runs."""
    from sft.model.model import Transformer  # start-up: only a part of the commands compares logits

    def tensor(name: str) -> Tensor:
        return weights.rows(name, 0, weights.shape(name)[0]).float()

    with torch.device("meta"):
        model = Transformer(of_layers(config, layers)).eval()
        change(model)
    model.embeddings = Table(lambda a, b: weights.rows("embeddings.weight", a, b).float())  # type: ignore[assignment]
    stream(list(model.blocks), lambda i, name: tensor(f"blocks.{layers[i]}.{name}"))
    hidden = model.hidden_states(pack.ids, pack.positions, pack.cu_seqlens, pack.longest)
    model.lm_head.norm.load_state_dict({"weight": tensor("lm_head.norm.weight")}, assign=True)
    head = Head(lambda a, b: weights.rows(hf.head_name(config), a, b).float(), config.vocab_size)
    logits: Tensor = head(model.lm_head.norm(hidden[pack.compared]))
    return logits


def of_layers(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The architecture of some layers of a model."""
    return replace(
        config,
        n_layers=len(layers),
        window_layers=tuple(bool(config.layer_window(i)) for i in layers) if config.window else config.window_layers,
        rope_layers=tuple(config.has_positions(i) for i in layers),
        gated_delta=config.gated_delta
        and replace(config.gated_delta, layers=tuple(config.layer_mixer(i) is not None for i in layers)),
    )


@torch.inference_mode()
def hf_logits(exported: HfFolder, config: ModelConfig, pack: Pack, layers: Sequence[int]) -> Tensor:
    """fp32 logits [R, V] of transformers' model with the given layers.

    Scaling that depends on the length of a document is computed by transformers for the longest one of a pack, and kept for
    later calls; the state of a Gated DeltaNet passes from document to document. Each document then has its own call of a new
    model.
    """
    if config.gated_delta or isinstance(config.rope_scaling, DynamicRope | LongRope):
        edges = pack.cu_seqlens.tolist()
        spans = list(itertools.pairwise(edges))
    else:
        spans = [(0, len(pack.ids))]
    found = []
    for start, stop in spans:
        rows = pack.compared[(pack.compared >= start) & (pack.compared < stop)] - start
        model = streamed_hf_model(exported, config, layers, torch.float32)
        # transformers recognises documents by restarting positions, but only without a cache and without a mask.
        ids, positions = pack.ids[start:stop], pack.positions[start:stop]
        out = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
        found.append(out.logits[0])
    return torch.cat(found)


def streamed_hf_model(
    exported: HfFolder, config: ModelConfig, layers: Sequence[int], dtype: torch.dtype, keep_bytes: int = 0
) -> Any:
    """transformers' model of the folder with the given layers. Weights are streamed; the first `keep_bytes` stay in memory."""
    model: Any = meta_hf_model(exported.config, layers, str(exported.path / "config.json"))
    inner = model.model

    def rows(name: str) -> Callable[[int, int], Tensor]:
        return lambda start, stop: exported.rows(name, start, stop).to(dtype)

    # Rotary frequencies are computed buffers, not weights: compute them off the meta device.
    if inner.rotary_emb is not None:
        inner.rotary_emb = type(inner.rotary_emb)(config=model.config)
    inner.embed_tokens = Table(rows("embeddings.weight"))
    inner.norm.load_state_dict({"weight": exported["lm_head.norm.weight"].to(dtype)}, assign=True)
    model.lm_head = Head(rows(hf.head_name(config)), int(exported.config["vocab_size"]))

    def tensor(layer: int, name: str) -> Tensor:
        parts = [exported[part] for part in exported.family.parts(f"model.layers.{layers[layer]}.{name}")]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    stream(list(inner.layers), tensor, keep_bytes)
    return model


def meta_hf_model(
    config: Mapping[str, Any], layers: Sequence[int] | None = None, where: str = "config.json"
) -> nn.Module:
    """transformers' model for a config.json on the meta device, which holds no weights; of some layers only, if given.

    Raises SftError for a config that transformers refuses.
    """
    for noisy in (
        "torchao",
        "torch.utils._pytree",
    ):  # transformers imports torchao, which warns about missing GPU kernels
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from transformers import AutoConfig, AutoModelForCausalLM  # start-up: transformers takes a second

    try:
        # The weights are streamed as what they stand for, also where the folder has them quantised.
        made = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
        if layers is not None:
            for name in ("layer_types", "no_rope_layers"):
                if listed := getattr(made, name, None):
                    setattr(made, name, [listed[i] for i in layers])
            made.num_hidden_layers = len(layers)
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config  # transformers does not annotate it
            model: nn.Module = build(made, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:  # its validators and classes raise many kinds of errors
        raise SftError(
            f"{where}: transformers builds no model from it: {type(error).__name__}: {' '.join(str(error).split())[:300]};"
            " next: correct the base's config"
        ) from error
    return model.eval()
