"""Candidate lists before and after: who scores them, and what is compared.

Decides in which order lists are scored, which number early stopping reads, and what the command
`evaluate` does. What rankings are worth is `metrics.py`'s; how it looks is `report.py`'s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from tqdm import tqdm

from qwen3_reranker import Reranker, checkpoint
from qwen3_reranker.candidates import CandidateList, ndcg_at_10, read_candidates
from qwen3_reranker.collection import files_of
from qwen3_reranker.engine import Engine
from qwen3_reranker.errors import DataError
from qwen3_reranker.loading import attention_budget
from qwen3_reranker.packing import Budget

from . import benchmark
from .metrics import ScoredSet, alarms, calibration, compare, heuristics, measure, spread
from .output import hash_file
from .report import Report, SetReport, summary_lines, write_report
from .trainee import Trainee

Lists = Mapping[str, Sequence[CandidateList]]
Scores = Mapping[str, list[list[float]]]
"""Log-odds of every candidate, by set and list."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores candidate lists with a trainee, exactly as the core will.

    Attributes:
        trainee: The model.
        lists: Judged candidate lists by the name of their set.
        max_length: Tokens per pair.
        max_batch_tokens: Token budget of a forward.
    """

    trainee: Trainee
    lists: Lists
    max_length: int
    max_batch_tokens: int

    def score(self) -> Scores:
        """Return the log-odds of every candidate, without gradients and in evaluation mode.

        Where training has several processes each scores its share and all get everything, so that
        they decide alike.
        """
        network, tokenizer = self.trainee.network, self.trainee.tokenizer
        was_training = network.training
        network.eval()
        engine = Engine(
            network.score,
            backend=self.trainee.backend,
            budget=Budget(
                self.max_batch_tokens,
                attention_budget(self.trainee.backend, self.max_batch_tokens),
            ),
        )

        def score(each: CandidateList) -> list[float]:
            group = tokenizer.encode_group(
                each.instruction, each.query, each.texts, max_length=self.max_length
            )
            (row,) = engine.submit([group]).result().log_odds
            return [float(value) for value in row]

        state = PartialState()
        count = state.num_processes
        share = {name: rows[state.process_index :: count] for name, rows in self.lists.items()}
        try:
            shares = gather_object([_score_lists(share, score)])
        finally:
            engine.close()
            network.train(was_training)
        return {
            name: [shares[i % count][name][i // count] for i in range(len(rows))]
            for name, rows in self.lists.items()
        }

    def measure(self) -> tuple[dict[str, float], list[str]]:
        """Return nDCG@10 of each set, their mean as `ndcg@10`, and what looks wrong."""
        scores = self.score()
        metrics, warnings = {}, []
        for name, lists in self.lists.items():
            metrics[f"{name}_ndcg@10"] = mean(
                ndcg_at_10(each.labels or [], row, each.missing_labels)
                for each, row in zip(lists, scores[name], strict=True)
            )
            found = alarms(spread(ScoredSet(name, lists, scores[name])))
            warnings += [f"{name}: {alarm}" for alarm in found]
        return {**metrics, "ndcg@10": mean(metrics.values())}, warnings

    def without(self, names: Collection[str]) -> Evaluation:
        """Return an evaluation that leaves out these sets."""
        lists = {name: lists for name, lists in self.lists.items() if name not in names}
        return replace(self, lists=lists)

    def sample(self, count: int | None, seed: int) -> Evaluation:
        """Return an evaluation of at most `count` lists per set, the same for the same seed."""
        if count is None:
            return self
        lists = {
            name: random.Random(seed).sample(list(lists), min(count, len(lists)))  # noqa: S311
            for name, lists in self.lists.items()
        }
        return replace(self, lists=lists)


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the core serves it; settings as of `Reranker`."""

    model: str
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_length: int = 8192


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


def compare_sets(
    lists: Lists, before: Scores, after: Scores, guards: Collection[str] = ()
) -> list[SetReport]:
    """Return what changed in each set, with significance, calibration and alarms."""
    return [
        _compare_set(
            ScoredSet(name, lists[name], before[name]),
            ScoredSet(name, lists[name], after[name]),
            is_guard=name in guards,
        )
        for name in lists
    ]


def _compare_set(before: ScoredSet, after: ScoredSet, *, is_guard: bool) -> SetReport:
    was, now = measure(before), measure(after)
    unread = {
        name: mean(measure(ScoredSet(before.name, before.lists, scores))["nDCG@10"])
        for name, scores in heuristics(before.lists).items()
    }
    ids = [each.query_id for each in before.lists]
    return SetReport(
        name=before.name,
        is_guard=is_guard,
        num_queries=len(before.lists),
        metrics={metric: compare(was[metric], now[metric]) for metric in was},
        heuristics=unread,
        calibration_before=calibration(before),
        calibration_after=calibration(after),
        alarms=alarms(spread(after)),
        per_query=list(zip(ids, was["nDCG@10"], now["nDCG@10"], strict=True)),
    )


