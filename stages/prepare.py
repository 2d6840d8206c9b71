"""Chat data to token ids, loss mask and document boundaries, with the mask proof; see sft.data.prepare.

    python stages/prepare.py runs/<run> [--cluster NAME] [--data FOLDERS] [field=value …]

With SHARD=i/n in the environment it encodes every n-th chunk into the cache and publishes nothing (one task of an array
job). SHARD=merge/n then checks that all n parts are there and publishes. Exit status 0, or 1 with a message.
"""

import os
import sys

from sft.data.prepare import prepare, prepare_part
from sft.data.shard import Shard
from sft.runner.cli import RunOptions, program, run_options
from sft.runner.stage import open_stage, run_stage


@program("prepare", "stages/prepare.py")
@run_options
def main(options: RunOptions) -> None:
    """Chat data to token ids, loss mask and document boundaries, with the mask proof."""
    shard = Shard.parse(os.environ.get("SHARD", ""))
    if shard.part is None:
        run_stage("prepare", options, lambda stage: prepare(stage, shard), shared=True)
        return
    with open_stage("prepare", options, follower=True) as stage:
        prepare_part(stage, shard)


if __name__ == "__main__":
    sys.exit(main())
