"""Epoch and batch arithmetic: the packs, tokens and targets of every optimizer step, known before training starts.

In:  a `PackIndex` and the recipe's [train] table. Out: a `StepPlan`. It does not depend on ranks, workers or accumulation,
     so every rank computes the same plan on its own, and the loss denominator of a step needs no collective.

Packs are shuffled in every epoch by (data_seed, epoch). Epochs follow each other without a gap: the last batch of an epoch
is filled with packs of the next one. The rest after the last epoch is a smaller last batch. With `epoch_tail = "drop"`
the rest of every epoch is left out instead. Steps count from 0 here: when step s is done, s + 1 steps are consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.formats.packs import DataPosition, StepSummary, TokensPerStep
from sft.packing.packs import PackIndex
from sft.recipe.architecture import ModelConfig
from sft.recipe.schema import Hardware, Train


def warmup_steps(train: Train, steps: int) -> int:
    """The number of steps in which the learning rate rises to its peak."""
    return round(train.warmup_fraction * steps)


def epoch_order(packs: int, seed: int, epoch: int, order: str = "shuffled") -> NDArray[np.int64]:
    """The packs of an epoch (from 0) in the order they are consumed. A pure function of its arguments."""
    if order == "sequential":
        return np.arange(packs)
    if order == "olmo-core":
        indices = np.arange(packs, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed + epoch + 1)).shuffle(indices)
        return indices.astype(np.int64)
    # Sorts the raw output of the bit generator: NumPy guarantees that stream, but not the result of `shuffle`.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(packs)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class StepPlan:
    """The packs that every step consumes. Made by `StepPlan.build` (training) or `StepPlan.once` (validation)."""

    index: PackIndex
    batch_packs: int  # packs of a global batch
    epoch_packs: int  # packs consumed in an epoch: all, or as many as fill complete batches
    total_packs: int  # packs consumed in the run
    seed: int
    order: str
    warmup_steps: int
    _num_targets: NDArray[np.int64]  # [packs]
    _num_tokens: NDArray[np.int64]  # [packs]
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)  # the last two epochs used
    first_step: int = 0  # steps that were done, with `first_pack` packs, when a longer plan took over: see `goes_on`
    first_pack: int = 0

    @classmethod
    def build(cls, index: PackIndex, train: Train) -> StepPlan:
        """The plan of a training run.

        Raises SftError, with the numbers, for packs of another length, a batch that is not a multiple of it, a dataset
        smaller than a batch, zero steps, and a step without a target.
        """
        if index.seq_len != train.seq_len:
            raise SftError(
                f"[train] seq_len {train.seq_len}: the packs are of {index.seq_len} tokens; next: pack again"
            )
        batch_packs, rest = divmod(train.global_batch_tokens, train.seq_len)
        if rest:
            below = batch_packs * train.seq_len
            nearest = " or ".join(str(n) for n in (below, below + train.seq_len) if n)
            raise SftError(
                f"[train] global_batch_tokens {train.global_batch_tokens} is not a multiple of seq_len {train.seq_len}; next: use {nearest}"
            )
        drop = train.epoch_tail == "drop" or train.order == "olmo-core"
        epoch_packs = len(index) // batch_packs * batch_packs if drop else len(index)
        if not len(index):
            raise SftError(nothing_left(index))
        if len(index) < batch_packs:
            packed = index.losses.tokens - index.losses.tokens_lost
            raise SftError(
                f"[train] the dataset is smaller than one batch: {packed} tokens of {index.losses.documents} documents fill "
                f"{len(index)} packs of {train.seq_len}, a batch of global_batch_tokens {train.global_batch_tokens} needs "
                f"{batch_packs}; next: lower global_batch_tokens to {len(index) * train.seq_len} or less, or add data"
            )
        if train.steps:
            total = train.steps * batch_packs
        else:
            total = round(train.epochs * epoch_packs)
            total -= total % batch_packs if drop else 0
        if total < batch_packs:
            raise SftError(
                f"[train] zero steps: epochs {train.epochs:g} of {epoch_packs} packs are {total} packs, one batch is "
                f"{batch_packs}; next: raise epochs to {batch_packs / epoch_packs:.4g}, or set steps"
            )
        plan = cls(
            index=index,
            batch_packs=batch_packs,
            epoch_packs=epoch_packs,
            total_packs=total,
            seed=train.data_seed,
            order=train.order,
            warmup_steps=warmup_steps(train, -(-total // batch_packs)),
            _num_targets=index.sums("labels"),
            _num_tokens=index.sums("length"),
        )
        untrained = next((step for step, (targets, _) in enumerate(plan._sums()) if not targets), None)
        if untrained is not None:
            raise SftError(
                f"[train] step {untrained + 1} of {plan.steps} has no trained token in {batch_packs} packs; next: check the masks with make preview"
            )
        return plan

    @classmethod
    def once(cls, index: PackIndex, batch_packs: int) -> StepPlan:
        """Every pack once, in order, for validation. Zero packs are zero steps."""
        return cls(
            index=index,
            batch_packs=batch_packs,
            epoch_packs=max(len(index), 1),
            total_packs=len(index),
            seed=0,
            order="sequential",
            warmup_steps=0,
            _num_targets=index.sums("labels"),
            _num_tokens=index.sums("length"),
        )

    @property
    def seq_len(self) -> int:
        return self.index.seq_len

    @property
    def steps(self) -> int:
        return self.first_step - (-(self.total_packs - self.first_pack) // self.batch_packs)

    def packs(self, step: int) -> NDArray[np.int64]:
        """The packs of a step, in the order of the data. The last step may have fewer than the others."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        at, end = self._consumed(step), self._consumed(step + 1)
        parts = [np.empty(0, np.int64)]
        while at < end:
            epoch, offset = divmod(at, self.epoch_packs)
            count = min(end - at, self.epoch_packs - offset)
            parts.append(self._epoch(epoch)[offset : offset + count])
            at += count
        return np.concatenate(parts)

    def num_targets(self, step: int) -> int:
        """Trained tokens of the global batch: the loss denominator."""
        return int(self._num_targets[self.packs(step)].sum())

    def tokens(self, step: int) -> int:
        """Tokens of documents in the global batch, padding excluded."""
        return int(self._num_tokens[self.packs(step)].sum())

    def padding(self, step: int) -> int:
        """Tokens of padding in the global batch."""
        packs = self.packs(step)
        return len(packs) * self.seq_len - int(self._num_tokens[packs].sum())

    def consumed(self, steps: int) -> DataPosition:
        """The position in the data after `steps` steps. A checkpoint records it, and a resumed run compares it."""
        packs = self._consumed(steps)
        epoch, offset = divmod(packs, self.epoch_packs)
        return DataPosition(step=steps, packs=packs, epoch=epoch, pack_in_epoch=offset, plan=self.digest)

    def _consumed(self, steps: int) -> int:
        """The packs that `steps` steps consume."""
        if steps < self.first_step:
            return min(steps * self.batch_packs, self.first_pack)
        return min(self.first_pack + (steps - self.first_step) * self.batch_packs, self.total_packs)

    def goes_on(self, position: DataPosition, train: Train) -> StepPlan:
        """The plan from a recorded position on, as the same plan with fewer epochs or steps has left it: its last batch may
        have been a smaller one, and the next batch begins behind it. Raises SftError for a position in other data or another
        order, and where nothing is left."""
        epoch, offset = divmod(position.packs, self.epoch_packs)
        short = position.step * self.batch_packs - position.packs
        if (position.plan, position.epoch, position.pack_in_epoch) != (self.digest, epoch, offset) or short < 0:
            self.check(position)
        total = position.packs + (train.steps - position.step) * self.batch_packs if train.steps else self.total_packs
        if total < position.packs:
            raise self.nothing_left(position, train)
        if self._consumed(position.step) == position.packs:
            return self
        plan = replace(self, first_step=position.step, first_pack=position.packs, total_packs=total)
        return replace(plan, warmup_steps=warmup_steps(train, plan.steps))

    def nothing_left(self, position: DataPosition, train: Train) -> SftError:
        """The error for a step that has all steps of this plan, or more."""
        field, value = ("steps", str(train.steps)) if train.steps else ("epochs", f"{train.epochs:g}")
        return SftError(
            f"[train] {field} = {value}: they count from the start of the data, and step{position.step} has"
            f" {position.packs / self.epoch_packs:.3g} epochs, {position.step} steps; next: raise {field}"
        )

    def check(self, position: DataPosition) -> int:
        """The number of steps consumed at a recorded position. Raises SftError for a position in other data or another order."""
        expected = self.consumed(position.step).to_value()
        recorded = position.to_value()
        different = {k: (recorded[k], v) for k, v in expected.items() if recorded[k] != v}
        if different:
            raise SftError(
                f"checkpoint: its data position differs from this plan's (recorded, here): {different}; next: start a new run"
            )
        return position.step

    @property
    def digest(self) -> str:
        """Plans with equal digests have the same tokens in every step that both have."""
        text = f"{self.index.digest} {self.batch_packs} {self.epoch_packs} {self.seed} {self.order}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def describe(self) -> StepSummary:
        """The plan in numbers, for `make show`, doctor, manifests and reports."""
        sums = np.array(list(self._sums()), dtype=np.int64).reshape(-1, 2)
        targets, losses = sums[:, 0][sums[:, 1] > 0], self.index.losses
        positions = self.total_packs * self.seq_len
        tokens = int(sums[:, 1].sum())
        return StepSummary(
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            epochs=self.total_packs / self.epoch_packs,
            packs=len(self.index),
            packs_per_batch=self.batch_packs,
            packs_dropped_per_epoch=len(self.index) - self.epoch_packs if len(self.index) else 0,
            last_batch_packs=len(self.packs(self.steps - 1)) if self.steps else 0,
            order=self.order,
            seq_len=self.seq_len,
            tokens=tokens,
            padding=positions - tokens,
            padding_fraction=1 - tokens / positions if positions else 0.0,
            fill=float(self._num_tokens.sum() / (len(self.index) * self.seq_len)) if len(self.index) else 0.0,
            trained_tokens=int(targets.sum()),
            trained_tokens_per_step=TokensPerStep(
                min=int(targets.min()) if len(targets) else 0,
                mean=float(targets.mean()) if len(targets) else 0.0,
                max=int(targets.max()) if len(targets) else 0,
            ),
            documents=losses.documents,
            documents_per_pack=len(self.index.segments) / len(self.index) if len(self.index) else 0.0,
            long_documents=losses.long_documents,
            long_documents_policy=self.index.policy,
            unlabelled_pieces=losses.unlabelled_pieces,
            tokens_lost=losses.tokens_lost,
            tokens_lost_fraction=losses.tokens_lost / losses.tokens if losses.tokens else 0.0,
            trained_tokens_lost=losses.labels_lost,
            trained_tokens_lost_fraction=losses.labels_lost / losses.labels if losses.labels else 0.0,
            exact=losses.exact,
            digest=self.digest,
        )

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                self._orders.pop(min(self._orders), None)
            self._orders[epoch] = epoch_order(len(self.index), self.seed, epoch, self.order)
        return self._orders[epoch]

    def _sums(self) -> Iterator[tuple[int, int]]:
        """(targets, tokens) of every step."""
        for step in range(self.steps):
            packs = self.packs(step)
            yield int(self._num_targets[packs].sum()), int(self._num_tokens[packs].sum())


