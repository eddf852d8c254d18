"""Training rows for the adapter of the embedded model, from public reranking sets.

    python recipes/embedded/prepare.py DATA_FOLDER rows
    python -m finetune train --config recipes/embedded/first.yaml
    python -m finetune train --config recipes/embedded/second.yaml

DATA_FOLDER holds general_en, med_en and code as `NAME.train.jsonl.xz`. From questions such as
"What are the treatments for X?" rows are derived whose query is X alone and whose instruction says
what is wanted: a model that ignores instructions cannot order those.

Rows stand in the order of training. Medical ones open, because a base that never ranked leaves
chance on them in 50 steps and on a mixture in 500; code, the hardest, is over half of the rest.
"""

import json
import lzma
import random
import re
import sys
from pathlib import Path

ASPECTS = {
    "Is X inherited": ("explains whether and how this condition is inherited",
                       "tells if this disease runs in families"),
    "What are the treatments for X": ("describes the treatments for this condition",
                                      "says how this disease can be treated or managed"),
    "What is X": ("explains what this condition is", "gives a general description of this disease"),
    "What are the symptoms of X": ("lists the symptoms of this condition",
                                   "describes the signs by which this disease shows"),
    "What are the genetic changes related to X": (
        "names the genes or genetic changes related to this condition",
        "says which gene mutations lead to this disease"),
    "How many people are affected by X": ("says how many people are affected by this condition",
                                          "tells how common this disease is"),
    "What causes X": ("explains what causes this condition", "gives the causes of this disease"),
    "How to diagnose X": ("explains how this condition is diagnosed",
                          "describes tests and exams that detect this disease"),
    "What is the outlook for X": ("gives the outlook (prognosis) for this condition",
                                  "says what course this disease is expected to take"),
    "Who is at risk for X": ("says who is at risk for this condition",
                             "names what raises the chance of this disease"),
    "How to prevent X": ("explains how to prevent this condition",
                         "says how this disease can be avoided"),
}  # fmt: skip
OPENINGS = (
    "Retrieve the passage that", "Find the passage which",
    "Given the name of a condition, retrieve the passage that",
)  # fmt: skip
WEB_SEARCH = (
    "Given a web search query about programming, retrieve the Python function that does what the "
    "query asks for"
)


def read(folder: Path, name: str) -> list[dict]:
    with lzma.open(folder / f"{name}.train.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_instruction(row: dict, rng: random.Random) -> dict | None:
    """Return the row with its question split into a condition and an instruction."""
    condition = row["positive"][0].split("\n")[0]
    question = re.sub(re.escape(condition), "X", row["query"], flags=re.IGNORECASE)
    question = " ".join(re.sub(r"\(are\)|\?", "", question).split())
    if question not in ASPECTS:
        return None
    instruction = f"{rng.choice(OPENINGS)} {rng.choice(ASPECTS[question])}"
    return {**row, "query": condition, "instruction": instruction}


def main(folder: Path, target: Path) -> None:
    rng = random.Random(0)
    general, medical, code = (read(folder, name) for name in ("general_en", "med_en", "code"))
    split = [derived for row in medical if (derived := by_instruction(row, rng))]
    searched = [row for row in code if row["instruction"] == WEB_SEARCH]  # judged by people
    described = [row for row in code if row["instruction"] != WEB_SEARCH]
    for row in rng.sample(described, len(described) // 3):
        row["instruction"] = WEB_SEARCH
    for rows in (general, medical, split, described):
        rng.shuffle(rows)
    opening = [*medical[:100], *split[:100]]
    mixture = [*general[:420], *medical[100:350], *split[100:350], *searched * 2, *described[:580]]
    second = [
        *general[420:1020], *medical[350:450], *split[350:450], *searched, *described[580:1280]
    ]  # fmt: skip
    for rows in (opening, mixture, second):
        rng.shuffle(rows)
    target.mkdir(exist_ok=True)
    for name, rows in (("first", [*opening, *mixture]), ("second", second)):
        with (target / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{len(rows)} rows: {target / name}.jsonl")


main(Path(sys.argv[1]), Path(sys.argv[2]))
