"""An OLMo-core step to a Hugging Face folder, proven equal (make to-hf SRC=stepN DST=folder); see sft.export.olmo_core_steps.

python stages/to_hf.py SRC DST [--tokenizer FOLDER] [--template NAME] [field=value ...]
"""

import sys

from sft.export.olmo_core_steps import to_hf_program as main

if __name__ == "__main__":
    sys.exit(main())
