"""The trainers that `benchmarks.training` compares, driven one optimizer step at a time.

Decides what each contender is: ours as `finetune.train` makes it, a plain `Trainer` as a user of
transformers would write it, TRL's `SFTTrainer` on prompt/completion rows. All train the same LoRA
weights on the same groups. Knows nothing of time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from finetune.data import TrainingGroup
from finetune.groups import GroupDataset, Sampling
from finetune.losses import pointwise
from finetune.trainee import Base, load_trainee
from finetune.trainer import GroupTrainer
from qwen3_reranker.model.loading import DTYPES, default_batch_tokens
from tests.official import INSTRUCTION, PREFIX, Official, format_body

from .workload import DisagreementError, count_tokens

NEGATIVES = 7
PAIRS = 1 + NEGATIVES
# Pairs per forward of the plain Trainer, and whether a step's pairs are sorted by length first.
PLAIN = ((8, False), (16, False), (32, False), (8, True))


@dataclass(frozen=True, slots=True)
class Setting:
    """What every contender trains, and where.

    Attributes:
        folder: Checkpoint.
        suffix: Text after the document in its prompt.
        rows: Groups of one optimizer step.
        dtype: Name of the base's dtype; LoRA weights are float32 everywhere, as peft makes them.
        device: "cpu" or "cuda".
        seed: Of the LoRA weights.
    """

    folder: Path
    suffix: str
    rows: list[TrainingGroup]
    dtype: str
    device: str
    seed: int

    def arguments(self, kind: Any, *, batch: int, rows: int, **more: Any) -> Any:
        """Return the Trainer's arguments for steps of `rows` rows in order."""
        return kind(
            output_dir=str(self.folder), use_cpu=self.device == "cpu", report_to="none",
            per_device_train_batch_size=batch, gradient_accumulation_steps=rows // batch,
            train_sampling_strategy="sequential", dataloader_pin_memory=False, **more,
        )  # fmt: skip


