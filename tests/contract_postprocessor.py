"""What a LlamaIndex node postprocessor that reranks must do, whoever wrote it.

No such suite comes with LlamaIndex. To run yours through this one, copy this file and
`contract_model.py`, and say in a test module how yours is made over a scripted model:

    class TestMine(PostprocessorContract):
        def make(self, model: Model, **settings: Any) -> BaseNodePostprocessor:
            return MyPostprocessor(client=FakeClient(model), **settings)

`model(query, texts)` returns a score per text, or too few, too many or NaN, as a broken backend
would. `settings` are `top_n` (None keeps all), `score_threshold` (lowest score kept) and
`callback_manager`. Calls run sync and async.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from .contract_model import Model, text

Postprocess = Callable[..., list[NodeWithScore]]
QUERY = "which one?"


def node(name: str, score: float | str, retrieval_score: float | None = 0.5) -> NodeWithScore:
    """Return a node that the model gives this score."""
    return NodeWithScore(
        node=TextNode(text=text(name, score), id_=name, metadata={"tags": ["a", {"deep": name}]}),
        score=retrieval_score,
    )


def names(nodes: Sequence[NodeWithScore]) -> list[str]:
    """Return the names of nodes, in order."""
    return [each.node_id for each in nodes]


def an_error() -> Any:
    """Expect an error of any kind, as long as it says something."""
    return pytest.raises(Exception, match=r".")


class Recorder(BaseEventHandler):
    """Keeps the rerank events that it sees."""

    events: list[BaseEvent]

    def handle(self, event: BaseEvent, **more: Any) -> None:
        """Keep the event."""
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)


class PostprocessorContract:
    """Tests that need only `make`."""

    def make(self, model: Model, **settings: Any) -> BaseNodePostprocessor:
        """Return the postprocessor under test, scoring by this model."""
        raise NotImplementedError

    @pytest.fixture(params=["sync", "async"])
    def postprocess(self, request: pytest.FixtureRequest) -> Postprocess:
        """Return a call of one of the two methods."""

        def call(
            postprocessor: BaseNodePostprocessor,
            nodes: list[NodeWithScore],
            query: str | None = QUERY,
        ) -> list[NodeWithScore]:
            if request.param == "sync":
                return postprocessor.postprocess_nodes(nodes, query_str=query)
            return asyncio.run(postprocessor.apostprocess_nodes(nodes, query_str=query))

        return call

    @pytest.fixture
    def events(self) -> Iterator[list[BaseEvent]]:
        """Collect the rerank events of a test."""
        dispatcher = get_dispatcher()
        recorder = Recorder(events=[])
        dispatcher.add_event_handler(recorder)
        yield recorder.events
        dispatcher.event_handlers.remove(recorder)

    def test_no_nodes_give_no_nodes_and_no_model_call(self, postprocess: Postprocess) -> None:
        model = Model()
        assert postprocess(self.make(model, top_n=3), []) == []
        assert model.calls == []

    def test_missing_query_is_an_error(self, postprocess: Postprocess) -> None:
        with pytest.raises(ValueError, match="query"):
            postprocess(self.make(Model(), top_n=3), [node("a", 0.2)], None)

    def test_best_node_comes_first(self, postprocess: Postprocess) -> None:
        nodes = [node("a", 0.2), node("b", 0.9), node("c", 0.5)]
        assert names(postprocess(self.make(Model(), top_n=3), nodes)) == ["b", "c", "a"]

    def test_score_zero_sorts_as_any_other(self, postprocess: Postprocess) -> None:
        nodes = [node("a", 0.0), node("b", 0.9), node("c", 0.5)]
        assert names(postprocess(self.make(Model(), top_n=3), nodes)) == ["b", "c", "a"]

    def test_equal_scores_keep_the_retrievers_order(self, postprocess: Postprocess) -> None:
        nodes = [node(name, 0.4) for name in "dbca"] + [node("e", 0.8)]
        assert names(postprocess(self.make(Model(), top_n=5), nodes)) == list("edbca")

    @pytest.mark.parametrize("top_n", [1, 2, 3, 7])
    def test_top_n_keeps_that_many(self, postprocess: Postprocess, top_n: int) -> None:
        nodes = [node("a", 0.2), node("b", 0.9), node("c", 0.5)]
        kept = postprocess(self.make(Model(), top_n=top_n), nodes)
        assert names(kept) == ["b", "c", "a"][:top_n]

    def test_top_n_none_keeps_all(self, postprocess: Postprocess) -> None:
        nodes = [node(str(i), (i + 1) / 30) for i in range(20)]
        assert len(postprocess(self.make(Model(), top_n=None), nodes)) == 20

    @pytest.mark.parametrize("top_n", [0, -1])
    def test_top_n_below_one_is_refused(self, top_n: int) -> None:
        with pytest.raises(ValueError, match="top_n"):
            self.make(Model(), top_n=top_n)

    def test_score_threshold_cuts_before_top_n(self, postprocess: Postprocess) -> None:
        scores = (0.1, 0.6, 0.5, 0.9)
        nodes = [node(name, score) for name, score in zip("abcd", scores, strict=True)]
        for top_n, kept in ((None, "dbc"), (2, "db")):
            postprocessor = self.make(Model(), top_n=top_n, score_threshold=0.5)
            assert names(postprocess(postprocessor, nodes)) == list(kept)
        assert postprocess(self.make(Model(), top_n=2, score_threshold=0.95), nodes) == []

    def test_misspelt_setting_is_refused(self) -> None:
        with pytest.raises((TypeError, ValueError)):
            self.make(Model(), topn=3)

    def test_node_is_kept_and_its_score_is_a_plain_float(self, postprocess: Postprocess) -> None:
        nodes = [node("a", 0.25), node("b", 0.75)]
        kept = postprocess(self.make(Model(), top_n=2), nodes)
        assert [each.node for each in kept] == [nodes[1].node, nodes[0].node]
        assert [type(each.score) for each in kept] == [float, float]
        assert [each.score for each in kept] == pytest.approx([0.75, 0.25], abs=1e-6)

    def test_callers_nodes_stay_as_they_were(self, postprocess: Postprocess) -> None:
        nodes = [node("a", 0.2), node("b", 0.9, retrieval_score=None)]
        given, before = list(nodes), [each.model_copy(deep=True) for each in nodes]
        for each in postprocess(self.make(Model(), top_n=2), nodes):
            each.score = 7.0
        assert nodes == before
        assert all(a is b for a, b in zip(nodes, given, strict=True))

    def test_equal_nodes_are_all_kept(self, postprocess: Postprocess) -> None:
        nodes = [node("a", 0.3), node("b", 0.9), node("a", 0.3)]
        assert names(postprocess(self.make(Model(), top_n=None), nodes)) == ["b", "a", "a"]

    def test_any_list_comes_back_sorted_and_whole(self, postprocess: Postprocess) -> None:
        rng = random.Random(5)
        for _ in range(20):
            scores = [rng.randrange(1, 10) / 10 for _ in range(rng.randrange(1, 30))]
            nodes = [node(str(i), score) for i, score in enumerate(scores)]
            kept = postprocess(self.make(Model(), top_n=len(scores)), nodes)
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            assert names(kept) == [str(i) for i in order]

    @pytest.mark.parametrize("score", ["nan", "inf"])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_score_that_is_no_number_is_an_error(
        self, postprocess: Postprocess, score: str, place: int
    ) -> None:
        nodes = [node("a", 0.2), node("b", 0.9), node("c", 0.5)]
        nodes[place] = node("broken", score)
        with an_error():
            postprocess(self.make(Model(), top_n=3), nodes)

    @pytest.mark.parametrize("surplus", [-1, -3, 1])
    def test_wrong_number_of_scores_is_an_error(
        self, postprocess: Postprocess, surplus: int
    ) -> None:
        nodes = [node("a", 0.2), node("b", 0.9), node("c", 0.5)]
        with an_error():
            postprocess(self.make(Model(surplus=surplus), top_n=3), nodes)

    def test_error_of_the_model_reaches_the_caller(self, postprocess: Postprocess) -> None:
        # A silent fall-back to the retriever's order would hide an outage for weeks.
        model = Model(error=RuntimeError("the model is gone"))
        with pytest.raises(RuntimeError, match="the model is gone"):
            postprocess(self.make(model, top_n=3), [node("a", 0.2)])

    def test_one_request_is_one_model_call(self, postprocess: Postprocess) -> None:
        model = Model()
        postprocess(self.make(model, top_n=3), [node(str(i), (i + 1) / 30) for i in range(20)])
        ((query, texts),) = model.calls
        assert query == QUERY
        assert len(texts) == 20

    def test_sync_and_async_agree(self) -> None:
        postprocessor = self.make(Model(), top_n=3)
        nodes = [node(str(i), (i * 7 % 20) / 20 + 0.01) for i in range(20)]
        sync = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
        assert sync == asyncio.run(postprocessor.apostprocess_nodes(nodes, query_str=QUERY))

    def test_concurrent_calls_get_their_own_nodes(self) -> None:
        postprocessor = self.make(Model(), top_n=4)
        lists = [[node(f"{c}-{i}", (i + c) % 5 / 6 + 0.1) for i in range(5)] for c in range(24)]
        queries = [QueryBundle(f"query {c}") for c in range(24)]

        async def together() -> list[list[NodeWithScore]]:
            return await asyncio.gather(*map(postprocessor.apostprocess_nodes, lists, queries))

        alone = list(map(postprocessor.postprocess_nodes, lists, queries))
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(postprocessor.postprocess_nodes, lists, queries)) == alone
        assert asyncio.run(together()) == alone

    def test_pickled_copy_does_the_same(self, postprocess: Postprocess) -> None:
        nodes = [node("a", 0.2), node("b", 0.9), node("c", 0.5)]
        postprocessor = self.make(Model(), top_n=2)
        copy = pickle.loads(pickle.dumps(postprocessor))  # noqa: S301
        assert postprocess(copy, nodes) == postprocess(postprocessor, nodes)

    def test_pickle_never_loses_the_model(self) -> None:
        # LlamaIndex drops what does not pickle; a default in its place would score otherwise.
        postprocessor = self.make(Model(lock=threading.Lock()), top_n=2)
        try:
            copy = pickle.loads(pickle.dumps(postprocessor))  # noqa: S301
        except (TypeError, pickle.PicklingError):
            return
        nodes = [node("a", 0.2), node("b", 0.9)]
        assert copy.postprocess_nodes(nodes, query_str=QUERY) == postprocessor.postprocess_nodes(
            nodes, query_str=QUERY
        )

    def test_settings_go_through_json(self) -> None:
        postprocessor = self.make(Model(), top_n=7)
        dumped = json.loads(postprocessor.to_json())
        assert dumped["class_name"] == type(postprocessor).class_name()
        assert dumped["class_name"] != BaseNodePostprocessor.class_name()
        assert dumped["top_n"] == 7
        assert type(postprocessor).from_dict(dumped).to_dict() == postprocessor.to_dict()

    def test_result_goes_through_json(self, postprocess: Postprocess) -> None:
        (kept,) = postprocess(self.make(Model(), top_n=2), [node("a", 0.2)])
        assert json.loads(kept.to_json())["score"] == kept.score

    def test_events_frame_a_call(self, postprocess: Postprocess, events: list[BaseEvent]) -> None:
        nodes = [node("a", 0.2), node("b", 0.9), node("c", 0.5)]
        kept = postprocess(self.make(Model(), top_n=2), nodes)
        start, end = events
        assert isinstance(start, ReRankStartEvent)
        assert isinstance(end, ReRankEndEvent)
        assert start.nodes == nodes
        assert (start.top_n, bool(start.model_name)) == (2, True)
        assert QUERY in (start.query, getattr(start.query, "query_str", None))
        assert end.nodes == kept

    def test_events_frame_a_call_that_keeps_all(
        self, postprocess: Postprocess, events: list[BaseEvent]
    ) -> None:
        postprocess(self.make(Model(), top_n=None), [node("a", 0.2), node("b", 0.9)])
        start, end = events
        assert isinstance(start, ReRankStartEvent)
        assert isinstance(end, ReRankEndEvent)
        assert start.top_n == 2

    def test_events_frame_a_call_without_nodes(
        self, postprocess: Postprocess, events: list[BaseEvent]
    ) -> None:
        postprocess(self.make(Model(), top_n=2), [])
        assert [type(event) for event in events] == [ReRankStartEvent, ReRankEndEvent]

    @pytest.mark.parametrize("query", [QUERY, None])
    def test_events_frame_a_call_that_fails(
        self, postprocess: Postprocess, events: list[BaseEvent], query: str | None
    ) -> None:
        with pytest.raises((RuntimeError, ValueError)):
            postprocess(self.make(Model(error=RuntimeError("x")), top_n=2), [node("a", 0.2)], query)
        start, end = events
        assert isinstance(start, ReRankStartEvent)
        assert isinstance(end, ReRankEndEvent)
        assert end.nodes == []

    @pytest.mark.parametrize("fails", [False, True])
    def test_callback_manager_sees_start_and_end(
        self, postprocess: Postprocess, fails: bool
    ) -> None:
        handler = LlamaDebugHandler(print_trace_on_end=False)
        # A new error each time: LlamaIndex marks one that it has reported.
        model = Model(error=RuntimeError("the model is gone") if fails else None)
        postprocessor = self.make(model, top_n=2, callback_manager=CallbackManager([handler]))
        kept: list[NodeWithScore] = []
        try:
            kept = postprocess(postprocessor, [node("a", 0.2)])
        except RuntimeError:
            assert fails
        ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
        assert start.payload is not None
        assert start.payload[EventPayload.QUERY_STR] == QUERY
        assert end.payload is not None
        assert end.payload.get(EventPayload.NODES, []) == kept
