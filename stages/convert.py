"""Converts a run's trained checkpoint into a Hugging Face folder, proven equal before it is published.

In:  runs/<run>/train (final step, tokenizer), runs/<run>/prepare/dataset.json. With [convert] model: the step that it names.
Out: runs/<run>/convert/model, gate.json, manifest.json.
Run: python stages/convert.py runs/<run> [--cluster local] [field=value ...]
"""

from sft.export.other_model import convert_any
from sft.runner.stage import main

if __name__ == "__main__":
    main("convert", convert_any)
