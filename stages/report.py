"""Writes one self-contained HTML page over whatever stages of a run are done.

In:  runs/<run>/*/manifest.json and the files beside them. Out: runs/<run>/report/index.html, manifest.json.
Run: python stages/report.py runs/<run>
"""

from sft.reporting.report import report
from sft.runner.stage import main

if __name__ == "__main__":
    main("report", report)
