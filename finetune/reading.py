"""Everything a run reads: training rows, candidate lists, other wordings of its instructions.

Decides what is refused before a model is loaded, with every fault of every file at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen3_reranker.data.candidates import CandidateList
from qwen3_reranker.data.jsonl import read_json
from qwen3_reranker.errors import DataError

from .config import RerankerArguments
from .data import TrainingFile, TrainingGroup, check_leaks, describe, read_training_file
from .served import read_lists

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
        for line in file_lines(file):
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


def paraphrases(path: str | None) -> dict[str, list[str]]:
    """Read other wordings of task sentences.

    Raises:
        DataError: If the file is no mapping of sentences to lists of sentences.
    """
    if path is None:
        return {}
    try:
        content: dict[str, list[str]] = read_json(path)
    except ValueError as error:
        raise DataError(
            f"'{path}' cannot be read as JSON ({error}). Check the path, or correct the file."
        ) from error
    is_valid = isinstance(content, dict) and all(
        isinstance(wordings, list) and all(isinstance(wording, str) for wording in wordings)
        for wordings in content.values()
    )
    if not is_valid:
        raise DataError(
            f"'{path}' must map task sentences to lists of other wordings, all strings. Correct it."
        )
    return content


def file_lines(file: TrainingFile) -> list[str]:
    """Return what a reader must know of a training file."""
    counts = f"{file.num_rows} rows accepted, {len(file.rejected)} rejected"
    return [f"{file.path}: {counts}, sha256 {file.sha256[:12]}", *describe(file.groups)]


def write_rejected(data: Data, output: Path) -> None:
    """List the rows that were left out."""
    rejected = [fault for file in data.files for fault in file.rejected]
    if rejected:
        (output / "rejected.txt").write_text("\n".join(rejected) + "\n", encoding="utf-8")
