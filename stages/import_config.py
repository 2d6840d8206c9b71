"""A recipe from another trainer's configuration (make import-config FROM=axolotl.yml); see sft.importing.importer.

python stages/import_config.py FILE [--recipe NAME] [--trainer NAME] [--gpus N]
"""

import sys

from sft.importing.importer import main

if __name__ == "__main__":
    sys.exit(main())
