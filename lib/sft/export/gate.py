"""What an export must pass before it is published.

In:  the export's folder, the checkpoint it was made from (name -> tensor), the architecture, prepare's dataset.json.
Out: a report (gate.json) of what was compared; SftError at the first thing that does not hold.

1. Tensors: the names and shapes that transformers itself gives this configuration; every one once, finite, and equal
   to the checkpoint's after the cast.
2. Tokenizer: the ids of the canary texts, the template and the special ids are those of the training data.
3. Logits: the native model against transformers on packed, templated conversations, the first of them longer than the
   sliding window. Both run in fp32 on the exported values, so that only a real difference shows.
4. A greedy reply (reported: an undertrained model may well not stop).

`gate = "fast"` runs 3 on the first four layers, without the cost of rounding, and leaves 4 out. Models are streamed through block by block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft.checkpoint.dcp_reader import Weights
from sft.checkpoint.hf_folder import HfFolder
from sft.common.errors import SftError
from sft.export.rows import DTYPES, finite, pieces
from sft.export.stream import Head, Table, prefetched, stream
from sft.formats.dataset import TokenizerFacts
from sft.formats.gate import GateRecord, GreedyReply, LogitCheck, TensorCheck, TokenizerCheck
from sft.model import hf
from sft.recipe.presets import ModelConfig

if TYPE_CHECKING:
    from sft.recipe.schema import Convert

FAST_LAYERS = 4  # one of every place in a group of windowed and full layers
ROWS = 256  # positions whose logits are compared, beside the last TAIL of every document
TAIL = 64
TOLERANCE = 1e-3  # largest difference of a logit, as a share of the largest logit
CHAT_TOKENS = 48
KEPT = 1_000_000_000  # bytes of blocks that stay in memory from one token of a reply to the next
_CHAT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("And how much is 17 plus 25?", "17 plus 25 is 42."),
    ("Name three primary colours.", "Red, yellow and blue."),
)


def check(
    folder: Path,
    weights: Weights,
    config: ModelConfig,
    facts: TokenizerFacts,
    template: str,
    options: Convert,
    log: Callable[[str], None] = print,
) -> GateRecord:
    """Runs the gate and returns its record. `template` is the chat template that the model was trained with.

    Raises SftError at the first check that fails.
    """
    fast = options.gate == "fast"
    exported = HfFolder(folder)
    tensors = check_tensors(exported, weights, config, DTYPES[options.dtype])
    log(f"gate: {tensors.count} tensors complete, finite and equal to the checkpoint")
    tokenizer = check_tokenizer(folder, facts)
    stops = check_generation(folder, facts)
    layers = sample_layers(config.n_layers) if fast else list(range(config.n_layers))
    logits = check_logits(exported, weights, config, trained_chats(tokenizer, template, config), layers)
    which = "all" if layers == list(range(config.n_layers)) else "layers " + ", ".join(map(str, layers))
    log(
        f"gate: logits of {logits.rows} positions agree to {logits.max_difference:.1e} of {logits.max_logit:.1f}"
        f" over {which} of {config.n_layers} layers, {logits.tokens} packed tokens, window {config.window}"
    )
    chats: tuple[GreedyReply, ...] | None = None
    if not fast:
        chats = greedy_chats(exported, tokenizer, config, stops)
        ended = sum(chat.stopped for chat in chats)
        log(f"gate: {ended} of {len(chats)} greedy replies stop by themselves; the first: {chats[0].reply[:80]!r}")
    exported.close()
    about_tokenizer = TokenizerCheck(len(facts.tokenizer.canaries), tuple(stops))
    return GateRecord.of(options.gate, tensors, about_tokenizer, logits, chats)


def sample_layers(count: int) -> list[int]:
    """FAST_LAYERS layers from the first to the last, one of every place in a group of four."""
    if count <= FAST_LAYERS:
        return list(range(count))
    last = count // FAST_LAYERS - 1
    return [FAST_LAYERS * round(i * last / (FAST_LAYERS - 1)) + i for i in range(FAST_LAYERS)]


def check_tensors(exported: HfFolder, weights: Weights, config: ModelConfig, dtype: torch.dtype) -> TensorCheck:
    """Every tensor of transformers' own model once, with its shape, finite, equal to the checkpoint's cut and cast."""
    parameters = _meta_model(exported.config).named_parameters()  # a tied head is not named a second time
    theirs = {exported.family.ours(k): tuple(v.shape) for k, v in parameters}
    hf.check_shapes({name: exported.shape(name) for name in exported}, theirs, str(exported.path))
    wanted = hf.shapes(config, int(exported.config["vocab_size"]))
    hf.check_shapes(theirs, wanted, f"{exported.path / 'config.json'}: transformers' model")

    def read(name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return exported.rows(name, start, stop), weights.rows(name, start, stop)

    places = [(name, *piece) for name, shape in wanted.items() for piece in pieces(shape)]
    for (name, start, _), (found, exact) in zip(places, prefetched(partial(read, *p) for p in places), strict=True):
        if found.dtype != dtype or not torch.equal(found, exact.to(dtype)):
            raise SftError(f"{exported.path}: {name}: not the checkpoint's values in {dtype}; next: make convert again")
        if not finite(found):
            raise SftError(f"{exported.path}: {name}: NaN or infinity from row {start} on; next: make convert again")
    size = sum(torch.Size(shape).numel() for shape in wanted.values()) * dtype.itemsize
    return TensorCheck(len(wanted), size, str(dtype).removeprefix("torch."))


def check_tokenizer(folder: Path, facts: TokenizerFacts) -> Any:
    """The tokenizer as transformers loads it gives the ids that prepare got, and carries the trained template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text, wanted in facts.tokenizer.canaries.items():
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != list(wanted):
            raise SftError(
                f"{folder / 'tokenizer.json'}: {text!r} becomes {found} through AutoTokenizer, {list(wanted)} in the training"
                " data: another pre-tokenizer; next: set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast"
            )
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if tokenizer.chat_template != template:
        raise SftError(
            f"{folder / 'chat_template.jinja'}: AutoTokenizer loads another template; next: remove the one in tokenizer_config.json"
        )
    for name, found, expected in (
        ("eos_token", tokenizer.eos_token_id, facts.eos_id),
        ("pad_token", tokenizer.pad_token_id, facts.pad_id),
    ):
        if found != expected:
            raise SftError(f"{folder / 'tokenizer_config.json'}: {name} has id {found}, dataset.json has {expected}")
    return tokenizer


