from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import math
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, ClassVar

import pytest

from qwen3_reranker import (
    ClosedError,
    InputError,
    MissingExtraError,
    OverloadedError,
    Qwen3RerankerError,
    RankedDocument,
    RemoteError,
    RemoteProtocolError,
    RemoteReranker,
    TimedOutError,
)
from qwen3_reranker.call.results import probability, verify_ranking
from qwen3_reranker.client import http, servers
from qwen3_reranker.client.servers import read_scores
from qwen3_reranker.text.prompt import QWEN3_RERANKER
from tests.contract_model import Model, text
from tests.fault_server import FaultServer, fault_server
from tests.invariants import check_ranking

QUERY = "which one?"
DOCUMENTS = [text(name, score) for name, score in (("a", 0.2), ("b", 0.9), ("c", 0.5))]
ORDER = [1, 2, 0]
KEY = "SECRET-KEY"
LATEST_S = 0.1
"""How long after its deadline a call may end, beside what a busy machine's own sleeps slip."""


@contextmanager
def ends_within(timeout_s: float) -> Iterator[None]:
    """Assert that the block ends in time, by the side of a thread that only sleeps so long."""
    woken: list[float] = []

    def sleep() -> None:
        time.sleep(timeout_s)
        woken.append(time.monotonic())

    sleeper = threading.Thread(target=sleep, daemon=True)
    started = time.monotonic()
    sleeper.start()
    yield
    seconds = time.monotonic() - started
    if seconds > timeout_s:
        sleeper.join()
        assert seconds <= woken[0] - started + LATEST_S


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN3_RERANKER_API_KEY", raising=False)
    monkeypatch.setattr(http.random, "uniform", lambda low, high: high / 50)


@pytest.fixture
def reranker(server: FaultServer) -> Iterator[RemoteReranker]:
    with RemoteReranker(server.url) as reranker:
        yield reranker


Rank = Callable[..., list[RankedDocument]]


@pytest.fixture(params=["sync", "async"])
def rank(request: pytest.FixtureRequest) -> Rank:
    """Return a call of one of the two verbs."""

    def call(reranker: RemoteReranker, *args: Any, **more: Any) -> list[RankedDocument]:
        if request.param == "sync":
            return reranker.rank(*args, **more)
        return asyncio.run(reranker.arank(*args, **more))

    return call


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def indices(ranking: list[RankedDocument]) -> list[int]:
    return [result.index for result in ranking]


def test_rank_gives_the_servers_order(rank: Rank, reranker: RemoteReranker) -> None:
    for options in ({}, {"top_n": 2}, {"score_threshold": 0.4}, {"top_n": 9}):
        ranking = rank(reranker, QUERY, DOCUMENTS, **options)
        check_ranking(ranking, DOCUMENTS, **options)
        assert indices(ranking) == ORDER[: len(ranking)]
    scores = {r.index: r.score for r in rank(reranker, QUERY, DOCUMENTS)}
    assert [scores[i] for i in range(3)] == pytest.approx([0.2, 0.9, 0.5], abs=1e-6)


def test_every_verb_agrees(reranker: RemoteReranker) -> None:
    scores = reranker.score(QUERY, DOCUMENTS)
    assert asyncio.run(reranker.ascore(QUERY, DOCUMENTS)) == scores
    log_odds = reranker.log_odds(QUERY, DOCUMENTS)
    assert [probability(value) for value in log_odds] == pytest.approx(scores)
    assert asyncio.run(reranker.alog_odds(QUERY, DOCUMENTS)) == log_odds
    assert reranker.log_odds(QUERY, []) == []
    pairs = [(QUERY, DOCUMENTS[0]), ("another", DOCUMENTS[1]), (QUERY, DOCUMENTS[2])]
    assert reranker.score_pairs(pairs) == scores
    (one, two) = reranker.rank_many([QUERY, "another"], [DOCUMENTS, DOCUMENTS[:1]], top_n=1)
    assert (indices(one), indices(two)) == ([1], [0])
    for ranking in (one, two):
        check_ranking(ranking, DOCUMENTS, top_n=1)


def test_no_documents_give_no_results_and_no_request(rank: Rank, server: FaultServer) -> None:
    with RemoteReranker(server.url) as reranker:
        assert rank(reranker, QUERY, []) == []
        assert reranker.score(QUERY, []) == []
        assert reranker.rank_many([], []) == []
    assert (server.connections, server.questions) == (0, [])


