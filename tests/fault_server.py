"""A rerank server on a loopback port that does what a script says, one step per request.

Scores are those of a `contract_model.Model`. A step is the name of a fault below, or "ok"; when the
script is at its end every request is "ok". The question with which clients begin is answered apart
and not recorded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .contract_model import Model

PROMPT_TOKENS = 74
"""Of one short query and document with the template of Qwen3-Reranker."""


class FaultServer(ThreadingHTTPServer):
    """Serves `/v1/rerank`, or only TEI's `/rerank`.

    Attributes:
        model: Scores the texts.
        script: What the next requests meet.
        requests: (headers, body) of each request but the first question.
        questions: Bodies of the first questions.
        connections: Connections accepted.
        is_tei: True for TEI's shape.
        has_template: False to report as few tokens as a server without the template.
        reads_instruction: True to report the tokens of instructions.
        longest: Words of an instruction; longer ones are refused.
        delay_s: Seconds before each answer.
        headers: Sent with each answer but the first question's.
        content: Sent by the step of this name.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.model: Callable[[str, list[str]], list[float]] = Model()
        self.script: list[str] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.questions: list[dict[str, Any]] = []
        self.connections = 0
        self.is_tei, self.has_template, self.reads_instruction = False, True, True
        self.longest, self.delay_s = 1000, 0.0
        self.headers: dict[str, str] = {}
        self.content = b""
        self.lock = threading.Lock()
        self.is_over = threading.Event()

    def rows(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the results for a body."""
        texts = body["texts" if self.is_tei else "documents"]
        scores = self.model(body["query"], texts)
        name = "score" if self.is_tei else "relevance_score"
        rows = [{"index": i, name: float(score)} for i, score in enumerate(scores)]
        return sorted(rows, key=lambda row: -row[name])

    def answer(self, rows: list[dict[str, Any]], instruction: str | None = None) -> Any:
        """Return an answer in the server's shape."""
        if self.is_tei:
            return rows
        tokens = PROMPT_TOKENS if self.has_template else 2
        if instruction is not None and self.reads_instruction:
            tokens += len(instruction.split())
        return {"results": rows, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


@contextmanager
def fault_server() -> Iterator[FaultServer]:
    """Run a server in a thread."""
    with FaultServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.is_over.set()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, *args: Any) -> None:
        """Stay silent."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != ("/rerank" if server.is_tei else "/v1/rerank"):
            self._send(404, {"error": "no such path"})
        elif server.is_tei and "texts" not in body:
            self._send(422, {"error": "missing field texts", "error_type": "Validation"})
        elif len(body.get("instruction", "").split()) > server.longest:
            self._send(400, {"error": "instruction and query take too many tokens"})
        elif (body["query"], body.get("documents", body.get("texts"))) == ("a", ["b"]):
            server.questions.append(body)
            name = "score" if server.is_tei else "relevance_score"
            self._send(200, server.answer([{"index": 0, name: 0.5}], body.get("instruction")))
        else:
            self._work(body)

    def _work(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.requests.append((dict(self.headers), body))
            step = server.script.pop(0) if server.script else "ok"
        time.sleep(server.delay_s)
        self._do(step, body)

    def _do(self, step: str, body: dict[str, Any]) -> None:
        server = self.server
        if step == "reset":
            self.close_connection = True
        elif step.isdigit():
            self._send(int(step), {"error": {"message": str(body)}})
        elif step.startswith("429 "):
            self._send(429, {}, {"Retry-After": step.removeprefix("429 ")})
        elif step == "redirect":
            # One that would succeed; followed, it could lead to any host.
            self._send(307, {}, {"Location": f"{server.url}/v1/rerank"})
        elif step == "stall":
            server.is_over.wait(5)
        elif step == "drip":
            self._drip(body)
        elif step == "drip headers":
            self._drip_bytes(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000)
        elif step == "content":
            self._send_bytes(200, server.content)
        elif step == "html":
            self._send_bytes(200, b"<html>welcome</html>")
        elif step == "huge":
            self._send_bytes(200, b"[" + b" " * (16 * 1024 * 1024) + b"]")
        else:
            try:
                rows = server.rows(body)
            except Exception:
                self._send(500, {"error": {"message": str(body)}})
                return
            self._send(200, server.answer(spoil(rows, step)), server.headers)

    def _drip(self, body: dict[str, Any]) -> None:
        content = json.dumps(self.server.answer(self.server.rows(body))).encode()
        self._head(200, len(content), {})
        self._drip_bytes(content)

    def _drip_bytes(self, content: bytes) -> None:
        for byte in content:
            if self.server.is_over.wait(0.05):
                return
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(answer).encode(), headers)

    def _send_bytes(
        self, status: int, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        try:
            self._head(status, len(content), headers or {})
            self.wfile.write(content)
        except OSError:  # the client has left
            self.close_connection = True

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()


def spoil(rows: list[dict[str, Any]], fault: str) -> list[dict[str, Any]]:
    """Return results with a fault."""
    name = "score" if "score" in rows[0] else "relevance_score"
    changes: dict[str, dict[str, Any]] = {
        "duplicate": {"index": rows[-1]["index"]},
        "negative": {"index": -1},
        "beyond": {"index": len(rows)},
        "text index": {"index": "0"},
        "true index": {"index": True},
        "nan": {name: float("nan")},
        "text score": {name: "0.5"},
        "null score": {name: None},
        "logit": {name: 3.5},
    }
    if fault == "missing":
        return rows[1:]
    if fault == "repeated":
        return [*rows, rows[0]]
    if fault == "more":
        return [*rows, {"index": len(rows), name: 0.5}]
    return [{**rows[0], **changes.get(fault, {})}, *rows[1:]]
