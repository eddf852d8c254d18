"""The training step against the same thing written out, on random-weight Qwen3 networks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig

from finetune.data import TrainingGroup
from finetune.groups import Example, GroupDataset, Sampling, training_packs
from finetune.losses import GroupLoss, hybrid, listwise, pointwise
from finetune.trainee import Base, Trainee, load_trainee
from finetune.trainer import GroupTrainer
from qwen3_reranker import DataError
from qwen3_reranker.engine.packing import Group, Seat, build_pack
from tests import texts

CPU = torch.device("cpu")


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})


@pytest.fixture
def trainee(checkpoint: Callable[..., Path]) -> Callable[..., Trainee]:
    """Return a function that loads a base with LoRA weights that are not at their start."""

    def load(seed: int = 0, peft: Any = "lora", **architecture: Any) -> Trainee:
        torch.manual_seed(seed)
        base = Base(str(checkpoint(**architecture)), peft=lora() if peft == "lora" else peft)
        loaded = load_trainee(base, device=CPU, template=None)
        for name, parameter in loaded.network.named_parameters():
            if "lora_B" in name:  # zero at first, so that A would have no gradient
                torch.nn.init.normal_(parameter, std=0.05)
        return loaded

    return load


@pytest.mark.filterwarnings("error")  # what pyproject.toml lets pass, too
def test_lora_on_a_base_warns_of_nothing(trainee: Callable[..., Trainee]) -> None:
    assert any("lora_A" in name for name, _ in trainee().network.named_parameters())


def rows(count: int, seed: int = 3) -> list[TrainingGroup]:
    """Ragged groups: 1 to 15 negatives, 1 to 3 positives."""
    rng = random.Random(seed)
    pool = [document for _, document in texts.ordinary_pairs(60)]
    made = []
    for i in range(count):
        documents = rng.sample(pool, rng.randrange(2, 17))
        positives = rng.randrange(1, min(4, len(documents)))
        made.append(TrainingGroup(f"query {i}", documents[:positives], documents[positives:], None))
    return made


def dataset(trainee: Trainee, groups: Sequence[TrainingGroup], **settings: Any) -> GroupDataset:
    sampling = Sampling(**{"num_positives": 3, "num_negatives": 15, "max_length": 512, **settings})
    return GroupDataset(groups, trainee.tokenizer, sampling)


def test_rows_without_room_are_found_before_training(trainee: Callable[..., Trainee]) -> None:
    groups, long = rows(4), "word " * 600
    groups[1] = replace(groups[1], instruction="short")
    sound = dataset(trainee(), groups, paraphrases={"short": ["as short"], "other": [long]})
    assert len([sound[i] for i in range(4)]) == 4
    groups[2] = replace(groups[2], query=long)
    with pytest.raises(DataError, match=r"2 faults; .*\n  row 2: .*\n  row 3: query"):
        dataset(trainee(), groups, paraphrases={"short": ["as short", long]})


def gradients(trainee: Trainee) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainee.network.parameters() if p.grad is not None])


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def step(
    trainee: Trainee,
    examples: Sequence[Example],
    loss: GroupLoss,
    tmp_path: Path,
    *,
    budget: int = 10_000,
    accumulation: int = 1,
) -> tuple[float, torch.Tensor]:
    """Return the loss and gradients of one optimizer step, by the real trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=len(examples) // accumulation,
    )  # fmt: skip
    trainer = GroupTrainer(
        trainee, arguments, dataset(trainee, rows(1)), loss=loss, max_batch_tokens=budget,
        evaluation=None,
    )  # fmt: skip
    size = len(examples) // accumulation
    batches = iter([list(examples[i : i + size]) for i in range(0, len(examples), size)])
    trainee.network.zero_grad()
    samples, count = trainer.get_batch_samples(batches, accumulation, CPU)
    total = sum(float(trainer.training_step(trainee.network, b, count)) for b in samples)
    return total, gradients(trainee)


@pytest.mark.parametrize(
    "loss", [pointwise, listwise, hybrid(0.7)], ids=["point", "list", "hybrid"]
)
@pytest.mark.parametrize("backend", ["documents", "padded"])
def test_packed_step_equals_pairs_one_by_one(
    trainee: Callable[..., Trainee], loss: GroupLoss, backend: str
) -> None:
    model = trainee()
    examples = [dataset(model, rows(4))[i] for i in range(4)]
    (packed,) = training_packs(examples, max_batch_tokens=10**6, backend=backend, device=CPU)
    model.network.zero_grad()
    scores = model.network(packed.pack).split([len(t) for t in packed.targets])
    together = torch.stack(
        [loss(*pair) for pair in zip(scores, packed.targets, strict=True)]
    ).mean()
    together.backward()
    ours = gradients(model)

    model.network.zero_grad()
    losses = []
    for example in examples:
        alone = [
            model.network(
                build_pack(
                    [Group(example.encoded.head, [document])], [Seat(0, (0,))], backend="padded"
                )
            )
            for document in example.encoded.documents
        ]
        losses.append(loss(torch.cat(alone), torch.tensor(example.targets)))
    apart = torch.stack(losses).mean()
    apart.backward()
    assert together.item() == pytest.approx(apart.item(), rel=1e-4)
    assert relative(ours, gradients(model)) < 1e-4


@pytest.mark.parametrize("budget", [1, 700, 2000])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_no_partition_changes_the_step(
    trainee: Callable[..., Trainee], tmp_path: Path, budget: int, accumulation: int
) -> None:
    model = trainee()
    examples = [dataset(model, rows(8))[i] for i in range(8)]
    whole = step(model, examples, hybrid(1.0), tmp_path, budget=10**6)
    parts = step(model, examples, hybrid(1.0), tmp_path, budget=budget, accumulation=accumulation)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert relative(parts[1], whole[1]) < 1e-5


def test_gradient_checkpointing_changes_nothing(
    trainee: Callable[..., Trainee], tmp_path: Path
) -> None:
    model = trainee()
    examples = [dataset(model, rows(3))[i] for i in range(3)]
    plain = step(model, examples, pointwise, tmp_path)
    model.enable_checkpointing()
    again = step(model, examples, pointwise, tmp_path)
    assert again[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative(again[1], plain[1]) < 1e-5


def test_sampling_is_decided_by_seed_epoch_and_row(trainee: Callable[..., Trainee]) -> None:
    model = trainee()

    def drawn(epoch: int, seed: int) -> list[list[int]]:
        groups = dataset(model, rows(6), num_negatives=2, num_positives=1, seed=seed)
        groups.set_epoch(epoch)
        return [[len(d) for d in groups[i].encoded.documents] for i in range(6)]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(1, 1)
    assert drawn(0, 1) != drawn(0, 2)


def test_instruction_of_a_row_its_paraphrases_and_dropout(
    trainee: Callable[..., Trainee],
) -> None:
    model = trainee()
    row = TrainingGroup("q", ["a"], ["b"], "Task A")

    def heads(**settings: Any) -> set[str]:
        groups = dataset(model, [row] * 60, **settings)
        drawn = {groups[i].encoded.head.tobytes(): groups[i].encoded.head for i in range(60)}
        return {model.decode(head) for head in drawn.values()}

    (only,) = heads()
    assert "<Instruct>: Task A\n" in only
    three = heads(paraphrases={"Task A": ["Task B", "Task C"]})
    assert len(three) == 3
    assert len(heads(instruction_dropout=0.5)) == 2
    (default,) = heads(instruction_dropout=1.0)
    assert model.tokenizer.template.default_instruction in default
