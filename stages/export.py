#!/usr/bin/env python3
"""The dataset of a run as a folder for OLMo-core's own training scripts; see sft.data.interop.

    python stages/export.py runs/<run> DST

Refuses a dataset whose documents OLMo-core would take apart, and a DST that exists. Exit status 0, or 1 with a message.
"""

import sys
from pathlib import Path

from sft.common.errors import SftError
from sft.common.process import report_errors
from sft.data.interop import olmo_core_export

if __name__ == "__main__":
    with report_errors("export"):
        if len(sys.argv) != 3 or not sys.argv[2]:
            raise SftError("a run and a folder are needed; next: make export RECIPE=x DST=folder")
        size = olmo_core_export(Path(sys.argv[1]) / "prepare", Path(sys.argv[2]))
        print(f"[export] {sys.argv[2]}: {size:,} bytes for OLMo-core")