def test_zero_and_one_are_scores_like_any_other(rank: Rank, reranker: RemoteReranker) -> None:
    documents = [text("a", 0.0), text("b", 1.0), text("c", 1e-30), text("d", 0.0)]
    ranking = rank(reranker, QUERY, documents)
    assert indices(ranking)[0] == 1
    check_ranking(ranking, documents)


def test_equal_documents_are_sent_once_and_score_alike(
    rank: Rank, reranker: RemoteReranker, server: FaultServer
) -> None:
    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]
    ranking = rank(reranker, QUERY, documents)
    check_ranking(ranking, documents)
    assert indices(ranking) == [1, 0, 2]
    assert server.requests[0][1]["documents"] == DOCUMENTS[:2]


def test_body_has_nothing_that_was_not_asked_for(
    reranker: RemoteReranker, server: FaultServer
) -> None:
    reranker.rank(QUERY, DOCUMENTS)
    ((headers, body),) = server.requests
    assert body == {"query": QUERY, "documents": DOCUMENTS}
    assert "Authorization" not in headers
    with RemoteReranker(
        server.url, api_key=KEY, model="m", max_tokens_per_doc=7, instruction="task"
    ) as other:
        other.rank(QUERY, DOCUMENTS, top_n=1)
    headers, body = server.requests[-1]
    assert body == {
        "query": QUERY, "documents": DOCUMENTS, "model": "m", "max_tokens_per_doc": 7,
        "instruction": "task",
    }  # fmt: skip
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_half_an_emoji_is_repaired(reranker: RemoteReranker, server: FaultServer) -> None:
    documents = [text("\ud83d", 0.3)]
    check_ranking(reranker.rank("\ud83d", documents), documents)
    assert server.requests[0][1]["query"] == "\ufffd"


