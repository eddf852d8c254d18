"""The first stage of mining: which passages of a corpus come near a query.

Decides how a corpus is read, what BM25 takes for a word, how a bi-encoder is asked, and how their
rankings become one. Knows nothing of relevance: what comes first here may well be a positive.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qwen3_reranker.data.documents import Document, read_documents
from qwen3_reranker.errors import DataError, MissingExtraError, ModelLoadError

from .data import TrainingGroup, normalised

BM25 = "bm25"
"""The retriever of this name needs no model; every other name is a bi-encoder's."""

PIECE = 4096
"""Passages that are encoded between two writes: what a killed run loses, at most."""

_WORD = re.compile(r"[^\W_]+")
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer; kana and ideographs. Their runs
# are indexed by single characters and pairs, as is usual where no dictionary is at hand.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+")
_TASK = re.compile(r"(?<=Instruct: ).*(?=\nQuery:)", re.DOTALL)

Rankings = list[list[int]]
"""For each query the positions of passages, best first."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages, each once.

    Attributes:
        documents: The first of those that differ in case and spacing alone; none is blank.
        has_titles: Whether a passage is its title and its text, or its text alone.
        num_left_out: Blank and repeated ones.
        num_known: Known positives that are passages.
    """

    documents: list[Document]
    has_titles: bool
    num_left_out: int
    num_known: int

    def text(self, place: int) -> str:
        """Return a passage as a model reads it."""
        document = self.documents[place]
        return document.titled_text if self.has_titles else document.text

    def forms(self, place: int) -> set[str]:
        """Return what a known positive would look like, normalised, if it were this passage."""
        document = self.documents[place]
        return {normalised(document.text), normalised(document.titled_text)}


def read_corpus(path: str, positives: Collection[str]) -> Corpus:
    """Read a corpus; titles stand before texts if they do so in the positives.

    Negatives with titles among positives without would teach a model to tell titles. In doubt
    they are read, joined by a space as BEIR and MTEB do.

    Args:
        path: As `read_documents`.
        positives: Known positives, normalised.

    Raises:
        DataError: If the file has faults or no passages.
    """
    documents = read_documents(path)
    texts = [normalised(document.text) for document in documents]
    titled = [normalised(document.titled_text) for document in documents]
    known = set(positives)
    has_titles = sum(key in known for key in titled) >= sum(key in known for key in texts)
    first: dict[str, int] = {}
    for place, key in enumerate(titled if has_titles else texts):
        if key:
            first.setdefault(key, place)
    if not first:
        raise DataError(f"{path} has no passages. Pass a file with one passage per line.")
    return Corpus(
        [documents[place] for place in first.values()],
        has_titles,
        num_left_out=len(documents) - len(first),
        num_known=len(known & {*titled, *texts}),
    )


def search(
    names: Sequence[str],
    corpus: Corpus,
    groups: Sequence[TrainingGroup],
    depth: int,
    folder: Path,
    device: str | None = None,
) -> Rankings:
    """Return up to `depth` passages for the query of each group.

    Several retrievers are united by best rank: a passage stands where the one that liked it most
    put it, because their scores cannot be compared; of equal ranks the retriever named first wins.

    Args:
        names: `BM25`, or names or folders of sentence-transformers models.
        corpus: What is searched.
        groups: Queries and their instructions.
        depth: Passages per query.
        folder: Where vectors are kept until the run is done, so that it can be interrupted.
        device: Of bi-encoders, such as cuda:1.

    Raises:
        ModelLoadError: If a bi-encoder cannot be loaded.
    """
    found = []
    for number, name in enumerate(names):
        if name == BM25:
            found.append(_search_bm25(corpus, groups, depth))
        else:
            vectors = folder / f"vectors-{number}"
            found.append(_search_vectors(name, corpus, groups, depth, vectors, device))
    return [unite(rankings, depth) for rankings in zip(*found, strict=True)]


def unite(rankings: Sequence[Sequence[int]], depth: int) -> list[int]:
    """Return the passages of several rankings by their best rank.

    Example:
        >>> unite([[1, 2, 3], [4, 3]], depth=4)
        [1, 4, 2, 3]
    """
    best: dict[int, tuple[int, int]] = {}
    for number, ranking in enumerate(rankings):
        for rank, place in enumerate(ranking):
            best[place] = min(best.get(place, (rank, number)), (rank, number))
    return sorted(best, key=best.__getitem__)[:depth]


def words(text: str) -> list[str]:
    """Return what BM25 counts: words, case folded; of scripts without spaces, n-grams.

    No stop words and no stems, which belong to one language each. `snake_case` is two words.

    Example:
        >>> words("The red_planet, 火星の")
        ['the', 'red', 'planet', '火', '星', 'の', '火星', '星の']
    """
    found: list[str] = []
    for word in _WORD.findall(normalised(text)):
        for run in _UNSPACED.findall(word):
            found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        found += _UNSPACED.sub(" ", word).split()
    return found


