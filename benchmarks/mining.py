"""Does the filter of `mine` find unlabelled relevant passages, and is training better for it?

    python -m benchmarks.mining DATA_FOLDER

DATA_FOLDER holds public reranking sets, `med_en` and `med_liveqa` of them, as `NAME.jsonl.xz`.

First, candidate lists with several relevant passages: each of these in turn is planted, that is,
taken for unlabelled, and the filter sees the others as the row's positives. What it drops of the
planted is its recall, what it drops of passages judged irrelevant its false alarms.

Then rows of which one of two positives is hidden in the corpus get negatives from BM25, once as
they come and once filtered, by `python -m finetune mine`, and train the same model twice. Decides
rows, settings and what is printed; what is not said of a setting is the command's default. What
is finished is kept in --output_dir, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from finetune.metrics import ScoredSet, compare, measure
from finetune.negatives import Mining
from finetune.served import Served, read_lists, saved_scores
from qwen3_reranker.data.candidates import CandidateList

SETS = ("med_en.dev", "med_en.mini", "med_liveqa.eval")
MARGINS = (0.0, 0.5, 1.0, 2.0, 4.0)
MAX_LENGTH = 208
NUM_NEGATIVES, DEPTH = 3, 10
ARMS = {"BM25 alone": False, "BM25, filtered": True}
TRAINING = (
    "--loss hybrid --lora_dropout 0 --learning_rate 5e-4 --per_device_train_batch_size 8 "
    "--warmup_steps 2 --save_strategy no --load_best_model_at_end false --disable_tqdm true "
    f"--num_negatives {NUM_NEGATIVES} --max_length {MAX_LENGTH}"
).split()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the filter, mine and train twice, compare; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mining", description=__doc__)
    parser.add_argument("data_folder")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--student", default="embedded")
    parser.add_argument("--num_rows", type=int, default=64)
    parser.add_argument("--num_lists", type=int, default=80, help="dev lists, 10 candidates each")
    parser.add_argument("--margin", type=float, default=Mining().margin)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="mining-figures")
    arguments = parser.parse_args(argv)
    data, output = Path(arguments.data_folder), Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    teacher = Served(arguments.teacher, max_length=MAX_LENGTH)
    for name in SETS:
        print_planted(name, several_positives(data, name), teacher, output)
    hidden = write_rows(data, output, arguments.num_rows, arguments.seed)
    (lists,) = read_lists([str(data / "med_en.dev.jsonl.xz")]).values()
    lists = [each.first(DEPTH) for each in lists[: arguments.num_lists]]
    student = Served(arguments.student, max_length=MAX_LENGTH)
    found = {"untrained": ndcg(student, lists, output)}
    for name, is_filtered in ARMS.items():
        folder = output / name.replace(" ", "-").replace(",", "")
        filter = ["--teacher", arguments.teacher, "--margin", arguments.margin]
        rows = mine(output, folder, arguments.seed, filter if is_filtered else [])
        report_negatives(name, rows, hidden)
        train(arguments.student, rows, folder, arguments.seed)
        found[name] = ndcg(replace(student, adapter=str(folder)), lists, output)
    print_comparison(found)
    return 0


def several_positives(data: Path, name: str) -> list[CandidateList]:
    """Return the lists of a set in which a positive can be hidden and others remain."""
    (lists,) = read_lists([str(data / f"{name}.jsonl.xz")]).values()
    return [each for each in lists if sum(map(bool, each.labels or ())) >= 2]


def print_planted(name: str, lists: list[CandidateList], teacher: Served, output: Path) -> None:
    """Print how many planted positives, and judged negatives, the filter drops."""
    scores = saved_scores(teacher, {name: lists}, output)[name]
    print(f"\n{name}: {len(lists)} lists with several relevant passages\n")
    print("| margin | planted positives dropped | judged negatives dropped |\n|---|---|---|")
    for margin in MARGINS:
        filter = Mining(margin=margin)
        recalls, alarms = [], []
        for each, row in zip(lists, scores, strict=True):
            positives, negatives = (
                [
                    s
                    for s, label in zip(row, each.labels or (), strict=True)
                    if bool(label) is wanted
                ]
                for wanted in (True, False)
            )
            for i, planted in enumerate(positives):
                shown = positives[:i] + positives[i + 1 :]
                recalls.append((each.query_id, filter.reason(planted, shown) is not None))
                alarms += [(each.query_id, filter.reason(s, shown) is not None) for s in negatives]
        print(f"| {margin:g} | {by_list(recalls):.2f} | {by_list(alarms):.2f} |", flush=True)


def by_list(values: Sequence[tuple[str, bool]]) -> float:
    """Return the mean over lists of their means: a list with many positives counts once."""
    lists: dict[str, list[bool]] = {}
    for name, value in values:
        lists.setdefault(name, []).append(value)
    return fmean(map(fmean, lists.values()))


def write_rows(data: Path, output: Path, num_rows: int, seed: int) -> dict[str, str]:
    """Write rows with one of their positives, and a corpus; return the other one, by query."""
    with lzma.open(data / "med_en.train.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    passages = dict.fromkeys(text for row in rows for text in row["positive"] + row["negative"])
    with (output / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in passages)
    chosen = random.Random(seed).sample(
        [row for row in rows if len(row["positive"]) == 2], num_rows
    )
    with (output / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in chosen:
            shown = {name: row[name] for name in ("query", "instruction")}
            file.write(json.dumps({**shown, "positive": row["positive"][:1]}) + "\n")
    return {row["query"]: row["positive"][1] for row in chosen}


def mine(output: Path, folder: Path, seed: int, filter: Sequence[object]) -> Path:
    """Mine negatives for the rows, unless that is done."""
    mined = folder.with_suffix(".jsonl")
    if not mined.exists():
        run("mine", "--train_file", output / "rows.jsonl", "--corpus", output / "corpus.jsonl",
            "--output_file", mined, "--depth", DEPTH, "--num_negatives", NUM_NEGATIVES,
            "--seed", seed, "--max_length", MAX_LENGTH, *filter)  # fmt: skip
    return mined


def report_negatives(name: str, mined: Path, hidden: dict[str, str]) -> None:
    """Print how many hidden positives became negatives."""
    rows = [json.loads(line) for line in mined.read_text(encoding="utf-8").splitlines()]
    wrong = sum(hidden[row["query"]] in row["negative"] for row in rows)
    count = sum(len(row["negative"]) for row in rows)
    print(f"\n{name}: {len(rows)} rows, {count} negatives, {wrong} of them hidden positives",
          flush=True)  # fmt: skip


def train(model: str, rows: Path, folder: Path, seed: int) -> None:
    """Train on the rows; a finished run is left alone."""
    run("train", "--model_name_or_path", model, "--train_file", rows, "--output_dir", folder,
        "--seed", seed, *TRAINING)  # fmt: skip


def run(*command: object) -> None:
    """Run `python -m finetune`; what it prints goes to standard error."""
    arguments = [sys.executable, "-m", "finetune", *map(str, command)]
    subprocess.run(arguments, check=True, stdout=sys.stderr)  # noqa: S603


def ndcg(served: Served, lists: list[CandidateList], output: Path) -> list[float]:
    """Return nDCG@10 of each list."""
    scores = saved_scores(served, {"med_en.dev": lists}, output)["med_en.dev"]
    return measure(ScoredSet("med_en.dev", lists, scores))["nDCG@10"]


def print_comparison(found: dict[str, list[float]]) -> None:
    """Print every pair of models with the paired randomisation test."""
    names = list(found)
    print("\n| from | to | nDCG@10 | difference [95 %] | p |\n|---|---|---|---|---|")
    for i, before in enumerate(names):
        for after in names[i + 1 :]:
            c = compare(found[before], found[after])
            print(f"| {before} | {after} | {c.mean_before:.3f} -> {c.mean_after:.3f} | "
                  f"{c.difference:+.3f} [{c.ci_low:+.3f}, {c.ci_high:+.3f}] | "
                  f"{c.p_value:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
