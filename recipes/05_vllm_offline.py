"""vLLM's engine behind the verbs of `Reranker`, without a server: for large jobs on a GPU.

    python recipes/05_vllm_offline.py Qwen/Qwen3-Reranker-0.6B

Runs in an environment of vLLM's own, because the two packages pin different versions:

    pip install vllm
    pip install --no-deps qwen3-reranker

vLLM is given token ids, so prompts are this package's: text cannot spell control tokens, and a
document that is too long is cut and marked. Calls have no time limit.
"""

import asyncio
import sys
import threading
from pathlib import Path

from huggingface_hub import snapshot_download
from vllm import LLM, PoolingParams

from qwen3_reranker.call.encoding import Limits, align, encode_job
from qwen3_reranker.call.job import Job, Scored
from qwen3_reranker.call.verbs import BaseReranker
from qwen3_reranker.cli.vllm_command import vllm_settings
from qwen3_reranker.errors import ClosedError
from qwen3_reranker.text.tokenizer import PromptTokenizer

DOCUMENTS = [
    "Beijing is the capital of China.",
    "Tea is a drink.",
    "Seoul is the capital of Korea.",
]


class VllmReranker(BaseReranker):
    """`rank`, `score`, `rank_many`, `arank` and the others; keywords are those of `vllm.LLM`."""

    def __init__(self, model, *, instruction=None, **engine):
        super().__init__(instruction=instruction, timeout_s=None)
        settings, _ = vllm_settings(model)
        folder = Path(model)
        if not folder.is_dir():
            folder = Path(snapshot_download(model, allow_patterns="tokenizer.json"))
        self._tokenizer = PromptTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
        settings |= engine
        self._limits = Limits(settings["max_model_len"])
        self._llm = LLM(model, **settings)
        self._lock = threading.Lock()  # the engine is for one thread

    def close(self):
        self._llm = None

    def _refuse_if_closed(self):
        if self._llm is None:
            raise ClosedError("this reranker is closed. Make a new one.")

    def _score(self, job: Job) -> Scored:
        if not job.num_documents:
            return Scored.empty(job)
        encoded = encode_job(job, self._tokenizer, self._limits)
        prompts = [
            {"prompt_token_ids": [*group.head.tolist(), *document.tolist()]}
            for group in encoded.groups
            for document in group.documents
        ]
        raw = PoolingParams(use_activation=False)  # log-odds: they do not saturate
        with self._lock:
            outputs = iter(self._llm.classify(prompts, pooling_params=raw, use_tqdm=False))
        rows = [[next(outputs).outputs.probs[0] for _ in row] for row in job.documents]
        return align(encoded, rows, None)

    async def _ascore(self, job: Job) -> Scored:
        return await asyncio.to_thread(self._score, job)


if __name__ == "__main__":
    with VllmReranker(sys.argv[1]) as reranker:
        for result in reranker.rank("capital of China", DOCUMENTS):
            print(f"{result.score:.4f}  {result.document}")
