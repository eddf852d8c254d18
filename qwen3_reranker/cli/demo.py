"""`qwen3-reranker demo`: the core, a LangChain retriever and a LlamaIndex query engine at work.

Decides what a newcomer sees first. Nothing is downloaded: the passages were written for this
project, the first stage counts words, the language model is a mock. The only module of the core
that imports the integrations, because it shows them; nothing imports it but the command line.
"""

from __future__ import annotations

import re
import shlex
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import MetadataMode, TextNode

import langchain_qwen3_reranker
import llama_index.postprocessor.qwen3_reranker as llama_index_qwen3_reranker

from .. import __version__
from ..call.results import RankedDocument
from ..checkpoint.embedded import EMBEDDED
from ..data.candidates import ndcg_at_10
from ..data.demo_corpus import Passage, Query, read_corpus
from ..reranker import Reranker
from .terminal import WIDTH, fit

CANDIDATES = 10
"""Passages that the first stage hands to the reranker."""

_SHOWN = 3
_DIMENSIONS = 512


def embed(text: str) -> list[float]:
    """Return a unit vector that counts a text's words and runs of 3 to 5 characters, hashed.

    A first stage that needs no model: it finds equal words and knows nothing of meaning.
    """
    words = re.findall(r"\w+", text.lower())
    joined = " ".join(words)
    runs = [joined[i : i + n] for n in (3, 4, 5) for i in range(len(joined) - n + 1)]
    vector = np.zeros(_DIMENSIONS)
    for feature in [*words, *runs]:
        vector[zlib.crc32(feature.encode()) % _DIMENSIONS] += 1
    length = float(np.linalg.norm(vector)) or 1.0
    return [float(count) / length for count in vector]


class LangChainEmbedding(Embeddings):
    """`embed` for LangChain."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector per text."""
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return embed(text)


