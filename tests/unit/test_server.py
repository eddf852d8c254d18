from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from qwen3_reranker import (
    DocumentTooLargeError,
    InputError,
    ModelLoadError,
    OverloadedError,
    Reranker,
    TimedOutError,
)
from qwen3_reranker.cli.main import main
from qwen3_reranker.engine.packing import Pack
from qwen3_reranker.server import middleware as guard
from qwen3_reranker.server.app import Service, create_app, read_api_key
from qwen3_reranker.server.metrics import Metrics
from qwen3_reranker.server.middleware import Guard
from qwen3_reranker.server.schemas import ServerLimits
from qwen3_reranker.web.hosts import is_loopback
from qwen3_reranker.web.listening import check_address
from tests import fakes

QUERY = "red apple"
FRUIT = ["green pear", "red apple", "red pear"]
ORDER = [1, 2, 0]
RERANK = ["/rerank", "/v1/rerank", "/v2/rerank"]
GUARDED = [
    ("POST", "/rerank"),
    ("POST", "/v1/rerank"),
    ("POST", "/v2/rerank"),
    ("POST", "/score"),
    ("GET", "/v1/models"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/not/there"),
    ("GET", "/health/"),
    ("GET", "//health"),
]


def client_of(
    *,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] | None = None,
    **settings: Any,
) -> httpx.AsyncClient:
    """Return a client that talks to a new application in this process."""
    limits = limits or ServerLimits()
    service = Service(Reranker("served", **settings), "served", limits)
    app = create_app(service, api_key=api_key, limits=limits, allowed_hosts=allowed_hosts)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


@pytest.fixture
async def client(model: fakes.FakeModel) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of() as client:
        yield client


