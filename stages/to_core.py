"""A Hugging Face folder to an OLMo-core step, proven equal (make to-core SRC=folder DST=step0); see sft.export.olmo_core_steps.

python stages/to_core.py SRC DST
"""

import sys

from sft.export.olmo_core_steps import to_core_program as main

if __name__ == "__main__":
    sys.exit(main())