def require(names: Iterable[str]) -> None:
    """Refuse retrievers whose library is not there, before any work.

    Raises:
        MissingExtraError: With the command that installs it.
    """
    try:
        for name in names:
            if name == BM25:
                import bm25s  # type: ignore[import-untyped]  # noqa: F401
            else:
                import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of(f"the retriever '{name}'", error.name, "mine") from error


def _search_bm25(corpus: Corpus, groups: Sequence[TrainingGroup], depth: int) -> Rankings:
    """Return passages that share a word with the query, by BM25 (Lucene's variant)."""
    import bm25s

    count = len(corpus.documents)
    index = bm25s.BM25()
    passages = [words(corpus.text(place)) for place in _bar(range(count), "Indexing", "passages")]
    if not any(passages):  # which bm25s divides by
        return [[] for _ in groups]
    index.index(passages, show_progress=False)
    found: dict[str, list[int]] = {}
    for group in _bar(groups, "BM25", "queries"):
        if group.query not in found:
            tokens = [word for word in words(group.query) if word in index.vocab_dict]
            scores = index.get_scores(tokens) if tokens else np.zeros(count)
            # A passage that shares no word was not found; its place would be the file's order.
            found[group.query] = [place for place in _best(scores, depth) if scores[place] > 0]
    return [found[group.query] for group in groups]


def _search_vectors(
    name: str,
    corpus: Corpus,
    groups: Sequence[TrainingGroup],
    depth: int,
    folder: Path,
    device: str | None,
) -> Rankings:
    """Return passages by the product of their vectors with the query's."""
    encoder = _load_encoder(name, device)
    settings = {
        "normalize_embeddings": encoder.similarity_fn_name != "dot",
        "show_progress_bar": False,
        "convert_to_numpy": True,
    }
    folder.mkdir(exist_ok=True)
    pieces = []
    for start in _bar(range(0, len(corpus.documents), PIECE), "Encoding", "pieces"):
        file = folder / f"{start}.npy"
        if not file.is_file():
            places = range(start, min(start + PIECE, len(corpus.documents)))
            _save(file, encoder.encode_document([corpus.text(i) for i in places], **settings))
        pieces.append(np.load(file))
    passages = np.concatenate(pieces)  # (passages, width)
    members: dict[str | None, list[int]] = {}
    for i, group in enumerate(groups):
        prompt = query_prompt(encoder.prompts.get("query"), group.instruction)
        members.setdefault(prompt, []).append(i)
    found: Rankings = [[] for _ in groups]
    for prompt, places in _bar(members.items(), "Searching", "instructions"):
        texts = [groups[i].query for i in places]
        queries = encoder.encode_query(texts, prompt=prompt, **settings)
        for i, query in zip(places, queries, strict=True):
            found[i] = _best(passages @ query, depth)
    return found


def query_prompt(given: str | None, instruction: str | None) -> str | None:
    r"""Return what stands before a query: the checkpoint's own prompt, with the row's instruction.

    Qwen3-Embedding, and models after its pattern, take a task sentence as a reranker does; others
    have no place for one.

    Example:
        >>> query_prompt("Instruct: Given a web search query\nQuery:", "Find law")
        'Instruct: Find law\nQuery:'
        >>> query_prompt("query: ", "Find law")
        'query: '
    """
    if given is None or not instruction:
        return given
    return _TASK.sub(lambda _: instruction, given)


def _load_encoder(name: str, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(
            name,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # of many libraries
        raise ModelLoadError(
            f"bi-encoder '{name}' cannot be loaded ({type(error).__name__}). Pass the name or "
            "folder of a sentence-transformers model with safetensors weights."
        ) from error


def _best(scores: npt.NDArray[Any], depth: int) -> list[int]:
    """Return the places of the best scores; equal ones stand in the corpus's order."""
    depth = min(depth, len(scores))
    lowest = np.partition(scores, -depth)[-depth]
    places = np.flatnonzero(scores >= lowest)
    order = np.argsort(-scores[places], kind="stable")[:depth]
    found: list[int] = places[order].tolist()
    return found


def _save(file: Path, vectors: npt.NDArray[np.float32]) -> None:
    partial = file.with_suffix(".partial")
    with partial.open("wb") as opened:
        np.save(opened, vectors)
    os.replace(partial, file)


def _bar(items: Any, what: str, unit: str) -> Any:
    return tqdm(items, desc=what, unit=f" {unit}", leave=False, disable=None)
