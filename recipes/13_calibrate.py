"""Calibrate and cut: scores that are shares of what is relevant, and a threshold for a precision.

    python recipes/13_calibrate.py              # the embedded model at a support desk, a minute
    python recipes/13_calibrate.py Qwen/Qwen3-Reranker-0.6B judged.jsonl --precision 0.9

The judged file are candidate lists as your first stage finds them, every candidate with a label:
the shares that are learned are those of its candidates. Needs the extras
`finetune` and `calibration`.
"""

import json
import sys
from pathlib import Path

from finetune.cli import main as finetune
from qwen3_reranker import Reranker
from qwen3_reranker.data.trec import read_candidates

SUPPORT = Path(__file__).parent / "support"
model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
judged = sys.argv[2] if len(sys.argv) > 2 else str(SUPPORT / "dev.jsonl")
flags = sys.argv[3:] or ["--precision", "0.3"]  # a tenth of its candidates are relevant

command = ["calibrate", "--model", model, "--eval_file", judged, "--output_dir", "calibration"]
if status := finetune([*command, *flags]):
    sys.exit(status)

file = Path("calibration/calibration.json")
found = json.loads(file.read_text(encoding="utf-8"))["threshold"]  # null if none is that precise
threshold = None if found is None else found["score_threshold"]
with Reranker(model, calibration=file) as reranker:
    for each in read_candidates(judged)[:3]:
        ranking = reranker.rank(
            each.query, each.texts, instruction=each.instruction, score_threshold=threshold
        )
        print(f"\n{each.query}: {len(ranking)} of {len(each.texts)} are kept")
        for result in ranking:
            print(f"{result.score:.2f}  {result.document[:80]}")
