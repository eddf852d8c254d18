"""What a run can be told, and how a YAML file says it.

Decides names, defaults and help texts of our own settings, and reads YAML strictly. Everything
else a run takes has the names of transformers' `TrainingArguments` and TRL's `ModelConfig`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from qwen3_reranker.errors import DataError, InputError, named, shown

_MOST_BYTES = 128 * 1024
"""Of a file of settings; YAML of one megabyte takes half a minute to read."""


_MOST = 2**31 - 1
"""What any count of a run may be."""


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class RerankerArguments:
    """Data, objective and evaluation of a run; the string of each field is its help text."""

    train_file: list[str] = _setting([], "JSONL (.gz, .xz), Parquet or hf://name training rows.")
    eval_file: list[str] = _setting(
        [], "Candidate lists (JSONL, a TREC run or a BEIR folder), ranked before, during, after."
    )
    guard_file: list[str] = _setting(
        [], "Candidate lists of another domain, ranked before and after."
    )
    instruction: list[str] = _setting(
        [], "Task sentence of rows that have none: one for all, or one per --train_file."
    )
    paraphrase_file: str | None = _setting(
        None, 'JSON {"task sentence": ["other wording", ...]}; one wording is drawn per group.'
    )
    instruction_dropout: float = _setting(
        0.0, "Share of groups that get the template's own instruction instead of theirs."
    )
    adapter: str | None = _setting(
        None, "Adapter of an earlier run to go on from; its LoRA settings must be this run's."
    )
    template: str | None = _setting(None, "Prompt template; default: what the tokenizer expresses.")
    loss: Literal["pointwise", "listwise", "hybrid", "distill"] = _setting(
        "pointwise",
        "pointwise: -log p(yes or no) per document; listwise: softmax of each positive against "
        "the negatives; hybrid: both; distill: teacher scores of the rows.",
    )
    listwise_weight: float = _setting(1.0, "Weight of listwise in hybrid.")
    distill_loss: Literal["kl", "margin_mse"] = _setting("kl", "What distill minimises.")
    num_positives: int = _setting(1, "Positives drawn per group and epoch, at most.")
    num_negatives: int = _setting(7, "Negatives drawn per group and epoch, at most.")
    relevant_from: int = _setting(1, "Smallest graded label that counts as relevant.")
    max_length: int = _setting(1024, "Tokens per pair; only a document's end is ever cut.")
    max_batch_tokens: int | None = _setting(
        None, "Tokens per forward; splits a step and never changes it. Default: by device."
    )
    max_eval_queries: int | None = _setting(None, "Lists per file during training; default: all.")
    early_stopping_patience: int = _setting(3, "Evaluations without a gain before the end; 0: off.")
    skip_bad: bool = _setting(False, "Leave faulty rows out, and list them in the run's folder.")
    allow_leaks: bool = _setting(False, "Train although evaluation queries stand in the rows.")
    allow_changed: bool = _setting(
        False, "Resume although settings or data are not those of the checkpoint."
    )
    dry_run: bool = _setting(False, "Stop after the checks that precede training.")

    def __post_init__(self) -> None:
        if not self.train_file:
            raise InputError("there is no training data. Pass --train_file FILE.")
        if len(self.instruction) not in (0, 1, len(self.train_file)):
            raise InputError(
                f"--instruction has {len(self.instruction)} values for {len(self.train_file)} "
                "training files. Pass one for all, or one per file."
            )
        if not 0 <= self.instruction_dropout <= 1:
            raise InputError(
                "--instruction_dropout must be between 0 and 1, got "
                f"{shown(self.instruction_dropout)}. It is a share of the groups."
            )
        if not 0 <= self.listwise_weight <= _MOST:  # also NaN
            raise InputError(
                f"--listwise_weight must be a number from 0, got {shown(self.listwise_weight)}. It "
                "is what listwise counts beside pointwise."
            )
        if not 0 <= self.early_stopping_patience <= _MOST:
            raise InputError(
                f"--early_stopping_patience must be from 0 to {_MOST}, got "
                f"{shown(self.early_stopping_patience)}. It counts evaluations; 0 never stops "
                "early."
            )
        for name in (
            "num_positives", "num_negatives", "max_length", "max_batch_tokens", "max_eval_queries",
            "relevant_from",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                bound = "at least 1" if value < 1 else f"at most {_MOST}"
                raise InputError(
                    f"--{name} must be {bound}, got {shown(value)}. Leave it out for the default."
                )

    def instruction_of(self, file: int) -> str | None:
        """Return the task sentence of a training file's rows that have none."""
        if not self.instruction:
            return None
        return self.instruction[file if len(self.instruction) > 1 else 0]


