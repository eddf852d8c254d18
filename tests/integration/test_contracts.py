"""Ours through the contract suites, over a fake reranker and over the whole core; and a peer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_classic.retrievers.document_compressors.cross_encoder import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from numpy.typing import NDArray
from tokenizers import Tokenizer

from langchain_qwen3_reranker import Qwen3Reranker as LangChainReranker
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as LlamaIndexReranker
from qwen3_reranker import RankedDocument, RemoteError
from qwen3_reranker.call.results import cut_ranking
from qwen3_reranker.client import http
from qwen3_reranker.engine.packing import Pack
from tests import real_parts
from tests.contract_compressor import CompressorContract
from tests.contract_model import Model
from tests.contract_postprocessor import PostprocessorContract
from tests.fakes import FakeModel, loaded
from tests.fault_server import FaultServer, fault_server


@dataclass
class CarelessReranker:
    """Passes on whatever the model returns, so that only the integration can notice."""

    model: Model

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedDocument]:
        scores = self.model(query, documents)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        ranking = [RankedDocument(i, "", scores[i], scores[i], False) for i in order]
        return cut_ranking(ranking, top_n, score_threshold)

    async def arank(self, *args: Any, **more: Any) -> list[RankedDocument]:
        return self.rank(*args, **more)


class TestLangChain(CompressorContract):
    def make(self, model: Model, **settings: Any) -> BaseDocumentCompressor:
        return LangChainReranker(reranker=CarelessReranker(model), **settings)


class TestLlamaIndex(PostprocessorContract):
    def make(self, model: Model, **settings: Any) -> BaseNodePostprocessor:
        return LlamaIndexReranker(reranker=CarelessReranker(model), **settings)

    def test_settings_go_through_json(self) -> None:
        # An injected object cannot; refused, where another model would take its place unseen.
        dumped = json.loads(self.make(Model(), top_n=7).to_json())
        assert (dumped["top_n"], dumped["reranker"]) == (7, "CarelessReranker")
        with pytest.raises(ValueError, match="reranker"):
            LlamaIndexReranker.from_dict(dumped)


def _log_odds(p: float) -> float:
    if not 0 <= p <= 1:
        return p  # NaN and infinity, as they are
    return math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(50, p - 0.5)


@cache
def control_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(real_parts.qwen3_tokenizer_file()))


class ReadingNetwork:
    """Reads query and documents out of a pack's token ids and asks the scripted model."""

    def __init__(self) -> None:
        self.model = Model()
        self._decode = control_tokenizer().decode
        self._num_suffix = len(real_parts.qwen3_tokenizer().suffix)

    def score(self, pack: Pack) -> NDArray[np.float32]:
        (span,) = pack.spans
        head = self._decode(pack.token_ids[span.head].tolist())
        query = head.split("<Query>: ")[1].removesuffix("\n<Document>:")
        bodies = [pack.token_ids[place][: -self._num_suffix] for place in span.documents]
        scores = self.model(query, [self._decode(body.tolist())[1:] for body in bodies])
        return np.array([_log_odds(float(p)) for p in scores], np.float32)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadingNetwork]:
    network = ReadingNetwork()
    with loaded(monkeypatch, FakeModel(network, real_parts.qwen3_tokenizer())):
        yield network


class Needle(Model):
    """Likes texts with a needle in them, which no number at their end says."""

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        return [0.9 if "needle" in given else 0.1 for given in texts]


LONG = "straw " * 400 + "needle " + "straw " * 100
WINDOWS: dict[str, Any] = {"top_n": None, "max_length": 150, "window_score": "max"}
EARLIER = {"relevance_passage": "of an earlier reranker", "relevance_span": [0, 2]}


def check_passage(metadata: dict[str, Any]) -> None:
    start, stop = json.loads(json.dumps(metadata))["relevance_span"]
    assert metadata["relevance_passage"] == LONG[start:stop]
    assert "needle" in LONG[start:stop]
    assert stop - start < 150 * len("straw ")


class TestLangChainOnTheCore(CompressorContract):
    @pytest.fixture(autouse=True)
    def _use(self, network: ReadingNetwork) -> None:
        self.network = network

    def make(self, model: Model, **settings: Any) -> BaseDocumentCompressor:
        self.network.model = model
        return LangChainReranker(model="a model", **settings)

    def test_passage_that_won_stands_beside_its_document(self, compress: Any) -> None:
        documents = [Document("straw", metadata=EARLIER), Document(LONG, id="1", metadata=EARLIER)]
        before = [each.model_copy(deep=True) for each in documents]
        best, short = compress(self.make(Needle(), **WINDOWS), documents, "a needle")
        assert (best.id, best.page_content) == ("1", LONG)
        check_passage(best.metadata)
        assert set(short.metadata) == {"relevance_score"}
        assert documents == before


