r"""Teach a model your domain: mine negatives, fine-tune, evaluate, export.

    python recipes/12_own_domain.py             # the embedded model at a support desk, minutes
    python recipes/12_own_domain.py Qwen/Qwen3-Reranker-0.6B labelled.jsonl corpus.jsonl dev.jsonl

All you label are queries and a passage that answers each: `{"query", "positive": [...],
"instruction"?}`. The corpus is where the answers are looked for, the dev file are candidate lists
of other queries, with labels. Flags after the files go to `python -m finetune train`. Needs the
extras `finetune` and `mine`.
"""

import json
import shlex
import sys
from pathlib import Path

from finetune.cli import main as finetune

SUPPORT = Path(__file__).parent / "support"
MINED, ADAPTER, MODEL = "mined.jsonl", "own-adapter", "own-model"


def support_desk() -> list[str]:
    """Write the support desk as a user has it: answered questions and a pile of passages."""
    lines = (SUPPORT / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    passages = dict.fromkeys(text for row in rows for text in row["positive"] + row["negative"])
    for row in rows:
        del row["negative"]  # what `mine` is there for
    for name, items in (("labelled", rows), ("corpus", [{"text": text} for text in passages])):
        content = "".join(json.dumps(item) + "\n" for item in items)
        Path(f"{name}.jsonl").write_text(content, encoding="utf-8")
    return ["labelled.jsonl", "corpus.jsonl", str(SUPPORT / "dev.jsonl")]


def step(*command: str) -> None:
    """Run a command as a shell would; the first that fails ends the recipe."""
    print("\n$ qwen3-finetune", shlex.join(command), flush=True)
    if status := finetune(command):
        sys.exit(status)


if len(sys.argv) in (3, 4):
    sys.exit(__doc__)
base = sys.argv[1] if len(sys.argv) > 1 else "embedded"
labelled, corpus, dev = sys.argv[2:5] or support_desk()
flags = sys.argv[5:]
if len(sys.argv) < 5:  # what a network so small needs: see support/train.yaml
    flags = "--loss hybrid --learning_rate 5e-4 --num_train_epochs 1.5 --max_length 256".split()

step("mine", "--train_file", labelled, "--corpus", corpus, "--output_file", MINED,
     "--teacher", base, "--depth", "20", "--num_negatives", "5")  # fmt: skip
step("train", "--model_name_or_path", base, "--train_file", MINED, "--eval_file", dev,
     "--output_dir", ADAPTER, *flags)  # fmt: skip
step("evaluate", "--model", base, "--adapter", ADAPTER, "--eval_file", dev)
step("export", "--model", base, "--adapter", ADAPTER, "--format", "seq-cls",
     "--output_dir", MODEL)  # fmt: skip
print(f"\nReranker({base!r}, adapter={ADAPTER!r}) or Reranker({MODEL!r}) ranks with it.")
