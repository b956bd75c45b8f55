"""``python -m fastllm.build`` compiles the extension in place; all of it is in :mod:`fastllm.compiler`."""

import sys

from .compiler import main

if __name__ == "__main__":
    sys.exit(main())
