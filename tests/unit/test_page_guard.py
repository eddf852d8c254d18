from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from qwen3_reranker.ui import guard
from qwen3_reranker.ui.guard import BODY_BYTES, Click, PageGuard, Uploads, is_upload
from qwen3_reranker.web import listening

JOIN, RUN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/upload"


def is_text(value: Any) -> bool:
    return isinstance(value, str)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what has come through."""
    request = Request(scope, receive)
    seen = [scope["path"], scope["query_string"].decode(), (await request.body()).decode()]
    await JSONResponse(seen)(scope, receive, send)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path)


@pytest.fixture
def client(uploads: Uploads) -> TestClient:
    clicks = {0: Click(RUN, [is_text]), 1: Click(JOIN, [is_text, is_upload, is_upload], file=1)}
    return TestClient(PageGuard(echo, clicks=clicks, uploads=uploads))


def joined(client: TestClient, *values: Any, **other: Any) -> Any:
    """Return what comes through of a click."""
    click = {"data": values, "fn_index": 1, "session_hash": "a", **other}
    answer = client.post(JOIN, json=click)
    return json.loads(answer.json()[2]) if answer.status_code == 200 else answer.status_code


@pytest.mark.parametrize("path", ["/", "/theme.css", "/favicon.ico", "/assets/index-a_b.c.js"])
def test_page_is_let_through_and_nothing_is_asked_of_it(client: TestClient, path: str) -> None:
    assert client.get(f"{path}?deep_link=x").json() == [path, "", ""]
    assert client.post(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/config", "/gradio_api/file=/etc/passwd", "/gradio_api/info", "/assets/a/b.js",
        "/assets/a", JOIN,
    ],
)  # fmt: skip
def test_other_addresses_are_not_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_results_are_those_of_one_session(client: TestClient) -> None:
    path = "/gradio_api/queue/data"
    assert client.get(f"{path}?session_hash=a1&x=y").json() == [path, "session_hash=a1", ""]
    for query in ("", "session_hash=", "session_hash=a&session_hash=b", "session_hash=a%20b"):
        assert client.get(f"{path}?{query}").status_code == 404
    assert client.get(f"{path}?{'x=y&' * 1000}session_hash=a1").status_code == 200


def test_click_comes_through_without_what_the_page_does_not_send(client: TestClient) -> None:
    seen = joined(client, "tea", None, None, trigger_id=7, batched=True, event_data={"a": 1})
    assert seen == {
        "data": ["tea", None, None],
        "fn_index": 1,
        "session_hash": "a",
        "trigger_id": 7,
    }


def test_file_comes_through_as_its_name_alone(client: TestClient) -> None:
    file = {"path": "/etc/passwd", "url": "http://x", "meta": {"_type": "gradio.FileData"}}
    assert joined(client, "tea", file, None)["data"] == ["tea", None, "/etc/passwd"]
    assert joined(client, "tea", None, file)["data"] == ["tea", None, None]


@pytest.mark.parametrize(
    "change",
    [
        {"data": ["tea"]}, {"data": "tea"}, {"data": {"a": 1, "b": 2, "c": 3}}, {"data": None},
        {"data": [1, None, None]}, {"data": ["tea", "tea", None]}, {"data": ["tea", {}, None]},
        {"fn_index": 0}, {"fn_index": 2}, {"fn_index": []}, {"fn_index": None},
        {"session_hash": "a b"}, {"session_hash": None}, {"trigger_id": "x"}, {"trigger_id": True},
    ],
)  # fmt: skip
def test_what_no_page_sends_is_refused(client: TestClient, change: dict[str, Any]) -> None:
    assert joined(client, "tea", None, None, **change) == 422


def test_bodies_that_are_no_click_are_refused(client: TestClient) -> None:
    for body in (b"", b"x", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"fn_index":' + b"9" * 5000):
        assert client.post(JOIN, content=body).status_code == 422


def test_bodies_have_a_limit(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(10):
            yield bytes(BODY_BYTES // 8)

    for path in (JOIN, RUN, UPLOAD):
        assert client.post(path, content=chunks()).status_code == 413
        assert client.post(path, content=bytes(BODY_BYTES + 10_000)).status_code == 413


def test_slow_body_is_answered_before_its_connection_ends() -> None:
    assert listening._PATIENCE_S["body"] > guard._BODY_S


def test_upload_is_kept_under_a_name_that_is_no_path(client: TestClient, uploads: Uploads) -> None:
    sent = {"files": ("../../a b.csv", b"text\nplum\n")}
    (key,) = client.post(UPLOAD, files=sent).json()
    file = uploads.path(key)
    assert file is not None
    assert file.name == "_.._a_b.csv"
    assert file.read_bytes() == b"text\nplum\n"
    for other in (str(file), f"./{key}", f"{key}/", key.upper() + "x", "", "..", f"{key}\0"):
        assert uploads.path(other) is None


def test_newest_files_are_kept(uploads: Uploads) -> None:
    keys = [uploads.keep("a.txt", b"x") for _ in range(20)]
    kept = [file for key in keys if (file := uploads.path(key)) is not None]
    assert len(kept) == 16
    assert all(file.exists() for file in kept)
    assert uploads.path(keys[-1]) == kept[-1]
    assert len(list(kept[0].parents[1].iterdir())) == 16


@pytest.mark.parametrize("name", ["", ".", "..", "/", "\0", "é" * 300, "\ud800", "a\r\nb"])
def test_any_name_makes_a_file(uploads: Uploads, name: str) -> None:
    file = uploads.path(uploads.keep(name, b"x"))
    assert file is not None
    assert file.is_file()
    assert file == file.resolve()
