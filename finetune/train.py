"""One training run, top to bottom: read, check, measure, train, measure, save, reload, report.

Decides the order of things and what is written where. Everything is checked before the first
optimizer step, and no adapter is called done before the core has reloaded it and given lists the
scores that training saw.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers

from qwen3_reranker import Reranker
from qwen3_reranker.call.arguments import check_template
from qwen3_reranker.checkpoint.locate import locate
from qwen3_reranker.errors import InputError, Qwen3RerankerError
from qwen3_reranker.model import loading

from . import losses
from .adapter import save_adapter
from .checkpoints import Checkpoints, Start, is_complete, starting_point
from .config import RerankerArguments
from .evaluate import Evaluation, compare_sets
from .groups import GroupDataset, Sampling
from .output import UNFINISHED, commit, only_run, publish, space_warnings, writing
from .preflight import (
    answer_mass,
    mass_warnings,
    one_sided_warnings,
    preflight,
    quantization_warnings,
)
from .reading import Say, file_lines, paraphrases, read_data, write_rejected
from .report import Report, summary_lines, write_report
from .served import next_step
from .settings import deciding_settings
from .trainee import Base, Trainee, load_trainee
from .trainer import GroupTrainer

_PARITY = {"float32": 1e-4}
"""Largest difference of log-odds between training and the reloaded adapter; else `_HALF_PARITY`."""
_HALF_PARITY = 0.5


def train(
    arguments: RerankerArguments,
    base: Base,
    training: transformers.TrainingArguments,
    say: Say = print,
) -> Path:
    """Fine-tune a yes/no cross-encoder and prove what it gained.

    Args:
        arguments: Data, objective and evaluation.
        base: The model and its LoRA settings.
        training: The Trainer's arguments; `output_dir` gets the adapter, the run and the report.
        say: Called with each line that the user should see, by the first process alone.

    Returns:
        The folder of the adapter; `Reranker(base, adapter=folder)` serves it.

    Raises:
        DataError: With every fault of the data.
        ModelLoadError: If the base cannot be trained.
        InputError: If the output folder holds another run, or one is writing to it; or if the
            processes cannot share a step.
        StoppedError: If a signal stopped it; its state is saved.
        WriteError: If the disk is full; earlier checkpoints are whole.
        Qwen3RerankerError: If the reloaded adapter does not score as in training.
    """
    output = Path(str(training.output_dir))
    _check_processes(training)
    if training.process_index:
        say = _nothing
    data = read_data(arguments, say)
    transformers.set_seed(training.seed)
    template = check_template(arguments.template)
    trainee = load_trainee(base, device=training.device, template=template)
    if arguments.adapter is not None:
        trainee.go_on_from(locate(arguments.adapter, None, "adapter")[0])
    max_length = min(arguments.max_length, trainee.max_positions)
    budget = arguments.max_batch_tokens or loading.default_batch_tokens(
        training.device, trainee.full.config, next(trainee.network.parameters()).dtype
    )
    dataset = GroupDataset(data.rows, trainee.tokenizer, sampling(arguments, training, max_length))
    mass = answer_mass(trainee, dataset[0], training.device)
    warnings = [
        *mass_warnings(mass),
        *quantization_warnings(base),
        *one_sided_warnings(data.rows, arguments.loss),
    ]
    for line in preflight(trainee, dataset, training, arguments, budget, mass):
        say(line)
    for warning in warnings:
        say(f"WARNING: {warning}")
    if arguments.dry_run:
        say("Dry run: nothing was trained. Leave out --dry_run to train.")
        return output
    deciding = deciding_settings(arguments, training, base, trainee, data)
    output.mkdir(parents=True, exist_ok=True)
    with only_run(output) if training.should_save else nullcontext():
        if is_complete(output, deciding, allow_changed=arguments.allow_changed):
            say(f"'{output}' is already complete; nothing was changed.")
            return output
        start = starting_point(
            output, training.resume_from_checkpoint, deciding, say=say,
            allow_changed=arguments.allow_changed, needs_best=training.load_best_model_at_end,
        )  # fmt: skip
        kept = training.save_total_limit
        safe = Checkpoints(output, deciding, limit=kept, num_bytes=trainee.num_bytes)
        for warning in space_warnings(output, trainee.num_bytes, (kept or 1) + 1):
            say(f"WARNING: {warning}")
        write_rejected(data, output)
        everything = Evaluation(trainee, data.lists, max_length, budget, arguments.relevant_from)
        if data.lists:
            say("Ranking the evaluation sets before training.")
        before = everything.score()
        watched = everything.without(data.guards).sample(arguments.max_eval_queries, training.seed)
        history = _optimise(arguments, training, trainee, dataset, watched, budget, safe, start)
        if data.lists:
            say("Ranking them with the trained model.")
        after = everything.score()
        if not training.should_save:
            return output
        unfinished = output / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing(unfinished, trainee.num_bytes):
            save_adapter(unfinished, trainee, base, arguments, training, data.files, history)
        _check_reloaded(unfinished, base, trainee, everything, after)
        report = Report(
            title=f"{base.name} fine-tuned",
            base=base.name,
            tuned=str(output),
            settings=_settings(arguments, training, base, mass, max_length),
            data=[line for file in data.files for line in file_lines(file)],
            sets=compare_sets(
                data.lists, before, after, data.guards, relevant_from=arguments.relevant_from
            ),
            history=history,
            warnings=warnings,
            next_step=next_step(*_served(base, output)),
        )
        with writing(unfinished, trainee.num_bytes):
            names = publish(unfinished, output)
            write_report(output, report)
            commit(output, [*names, "report.json", "report.html"], deciding)
    for line in summary_lines(report):
        say(line)
    say(f"Report: {output / 'report.html'}")
    say("Next, rerank with it:")
    say(report.next_step)
    return output


def _check_processes(training: transformers.TrainingArguments) -> None:
    if training.n_gpu > 1:  # the Trainer would cut packs into pieces for its DataParallel
        raise InputError(
            f"one process sees {training.n_gpu} GPUs, and each needs its own. Start one for each: "
            f"torchrun --nproc-per-node {training.n_gpu} -m finetune train ..., or show it one by "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(
            "FSDP is set, but lists are ranked between steps by layers that FSDP would have taken "
            "apart. Leave it out: every GPU that serves the model holds it with LoRA, and "
            "--deepspeed recipes/cluster/zero2.json shares out what full fine-tuning adds."
        )


def _nothing(_: str) -> None:
    """Say what other processes say: the first has said it."""


def sampling(
    arguments: RerankerArguments, training: transformers.TrainingArguments, max_length: int
) -> Sampling:
    """Return what an epoch sees of a row."""
    return Sampling(
        num_positives=arguments.num_positives,
        num_negatives=arguments.num_negatives,
        max_length=max_length,
        paraphrases=paraphrases(arguments.paraphrase_file),
        instruction_dropout=arguments.instruction_dropout,
        with_scores=arguments.loss == "distill",
        seed=training.data_seed if training.data_seed is not None else training.seed,
    )


def _optimise(
    arguments: RerankerArguments,
    training: transformers.TrainingArguments,
    trainee: Trainee,
    dataset: GroupDataset,
    watched: Evaluation,
    budget: int,
    safe: Checkpoints,
    start: Start | None,
) -> list[dict[str, float]]:
    """Train, keep the best state, and return what was logged."""
    ended = start and start.ended()
    if start and ended:
        best = start.best() if training.load_best_model_at_end else None
        trainee.load(best or start.checkpoint)
        return list(ended.log_history)
    callbacks: list[transformers.TrainerCallback] = []
    stops_early = arguments.early_stopping_patience and training.eval_strategy != "no"
    if watched.lists and stops_early:
        callbacks.append(early_stopping(arguments.early_stopping_patience))
    ours = copy.copy(training)
    ours.save_total_limit = None  # or the Trainer would delete a checkpoint before the next is safe
    ours.restore_callback_states_from_checkpoint = True  # the patience that early stopping has left
    trainer = GroupTrainer(
        trainee,
        ours,
        dataset,
        loss=group_loss(arguments),
        max_batch_tokens=budget,
        evaluation=watched if watched.lists else None,
        callbacks=callbacks,
        checkpoints=safe,
    )
    with safe.signals:
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start else None)
    safe.stop_if_saved(trainer.state.global_step)
    return list(trainer.state.log_history)


def early_stopping(patience: int) -> transformers.EarlyStoppingCallback:
    """Return a callback that counts on from a checkpoint, but with the patience of this run.

    The Trainer makes it anew from the arguments and under the class's name that the checkpoint has.
    """

    class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
        def __init__(self, **_: Any) -> None:
            super().__init__(patience)

    return EarlyStoppingCallback()


def group_loss(arguments: RerankerArguments) -> losses.GroupLoss:
    """Return the loss that the settings name."""
    if arguments.loss == "distill":
        return {"kl": losses.distill_kl, "margin_mse": losses.distill_margin_mse}[
            arguments.distill_loss
        ]
    return {
        "pointwise": losses.pointwise,
        "listwise": losses.listwise,
        "hybrid": losses.hybrid(arguments.listwise_weight),
    }[arguments.loss]


def _check_reloaded(
    folder: Path,
    base: Base,
    trainee: Trainee,
    evaluation: Evaluation,
    scores: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Score lists again through the core, from disk, and compare with training.

    Without lists it is loaded, which finds weights that do not fit.
    """
    if base.quantization is not None:
        return  # the core serves the adapter on full weights, whose scores are others
    dtype = str(next(trainee.network.decoder.layers.parameters()).dtype).removeprefix("torch.")
    bound = _PARITY.get(dtype, _HALF_PARITY)
    model, adapter = _served(base, folder)
    reloaded = Reranker(
        model, adapter=adapter, revision=base.revision if adapter else None, dtype=dtype,
        device=str(trainee.network.device), max_length=evaluation.max_length,
    )  # fmt: skip
    largest = 0.0
    with reloaded:
        _ = reloaded.loaded
        for name, lists in evaluation.lists.items():
            for each, expected in list(zip(lists, scores[name], strict=True))[:4]:
                ranking = reloaded.rank(each.query, each.texts, instruction=each.instruction)
                for result in ranking:
                    largest = max(largest, abs(result.log_odds - expected[result.index]))
    if not largest <= bound:
        raise Qwen3RerankerError(
            f"the reloaded adapter scores {largest:.2g} in log-odds away from training, bound "
            f"{bound:g}, so it was left in '{folder}'. Please report this with its run.json."
        )


def _served(base: Base, output: Path) -> tuple[str, str | None]:
    """Return model and adapter as the core takes them; full fine-tuning leaves a model."""
    return (str(output), None) if base.peft is None else (base.name, str(output))


def _settings(
    arguments: RerankerArguments,
    training: transformers.TrainingArguments,
    base: Base,
    mass: float | None,
    max_length: int,
) -> dict[str, str]:
    shown = {
        "learning rate": training.learning_rate,
        "groups per step": training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size,
        "epochs": training.num_train_epochs,
        "seed": training.seed,
        "loss": arguments.loss,
        "positives, negatives per group": f"{arguments.num_positives}, {arguments.num_negatives}",
        "max_length": max_length,
        "p(yes) + p(no) of the base": "no vocabulary head" if mass is None else f"{mass:.3f}",
        "LoRA": "none, full fine-tuning"
        if base.peft is None
        else f"r {base.peft.r}, alpha {base.peft.lora_alpha}",
    }
    return {name: str(value) for name, value in shown.items()}