class TestFaults:
    """13 faults, on the first try and on the last: 26 outcomes."""

    PASSING = ("reset", "500", "429", "503")
    LASTING = ("401", "redirect", "missing", "duplicate", "negative", "nan", "html")
    SLOW = ("stall", "drip")
    ERRORS: ClassVar[dict[str, type[Qwen3RerankerError]]] = {
        "reset": RemoteError, "500": RemoteError, "503": RemoteError, "429": OverloadedError,
        "401": RemoteError, "redirect": RemoteError, "missing": RemoteProtocolError,
        "duplicate": RemoteProtocolError, "negative": RemoteProtocolError,
        "nan": RemoteProtocolError, "html": RemoteProtocolError, "stall": TimedOutError,
        "drip": TimedOutError,
    }  # fmt: skip

    def call(
        self, rank: Rank, reranker: RemoteReranker, timeout_s: float
    ) -> list[RankedDocument] | Qwen3RerankerError:
        with ends_within(timeout_s):
            try:
                return rank(reranker, "CANARY", DOCUMENTS, timeout_s=timeout_s)
            except Qwen3RerankerError as error:
                return error

    @pytest.mark.parametrize("fault", [*PASSING, *LASTING, *SLOW])
    @pytest.mark.parametrize("place", ["first", "last"])
    def test_outcome(self, rank: Rank, server: FaultServer, fault: str, place: str) -> None:
        with RemoteReranker(server.url, api_key=KEY) as reranker:
            rank(reranker, QUERY, DOCUMENTS)  # which asks the server what it understands
            server.requests.clear()
            server.script = [fault] if place == "first" else ["503", "503", fault]
            outcome = self.call(rank, reranker, 0.5 if fault in self.SLOW else 3)
            if place == "first" and fault in self.PASSING:
                assert isinstance(outcome, list)
                check_ranking(outcome, DOCUMENTS)
                assert indices(outcome) == ORDER
                assert len(server.requests) == 2
            else:
                assert type(outcome) is self.ERRORS[fault]
                for secret in ("CANARY", KEY, DOCUMENTS[0]):
                    assert secret not in str(outcome) + repr(outcome)
                assert len(server.requests) == (1 if place == "first" else 3)
            # And the next call is served.
            server.script.clear()
            assert indices(rank(reranker, QUERY, DOCUMENTS)) == ORDER

    def test_failed_calls_leave_no_complaints_of_asyncio(
        self, server: FaultServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail() -> None:
            for fault in ("missing", "stall"):
                server.script = [fault] * 3
                with pytest.raises(Qwen3RerankerError):
                    await reranker.arank(QUERY, DOCUMENTS, timeout_s=0.3)
            await asyncio.sleep(0.3)  # until the abandoned requests have ended

        with RemoteReranker(server.url, max_documents_per_request=1) as reranker:
            reranker.rank(QUERY, DOCUMENTS)
            asyncio.run(fail())
        gc.collect()
        assert [record.name for record in caplog.records] == []

    def test_faults_are_thirteen(self) -> None:
        assert len(self.ERRORS) == len([*self.PASSING, *self.LASTING, *self.SLOW]) == 13

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("beyond", "none of the 3"), ("text index", "none of the 3"),
            ("true index", "none of the 3"), ("text score", "between 0 and 1"),
            ("null score", "between 0 and 1"), ("logit", "between 0 and 1"),
            ("more", "none of the 3"), ("repeated", "stands twice"), ("huge", "longer than"),
        ],
    )  # fmt: skip
    def test_reply_that_is_no_ranking_is_refused(
        self, reranker: RemoteReranker, server: FaultServer, fault: str, message: str
    ) -> None:
        server.script = [fault]
        with pytest.raises(RemoteProtocolError, match=message):
            reranker.rank(QUERY, DOCUMENTS)
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        ("documents", "content", "message"),
        [
            (3, b"[" + b" " * 80_000 + b"]", "longer than 7"),
            (32, b"[" + b" " * 210_000 + b"]", "longer than 20"),
            (3, b"[" + b"[]," * 2000 + b"[]]", "more than 1305 values"),
            (3, b"{" + b",".join(b'"%d":0' % i for i in range(1400)) + b"}", "values"),
            (3, b"[" * 1200, "no JSON"),
        ],
    )
    def test_reply_that_is_more_than_a_ranking_can_be_is_refused(
        self, server: FaultServer, documents: int, content: bytes, message: str
    ) -> None:
        server.content = content
        server.script = ["content"]
        texts = [text(str(i), 0.5) for i in range(documents)]
        with (
            RemoteReranker(server.url) as reranker,
            pytest.raises(RemoteProtocolError, match=message),
        ):
            reranker.rank(QUERY, texts)
        assert len(server.requests) == 1

    def test_texts_that_are_sent_back_may_be_long(self, server: FaultServer) -> None:
        documents = [text(str(i) + '\u0001,["' * 30_000, 0.5) for i in range(3)]
        rows = [
            {"index": i, "relevance_score": 0.5, "document": {"text": document}}
            for i, document in enumerate(documents)
        ]
        server.content = json.dumps({"results": rows}).encode()
        server.script = ["content"]
        with RemoteReranker(server.url) as reranker:
            assert reranker.score(QUERY, documents) == [0.5] * 3

    @pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
    def test_reply_that_says_it_is_not_compressed_is_read(
        self, reranker: RemoteReranker, server: FaultServer, encoding: str
    ) -> None:
        server.headers = {"Content-Encoding": encoding}
        assert indices(reranker.rank(QUERY, DOCUMENTS)) == ORDER

    @pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "gzip, gzip", "identity, zstd"])
    def test_reply_that_is_compressed_is_refused(
        self, reranker: RemoteReranker, server: FaultServer, encoding: str
    ) -> None:
        server.headers = {"Content-Encoding": encoding}
        with pytest.raises(RemoteProtocolError, match="compressed"):
            reranker.rank(QUERY, DOCUMENTS)

    @pytest.mark.parametrize("tokens", [True, 10**400, -1, 74.0, "74", None])
    def test_count_of_tokens_that_is_none_is_as_good_as_none(
        self, server: FaultServer, tokens: object
    ) -> None:
        assert servers._prompt_tokens({"usage": {"prompt_tokens": tokens}}) is None

    def test_refusals_are_not_tried_again(
        self, reranker: RemoteReranker, server: FaultServer
    ) -> None:
        for status in ("400", "403", "404", "413", "422"):
            server.requests.clear()
            server.script = [status]
            with pytest.raises(RemoteError, match=f"status {status}") as caught:
                reranker.rank(QUERY, DOCUMENTS)
            assert caught.value.status == int(status)
            assert len(server.requests) == 1

    def test_nobody_listens(self, rank: Rank, server: FaultServer) -> None:
        url = server.url
        server.shutdown()
        server.server_close()
        with RemoteReranker(url) as reranker:
            outcome = self.call(rank, reranker, 2)
        assert type(outcome) is RemoteError
        assert "ConnectError" in str(outcome)


