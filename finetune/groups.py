"""From training rows to packs: which documents of a row are seen, under which instruction.

Decides what is sampled in which epoch and what travels together. The same row, epoch and seed give
the same documents on every machine. Packs are the core's; a group is never split, because its
loss needs all its scores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from qwen3_reranker.data.jsonl import Faults
from qwen3_reranker.engine.packing import Group, Pack, Seat, build_pack
from qwen3_reranker.errors import InputError
from qwen3_reranker.text.tokenizer import EncodedGroup, PromptTokenizer

from .data import TrainingGroup


@dataclass(frozen=True, slots=True)
class Sampling:
    """What an epoch sees of a row.

    Attributes:
        num_positives: Positives per group, at most.
        num_negatives: Negatives per group, at most.
        max_length: Tokens per pair, prompt included.
        paraphrases: Task sentence -> other wordings, one of all drawn per group.
        instruction_dropout: Probability that a group gets the template's own instruction.
        with_scores: Whether targets are the teacher scores of the rows instead of 1 and 0.
        seed: Together with epoch and row it decides everything.
    """

    num_positives: int = 1
    num_negatives: int = 7
    max_length: int = 1024
    paraphrases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    instruction_dropout: float = 0.0
    with_scores: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """A group as the model sees it: token ids, and a target per document, aligned.

    Attributes:
        encoded: Token ids of the query and of each document.
        targets: What the scores should become.
        row: Position of the group among the accepted rows of all training files.
    """

    encoded: EncodedGroup
    targets: list[float]
    row: int

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes for it."""
        return len(self.encoded.head) + sum(map(len, self.encoded.documents))


class GroupDataset(Dataset[Example]):
    """Rows as examples, drawn anew each epoch.

    Raises:
        InputError: If targets are teacher scores and a row has none.
        DataError: With every row whose query and instruction leave no room for a document.
    """

    def __init__(
        self, rows: Sequence[TrainingGroup], tokenizer: PromptTokenizer, sampling: Sampling
    ) -> None:
        without = [i for i, row in enumerate(rows, 1) if row.scores is None]
        if sampling.with_scores and without:
            raise InputError(
                f"{len(without)} of {len(rows)} rows have no teacher scores, the first is row "
                f"{without[0]}, but the loss is distill. Add "
                '"scores": {"positive": [...], "negative": [...]} to every row.'
            )
        self._rows = rows
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._epoch = 0
        if faults := Faults("The training data", self._without_room()):
            raise faults.error()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the Trainer calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row, sampling = self._rows[index], self._sampling
        # Of strings, random.Random makes the same seed in every process.
        rng = random.Random(f"{sampling.seed} {self._epoch} {index}")  # noqa: S311
        num_positives = len(row.positive)
        chosen = [
            *_draw(rng, range(num_positives), sampling.num_positives),
            *_draw(
                rng,
                range(num_positives, num_positives + len(row.negative)),
                sampling.num_negatives,
            ),
        ]
        documents = [*row.positive, *row.negative]
        encoded = self._tokenizer.encode_group(
            self._instruction(rng, row.instruction),
            row.query,
            [documents[i] for i in chosen],
            max_length=sampling.max_length,
        )
        targets = row.scores if sampling.with_scores else None
        if targets is None:
            targets = [1.0] * num_positives + [0.0] * len(row.negative)
        return Example(encoded, [targets[i] for i in chosen], index)

    def _without_room(self) -> Iterator[str]:
        """Yield what is wrong with rows that no epoch may draw; better now than after hours."""
        for number, row in enumerate(self._rows, 1):
            try:
                for instruction in self._instructions(row.instruction):
                    self._tokenizer.encode_group(
                        instruction, row.query, [], max_length=self._sampling.max_length
                    )
            except InputError as error:
                yield f"row {number}: {error}"

    def _instructions(self, instruction: str | None) -> Iterator[str | None]:
        """Yield all that a group may be trained under."""
        if instruction is None or self._sampling.instruction_dropout:
            yield None
        if instruction is not None:
            yield from self._wordings(instruction)

    def _instruction(self, rng: random.Random, instruction: str | None) -> str | None:
        if instruction is None or rng.random() < self._sampling.instruction_dropout:
            return None
        return rng.choice(self._wordings(instruction))

    def _wordings(self, instruction: str) -> list[str]:
        return [instruction, *self._sampling.paraphrases.get(instruction, ())]


def _draw(rng: random.Random, places: range, count: int) -> Sequence[int]:
    return places if len(places) <= count else rng.sample(places, count)


@dataclass(frozen=True, slots=True)
class TrainingPack:
    """One forward of whole groups.

    Attributes:
        pack: What the model gets; its documents are those of the examples, in order.
        targets: One tensor per group, shape (documents,).
    """

    pack: Pack
    targets: list[torch.Tensor]


def training_packs(
    examples: Sequence[Example], *, max_batch_tokens: int, backend: str, device: torch.device
) -> Iterator[TrainingPack]:
    """Lay examples out in packs of at most `max_batch_tokens`; a larger group travels alone."""
    waiting: list[Example] = []
    tokens = 0
    for example in examples:
        if waiting and tokens + example.num_tokens > max_batch_tokens:
            yield _pack(waiting, backend, device)
            waiting, tokens = [], 0
        waiting.append(example)
        tokens += example.num_tokens
    if waiting:
        yield _pack(waiting, backend, device)


def _pack(examples: Sequence[Example], backend: str, device: torch.device) -> TrainingPack:
    groups = [Group(example.encoded.head, example.encoded.documents) for example in examples]
    seats = [Seat(i, tuple(range(len(group.documents)))) for i, group in enumerate(groups)]
    return TrainingPack(
        build_pack(groups, seats, backend=backend),
        [torch.tensor(example.targets, device=device) for example in examples],
    )
