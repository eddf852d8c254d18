"""The web page, asked by others than its own script."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import logging
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from qwen3_reranker import Reranker
from qwen3_reranker.ui import app as ui
from qwen3_reranker.ui import guard
from tests import fakes
from tests.attacks.limits import bounded

pytestmark = [
    pytest.mark.attack,
    # Gradio's own, in its threads; this project's settings of pytest make them errors.
    pytest.mark.filterwarnings("ignore"),
]

SECRET = "the secret of this machine"  # noqa: S105
RERANK, EXAMPLE = 2, 1
JOIN, RUN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/upload"
Click = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where uploads are kept."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[FastAPI]:
    with pytest.MonkeyPatch.context() as patch, fakes.loaded(patch, fakes.FakeModel()):
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield ui.create_app(Reranker("fake"), "fake", folder)
    gc.collect()  # the event loops that Gradio leaves open, while their warnings are ignored


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[httpx.Client]:
    """Return a client of the page, served on loopback."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    server.should_exit = True
    thread.join(20)


@pytest.fixture(autouse=True)
def _nothing_is_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """Fail if a text of a request is in the log; Gradio prints what fails."""
    for name in ("httpx", "httpx2"):  # the client's; starlette's has either
        caplog.set_level(logging.WARNING, name)
    caplog.set_level(logging.WARNING, "uvicorn.access")  # `ui.serve` has none
    with caplog.at_level(logging.INFO):
        yield
    out, err = capfd.readouterr()
    for log in (caplog.text, out, err):
        assert "secret" not in log
        assert "input_value" not in log
        assert "Traceback" not in log


def click(*values: Any, fn_index: Any = RERANK, **other: Any) -> dict[str, Any]:
    """Return what the page sends."""
    session = secrets.token_hex(5)
    return {"data": list(values), "fn_index": fn_index, "session_hash": session, **other}


