"""What a user should see before time is spent, and what they should be warned of.

Decides what is shown of a run and which bases look wrong for it. Changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import transformers

from qwen3_reranker.errors import DataError

from .config import RerankerArguments
from .data import TrainingGroup
from .groups import Example, GroupDataset, training_packs
from .trainee import Base, Trainee

_PREVIEWED = 256
_EXPECTED_MASS = 0.5
"""A model that knows the prompt answers it: below this, it probably does not."""


def preflight(
    trainee: Trainee,
    dataset: GroupDataset,
    training: transformers.TrainingArguments,
    arguments: RerankerArguments,
    budget: int,
    mass: float | None,
) -> Iterator[str]:
    """Yield what a user should see before time is spent."""
    trained = sum(p.numel() for p in trainee.network.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainee.network.parameters())
    yield f"Trained parameters: {trained:,} of {everything:,} ({trained / everything:.2%})"
    examples = [dataset[i] for i in range(min(_PREVIEWED, len(dataset)))]
    sizes = np.array([example.num_tokens for example in examples])
    documents = sum(len(example.targets) for example in examples)
    cut = sum(map(sum, (example.encoded.truncated for example in examples)))
    low, middle, high = np.percentile(sizes, [5, 50, 95]).astype(int)
    yield f"Tokens per group (5 %, median, 95 %): {low}, {middle}, {high}; first {len(examples)}"
    yield f"Documents cut to --max_length: {cut / documents:.1%} of {documents}"
    per_step = (
        training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
    )
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(len(dataset) / per_step))
    yield f"Optimizer steps: {steps}, {per_step} groups each; up to {budget} tokens per forward"
    yield f"Loss: {arguments.loss}; head and documents packed, {trainee.backend} attention"
    yield "First prompt, as the model reads it:"
    first = examples[0].encoded
    ids = np.concatenate([first.head, first.documents[0]])
    yield "  | " + trainee.decode(ids).replace("\n", "\n  | ")
    if mass is not None:
        yield f"p(yes) + p(no) over the whole vocabulary: {mass:.3f}"


@torch.no_grad()
def answer_mass(trainee: Trainee, example: Example, device: torch.device) -> float | None:
    """Return the base model's p(yes) + p(no) over the vocabulary after a prompt of the run."""
    trainee.network.eval()
    size = example.num_tokens
    (packed,) = training_packs(
        [example], max_batch_tokens=size, backend=trainee.backend, device=device
    )
    return trainee.answer_mass(packed.pack)


def mass_warnings(mass: float | None) -> list[str]:
    """Return what a base that does not answer the prompt calls for."""
    if mass is None or mass >= _EXPECTED_MASS:
        return []
    return [
        f"The base model gives yes and no together a probability of {mass:.3f} after this prompt. "
        "Is the template another? A base that is no reranker has to learn to answer first; one "
        "that was trained on the difference of yes and no, as here, is fine."
    ]


def one_sided_warnings(rows: Sequence[TrainingGroup], loss: str) -> list[str]:
    """Return what groups call for that have nothing to compare.

    Raises:
        DataError: If the loss compares, and no group has a positive and a negative.
    """
    if loss not in ("listwise", "hybrid"):
        return []
    one_sided = sum(not (row.positive and row.negative) for row in rows)
    if loss == "listwise" and one_sided == len(rows):
        raise DataError(
            "no row has both a positive and a negative, so the listwise loss would compare nothing "
            "and train nothing. Mine negatives (qwen3-finetune mine), or pass --loss pointwise."
        )
    if not one_sided:
        return []
    return [
        f"{one_sided} of {len(rows)} rows have no positive or no negative: the listwise loss is 0 "
        "there. Mine negatives with qwen3-finetune mine."
    ]


def quantization_warnings(base: Base) -> list[str]:
    """Return what the figures of a quantised base call for."""
    if base.quantization is None:
        return []
    return [
        "The figures are those of the quantised base, but the adapter is served on full weights. "
        "Measure it there with qwen3-finetune evaluate."
    ]
