"""`python -m ddt_llama.cli` is `ddt`."""

import sys

from ddt_llama.cli import main

sys.exit(main())