class TestTime:
    @pytest.mark.parametrize("form", ["seconds", "date"])
    def test_retry_after_is_waited_for(
        self, reranker: RemoteReranker, server: FaultServer, form: str
    ) -> None:
        reranker.rank(QUERY, DOCUMENTS)
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        server.script = ["429 0.4" if form == "seconds" else f"429 {at}"]
        started = time.monotonic()
        assert indices(reranker.rank(QUERY, DOCUMENTS)) == ORDER
        assert 0.4 <= time.monotonic() - started < 2.5

    @pytest.mark.parametrize("header", ["60", "1e9", "Wed, 21 Oct 2099 07:28:00 GMT"])
    def test_retry_after_past_the_deadline_fails_at_once(
        self, reranker: RemoteReranker, server: FaultServer, header: str
    ) -> None:
        reranker.rank(QUERY, DOCUMENTS)
        server.script = [f"429 {header}"]
        started = time.monotonic()
        with pytest.raises(OverloadedError):
            reranker.rank(QUERY, DOCUMENTS, timeout_s=5)
        assert time.monotonic() - started < 0.5

    def test_retry_after_that_is_too_long_is_a_refusal_without_a_deadline_too(
        self, server: FaultServer
    ) -> None:
        with RemoteReranker(server.url, timeout_s=None) as reranker:
            server.script = ["429 1e300"]
            with ends_within(0.5), pytest.raises(OverloadedError):
                reranker.rank(QUERY, DOCUMENTS)

    @pytest.mark.parametrize(
        "header", ["soon", "nan", "-3", "", "Mon, 01 Jan 99999999999 00:00:00 GMT"]
    )
    def test_retry_after_that_means_nothing_is_passed_over(
        self, reranker: RemoteReranker, server: FaultServer, header: str
    ) -> None:
        server.script = [f"429 {header}"]
        assert indices(reranker.rank(QUERY, DOCUMENTS)) == ORDER

    def test_call_that_waits_for_its_turn_ends_at_its_deadline(
        self, rank: Rank, server: FaultServer
    ) -> None:
        with RemoteReranker(server.url, max_in_flight=1) as reranker:
            reranker.rank(QUERY, DOCUMENTS)
            server.script = ["stall"]
            with ThreadPoolExecutor(1) as pool:
                first = pool.submit(reranker.rank, QUERY, DOCUMENTS, timeout_s=0.6)
                time.sleep(0.1)
                with ends_within(0.2), pytest.raises(TimedOutError):
                    rank(reranker, QUERY, DOCUMENTS, timeout_s=0.2)
                with pytest.raises(TimedOutError):
                    first.result()

    @pytest.mark.parametrize("step", ["drip", "drip headers"])
    def test_dripping_reply_holds_no_connection_past_its_deadline(
        self, rank: Rank, server: FaultServer, step: str
    ) -> None:
        with RemoteReranker(server.url, max_in_flight=1) as reranker:
            rank(reranker, QUERY, DOCUMENTS)
            server.script = [step]  # for ten seconds
            with pytest.raises(TimedOutError):
                rank(reranker, QUERY, DOCUMENTS, timeout_s=0.3)
            assert indices(rank(reranker, QUERY, DOCUMENTS, timeout_s=3)) == ORDER

    def test_deadline_of_the_object_is_for_calls_without_one(
        self, rank: Rank, server: FaultServer
    ) -> None:
        with RemoteReranker(server.url, timeout_s=0.3) as reranker:
            rank(reranker, QUERY, DOCUMENTS)
            server.script = ["stall"]
            with ends_within(0.3), pytest.raises(TimedOutError):
                rank(reranker, QUERY, DOCUMENTS)

    async def test_cancelled_call_sends_nothing_more(self, server: FaultServer) -> None:
        server.delay_s = 0.2
        with RemoteReranker(server.url, max_in_flight=1, max_documents_per_request=1) as reranker:
            task = asyncio.create_task(reranker.arank(QUERY, DOCUMENTS))
            await asyncio.sleep(0.1)
            await cancel(task)
            await asyncio.sleep(0.5)
        assert len(server.requests) == 1

    async def test_cancelled_call_is_not_tried_again(self, server: FaultServer) -> None:
        with RemoteReranker(server.url) as reranker:
            await reranker.arank(QUERY, DOCUMENTS)
            server.requests.clear()
            server.script = ["429 0.3"] * 3
            task = asyncio.create_task(reranker.arank(QUERY, DOCUMENTS))
            while not server.requests:
                await asyncio.sleep(0.01)
            await cancel(task)
            await asyncio.sleep(0.5)
        assert len(server.requests) == 1


