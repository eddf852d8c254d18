"""How a reranker orders judged sets: nDCG@10 beside the order of the first stage.

    python -m benchmarks.eval_sets DATA_FOLDER

DATA_FOLDER holds candidate lists as `NAME.eval.jsonl.xz`, best first as a first stage found them.
Decides which lists of a set are looked at, drawn once by --seed, and how many of their candidates;
what lies deeper counts as missing. Each list goes through the core once: scores are kept in
--output_dir, so that an interrupted run goes on. Equal scores count as the worst order.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.metrics import Comparison, ScoredSet, compare, heuristics, measure
from finetune.served import Served, read_lists, saved_scores
from qwen3_reranker.data.candidates import CandidateList

ENDING = ".eval.jsonl.xz"
HEAD = (
    "| set | lists | documents | first stage | reranked | difference [95 %] | p | better, same, "
    "worse |\n|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Score, print a table and write `eval_sets.json`; return 0."""
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    served = Served(
        arguments.model,
        arguments.adapter,
        dtype=arguments.dtype,
        device=arguments.device,
        max_length=arguments.max_length,
    )
    names = arguments.sets or sorted(
        file.name.removesuffix(ENDING) for file in Path(arguments.data_folder).glob(f"*{ENDING}")
    )
    figures, rows = {}, []
    for name in names:
        file = str(Path(arguments.data_folder, name + ENDING))
        ((found, lists),) = read_lists([file]).items()
        lists = drawn(lists, arguments.num_lists, arguments.depth, arguments.seed)
        scores = saved_scores(served, {found: lists}, output)[found]
        against = {
            metric: compare_with_first_stage(metric, lists, scores)
            for metric in ("nDCG@10", "MRR@10")
        }
        figures[name] = {metric: asdict(each) for metric, each in against.items()}
        count = sum(len(each.texts) for each in lists)
        rows.append(f"| {name} | {len(lists)} | {count} | {_cells(against['nDCG@10'])} |")
        print(rows[-1], flush=True)
        text = json.dumps({"settings": vars(arguments), "sets": figures}, indent=2)
        (output / "eval_sets.json").write_text(text + "\n", encoding="utf-8")
    print("\n" + "\n".join([HEAD, *rows]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval_sets", description=__doc__)
    parser.add_argument("data_folder")
    parser.add_argument("--sets", nargs="+", help="names of sets; default: all of the folder")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--adapter", help="LoRA weights")
    parser.add_argument("--dtype", help="as of Reranker")
    parser.add_argument("--device", help="such as cuda:1")
    parser.add_argument("--max_length", type=int, default=512, help="tokens per pair")
    parser.add_argument("--num_lists", type=int, help="lists drawn of each set; default: all")
    parser.add_argument("--depth", type=int, help="first candidates of a list; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--output_dir", default="eval-sets-figures")
    return parser


def drawn(
    lists: Sequence[CandidateList], num_lists: int | None, depth: int | None, seed: int
) -> list[CandidateList]:
    """Return the lists that are looked at, in the order of their file."""
    count = len(lists) if num_lists is None else min(num_lists, len(lists))
    places = sorted(random.Random(seed).sample(range(len(lists)), count))
    return [lists[place].first(depth) for place in places]


def compare_with_first_stage(
    metric: str, lists: Sequence[CandidateList], scores: list[list[float]]
) -> Comparison:
    """Return what reranking does to a metric of the order given."""
    given = heuristics(lists)["given order"]
    before, after = (measure(ScoredSet("eval", lists, rows))[metric] for rows in (given, scores))
    return compare(before, after)


def _cells(c: Comparison) -> str:
    return (
        f"{c.mean_before:.3f} | {c.mean_after:.3f} | {c.difference:+.3f} [{c.ci_low:+.3f}, "
        f"{c.ci_high:+.3f}] | {c.p_value:.4f} | {c.wins}, {c.ties}, {c.losses}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
