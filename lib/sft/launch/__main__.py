"""Runs a stage through a launcher: python -m sft.launch <launcher> runs/<run> <stage> COMMAND…"""

import sys

from sft.launch.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
