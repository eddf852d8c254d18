"""Three optimizer steps on one process or several: `torchrun ... -m tests.training_run`.

Every process writes what it holds in the end, so that a test can compare them. Group sizes are
ragged, and with two processes the second one sees no positives.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file

from finetune.data import TrainingGroup
from finetune.groups import GroupDataset, Sampling
from finetune.losses import hybrid
from finetune.trainee import Base, load_trainee
from finetune.trainer import GroupTrainer
from tests import texts

STEPS = 3
GROUPS_PER_STEP = 4


def rows() -> list[TrainingGroup]:
    """Return groups in an order in which the later half of each step has no positives."""
    pool = [document for _, document in texts.ordinary_pairs(60)]
    made = []
    for i in range(STEPS * GROUPS_PER_STEP):
        count = 2 + 5 * i % 13  # documents
        documents = [pool[(7 * i + k) % len(pool)] for k in range(count)]
        positives = 0 if i % GROUPS_PER_STEP >= GROUPS_PER_STEP // 2 else 1
        made.append(TrainingGroup(f"query {i}", documents[:positives], documents[positives:], None))
    return made


class Unwrapped(GroupTrainer):
    """A mistake: calls the network past the wrapper whose hooks exchange gradients."""

    def training_step(self, model: torch.nn.Module, *rest: Any) -> torch.Tensor:  # type: ignore[override]
        return super().training_step(self._trainee.network, *rest)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--deepspeed")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--unwrapped", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    output = Path(arguments.output)
    training = transformers.TrainingArguments(
        output_dir=str(output), use_cpu=True, max_steps=STEPS, learning_rate=1e-2,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        per_device_train_batch_size=GROUPS_PER_STEP // world // arguments.accumulation,
        gradient_accumulation_steps=arguments.accumulation, deepspeed=arguments.deepspeed,
        train_sampling_strategy="sequential", remove_unused_columns=False,
        dataloader_pin_memory=False, ddp_find_unused_parameters=False, disable_tqdm=True,
        adam_epsilon=1e-3,  # or Adam's first steps are the signs of gradients, down to rounding
    )  # fmt: skip
    peft = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    transformers.set_seed(rank)  # the wrapper has to make the start the same
    trainee = load_trainee(Base(arguments.model, peft=peft), device=torch.device("cpu"),
                           template=None)  # fmt: skip
    if world == 1 or rank == 0:
        generator = torch.Generator().manual_seed(0)
        for _, parameter in trainable(trainee.network):
            parameter.data.normal_(std=0.05, generator=generator)
    sampling = Sampling(num_positives=3, num_negatives=15, max_length=512)
    trainer = (Unwrapped if arguments.unwrapped else GroupTrainer)(
        trainee,
        training,
        GroupDataset(rows(), trainee.tokenizer, sampling),
        loss=hybrid(1.0),
        max_batch_tokens=600,
        evaluation=None,
    )
    trainer.train()
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in trainable(trainee.network)}
    save_file(weights, output / f"rank{rank}.safetensors")
    told = {
        "world": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (output / f"rank{rank}.json").write_text(json.dumps(told))


def trainable(network: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, each) for name, each in network.named_parameters() if each.requires_grad]


if __name__ == "__main__":
    main()