def check_generation(folder: Path, facts: TokenizerFacts) -> list[int]:
    """generate() stops on every trained terminator; config and generation config agree on the special ids."""
    from transformers import AutoConfig, GenerationConfig

    generation = GenerationConfig.from_pretrained(folder)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if missing := [i for i in facts.terminator_ids if i not in stops]:
        raise SftError(
            f"{folder / 'generation_config.json'}: eos_token_id: {stops} lacks the trained terminator {missing}"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, found, wanted in (
        ("eos_id", config.eos_token_id, facts.eos_id),
        ("pad_id", config.pad_token_id, facts.pad_id),
    ):
        if found != wanted:
            raise SftError(f"{folder / 'config.json'}: {name}: {found}, dataset.json has {wanted}")
    return [int(i) for i in stops]


def trained_chats(tokenizer: Any, template: str, config: ModelConfig) -> list[list[int]]:
    """Conversations in the trained template as ids: one longer than the window, one of several turns, one short."""
    longest = config.window + 64 if config.window else 512
    turns, ids = 1, [0]
    while len(ids) < longest:
        ids = _render(tokenizer, template, turns)
        turns = max(turns + 1, round(turns * longest / len(ids)) + 1)
    return [ids, _render(tokenizer, template, 3), _render(tokenizer, template, 1)]


def _render(tokenizer: Any, template: str, turns: int) -> list[int]:
    messages = []
    for turn in range(turns):
        question, answer = _CHAT[turn % len(_CHAT)]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    made = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)
    return [int(i) for i in made["input_ids"]]


