"""The recipe for Ray, with a line in a side file for every batch that its actors score.

python -m tests.bulk_run SIDE_FILE RECIPE [arguments of the recipe]
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

from qwen3_reranker import bulk

side_file = ""


class CountingScorer(bulk.BulkScorer):
    """Writes the ids of a batch when it is scored."""

    def __call__(self, batch: Any) -> Any:
        scored = super().__call__(batch)
        line = json.dumps([int(id) for id in batch["id"]]) + "\n"
        file = os.open(side_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())  # in one piece, whoever else writes
        os.close(file)
        return scored


if __name__ == "__main__":
    side_file, *sys.argv = sys.argv[1:]
    bulk.BulkScorer = CountingScorer  # type: ignore[misc]
    runpy.run_path(sys.argv[0], run_name="__main__")
