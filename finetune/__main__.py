"""`python -m finetune` is `qwen3-finetune`."""

import sys

from .cli import main

sys.exit(main())
