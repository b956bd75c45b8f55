"""``python -m fastllm.build`` compiles the extension in place; all of it is in :mod:`fastllm.extension.compile`."""

import sys

from .extension.compile import main

if __name__ == "__main__":
    sys.exit(main())
