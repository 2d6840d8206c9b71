"""Files of clusters: found by name, read with the user's own values, checked. Standard library only.

find_cluster(Path("env"), "ai2/jupiter-cirrascale-2")     raises: did you mean CLUSTER=ai2-jupiter?
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.recipe import schema, typed

_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY)S?$", re.IGNORECASE)  # a variable whose value is not printed
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # an environment variable

_TORCH = re.compile(r"|image|\d+\.\d+\.\d+(\+[a-z0-9.]+)?")
_PROGRAM = re.compile(r"[A-Za-z0-9./_-]*")
_BUCKET = re.compile(r"(gs|s3)://[A-Za-z0-9][A-Za-z0-9._-]*(/.*)?", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|(gs|s3):", re.IGNORECASE)  # also of a misspelt address, s3:/bucket
_OF_LAUNCHER = re.compile(
    r"SLURM_(JOB|N?TASK|NNODES|NODE|PROCID|LOCALID|RESTART|ARRAY|CPUS_PER)\w*|SFT_(JOB|NODES|NODE_RANK|HEAD)|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
"""Variables that a scheduler, the launcher's script or torchrun sets."""
_WEBHOOKS = ("https://", "http://")


def load_cluster(file: Path) -> schema.Cluster:
    """Reads and checks env/<cluster>.toml, with the user's own values for launching in it. Raises SftError."""
    problems: list[str] = []
    data = {**typed.read_toml(file, "cluster"), **_own_values(file, problems)}
    cluster: schema.Cluster = typed.build(schema.Cluster, data, "", problems)
    shared = [
        name for name in data if f"SFT_{name.upper()}" not in os.environ
    ]  # a variable is for every cluster that reads it
    problems = problems or _check_cluster(cluster) + typed.unread(schema.Cluster, shared, cluster.launcher)
    problems = problems or _check_stages(cluster)
    if problems:
        raise SftError("\n".join(f"{file}: {p}" for p in problems) + "\nnext: correct it; env/local.toml is an example")
    return cluster


def _own_values(file: Path, problems: list[str]) -> dict[str, Any]:
    """A user's values of a cluster: env/mine/<cluster>.toml, which git ignores, then variables such as SFT_WORKSPACE."""
    own = file.parent / "mine" / file.name
    data = typed.read_toml(own, "cluster") if own.is_file() else {}
    problems += [
        f"'{name}' in {own}: only {', '.join(schema.OWN)} can be set there: the others decide where stages run and what"
        " jobs see"
        for name in data
        if name not in schema.OWN
    ]
    hints = typing.get_type_hints(schema.Cluster)
    for name in schema.OWN:
        if (text := os.environ.get(f"SFT_{name.upper()}")) is not None:
            data[name] = typed.parse_value(text, hints[name])
    return {name: value for name, value in data.items() if name in schema.OWN}


def _check_cluster(cluster: schema.Cluster) -> list[str]:
    problems = [f"'env': {name!r} is not a variable's name" for name in cluster.env if not _VARIABLE.fullmatch(name)]
    problems += [
        f"'env': {name} is a secret by its name, and jobs' scripts print and keep this table; next: name it in [secrets] on"
        " Beaker or SkyPilot; elsewhere export it in the shell that runs make"
        for name in cluster.env
        if _SECRET.search(name)
    ]
    problems += [
        f"'env': {name}: set by the scheduler, the launcher or torchrun for each process; remove it"
        for name in cluster.env
        if _OF_LAUNCHER.fullmatch(name)
    ]
    if not cluster.stages:
        problems.append(
            f"'stages' is empty: no stage runs with launcher = {cluster.launcher!r}; name some, or use CLUSTER=local"
        )
    if not _TORCH.fullmatch(cluster.torch):
        problems.append(f"'torch' = {cluster.torch!r}: a version such as 2.13.0+cu129, or image")
    if not _PROGRAM.fullmatch(cluster.python):
        problems.append(f"'python' = {cluster.python!r}: a program's name or path of letters, digits and ./_-")
    problems += [f"'env': {name} = {value!r} contains a NUL" for name, value in cluster.env.items() if "\0" in value]
    problems += [
        *_bad_place("storage", cluster.storage, ("{runs}", "{user}")),
        *_bad_place("runs", cluster.runs, ("{user}",)),
    ]
    if _SCHEME.match(cluster.on_event) and not cluster.on_event.startswith(_WEBHOOKS):
        scheme = cluster.on_event.partition(":")[0]  # the rest of an address is a secret
        problems.append(f"'on_event' = '{scheme}:…': a command, or an address that starts with https:// or http://")
    return problems