class TestManyDocuments:
    DOCUMENTS: ClassVar = [text(str(i), (i * 37 % 100) / 100) for i in range(100)]

    def test_requests_are_bounded_in_size_and_number(self, rank: Rank, server: FaultServer) -> None:
        server.delay_s = 0.02
        with RemoteReranker(server.url, max_documents_per_request=7, max_in_flight=3) as reranker:
            ranking = rank(reranker, QUERY, self.DOCUMENTS)
        check_ranking(ranking, self.DOCUMENTS)
        sizes = [len(body["documents"]) for _, body in server.requests]
        assert (sum(sizes), max(sizes), len(sizes)) == (100, 7, 15)
        assert server.connections == 3  # and each has one request under way

    @pytest.mark.parametrize("failing", range(4))
    def test_one_failed_request_fails_the_call(
        self, rank: Rank, server: FaultServer, failing: int
    ) -> None:
        with RemoteReranker(server.url, max_documents_per_request=25, max_in_flight=1) as reranker:
            server.script = [*["ok"] * failing, "missing"]
            with pytest.raises(RemoteProtocolError):
                rank(reranker, QUERY, self.DOCUMENTS)

    def test_short_call_takes_its_turn_beside_a_long_one(self, server: FaultServer) -> None:
        server.delay_s = 0.02
        with RemoteReranker(server.url, max_documents_per_request=1, max_in_flight=2) as reranker:
            reranker.rank(QUERY, DOCUMENTS)
            with ThreadPoolExecutor(1) as pool:
                long = pool.submit(reranker.rank, "long", self.DOCUMENTS)
                time.sleep(0.1)
                reranker.rank("short", DOCUMENTS[:1])
                assert not long.done()
        place = [body["query"] for _, body in server.requests].index("short")
        assert place < 3 + 50

    def test_hundred_calls_use_one_connection(self, server: FaultServer) -> None:
        with RemoteReranker(server.url) as reranker:
            for _ in range(50):
                reranker.rank(QUERY, DOCUMENTS)
            for _ in range(5):  # event loops, one after the other

                async def ten() -> None:
                    for _ in range(10):
                        await reranker.arank(QUERY, DOCUMENTS)

                asyncio.run(ten())
        assert len(server.requests) == 100
        assert server.connections == 1

    def test_rerankers_of_equal_settings_share_their_connections(self, server: FaultServer) -> None:
        first, second = RemoteReranker(server.url), RemoteReranker(server.url, instruction="t")
        for reranker in (first, second, copy.copy(first), copy.deepcopy(second)):
            reranker.rank(QUERY, DOCUMENTS)
        assert server.connections == 1
        first.close()
        assert indices(second.rank(QUERY, DOCUMENTS)) == ORDER
        with RemoteReranker(server.url, api_key=KEY) as other:
            other.rank(QUERY, DOCUMENTS)
        assert server.connections == 2

    def test_callers_get_their_own_scores(self, server: FaultServer) -> None:
        lists = [[text(f"{c}-{i}", (i + c) % 7 / 8) for i in range(9)] for c in range(24)]
        with RemoteReranker(server.url, max_documents_per_request=4) as reranker:
            alone = [reranker.rank(QUERY, documents) for documents in lists]
            with ThreadPoolExecutor(12) as pool:
                together = list(pool.map(reranker.rank, [QUERY] * 24, lists))

            async def tasks() -> list[list[RankedDocument]]:
                return await asyncio.gather(*(reranker.arank(QUERY, d) for d in lists))

            assert together == alone
            assert asyncio.run(tasks()) == alone
        for ranking, documents in zip(alone, lists, strict=True):
            check_ranking(ranking, documents)

    def test_forked_child_has_connections_of_its_own(self, server: FaultServer) -> None:
        code = (
            "import os\n"
            "from qwen3_reranker import RemoteReranker\n"
            f"reranker = RemoteReranker({server.url!r})\n"
            "rank = lambda: [r.index for r in reranker.rank('q', ['scores 0.1', 'scores 0.9'])]\n"
            "rank()\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    os._exit(7 if rank() == [1, 0] else 1)\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
            "assert rank() == [1, 0]\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
        assert server.connections == 2

    def test_child_forked_while_connections_are_looked_up_can_make_its_own(self) -> None:
        code = (
            "import os\n"
            "from qwen3_reranker import RemoteReranker\n"
            "with RemoteReranker._endpoints_lock:\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        RemoteReranker('http://127.0.0.1:9')\n"
            "        os._exit(7)\n"
            "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=20)

    def test_interrupted_process_does_not_wait_for_the_server(self, server: FaultServer) -> None:
        server.script = ["stall"]  # for five seconds
        code = (
            "from qwen3_reranker import RemoteReranker\n"
            f"RemoteReranker({server.url!r}).rank('q', ['d'], timeout_s=60)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
            while not server.requests and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=3)
        assert b"KeyboardInterrupt" in error


class TestDialects:
    def test_tei_is_recognised(self, rank: Rank, server: FaultServer) -> None:
        server.is_tei = True
        with RemoteReranker(server.url) as reranker:
            ranking = rank(reranker, QUERY, DOCUMENTS)
            check_ranking(ranking, DOCUMENTS)
            assert indices(ranking) == ORDER
            assert server.requests[0][1] == {"query": QUERY, "texts": DOCUMENTS}
            with pytest.raises(InputError, match="does not read instructions"):
                rank(reranker, QUERY, DOCUMENTS, instruction="task")

    @pytest.mark.parametrize("is_tei", [False, True])
    def test_address_of_the_rerank_path_is_taken_as_it_is(
        self, server: FaultServer, is_tei: bool
    ) -> None:
        server.is_tei = is_tei
        with RemoteReranker(server.url + ("/rerank" if is_tei else "/v1/rerank")) as reranker:
            assert indices(reranker.rank(QUERY, DOCUMENTS)) == ORDER

    def test_server_without_template_is_refused(self, rank: Rank, server: FaultServer) -> None:
        server.has_template = server.reads_instruction = False
        with RemoteReranker(server.url) as reranker:
            for _ in range(2):
                with pytest.raises(RemoteProtocolError, match="applies no prompt template"):
                    rank(reranker, QUERY, DOCUMENTS)
        assert server.requests == []

    def test_client_mode_sends_whole_prompts(self, rank: Rank, server: FaultServer) -> None:
        server.has_template = server.reads_instruction = False
        server.model = lambda query, texts: [0.5] * len(texts)
        with RemoteReranker(server.url, prompt_mode="client") as reranker:
            rank(reranker, QUERY, ["tea", ""], instruction="Find {drinks}")
            rank(reranker, QUERY, ["tea"])
        bodies = [body for _, body in server.requests]
        default = QWEN3_RERANKER.default_instruction
        assert [bodies[0]["query"] + d for d in bodies[0]["documents"]] == [
            QWEN3_RERANKER.render("Find {drinks}", QUERY, d) for d in ("tea", "")
        ]
        assert bodies[1]["query"] + bodies[1]["documents"][0] == QWEN3_RERANKER.render(
            default, QUERY, "tea"
        )
        assert "instruction" not in bodies[0]

    def test_client_mode_refuses_a_server_with_a_template(self, server: FaultServer) -> None:
        reranker = RemoteReranker(server.url, prompt_mode="client")
        with pytest.raises(RemoteProtocolError, match="template of its own"):
            reranker.rank(QUERY, DOCUMENTS)

    def test_instruction_that_would_not_be_read_is_refused(
        self, rank: Rank, server: FaultServer
    ) -> None:
        server.reads_instruction = False
        with RemoteReranker(server.url) as reranker:
            assert indices(rank(reranker, QUERY, DOCUMENTS)) == ORDER
            with pytest.raises(InputError, match="does not read instructions"):
                rank(reranker, QUERY, DOCUMENTS, instruction="task")

    @pytest.mark.parametrize(("longest", "reads"), [(100, True), (100, False), (20, False)])
    def test_server_that_reads_short_prompts_only_is_used_all_the_same(
        self, rank: Rank, server: FaultServer, longest: int, reads: bool
    ) -> None:
        server.longest, server.reads_instruction = longest, reads
        with RemoteReranker(server.url) as reranker:
            assert indices(rank(reranker, QUERY, DOCUMENTS)) == ORDER
            if reads:
                assert indices(rank(reranker, QUERY, DOCUMENTS, instruction="task")) == ORDER
            else:
                with pytest.raises(InputError, match="does not read instructions"):
                    rank(reranker, QUERY, DOCUMENTS, instruction="task")
        assert len(server.questions) == (2 if longest == 100 else 1)

    def test_calibrated_scores_keep_the_servers_order(self) -> None:
        for bias in (-5.0, 3.0):  # raw log-odds whose calibrated scores are near 0, and near 1
            raw = [-14.0, -13.0, 2.0, 13.0, 14.0]
            rows = [
                {"index": i, "relevance_score": probability(value + bias), "log_odds": value}
                for i, value in enumerate(raw)
            ]
            scores = read_scores({"results": rows}, len(rows))
            for score, value in zip(scores, raw, strict=True):
                assert score.log_odds == pytest.approx(value + bias, rel=1e-6)

    def test_server_is_asked_once(self, server: FaultServer) -> None:
        with RemoteReranker(server.url) as reranker, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: reranker.rank(QUERY, DOCUMENTS), range(16)))
        assert len(server.questions) == 1

    def test_log_odds_of_our_server_are_taken_where_they_fit_the_score(self) -> None:
        rows = [
            {"index": 0, "relevance_score": 1.0, "log_odds": 41.5, "truncated": True},
            {"index": 1, "relevance_score": 0.5, "log_odds": 41.5},
        ]
        rows.append({"index": 2, "relevance_score": 1.0, "log_odds": math.inf})
        ours, invented, endless = read_scores({"results": rows}, 3)
        assert math.isfinite(endless.log_odds)
        assert (ours.log_odds, ours.truncated) == (41.5, True)
        assert (invented.log_odds, invented.truncated) == (0.0, False)


