r"""Merge the adapters of two domains into one, and see what each domain keeps.

    python recipes/09_merge.py Qwen/Qwen3-Reranker-0.6B \
        legal-adapter medical-adapter legal-dev.jsonl medical-dev.jsonl

The adapters come from two runs of `python -m finetune train` on one base with the same settings;
the dev files are candidate lists with labels. `slerp` takes the point half-way on the arc between
the two, as the authors of Qwen3-Reranker do with whole checkpoints. A model for both domains
trained on the rows of both is the one to beat.
"""

import sys
from statistics import mean

from finetune.cli import main as finetune
from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.data.candidates import ndcg_at_10
from qwen3_reranker.data.trec import read_candidates

MERGED = "merged-adapter"

base, first, second, *dev_files = sys.argv[1:]
status = finetune(
    ["merge", "--adapter", first, second, "--method", "slerp", "--output_dir", MERGED]
)
if status:
    sys.exit(status)

print("nDCG@10".ljust(40) + "".join(f"{file[-20:]:>22}" for file in dev_files))
for adapter in (None, first, second, MERGED):
    found = []
    with Reranker(base, adapter=adapter) as reranker:
        for file in dev_files:
            lists = read_candidates(file)
            rankings = reranker.rank_many(
                [each.query for each in lists],
                [each.texts for each in lists],
                instruction=[each.instruction for each in lists],
            )
            gains = []
            for each, ranking in zip(lists, rankings, strict=True):
                gains.append(ndcg_at_10(each.labels or [], in_order(ranking), each.missing_labels))
            found.append(mean(gains))
    print((adapter or base)[-39:].ljust(40) + "".join(f"{value:22.4f}" for value in found))
