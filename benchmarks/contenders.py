"""Ways to get P("yes") of documents from text, as their users would set them up.

Decides how each peer is called. Knows nothing of workloads or clocks. Every contender is handed a
batch, that is (query, documents) pairs, and returns one number per document, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder

from finetune.gguf_export import FILE, write_gguf
from finetune.whole import load_whole
from qwen3_reranker import Reranker
from qwen3_reranker.model import loading
from qwen3_reranker.model.loading import DTYPES
from tests.official import INSTRUCTION, PREFIX, SUFFIX, format_body

from .workload import DisagreementError, count_tokens

Batch: TypeAlias = Sequence[tuple[str, list[str]]]

OURS = "qwen3-reranker"
OURS_INT8 = "qwen3-reranker, int8"
OURS_STOCK = "qwen3-reranker, stock layers"
OFFICIAL = "official script"
LLAMA_CPP = "llama.cpp"
NAMES = (
    OFFICIAL, "official, last logits", "transformers, sorted", "sentence-transformers",
    LLAMA_CPP, OURS, OURS_INT8, OURS_STOCK,
)  # fmt: skip
OFFICIAL_BATCH = 8
_MAX_LENGTH = 8192
_SORTED_TOKENS = 2048
# Greatest difference in P("yes") between any two contenders. In bfloat16 the official script
# differs from itself by up to 0.05 when the batch changes, so only float32 shows a wrong prompt.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
_LEAST_VARIATION = 0.01


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to score a batch, and the tokens computed for it so far."""

    name: str
    score: Callable[[Batch], list[float]]
    tokens: Callable[[], int]


class OfficialScript:
    """The script of the model card, with its pairs cut into batches.

    The card sends all pairs at once; their full-vocabulary logits would not fit into memory.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        auto: Any = transformers
        self.tokenizer = auto.AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = auto.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.prefix = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        self.suffix = self.tokenizer.encode(SUFFIX, add_special_tokens=False)
        self.no_yes = self.tokenizer.convert_tokens_to_ids(["no", "yes"])

    def score(self, batch: Batch, **forward: Any) -> list[float]:
        """Return P("yes") of each document; `forward` goes to the model."""
        ids = self._encode(batch)
        starts = range(0, len(ids), OFFICIAL_BATCH)
        return [p for i in starts for p in self._forward(ids[i : i + OFFICIAL_BATCH], **forward)]

    def score_sorted(self, batch: Batch) -> list[float]:
        """Return P("yes") of each document: longest first, as many as fit a budget, last logits.

        What a careful user of the library writes.
        """
        ids = self._encode(batch)
        scores = [0.0] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        while order:
            count = max(1, _SORTED_TOKENS // len(ids[order[0]]))
            chosen, order = order[:count], order[count:]
            found = self._forward([ids[i] for i in chosen], logits_to_keep=1, use_cache=False)
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
        return scores

    def _encode(self, batch: Batch) -> list[list[int]]:
        pairs = [format_body(INSTRUCTION, query, text) for query, texts in batch for text in texts]
        room = _MAX_LENGTH - len(self.prefix) - len(self.suffix)
        encoded = self.tokenizer(
            pairs, truncation="longest_first", max_length=room, return_attention_mask=False
        )
        return [self.prefix + ids + self.suffix for ids in encoded["input_ids"]]

    @torch.no_grad()
    def _forward(self, ids: list[list[int]], **forward: Any) -> list[float]:
        inputs = self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
        if len(ids) == 1:  # nothing is padded: without a mask attention is causal and fast
            inputs.pop("attention_mask")
        logits = self.model(**inputs.to(self.model.device), **forward).logits[:, -1, :]
        scores: list[float] = logits[:, self.no_yes].log_softmax(dim=1)[:, 1].exp().tolist()
        return scores


class LlamaCpp:
    """llama.cpp's rerank server without its HTTP, on the file that `finetune export` writes."""

    def __init__(self, folder: Path) -> None:
        from xllamacpp import Server

        from tests.compat.llama_server import rank_parameters

        write_gguf(load_whole(str(folder), None), folder)
        self.server = Server(rank_parameters(str(folder / FILE), _MAX_LENGTH))
        self.tokens = 0

    def score(self, batch: Batch) -> list[float]:
        """Return P("yes") of each document."""
        scores: list[float] = []
        for query, texts in batch:
            reply = self.server.handle_rerank({"query": query, "documents": texts})
            self.tokens += reply["usage"]["total_tokens"]
            rows = sorted(reply["results"], key=lambda row: row["index"])
            scores += [row["relevance_score"] for row in rows]
        return scores


