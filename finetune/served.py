"""A model as the core serves it, and its scores of judged candidate lists.

Decides how lists are read for measuring, and what scores kept on disk depend on. What rankings are
worth is `metrics.py`'s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from qwen3_reranker import Reranker
from qwen3_reranker.call.arguments import DTYPES
from qwen3_reranker.checkpoint.locate import stamp
from qwen3_reranker.data.candidates import CandidateList
from qwen3_reranker.data.trec import read_candidates
from qwen3_reranker.errors import DataError

from .output import whole_lines

Lists = Mapping[str, Sequence[CandidateList]]
Scores = Mapping[str, list[list[float]]]
"""Log-odds of every candidate, by set and list."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the core serves it; settings as of `Reranker`."""

    model: str
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_length: int = 8192

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add a flag per field."""
        parser.add_argument("--model", required=True, help='Hub name, folder or "embedded"')
        parser.add_argument("--adapter", help="LoRA weights")
        parser.add_argument("--dtype", choices=DTYPES)
        parser.add_argument("--device", help="such as cpu or cuda:1")
        parser.add_argument("--max_length", type=int, default=8192, help="tokens per pair")

    @property
    def identity(self) -> list[Any]:
        """What its scores depend on besides texts and prompt, ready for JSON."""
        names = [name for name in (self.model, self.adapter) if name is not None]
        return [list(map(stamp, names)), self.dtype, self.device, self.max_length]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """Return what the flags say."""
        return cls(**{each.name: getattr(arguments, each.name) for each in fields(cls)})


def read_lists(paths: Sequence[str], *, depth: int | None = None) -> dict[str, list[CandidateList]]:
    """Read judged candidate lists, by the name of their file or folder; `depth` as of `first`.

    Raises:
        DataError: With every fault of every file.
    """
    found: dict[str, list[CandidateList]] = {}
    faults = []
    for path in paths:
        name = Path(path).resolve().name
        for suffix in (".gz", ".xz", ".jsonl", ".trec", ".run"):
            name = name.removesuffix(suffix)
        try:
            if name in found:
                raise DataError(f"two evaluation files are called '{name}'. Rename one of them.")
            found[name] = [each.first(depth) for each in _judged(path)]
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return found


def _judged(path: str) -> list[CandidateList]:
    lists = read_candidates(path)
    unjudged = [i for i, each in enumerate(lists, 1) if each.labels is None and each.texts]
    if unjudged:
        raise DataError(
            f"{path}: query number {unjudged[0]} of {len(lists)} has no labels, so "
            "nothing can be measured. Add a label per candidate, or qrels beside the run."
        )
    return lists


def saved_scores(served: Served, lists: Lists, output: Path) -> Scores:
    """Return the scores of a model, computed once per weights, settings and lists.

    They are kept in the folder `output`, which must exist, list by list, so that what is
    interrupted goes on where it was.
    """
    texts = [
        [(each.instruction, each.query, each.texts) for each in rows] for rows in lists.values()
    ]
    key = (served.identity, list(lists), texts)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = output / f"scores-{digest}.jsonl"
    kept = list(map(json.loads, whole_lines(path)))
    if kept:
        print(f"Scores of {served.adapter or served.model} reused, {len(kept)} lists: {path}")
    rows = iter(kept)
    with Reranker(**asdict(served)) as reranker, path.open("a", encoding="utf-8") as file:

        def score(each: CandidateList) -> list[float]:
            row = next(rows, None)
            if row is None:
                row = score_list(reranker, each)
                file.write(json.dumps(row) + "\n")
                file.flush()
            return row

        return score_each(lists, score)


def score_list(reranker: Reranker, each: CandidateList) -> list[float]:
    """Return the log-odds of a list's candidates as the core serves them."""
    return reranker.log_odds(each.query, each.texts, instruction=each.instruction)


def score_each(
    lists: Lists, score: Callable[[CandidateList], list[float]]
) -> dict[str, list[list[float]]]:
    """Return the scores of all lists, with a progress bar."""
    total = sum(map(len, lists.values()))
    with tqdm(total=total, desc="Ranking", unit=" lists", leave=False, disable=None) as bar:
        scores: dict[str, list[list[float]]] = {}
        for name, rows in lists.items():
            scores[name] = []
            for each in rows:
                scores[name].append(score(each))
                bar.update()
    return scores


def next_step(model: str, adapter: str | None, *options: str) -> str:
    """Return the command that a user would type next; no training text stands in it."""
    adapted = [] if adapter is None else ["--adapter", adapter]
    names = shlex.join(["--model", model, *adapted, *options])
    return f'qwen3-reranker rank {names} -q "your query" "first document" "second document"'
