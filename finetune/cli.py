"""`qwen3-finetune`: look at training data before it costs anything.

Decides what is printed. Knows nothing of torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen3_reranker import __version__
from qwen3_reranker.errors import Qwen3RerankerError

from .data import read_groups


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 done, 2 bad data."""
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune", description="Prepare the fine-tuning of a yes/no cross-encoder."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    validate = commands.add_parser(
        "validate",
        help="check JSONL training rows and report every fault",
        description='Check {"query", "positive": [...], "negative": [...], "instruction"?} rows, '
        "plain, .gz or .xz.",
    )
    validate.add_argument("file", nargs="+")
    arguments = parser.parse_args(argv)
    status = 0
    for file in arguments.file:
        try:
            groups = read_groups(file)
        except Qwen3RerankerError as error:
            print(error, file=sys.stderr)
            status = 2
        else:
            positives = sum(len(group.positive) for group in groups)
            negatives = sum(len(group.negative) for group in groups)
            own = sum(group.instruction is not None for group in groups)
            print(
                f"{file}: {len(groups)} queries, {positives} positives, {negatives} negatives, "
                f"{own} with their own instruction"
            )
    return status