DEFAULTS: dict[str, str] = {
    "learning_rate": "1e-4",
    "num_train_epochs": "1",
    "per_device_train_batch_size": "8",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "0.1",
    "weight_decay": "0.0",
    "logging_steps": "5",
    "eval_strategy": "steps",
    "eval_steps": "0.1",
    "save_strategy": "steps",
    "save_total_limit": "2",
    "load_best_model_at_end": "true",
    "metric_for_best_model": "ndcg@10",
    "greater_is_better": "true",
    "remove_unused_columns": "false",
    "dataloader_pin_memory": "false",  # batches are lists of ids, not tensors
    "output_dir": "qwen3-reranker-finetuned",
}
"""Where a run's defaults differ from those of the libraries."""

SHOWN = (
    *RerankerArguments.__dataclass_fields__,
    "model_name_or_path", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules", "use_rslora", "use_dora", "load_in_4bit",
    "output_dir", "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "activation_checkpointing", "gradient_checkpointing",  # the second before transformers 5.19
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "seed",
    "logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "report_to",
)  # fmt: skip
"""What `--help` shows; `--help_all` shows the rest."""


def read_yaml(path: str, known: Iterable[str]) -> list[str]:
    """Return a YAML file's settings as command-line arguments.

    Every scalar stays the text it is, so that `no` is not false and `1e-4` is not a string in
    disguise: types and choices are checked once, where the command line's are.

    Raises:
        DataError: With file and line, if it is no flat mapping, or a key is unknown or repeated.
    """
    root = _compose(path)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"{path}:1: must be a mapping of settings, one 'name: value' per line.")
    arguments, seen, names = [], set(), set(known)
    for key, value in root.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise DataError(f"{place}: a setting's name must be a word. Write 'name: value'.")
        if key.value in seen:
            raise DataError(f"{place}: {named(key.value)} is set twice. Keep one of them.")
        seen.add(key.value)
        if key.value not in names:
            raise DataError(f"{place}: {unknown(key.value, names)}")
        arguments += _arguments(key.value, value, place)
    return arguments


def _compose(path: str) -> yaml.Node | None:
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise DataError(f"'{path}' has more than {_MOST_BYTES} bytes. Pass a file of settings.")
        root: yaml.Node | None = yaml.compose(raw.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except DataError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read ({type(error).__name__}). Check it.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        # What stands in quotes may be of the file.
        problem = re.sub(r"'.*'", "...", error.problem or "it cannot be parsed", flags=re.DOTALL)
        raise DataError(f"'{path}' is not YAML{where}: {problem}. Correct that line.") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # ValueError and OverflowError: an escape of a character that there is not.
        raise DataError(f"'{path}' is not YAML ({type(error).__name__}). Correct it.") from error
    return root


def unknown(name: str, known: Iterable[str]) -> str:
    """Return the message about an unknown setting, with the nearest known one."""
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else " See --help_all."
    return f"there is no setting {named(name)}.{hint}"


def _arguments(name: str, value: yaml.Node, place: str) -> list[str]:
    items = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise DataError(f"{place}: '{name}' must be one value or a list of values.")
    if not items or (len(items) == 1 and items[0].tag == "tag:yaml.org,2002:null"):
        return []  # `name:` and `name: null` leave the default
    return [f"--{name}", *(item.value for item in items)]
