#!/usr/bin/env python3
"""Chat data to token ids, label mask and document boundaries, with the mask proof; see sft.data.prepare.

    python stages/prepare.py runs/<run> [--cluster C] [--data ROOTS] [field=value …]

With SHARD=i/n in the environment it encodes every n-th chunk into the cache and publishes nothing (one task of an array
job); SHARD=merge/n then checks that all n parts are there and publishes. Exit status 0, or 1 with a message.
"""

import os

from sft.common.process import report_errors
from sft.data.prepare import prepare, prepare_part
from sft.data.shard import Shard
from sft.runner.stage import main, open_stage

if __name__ == "__main__":
    with report_errors("prepare"):
        shard = Shard.parse(os.environ.get("SHARD", ""))
    if shard.part is None:
        main("prepare", lambda stage: prepare(stage, shard), shared=True)
    else:
        with report_errors("prepare"), open_stage("prepare", follower=True) as stage:
            prepare_part(stage, shard)