def file_data(path: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def shown(client: httpx.Client, sent: dict[str, Any]) -> str:
    """Return all that the page answers to a click, and the CSV in it."""
    joined = client.post(JOIN, content=json.dumps(sent).encode())
    if joined.status_code != 200:
        return joined.text
    answer = client.get(f"/gradio_api/queue/data?session_hash={sent['session_hash']}").text
    files = re.findall(r"base64,([A-Za-z0-9+/=]*)", answer)
    return answer + "".join(base64.b64decode(file).decode() for file in files)


def upload(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.post(UPLOAD, files={"files": (name, content)})


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def files_kept(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_page_works(client: httpx.Client) -> None:
    """Without it, all that follows could pass on a page that answers nothing."""
    (key,) = upload(client, "own.csv", b"text\nplum\n").json()
    assert "plum" in shown(client, click("fruit", "", "", file_data(key), None))
    assert "green pear" in shown(client, click("fruit", "", "green pear", None, None))
    assert client.post(RUN, json=click(0, fn_index=EXAMPLE)).status_code == 200


def test_no_file_of_this_machine_is_read(
    client: httpx.Client, folder: Path, tmp_path: Path, tried: Callable[[int], None]
) -> None:
    secret, link = tmp_path / "secret.txt", tmp_path / "link.txt"
    secret.write_text(SECRET)
    link.symlink_to(secret)
    (key,) = upload(client, "own.txt", SECRET.encode()).json()
    (kept,) = (file for file in files_kept(folder) if file.parent.name == key)
    up = "../" * 12
    paths = [
        str(secret), str(link), f"/proc/self/root{secret}", f"{up}{secret}",
        f"{tmp_path}/./secret.txt",
        f"/{secret}", f"file://{secret}", f"{secret}\0", f"{secret}\0.txt", f"{key}/{up}{secret}",
        f"{kept.parent}/../..{secret}", f"{kept}/{up}{secret}", str(kept), str(kept.parent),
        kept.name, f"{key}/", f"/{key}", f"./{key}", f"{key}\0", f" {key}", key[:-1],
        f"{key}/{kept.name}", str(secret).replace("/", "\\"), str(secret).replace("/", "%2f"),
        str(secret).upper(), f"~{secret}", f"http://127.0.0.1:{client.base_url.port}/",
        "/proc/self/environ", "/proc/self/fd/0", "/dev/zero", "/etc/passwd", ".", "..", "/",
        "nul", "x" * 10_000, "\ud800", "\u202e", "${HOME}", "*", str(Path(ui.__file__)),
    ]  # fmt: skip
    with bounded(seconds=30, megabytes=100):
        for path in paths:
            for sent in (
                click("q", "", "", file_data(path), None),
                click("q", "", "", {**file_data(path), "url": str(secret), "is_stream": True}, ""),
            ):
                answer = shown(client, sent)
                assert "the file is not here" in answer, repr(path)
                assert SECRET not in answer
            # What is put after the file is the guard's to say.
            assert "there are no documents" in shown(client, click("q", "", "", None, path))
            for position in range(3):
                values: list[Any] = ["q", "", "tea", None, None]
                values[position] = file_data(path)
                assert "not what the page sends" in shown(client, click(*values))
    tried(6 * len(paths))


def test_gradio_itself_reads_no_file_that_is_no_upload(app: FastAPI, tmp_path: Path) -> None:
    """The second line, should a path come past the guard."""
    secret = tmp_path.parent / f"{secrets.token_hex(4)}.txt"
    secret.write_text(SECRET)
    (gradio_app,) = [route.app for route in app.routes if hasattr(route, "app")]
    assert gradio_app.get_blocks().has_launched
    from gradio import processing_utils
    from gradio.context import LocalContext

    LocalContext.blocks.set(gradio_app.get_blocks())
    with pytest.raises(Exception, match="not uploaded"):
        processing_utils.move_files_to_cache(
            file_data(str(secret)), gr.File(), check_in_upload_folder=True
        )


def routes_of_gradio(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Return method and path of all that Gradio would answer, with values put in."""

    def walk(routes: list[Any]) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(
                getattr(route, "original_router", None), "routes", None
            )
            if inner:
                prefix = getattr(getattr(route, "include_context", None), "prefix", "")
                yield from ((method, f"{prefix}{path}") for method, path in walk(list(inner)))
            elif hasattr(route, "path"):
                path = re.sub(r"\{[^}]*\}", "etc/passwd", route.path)
                yield from ((method, path) for method in getattr(route, "methods", None) or {"GET"})

    yield from walk(list(app.routes))


ALLOWED = {
    ("GET", "/"), ("GET", "/theme.css"), ("GET", "/favicon.ico"), ("GET", "/gradio_api/queue/data"),
    ("GET", "/gradio_api/upload_progress"), ("POST", UPLOAD), ("POST", JOIN), ("POST", RUN),
}  # fmt: skip


def test_only_what_the_page_calls_is_there(
    client: httpx.Client, app: FastAPI, tried: Callable[[int], None]
) -> None:
    routes = set(routes_of_gradio(app)) - ALLOWED
    assert len(routes) > 60
    assert any("/file=" in path for _, path in routes)
    paths = {path for _, path in routes} | {
        "/gradio_api/file=/etc/passwd", "/gradio_api/file%3D/etc/passwd",
        "/gradio_api//file=/etc/passwd",
        "//gradio_api/file=/etc/passwd", "/GRADIO_API/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/run/rerank", "/gradio_api/api/rerank", "/gradio_api/call/rerank",
        "/call/rerank",
        "/gradio_api/queue/join/", "/gradio_api/queue/data/", "/queue/join", "/upload",
        "/run/predict",
        "/config", "/config/", "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json",
        "/docs",
        "/monitoring", "/gradio_api/mcp/sse", "/gradio_api/mcp/http", "/gradio_api/heartbeat/a",
        "/gradio_api/vibe-code", "/gradio_api/deep_link", "/gradio_api/stream/a",
        "/gradio_api/app_id",
        "/static/img/logo.svg", "/static/../../../etc/passwd", "/assets/../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2fetc%2fpasswd", "/assets/", "/assets//etc/passwd",
        "/assets/%00", "/svelte/svelte.js", "/theme.css/", "/favicon.ico\0", "/..;/", "/%0a",
        "/\u0660",
    }  # fmt: skip
    methods = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")
    asked = {(m, p) for p in paths for m in methods} | {(m, p) for _, p in ALLOWED for m in methods}
    asked -= ALLOWED
    plain = TestClient(app, base_url="http://localhost")
    with bounded(seconds=60, megabytes=100):
        for method, path in sorted(asked):
            # As it stands in the request, which clients would normalise.
            scope_path = path if "%" in path else path.replace("\0", "%00")
            answer = plain.request(method, "http://localhost" + scope_path.replace("//", "/%2f"))
            assert answer.status_code == 404, (method, path, answer.status_code)
            assert b"root:" not in answer.content
    tried(len(asked))


def test_query_of_the_page_loads_nothing(client: httpx.Client) -> None:
    usual = client.get("/").text
    for query in ("deep_link=../../etc", "deep_link=x", "view=api", "__theme=x", "a" * 5000):
        assert client.get(f"/?{query}").text == usual


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "127.0.0.1.evil.example", "localhost.evil.example",
        "localhost@evil.example",
        "evil.example#localhost", "evil.example:7860", "0", "2130706433", "localhost:x", "",
        "localhost,evil.example", "[::2]",
    ],
)  # fmt: skip
def test_foreign_hosts_get_nothing(client: httpx.Client, host: str) -> None:
    for method, path in sorted(ALLOWED):
        answer = client.request(method, path, headers={"Host": host})
        assert answer.status_code in (400, 403)  # 400 is the parser's


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "http://localhost:1", "http://127.0.0.1", "x"]
)
def test_pages_of_other_sites_get_nothing(client: httpx.Client, origin: str) -> None:
    for method, path in sorted(ALLOWED):
        assert client.request(method, path, headers={"Origin": origin}).status_code == 403


def test_own_pages_and_given_names_are_answered(client: httpx.Client, tmp_path: Path) -> None:
    own = {"Origin": str(client.base_url).rstrip("/")}
    assert client.get("/", headers=own).status_code == 200
    app = ui.create_app(Reranker("fake"), "fake", tmp_path, allowed_hosts=["page.lan"])
    named = TestClient(app)
    host = {"Host": "page.lan:7860", "Origin": "http://page.lan:7860"}
    assert named.get("/", headers=host).status_code == 200
    assert named.get("/", headers={"Host": "other.lan"}).status_code == 403


def test_websockets_are_closed(app: FastAPI) -> None:
    for path in ("/", "/gradio_api/queue/join", "/queue/join"):
        plain = TestClient(app, base_url="ws://localhost")
        with pytest.raises(WebSocketDisconnect), plain.websocket_connect(path):
            pass


VALUES = [
    None, True, False, 0, -1, 1.5, 10**30, SECRET, "", [], [SECRET], {}, {"a": SECRET}, {"path": 1},
    {"path": None}, {"path": [SECRET]}, {"path": {"path": SECRET}}, [[SECRET]], float("nan"),
    {"meta": {"_type": "gradio.FileData"}}, {"__type__": "update", "value": SECRET},
]  # fmt: skip


def test_what_the_page_does_not_send_is_refused(
    client: httpx.Client, tried: Callable[[int], None]
) -> None:
    bodies: list[Any] = [*VALUES, [click("q", "", "tea", None, None)]]
    for key in ("data", "fn_index", "session_hash", "trigger_id"):
        for value in VALUES:
            if (key, value) not in (("trigger_id", None), ("trigger_id", 0), ("trigger_id", -1)):
                bodies.append({**click("q", "", "tea", None, None), key: value})
    bodies = [b for b in bodies if not (isinstance(b, dict) and b.get("trigger_id") == 10**30)]
    for position in range(5):
        for value in VALUES:
            if value is not None and not (isinstance(value, str) and position != 3):
                values: list[Any] = ["q", "", "tea", None, None]
                values[position] = value
                bodies.append(click(*values))
    bodies += [click(SECRET), click(*[SECRET] * 6), click(), click(0), click(SECRET, fn_index=0)]
    bodies += [click(value, fn_index=EXAMPLE) for value in (4, 99, -1, True, "0", None, 0.0)]
    generator = random.Random(0)
    text = json.dumps(click(SECRET, "", SECRET, None, None))
    broken = []
    for _ in range(300):
        cut = sorted(generator.sample(range(len(text)), 2))
        broken.append(
            text[: cut[0]] + generator.choice(["", '"', "}", "[", "\x00"]) + text[cut[1] :]
        )
    with bounded(seconds=60, megabytes=100):
        for path in (JOIN, RUN):
            for body in bodies:
                content = json.dumps(body).encode()
                answer = client.post(path, content=content)
                assert answer.status_code == 422, (path, body)
                assert "secret" not in answer.text
            for body in broken:
                try:
                    sent = json.loads(body)
                    is_click = {"data", "fn_index", "session_hash"} <= set(sent)
                except ValueError:
                    is_click = False
                if not is_click:
                    assert client.post(path, content=body.encode()).status_code == 422
    tried(2 * (len(bodies) + len(broken)))


@pytest.mark.parametrize("opening", [b"[", b'{"data":', b"[{}"])
def test_deep_and_wide_bodies_end_soon(client: httpx.Client, opening: bytes) -> None:
    body = opening * (guard.BODY_BYTES // len(opening) - 1)
    with bounded(seconds=20, megabytes=1000):
        assert client.post(JOIN, content=body).status_code == 422
    wide = b'{"data":[' + b"{}," * 2_500_000 + b"{}]}"
    with bounded(seconds=20, megabytes=1000):
        assert client.post(JOIN, content=wide).status_code == 422


@pytest.mark.parametrize("path", [JOIN, RUN, UPLOAD])
def test_endless_bodies_are_cut(client: httpx.Client, path: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(1_000_000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    # It may hang up while more is on its way.
    with bounded(seconds=20, megabytes=100), contextlib.suppress(httpx.WriteError):
        assert client.post(path, content=endless(), headers=headers).status_code == 413
    # As declared: nothing is read.
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**15}\r\n\r\n"
    with bounded(seconds=5, megabytes=50), connected(client) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)


def test_hostile_uploads_stay_in_their_folder(
    client: httpx.Client, folder: Path, tmp_path: Path, tried: Callable[[int], None]
) -> None:
    names = [
        "../../../../tmp/secret", "/etc/secret", "..", ".", "", ".bashrc", "a\0b.csv", "x" * 5000,
        "\u202ecsv.exe", "a/b/c.csv", "a\\..\\b.csv", "é" * 300, "🍞" * 200 + ".csv", "con", "-rf",
        "a\r\nX: y.txt", "%2e%2e%2fsecret", " ", "~", "$(id)", "`id`.csv",
    ]  # fmt: skip
    with bounded(seconds=20, megabytes=100):
        for name in names:
            answer = upload(client, name, b"text\nplum\n")
            assert answer.status_code in (200, 400), repr(name)
            for key in answer.json() if answer.status_code == 200 else []:
                assert re.fullmatch("[0-9a-f]{32}", key)
                (file,) = (file for file in files_kept(folder) if file.parent.name == key)
                assert file.resolve() == file
                assert len(file.name.encode()) < 255
                assert "plum" in shown(client, click("q", "", "", file_data(key), None))
    tried(len(names))


def test_uploads_do_not_fill_the_disk(client: httpx.Client, folder: Path) -> None:
    with bounded(seconds=60, megabytes=200):
        keys = [upload(client, f"{i}.txt", bytes(1_000_000)).json()[0] for i in range(40)]
    assert len(files_kept(folder)) == 16
    gone = shown(client, click("q", "", "", file_data(keys[0]), None))
    assert "newer ones have taken its place" in gone


def test_bad_uploads_are_refused(client: httpx.Client, tried: Callable[[int], None]) -> None:
    kind = "multipart/form-data; boundary=x"
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="secret"\r\n\r\na\r\n'
    bodies = [
        (kind, b""), (kind, b"--x--"), (kind, b"secret"), ("multipart/form-data", part + b"--x--"),
        ("application/json", b'["secret"]'), ("", b"secret"), (kind, part * 2 + b"--x--"),
        (kind, part.replace(b"files", b"other") + b"--x--"), (kind, b"\r\n--" * 2_000_000),
        (kind, part + b"\r\n--" * 1_900_000), (kind, part + b"\r" * 7_900_000),
        (kind, b"--x\r\n" + b"A: b\r\n" * 1_000_000), ("application/x-www-form-urlencoded",
        b"&" * 7_900_000),
        (kind, b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nsecret\r\n--x--'),
        (kind,
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + b"a" * 7_000_000),
    ]  # fmt: skip
    for content_type, body in bodies:
        with bounded(seconds=20, megabytes=300):
            answer = client.post(UPLOAD, content=body, headers={"Content-Type": content_type})
            assert answer.status_code == 400, (content_type, body[:80], answer.status_code)
    tried(len(bodies))


def test_files_that_are_no_documents_are_told_as_errors(client: httpx.Client) -> None:
    files = {
        "a.jsonl": b'{"text": 1}\n', "a.csv": b"other\nx\n", "a.gz": b"no gzip", "a.xz": b"no xz",
        "a.txt": b"\xff\xfe\xfa", "b.jsonl": b"[" * 100_000, "b.csv": b'text\n"open', "c.txt": b"",
    }  # fmt: skip
    for name, content in files.items():
        (key,) = upload(client, name, content).json()
        answer = shown(client, click("q", "", "", file_data(key), None))
        assert 'role=\\"alert\\"' in answer, name
        assert "the ranking failed" not in answer, name
        assert key not in answer  # and no folder


def test_other_sessions_read_nothing(client: httpx.Client) -> None:
    sent = click("q", "", "the tea of one session", None, None)
    assert client.post(JOIN, json=sent).status_code == 200
    hashes = ["x", sent["session_hash"][:-1], sent["session_hash"].upper() + "0", "*", "", "../x"]
    for other in hashes:
        answer = client.get("/gradio_api/queue/data", params={"session_hash": other})
        assert "tea" not in answer.text
    twice = f"/gradio_api/queue/data?session_hash=a&session_hash={sent['session_hash']}"
    assert client.get(twice).status_code == 404
    assert "tea" in client.get(f"/gradio_api/queue/data?session_hash={sent['session_hash']}").text


def test_many_sessions_leave_little(client: httpx.Client, app: FastAPI) -> None:
    (gradio_app,) = [route.app for route in app.routes if hasattr(route, "app")]
    text = "tea " * 250_000
    with bounded(seconds=120, megabytes=400):
        for _ in range(100):
            status = client.post(RUN, json=click(0, fn_index=EXAMPLE)).status_code
            assert status == 200
            assert client.post(JOIN, json=click(" ", "", text, None, None)).status_code in (
                200,
                503,
            )
    assert len(gradio_app.state_holder.session_data) <= 33


def test_crowd_of_slow_bodies_leaves_the_page_open(client: httpx.Client) -> None:
    head = f"POST {JOIN} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode()
    slow = [connected(client) for _ in range(50)]
    try:
        with bounded(seconds=20, megabytes=50):
            for connection in slow:
                connection.sendall(head)
            time.sleep(0.5)
            assert client.get("/").status_code == 200
            assert client.post(JOIN, json=click("q", "", "a", None, None)).status_code == 503
    finally:
        for connection in slow:
            connection.close()
    end = time.monotonic() + 10
    while "plum" not in shown(client, click("q", "", "plum", None, None)):
        assert time.monotonic() < end
