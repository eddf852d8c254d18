from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from qwen3_reranker import InputError
from qwen3_reranker.web.hosts import AllowedHosts, host_name


def _refuse(message: str) -> Response:
    return PlainTextResponse(message, 421)


def client(**settings: object) -> TestClient:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))])
    guarded = AllowedHosts(app, refuse=_refuse, **settings)  # type: ignore[arg-type]
    return TestClient(guarded, base_url="http://127.0.0.1:8012")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:80", "localhost."]
)
def test_loopback_names_are_answered(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "evil.example#localhost",
     "", "localhost:x", "127.0.0.1/..", "localhost, evil.example", "[::1", "2130706433"],
)  # fmt: skip
def test_other_names_are_refused(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 421


def test_names_can_be_added() -> None:
    added = client(names=["Rerank.Example"])
    assert added.get("/", headers={"Host": "rerank.example:80"}).status_code == 200
    assert added.get("/", headers={"Host": "other.example"}).status_code == 421


def test_port_of_an_added_name_is_passed_over() -> None:
    added = client(names=["rerank.example:8012", " [fe80::1] "])
    for host in ("rerank.example", "rerank.example:80", "[fe80::1]:8012"):
        assert added.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("name", ["https://rerank.example", "*.example", "*", "", "a/b", "a@b"])
def test_name_that_no_request_carries_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(InputError, match="an allowed host must be a name"):
        client(names=[name])


def test_two_hosts_are_refused() -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert client().get("/", headers=headers).status_code == 421


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://127.0.0.1:8012", 200), ("http://localhost:8012", 421), ("null", 421),
     ("http://evil.example", 421), ("http://127.0.0.1:8013", 421), ("https://127.0.0.1:8012", 200),
     ("http://[", 421), ("http://[x]", 421), ("127.0.0.1:8012", 421)],
)  # fmt: skip
def test_pages_of_other_sites_are_refused_where_asked_for(origin: str, status: int) -> None:
    own = client(only_own_pages=True)
    assert own.get("/", headers={"Origin": origin}).status_code == status
    assert client().get("/", headers={"Origin": origin}).status_code == 200


def test_host_name_of_a_header_that_is_none() -> None:
    assert host_name("a/b") == host_name("user@localhost") == host_name("[::1") == ""
