"""The doctor's check of what runs the model in evaluate: transformers, vLLM or a server.

In: [evaluate] backend, the GPUs that evaluate is planned for, the pinned environment. Out: a row of the table. Standard library only.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

from sft.common import paths
from sft.common.machine import gpus
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context, Row
from sft.runner.processes import evaluation_backend, requested_gpus

ENVIRONMENT = paths.REPO / ".venv"
WAIT_S = 3.0


def backend(context: Context) -> Iterator[Row]:
    """The backend that evaluate will have, and why."""
    options = context.recipe.evaluate
    if options.harness != "lm-eval":
        return
    if options.backend == "server":
        yield _server(options.base_url)
        return
    hardware = context.recipe.hardware(context.place.cluster, "evaluate")
    here = context.cluster.launcher == "local" or "evaluate" not in context.cluster.stages
    planned = gpus() if here else requested_gpus("evaluate", hardware, context.cluster)
    if not here and not context.cluster.shared_disk and (planned or options.backend == "vllm"):
        yield Row(SKIPPED, "backend", f"{options.backend}: the job decides, its environment is not here")
        return
    has_vllm = any(ENVIRONMENT.glob("lib/python3*/site-packages/vllm/__init__.py"))
    choice = evaluation_backend(options.backend, planned, has_vllm)
    if choice.backend == "vllm" and not has_vllm:
        yield Row(RED, "backend", f"[evaluate] backend = 'vllm': vLLM is not in {ENVIRONMENT}",
                  ".venv/bin/python -m pip install -e '.[vllm]', or backend = \"hf\"")  # fmt: skip
        return
    yield Row(OK, "backend", f"{choice.backend} ({choice.reason}), {planned or 'no'} GPU{'s' * (planned != 1)}")


def _server(base_url: str) -> Row:
    """The server's models. It need not run before training: the export is not there yet."""
    address = base_url.removesuffix("/completions") + "/models"
    try:
        with urllib.request.urlopen(address, timeout=WAIT_S) as answer:
            names = [model["id"] for model in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Row(NOTE, "backend", f"server: {address}: {error}", "start it with the export before evaluate")
    return Row(OK, "backend", f"server: {address} has {', '.join(names) or 'no model'}")
