"""Both integrations inside their frameworks' own pipelines, on one loaded model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from langchain_qwen3_reranker import Qwen3Reranker as LangChainReranker
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as LlamaIndexReranker
from qwen3_reranker import (
    InputError,
    RankedDocument,
    RankingError,
    RemoteReranker,
    Reranker,
    Scorer,
)
from qwen3_reranker.cli.demo import LangChainEmbedding, LlamaIndexEmbedding
from qwen3_reranker.data.demo_corpus import read_corpus
from qwen3_reranker.framework_settings import scorer_of
from tests.fakes import FakeModel, forbid_loading, loaded, replace_load_model

PASSAGES, _ = read_corpus()
QUERY = "How does bread rise, and why does it go stale?"
INSTRUCTION = "Given a question about food, find passages that answer it"
K = 12


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint())


@pytest.fixture(scope="module")
def rank(model: str) -> Callable[[list[str]], list[RankedDocument]]:
    """Return the core's ranking, which both frameworks must give."""
    reranker = Reranker.shared(model)
    return lambda texts: reranker.rank(QUERY, texts, instruction=INSTRUCTION, top_n=4)


class Recorder(BaseCallbackHandler):
    """Keeps the runs that LangChain traces."""

    def __init__(self) -> None:
        self.started: dict[UUID, tuple[str | None, UUID | None]] = {}
        self.ended: list[UUID] = []
        self.failed: list[UUID] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **more: Any) -> None:
        self.started[run_id] = more.get("name"), more.get("parent_run_id")

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **more: Any) -> None:
        self.ended.append(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **more: Any) -> None:
        self.failed.append(run_id)