def _bad_place(field: str, place: str, placeholders: Sequence[str]) -> Iterator[str]:
    """What makes a place neither a folder nor an address of a bucket. Such a folder would be made silently."""
    inner = place.partition("://")[2] or place.lstrip("/")
    if not place and field == "storage":
        yield f"'{field}' is empty: a folder, gs://bucket/prefix or s3://bucket/prefix is expected"
    elif unknown := [name for name in re.findall(r"\{\w*\}", place) if name not in placeholders]:
        yield f"'{field}' = {place!r}: {unknown[0]} is not replaced, only {' and '.join(placeholders)}"
    elif place.startswith("~") or re.search(r"\$[A-Za-z_{]", place):
        yield f"'{field}' = {place!r}: ~ and $NAME are not expanded; write the whole path"
    elif _SCHEME.match(place) and not _BUCKET.fullmatch(place):
        yield f"'{field}' = {place!r}: a folder, gs://bucket/prefix or s3://bucket/prefix is expected"
    elif re.search(r"[\x00-\x1f\x7f]", place) or {"..", "."} & {*inner.split("/")} or "//" in inner:
        yield f"'{field}' = {place!r}: no '..', '.' and '//' and no control characters are expected in a path"


def _check_stages(cluster: schema.Cluster) -> list[str]:
    problems: list[str] = []
    for stage, numbers in cluster.on.items():
        typed.build(schema.Hardware, numbers, f"on.{stage}", problems)
        problems += typed.unread(schema.Hardware, numbers, cluster.launcher, f" in [on.{stage}]")
        problems += typed.of_other_stages(numbers, stage, f" in [on.{stage}]")
    return problems


def numbers_of_stages(file: Path) -> dict[str, dict[str, Any]]:
    """[on.<stage>] of a cluster's file, {stage: {field: value}}; {} if the file is not valid, which `load_cluster` reports."""
    try:
        return load_cluster(file).on
    except SftError:
        return {}


def find_cluster(folder: Path, name: str) -> Path:
    """The file of a cluster, by its name. Raises SftError, with the file that has the scheduler's name for it."""
    names = sorted(p.stem for p in folder.glob("*.toml"))
    if name in names or not (near := _alias(folder, names, name)):
        return typed.find(folder, name, "cluster")
    raise SftError(f"CLUSTER={name}: no file env/{name}.toml; did you mean CLUSTER={near}? next: correct the name")


def _alias(folder: Path, names: Sequence[str], name: str) -> str:
    """The cluster's file for a name such as ai2/jupiter-cirrascale-2 or jupiter, or "" if there is none."""
    plain = name.lower().replace("/", "-").replace("_", "-")
    for stem in names:
        listed = re.search(
            r"^clusters\s*=\s*\[(.*?)\]", (folder / f"{stem}.toml").read_text(encoding="utf-8"), re.M | re.S
        )
        if listed and f'"{name}"' in listed[1]:
            return stem
    for stem in names:
        if (
            plain == stem
            or plain.startswith(f"{stem}-")
            or stem.endswith(f"-{plain}")
            or plain.startswith(f"{stem.partition('-')[2]}-")
        ):
            return stem
    return ""