class Contender:
    """A trainer whose optimizer steps are run one by one.

    Args:
        name: What tables call it.
        trainer: Has the groups of one step as its training set.
        model: The transformers model inside, whose tokens are counted.
        seed: Of the LoRA weights, none zero: with B = 0, as peft starts, A would have no gradient.
    """

    def __init__(self, name: str, trainer: Any, model: Any, seed: int) -> None:
        self.name = name
        self.tokens = count_tokens(model)
        self._trainer = trainer
        self._batches = trainer.get_train_dataloader()
        self._trained = [p for p in trainer.model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        for parameter in self._trained:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        trainer.create_optimizer()

    def touch_weights(self) -> None:
        """Read every weight: a file's page is in memory from its first use, not from loading."""
        for parameter in self._trainer.model.parameters():
            parameter.sum()

    def step(self) -> None:
        """Run one optimizer step."""
        self.add_gradients()
        self.update()

    def add_gradients(self) -> float:
        """Run the forwards and backwards of a step; return its loss."""
        trainer = self._trainer
        batches, items = trainer.get_batch_samples(
            iter(self._batches), trainer.args.gradient_accumulation_steps, trainer.args.device
        )
        trainer.current_gradient_accumulation_steps = len(batches)
        return sum(float(trainer.training_step(trainer.model, batch, items)) for batch in batches)

    def gradient(self) -> torch.Tensor:
        """Return the gradients that have been added, in one row."""
        return torch.cat([p.grad.flatten() for p in self._trained if p.grad is not None]).cpu()

    def update(self) -> None:
        """Clip the gradients, move the weights, and forget the gradients."""
        trainer = self._trainer
        trainer.accelerator.clip_grad_norm_(self._trained, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()


def list_loaders(setting: Setting) -> list[Callable[[], Contender]]:
    """Return a function for each contender that takes turns, ours first."""
    num_pairs = PAIRS * len(setting.rows)
    plain = [
        partial(load_plain, setting, batch, is_sorted)
        for batch, is_sorted in PLAIN
        if num_pairs % batch == 0
    ]
    return [partial(load_ours, setting), *plain]


def load_ours(setting: Setting) -> Contender:
    """Load the trainer of this repository as `finetune.train` does."""
    device = torch.device(setting.device)
    base = Base(str(setting.folder), dtype=setting.dtype, peft=lora())
    trainee = load_trainee(base, device=device, template=None)
    size = len(setting.rows)
    trainer = GroupTrainer(
        trainee,
        setting.arguments(transformers.TrainingArguments, batch=size, rows=size),
        GroupDataset(setting.rows, trainee.tokenizer, Sampling(num_negatives=NEGATIVES)),
        loss=pointwise,
        max_batch_tokens=default_batch_tokens(device, trainee.full.config, DTYPES[setting.dtype]),
        evaluation=None,
    )
    return Contender("qwen3-reranker", trainer, trainee.full, setting.seed)


def load_plain(setting: Setting, batch: int, is_sorted: bool) -> Contender:
    """Load a plain Trainer; its pairs are tokenized already."""
    official = _load_official(setting)
    rows: list[dict[str, Any]] = [
        {"input_ids": official.prompt_ids(query, document), "target": target}
        for query, document, target in pairs(setting.rows)
    ]
    if is_sorted:
        rows.sort(key=lambda row: len(row["input_ids"]))
    arguments = setting.arguments(
        transformers.TrainingArguments, batch=batch, rows=len(rows), remove_unused_columns=False
    )
    trainer = PairTrainer(official, arguments, rows)
    name = f"Trainer, {batch} pairs" + (", sorted" if is_sorted else "")
    return Contender(name, trainer, trainer.model, setting.seed)


def load_trl(setting: Setting) -> Contender:
    """Load TRL's trainer with its own defaults, but without activation checkpointing."""
    official = _load_official(setting)
    rows = [
        {
            "prompt": PREFIX + format_body(INSTRUCTION, query, document) + setting.suffix,
            "completion": "yes" if target else "no",
        }
        for query, document, target in pairs(setting.rows)
    ]
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_file=str(setting.folder / "tokenizer.json"),
        pad_token="<|endoftext|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
    )
    arguments = setting.arguments(
        SFTConfig, batch=PAIRS, rows=len(rows), gradient_checkpointing=False,
        bf16=setting.dtype == "bfloat16",  # its default, which float32 on a CPU has to refuse
    )  # fmt: skip
    trainer: Any = SFTTrainer(
        official.model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    for (query, document, _), seen in zip(
        pairs(setting.rows), trainer.train_dataset["input_ids"], strict=True
    ):
        # Behind the prompt it puts the answer and an end token.
        if list(seen)[:-2] != official.prompt_ids(query, document):
            raise DisagreementError("TRL reads other prompts")
    return Contender("TRL SFTTrainer", trainer, trainer.model, setting.seed)


class PairTrainer(transformers.Trainer):
    """What a user of transformers would write: padded pairs, the last position's logits, BCE."""

    def __init__(self, official: Official, args: Any, rows: Any) -> None:
        model = get_peft_model(official.model, lora())
        super().__init__(model, args, data_collator=_pad_left, train_dataset=rows)
        self._yes_no = [official.yes, official.no]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean over the batch; the Trainer divides it by the batches of a step."""
        targets = inputs.pop("targets")
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, self._yes_no]
        yes, no = logits.float().unbind(1)
        return pointwise(yes - no, targets)


def lora() -> LoraConfig:
    """Return the LoRA settings of every contender."""
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _pad_left(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    # Left, because `logits_to_keep=1` keeps the last position. The pad id is never looked at.
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, True, padding_side="left"),
        "attention_mask": pad_sequence(
            [torch.ones_like(row) for row in ids], True, padding_side="left"
        ),
        "targets": torch.tensor([row["target"] for row in rows]),
    }


def _load_official(setting: Setting) -> Official:
    return Official(setting.folder, dtype=DTYPES[setting.dtype], suffix=setting.suffix)


def pairs(rows: Sequence[TrainingGroup]) -> Iterator[tuple[str, str, float]]:
    """Yield the query, document and target of every pair, group by group."""
    for row in rows:
        yield from ((row.query, document, 1.0) for document in row.positive)
        yield from ((row.query, document, 0.0) for document in row.negative)
