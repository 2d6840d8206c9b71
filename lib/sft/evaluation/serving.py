"""The command of vLLM that serves a run (make serve): its export, or with ADAPTER=1 its base and its adapter separately.

In: folders of finished stages. Out: the words of a command. Base and adapter are for a server that has several adapters of one base.
"""

from __future__ import annotations

import re
from pathlib import Path

from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.runner.plan import Place

LONGEST = 4096
"""Tokens of the context where config.json names none."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm/config/lora.py of 0.32); its default of 16 refuses an adapter of rank 32."""
VLLM = ".venv/bin/vllm"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def serve_export(export: Path, name: str) -> list[str]:
    """Serves a Hugging Face folder under the run's name."""
    return [VLLM, "serve", str(export), "--served-model-name", name, "--generation-config", "auto", *_where(export)]


def serve_adapter(export: Path, name: str, place: Place) -> list[str]:
    """Serves the published base, and the adapter beside an export under the run's name.

    Tokenizer, chat template and the tokens that end a reply are the export's. Raises SftError for a run without an adapter, for
    one whose base has no Hugging Face folder, and for a rank that vLLM does not know.
    """
    adapter = export.parent / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise SftError(f"{adapter}: no adapter; next: make serve RUN={name}, which serves the complete model")
    config = read_json(adapter / "adapter_config.json")
    rank = next((allowed for allowed in RANKS if allowed >= config["r"]), None)
    if rank is None:
        raise SftError(
            f"{adapter}: rank {config['r']}: vLLM serves at most {RANKS[-1]}; next: make serve RUN={name}, which serves the merged model"
        )
    revision = ["--revision", config["revision"]] if config["revision"] else []
    return [
        VLLM, "serve", _base(config["base_model_name_or_path"] or "", adapter, name, place), *revision,
        "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={adapter}",
        "--tokenizer", str(export), "--generation-config", str(export), *_where(export),
    ]  # fmt: skip


def _base(base: str, adapter: Path, name: str, place: Place) -> str:
    """What vLLM calls the base: a name on the hub or a folder."""
    merged = f"make serve RUN={name}, which serves the merged model"
    found = Path(base)
    if base and not found.is_absolute() and "://" not in base:
        try:
            found = paths.find(place.roots, base, f"{adapter}: the base")
        except SftError:
            if _HUB.fullmatch(base):
                return base
            raise
    if not (found / "config.json").is_file() or (found / "model_and_optim").is_dir():
        raise SftError(f"{adapter}: its base {base or 'of random weights'} is no Hugging Face folder; next: {merged}")
    return str(found)


def _where(export: Path) -> list[str]:
    length = int(read_json(export / "config.json").get("max_position_embeddings") or LONGEST)
    return ["--max-model-len", str(length), "--host", "127.0.0.1", "--port", "8000"]