class TestLangChain:
    @pytest.fixture
    def store(self) -> InMemoryVectorStore:
        store = InMemoryVectorStore(LangChainEmbedding())
        store.add_documents([Document(p.text, id=p.id, metadata={"n": [p.id]}) for p in PASSAGES])
        return store

    @pytest.fixture
    def retriever(self, store: InMemoryVectorStore, model: str) -> ContextualCompressionRetriever:
        return ContextualCompressionRetriever(
            base_compressor=LangChainReranker(model=model, instruction=INSTRUCTION, top_n=4),
            base_retriever=store.as_retriever(search_kwargs={"k": K}),
        )

    async def test_retriever_gives_the_cores_order(
        self,
        store: InMemoryVectorStore,
        retriever: ContextualCompressionRetriever,
        rank: Callable[..., list[RankedDocument]],
    ) -> None:
        retrieved = store.similarity_search(QUERY, k=K)
        expected = [
            (retrieved[r.index].id, retrieved[r.index].page_content, r.score)
            for r in rank([document.page_content for document in retrieved])
        ]
        before = copy.deepcopy(store.store)
        for documents in (retriever.invoke(QUERY), await retriever.ainvoke(QUERY)):
            found = [(d.id, d.page_content, d.metadata["relevance_score"]) for d in documents]
            assert found == expected
            assert all(d.metadata["n"] == [d.id] for d in documents)
        assert store.store == before

    async def test_lcel_chain_reads_the_reranked_documents(
        self, retriever: ContextualCompressionRetriever
    ) -> None:
        prompts: list[str] = []
        chain = (
            {"context": retriever, "question": RunnablePassthrough()}
            | ChatPromptTemplate.from_template("{context}\n{question}")
            | (lambda prompt: prompts.append(prompt.to_string()) or prompt)
            | FakeListChatModel(responses=["yeast"] * 3)
            | StrOutputParser()
        )
        assert chain.invoke(QUERY) == "yeast"
        assert await chain.ainvoke(QUERY) == "yeast"
        assert "".join([part async for part in chain.astream(QUERY)]) == "yeast"
        assert len(set(prompts)) == 1
        texts = [document.page_content for document in retriever.invoke(QUERY)]
        places = [prompts[0].index(repr(text)[1:-1]) for text in texts]
        assert places == sorted(places)

    async def test_document_compressor_pipeline_hands_on_documents_and_callbacks(
        self, store: InMemoryVectorStore, retriever: ContextualCompressionRetriever
    ) -> None:
        pipeline = DocumentCompressorPipeline(transformers=[retriever.base_compressor])
        retrieved = store.similarity_search(QUERY, k=K)
        expected = retriever.invoke(QUERY)
        recorder = Recorder()
        assert pipeline.compress_documents(retrieved, QUERY, callbacks=[recorder]) == expected
        assert await pipeline.acompress_documents(retrieved, QUERY) == expected
        assert [name for name, _ in recorder.started.values()] == ["Qwen3Reranker"]

    async def test_reranking_is_a_run_of_its_own_in_a_trace(
        self, retriever: ContextualCompressionRetriever
    ) -> None:
        recorder = Recorder()
        retriever.invoke(QUERY, {"callbacks": [recorder]})
        await retriever.ainvoke(QUERY, {"callbacks": [recorder]})
        assert [name for name, _ in recorder.started.values()] == ["Qwen3Reranker"] * 2
        assert all(parent is not None for _, parent in recorder.started.values())
        assert (len(recorder.ended), len(recorder.failed)) == (2, 0)

    async def test_failed_reranking_ends_its_run(self) -> None:
        recorder = Recorder()
        compressor = LangChainReranker(model="/not/a/folder")
        for call in (compressor.compress_documents, compressor.acompress_documents):
            with pytest.raises(RuntimeError, match="not a folder"):
                await _result(call([Document("x")], QUERY, callbacks=[recorder]))
        compressor.top_n = 0
        with pytest.raises(InputError, match="top_n"):
            compressor.compress_documents([Document("x")], QUERY)
        assert (len(recorder.ended), len(recorder.failed)) == (0, 2)

    def test_rerank_takes_texts_and_documents_and_overrides_per_call(self, model: str) -> None:
        compressor = LangChainReranker(model=model, instruction=INSTRUCTION, top_n=2)
        texts = [passage.text for passage in PASSAGES[:6]]
        results = compressor.rerank([texts[0], *map(Document, texts[1:])], QUERY)
        expected = Reranker.shared(model).rank(QUERY, texts, instruction=INSTRUCTION)
        as_dicts = [{"index": r.index, "relevance_score": r.score} for r in expected]
        assert results == as_dicts[:2]
        assert compressor.rerank(texts, QUERY, top_n=None) == as_dicts
        assert compressor.rerank(texts, QUERY, top_n=3) == as_dicts[:3]
        other = compressor.rerank(texts, QUERY, instruction="Find music", top_n=None)
        assert [r["relevance_score"] for r in other] != [r.score for r in expected]
        assert compressor.rerank([], QUERY) == []
        lowest = as_dicts[1]["relevance_score"]
        strict = LangChainReranker(model=model, instruction=INSTRUCTION, score_threshold=lowest)
        assert strict.rerank(texts, QUERY) == as_dicts[:2]

    def test_rerank_refuses_what_the_core_refuses(self) -> None:
        compressor = LangChainReranker(reranker=Spy())
        with pytest.raises(InputError, match="documents"):
            compressor.rerank("one text", QUERY)
        with pytest.raises(InputError, match="top_n"):
            compressor.rerank(["x"], QUERY, top_n=0)
        with pytest.raises(RankingError, match="1 of 2"):
            LangChainReranker(reranker=Loser()).rerank(["x", "y"], QUERY)

    async def test_embedded_model(self) -> None:
        compressor = LangChainReranker(model="embedded", top_n=None)
        documents = [Document("Yeast makes dough rise."), Document("Violins have four strings.")]
        scored = {
            d.page_content: d.metadata["relevance_score"]
            for d in compressor.compress_documents(documents, QUERY)
        }
        expected = Reranker.shared("embedded").score(QUERY, [d.page_content for d in documents])
        assert [scored[d.page_content] for d in documents] == expected


