"""make show: a resolved recipe with the origin of each value, its model, and the state of its stages. Standard library only."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

from sft.common import columns
from sft.recipe import recipe, schema, typed
from sft.recipe.edit import to_toml
from sft.recipe.options import name_of
from sft.recipe.resolve import resolve
from sft.runner import bases, continuation, listing, plan


def show(place: plan.Place, r: recipe.Recipe) -> None:
    """Prints the run."""
    print(f"# run {place.runs / r.run}\n# recipe {r.file}, cluster {place.cluster}")
    raw = tomllib.loads(Path(r.file).read_text())
    overridden = dict(r.overrides)
    for table in schema.TABLES:
        print(f"\n[{table}]")
        value = getattr(r, table)
        for f in dataclasses.fields(value):
            v, name = getattr(value, f.name), name_of(f)
            if v is None:
                continue
            origin = "override" if f"{table}.{name}" in overridden else "" if name in raw.get(table, {}) else "default"
            if v and isinstance(v, tuple) and dataclasses.is_dataclass(v[0]):
                for item in v:
                    changed = {k: x for k, x in dataclasses.asdict(item).items() if x not in (None, {})}
                    given = ", ".join(f"{k} = {to_toml(x)}" for k, x in changed.items())
                    print(columns.wrapped(f"  {name}: {given}"))
                continue
            line = f"{name} = {to_toml(v)}"
            print(f"{line:47} # {origin}" if origin else line)
    print()
    for stage in schema.STAGES:
        given = _given_hardware(r.hardware(place.cluster, stage))
        print(columns.wrapped(f"[on.{place.cluster}.{stage}]  {given or '# defaults'}"))
    print()
    print(f"# model: {_model(place, r)}")
    print(f"# batch: {r.train.global_batch_tokens // r.train.seq_len} packs of {r.train.seq_len} tokens in a step")
    if continued := continuation.named(r, place.runs):
        print(columns.wrapped(f"# {continuation.line(continued, r)}"))
    for stage, state in plan.states(place, r, reuse=True).items():
        print(f"# {stage:9}{'; '.join(state.reasons) or (f'reuses {state.origin}' if state.origin else 'done')}")
        going = listing.progress(place.runs / r.run / stage) if stage == "train" and state.stale else None
        if going:
            print(f"# {'':9}{going.line(listing.is_alive(place.runs / r.run, going))}")


def _given_hardware(hardware: schema.Hardware) -> str:
    """The numbers that are not the defaults."""
    given = {f.name: getattr(hardware, f.name) for f in dataclasses.fields(hardware)}
    return ", ".join(f"{k} = {to_toml(v)}" for k, v in given.items() if v != typed.HARDWARE_FIELDS[k].default)


def _model(place: plan.Place, r: recipe.Recipe) -> str:
    """The architecture in a line."""
    base = bases.find_base(place.roots, place.runs / r.run, r)
    if base is None and not r.model.preset:
        return f"that of the base {r.model.base}, which make sync brings"
    model = resolve(r.model, 0, base)
    size = "vocabulary of the tokenizer" if not model.vocab_size else f"{model.parameters:,} parameters"
    return f"{model.n_layers} layers x {model.d_model}, {model.n_heads} heads ({model.n_kv_heads} kv), {size}"