def check_logits(
    exported: HfFolder, weights: Weights, config: ModelConfig, documents: Sequence[Sequence[int]], layers: Sequence[int]
) -> LogitCheck:
    """Compares native and exported logits over the given layers of the model; the others are passed over in both."""
    pack = Pack.of(documents)
    config = replace(config, vocab_size=int(exported.config["vocab_size"]))  # the padding's rows are not exported
    native = native_logits(config, exported, pack, layers)
    theirs = hf_logits(exported, pack, layers)
    agreement = (native.argmax(1) == theirs.argmax(1)).float().mean().item()
    # Row by row: there are as many logits as a matrix has weights.
    apart = torch.stack([(a - b).abs().max() for a, b in zip(native, theirs, strict=True)])
    difference, largest = apart.max().item(), max(row.abs().max().item() for row in native)
    if not difference <= TOLERANCE * largest:  # also refuses NaN
        row = int(apart.nan_to_num(torch.inf).argmax())
        raise SftError(
            f"{exported.path}: logits differ by {difference:.3g} (largest logit {largest:.3g}, tolerance {TOLERANCE:g} of it), most"
            f" at token {int(pack.rows[row])} of a pack with documents of {[len(d) for d in documents]} tokens and window"
            f" {config.window}: the export is not the model that was trained; next: compare config.json with the recipe's [model]"
        )
    del theirs
    # What the cast costs: the distribution of the unrounded checkpoint against that of the export.
    kl = 0.0 if exported.config["dtype"] == "float32" else None
    if kl is None and len(layers) == config.n_layers:
        # Documents do not see each other: the long one is left out, and with it most of a third pass over the model.
        short = Pack.of(documents[1:], pack.rows[pack.rows >= len(documents[0])] - len(documents[0]))
        exact = native_logits(config, weights, short, layers)
        kl = sum(_kl(p, q) for p, q in zip(exact, native[-len(exact) :], strict=True)) / len(exact)
    return LogitCheck(
        max_difference=difference,
        max_logit=largest,
        rounding_kl=kl,
        argmax_agreement=agreement,
        documents=tuple(len(d) for d in documents),
        tokens=sum(len(d) for d in documents),
        rows=len(pack.rows),
        layers=len(layers),
        which=tuple(layers),
    )


def _kl(exact: Tensor, rounded: Tensor) -> float:
    p, q = exact.double().log_softmax(0), rounded.double().log_softmax(0)
    return max(0.0, float((p.exp() * (p - q)).sum()))


@dataclass(frozen=True)
class Pack:
    """Documents end to end, and the positions whose logits are looked at."""

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    rows: Tensor

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], rows: Tensor | None = None) -> Pack:
        lengths = [len(d) for d in documents]
        total, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
        if rows is None:  # evenly spread, and densest where packing and windows go wrong: the tail of every document
            tails = {i for end in ends[1:].tolist() for i in range(max(0, end - TAIL), end)}
            rows = torch.tensor(sorted(tails | set(torch.linspace(0, total - 1, min(ROWS, total)).long().tolist())))
        return cls(
            ids=torch.tensor([i for d in documents for i in d]),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens=ends.to(torch.int32),
            longest=max(lengths),
            rows=rows,
        )


@torch.inference_mode()
def native_logits(config: ModelConfig, weights: Weights, pack: Pack, layers: Sequence[int]) -> Tensor:
    """fp32 logits [rows, V] of sft.model.model with the given layers."""
    from sft.model.model import Transformer

    def whole(name: str) -> Tensor:
        return weights.rows(name, 0, weights.shape(name)[0]).float()

    with torch.device("meta"):
        model = Transformer(replace(config, n_layers=len(layers))).eval()
    model.embeddings = Table(lambda a, b: weights.rows("embeddings.weight", a, b).float())  # type: ignore[assignment]
    stream(list(model.blocks), lambda i, name: whole(f"blocks.{layers[i]}.{name}"))
    hidden = model.hidden_states(pack.ids, pack.positions, pack.cu_seqlens, pack.longest)
    model.lm_head.norm.load_state_dict({"weight": whole("lm_head.norm.weight")}, assign=True)
    head = Head(lambda a, b: weights.rows(hf.head_name(config), a, b).float(), config.vocab_size)
    logits: Tensor = head(model.lm_head.norm(hidden[pack.rows]))
    return logits


