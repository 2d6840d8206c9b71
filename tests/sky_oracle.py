"""Runs in the Python of a real SkyPilot, for tests/test_sky_real.py: what it makes of task files, and its names, as JSON.

    python tests/sky_oracle.py FILE…        in a HOME of its own, whose price list (~/.sky/catalogs) is the small one written here

SkyPilot's own code reads and checks the files and chooses a machine. No server is started and nothing is asked of the network.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

CATALOG = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,SpotPrice,Region,AvailabilityZone,GpuInfo
8x_H100,H100,8,160,1440,24.0,12.0,US,US-1,
1x_H100,H100,1,20,180,3.0,1.5,US,US-1,
8x_A100,A100-80GB,8,96,960,12.0,6.0,US,US-1,
cpu_small,,,8,32,0.2,0.1,US,US-1,
"""


ACCELERATORS = """AcceleratorName,MemoryInGB,Clouds
H100,80,"RunPod,Lambda"
A100-80GB,80,"RunPod,Lambda"
"""


def main(files: list[str]) -> None:
    from sky.catalog import common

    folder = Path.home() / ".sky" / "catalogs" / common.constants.CATALOG_SCHEMA_VERSION
    (folder / "common").mkdir(parents=True, exist_ok=True)
    (folder / "common" / "accelerators.csv").write_text(ACCELERATORS)
    for cloud in ("runpod", "lambda"):
        (folder / cloud).mkdir(parents=True, exist_ok=True)
        (folder / cloud / "vms.csv").write_text(CATALOG)
        (folder / cloud / "images.csv").write_text("Tag,Region,OS,OSVersion,ImageId,CreationDate\n")
    import sky
    from sky import check, clouds, dag, exceptions, optimizer
    from sky.client.cli import command
    from sky.jobs import state
    from sky.schemas.api import responses

    enabled = [clouds.RunPod(), clouds.Lambda()]
    check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: enabled
    made: dict[str, Any] = {"tasks": {}, "chosen": {}}
    for file in files:
        task = sky.Task.from_yaml(file)
        task.validate_name()
        made["tasks"][file] = task.to_yaml_config()
        if any(r.cloud is None or isinstance(r.cloud, (clouds.RunPod, clouds.Lambda)) for r in task.resources):
            with dag.Dag() as graph:
                graph.add(task)
            optimizer.Optimizer.optimize(graph, quiet=True)
            best = task.best_resources
            made["chosen"][file] = [str(best.cloud), best.instance_type, best.use_spot, best.accelerators]
    words = {
        "launch": command.jobs_launch,
        "queue": command.jobs_queue,
        "logs": command.jobs_logs,
        "cancel": command.jobs_cancel,
    }
    made["options"] = {
        name: [o for p in found.params for o in (*p.opts, *p.secondary_opts)] for name, found in words.items()
    }
    made["states"] = [s.value for s in state.ManagedJobStatus]
    made["ends"] = [s.value for s in state.ManagedJobStatus.terminal_statuses()]
    made["fields"] = list(responses.ManagedJobRecord.model_fields)
    made["log_codes"] = [int(code) for code in exceptions.JobExitCode if code.name != "NOT_FOUND"]
    made["version"], made["seconds"] = sky.__version__, time.process_time()
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1:])
