"""Puts the prepared dataset and the base weights where the cluster reads them: see sft.sync.sync.

python stages/sync.py runs/<run> [--cluster C] [--data ROOTS] [field=value …]
python stages/sync.py runs/<run> --check …     copies nothing; exit status 0 if all is there and identical
"""

from __future__ import annotations

import sys

from sft.common.process import report_errors
from sft.runner.stage import main, open_stage
from sft.sync.sync import bring, sync

if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        with report_errors("sync"), open_stage("sync", [a for a in sys.argv[1:] if a != "--check"]) as stage:
            remote, _ = bring(stage, check_only=True)
            stage.log(f"complete and identical: {len(remote.files)} files under {stage.storage}")
    else:
        main("sync", sync)
