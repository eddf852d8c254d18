"""A `Reranker` as mteb calls a cross-encoder.

Decides which instruction a pair is scored under and how pairs become calls. Knows nothing of
benchmarks, files and metrics; mteb itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qwen3_reranker import Reranker
from qwen3_reranker.bulk import score_columns

_PAIRS = 1024
"""Pairs of one call: some ten lists of a hundred, 50 MB of the longest documents there are."""

Pair: TypeAlias = tuple[str, str, str | None]
"""Query, document, instruction."""


class MtebCrossEncoder:
    """Scores what mteb asks for, as `mteb.models.CrossEncoderProtocol` of mteb 2 wants it.

    Scores are log-odds in float32: P("yes") rounds to ties near 1, and mteb orders ties by the
    names of the documents.

    Args:
        reranker: What scores.
        meta: The `ModelMeta` under which mteb keeps results.
        task_prompts: Task sentences by the name of their task, before mteb's own.
    """

    def __init__(self, reranker: Reranker, meta: Any, task_prompts: Mapping[str, str]) -> None:
        self.mteb_model_meta = meta
        self._reranker = reranker
        self._task_prompts = task_prompts

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Return the log-odds of each pair, in the order of the pairs.

        Args:
            inputs1: Loader of queries, one per pair.
            inputs2: Loader of documents, aligned with it.
            task_metadata: Has the task's name and its sentence.
            hf_split: Not read, as the three below: the pairs are the same whatever their origin.
            hf_subset: Not read.
            prompt_type: Not read.
            show_progress_bar: Whether to show one; None shows it on a terminal.
            **kwargs: Not read: settings of mteb's loaders, such as `batch_size`.
        """
        pairs = _pairs(inputs1, inputs2, task_instruction(task_metadata, self._task_prompts))
        scores = [np.empty(0, np.float32)]
        with tqdm(
            total=len(inputs1.dataset),
            desc=task_metadata.name,
            unit=" pairs",
            leave=False,
            disable=None if show_progress_bar is None else not show_progress_bar,
        ) as bar:
            while chunk := list(islice(pairs, _PAIRS)):
                queries, documents, instructions = zip(*chunk, strict=True)
                columns = {"query": queries, "document": documents, "instruction": instructions}
                found = score_columns(self._reranker, columns)  # equal queries are read once
                scores.append(found["log_odds"].astype(np.float32))
                bar.update(len(chunk))
        return np.concatenate(scores)


def task_instruction(task_metadata: Any, task_prompts: Mapping[str, str]) -> str | None:
    """Return a task's sentence; None leaves it to the template.

    Args:
        task_metadata: mteb's record of the task; its `prompt` is a sentence or one per side.
        task_prompts: Sentences by the name of their task, before mteb's own.
    """
    prompt = task_metadata.prompt
    if isinstance(prompt, Mapping):
        prompt = prompt.get("query")
    return task_prompts.get(task_metadata.name, prompt) or None


def _pairs(
    queries: Iterable[Mapping[str, Any]],
    documents: Iterable[Mapping[str, Any]],
    instruction: str | None,
) -> Iterator[Pair]:
    for batch, texts in zip(queries, documents, strict=True):
        # A dataset's own instruction stands in its column; "text" is the query with it appended,
        # so that reading "text" would put it into the prompt twice.
        own = batch.get("instruction") or [None] * len(batch["query"])
        for each, query, document in zip(own, batch["query"], texts["text"], strict=True):
            yield query, document, each or instruction
