r"""Distil a larger reranker into a smaller one: the small one learns the large one's scores.

    python recipes/08_distill.py                # the embedded model teaches its own base, minutes
    python recipes/08_distill.py Qwen/Qwen3-Reranker-8B Qwen/Qwen3-Reranker-0.6B \
        train.jsonl dev.jsonl --learning_rate 1e-4

Training rows need no new labels: the teacher's log-odds say how much better one document is than
another, which yes and no do not. Flags after the files go to `python -m finetune train`.
"""

import json
import sys
from pathlib import Path

from finetune.cli import main as finetune
from finetune.data import read_training_file
from qwen3_reranker import Reranker

SUPPORT = Path(__file__).parent / "support"
names = [*sys.argv[1:5], *[None] * 4][:4]
teacher, student = names[0] or "embedded", names[1] or "embedded-base"
rows_file = Path(names[2] or SUPPORT / "train.jsonl")
dev_file = Path(names[3] or SUPPORT / "dev.jsonl")
scored_file = Path("distill.jsonl")

rows = read_training_file(str(rows_file)).groups
with Reranker(teacher) as reranker, scored_file.open("w", encoding="utf-8") as file:
    for number, row in enumerate(rows, 1):
        documents = [*row.positive, *row.negative]
        log_odds = reranker.log_odds(row.query, documents, instruction=row.instruction)
        scores = {
            "positive": log_odds[: len(row.positive)],
            "negative": log_odds[len(row.positive) :],
        }
        line = {
            "query": row.query, "positive": row.positive, "negative": row.negative,
            "instruction": row.instruction, "scores": scores,
        }  # fmt: skip
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"\rScored {number} of {len(rows)} rows", end="", file=sys.stderr)
print(f"\nThe teacher's scores: {scored_file}")

sys.exit(
    finetune([
        "train", "--model_name_or_path", student, "--train_file", str(scored_file),
        "--eval_file", str(dev_file), "--output_dir", "distilled", "--loss", "distill",
        *sys.argv[5:],
    ])
)  # fmt: skip
