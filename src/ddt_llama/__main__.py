"""`python -m ddt_llama` is `ddt`; torchrun starts several processes by it."""

import sys

from ddt_llama.cli import main

if __name__ == "__main__":
    sys.exit(main())