class TestLlamaIndex:
    @pytest.fixture
    def index(self) -> VectorStoreIndex:
        nodes = [TextNode(text=p.text, id_=p.id, metadata={"source": "demo"}) for p in PASSAGES]
        return VectorStoreIndex(nodes, embed_model=LlamaIndexEmbedding())

    @pytest.fixture
    def postprocessor(self, model: str) -> LlamaIndexReranker:
        return LlamaIndexReranker(
            model=model, instruction=INSTRUCTION, top_n=4, metadata_mode=MetadataMode.NONE
        )

    @pytest.fixture
    def expected(
        self, index: VectorStoreIndex, rank: Callable[..., list[RankedDocument]]
    ) -> list[tuple[str, float]]:
        retrieved = index.as_retriever(similarity_top_k=K).retrieve(QUERY)
        ranking = rank([node.get_content(MetadataMode.NONE) for node in retrieved])
        return [(retrieved[r.index].node_id, r.score) for r in ranking]

    async def test_query_engine_gives_the_cores_order(
        self,
        index: VectorStoreIndex,
        postprocessor: LlamaIndexReranker,
        expected: list[tuple[str, float]],
    ) -> None:
        before = copy.deepcopy(index.docstore.to_dict())
        engine = index.as_query_engine(
            llm=MockLLM(), similarity_top_k=K, node_postprocessors=[postprocessor]
        )
        for response in (engine.query(QUERY), await engine.aquery(QUERY)):
            assert [(n.node_id, n.score) for n in response.source_nodes] == expected
        assert index.docstore.to_dict() == before

    async def test_chat_engine_gives_the_cores_order(
        self,
        index: VectorStoreIndex,
        postprocessor: LlamaIndexReranker,
        expected: list[tuple[str, float]],
    ) -> None:
        engine = index.as_chat_engine(
            chat_mode="context",
            llm=MockLLM(),
            similarity_top_k=K,
            node_postprocessors=[postprocessor],
            # The default memory leaves a database connection open.
            memory=ChatMemoryBuffer.from_defaults(),
        )
        for response in (engine.chat(QUERY), await engine.achat(QUERY)):
            assert [(n.node_id, n.score) for n in response.source_nodes] == expected

    @pytest.mark.parametrize(
        ("mode", "text"),
        [
            (None, "year: 1999\n\nYeast."),
            (MetadataMode.EMBED, "year: 1999\n\nYeast."),
            (MetadataMode.LLM, "page: 7\n\nYeast."),
            (MetadataMode.ALL, "year: 1999\npage: 7\n\nYeast."),
            (MetadataMode.NONE, "Yeast."),
        ],
    )
    def test_metadata_mode_says_what_the_model_reads(
        self, mode: MetadataMode | None, text: str
    ) -> None:
        node = TextNode(
            text="Yeast.",
            metadata={"year": 1999, "page": 7},
            excluded_embed_metadata_keys=["page"],
            excluded_llm_metadata_keys=["year"],
        )
        spy = Spy()
        settings = {} if mode is None else {"metadata_mode": mode}
        LlamaIndexReranker(reranker=spy, **settings).postprocess_nodes(
            [NodeWithScore(node=node)], query_str=QUERY
        )
        assert spy.documents == [text]

    def test_retrieval_score_is_kept_where_no_model_reads_it(self) -> None:
        given = NodeWithScore(
            node=TextNode(text="Yeast.", metadata={"year": 1999, "retrieval_score": 0.1}),
            score=0.7,
        )
        before = given.model_copy(deep=True)
        postprocessor = LlamaIndexReranker(reranker=Spy(), keep_retrieval_score=True)
        (kept,) = postprocessor.postprocess_nodes([given], query_str=QUERY)
        assert kept.node.metadata == {"year": 1999, "retrieval_score": 0.7}
        assert given == before
        assert kept.node.node_id == given.node.node_id
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert kept.node.get_content(mode) == "year: 1999\n\nYeast."
        (again,) = postprocessor.postprocess_nodes([kept], query_str=QUERY)
        assert again.node.excluded_embed_metadata_keys == ["retrieval_score"]

    def test_instruction_is_never_formatted(self) -> None:
        spy = Spy()
        postprocessor = LlamaIndexReranker(reranker=spy, instruction="Find {query_str} {0} %s")
        postprocessor.postprocess_nodes([NodeWithScore(node=TextNode(text="x"))], query_str=QUERY)
        assert spy.instruction == "Find {query_str} {0} %s"

    def test_dump_validates_again(self, model: str) -> None:
        postprocessor = LlamaIndexReranker(model=model, top_n=None, dtype="float32")
        again = LlamaIndexReranker.model_validate(postprocessor.model_dump())
        assert again.to_dict() == postprocessor.to_dict()

    async def test_embedded_model(self) -> None:
        postprocessor = LlamaIndexReranker(model="embedded", metadata_mode="none")
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("Yeast.", "A violin.")]
        kept = await postprocessor.apostprocess_nodes(nodes, query_str=QUERY)
        expected = Reranker.shared("embedded").score(QUERY, ["Yeast.", "A violin."])
        assert sorted(n.score or 0.0 for n in kept) == sorted(expected)


class Loser:
    """A reranker that returns one document, whatever it gets."""

    def rank(self, query: str, documents: Any, **options: Any) -> list[RankedDocument]:
        return [RankedDocument(0, documents[0], 0.5, 0.0, False)]

    async def arank(self, *args: Any, **options: Any) -> list[RankedDocument]:
        return self.rank(*args, **options)


