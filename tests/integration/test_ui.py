"""The web page: over its own interface, and in a browser."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_reranker import RemoteReranker, Reranker
from qwen3_reranker.cli.main import main
from qwen3_reranker.data.documents import split_documents
from qwen3_reranker.ui import app, page
from tests import fakes
from tests.servers import ROOT, Server, serving, web_page

RERANK = 2  # after the two that fill in examples
QUERY = "How does bread rise?"
DOCUMENTS = ["Yeast gives off gas.", "Tea is a drink.", "Rain falls.", "Bread is baked."]
HOSTILE = "<script>document.title='ran'</script>${document.title='ran'} {{value}} `</li>"
NODE_MODULES = Path(os.environ.get("NODE_PATH", ROOT / ".venv/ui/node_modules"))
CONNECTION = "CONNECTION "
AUDITED = f"""
import socket, sys

def audit(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        print("{CONNECTION}" + str(arguments[1][0]), flush=True)
    elif event == "socket.getaddrinfo":
        print("{CONNECTION}" + str(arguments[0]), flush=True)

sys.addaudithook(audit)
socket.getaddrinfo("localhost", 80)  # shows that the hook works
from qwen3_reranker.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def served(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        command = (sys.executable, "-c", AUDITED)
        with web_page(str(checkpoint()), "--dtype", "float32", command=command) as served:
            yield served


def ask(url: str, documents: str, file: Path | None = None, query: str = QUERY) -> str:
    """Return what the page shows, by the calls that its own script makes."""
    upload, session = None, secrets.token_hex(5)
    if file is not None:
        sent = {"files": (file.name, file.read_bytes())}
        (path,) = httpx.post(f"{url}/gradio_api/upload", files=sent).json()
        upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    click = {
        "data": [query, "", documents, upload, None],
        "fn_index": RERANK,
        "session_hash": session,
    }
    httpx.post(f"{url}/gradio_api/queue/join", json=click).raise_for_status()
    stream = httpx.get(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60).text
    messages = [json.loads(line) for line in re.findall(r"^data: (.*)$", stream, re.MULTILINE)]
    (done,) = (message for message in messages if message["msg"] == "process_completed")
    (html,) = done["output"]["data"]
    assert isinstance(html, str)
    return html


def shown(html: str) -> list[str]:
    """Return the texts of a ranking, in order."""
    found = re.findall(r'<div class="text".*?>(.*?)</div>', html, re.DOTALL)
    return [unescape(re.sub(r"<[^>]*>", "", text)) for text in found]


def test_page_ranks_as_the_core_does(served: Server, checkpoint: Callable[..., Path]) -> None:
    html = ask(served.url, "\n".join(DOCUMENTS))
    core = Reranker.shared(str(checkpoint()), dtype="float32")
    assert shown(html) == [result.document for result in core.rank(QUERY, DOCUMENTS)]
    assert re.search(r"4 documents in \d+\.\d\d s · \d+ tokens", html)


def test_page_shows_markup_as_text(served: Server) -> None:
    assert shown(ask(served.url, HOSTILE)) == [HOSTILE]


def test_file_is_ranked_in_the_place_of_what_is_typed(served: Server, tmp_path: Path) -> None:
    file = tmp_path / "file.csv"
    file.write_text("text\nplum\n")
    assert shown(ask(served.url, "\n".join(DOCUMENTS), file)) == ["plum"]


def test_faults_are_told_on_the_page(served: Server, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": 1}\n')
    html = ask(served.url, "", file)
    assert ">bad.jsonl has 1 fault" in html  # and no folder before it
    assert "must have a string &#x27;text&#x27;" in html
    assert "there are no documents" in ask(served.url, "\n")
    assert "query is blank" in ask(served.url, "tea", query=" ")


def test_page_connects_to_nothing_and_logs_no_text(served: Server, tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("secret tea")
    assert shown(ask(served.url, "", file, query="secret query")) == ["secret tea"]
    log = served.log()
    assert set(re.findall(f"{CONNECTION}(.*)", log)) - {"127.0.0.1"} == {"localhost"}
    assert "secret" not in log
    assert "127.0.0.1" in served.url


@pytest.fixture
def reranker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reranker]:
    with fakes.loaded(monkeypatch, fakes.FakeModel()):
        yield Reranker("fake")


def test_failure_that_is_not_ours_is_named_alone(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyError("secret text")

    monkeypatch.setattr(Reranker, "rank", fail)
    html = app.rerank(reranker, QUERY, "", "tea", None)
    assert "failed with KeyError" in html
    assert "failed with KeyError" in caplog.text
    assert "secret" not in html + caplog.text


def test_instruction_is_passed_on_unless_it_is_blank(reranker: Reranker) -> None:
    seen = []

    class Recording(Reranker):
        def rank(self, *arguments: Any, **options: Any) -> Any:
            seen.append(options["instruction"])
            return super().rank(*arguments, **options)

    for instruction in ("", " \n", "Find law "):
        app.rerank(Recording("fake"), QUERY, instruction, "tea", None)
    assert seen == [None, None, "Find law"]


@pytest.mark.slow
def test_command_takes_a_server_and_leaves_no_file(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    file = tmp_path / "secret.txt"
    file.write_text("secret tea\nsecret coffee\n")
    with serving(checkpoint()) as server, web_page("--url", server.url) as served:
        html = ask(served.url, "", file)
        with RemoteReranker(server.url) as remote:
            texts = file.read_text().splitlines()
            assert shown(html) == [r.document for r in remote.rank(QUERY, texts)]
        assert "tokens" not in html  # a server's are not ours to count
        assert list(tmp_path.rglob("*/secret.txt"))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 130
        assert not list(tmp_path.rglob("*/secret.txt"))


@pytest.mark.slow
def test_examples_suit_the_embedded_model() -> None:
    relevant = ["On a plane that climbs", "To choose a good key for", "In many countries", "def "]
    with Reranker.embedded() as reranker:
        for expected, example in zip(relevant, page.examples().values(), strict=True):
            query, instruction, documents = example
            html = app.rerank(reranker, query, instruction, documents, None)
            assert shown(html)[0].startswith(expected)
            assert sorted(shown(html)) == sorted(split_documents(documents))


@pytest.mark.slow
def test_page_in_a_browser(tmp_path: Path) -> None:
    """Drive Chromium through the page; UI_SCREENSHOT names a file for a picture of it."""
    chromium, node = shutil.which("chromium"), shutil.which("node")
    if chromium is None or node is None or not (NODE_MODULES / "playwright-core").is_dir():
        pytest.skip("needs chromium, node and playwright-core; make ui installs the last")
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    screenshot = os.environ.get("UI_SCREENSHOT", str(tmp_path / "ui.png"))
    with web_page("embedded", "--dtype", "float32") as served:
        done = subprocess.run(
            [node, ROOT / "tests/integration/browser.cjs", chromium, served.url, tmp_path, HOSTILE],
            env={**os.environ, "NODE_PATH": str(NODE_MODULES), "UI_SCREENSHOT": screenshot},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["texts"][0].startswith("On a plane that climbs")
    assert len(seen["texts"]) == 5
    assert seen["moves"][0] == "was 5 ▲4"
    assert seen["bars"] == sorted(seen["bars"], reverse=True)
    assert seen["csv"].startswith("\ufeffrank,was,score,log_odds,truncated,text\r\n1,5,0.9")
    assert seen["hostile"] == [HOSTILE]
    assert seen["title"] == "qwen3-reranker"
    assert "bad.jsonl has 1 fault" in seen["fault"]
    assert seen["labels"] == ["Query", "Instruction", "Documents"]
    assert seen["errors"] == []
    assert seen["asked"] == [f"{served.url}/"]
    assert seen["links"] == []
    for width, widest in seen["widths"]:
        assert widest <= width


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["served", "--port", "70000"], "port must be between 0 and 65535, got 70000"),
        (["--url", "localhost:8012"], "url must be an http or https address"),
        (["model", "--adapter", "a", "--url", "http://h"], "Leave out model and adapter."),
        (
            ["--url", "http://h", "--calibration", "c", "--max-length", "9"],
            "Leave out max_length and calibration.",
        ),
    ],
)
def test_command_refuses_bad_arguments_without_a_model(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fragment: str,
) -> None:
    fakes.forbid_loading(monkeypatch)
    assert main(["ui", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert fragment in err


def test_command_without_gradio_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "qwen3_reranker.ui.app")
    monkeypatch.delattr("qwen3_reranker.ui.app")
    assert main(["ui"]) == 2
    assert 'needs gradio, which is not installed. Run: pip install "qwen3-reranker[ui]"' in (
        capsys.readouterr().err
    )


def test_command_passes_on_the_names_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(app, "serve", lambda *arguments, **options: seen.update(options))
    names = ["--allowed-host", "page.lan", "--allowed-host", "other.lan"]
    assert main(["ui", "--url", "http://127.0.0.1:1", *names]) == 0
    assert seen["allowed_hosts"] == ["page.lan", "other.lan"]
    assert main(["ui", "--url", "http://127.0.0.1:1"]) == 0
    assert seen["allowed_hosts"] == []
