"""`python -m laq_gguf` is the `laq-gguf` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