class TestKeepOrder:
    @pytest.mark.parametrize("fault", ["503", "missing", "401", "stall"])
    def test_given_order_comes_back_marked_and_without_scores(
        self, rank: Rank, server: FaultServer, fault: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with RemoteReranker(server.url, on_error="keep_order", timeout_s=0.5) as reranker:
            rank(reranker, QUERY, DOCUMENTS)
            for _ in range(2):
                server.script = [fault] * 3
                ranking = rank(reranker, QUERY, DOCUMENTS, top_n=2, score_threshold=0.4)
                assert indices(ranking) == [0, 1]
                assert [result.reranked for result in ranking] == [False, False]
                assert all(result.score != result.score for result in ranking)
                verify_ranking(ranking, 3, 2, 0.4)
                server.script.clear()
            healthy = rank(reranker, QUERY, DOCUMENTS)
            assert (indices(healthy), healthy[0].reranked) == (ORDER, True)
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert [r.getMessage().startswith("Documents are not reranked") for r in warnings] == [True]
        assert DOCUMENTS[0] not in caplog.text

    def test_wrong_arguments_are_errors_all_the_same(self, rank: Rank, server: FaultServer) -> None:
        with RemoteReranker(server.url, on_error="keep_order") as reranker:
            with pytest.raises(InputError):
                rank(reranker, " ", DOCUMENTS)
            with pytest.raises(InputError):
                rank(reranker, QUERY, DOCUMENTS, top_n=0)
        with pytest.raises(ClosedError):
            rank(reranker, QUERY, DOCUMENTS)

    def test_scores_are_never_invented(self, server: FaultServer) -> None:
        with RemoteReranker(server.url, on_error="keep_order") as reranker:
            server.script = ["missing"]
            with pytest.raises(RemoteProtocolError):
                reranker.score(QUERY, DOCUMENTS)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"url": "ftp://host"}, "http or https"),
            ({"url": "http://"}, "http or https"),
            ({"url": "Qwen/Qwen3-Reranker-0.6B"}, "http or https"),
            ({"url": "http://user:CANARY@host"}, "no user, password"),
            ({"url": "http://host?key=CANARY"}, "no user, password"),
            ({"url": 5}, "url"),
            ({"url": "http://[::1"}, "http or https"),
            ({"url": "http://host:99999"}, "http or https"),
            ({"url": ""}, "http or https"),
            ({"url": None}, "url must be a string, got NoneType"),
            ({"url": "http://xn--a:9"}, "http or https"),
            ({"url": "http://ho\nst"}, "http or https"),
            ({"api_key": "CANARY\nX: y"}, "printable ASCII"),
            ({"api_key": "CANARY ü"}, "printable ASCII"),
            ({"timeout_s": 0}, "timeout_s"),
            ({"max_in_flight": 0}, "max_in_flight"),
            ({"max_documents_per_request": 0}, "max_documents_per_request"),
            ({"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
            ({"prompt_mode": "none"}, "prompt_mode must be one of server, client"),
            ({"on_error": "ignore"}, "on_error must be one of raise, keep_order"),
            ({"instruction": 5}, "instruction"),
            ({"model": 5}, "model"),
        ],
    )
    def test_wrong_setting_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            RemoteReranker(**{"url": "http://host", **settings})
        assert "CANARY" not in str(caught.value)

    def test_address_of_a_file_may_end_in_a_newline(self, server: FaultServer) -> None:
        with RemoteReranker(f" {server.url}\n") as reranker:
            assert indices(reranker.rank(QUERY, DOCUMENTS)) == ORDER

    def test_key_stands_nowhere(
        self, server: FaultServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="qwen3_reranker")
        with RemoteReranker(server.url, api_key=KEY) as reranker:
            reranker.rank(QUERY, DOCUMENTS)
            assert KEY.encode() not in pickle.dumps(reranker)
            assert KEY not in repr(reranker) + caplog.text
            assert repr(reranker) == f"RemoteReranker('{server.url}')"

    def test_key_comes_from_the_environment(
        self, server: FaultServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QWEN3_RERANKER_API_KEY", KEY)
        with RemoteReranker(server.url) as reranker:
            reranker.rank(QUERY, DOCUMENTS)
            again = pickle.loads(pickle.dumps(reranker))  # noqa: S301
            assert again.rank(QUERY, DOCUMENTS) == reranker.rank(QUERY, DOCUMENTS)
        assert {headers["Authorization"] for headers, _ in server.requests} == {f"Bearer {KEY}"}

    def test_pickle_keeps_settings(self, server: FaultServer) -> None:
        reranker = RemoteReranker(server.url, model="m", instruction="t", on_error="keep_order")
        again = pickle.loads(pickle.dumps(reranker))  # noqa: S301
        again.rank(QUERY, DOCUMENTS)
        assert server.requests[0][1]["instruction"] == "t"
        assert again._settings == reranker._settings

    def test_closed_reranker_says_so(self, server: FaultServer) -> None:
        reranker = RemoteReranker(server.url)
        reranker.rank(QUERY, DOCUMENTS)
        reranker.close()
        for call in (reranker.rank, reranker.score):
            with pytest.raises(ClosedError):
                call(QUERY, DOCUMENTS)

    def test_forgotten_reranker_leaves_no_connection(self, server: FaultServer) -> None:
        reranker = RemoteReranker(server.url)
        reranker.rank(QUERY, DOCUMENTS)
        del reranker
        gc.collect()  # warnings are errors: an open socket would raise one

    @pytest.mark.parametrize("wrong", [{"query": " "}, {"documents": "x"}, {"documents": [5]}])
    def test_wrong_arguments_are_refused_before_any_request(
        self, rank: Rank, server: FaultServer, wrong: dict[str, Any]
    ) -> None:
        call = {"query": QUERY, "documents": DOCUMENTS, **wrong}
        with RemoteReranker(server.url) as reranker, pytest.raises(InputError):
            rank(reranker, call["query"], call["documents"])
        assert server.connections == 0

    def test_without_httpx_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("http", "servers", "remote"):
            monkeypatch.delitem(sys.modules, f"qwen3_reranker.client.{module}")
        monkeypatch.setitem(sys.modules, "httpx", None)
        import qwen3_reranker

        with pytest.raises(MissingExtraError, match=r"qwen3-reranker\[remote\]"):
            _ = qwen3_reranker.RemoteReranker


def test_model_of_the_contract_suites_scores_by_the_text() -> None:
    assert Model()(QUERY, DOCUMENTS) == pytest.approx([0.2, 0.9, 0.5])
