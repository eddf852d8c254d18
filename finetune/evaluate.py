"""Candidate lists before and after: what is compared, and what early stopping reads.

Decides how a trainee scores lists, and what the command `evaluate` does. What rankings are worth is
`metrics.py`'s; how it looks is `report.py`'s.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]

from qwen3_reranker.data.candidates import CandidateList, ndcg_at_10
from qwen3_reranker.data.trec import files_of
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Budget
from qwen3_reranker.model.loading import attention_budget

from . import benchmark
from .metrics import ScoredSet, alarms, compare, heuristics, measure, reliability, spread
from .output import hash_file, only_run
from .report import Report, SetReport, summary_lines, write_report
from .served import Lists, Scores, Served, next_step, read_lists, saved_scores, score_each
from .trainee import Trainee


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores candidate lists with a trainee, exactly as the core will.

    Attributes:
        trainee: The model.
        lists: Judged candidate lists by the name of their set.
        max_length: Tokens per pair.
        max_batch_tokens: Token budget of a forward.
        relevant_from: Lowest label that alarms take for relevant.
    """

    trainee: Trainee
    lists: Lists
    max_length: int
    max_batch_tokens: int
    relevant_from: int = 1

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
            shares = gather_object([score_each(share, score)])
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
            scored = ScoredSet(name, lists, scores[name])
            found = alarms(spread(scored, relevant_from=self.relevant_from))
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


def compare_sets(
    lists: Lists,
    before: Scores,
    after: Scores,
    guards: Collection[str] = (),
    *,
    relevant_from: int = 1,
) -> list[SetReport]:
    """Return what changed in each set, with significance, calibration and alarms.

    Labels from `relevant_from` on are relevant; nDCG is of graded labels whatever it is.
    """
    return [
        _compare_set(
            ScoredSet(name, lists[name], before[name]),
            ScoredSet(name, lists[name], after[name]),
            is_guard=name in guards,
            relevant_from=relevant_from,
        )
        for name in lists
    ]


def _compare_set(
    before: ScoredSet, after: ScoredSet, *, is_guard: bool, relevant_from: int
) -> SetReport:
    was, now = (measure(each, relevant_from=relevant_from) for each in (before, after))
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
        reliability_before=reliability(before, relevant_from=relevant_from),
        reliability_after=reliability(after, relevant_from=relevant_from),
        alarms=alarms(spread(after, relevant_from=relevant_from)),
        per_query=list(zip(ids, was["nDCG@10"], now["nDCG@10"], strict=True)),
    )


def main(argv: Sequence[str]) -> int:
    """Run `qwen3-finetune evaluate`; return its exit status."""
    arguments = _parser().parse_args(argv)
    benchmark.refuse_mixture(arguments)
    lists = read_lists([*arguments.eval_file, *arguments.guard_file], depth=arguments.depth)
    guards = list(lists)[len(arguments.eval_file) :]
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    tuned = Served.of(arguments)
    if arguments.benchmark:
        return benchmark.run(tuned, arguments, output)
    with only_run(output):  # another's scores would get between ours
        return _compare(tuned, arguments, lists, guards, output)


def _compare(
    tuned: Served,
    arguments: argparse.Namespace,
    lists: Lists,
    guards: Collection[str],
    output: Path,
) -> int:
    """Score the lists with both models and report; return the exit status."""
    after = saved_scores(tuned, lists, output)
    if tuned.adapter is not None:
        before, base = saved_scores(replace(tuned, adapter=None), lists, output), tuned.model
    else:
        before = {name: heuristics(each)["given order"] for name, each in lists.items()}
        base = "first stage"
    relevant_from = 1 if arguments.relevant_from is None else arguments.relevant_from
    sets = compare_sets(lists, before, after, guards, relevant_from=relevant_from)
    if tuned.adapter is None:  # ranks are no log-odds
        sets = [replace(each, reliability_before=None) for each in sets]
    if arguments.instruction_check:
        sets = [
            replace(each, instruction=_instruction_check(tuned, each, lists, output))
            for each in sets
        ]
    report = Report(
        title=f"{base} and {tuned.adapter or tuned.model}",
        base=base,
        tuned=tuned.adapter or tuned.model,
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
    Served.add_arguments(parser)
    parser.add_argument("--eval_file", nargs="+", default=[],
        help="JSONL candidate lists; or TREC runs (.trec, .run) with corpus, queries and qrels "
        "beside them, or BEIR folders with a run")  # fmt: skip
    parser.add_argument("--guard_file", nargs="+", default=[], help="lists of another domain")
    parser.add_argument("--depth", type=int, help="candidates ranked of each list, if not all")
    parser.add_argument(
        "--relevant_from", type=int, help="lowest label that is relevant; default 1"
    )
    parser.add_argument("--output_dir", default="qwen3-reranker-evaluation")
    parser.add_argument(
        "--instruction_check",
        action="store_true",
        help="also rank with the template's and with another query's instruction",
    )
    benchmark.add_arguments(parser)
    return parser


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
