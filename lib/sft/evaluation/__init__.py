"""Scores of models, with their standard errors, and comparisons of runs."""

import os

# tqdm reads it once, when it is imported. Our own log lines report progress.
os.environ.setdefault("TQDM_DISABLE", "1")
