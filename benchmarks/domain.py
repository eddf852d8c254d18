"""Does fine-tuning teach a domain? The support recipe, three seeds, and a control that must fail.

    python -m benchmarks.domain

Trains as a user would, by `python -m finetune train --config recipes/support/train.yaml`, ranks
lists of unseen topics with every contender and prints a table per run; then runs the last line of
the training. The control trains on the same rows with positives drawn at random.

A topic has two lists, the same query and the same candidates under two instructions, so its lists
are not independent: what is compared is the mean nDCG@10 of a topic. Decides nothing about
metrics and tests; those are `finetune.metrics`'.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import bm25s  # type: ignore[import-untyped]

from finetune.cli import parse_training, training_parser
from finetune.metrics import ScoredSet, compare, heuristics, measure
from finetune.served import Served, read_lists, saved_scores
from qwen3_reranker.data.candidates import CandidateList

CONFIG = "recipes/support/train.yaml"
CONTROL_SEED = 0
"""Of both the labels and the training of the control."""

Scores = list[list[float]]
"""One row per list, one number per candidate; the largest is ranked first."""


def train(train_file: str, seed: int, folder: Path) -> float:
    """Train into a folder, run the last line that was printed, return the training's seconds."""
    settings = ["--config", CONFIG, "--train_file", train_file, "--seed", str(seed)]
    command = [sys.executable, "-m", "finetune", "train", *settings, "--output_dir", str(folder)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    seconds = time.perf_counter() - start
    name, *rest = shlex.split(done.stdout.splitlines()[-1])
    script = Path(sys.executable).with_name(name)  # found by itself in an activated environment
    subprocess.run([script, *rest], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return seconds


def write_shuffled(source: str, target: Path, seed: int) -> None:
    """Copy training rows, each with as many positives as before, drawn from all its documents."""
    rng = random.Random(seed)
    with open(source, encoding="utf-8") as file, target.open("w", encoding="utf-8") as copy:
        for row in map(json.loads, file):
            documents = [*row["positive"], *row["negative"]]
            rng.shuffle(documents)
            count = len(row["positive"])
            row.update(positive=documents[:count], negative=documents[count:])
            copy.write(json.dumps(row, ensure_ascii=False) + "\n")


def rank_bm25(lists: Sequence[CandidateList], *, with_instruction: bool) -> Scores:
    """Return BM25 scores, with the statistics of all the lists' passages.

    bm25s's default: Lucene's variant, k1 1.5, b 0.75; lower-cased words of two letters or more, no
    stop words taken out and no stemming.
    """

    def words(texts: Sequence[str]) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(
            texts, stopwords=None, return_ids=False, show_progress=False
        )
        return found

    corpus = sorted({text for each in lists for text in each.texts})
    index = bm25s.BM25()
    index.index(words(corpus), show_progress=False)
    scores = []
    for each in lists:
        query = f"{each.instruction} {each.query}" if with_instruction else each.query
        of_text = dict(zip(corpus, index.get_scores(words([query])[0]).tolist(), strict=True))
        scores.append([of_text[text] for text in each.texts])
    return scores


def under_other_instruction(lists: Sequence[CandidateList], scores: Scores) -> Scores:
    """Return for each list the scores of the same query's list with the other instruction."""
    place = {(each.query, each.instruction): i for i, each in enumerate(lists)}
    return [
        next(
            scores[i]
            for (query, instruction), i in place.items()
            if query == each.query and instruction != each.instruction
        )
        for each in lists
    ]


def by_topic(lists: Sequence[CandidateList], scores: Scores) -> list[float]:
    """Return the mean nDCG@10 of each topic, in order of first appearance."""
    values: dict[str, list[float]] = {}
    measured = measure(ScoredSet("support", lists, scores))["nDCG@10"]
    for each, value in zip(lists, measured, strict=True):
        values.setdefault(each.query, []).append(value)
    return [fmean(row) for row in values.values()]


def print_comparison(title: str, tuned: list[float], rivals: dict[str, list[float]]) -> None:
    """Print how one run fared against every rival."""
    print(f"\n{title}: nDCG@10 {fmean(tuned):.3f}\n")
    print("| against | nDCG@10 | gain [95 %] | p | topics won, tied, lost |\n|---|---|---|---|---|")
    for name, values in rivals.items():
        c = compare(values, tuned)
        print(
            f"| {name} | {c.mean_before:.3f} | {c.difference:+.3f} [{c.ci_low:+.3f}, "
            f"{c.ci_high:+.3f}] | {c.p_value:.4f} | {c.wins}, {c.ties}, {c.losses} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, rank and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domain", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    ours, base, _ = parse_training(training_parser(), ["--config", CONFIG])
    (lists,) = read_lists(ours.eval_file).values()
    (rows,) = ours.train_file
    rivals = {
        "BM25 of the query": rank_bm25(lists, with_instruction=False),
        "BM25 of instruction and query": rank_bm25(lists, with_instruction=True),
        **heuristics(lists),
    }
    baselines = {name: by_topic(lists, scores) for name, scores in rivals.items()}
    untuned = Served(base.name, max_length=ours.max_length)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        of_base = saved_scores(untuned, {"dev": lists}, output)["dev"]
        baselines = {"the base": by_topic(lists, of_base), **baselines}
        shuffled = output / "shuffled.jsonl"
        write_shuffled(rows, shuffled, CONTROL_SEED)
        runs = [(f"seed {seed}", rows, seed) for seed in args.seeds]
        runs.append(("control, labels shuffled", str(shuffled), CONTROL_SEED))
        for name, train_file, seed in runs:
            folder = output / name.replace(" ", "-")
            seconds = train(train_file, seed, folder)
            tuned = replace(untuned, adapter=str(folder))
            scores = saved_scores(tuned, {"dev": lists}, output)["dev"]
            other = by_topic(lists, under_other_instruction(lists, scores))
            print_comparison(
                f"{name}, trained in {seconds:.0f} s",
                by_topic(lists, scores),
                {**baselines, "itself, given the other instruction": other},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
