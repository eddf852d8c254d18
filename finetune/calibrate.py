"""`calibrate`: scores that are shares of relevant documents, and a threshold for a precision.

Decides which files are judged pairs, and what is written and printed. What is fitted is
`fitting.py`'s; how it is served is the core's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qwen3_reranker import Calibration, Reranker
from qwen3_reranker.call.calibration import FILE_NAME
from qwen3_reranker.data.candidates import CandidateList
from qwen3_reranker.data.jsonl import read_rows
from qwen3_reranker.data.trec import is_collection
from qwen3_reranker.errors import InputError

from .data import HUB, read_training_file
from .fitting import (
    MIN_KEPT,
    Fit,
    Precision,
    Quality,
    calibrated,
    curve,
    fit,
    lowest,
    refuse_few,
)
from .metrics import ScoredSet
from .output import write_json
from .report import AFTER, BEFORE
from .served import Served, next_step, read_lists, score_each, score_list


def read_judged(paths: Sequence[str], relevant_from: int) -> list[CandidateList]:
    """Read candidate lists or labelled pairs, their labels 1 for relevant and 0 for not.

    Raises:
        DataError: With every fault of a file.
    """
    found: list[CandidateList] = []
    for path in paths:
        if _has_candidates(path):
            (lists,) = read_lists([path]).values()
        else:
            groups = read_training_file(path, relevant_from=relevant_from).groups
            lists = [
                CandidateList(
                    query_id=str(i),
                    query=group.query,
                    instruction=group.instruction,
                    ids=[],
                    texts=[*group.positive, *group.negative],
                    labels=[relevant_from] * len(group.positive) + [0] * len(group.negative),
                    missing_labels=[],
                )
                for i, group in enumerate(groups)
            ]
        found += [
            replace(each, labels=[int(label >= relevant_from) for label in each.labels or []])
            for each in lists
        ]
    return found


def _has_candidates(path: str) -> bool:
    if path.startswith(HUB) or path.endswith(".parquet"):
        return False
    if is_collection(path):
        return True
    first = next(read_rows(path), None)
    return first is None or first.content is None or "candidates" in first.content


def main(argv: Sequence[str]) -> int:
    """Run `qwen3-finetune calibrate`; return its exit status."""
    arguments = _parser().parse_args(argv)
    target: float = arguments.precision
    if not 0 < target < 1:
        raise InputError(
            f"--precision must be between 0 and 1, got {target}. No finite number of judgments "
            "shows that nothing irrelevant gets through."
        )
    lists = read_judged(arguments.eval_file, arguments.relevant_from)
    refuse_few(lists)
    served = Served.of(arguments)
    with Reranker(**asdict(served)) as reranker:
        rows = score_each({"": lists}, partial(score_list, reranker))[""]
        scored = ScoredSet("calibration", lists, rows)
        loaded = reranker.loaded
    found = fit(scored)
    thresholds = curve(calibrated(scored, found))
    chosen = lowest(thresholds, target)
    template = loaded.tokenizer.template
    record = {
        "temperature": found.temperature,
        "bias": found.bias,
        "threshold": None if chosen is None else {"target": target, **asdict(chosen)},
        "before": _figures(found.before),
        "after": _figures(found.after),
        "model": {
            "name": served.model, "adapter": served.adapter, "fingerprint": loaded.fingerprint
        },
        "template": {"id": template.id, "hash": template.hash},
        "fitted_on": {
            "files": [Path(path).name for path in arguments.eval_file],
            "relevant_from": arguments.relevant_from,
            "queries": len(lists),
            "pairs": sum(len(each.texts) for each in lists),
            "relevant": sum(sum(each.labels or []) for each in lists),
            "dtype": served.dtype,
            "max_length": served.max_length,
        },
    }  # fmt: skip
    file = _folder(arguments) / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    Calibration.read(file)  # what is printed next must work
    draw(file.with_suffix(".png"), found, thresholds, chosen)
    for line in [*_summary(record["fitted_on"], found), _advice(thresholds, chosen, target)]:
        print(line)
    print(f"Written: {file}, and a plot beside it. Next:")
    options = [] if chosen is None else ["--threshold", f"{chosen.score_threshold:g}"]
    print(next_step(served.model, served.adapter, "--calibration", str(file), *options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune calibrate",
        description="Fit scores to the share of relevant documents among candidates like yours, "
        "and find the score_threshold of a precision. Writes calibration.json, which a reranker "
        "takes as calibration=, and a plot.",
    )
    Served.add_arguments(parser)
    parser.add_argument(
        "--eval_file", nargs="+", required=True, help="judged candidate lists or labelled pairs"
    )
    parser.add_argument("--precision", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument(
        "--relevant_from", type=int, default=1, help="lowest label that is relevant"
    )
    parser.add_argument("--output_dir", help="default: the adapter's folder")
    return parser


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.output_dir is not None:
        return Path(arguments.output_dir)
    is_local = arguments.adapter is not None and Path(arguments.adapter).is_dir()
    return Path(arguments.adapter if is_local else "qwen3-reranker-calibration")


def _figures(found: Quality) -> dict[str, float]:
    return {"log_loss": found.log_loss, "ece": found.reliability.ece}


def _summary(counts: Any, found: Fit) -> list[str]:
    before, after = _figures(found.before), _figures(found.after)
    rows = [("log-loss", "log_loss"), ("expected calibration error", "ece")]
    return [
        f"{counts['queries']} queries, {counts['pairs']} pairs, {counts['relevant']} relevant: "
        f"temperature {found.temperature:.3f}, bias {found.bias:+.3f}",
        *(f"{label:<28}{before[key]:.4f} before, {after[key]:.4f} after" for label, key in rows),
        "(after: each query's scores by a fit to other queries)",
    ]


def _advice(thresholds: Sequence[Precision], chosen: Precision | None, target: float) -> str:
    if chosen is not None:
        return (
            f"score_threshold={chosen.score_threshold:g} for a precision of {target:g}: here "
            f"{chosen.precision:.3f} [{chosen.low:.3f}, {chosen.high:.3f}], recall "
            f"{chosen.recall:.3f}"
        )
    best = max(thresholds, key=lambda each: each.precision, default=None)
    most = "" if best is None else f"; {best.precision:.3f} at {best.score_threshold:g} is the most"
    return (
        f"No threshold reaches a precision of {target:g} with {MIN_KEPT} documents or more{most}."
    )


def draw(file: Path, found: Fit, thresholds: Sequence[Precision], chosen: Precision | None) -> None:
    """Plot reliability before and after, and what each threshold keeps."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], "--", color="black", lw=0.6)
    for name, side, marker, colour in (
        ("before", found.before, "s", BEFORE),
        ("after", found.after, "o", AFTER),
    ):
        x, y = zip(*((bin.mean_p_yes, bin.observed) for bin in side.reliability.bins), strict=True)
        label = f"{name}, calibration error {side.reliability.ece:.3f}"
        left.plot(x, y, marker=marker, ms=5, color=colour, label=label)
    left.set(xlabel="mean score", ylabel="share that is relevant")
    places = [each.score_threshold for each in thresholds]
    low, high = ([getattr(each, end) for each in thresholds] for end in ("low", "high"))
    right.fill_between(places, low, high, color=AFTER, alpha=0.2, lw=0, label="95 % interval")
    right.plot(places, [each.precision for each in thresholds], color=AFTER, label="precision")
    right.plot(places, [each.recall for each in thresholds], "--", color=BEFORE, label="recall")
    if chosen is not None:
        at = chosen.score_threshold
        right.axvline(at, color="black", lw=0.8, ls=":", label=f"score_threshold={at:g}")
    right.set(xlabel="score_threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.02))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