class AsyncOnly(Loser):
    """A reranker that must not be called from the event loop's thread."""

    def rank(self, query: str, documents: Any, **options: Any) -> list[RankedDocument]:
        pytest.fail("the event loop was blocked")

    async def arank(self, query: str, documents: Any, **options: Any) -> list[RankedDocument]:
        return super().rank(query, documents, **options)


class Spy:
    """A reranker that remembers what it was asked."""

    def rank(self, query: str, documents: Any, **options: Any) -> list[RankedDocument]:
        self.documents, self.instruction = documents, options["instruction"]
        return [RankedDocument(i, d, 0.5, 0.0, False) for i, d in enumerate(documents)]

    async def arank(self, *args: Any, **options: Any) -> list[RankedDocument]:
        return self.rank(*args, **options)


async def _result(given: Any) -> Any:
    return await given if hasattr(given, "__await__") else given


INTEGRATIONS = [LangChainReranker, LlamaIndexReranker]


@pytest.mark.parametrize("integration", INTEGRATIONS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_n": 0}, "top_n must be an integer of at least 1 or None, got 0"),
        ({"score_threshold": 1.5}, "score_threshold must be between 0 and 1"),
        ({"max_length": 0}, "max_length"),
        ({"dtype": "float8"}, "dtype"),
        ({"model": " "}, "model is blank"),
        ({"instruction": 5}, "instruction"),
        ({"reranker": object()}, "Scorer"),
        ({"topn": 3}, "topn"),
    ],
)
def test_wrong_settings_are_refused_before_any_call(
    integration: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        integration(**settings)


def test_model_settings_beside_a_reranker_are_refused() -> None:
    for integration in INTEGRATIONS:
        for setting in ({"model": "other"}, {"dtype": "float32"}, {"max_length": 100}):
            with pytest.raises(ValueError, match=f"{next(iter(setting))} would have no effect"):
                integration(reranker=Spy(), **setting)


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_model_settings_beside_a_servers_address_are_refused(
    integration: Callable[..., Any],
) -> None:
    url = "http://127.0.0.1:1"
    for setting in ({"adapter": "x"}, {"dtype": "float32"}, {"max_length": 100}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} would have no effect"):
            integration(model=url, **setting)
    scorer = scorer_of(integration(model=url, instruction="task"))
    assert repr(scorer) == f"RemoteReranker({url!r})"


async def test_order_kept_by_a_failed_server_has_no_scores() -> None:
    failing = RemoteReranker("http://127.0.0.1:1", on_error="keep_order")
    documents = [Document("x", metadata={"relevance_score": 0.9, "page": 1}), Document("y")]
    compressor = LangChainReranker(reranker=failing, top_n=1)
    for kept in (
        compressor.compress_documents(documents, QUERY),
        await compressor.acompress_documents(documents, QUERY),
    ):
        assert [(d.page_content, d.metadata) for d in kept] == [("x", {"page": 1})]
    assert compressor.rerank(["x"], QUERY) == [{"index": 0, "relevance_score": None}]
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in ("x", "y")]
    ranked = LlamaIndexReranker(reranker=failing).postprocess_nodes(nodes, query_str=QUERY)
    assert [(node.text, node.score) for node in ranked] == [("x", None), ("y", None)]


async def test_passage_that_won_stands_beside_a_long_document(model: str) -> None:
    settings: dict[str, Any] = {"max_length": 140, "window_score": "max"}
    long = " ".join(passage.text for passage in PASSAGES[:6])
    expected = Reranker.shared(model, **settings).rank(QUERY, [long, "Yeast."])
    (window,) = [result.window for result in expected if result.index == 0]
    assert window is not None
    assert 0 < window[1] - window[0] < len(long)
    passage = long[slice(*window)]

    compressor = LangChainReranker(model=model, top_n=None, **settings)
    documents = [
        Document(long, metadata={"page": 1}),
        Document("Yeast.", metadata={"relevance_passage": "an earlier one"}),
    ]
    for ranked in (
        compressor.compress_documents(documents, QUERY),
        await compressor.acompress_documents(documents, QUERY),
    ):
        metadata = {each.page_content: each.metadata for each in ranked}
        assert metadata[long]["relevance_passage"] == passage
        assert "relevance_passage" not in metadata["Yeast."]
        assert [each.metadata["relevance_score"] for each in ranked] == [r.score for r in expected]

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in (long, "Yeast.")]
    postprocessor = LlamaIndexReranker(model=model, top_n=None, **settings)
    for reranked in (
        postprocessor.postprocess_nodes(nodes, query_str=QUERY),
        await postprocessor.apostprocess_nodes(nodes, query_str=QUERY),
    ):
        found = {each.text: each.node for each in reranked}
        assert found[long].metadata == {
            "relevance_passage": passage, "relevance_span": list(window)
        }  # fmt: skip
        assert found[long].get_content(MetadataMode.LLM) == long
        assert found["Yeast."].metadata == {}
    assert nodes[0].node.metadata == {}


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_json_schema_lists_the_settings(integration: Any) -> None:
    properties = integration.model_json_schema()["properties"]
    assert {"model", "adapter", "instruction", "top_n", "max_length"} <= set(properties)


