"""The optimizer step: transformers' Trainer over groups instead of padded rows.

Decides how a step's loss is counted and what is measured in between. Everything about schedules,
devices, logging and checkpoints is the Trainer's.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

from qwen3_reranker.errors import NonFiniteScoreError

from .checkpoints import Checkpoints
from .evaluate import Evaluation
from .groups import Example, GroupDataset, training_packs
from .losses import GroupLoss
from .output import verify
from .trainee import Trainee

logger = logging.getLogger(__name__)


class GroupTrainer(transformers.Trainer):
    """Trains a packed network; a batch is a list of examples, `num_items` counts groups.

    A step's loss is the mean over all its groups, over gradient accumulation and processes alike,
    so that neither the token budget nor the number of devices changes what is learnt.

    Args:
        trainee: Its network is trained and called; its full model is saved.
        args: The Trainer's arguments.
        rows: Training groups.
        loss: Loss of one group.
        max_batch_tokens: Tokens per forward; splits a step, never changes it.
        evaluation: What `evaluate` measures, or None.
        callbacks: As the Trainer's.
        checkpoints: Makes what is saved safe to go on from, or None.
    """

    def __init__(
        self,
        trainee: Trainee,
        args: transformers.TrainingArguments,
        rows: GroupDataset,
        *,
        loss: GroupLoss,
        max_batch_tokens: int,
        evaluation: Evaluation | None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        if args.gradient_checkpointing:
            trainee.enable_checkpointing()
            # Or the Trainer would ask the network for it, under either of its two names.
            args.gradient_checkpointing = False
            args.activation_checkpointing = False
        super().__init__(
            trainee.network,
            args,
            data_collator=_as_batch,
            train_dataset=rows,
            eval_dataset=rows,  # never read: `evaluate` has lists of its own
            callbacks=[*(callbacks or []), *([checkpoints] if checkpoints else [])],
        )
        self._finite = _FiniteOrStop()
        self.add_callback(self._finite)
        self._trainee = trainee
        self._loss = loss
        self._max_batch_tokens = max_batch_tokens
        self._evaluation = evaluation
        self._checkpoints = checkpoints
        self._groups, self._tokens, self._since = 0, 0, perf_counter()

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Example]], torch.Tensor]:
        """Return the batches of one optimizer step and its number of groups on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(map(len, batches)), device=device)
        return batches, self.accelerator.gather(count).sum()

    def training_step(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        inputs: Sequence[Example],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Add the gradients of one batch; return its share of the step's mean loss."""
        model.train()
        device = self.args.device
        packs = list(
            training_packs(
                inputs,
                max_batch_tokens=self._max_batch_tokens,
                backend=self._trainee.backend,
                device=device,
            )
        )
        assert num_items_in_batch is not None, "get_batch_samples counts the groups"  # noqa: S101
        # Processes average their gradients, but the count is already that of all of them.
        scale = self.accelerator.num_processes / num_items_in_batch
        idle = self._most(len(packs)) - len(packs)
        total = torch.zeros((), device=device)
        for i, packed in enumerate([*packs, *[packs[-1]] * idle]):
            with self._gradients_held(model) if i + 1 < len(packs) + idle else nullcontext():
                with self.compute_loss_context_manager():
                    sizes = [len(targets) for targets in packed.targets]
                    log_odds = model(packed.pack).split(sizes)
                losses = [self._loss(*pair) for pair in zip(log_odds, packed.targets, strict=True)]
                share = torch.stack(losses).sum() * (scale if i < len(packs) else 0)
                self._backward(share)
            total += share.detach()
            self._tokens += len(packed.pack.token_ids) if i < len(packs) else 0
        self._groups += len(inputs)
        self._finite.see(inputs, total)
        return total

    def _most(self, count: int) -> int:
        """Return the largest count of any process.

        Ragged groups fill more packs on one process than on another, but each forward and
        backward of a sharded model is a meeting of them all, so the others repeat a pack for it.
        """
        counts = self.accelerator.gather(torch.tensor(count, device=self.args.device))
        return int(counts.max())

    @contextmanager
    def _gradients_held(self, model: torch.nn.Module) -> Iterator[None]:
        """Add gradients up without exchanging them, and without a step of DeepSpeed."""
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(syncs)

    def _backward(self, loss: torch.Tensor) -> None:
        if self.is_deepspeed_enabled:
            # Or it would divide by the accumulation steps, which the count covers already.
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Rank the frozen lists, log and return the metrics."""
        if self._evaluation is None:
            return {}
        start = perf_counter()
        measured, warnings = self._evaluation.measure()
        self._since += perf_counter() - start  # training's speed is without it
        metrics = {f"eval_{key}": value for key, value in measured.items()}
        self.log(metrics)
        for warning in warnings:
            logger.warning("Step %d, %s", self.state.global_step, warning)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and beside a loss how fast it goes and how much memory it took."""
        if "loss" in logs:
            seconds = perf_counter() - self._since
            count = self.accelerator.num_processes  # of which each takes a share
            logs["groups/s"] = round(count * self._groups / seconds, 2)
            logs["tokens/s"] = round(count * self._tokens / seconds)
            logs["memory_gb"] = round(_peak_memory_gb(self.args.device), 2)
            self._groups, self._tokens, self._since = 0, 0, perf_counter()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        safe = self._checkpoints
        with nullcontext() if safe is None else safe.saving(self.args, self.state):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self._trainee.save(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._trainee.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self._checkpoints is not None:
            verify(best)
        self._trainee.load(best)


class _FiniteOrStop(transformers.TrainerCallback):
    """Ends a run before a loss or gradient that is not finite reaches the weights."""

    def __init__(self) -> None:
        self._rows: list[int] = []

    def see(self, examples: Sequence[Example], loss: torch.Tensor) -> None:
        """Take note of a batch.

        Raises:
            NonFiniteScoreError: If its loss is not finite.
        """
        rows = [example.row for example in examples]
        if not torch.isfinite(loss):
            raise _not_finite("loss", rows)
        self._rows += rows

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Look at the gradients of a step.

        Raises:
            NonFiniteScoreError: If one is not finite.
        """
        rows, self._rows = self._rows, []
        if args.fp16:
            return  # its loss scaler skips such a step, and tries a smaller scale
        gradients = [p.grad for p in parts["model"].parameters() if p.grad is not None]
        # Of a sharded model each process sees its part, and one that ends, ends them all.
        local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        if local and not torch.stack(torch._foreach_norm(local, torch.inf)).isfinite().all():
            raise _not_finite("gradient", rows)


def _not_finite(what: str, rows: Sequence[int]) -> NonFiniteScoreError:
    numbers = ", ".join(str(row + 1) for row in sorted(rows))
    return NonFiniteScoreError(
        f"the {what} is not finite. The step saw rows {numbers}, counted from 1 over the accepted "
        "rows of all training files. The last checkpoint is from before it: look at their texts "
        "and scores, or lower --learning_rate."
    )


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kilobytes on Linux


def _as_batch(examples: list[Example]) -> Any:
    return examples
