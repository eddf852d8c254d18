"""How well the embedded reranker ranks, and whether it reads its instruction.

    python -m benchmarks.embedded DATA_FOLDER --bi_encoder all-MiniLM-L6-v2

Decides which sets are looked at and what counts as following an instruction. DATA_FOLDER holds the
public sets that the recipe was trained from, as `NAME.dev.jsonl.xz` and `NAME.mini.jsonl.xz`.
Checkpoints are chosen on dev sets alone. Scores are kept in --output_dir, so that an interrupted
run goes on. Equal scores count as the worst order, so shuffling the candidates changes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from finetune.metrics import ScoredSet, compare, measure
from finetune.served import Lists, Scores, Served, read_lists, saved_scores
from qwen3_reranker.data.candidates import CandidateList

POOLED = ("general_en", "med_en", "code_cosqa")
"""Sets of which dev and mini are looked at, alone and together."""
BY_INSTRUCTION = "med_instruct.dev"
"""Pairs of lists with one query and the same candidates, told apart by their instruction alone."""
PARAPHRASED = "general_en.dev"
PARAPHRASE = "Find the Wikipedia paragraph in which the question is answered"


def main(argv: Sequence[str] | None = None) -> int:
    """Score, print and write `embedded.json`; return 0."""
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.{part}" for part in ("mini", "dev") for name in POOLED]
    folder = Path(arguments.data_folder)
    lists = read_lists([str(folder / f"{name}.jsonl.xz") for name in [*names, BY_INSTRUCTION]])
    served = Served(arguments.model, arguments.adapter, max_length=arguments.max_length)
    scores = {name: _score(served, name, each, output)[name] for name, each in lists.items()}
    figures = {
        "ndcg@10": _ranking(lists, scores, arguments.bi_encoder),
        "top document follows another instruction": following(
            lists[BY_INSTRUCTION], scores[BY_INSTRUCTION]
        ),
        "ndcg@10 lost by a paraphrase": _paraphrase(served, lists, scores, output),
    }
    (output / "embedded.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded", description=__doc__)
    parser.add_argument("data_folder")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--adapter", help="LoRA weights")
    parser.add_argument("--bi_encoder", help="sentence-transformers model to compare with")
    parser.add_argument("--max_length", type=int, default=512, help="tokens per pair")
    parser.add_argument("--output_dir", default="embedded-figures")
    return parser


def _score(served: Served, name: str, lists: Sequence[CandidateList], output: Path) -> Scores:
    return saved_scores(served, {name: lists}, output)


def _ranking(lists: Lists, scores: Scores, bi_encoder: str | None) -> dict[str, dict[str, float]]:
    """Return nDCG@10 with its interval, per set and pooled, beside the bi-encoder's."""
    groups = {name: [name] for name in lists}
    groups |= {f"{name}, pooled": [f"{name}.mini", f"{name}.dev"] for name in POOLED}
    theirs = {name: _by_bi_encoder(bi_encoder, each) for name, each in lists.items()
              if bi_encoder is not None}  # fmt: skip
    found = {}
    for group, names in groups.items():
        ours = _ndcg(names, lists, scores)
        alone = compare([0.0] * len(ours), ours)
        found[group] = {"queries": len(ours), "ndcg@10": alone.mean_after,
                        "ci_low": alone.ci_low, "ci_high": alone.ci_high}  # fmt: skip
        line = f"{group:24} {alone.mean_after:.3f} [{alone.ci_low:.3f}, {alone.ci_high:.3f}]"
        if theirs:
            against = compare(_ndcg(names, lists, theirs), ours)
            found[group] |= {"bi_encoder": against.mean_before, "p": against.p_value}
            line += f"  bi-encoder {against.mean_before:.3f}, p {against.p_value:.4f}"
        print(line)
    return found


def _ndcg(names: Sequence[str], lists: Lists, scores: Scores) -> list[float]:
    sets = [ScoredSet(name, lists[name], scores[name]) for name in names]
    return [value for each in sets for value in measure(each)["nDCG@10"]]


def _by_bi_encoder(name: str, lists: Sequence[CandidateList]) -> list[list[float]]:
    """Return cosines; the instruction stands before the query where queries alone do not differ."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(name)
    rows = []
    for each in lists:
        alike = sum(other.query == each.query for other in lists) > 1
        query = f"{each.instruction} {each.query}" if alike else each.query
        vectors = encoder.encode([query, *each.texts], normalize_embeddings=True)
        rows.append((vectors[1:] @ vectors[0]).astype(float).tolist())
    return rows


def following(
    lists: Sequence[CandidateList], scores: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Return how often another instruction moves the top document to what it asks for.

    Over ordered pairs of lists with one query, its candidates and two instructions: the first
    one's top document is not what the second asks for, and the second one's is.
    """
    tops = [max(range(len(row)), key=row.__getitem__) for row in scores]
    pairs = [(i, j) for i, j in permutations(range(len(lists)), 2)
             if lists[i].query == lists[j].query]  # fmt: skip
    moved = 0
    for i, j in pairs:
        wanted = {
            id for id, label in zip(lists[j].ids, lists[j].labels or [], strict=True) if label
        }
        moved += lists[i].ids[tops[i]] not in wanted and lists[j].ids[tops[j]] in wanted
    print(f"{BY_INSTRUCTION}: top document moves in {moved} of {len(pairs)} pairs")
    return {"pairs": len(pairs), "moved": moved / len(pairs)}


def _paraphrase(
    served: Served, lists: Lists, scores: Scores, output: Path
) -> dict[str, float | str]:
    """Return what the same lists lose when their instruction is worded otherwise."""
    changed = [replace(each, instruction=PARAPHRASE) for each in lists[PARAPHRASED]]
    theirs = _score(served, PARAPHRASED, changed, output)
    change = compare(_ndcg([PARAPHRASED], lists, scores), _ndcg([PARAPHRASED], lists, theirs))
    print(f"{PARAPHRASED}, paraphrased: {change.mean_before:.3f} -> {change.mean_after:.3f} "
          f"[{change.ci_low:+.3f}, {change.ci_high:+.3f}]")  # fmt: skip
    return {"instruction": PARAPHRASE, "lost": -change.difference, "p": change.p_value}


if __name__ == "__main__":
    raise SystemExit(main())