async def test_async_calls_never_call_the_blocking_verb() -> None:
    assert await LangChainReranker(reranker=AsyncOnly()).acompress_documents([Document("x")], "q")
    nodes = [NodeWithScore(node=TextNode(text="x"))]
    assert await LlamaIndexReranker(reranker=AsyncOnly()).apostprocess_nodes(nodes, query_str="q")


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_settings_reach_the_model_which_is_loaded_once(
    integration: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    loads: list[dict[str, Any]] = []

    def load(**settings: Any) -> Any:
        loads.append(settings)
        return FakeModel()

    replace_load_model(monkeypatch, load)
    component = integration(
        model=tmp_path, adapter=tmp_path / "a", device=torch.device("cpu"), dtype=torch.float32
    )
    for _ in range(3):
        scorer_of(component).rank(QUERY, ["x"])
    (settings,) = loads
    assert settings["model"] == str(tmp_path)
    assert settings["adapter"] == str(tmp_path / "a")
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    scorer_of(component).close()


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_setting_assigned_later_is_used(
    integration: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(**settings: Any) -> Any:
        asked.append(settings["model"])
        raise RuntimeError("stop here")

    replace_load_model(monkeypatch, load)
    component = integration(model="first")
    component.model = "second"
    with pytest.raises(RuntimeError, match="stop here"):
        scorer_of(component).rank(QUERY, ["x"])
    assert asked == ["second"]


def test_all_users_of_one_model_share_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []

    def load(**settings: Any) -> Any:
        loads.append(settings)
        return FakeModel()

    replace_load_model(monkeypatch, load)
    users: list[Scorer] = []
    for integration in INTEGRATIONS:
        for top_n in (1, 2):
            component = integration(model="one model", top_n=top_n, instruction=f"task {top_n}")
            users.append(scorer_of(component))
            users.append(scorer_of(pickle.loads(pickle.dumps(component))))  # noqa: S301
            users.append(scorer_of(copy.deepcopy(component)))
    for user in users:
        user.rank(QUERY, ["x"])
    assert len(loads) == 1
    for user in users:
        assert isinstance(user, Reranker)
        user.close()


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_pickle_keeps_settings_and_loads_nothing(
    integration: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(monkeypatch, FakeModel()):
        component = integration(model="a model", instruction="task", top_n=None)
        scorer_of(component).rank(QUERY, ["x"])
        data = pickle.dumps(component)
        assert len(data) < 5000
    forbid_loading(monkeypatch)
    again = pickle.loads(data)  # noqa: S301
    assert (again.model, again.instruction, again.top_n) == ("a model", "task", None)


@pytest.mark.parametrize(
    "module", ["langchain_qwen3_reranker", "llama_index.postprocessor.qwen3_reranker"]
)
def test_construction_and_pickle_import_no_torch(module: str) -> None:
    code = (
        f"import pickle, sys; from {module} import Qwen3Reranker; "
        "made = pickle.loads(pickle.dumps(Qwen3Reranker(model='some/model'))); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_no_document_of_the_framework_is_refused(model: str) -> None:
    texts: Any = [Document("a"), "b"]
    with pytest.raises(InputError, match=r"documents\[1\] must be a LangChain Document, got str"):
        LangChainReranker(model=model).compress_documents(texts, "q")
    nodes: Any = [NodeWithScore(node=TextNode(text="a")), TextNode(text="b")]
    with pytest.raises(InputError, match=r"nodes\[1\] must be a NodeWithScore, got TextNode"):
        LlamaIndexReranker(model=model).postprocess_nodes(nodes, query_str="q")


@pytest.mark.parametrize(
    ("library", "package", "extra"),
    [
        ("langchain_core", "langchain_qwen3_reranker", "langchain"),
        ("llama_index.core", "llama_index.postprocessor.qwen3_reranker", "llama-index"),
    ],
)
def test_without_its_framework_the_extra_is_named(library: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; import {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f'pip install "qwen3-reranker[{extra}]"' in done.stderr