@torch.inference_mode()
def hf_logits(exported: HfFolder, pack: Pack, layers: Sequence[int]) -> Tensor:
    """fp32 logits [rows, V] of transformers' model with the given layers."""
    model = hf_model(exported, layers, torch.float32)
    # transformers sees documents by their restarting positions, and only without a cache and without a mask.
    out = model(input_ids=pack.ids[None], position_ids=pack.positions[None], use_cache=False, logits_to_keep=pack.rows)
    logits: Tensor = out.logits[0]
    return logits


def hf_model(exported: HfFolder, layers: Sequence[int], dtype: torch.dtype, keep: int = 0) -> Any:
    """transformers' model of the folder with the given layers, its weights streamed; `keep` bytes of them stay."""
    short: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if types := exported.config.get("layer_types"):
        short["layer_types"] = [types[i] for i in layers]
    model: Any = _meta_model({**exported.config, **short})
    inner = model.model

    def rows(name: str) -> Callable[[int, int], Tensor]:
        return lambda start, stop: exported.rows(name, start, stop).to(dtype)

    # Rotary frequencies are buffers that are computed, not loaded: make them again off the meta device.
    inner.rotary_emb = type(inner.rotary_emb)(config=model.config)
    inner.embed_tokens = Table(rows("embeddings.weight"))
    inner.norm.load_state_dict({"weight": exported["lm_head.norm.weight"].to(dtype)}, assign=True)
    head = hf.head_name(hf.model_config(exported.config))
    model.lm_head = Head(rows(head), int(exported.config["vocab_size"]))
    ours = exported.family.ours
    stream(list(inner.layers), lambda i, n: exported[ours(f"model.layers.{layers[i]}.{n}")].to(dtype), keep)
    return model


def _meta_model(config: Mapping[str, Any]) -> nn.Module:
    """transformers' model for a config.json, without memory for its weights."""
    for noisy in ("torchao", "torch.utils._pytree"):  # transformers imports it, and it warns of kernels that no CPU has
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


@torch.inference_mode()
def greedy_chats(
    exported: HfFolder, tokenizer: Any, config: ModelConfig, stops: Sequence[int], tokens: int = CHAT_TOKENS
) -> tuple[GreedyReply, ...]:
    """Greedy replies of at most `tokens` to the fixed questions with the folder's own template, all at once, and whether
    each ends by itself."""
    from transformers import DynamicCache

    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q, _ in _CHAT
    ]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    longest = max(map(len, ids))
    # fp16 has no fast kernels on a CPU; the replies of a cast model are those of the values that it holds.
    dtype = torch.float32 if exported.config["dtype"] == "float16" else DTYPES[exported.config["dtype"]]
    model = hf_model(exported, range(config.n_layers), dtype, KEPT)
    seen = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids])
    step = torch.tensor([[stops[0]] * (longest - len(i)) + i for i in ids])  # what fills the left is never attended to
    cache = DynamicCache(config=model.config)
    replies: list[list[int]] = [[] for _ in ids]
    for _ in range(tokens):
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        out = model(
            input_ids=step,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        seen = torch.cat([seen, torch.ones_like(step)], dim=1)
        for reply, token in zip(replies, step[:, 0].tolist(), strict=True):
            if not reply or reply[-1] not in stops:
                reply.append(token)
        if all(reply[-1] in stops for reply in replies):
            break
    return tuple(
        GreedyReply(prompt, tokenizer.decode(reply, skip_special_tokens=True), len(reply), reply[-1] in stops)
        for prompt, reply in zip(prompts, replies, strict=True)
    )
