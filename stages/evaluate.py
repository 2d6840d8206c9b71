"""Scores a run's export with lm-eval and records every score with its error, or fails saying why there is none.

In:  runs/<run>/convert/model or [convert] model, the recipe's tasks, the validation split of runs/<run>/prepare.
Out: runs/<run>/evaluate/results.json, samples/, manifest.json.
Run: python stages/evaluate.py runs/<run> [--cluster local] [--data FOLDERS] [field=value ...]
"""

from sft.evaluation.evaluate import evaluate
from sft.runner.stage import main

if __name__ == "__main__":
    main("evaluate", evaluate)
