"""One training run, top to bottom: read, check, measure, train, measure, save, reload, report.

Decides the order of things and what is written where. Everything is checked before the first
optimizer step, and no adapter is called done before the core has reloaded it and given the scores
that training saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from qwen3_reranker import Reranker, checkpoint, inputs, loading
from qwen3_reranker.candidates import CandidateList
from qwen3_reranker.errors import DataError, Qwen3RerankerError

from . import losses
from .adapter import save_adapter
from .config import RerankerArguments
from .data import TrainingFile, TrainingGroup, check_leaks, describe, read_training_file
from .evaluate import Evaluation, compare_sets, next_step, read_lists
from .groups import GroupDataset, Sampling
from .preflight import answer_mass, mass_warnings, preflight, quantization_warnings
from .report import Report, summary_lines, write_report
from .trainee import Base, Trainee, load_trainee
from .trainer import GroupTrainer

_PARITY = {"float32": 1e-4}
"""Largest difference of log-odds between training and the reloaded adapter; else `_HALF_PARITY`."""
_HALF_PARITY = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Data:
    """Everything a run reads.

    Attributes:
        files: Training files as they were read.
        rows: Their groups.
        lists: Judged candidate lists by set; those of `guards` are never trained towards.
        guards: Names of the sets of another domain.
    """

    files: list[TrainingFile]
    rows: list[TrainingGroup]
    lists: dict[str, list[CandidateList]]
    guards: frozenset[str]


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
        say: Called with each line that the user should see.

    Returns:
        The folder of the adapter; `Reranker(base, adapter=folder)` serves it.

    Raises:
        DataError: With every fault of the data.
        ModelLoadError: If the base cannot be trained.
        Qwen3RerankerError: If the reloaded adapter does not score as in training.
    """
    output = Path(str(training.output_dir))
    data = read_data(arguments, say)
    transformers.set_seed(training.seed)
    trainee = load_trainee(base, device=training.device, template=_template(arguments))
    if arguments.adapter is not None:
        trainee.go_on_from(checkpoint.locate(arguments.adapter, None)[0])
    max_length = min(arguments.max_length, trainee.max_positions)
    budget = arguments.max_batch_tokens or loading.default_batch_tokens(
        training.device, trainee.full.config, next(trainee.network.parameters()).dtype
    )
    dataset = GroupDataset(data.rows, trainee.tokenizer, sampling(arguments, training, max_length))
    mass = answer_mass(trainee, dataset[0], training.device)
    warnings = [*mass_warnings(mass), *quantization_warnings(base)]
    for line in preflight(trainee, dataset, training, arguments, budget, mass):
        say(line)
    for warning in warnings:
        say(f"WARNING: {warning}")
    if arguments.dry_run:
        say("Dry run: nothing was trained. Leave out --dry_run to train.")
        return output
    output.mkdir(parents=True, exist_ok=True)
    _write_rejected(data, output)
    everything = Evaluation(trainee, data.lists, max_length, budget)
    if data.lists:
        say("Ranking the evaluation sets before training.")
    before = everything.score()
    history = _optimise(arguments, training, trainee, dataset, everything, data.guards, budget)
    if data.lists:
        say("Ranking them with the trained model.")
    after = everything.score()
    save_adapter(output, trainee, base, arguments, training, data.files, history)
    _check_reloaded(output, base, trainee, everything, after)
    report = Report(
        title=f"{base.name} fine-tuned",
        base=base.name,
        adapter=str(output),
        settings=_settings(arguments, training, base, mass),
        data=[line for file in data.files for line in _file_lines(file)],
        sets=compare_sets(data.lists, before, after, data.guards),
        history=history,
        warnings=warnings,
        next_step=next_step(*_served(base, output)),
    )
    write_report(output, report)
    for line in summary_lines(report):
        say(line)
    say(f"Report: {output / 'report.html'}")
    say("Next, rerank with it:")
    say(report.next_step)
    return output


def read_data(arguments: RerankerArguments, say: Say) -> Data:
    """Read and check training rows and candidate lists.

    Raises:
        DataError: With every fault of every file, or the leaks between the two.
    """
    faults: list[str] = []
    files: list[TrainingFile] = []
    for number, path in enumerate(arguments.train_file):
        try:
            files.append(
                read_training_file(
                    path,
                    instruction=arguments.instruction_of(number),
                    relevant_from=arguments.relevant_from,
                    skip_bad=arguments.skip_bad,
                )
            )
        except DataError as error:
            faults.append(str(error))
    lists: dict[str, list[CandidateList]] = {}
    try:
        lists = read_lists([*arguments.eval_file, *arguments.guard_file])
    except DataError as error:
        faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    for file in files:
        for line in _file_lines(file):
            say(line)
    rows = [group for file in files for group in file.groups]
    if not rows:
        raise DataError("no training rows are left. Correct the faults listed as rejected.")
    leaks = check_leaks(rows, lists)
    # A corpus shared by many queries is usual; a query shared by both sides is not.
    grave = [leak for leak in leaks if "training positives of other queries" not in leak]
    if grave and not arguments.allow_leaks:
        raise DataError(
            "evaluation and training overlap, so that the figures would flatter:\n"
            + "\n".join(grave)
            + "\nTake those rows out of training, or pass --allow_leaks."
        )
    for leak in leaks:
        say(f"WARNING: {leak}")
    names = list(lists)
    return Data(files, rows, lists, frozenset(names[len(arguments.eval_file) :]))