class TestLlamaIndexOnTheCore(PostprocessorContract):
    @pytest.fixture(autouse=True)
    def _use(self, network: ReadingNetwork) -> None:
        self.network = network

    def make(self, model: Model, **settings: Any) -> BaseNodePostprocessor:
        self.network.model = model
        settings.setdefault("metadata_mode", "none")
        return LlamaIndexReranker(model="a model", **settings)

    def test_passage_that_won_stands_beside_its_node(self, postprocess: Any) -> None:
        texts = {"a": "straw", "b": LONG}
        nodes = [NodeWithScore(node=TextNode(text=text, id_=id, metadata=EARLIER))
                 for id, text in texts.items()]  # fmt: skip
        before = [each.model_copy(deep=True) for each in nodes]
        best, short = postprocess(self.make(Needle(), **WINDOWS), nodes, "a needle")
        assert (best.node_id, best.text) == ("b", LONG)
        check_passage(best.node.metadata)
        assert best.node.get_content(MetadataMode.LLM) == LONG
        assert short.node.metadata == {}
        assert nodes == before


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server() as server:
        yield server


class OnAServer:
    """Over HTTP: what the model raises reaches the caller as an error of the server."""

    @pytest.fixture(autouse=True)
    def _use(self, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http.random, "uniform", lambda low, high: 0.0)
        monkeypatch.setattr(http, "_ATTEMPTS", 1)
        self.server = server

    def remote(self, model: Model) -> str:
        """Return the address of a server with this model."""
        self.server.model = model
        return self.server.url


class TestLangChainOnAServer(OnAServer, CompressorContract):
    def make(self, model: Model, **settings: Any) -> BaseDocumentCompressor:
        return LangChainReranker(model=self.remote(model), **settings)

    def test_error_of_the_model_reaches_the_caller(self, compress: Any) -> None:
        compressor = self.make(Model(error=RuntimeError("the model is gone")))
        with pytest.raises(RemoteError, match="status 500"):
            compress(compressor, [Document("x scores 0.2")], "which one?")


class TestLlamaIndexOnAServer(OnAServer, PostprocessorContract):
    def make(self, model: Model, **settings: Any) -> BaseNodePostprocessor:
        settings.setdefault("metadata_mode", "none")
        return LlamaIndexReranker(model=self.remote(model), **settings)

    def test_error_of_the_model_reaches_the_caller(self, postprocess: Any) -> None:
        postprocessor = self.make(Model(error=RuntimeError("the model is gone")))
        with pytest.raises(RemoteError, match="status 500"):
            postprocess(postprocessor, [NodeWithScore(node=TextNode(text="x scores 0.2"))])


class ScriptedCrossEncoder(BaseCrossEncoder):
    def __init__(self, model: Model) -> None:
        self.model = model

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        return self.model(text_pairs[0][0], [text for _, text in text_pairs])


CAUGHT = {
    "test_no_documents_give_no_documents_and_no_model_call": "calls the model for nothing",
    "test_top_n_none_keeps_all": "top_n=None is a type error",
    "test_top_n_below_one_is_refused": "0 returns nothing, -1 drops the last document",
    "test_score_threshold_cuts_before_top_n": "has no threshold",
    "test_score_is_a_plain_float_in_the_metadata": "drops the score",
    "test_score_of_an_earlier_reranker_is_replaced": "leaves another model's score in place",
    "test_callers_documents_stay_as_they_were": "returns the caller's objects",
    "test_equal_documents_are_all_kept": "top_n=None is a type error",
    "test_score_that_is_no_number_is_an_error": "sorts NaN and infinity as if they were scores",
    "test_wrong_number_of_scores_is_an_error": "silently loses documents",
}


class TestLangChainsCrossEncoderReranker(CompressorContract):
    """The suite finds what it is for: this compressor comes with LangChain."""

    @pytest.fixture(autouse=True)
    def _expect_failure(self, request: pytest.FixtureRequest) -> None:
        if request.node.originalname in CAUGHT:
            reason = CAUGHT[request.node.originalname]
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    def make(self, model: Model, **settings: Any) -> BaseDocumentCompressor:
        return CrossEncoderReranker(model=ScriptedCrossEncoder(model), **settings)