def main(argv: Sequence[str]) -> int:
    """Run `qwen3-finetune evaluate`; return its exit status."""
    arguments = _parser().parse_args(argv)
    lists = read_lists([*arguments.eval_file, *arguments.guard_file], depth=arguments.depth)
    guards = list(lists)[len(arguments.eval_file) :]
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    tuned = Served(
        arguments.model, arguments.adapter, arguments.dtype, arguments.device, arguments.max_length
    )
    if arguments.benchmark:
        return benchmark.run(tuned, arguments, output)
    after = saved_scores(tuned, lists, output)
    if tuned.adapter is not None:
        before, base = saved_scores(replace(tuned, adapter=None), lists, output), tuned.model
    else:
        before = {name: heuristics(each)["given order"] for name, each in lists.items()}
        base = "first stage"
    sets = compare_sets(lists, before, after, guards)
    if arguments.instruction_check:
        sets = [
            replace(each, instruction=_instruction_check(tuned, each, lists, output))
            for each in sets
        ]
    report = Report(
        title=f"{base} and {tuned.adapter or tuned.model}",
        base=base,
        adapter=tuned.adapter or tuned.model,
        settings={"max_length": str(tuned.max_length), "dtype": str(tuned.dtype)},
        data=[
            f"{file}, sha256 {hash_file(file)[:12]}"
            for path in (*arguments.eval_file, *arguments.guard_file)
            for file in files_of(path)
        ],
        sets=sets,
        history=[],
        warnings=[],
        next_step=next_step(tuned.model, tuned.adapter),
    )
    page = write_report(output, report)
    for line in [*summary_lines(report), f"Report: {page}"]:
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune evaluate",
        description="Compare a model with and without its adapter on judged candidate lists; "
        "without --adapter, the model with the order given.",
    )
    parser.add_argument("--model", required=True, help='Hub name, folder or "embedded"')
    parser.add_argument("--adapter", help="LoRA weights")
    parser.add_argument("--eval_file", nargs="+", default=[],
        help="JSONL candidate lists; or TREC runs (.trec, .run) with corpus, queries and qrels "
        "beside them, or BEIR folders with a run")  # fmt: skip
    parser.add_argument("--guard_file", nargs="+", default=[], help="lists of another domain")
    parser.add_argument("--depth", type=int, help="candidates ranked of each list, if not all")
    parser.add_argument("--output_dir", default="qwen3-reranker-evaluation")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens per pair")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="such as cpu or cuda:1")
    parser.add_argument(
        "--instruction_check",
        action="store_true",
        help="also rank with the template's and with another query's instruction",
    )
    benchmark.add_arguments(parser)
    return parser


def saved_scores(served: Served, lists: Lists, output: Path) -> Scores:
    """Return the scores of a model, computed once per weights, settings and lists.

    They are kept in the folder `output`, which must exist.
    """
    texts = [
        [(each.instruction, each.query, each.texts) for each in rows] for rows in lists.values()
    ]
    files = [checkpoint.stamp(name) for name in (served.model, served.adapter) if name is not None]
    key = (files, served.dtype, served.max_length, list(lists), texts)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = output / f"scores-{digest}.json"
    if file.is_file():
        print(f"Scores of {served.adapter or served.model} reused: {file}")
        found: Scores = json.loads(file.read_text(encoding="utf-8"))
        return found
    with Reranker(**asdict(served)) as reranker:
        scores = score_lists(reranker, lists)
    file.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def score_lists(reranker: Reranker, lists: Lists) -> Scores:
    """Return the log-odds of every candidate as the core serves them."""

    def score(each: CandidateList) -> list[float]:
        ranking = reranker.rank(each.query, each.texts, instruction=each.instruction)
        return [r.log_odds for r in sorted(ranking, key=lambda r: r.index)]

    return _score_lists(lists, score)


def _instruction_check(
    served: Served, report: SetReport, lists: Lists, output: Path
) -> dict[str, float]:
    """Return nDCG@10 under the right, the default and another query's instruction."""
    right = lists[report.name]
    others = [each.instruction for each in right]
    wrong = [next((o for o in others[i:] + others[:i] if o != own), None)
             for i, own in enumerate(others)]  # fmt: skip
    found = {"right": report.metrics["nDCG@10"].mean_after}
    for name, instructions in (("default", [None] * len(right)), ("wrong", wrong)):
        changed = {
            report.name: [
                replace(each, instruction=other)
                for each, other in zip(right, instructions, strict=True)
            ]
        }
        if any(instructions) or name == "default":
            scores = saved_scores(served, changed, output)
            scored = ScoredSet(report.name, right, scores[report.name])
            found[name] = mean(measure(scored)["nDCG@10"])
    return found


def _score_lists(
    lists: Lists, score: Callable[[CandidateList], list[float]]
) -> dict[str, list[list[float]]]:
    total = sum(map(len, lists.values()))
    with tqdm(total=total, desc="Ranking", unit=" lists", leave=False, disable=None) as bar:
        scores: dict[str, list[list[float]]] = {}
        for name, rows in lists.items():
            scores[name] = []
            for each in rows:
                scores[name].append(score(each))
                bar.update()
    return scores


def _judged(path: str) -> list[CandidateList]:
    lists = read_candidates(path)
    unjudged = [each.query_id for each in lists if each.labels is None and each.texts]
    if unjudged:
        raise DataError(
            f"{path}: query {unjudged[0]} has no labels, so nothing can be measured. Add a label "
            "per candidate, or qrels beside the run."
        )
    return lists


def next_step(model: str, adapter: str | None, *options: str) -> str:
    """Return the command that a user would type next; no training text stands in it."""
    adapted = [] if adapter is None else ["--adapter", adapter]
    names = shlex.join(["--model", model, *adapted, *options])
    return f'qwen3-reranker rank {names} -q "your query" "first document" "second document"'
