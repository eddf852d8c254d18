"""`qwen3-finetune`: look at training data before it costs anything.

Decides what is printed. Knows nothing of torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen3_reranker import __version__
from qwen3_reranker.errors import Qwen3RerankerError

_COMMANDS = """commands:
  validate FILE...   check training rows and report every fault
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune",
        description="Prepare the fine-tuning of a yes/no cross-encoder.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = {"validate": _validate}
    parser.add_argument("command", choices=commands, metavar="command")
    command = parser.parse_args(arguments[:1]).command
    try:
        return commands[command](arguments[1:])
    except Qwen3RerankerError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _validate(argv: list[str]) -> int:
    from .data import describe, read_training_file

    parser = argparse.ArgumentParser(
        prog="qwen3-finetune validate",
        description='Check {"query", "positive": [...], "negative": [...], "instruction"?} rows, '
        "labelled pairs, or the layouts of ms-swift and FlagEmbedding; .jsonl, .gz, .xz, Parquet.",
    )
    parser.add_argument("file", nargs="+")
    status = 0
    for path in parser.parse_args(argv).file:
        try:
            file = read_training_file(path)
        except Qwen3RerankerError as error:
            print(error, file=sys.stderr)
            status = 2
        else:
            print(f"{path}: {file.num_rows} rows of {file.num_lines} lines are good")
            for line in describe(file.groups):
                print(f"  {line}")
    return status
