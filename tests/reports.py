"""A fine-tuning report with every part a page can have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.metrics import Comparison, Reliability, ReliabilityBin
from finetune.report import Report, SetReport

BETTER = Comparison(0.5123456789012345, 0.6, 0.0876543210987655, 0.05, 0.12, 0.0001, 20, 8, 2)
WORSE = Comparison(0.6, 0.5, -0.1, -0.15, -0.05, 0.0002, 2, 8, 20)
UNCLEAR = Comparison(0.6, 0.61, 0.01, -0.02, 0.04, 0.4, 11, 8, 11)
RELIABILITY = Reliability(
    0.125, [ReliabilityBin(0.0, 0.1, 90, 0.02, 0.1), ReliabilityBin(0.9, 1.0, 10, 0.95, 0.8)]
)
HISTORY = [
    {"step": 10, "loss": 0.7, "learning_rate": 1e-4},
    {"step": 10, "eval_dev_ndcg@10": 0.5, "eval_ndcg@10": 0.5},
    {"step": 20, "loss": 0.5},
    {"step": 20, "eval_dev_ndcg@10": 0.6, "eval_ndcg@10": 0.6},
    {"step": 20, "train_runtime": 12.5, "train_loss": 0.6},
]


def a_set(name: str = "legal.eval", main: Comparison = BETTER, **changes: Any) -> SetReport:
    queries = [(f"q{i}", 0.5, 0.5 + (i - 8) / 40) for i in range(30)]
    each = SetReport(
        name=name,
        is_guard=False,
        num_queries=30,
        metrics={"nDCG@10": main, "MRR@10": main},
        heuristics={"given order": 0.42, "shortest first": 0.2, "longest first": 0.1},
        reliability_before=RELIABILITY,
        reliability_after=RELIABILITY,
        alarms=[],
        per_query=queries,
    )
    return replace(each, **changes)


def a_report(**changes: Any) -> Report:
    report = Report(
        title="A run",
        base="org/base",
        tuned="runs/adapter",
        settings={"learning rate": "0.0001"},
        data=["train.jsonl: 100 rows, sha256 0123456789ab"],
        sets=[
            a_set(instruction={"right": 0.62, "default": 0.6, "wrong": 0.4}),
            a_set("code.eval", UNCLEAR, is_guard=True),
        ],
        history=HISTORY,
        warnings=["3 documents were cut."],
        next_step='qwen3-reranker rank --adapter runs/adapter -q "query" "document"',
    )
    return replace(report, **changes)