def sampling(
    arguments: RerankerArguments, training: transformers.TrainingArguments, max_length: int
) -> Sampling:
    """Return what an epoch sees of a row."""
    return Sampling(
        num_positives=arguments.num_positives,
        num_negatives=arguments.num_negatives,
        max_length=max_length,
        paraphrases=_paraphrases(arguments.paraphrase_file),
        instruction_dropout=arguments.instruction_dropout,
        with_scores=arguments.loss == "distill",
        seed=training.data_seed if training.data_seed is not None else training.seed,
    )


def _optimise(
    arguments: RerankerArguments,
    training: transformers.TrainingArguments,
    trainee: Trainee,
    dataset: GroupDataset,
    everything: Evaluation,
    guards: frozenset[str],
    budget: int,
) -> list[dict[str, float]]:
    """Train, keep the best state, and return what was logged."""
    watched = everything.without(guards).sample(arguments.max_eval_queries, training.seed)
    callbacks: list[transformers.TrainerCallback] = []
    if watched.lists and arguments.early_stopping_patience:
        callbacks.append(transformers.EarlyStoppingCallback(arguments.early_stopping_patience))
    trainer = GroupTrainer(
        trainee,
        training,
        dataset,
        loss=group_loss(arguments),
        max_batch_tokens=budget,
        evaluation=watched if watched.lists else None,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    return list(trainer.state.log_history)


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
    output: Path,
    base: Base,
    trainee: Trainee,
    evaluation: Evaluation,
    scores: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Score lists again through the core, from disk, and compare with training."""
    if base.quantization is not None:
        return  # the core serves the adapter on full weights, whose scores are others
    dtype = str(next(trainee.network.decoder.layers.parameters()).dtype).removeprefix("torch.")
    bound = _PARITY.get(dtype, _HALF_PARITY)
    model, adapter = _served(base, output)
    reloaded = Reranker(
        model, adapter=adapter, revision=base.revision if adapter else None, dtype=dtype,
        device=str(trainee.network.device), max_length=evaluation.max_length,
        template=trainee.tokenizer.template,
    )  # fmt: skip
    largest = 0.0
    with reloaded:
        for name, lists in evaluation.lists.items():
            for each, expected in list(zip(lists, scores[name], strict=True))[:4]:
                ranking = reloaded.rank(each.query, each.texts, instruction=each.instruction)
                for result in ranking:
                    largest = max(largest, abs(result.log_odds - expected[result.index]))
    if not largest <= bound:
        raise Qwen3RerankerError(
            f"the reloaded adapter scores {largest:.2g} in log-odds away from training, bound "
            f"{bound:g}, so '{output}' must not be used. Please report this with run.json."
        )


def _served(base: Base, output: Path) -> tuple[str, str | None]:
    """Return model and adapter as the core takes them; full fine-tuning leaves a model."""
    return (str(output), None) if base.peft is None else (base.name, str(output))


def _template(arguments: RerankerArguments) -> Any:
    return inputs.template(arguments.template)


def _paraphrases(path: str | None) -> dict[str, list[str]]:
    if path is None:
        return {}
    try:
        content: dict[str, list[str]] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' is not valid JSON. Correct it.") from error
    is_valid = isinstance(content, dict) and all(
        isinstance(wordings, list) and all(isinstance(wording, str) for wording in wordings)
        for wordings in content.values()
    )
    if not is_valid:
        raise DataError(
            f"'{path}' must map task sentences to lists of other wordings, all strings. Correct it."
        )
    return content


def _file_lines(file: TrainingFile) -> list[str]:
    counts = f"{file.num_rows} rows accepted, {len(file.rejected)} rejected"
    return [f"{file.path}: {counts}, sha256 {file.sha256[:12]}", *describe(file.groups)]


def _write_rejected(data: Data, output: Path) -> None:
    rejected = [fault for file in data.files for fault in file.rejected]
    if rejected:
        (output / "rejected.txt").write_text("\n".join(rejected) + "\n", encoding="utf-8")


def _settings(
    arguments: RerankerArguments,
    training: transformers.TrainingArguments,
    base: Base,
    mass: float | None,
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
        "max_length": arguments.max_length,
        "p(yes) + p(no) of the base": "no vocabulary head" if mass is None else f"{mass:.3f}",
        "LoRA": "none, full fine-tuning"
        if base.peft is None
        else f"r {base.peft.r}, alpha {base.peft.lora_alpha}",
    }
    return {name: str(value) for name, value in shown.items()}
