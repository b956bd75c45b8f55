"""``PYTHONPATH=fastllm/extension python -m compile`` builds in place and imports nothing else of the package."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
