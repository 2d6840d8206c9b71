"""An OLMo-core step to a Hugging Face folder, proven equal (make to-hf SRC=stepN DST=folder); see sft.export.core.

python stages/to_hf.py SRC DST [--tokenizer FOLDER] [--template NAME] [field=value ...]
"""

from sft.export.core import main

if __name__ == "__main__":
    main("to-hf")