def accumulation(batch_packs: int, seq_len: int, ranks: int, microbatch_tokens: int = 0) -> tuple[int, int]:
    """(microbatches per step, packs per microbatch) of every rank. Raises SftError, with the numbers, for a remainder.

    `microbatch_tokens` 0 is one pack.
    """
    microbatch_tokens = microbatch_tokens or seq_len
    packs, rest = divmod(microbatch_tokens, seq_len)
    if rest or not packs:
        raise SftError(
            f"microbatch_tokens {microbatch_tokens} is not a multiple of seq_len {seq_len}; next: correct it"
        )
    count, rest = divmod(batch_packs, ranks * packs)
    if rest or not count:
        tokens, unit = batch_packs * seq_len, ranks * microbatch_tokens
        below, above = tokens // unit * unit, -(-tokens // unit) * unit
        nearest = " or ".join(str(n) for n in dict.fromkeys((below, above)) if n)
        raise SftError(
            f"global_batch_tokens {tokens} is not a multiple of {ranks} ranks x microbatch_tokens {microbatch_tokens} = {unit}; "
            f"next: use {nearest}, or change microbatch_tokens or the number of ranks"
        )
    return count, packs


def context_groups(model: ModelConfig, train: Train, hardware: Hardware, ranks: int) -> int:
    """The number of groups of `context_degree` ranks. The ranks of a group compute their microbatches together.

    Raises SftError, with the numbers, for a degree that does not divide the ranks, the attention heads or the tokens.
    """
    degree = hardware.context_degree
    tokens = hardware.microbatch_tokens or train.seq_len
    for what, count in (
        ("ranks", ranks),
        ("query heads of the model", model.n_heads),
        ("tokens of a microbatch", tokens),
        *(("heads of the Gated DeltaNet", heads) for heads in model.shared_heads),
    ):
        if count % degree:
            all_counts = (ranks, model.n_heads, tokens, *model.shared_heads)
            possible = [n for n in range(1, min(ranks, 64) + 1) if not any(count % n for count in all_counts)]
            raise SftError(
                f"context_degree {degree} does not divide the {count} {what}; next: use one of {', '.join(map(str, possible))}"
            )
    if model.n_kv_heads % degree and degree % model.n_kv_heads:
        raise SftError(
            f"context_degree {degree} and the {model.n_kv_heads} key/value heads of the model: one must divide the other; next: another context_degree"
        )
    return ranks // degree


def nothing_left(index: PackIndex) -> str:
    """Why there is no pack: no document has a trained token within seq_len."""
    losses = index.losses
    if not losses.documents:
        return "[train] the dataset is empty, 0 tokens of 0 documents; next: check its sources and make prepare again"
    if losses.long_documents < losses.documents:
        return f"[train] none of the {losses.documents} documents has a trained token; next: check the masks with make preview"
    shortest = "" if losses.shortest is None else f" (the shortest document has {losses.shortest} tokens)"
    return (
        f"[train] all {losses.documents} documents lose every trained token to seq_len {index.seq_len}{shortest}; next: raise"
        " [train] seq_len, or shorten the prompts"
    )
