"""A run's export to the Hugging Face hub (make push-hub RECIPE=x REPO=org/name [PUSH=1]); see sft.export.push.

python stages/push_hub.py runs/<run> --repo org/name [--push 1|public] | --card
"""

import sys

from sft.export.push import main

if __name__ == "__main__":
    sys.exit(main())
