"""The mean of several checkpoints as a step of its own (make soup RUN=x STEPS="100 200" DST=folder); see sft.export.soup.

python stages/soup.py DST STEP… [--run RUN] [--weights "1 2"]
"""

import sys

from sft.export.soup import main

if __name__ == "__main__":
    sys.exit(main())
