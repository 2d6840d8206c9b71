"""Talks to a model in the terminal (make chat RUN=x), or serves it with vLLM (make serve RUN=x); see sft.evaluation.talk and .serving.

python stages/chat.py [--run runs/x] [--step 300] [--model FOLDER] [--tokens] [--serve [--adapter --data DATA] [--start]]
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from sft.common.columns import say
from sft.common.errors import SftError
from sft.common.library_logs import quiet_libraries
from sft.evaluation import serving, talk
from sft.formats import manifest
from sft.runner import plan
from sft.runner.cli import program


def log(text: str) -> None:
    say(f"[chat] {text}", sys.stderr)


def system_of(run: Path) -> str:
    """[prepare] system of a run; "" where it has none: the template's own default then stays."""
    try:
        return str(manifest.load(run / "prepare" / manifest.NAME).config.get("system", ""))
    except (FileNotFoundError, SftError):
        return ""


@program("chat", "stages/chat.py", signals=False)
@click.option("--run", default="", metavar="RUN", help="Folder of a run; its export, and its system prompt.")
@click.option("--step", default="", metavar="N", help="A kept step of the run's training instead of its export.")
@click.option(
    "--model", default="", metavar="WHERE", help="Another model: a folder, a step, gs://…, s3://… or hf://org/name."
)
@click.option("--device", default="", metavar="NAME", help="cpu or cuda. Default: a GPU if there is one.")
@click.option("--tokens", is_flag=True, help="Show the tokens of replies with their ids.")
@click.option("--serve", is_flag=True, help="Print the command of vLLM that serves the model.")
@click.option("--start", is_flag=True, help="With --serve: start it.")
@click.option("--adapter", is_flag=True, help="With --serve: the base, and the run's adapter beside it.")
@click.option("--data", default="", metavar="DATA", help="Folders that hold the base, separated by ':'.")
def main(
    run: str, step: str, model: str, device: str, tokens: bool, serve: bool, start: bool, adapter: bool, data: str
) -> None:
    """Talks to a model in the terminal, with its own template, stop tokens, system prompt and sampling."""
    if adapter and (not serve or step or model):
        raise SftError("ADAPTER=1 is for make serve RUN=x, whose convert stage wrote the adapter; next: leave it out")
    if not run and not model:
        raise SftError("RUN= or MODEL= is missing; next: make chat RUN=<name of a run>, or MODEL=folder")
    cache = (Path(run).parent if run else Path("runs")) / ".cache"
    quiet_libraries(cache / "chat.log")
    folder = talk.model_folder(Path(run), step, model, cache, log)
    if serve:
        name = Path(run).name or folder.name
        place = plan.Place.parse(str(Path(run).parent), data, "local")
        command = serving.serve_adapter(folder, name, place) if adapter else serving.serve_export(folder, name)
        print(shlex.join(command), flush=True)
        if start:
            if not Path(command[0]).is_file():
                raise SftError(
                    f"{command[0]}: not installed; next: .venv/bin/pip install -e '.[vllm]', on a machine with a GPU"
                )
            os.execv(command[0], command)
        return
    talking = talk.load(folder, device, "" if model else system_of(Path(run)))
    talking.show_tokens = tokens
    log(f"{folder} on {talking.model.device}; {talking.settings()}")
    log(talk.HELP)
    talk.converse(talking, talk.typed(), sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
