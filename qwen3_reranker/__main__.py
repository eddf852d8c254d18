"""`python -m qwen3_reranker` is the command `qwen3-reranker`."""

from __future__ import annotations

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
