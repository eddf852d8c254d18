"""What a LangChain document compressor that reranks must do, whoever wrote it.

langchain-tests has no suite for compressors. To run yours through this one, copy this file and
`contract_model.py`, and say in a test module how yours is made over a scripted model:

    class TestMine(CompressorContract):
        def make(self, model: Model, **settings: Any) -> BaseDocumentCompressor:
            return MyCompressor(client=FakeClient(model), **settings)

`model(query, texts)` returns a score per text, or too few, too many or NaN, as a broken backend
would. `settings` are `top_n` (None keeps all) and `score_threshold` (lowest score kept); without
them every document must come back. Calls run sync and async.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load import dumps

from .contract_model import Model, text

Compress = Callable[..., list[Document]]
QUERY = "which one?"


def document(name: str, score: float | str, **metadata: Any) -> Document:
    """Return a document that the model gives this score."""
    return Document(
        page_content=text(name, score),
        id=f"id-{name}",
        metadata={"name": name, "tags": ["a", {"deep": name}], **metadata},
    )


def names(documents: Sequence[Document]) -> list[str]:
    """Return the names of documents, in order."""
    return [each.metadata["name"] for each in documents]


def compress_async(compressor: BaseDocumentCompressor, *args: Any, **more: Any) -> Any:
    """Compress on an event loop of its own."""
    return asyncio.run(compressor.acompress_documents(*args, **more))


def an_error() -> Any:
    """Expect an error of any kind, as long as it says something."""
    return pytest.raises(Exception, match=r".")


class CompressorContract:
    """Tests that need only `make`."""

    def make(self, model: Model, **settings: Any) -> BaseDocumentCompressor:
        """Return the compressor under test, scoring by this model."""
        raise NotImplementedError

    @pytest.fixture(params=["sync", "async"])
    def compress(self, request: pytest.FixtureRequest) -> Compress:
        """Return a call of one of the two methods, its result as a list."""

        def call(compressor: BaseDocumentCompressor, *args: Any, **more: Any) -> list[Document]:
            if request.param == "sync":
                return list(compressor.compress_documents(*args, **more))
            return list(compress_async(compressor, *args, **more))

        return call

    def test_no_documents_give_no_documents_and_no_model_call(self, compress: Compress) -> None:
        model = Model()
        assert compress(self.make(model, top_n=3), [], QUERY) == []
        assert model.calls == []

    def test_best_document_comes_first(self, compress: Compress) -> None:
        documents = [document("a", 0.2), document("b", 0.9), document("c", 0.5)]
        assert names(compress(self.make(Model(), top_n=3), documents, QUERY)) == ["b", "c", "a"]

    def test_score_zero_is_a_score_like_any_other(self, compress: Compress) -> None:
        documents = [document("a", 0.0), document("b", 0.9)]
        assert names(compress(self.make(Model(), top_n=3), documents, QUERY)) == ["b", "a"]

    def test_equal_scores_keep_the_retrievers_order(self, compress: Compress) -> None:
        documents = [document(name, 0.4) for name in "dbca"] + [document("e", 0.8)]
        assert names(compress(self.make(Model(), top_n=5), documents, QUERY)) == list("edbca")

    @pytest.mark.parametrize("top_n", [1, 2, 3, 7])
    def test_top_n_keeps_that_many(self, compress: Compress, top_n: int) -> None:
        documents = [document("a", 0.2), document("b", 0.9), document("c", 0.5)]
        kept = compress(self.make(Model(), top_n=top_n), documents, QUERY)
        assert names(kept) == ["b", "c", "a"][:top_n]

    def test_top_n_none_keeps_all(self, compress: Compress) -> None:
        documents = [document(str(i), (i + 1) / 30) for i in range(20)]
        assert len(compress(self.make(Model(), top_n=None), documents, QUERY)) == 20

    @pytest.mark.parametrize("top_n", [0, -1])
    def test_top_n_below_one_is_refused(self, top_n: int) -> None:
        with pytest.raises(ValueError, match="top_n"):
            self.make(Model(), top_n=top_n)

    def test_score_threshold_cuts_before_top_n(self, compress: Compress) -> None:
        documents = [
            document(name, score) for name, score in zip("abcd", (0.1, 0.6, 0.5, 0.9), strict=True)
        ]
        for top_n, kept in ((None, "dbc"), (2, "db")):
            compressor = self.make(Model(), top_n=top_n, score_threshold=0.5)
            assert names(compress(compressor, documents, QUERY)) == list(kept)
        compressor = self.make(Model(), top_n=2, score_threshold=0.95)
        assert compress(compressor, documents, QUERY) == []

    def test_misspelt_setting_is_refused(self) -> None:
        with pytest.raises((TypeError, ValueError)):
            self.make(Model(), topn=3)

    def test_id_text_and_metadata_are_kept(self, compress: Compress) -> None:
        documents = [document("a", 0.2), document("b", 0.9)]
        for kept in compress(self.make(Model(), top_n=2), documents, QUERY):
            (given,) = [each for each in documents if each.id == kept.id]
            assert kept.page_content == given.page_content
            assert kept.metadata.items() >= given.metadata.items()
            assert kept.type == given.type

    def test_score_is_a_plain_float_in_the_metadata(self, compress: Compress) -> None:
        documents = [document("a", 0.25), document("b", 0.75)]
        kept = compress(self.make(Model(), top_n=2), documents, QUERY)
        scores = [each.metadata["relevance_score"] for each in kept]
        assert [type(score) for score in scores] == [float, float]
        assert scores == pytest.approx([0.75, 0.25], abs=1e-6)

    def test_score_of_an_earlier_reranker_is_replaced(self, compress: Compress) -> None:
        documents = [document("a", 0.25, relevance_score=0.99)]
        (kept,) = compress(self.make(Model(), top_n=1), documents, QUERY)
        assert kept.metadata["relevance_score"] == pytest.approx(0.25, abs=1e-6)

    def test_callers_documents_stay_as_they_were(self, compress: Compress) -> None:
        documents = [document("a", 0.2), document("b", 0.9)]
        before = [each.model_copy(deep=True) for each in documents]
        kept = compress(self.make(Model(), top_n=2), documents, QUERY)
        for each in kept:
            each.metadata["mine"] = True
        assert documents == before

    def test_tuple_of_documents_is_accepted(self, compress: Compress) -> None:
        documents = (document("a", 0.2), document("b", 0.9))
        assert names(compress(self.make(Model(), top_n=2), documents, QUERY)) == ["b", "a"]

    def test_equal_documents_are_all_kept(self, compress: Compress) -> None:
        documents = [document("a", 0.3), document("b", 0.9), document("a", 0.3)]
        kept = compress(self.make(Model(), top_n=None), documents, QUERY)
        assert names(kept) == ["b", "a", "a"]

    def test_any_list_comes_back_sorted_and_whole(self, compress: Compress) -> None:
        rng = random.Random(5)
        for _ in range(20):
            scores = [rng.randrange(1, 10) / 10 for _ in range(rng.randrange(1, 30))]
            documents = [document(str(i), score) for i, score in enumerate(scores)]
            kept = compress(self.make(Model(), top_n=len(scores)), documents, QUERY)
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            assert names(kept) == [str(i) for i in order]

    @pytest.mark.parametrize("score", ["nan", "inf"])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_score_that_is_no_number_is_an_error(
        self, compress: Compress, score: str, place: int
    ) -> None:
        documents = [document("a", 0.2), document("b", 0.9), document("c", 0.5)]
        documents[place] = document("broken", score)
        with an_error():
            compress(self.make(Model(), top_n=3), documents, QUERY)

    @pytest.mark.parametrize("surplus", [-1, -3, 1])
    def test_wrong_number_of_scores_is_an_error(self, compress: Compress, surplus: int) -> None:
        documents = [document("a", 0.2), document("b", 0.9), document("c", 0.5)]
        with an_error():
            compress(self.make(Model(surplus=surplus), top_n=3), documents, QUERY)

    def test_error_of_the_model_reaches_the_caller(self, compress: Compress) -> None:
        # A silent fall-back to the retriever's order would hide an outage for weeks.
        model = Model(error=RuntimeError("the model is gone"))
        with pytest.raises(RuntimeError, match="the model is gone"):
            compress(self.make(model, top_n=3), [document("a", 0.2)], QUERY)

    def test_one_request_is_one_model_call(self, compress: Compress) -> None:
        model = Model()
        documents = [document(str(i), (i + 1) / 30) for i in range(20)]
        compress(self.make(model, top_n=3), documents, QUERY)
        ((query, texts),) = model.calls
        assert query == QUERY
        assert sorted(texts) == sorted(each.page_content for each in documents)

    def test_sync_and_async_agree(self) -> None:
        compressor = self.make(Model(), top_n=3)
        documents = [document(str(i), (i * 7 % 20) / 20 + 0.01) for i in range(20)]
        sync = list(compressor.compress_documents(documents, QUERY))
        assert sync == list(compress_async(compressor, documents, QUERY))

    def test_concurrent_calls_get_their_own_documents(self) -> None:
        compressor = self.make(Model(), top_n=4)
        lists = [[document(f"{c}-{i}", (i + c) % 5 / 6 + 0.1) for i in range(5)] for c in range(24)]
        queries = [f"query {c}" for c in range(24)]

        async def together() -> list[Sequence[Document]]:
            calls = map(compressor.acompress_documents, lists, queries)
            return await asyncio.gather(*calls)

        alone = [list(kept) for kept in map(compressor.compress_documents, lists, queries)]
        with ThreadPoolExecutor(8) as pool:
            threaded = [
                list(kept) for kept in pool.map(compressor.compress_documents, lists, queries)
            ]
        assert threaded == alone
        assert [list(kept) for kept in asyncio.run(together())] == alone

    def test_pickled_copy_does_the_same(self, compress: Compress) -> None:
        documents = [document("a", 0.2), document("b", 0.9), document("c", 0.5)]
        compressor = self.make(Model(), top_n=2)
        copy = pickle.loads(pickle.dumps(compressor))  # noqa: S301
        assert compress(copy, documents, QUERY) == compress(compressor, documents, QUERY)

    def test_result_goes_through_json(self, compress: Compress) -> None:
        kept = compress(self.make(Model(), top_n=2), [document("a", 0.2)], QUERY)
        assert json.loads(json.dumps([each.metadata for each in kept]))[0]["name"] == "a"
        assert "not_implemented" not in dumps(kept)

    def test_callbacks_are_accepted(self, compress: Compress) -> None:
        documents = [document("a", 0.2), document("b", 0.9)]
        for callbacks in (None, [], [BaseCallbackHandler()]):
            kept = compress(self.make(Model(), top_n=2), documents, QUERY, callbacks=callbacks)
            assert names(kept) == ["b", "a"]