def save_chat_template(folder: Path) -> None:
    """Write the template by which sentence-transformers renders a pair: one message per role."""
    message = (
        '{{{{ messages | selectattr("role", "eq", "{}") | map(attribute="content") | first }}}}'
    )
    body = format_body(INSTRUCTION, message.format("query"), message.format("document"))
    # Jinja drops one newline at the end.
    (folder / "chat_template.jinja").write_text(PREFIX + body + SUFFIX + "\n", encoding="utf-8")


def load(folder: Path, dtype: str, device: str, names: Sequence[str] = NAMES) -> list[Contender]:
    """Load the contenders of these names; those of the official script share a model."""
    contenders: list[Contender] = []
    if set(names) & {OFFICIAL, "official, last logits", "transformers, sorted"}:
        official = OfficialScript(folder, DTYPES[dtype], device)
        tokens = count_tokens(official.model)
        last = partial(official.score, logits_to_keep=1, use_cache=False)
        contenders += [
            Contender(OFFICIAL, official.score, tokens),
            Contender("official, last logits", last, tokens),
            Contender("transformers, sorted", official.score_sorted, tokens),
        ]
    if "sentence-transformers" in names:
        save_chat_template(folder)
        encoder = CrossEncoder(
            str(folder), device=device, local_files_only=True,
            model_kwargs={"dtype": DTYPES[dtype]},
        )  # fmt: skip

        def predict(batch: Batch) -> list[float]:
            pairs = [(query, text) for query, texts in batch for text in texts]
            scores: list[float] = encoder.predict(pairs).tolist()
            return scores

        contenders.append(Contender("sentence-transformers", predict, count_tokens(encoder.model)))
    if LLAMA_CPP in names:
        llama = LlamaCpp(folder)
        contenders.append(Contender(LLAMA_CPP, llama.score, lambda: llama.tokens))
    for name, ours in ((OURS, dtype), (OURS_INT8, "int8"), (OURS_STOCK, dtype)):
        if name in names:
            reranker = Reranker(str(folder), dtype=ours, device=device)
            if name == OURS_STOCK:
                _use_stock_layers(reranker)
            contenders.append(Contender(name, partial(_rank, reranker), partial(_tokens, reranker)))
    return [contender for contender in contenders if contender.name in names]


def _use_stock_layers(reranker: Reranker) -> None:
    """Load it with transformers' own layers and weights as torch has them; packs stay ours."""
    with patch.object(loading, "prepacking_pays", lambda dtype: False):
        reranker.loaded.network.is_lean = False


def _rank(reranker: Reranker, batch: Batch) -> list[float]:
    rankings = reranker.rank_many([query for query, _ in batch], [texts for _, texts in batch])
    return [
        result.score
        for ranking in rankings
        for result in sorted(ranking, key=lambda result: result.index)
    ]


def _tokens(reranker: Reranker) -> int:
    return reranker.usage.tokens


def check_agreement(contenders: Sequence[Contender], batch: Batch, tolerance: float) -> str:
    """Score once with each, which also warms them up, and say how far they agree.

    Raises:
        DisagreementError: If they differ by more than `tolerance`, or scores hardly vary.
    """
    every = {contender.name: contender.score(batch) for contender in contenders}
    of_int8 = every.pop(OURS_INT8, None)  # rounded by design: what it is off is told, not judged
    if not every:
        return "nothing to compare with"
    scores = np.array(list(every.values()))
    difference, variation = np.ptp(scores, axis=0).max(), np.ptp(scores[0])
    if not difference <= tolerance:  # also when it is NaN
        names = list(every)
        from_first = np.abs(scores - scores[0]).max(axis=1)
        raise DisagreementError(
            f"scores differ by up to {difference:.2g}, but only {tolerance} is allowed. Apart from "
            f"the {names[0]}: "
            + ", ".join(f"{n} {d:.2g}" for n, d in zip(names[1:], from_first[1:], strict=True))
        )
    if scores.shape[1] > 1 and variation < _LEAST_VARIATION:
        raise DisagreementError(f"scores vary by {variation:.2g} only, so agreement shows nothing")
    told = f"scores agree within {difference:.1e} and vary by {variation:.2f}"
    if of_int8 is not None:
        told += f"; int8 is off by up to {np.abs(scores[0] - of_int8).max():.2f}"
    return told