class LlamaIndexEmbedding(BaseEmbedding):
    """`embed` for LlamaIndex."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed(query)


def lines(model: str = EMBEDDED, **settings: Any) -> Iterator[str]:
    """Run the demo and yield what it prints, line by line.

    Args:
        model: As in `Reranker`.
        settings: `adapter`, `dtype` and `device`, as in `Reranker`.

    Raises:
        ModelLoadError: If the model cannot be loaded.
    """
    passages, queries = read_corpus()
    yield f"qwen3-reranker {__version__}: {len(passages)} passages, {len(queries)} queries"
    yield ""
    yield from _paragraph(
        f"Loading {model}; the first time on a machine it is converted, half a minute."
        if model == EMBEDDED
        else f"Loading {model}."
    )
    started = perf_counter()
    reranker = Reranker.shared(model, **settings)
    choices = reranker.loaded.choices
    yield f"Loaded in {perf_counter() - started:.1f} s: {choices['dtype']}, {choices['device']}."
    yield from _show_core(reranker, passages, queries)
    yield from _show_langchain(passages, queries[2], model, settings)
    yield from _show_llama_index(passages, queries[5], model, settings)
    yield from _next_steps(model, settings)


def _show_core(
    reranker: Reranker, passages: Sequence[Passage], queries: Sequence[Query]
) -> Iterator[str]:
    yield from _title(f"1. Core: rank_many() orders {CANDIDATES} candidates of each query")
    yield from _paragraph(
        "The first stage counts equal words (cosine). 'was' is a passage's place there; * marks "
        "the passages that answer the query. The queries are meant to be hard: other passages "
        "have their words. A small English model gets some of them wrong."
    )
    vectors = np.array([embed(passage.text) for passage in passages])
    cosines = [vectors @ np.array(embed(query.query)) for query in queries]
    candidates = [np.argsort(-cosine, kind="stable")[:CANDIDATES].tolist() for cosine in cosines]
    started = perf_counter()
    rankings = reranker.rank_many(
        [query.query for query in queries],
        [[passages[i].text for i in found] for found in candidates],
        instruction=[query.instruction for query in queries],
    )
    seconds = perf_counter() - started
    before, after = [], []
    for query, cosine, found, ranking in zip(queries, cosines, candidates, rankings, strict=True):
        labels = [int(passages[i].id in query.relevant) for i in found]
        before.append(ndcg_at_10(labels, [-float(place) for place in range(len(found))]))
        by_index = {result.index: result.log_odds for result in ranking}
        after.append(ndcg_at_10(labels, [by_index[place] for place in range(len(found))]))
        yield ""
        yield from _headed(query)
        yield "  now  was      cosine  P(yes)"
        for now, result in enumerate(ranking[:_SHOWN], 1):
            yield _row(now, result, float(cosine[found[result.index]]), labels[result.index])
    count = sum(map(len, candidates))
    yield ""
    yield from _paragraph(
        f"{count} documents in {seconds:.1f} s, {count / seconds:.0f} per second. nDCG@10 of the "
        f"first stage {mean(before):.3f}, reranked {mean(after):.3f} (1 is perfect)."
    )


def _show_langchain(
    passages: Sequence[Passage], query: Query, model: str, settings: dict[str, Any]
) -> Iterator[str]:
    yield from _title("2. LangChain: ContextualCompressionRetriever over InMemoryVectorStore")
    store = InMemoryVectorStore(LangChainEmbedding())
    store.add_documents([Document(p.text, id=p.id, metadata={"id": p.id}) for p in passages])
    retriever = ContextualCompressionRetriever(
        base_compressor=langchain_qwen3_reranker.Qwen3Reranker(
            model=model, instruction=query.instruction, top_n=_SHOWN, **settings
        ),
        base_retriever=store.as_retriever(search_kwargs={"k": CANDIDATES}),
    )
    yield from _headed(query)
    found = store.similarity_search_with_score(query.query, k=CANDIDATES)
    places = {document.metadata["id"]: place for place, (document, _) in enumerate(found, 1)}
    yield "  retrieved (cosine)"
    for document, cosine in found[:_SHOWN]:
        yield _item(places[document.metadata["id"]], cosine, document.page_content, "")
    started = perf_counter()
    documents = retriever.invoke(query.query)
    seconds = perf_counter() - started
    yield f"  retriever.invoke(query) (relevance_score), {seconds:.2f} s"
    for now, document in enumerate(documents, 1):
        score = document.metadata["relevance_score"]
        was = places[document.metadata["id"]]
        yield _item(now, score, document.page_content, f"was {was}")


def _show_llama_index(
    passages: Sequence[Passage], query: Query, model: str, settings: dict[str, Any]
) -> Iterator[str]:
    yield from _title("3. LlamaIndex: query engine over VectorStoreIndex, mock LLM")
    index = VectorStoreIndex(
        [TextNode(text=p.text, id_=p.id) for p in passages], embed_model=LlamaIndexEmbedding()
    )
    engine = index.as_query_engine(
        llm=MockLLM(),
        similarity_top_k=CANDIDATES,
        node_postprocessors=[
            llama_index_qwen3_reranker.Qwen3Reranker(
                model=model,
                instruction=query.instruction,
                top_n=_SHOWN,
                metadata_mode=MetadataMode.NONE,
                **settings,
            )
        ],
    )
    yield from _headed(query)
    found = index.as_retriever(similarity_top_k=CANDIDATES).retrieve(query.query)
    places = {node.node_id: place for place, node in enumerate(found, 1)}
    yield "  retrieved (cosine)"
    for node in found[:_SHOWN]:
        yield _item(places[node.node_id], node.get_score(), node.get_content(), "")
    started = perf_counter()
    response = engine.query(query.query)
    seconds = perf_counter() - started
    yield f"  query_engine.query(query).source_nodes, {seconds:.2f} s with the mock answer"
    for now, node in enumerate(response.source_nodes, 1):
        was = places[node.node_id]
        yield _item(now, node.get_score(), node.get_content(), f"was {was}")


def _next_steps(model: str, settings: dict[str, Any]) -> Iterator[str]:
    yield from _title("Next")
    if model == EMBEDDED:
        yield "The same with Qwen3-Reranker (1.2 GB from the Hub, where there is a connection):"
        yield "  qwen3-reranker demo --model Qwen/Qwen3-Reranker-0.6B"
    given = {"model": model, **settings}
    flags = " ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items() if value)
    yield "Your own texts:"
    yield f'  qwen3-reranker rank {flags} -q "capital of China" "Beijing" "Tea"'
    yield "Versions, and our scores beside the official algorithm's:"
    yield f"  qwen3-reranker doctor {shlex.quote(model)}"


def _title(text: str) -> list[str]:
    return ["", text, "-" * len(text)]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def _headed(query: Query) -> list[str]:
    instruction = [] if query.instruction is None else [fit(f"  as: {query.instruction}")]
    return [fit(f'"{query.query}"'), *instruction]


def _row(now: int, result: RankedDocument, cosine: float, label: int) -> str:
    was = result.index + 1
    move = f"{was - now:+d}" if was != now else "="
    start = f"  {now:3d}  {was:3d} {move:>3}  {cosine:6.3f}  {result.score:.4f}  "
    return start + fit(f"{'*' if label else ' '} {result.document}", WIDTH - len(start))


def _item(place: int, score: float, text: str, note: str) -> str:
    start = f"  {place:3d}  {score:6.4f}  {note:7}"
    return start + fit(text, WIDTH - len(start))