async def rerank(client: httpx.AsyncClient, path: str = "/v1/rerank", **body: Any) -> Any:
    """Return the answer to a request that must be answered."""
    reply = await client.post(path, json={"query": QUERY, "documents": FRUIT, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def indices(answer: Any) -> list[int]:
    results = answer if isinstance(answer, list) else answer["results"]
    return [result["index"] for result in results]


@pytest.mark.parametrize("path", RERANK)
async def test_rerank_answers_sorted_with_usage_and_meta(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await rerank(client, path)
    assert indices(answer) == ORDER
    ranking = Reranker("served").rank(QUERY, FRUIT)
    assert [r["relevance_score"] for r in answer["results"]] == [r.score for r in ranking]
    assert [r["log_odds"] for r in answer["results"]] == [r.log_odds for r in ranking]
    assert [r["truncated"] for r in answer["results"]] == [False] * 3
    assert all("document" not in result for result in answer["results"])
    group = fakes.small_tokenizer().encode_group(None, QUERY, FRUIT, max_length=8192)
    tokens = 3 * len(group.head) + sum(map(len, group.documents))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["meta"]["tokens"] == {"input_tokens": tokens, "output_tokens": 0}
    assert (answer["model"], answer["object"]) == ("served", "list")
    assert answer["id"] != (await rerank(client, path))["id"]


async def test_null_is_accepted_wherever_a_field_is_optional(client: httpx.AsyncClient) -> None:
    names = (
        "model", "instruction", "top_n", "return_documents", "max_tokens_per_doc", "texts",
        "return_text", "raw_scores", "rank_fields", "truncate",
    )  # fmt: skip
    assert indices(await rerank(client, **dict.fromkeys(names))) == ORDER


async def test_fields_of_other_servers_are_ignored(client: httpx.AsyncClient) -> None:
    answer = await rerank(client, priority=3, user="someone", rank_fields=["text"], model="any")
    assert indices(answer) == ORDER


async def test_documents_may_be_wrapped_as_text(client: httpx.AsyncClient) -> None:
    wrapped = [{"text": FRUIT[0], "title": "x"}, FRUIT[1], {"text": FRUIT[2]}]
    answer = await rerank(client, documents=wrapped, return_documents=True)
    assert indices(answer) == ORDER
    assert [r["document"] for r in answer["results"]] == [{"text": FRUIT[i]} for i in ORDER]


async def test_top_n_keeps_that_many(client: httpx.AsyncClient) -> None:
    assert indices(await rerank(client, top_n=2)) == ORDER[:2]
    assert indices(await rerank(client, top_n=99)) == ORDER


async def test_instruction_reaches_the_prompt(
    client: httpx.AsyncClient, model: fakes.FakeModel
) -> None:
    await rerank(client, instruction="Find fruit")
    expected = fakes.small_tokenizer().encode_group("Find fruit", QUERY, [], max_length=8192).head
    assert model.network.heads == [expected.tolist()]


async def test_server_instruction_is_for_requests_without_one(model: fakes.FakeModel) -> None:
    async with client_of(instruction="Find fruit") as client:
        await rerank(client)
        await rerank(client, instruction=None)
        await rerank(client, instruction="")
    encode = fakes.small_tokenizer().encode_group
    heads = [encode(i, QUERY, [], max_length=8192).head.tolist() for i in ("Find fruit", "")]
    assert model.network.heads == [heads[0], heads[0], heads[1]]


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
async def test_max_tokens_per_doc_cuts_and_says_so(
    client: httpx.AsyncClient, model: fakes.FakeModel, max_tokens: int
) -> None:
    documents = ["red apple tree", "red"]  # 3 tokens and 1
    answer = await rerank(
        client, documents=documents, max_tokens_per_doc=max_tokens, return_documents=True
    )
    (pack,) = model.network.packs
    num_suffix = len(fakes.small_tokenizer().suffix)
    lengths = {place.stop - place.start - num_suffix for place in pack.spans[0].documents}
    assert lengths == {max_tokens, 1}
    by_index = {result["index"]: result for result in answer["results"]}
    assert by_index[0]["truncated"] is (max_tokens < 3)
    assert by_index[1]["truncated"] is False
    assert by_index[0]["document"] == {"text": documents[0]}


async def test_texts_are_answered_as_tei_does(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": FRUIT, "truncate": True}
    answer = (await client.post("/rerank", json=body)).json()
    ranking = Reranker("served").rank(QUERY, FRUIT)
    assert answer == [{"index": r.index, "score": r.score} for r in ranking]
    body |= {"raw_scores": True, "return_text": True, "top_n": 1, "model": None}
    (best,) = (await client.post("/rerank", json=body)).json()
    assert best == {"index": 1, "score": ranking[0].log_odds, "text": FRUIT[1]}


async def test_fastgpt_reads_the_first_result_per_document_and_input_tokens(
    client: httpx.AsyncClient,
) -> None:
    answer = await rerank(client, model="rerank")
    assert indices(answer) == ORDER  # it keeps the first it sees
    assert answer["meta"]["tokens"]["input_tokens"] > 0


async def test_dify_sends_null_and_reads_documents_back(client: httpx.AsyncClient) -> None:
    answer = await rerank(client, model="rerank", top_n=None, return_documents=True)
    read = [(r["index"], r["relevance_score"], r["document"]["text"]) for r in answer["results"]]
    assert [(index, text) for index, _, text in read] == [(i, FRUIT[i]) for i in ORDER]


async def test_open_webui_gets_every_result_and_sorts_by_index(client: httpx.AsyncClient) -> None:
    answer = await rerank(client, model="rerank", top_n=len(FRUIT))
    by_index = sorted(answer["results"], key=lambda result: result["index"])
    scores = [result["relevance_score"] for result in by_index]
    assert scores == Reranker("served").score(QUERY, FRUIT)


async def test_no_documents_give_no_results_and_no_model_call(
    client: httpx.AsyncClient, model: fakes.FakeModel
) -> None:
    assert (await rerank(client, documents=[]))["results"] == []
    assert (await client.post("/rerank", json={"query": QUERY, "texts": []})).json() == []
    assert model.network.packs == []


async def test_score_takes_one_query_or_pairs(client: httpx.AsyncClient) -> None:
    reranker = Reranker("served")
    one = await client.post("/score", json={"text_1": QUERY, "text_2": FRUIT})
    assert [row["score"] for row in one.json()["data"]] == reranker.score(QUERY, FRUIT)
    pairs = list(zip(reversed(FRUIT), FRUIT, strict=True))
    many = await client.post("/score", json={"text_1": FRUIT[::-1], "text_2": FRUIT})
    assert [row["score"] for row in many.json()["data"]] == reranker.score_pairs(pairs)
    assert [row["index"] for row in many.json()["data"]] == [0, 1, 2]
    single = await client.post("/score", json={"text_1": QUERY, "text_2": FRUIT[0]})
    assert [row["score"] for row in single.json()["data"]] == reranker.score(QUERY, FRUIT[:1])
    uneven = await client.post("/score", json={"text_1": FRUIT[:2], "text_2": FRUIT})
    assert uneven.status_code == 400
    assert "aligned, got 2 and 3" in uneven.json()["message"]


async def test_half_an_emoji_is_repaired_as_everywhere(client: httpx.AsyncClient) -> None:
    # Browsers cut strings by UTF-16 units; JSON carries what is left as an escape.
    body = (
        b'{"query": "red \\ud83d", "documents": ["red \\ud83d", "\\ud83d\\ude00"], '
        b'"return_documents": true}'
    )
    reply = await client.post(
        "/v1/rerank", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 200
    assert indices(reply.json()) == [0, 1]
    echoes = [result["document"]["text"] for result in reply.json()["results"]]
    assert echoes == ["red \ufffd", "\U0001f600"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"documents": FRUIT}, 422, "query: Field required"),
        ({"query": 5, "documents": FRUIT}, 422, "query: Input should be a valid string"),
        ({"query": QUERY}, 400, "documents are missing"),
        ({"query": " ", "documents": FRUIT}, 400, "query is blank"),
        ({"query": QUERY, "documents": "CANARY"}, 422, "documents: Input should be a valid list"),
        ({"query": QUERY, "documents": ["a", None]}, 422, "documents.1"),
        ({"query": QUERY, "documents": ["a", {"title": "CANARY"}]}, 422, "documents.1"),
        ({"query": QUERY, "documents": FRUIT, "top_n": 0}, 422, "greater than or equal to 1"),
        ({"query": QUERY, "documents": FRUIT, "top_n": "CANARY"}, 422, "top_n"),
        (
            {"query": QUERY, "documents": FRUIT, "max_tokens_per_doc": -1},
            422,
            "greater than or equal to 1",
        ),
        (["CANARY"], 422, "body"),
        ({"query": QUERY, "documents": [["CANARY"]] * 9}, 422, "(6 more)"),
    ],
)
async def test_wrong_body_is_refused_by_place_never_by_content(
    client: httpx.AsyncClient, body: Any, status: int, message: str
) -> None:
    reply = await client.post("/v1/rerank", json=body)
    assert reply.status_code == status
    answer = reply.json()
    assert message in answer["message"]
    assert answer["error"]["message"] == answer["message"] == answer["detail"]
    assert answer["error"]["code"] == status
    assert "CANARY" not in reply.text


async def test_body_without_its_header_is_told_of_it(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/rerank", content=b'{"query": "q", "documents": ["d"]}')
    assert reply.status_code == 422
    assert "Content-Type: application/json" in reply.json()["message"]


@pytest.mark.parametrize("content", [b"{CANARY", b"\xff\xfe", b"[" * 100_000, b""])
async def test_body_that_is_no_json_is_refused(client: httpx.AsyncClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = await client.post("/v1/rerank", content=content, headers=headers)
    assert reply.status_code in (400, 422)
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert "CANARY" not in reply.text


async def test_unknown_path_and_method_are_told_in_the_same_shape(
    client: httpx.AsyncClient,
) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/rerank", 405)):
        reply = await client.request(method, path)
        assert reply.status_code == status
        assert reply.json()["error"]["code"] == status
        assert reply.headers.get("Allow") == ("POST" if status == 405 else None)


@pytest.mark.parametrize(
    ("error", "status", "tei_type"),
    [
        (InputError("x"), 400, "Validation"),
        (DocumentTooLargeError("x"), 413, "Validation"),
        (OverloadedError("x"), 429, "Overloaded"),
        (ModelLoadError("x"), 503, "Unhealthy"),
        (TimedOutError("x"), 504, "Backend"),
        (RuntimeError("CANARY"), 500, "Backend"),
    ],
)
async def test_errors_come_in_the_shape_of_the_dialect(
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    tei_type: str,
) -> None:
    async def fail(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(Reranker, "arank", fail)
    jina = await client.post("/v1/rerank", json={"query": QUERY, "documents": FRUIT})
    tei = await client.post("/rerank", json={"query": QUERY, "texts": FRUIT})
    assert (jina.status_code, tei.status_code) == (status, status)
    assert jina.json()["error"]["code"] == status
    assert tei.json() == {"error": jina.json()["message"], "error_type": tei_type}
    assert ("Retry-After" in jina.headers) is (status in (429, 503))
    assert "CANARY" not in jina.text + tei.text + caplog.text


@pytest.mark.parametrize("over", [0, 1])
async def test_limits_hold_at_n_and_not_at_n_and_one(model: fakes.FakeModel, over: int) -> None:
    body = json.dumps({"query": QUERY, "documents": FRUIT}).encode()
    headers = {"content-type": "application/json"}

    async def chunks() -> AsyncIterator[bytes]:
        yield body[:10]
        yield body[10:]

    limits = ServerLimits(body_bytes=len(body) - over, documents=3)
    async with client_of(limits=limits) as client:
        for content in (body, chunks()):  # with its length declared, and without
            reply = await client.post("/v1/rerank", content=content, headers=headers)
            assert reply.status_code == (413 if over else 200)
            assert ("larger than" in reply.text) is bool(over)
    async with client_of(limits=ServerLimits(documents=3 - over)) as client:
        replies = [
            await client.post("/v1/rerank", json={"query": QUERY, "documents": FRUIT}),
            await client.post("/rerank", json={"query": QUERY, "texts": FRUIT}),
            await client.post("/score", json={"text_1": QUERY, "text_2": FRUIT}),
        ]
        assert [reply.status_code for reply in replies] == [413 if over else 200] * 3


async def test_room_is_made_beside_a_body_whose_time_has_just_ended() -> None:
    """Its task is told of it a turn of the loop later."""
    limits = ServerLimits(arriving_bytes=10)
    guard = Guard(FastAPI(), api_key=None, limits=limits, metrics=Metrics())

    async def end() -> None:
        async with asyncio.timeout(0) as ended, asyncio.timeout(60) as other:
            try:
                await asyncio.sleep(60)
            finally:
                guard._arriving |= {ended: 8, other: 8}
                guard._make_room()
                assert list(guard._arriving) == [other]

    with pytest.raises(TimeoutError):
        await end()


async def test_body_declared_too_large_is_not_read(model: fakes.FakeModel) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async with client_of(limits=ServerLimits(body_bytes=10)) as client:
        reply = await client.post("/v1/rerank", content=never(), headers={"content-length": "11"})
        assert reply.status_code == 413


@pytest.mark.parametrize("over", [0, 1])
async def test_token_limit_cuts_documents_and_refuses_longer_queries(
    model: fakes.FakeModel, over: int
) -> None:
    group = fakes.small_tokenizer().encode_group(None, QUERY, ["red apple"], max_length=8192)
    whole = len(group.head) + len(group.documents[0])
    async with client_of(max_length=whole - over) as client:
        (result,) = (await rerank(client, documents=["red apple"]))["results"]
        assert result["truncated"] is bool(over)
    alone = len(group.head) + len(fakes.small_tokenizer().suffix)
    async with client_of(max_length=alone + 1 - over) as client:
        reply = await client.post("/v1/rerank", json={"query": QUERY, "documents": FRUIT})
        assert reply.status_code == (400 if over else 200)


class Gate:
    """A network that waits until it may score."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.packs = 0

    def score(self, pack: Pack) -> NDArray[np.float32]:
        self.packs += 1
        self.is_open.wait(10)
        return np.zeros(len(pack.last_tokens), np.float32)

    rescore = score


async def until(condition: Any) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_queue_is_full_at_its_limit_and_answers_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    with fakes.loaded(monkeypatch, fakes.FakeModel(network=gate)):
        async with client_of(limits=ServerLimits(waiting=3)) as client:
            begun = [asyncio.create_task(rerank(client)) for _ in range(3)]
            await until(lambda: gate.packs)
            await asyncio.sleep(0.05)
            body = {"query": QUERY, "documents": FRUIT}
            async with asyncio.timeout(1):
                refused = await client.post("/v1/rerank", json=body)
                health = await client.get("/health")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert health.status_code == 200
            gate.is_open.set()
            await asyncio.gather(*begun)
            assert indices(await rerank(client)) == [0, 1, 2]


async def test_work_of_a_client_that_left_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with fakes.loaded(monkeypatch, fakes.FakeModel(network=gate)) as engine:
        service = Service(Reranker("served"), "served", ServerLimits())
        app = create_app(service, api_key=None, limits=ServerLimits())
        body = json.dumps({"query": QUERY, "documents": FRUIT}).encode()
        gone = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> Any:
            if not sent:
                sent.append(None)
                return {"type": "http.request", "body": body}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope: Any = {
            "type": "http", "method": "POST", "path": "/v1/rerank", "raw_path": b"/v1/rerank",
            "query_string": b"", "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        first = asyncio.create_task(Reranker("served").arank(QUERY, FRUIT))
        await until(lambda: gate.packs)
        request = asyncio.create_task(app(scope, receive, send))
        await until(lambda: engine._waiting.qsize())
        gone.set()
        await asyncio.wait_for(request, 1)  # while the first is still scored
        gate.is_open.set()
        await first
        await until(lambda: not engine._waiting.qsize())
        assert gate.packs == 1


KEY = "SECRET-KEY"


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.lower()}",
        f"Basic {KEY}",
        KEY,
    ],
)
async def test_guarded_path_refuses_no_key_and_wrong_key(
    model: fakes.FakeModel, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    async with client_of(api_key=KEY) as client:
        reply = await client.request(method, f"http://server{path}", headers=headers, json={})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert KEY not in reply.text


async def test_right_key_opens_every_path_and_health_needs_none(model: fakes.FakeModel) -> None:
    async with client_of(api_key=KEY) as client:
        assert (await client.get("/health")).status_code == 200
        for scheme in ("Bearer", "bearer"):
            client.headers["authorization"] = f"{scheme} {KEY}"
            assert indices(await rerank(client)) == ORDER
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert (await client.get(path)).status_code == 200


async def test_paths_of_the_application_are_the_ones_tested(model: fakes.FakeModel) -> None:
    async with client_of() as client:
        schema = (await client.get("/openapi.json")).json()
    assert set(schema["paths"]) | {"/openapi.json"} == {
        *(path for _, path in GUARDED if path not in ("/not/there", "/health/", "//health")),
        "/health",
    }


async def test_ready_once_the_weights_are_loaded(model: fakes.FakeModel) -> None:
    service = Service(Reranker("served"), "served", ServerLimits())
    app = create_app(service, api_key=None, limits=ServerLimits())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        assert (await client.get("/health")).status_code == 200
        early = await client.get("/ready")
        assert (early.status_code, "retry-after" in early.headers) == (503, True)
        service.load()
        assert (await client.get("/ready")).json() == {"status": "ready"}


async def test_models_names_the_model_without_its_folder(
    model: fakes.FakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "my-reranker"
    folder.mkdir()
    names = [(name, name) for name in ("Qwen/Qwen3", "~no such user/x", "x" * 300, "x\0y")]
    for name, shown in [(str(folder), "my-reranker"), *names]:
        service = Service(Reranker(name), name, ServerLimits())
        app = create_app(service, api_key=None, limits=ServerLimits())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            (listed,) = (await client.get("/v1/models")).json()["data"]
        assert listed["id"] == shown


async def test_metrics_count_requests_and_forwards(model: fakes.FakeModel) -> None:
    service = Service(Reranker("served"), "served", ServerLimits())
    service.load()
    app = create_app(service, api_key=None, limits=ServerLimits())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await rerank(client)
        await client.get("/CANARY")
        # The thread that scores tells the figures after it has delivered the scores.
        await until(lambda: b"documents_total 3.0" in service.metrics.render())
        text = (await client.get("/metrics")).text
    assert 'qwen3_reranker_requests_total{path="/v1/rerank",status="200"} 1.0' in text
    assert 'qwen3_reranker_requests_total{path="other",status="404"} 1.0' in text
    assert "qwen3_reranker_documents_total 3.0" in text
    assert "qwen3_reranker_waiting_requests 0.0" in text
    assert "CANARY" not in text


async def test_log_holds_no_text_and_no_key(
    model: fakes.FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="qwen3_reranker")
    async with client_of(api_key=KEY) as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        canary = {"query": "CANARY", "documents": ["CANARY \ud83d"], "instruction": "CANARY"}
        reply = await client.post("/v1/rerank?q=CANARY", content=json.dumps(canary))
        assert reply.status_code == 422  # no content type
        await rerank(client, query="CANARY", documents=["CANARY"])
        await client.get("/CANARY")
        await client.request("CANARY", "/v1/rerank")
    assert "POST /v1/rerank 200" in caplog.text
    assert "GET other 404" in caplog.text
    ours = [record for record in caplog.records if record.name.startswith("qwen3_reranker")]
    assert len(ours) == 4
    for record in ours:
        assert "CANARY" not in record.getMessage()
        assert KEY not in record.getMessage()


async def test_foreign_host_is_written_down_and_counted(
    model: fakes.FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen3_reranker")
    async with client_of(allowed_hosts=["server"]) as client:
        reply = await client.get("/v1/models", headers={"Host": "CANARY.example"})
        assert reply.status_code == 421
        figures = (await client.get("/metrics")).text
    assert "GET /v1/models 421" in caplog.text
    assert "CANARY" not in caplog.text + figures
    assert 'qwen3_reranker_requests_total{path="/v1/models",status="421"} 1.0' in figures


async def test_many_alike_get_a_number_in_place_of_lines(
    model: fakes.FakeModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="qwen3_reranker")
    now = 0.0
    monkeypatch.setattr(guard, "monotonic", lambda: now)
    async with client_of(api_key=KEY) as client:
        for _ in range(100):
            await client.get("/v1/models")
        await client.get("/health")
        assert len(caplog.records) == 61
        now = 60.0
        await client.get("/v1/models")
    lines = [record.getMessage() for record in caplog.records[60:]]
    assert lines == [
        "GET /health 200 0 ms", "GET /v1/models 401: 40 more in a minute",
        "GET /v1/models 401 0 ms",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("192.168.1.4", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_serve_refuses_other_hosts_without_a_key(
    model: fakes.FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QWEN3_RERANKER_API_KEY", raising=False)
    assert main(["serve", "served", "--host", "0.0.0.0"]) == 2  # noqa: S104
    assert "QWEN3_RERANKER_API_KEY" in capsys.readouterr().err


def test_busy_port_is_told_before_anything_is_loaded(
    model: fakes.FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert main(["serve", "served", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"at 127.0.0.1, port {port} (Address already in use). Pass another --port" in error


def test_address_that_cannot_be_listened_at_is_told(
    model: fakes.FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "served", "--port", "70000"]) == 2
    assert "port must be between 0 and 65535, got 70000" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"at no\.invalid, port 0 \((?!Unknown error)"):
        check_address("no.invalid", 0)


def test_key_comes_from_the_file_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.delenv("QWEN3_RERANKER_API_KEY", raising=False)
    assert read_api_key(None) is None
    assert read_api_key(str(file)) == KEY
    monkeypatch.setenv("QWEN3_RERANKER_API_KEY", "another")
    assert read_api_key(None) == "another"
    assert read_api_key(str(file)) == KEY
    for blank in ("", "  \n"):
        file.write_text(blank)
        with pytest.raises(InputError, match="printable ASCII"):
            read_api_key(str(file))
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_api_key(str(tmp_path / "none"))


def test_serve_without_the_extra_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "qwen3_reranker.server.app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "served"]) == 2
    assert 'pip install "qwen3-reranker[serve]"' in capsys.readouterr().err
