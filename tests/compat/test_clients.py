"""Other people's clients on our server, and our client on another's: real parts on both sides.

`make compat` installs them into an environment of their own and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import httpx
import pytest

from finetune.gguf_export import FILE, write_gguf
from finetune.whole import load_whole
from qwen3_reranker import InputError, RemoteError, RemoteProtocolError, RemoteReranker, Reranker
from tests.compat import clients
from tests.invariants import check_ranking
from tests.servers import COMPAT_PYTHON, Server, llama_cpp, serving

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not COMPAT_PYTHON.exists(), reason="the clients are not installed: `make compat` does it"
    ),
]


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, api_key=clients.KEY) as server:
        yield server


@pytest.mark.parametrize("name", list(clients.CLIENTS))
def test_client_gets_the_cores_ranking(name: str, folder: Path, server: Server) -> None:
    done = subprocess.run(
        [str(COMPAT_PYTHON), str(ROOT / "tests/compat/clients.py"), name, server.url],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]
    ranking = Reranker.shared(str(folder)).rank(clients.QUERY, clients.DOCUMENTS)
    assert [index for index, _ in found] == [result.index for result in ranking]
    assert [score for _, score in found] == pytest.approx([r.score for r in ranking], abs=1e-6)


def test_schemathesis_finds_no_server_error(server: Server) -> None:
    """Requests drawn from the OpenAPI description, right ones and wrong ones."""
    done = subprocess.run(
        [str(COMPAT_PYTHON.parent / "schemathesis"), "run", f"{server.url}/openapi.json",
         "--url", server.url, "-H", f"Authorization: Bearer {clients.KEY}",
         "--checks", "not_a_server_error", "--max-examples", "200", "--seed", "1",
         "--suppress-health-check", "all", "--no-color"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    target = tmp_path_factory.mktemp("gguf")
    write_gguf(load_whole(str(folder), None), target)
    with llama_cpp(target / FILE, clients.KEY) as url:
        yield url


class TestLlamaCpp:
    """Our client on real llama.cpp."""

    TOLERANCE = 1e-5

    @pytest.mark.parametrize("path", ["", "/rerank", "/v1/rerank"])
    def test_scores_are_those_in_process(self, url: str, path: str, folder: Path) -> None:
        with RemoteReranker(url + path, api_key=clients.KEY) as reranker:
            ranking = reranker.rank(clients.QUERY, clients.DOCUMENTS)
        check_ranking(ranking, clients.DOCUMENTS)
        core = Reranker.shared(str(folder)).rank(clients.QUERY, clients.DOCUMENTS)
        assert [r.index for r in ranking] == [r.index for r in core]
        scores = [r.score for r in ranking]
        assert scores == pytest.approx([r.score for r in core], abs=self.TOLERANCE)

    def test_scores_in_teis_shape_are_the_same(self, url: str, folder: Path) -> None:
        from qwen3_reranker.call.results import probability
        from qwen3_reranker.client.servers import read_scores

        body = {"query": clients.QUERY, "texts": clients.DOCUMENTS}
        headers = {"Authorization": f"Bearer {clients.KEY}"}
        answer = httpx.post(f"{url}/rerank", json=body, headers=headers).json()
        assert isinstance(answer, list)
        scores = [probability(s.log_odds) for s in read_scores(answer, len(clients.DOCUMENTS))]
        core = Reranker.shared(str(folder)).score(clients.QUERY, clients.DOCUMENTS)
        assert scores == pytest.approx(core, abs=self.TOLERANCE)

    def test_wrong_key_and_unread_instruction_are_errors(self, url: str) -> None:
        reranker = RemoteReranker(url, api_key="wrong")
        with pytest.raises(RemoteError, match="status 401"):
            reranker.rank(clients.QUERY, clients.DOCUMENTS)
        reranker = RemoteReranker(url, api_key=clients.KEY)
        with pytest.raises(InputError, match="does not read instructions"):
            reranker.rank(clients.QUERY, clients.DOCUMENTS, instruction="Find planets")

    def test_file_without_template_is_noticed(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", lambda *_: None)
        write_gguf(load_whole(str(folder), None), tmp_path)
        with llama_cpp(tmp_path / FILE) as url:
            reranker = RemoteReranker(url)
            with pytest.raises(RemoteProtocolError, match="applies no prompt template"):
                reranker.rank(clients.QUERY, clients.DOCUMENTS)
