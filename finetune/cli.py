"""`qwen3-finetune`: check data, mine negatives, train, evaluate, merge, export.

Decides how settings are written on a command line or in a YAML file. Torch, transformers and TRL
are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from qwen3_reranker import __version__
from qwen3_reranker.errors import InputError, MissingExtraError, Qwen3RerankerError, shown

_COMMANDS = """commands:
  validate FILE...          check training rows and report every fault
  mine --corpus FILE        hard negatives from a corpus, filtered by a teacher
  train [--config FILE]     fine-tune, measure before and after, write adapter and report
  evaluate --eval_file FILE compare a model with and without its adapter
  calibrate --eval_file FILE fit scores to judgments; find the threshold of a precision
  merge --output_dir FOLDER an adapter into its base; or several models or adapters into one
  export --format FORMAT    a model for transformers, vLLM, sentence-transformers or llama.cpp

Each command has --help. A first run:
  qwen3-finetune train --model_name_or_path Qwen/Qwen3-Reranker-0.6B \\
      --train_file train.jsonl --eval_file dev.jsonl --output_dir my-reranker
"""


_MODULES = {
    "mine": "finetune,mine", "evaluate": "finetune", "calibrate": "finetune,calibration",
    "merge": "finetune", "export": "finetune",
}  # fmt: skip
"""Commands that have a module of their name, and the extras it needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status.

    0: done. 2: bad input. 74: a checkpoint could not be written. 130, 143: interrupted, terminated.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune",
        description="Fine-tune yes/no cross-encoders such as Qwen3-Reranker.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands: dict[str, Callable[[list[str]], int]] = {
        "validate": _validate, "train": _train,
        **{name: partial(_module, name) for name in _MODULES},
    }  # fmt: skip
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


def _module(name: str, argv: list[str]) -> int:
    """Run a command's module."""
    try:
        module = import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(name, error.name, _MODULES[name]) from error
    status: int = module.main(argv)
    return status


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


def _train(argv: list[str]) -> int:
    parser = training_parser()
    arguments, model, training = parse_training(parser, argv)
    from .checkpoints import StoppedError
    from .output import WriteError
    from .train import train

    try:
        train(arguments, model, training)
    except (StoppedError, WriteError) as error:
        print(error, file=sys.stderr)
        return error.status
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{error}. Make room, then pass --resume_from_checkpoint true.", file=sys.stderr)
        return os.EX_IOERR
    return 0


def training_parser() -> Any:
    """Return the parser of `train`: our settings, TRL's model settings, the Trainer's.

    Raises:
        MissingExtraError: If TRL or its own requirements are not installed.
    """
    try:
        from trl import ModelConfig, TrlParser  # type: ignore[attr-defined]
    except ImportError as error:
        raise MissingExtraError.of("training", error.name or "trl", "finetune") from error
    from dataclasses import dataclass, field

    from transformers import TrainingArguments

    from .config import RerankerArguments

    @dataclass
    class ModelSettings(ModelConfig):
        use_peft: bool = field(default=True, metadata={"help": "LoRA; false trains all layers."})
        dtype: str | None = field(
            default=None,
            metadata={
                "help": "dtype of the base's weights; default: bfloat16 on CUDA, else float32.",
                "choices": ["bfloat16", "float16", "float32"],
            },
        )
        lora_target_modules: list[str] | None = field(
            default_factory=lambda: ["all-linear"], metadata={"help": "Layers that get LoRA."}
        )

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            # argparse quotes the value, which may be very long.
            short = message if len(message) <= 200 else f"{message[:200]}..."
            raise InputError(f"{short}. See: qwen3-finetune train --help")

    settings: Any = [RerankerArguments, ModelSettings, TrainingArguments]
    parser = Parser(
        settings,
        prog="qwen3-finetune train",
        description="Fine-tune a yes/no cross-encoder. Settings come from --config FILE (YAML) "
        "and from flags, which win.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.set_defaults(save_steps=None)
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("-h", "--help", action="store_true", help="show the settings that matter")
    parser.add_argument("--help_all", action="store_true", help="show every setting")
    return parser


def parse_training(parser: Any, argv: list[str]) -> tuple[Any, Any, Any]:
    """Return our settings, the base and the Trainer's arguments.

    Raises:
        InputError: If a flag is unknown or has the wrong type or value.
        DataError: If the YAML file does, with its line.
    """
    from .config import DEFAULTS, SHOWN, read_yaml, unknown

    known = [
        option[2:] for a in parser._actions for option in a.option_strings if option[:2] == "--"
    ]
    first, _ = _preliminary().parse_known_args(argv)
    if first.help or first.help_all:
        for action in parser._actions:
            if first.help and action.dest not in (*SHOWN, "config", "help", "help_all"):
                action.help = argparse.SUPPRESS
        parser.print_help()
        raise SystemExit(0)
    arguments = [part for name, value in DEFAULTS.items() for part in (f"--{name}", value)]
    if first.config is not None:
        arguments += read_yaml(first.config, known)
    namespace, rest = parser.parse_known_args([*arguments, *argv])
    if rest:
        name = rest[0].removeprefix("--").split("=")[0]
        raise InputError(unknown(name, known))
    return _settings(parser, namespace)


def _preliminary() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help_all", action="store_true")
    return parser


def _settings(parser: Any, namespace: argparse.Namespace) -> tuple[Any, Any, Any]:
    import dataclasses

    from trl import get_peft_config, get_quantization_config  # type: ignore[attr-defined]

    from .trainee import Base

    given = vars(namespace)
    for name, value in given.items():
        if isinstance(value, (int, float)) and not abs(value) < 2**63:  # also NaN
            raise InputError(
                f"--{name} must be a number that a machine can count with, got {shown(value)}. "
                "Pass a smaller one."
            )
    if given["save_steps"] is None:  # the best state can only be kept where it was measured
        given["save_steps"] = given["eval_steps"]
    if not given["eval_file"]:
        given.update(eval_strategy="no", load_best_model_at_end=False)
    try:
        ours, model, training = (
            kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.init})
            for kind in parser.dataclass_types
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{error} See: qwen3-finetune train --help_all") from error
    if not model.model_name_or_path:
        raise InputError("there is no base model. Pass --model_name_or_path NAME.")
    if model.attn_implementation is not None:
        raise InputError(
            f"--attn_implementation is {model.attn_implementation!r}, but packs need the attention "
            "of this package. Leave it out."
        )
    base = Base(
        name=model.model_name_or_path,
        revision=None if model.model_revision == "main" else model.model_revision,
        dtype=model.dtype,
        peft=get_peft_config(model),
        quantization=get_quantization_config(model),
    )
    return ours, base, training
