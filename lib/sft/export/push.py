"""Uploads a run's export to the Hugging Face hub, or lists what it would upload.

In:  runs/<run>/convert, whose every byte is verified first; HF_TOKEN from the environment.
Out: one commit in a repository, which is private unless PUSH=public. README.md is written again, with the scores measured so far.
     Every file's hash on the hub is compared.

    make push-hub RECIPE=x REPO=org/name            # lists files and sizes, uploads nothing
    make push-hub RECIPE=x REPO=org/name PUSH=1     # uploads; PUSH=public makes the repository public
    make card RECIPE=x                              # only prints the model card
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import huggingface_hub

from sft.common.columns import say
from sft.common.errors import SftError
from sft.export import card
from sft.formats import gate, manifest
from sft.formats.gate import GateRecord
from sft.runner import plan
from sft.runner.cli import RunOptions, program, run_options
from sft.storage.hub import same_as_hub

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def push(
    place: plan.Place, run: str, repo: str, mode: str, log: Callable[[str], None], overrides: Sequence[str] = ()
) -> str:
    """Uploads the run's export to `repo` and returns the commit's address. Raises SftError.

    mode: "1" for a private repository, "public" for a public one, "" to list only (returns "").
    """
    if not REPO.fullmatch(repo):
        raise SftError(f"REPO={repo}: expected org/name; next: make push-hub RECIPE=… REPO=org/name")
    if mode not in ("", "1", "public"):
        raise SftError(f"PUSH={mode}: expected 1 (private) or public; next: correct it, or leave it out to list only")
    folder, text = export_of(place, run, overrides)
    files = {p.name: p for p in sorted((folder / "model").iterdir()) if p.name != "README.md"}
    log(f"{repo} ({'public' if mode == 'public' else 'private'}), from {folder / 'model'}:")
    for name, file in files.items():
        log(f"  {file.stat().st_size:>15,}  {name}")
    log(f"  {len(text.encode()):>15,}  README.md (made now)")
    log(f"  {sum(f.stat().st_size for f in files.values()):>15,}  bytes in {len(files) + 1} files")
    if not mode:
        log("nothing was sent; next: the same with PUSH=1")
        return ""
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        raise SftError("HF_TOKEN is not set; next: export HF_TOKEN=… with a token that may write to " + repo)
    try:
        return _send(repo, files, text.encode(), token, private=mode != "public")
    except SftError:
        raise
    except Exception as error:  # the hub's client raises many types
        lines = str(error).replace(token, "<HF_TOKEN>").strip().splitlines() or [type(error).__name__]
        raise SftError(
            f"{repo}: {type(error).__name__}: {' '.join(lines)[:500]}; next: check REPO=, what HF_TOKEN may do and the network"
        ) from None


def export_of(place: plan.Place, run: str, overrides: Sequence[str] = ()) -> tuple[Path, str]:
    """The convert folder of a run, every byte verified, and its current model card. Raises SftError for a stale export."""
    recipe = plan.load_run(place, run, overrides)
    folder = place.runs / run / "convert"
    state = plan.states(place, recipe)["convert"]
    again = f"next: make convert RECIPE={recipe.name}" + "".join(f" {k}={v}" for k, v in recipe.overrides)
    if state.manifest is None or state.stale:
        raise SftError(f"{folder}: stale ({'; '.join(state.reasons)}); {again}")
    if broken := manifest.broken_outputs(folder, state.manifest.outputs):
        raise SftError("\n".join(broken) + f"\n{again} after removing {folder / manifest.NAME}")
    return folder, card.of_run(place.runs / run, recipe, GateRecord.read(folder / gate.NAME))


def _send(repo: str, files: dict[str, Path], text: bytes, token: str, private: bool) -> str:
    api = huggingface_hub.HfApi(token=token)
    url = str(api.create_repo(repo, private=private, exist_ok=True))
    if private and not api.model_info(repo).private:  # it existed before, and everyone would see the files
        raise SftError(f"{repo}: is public; next: PUSH=public if that is meant, or another REPO=")
    adds = [huggingface_hub.CommitOperationAdd(name, str(file)) for name, file in files.items()]
    adds.append(huggingface_hub.CommitOperationAdd("README.md", text))
    done = api.create_commit(repo, adds, commit_message="Export with its proof")
    reported = {s.rfilename: s for s in api.model_info(repo, revision=done.oid, files_metadata=True).siblings or []}
    if wrong := [name for name, f in files.items() if name not in reported or not same_as_hub(f, reported[name])]:
        raise SftError(f"{repo}: the hub has other bytes for {', '.join(wrong)}; next: push again")
    return f"{url}/commit/{done.oid}"


@program("push-hub", "stages/push_hub.py")
@run_options
@click.option("--repo", default="", metavar="ORG/NAME", help="Repository on the hub.")
@click.option("--push", "visibility", default="", help="1 sends to a private repository, 'public' to a public one.")
@click.option("--card", is_flag=True, help="Print the model card and do nothing else.")
def main(options: RunOptions, repo: str, visibility: str, card: bool) -> None:
    """Sends a run's export to the Hugging Face hub. Without --push it only lists the files."""
    if card:
        print(export_of(options.place, options.run.name, options.overrides)[1], end="")
        return

    def log(line: str) -> None:
        say(f"[push-hub] {line}")

    if url := push(options.place, options.run.name, repo, visibility, log, options.overrides):
        log(f"uploaded, every file's hash compared: {url}")
