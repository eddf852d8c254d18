"""No text of a caller reaches a log, an exception, a traceback or a repr, on any path.

One string that occurs nowhere else stands in query, instruction and documents of every call.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qwen3_reranker
from qwen3_reranker import (
    ClosedError,
    DocumentTooLargeError,
    InputError,
    ModelLoadError,
    NonFiniteScoreError,
    OverloadedError,
    Qwen3RerankerError,
    RankedDocument,
    RankingError,
    ReentryError,
    Reranker,
    TimedOutError,
)
from qwen3_reranker.call.job import Job
from qwen3_reranker.cli.main import main
from qwen3_reranker.engine.engine import Engine
from qwen3_reranker.engine.packing import Pack
from tests import fakes

CANARY = "".join(reversed("vxqz yranac vxqz"))  # so that no line of source in a traceback has it
BROKEN = f"{CANARY} \ud83d"
TEXTS: dict[str, Any] = {"query": CANARY, "documents": [CANARY, BROKEN, "water"]}


def heard(error: BaseException) -> str:
    """Return all that an error and what it came from say, traceback included."""
    said, seen, waiting = [], set[int](), [error]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        said += [str(one), repr(one), repr(one.args), repr(getattr(one, "__notes__", ""))]
        said += [repr(vars(one)), *traceback.format_exception(one)]
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "\n".join(said)


def occurrences(text: str) -> int:
    """Count the canary and what escapes make of it."""
    return text.count(CANARY) + text.count(CANARY.split()[0])


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    said = "\n".join(f"{record.getMessage()} {record.args!r}" for record in caplog.records)
    assert occurrences(caplog.text + said) == 0


def refuse(error: type[BaseException], call: Callable[[], Any]) -> None:
    """Assert that a call fails in a certain way and says nothing of its texts."""
    with pytest.raises(error) as caught:
        call()
    assert occurrences(heard(caught.value)) == 0


class Faulty(fakes.FakeNetwork):
    """Does in its forward what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Callable[[Pack], NDArray[np.float32]] | None = None

    def score(self, pack: Pack) -> NDArray[np.float32]:
        return super().score(pack) if self.fault is None else self.fault(pack)


@pytest.fixture
def network() -> Faulty:
    return Faulty()


@pytest.fixture
def engine(network: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with fakes.loaded(monkeypatch, fakes.FakeModel(network)) as engine:
        yield engine


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("settings", [{}, {"window_score": "max"}, {"exact": True}])
def test_results_records_and_rerankers_show_no_text(settings: dict[str, Any]) -> None:
    reranker = Reranker("model", instruction=CANARY, max_length=200, **settings)
    records: list[Any] = []
    reranker.observe(records.append)
    long = [*TEXTS["documents"], f"{CANARY} " * 200]
    shown = [
        reranker.rank(CANARY, long),
        reranker.rank_many([CANARY, "q"], [long, long], instruction=[CANARY, None]),
        reranker.score_pairs([(CANARY, CANARY)]),
        asyncio.run(reranker.arank(CANARY, long, instruction=BROKEN)),
        asyncio.run(reranker.ascore(CANARY, long)),
        reranker.score(CANARY, long),
        reranker.usage,
        reranker,
        records,
        Job([CANARY], [[CANARY]], [CANARY]),
    ]
    assert len(records) > 1
    assert occurrences(repr(shown)) == 0
    assert all(
        occurrences(repr(getattr(qwen3_reranker, name))) == 0 for name in qwen3_reranker.__all__
    )


BAD: list[tuple[str, dict[str, Any]]] = [
    ("rank", {"query": CANARY, "documents": CANARY}),
    ("rank", {"query": CANARY, "documents": [CANARY, None]}),
    ("rank", {"query": CANARY, "documents": [[CANARY]]}),
    ("rank", {"query": [CANARY], "documents": [CANARY]}),
    ("rank", {"query": {CANARY: CANARY}, "documents": [CANARY]}),
    ("rank", {**TEXTS, "top_n": 0}),
    ("rank", {**TEXTS, "score_threshold": 2}),
    ("rank", {**TEXTS, "timeout_s": -1}),
    ("rank", {**TEXTS, "instruction": [CANARY]}),
    ("rank", {"query": f"{CANARY} " * 500, "documents": [CANARY]}),
    ("rank", {**TEXTS, "instruction": f"{CANARY} " * 500}),
    ("score", {"query": CANARY, "documents": {CANARY}}),
    ("score_pairs", {"pairs": [(CANARY, CANARY, CANARY)]}),
    ("score_pairs", {"pairs": [(CANARY, CANARY), CANARY]}),
    ("rank_many", {"queries": [CANARY], "documents": []}),
    ("rank_many", {"queries": [CANARY] * 2, "documents": [[CANARY], CANARY]}),
    ("rank_many", {"queries": ["q", f"{CANARY} " * 500], "documents": [[CANARY]] * 2}),
]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("verb", "arguments"), BAD, ids=range(len(BAD)))
def test_refused_calls_quote_no_text(verb: str, arguments: dict[str, Any]) -> None:
    reranker = Reranker("model", max_length=200)
    refuse(InputError, lambda: getattr(reranker, verb)(**arguments))


def test_faults_of_the_model_quote_no_text(network: Faulty, engine: Engine) -> None:
    reranker = Reranker("model", instruction=CANARY)

    def run_out(pack: Pack) -> NDArray[np.float32]:
        raise MemoryError

    def take_long(pack: Pack) -> NDArray[np.float32]:
        threading.Event().wait(0.3)
        return np.zeros(len(pack.last_tokens), np.float32)

    def call_again(pack: Pack) -> NDArray[np.float32]:
        reranker.rank(**TEXTS)
        return np.zeros(len(pack.last_tokens), np.float32)

    def fail(pack: Pack) -> NDArray[np.float32]:
        raise RuntimeError("a kernel failed")

    def return_nan(pack: Pack) -> NDArray[np.float32]:
        return np.full(len(pack.last_tokens), np.nan, np.float32)

    def return_too_few(pack: Pack) -> NDArray[np.float32]:
        return np.zeros(1, np.float32)

    faults: list[tuple[Any, type[BaseException], dict[str, Any]]] = [
        (run_out, DocumentTooLargeError, {}),
        (return_nan, NonFiniteScoreError, {}),
        (return_too_few, Qwen3RerankerError, {}),
        (fail, RuntimeError, {}),
        (call_again, ReentryError, {}),
        (take_long, TimedOutError, {"timeout_s": 0.05}),
    ]
    for fault, error, settings in faults:
        network.fault = fault
        refuse(error, lambda settings=settings: reranker.rank(**TEXTS, **settings))
        refuse(error, lambda settings=settings: asyncio.run(reranker.arank(**TEXTS, **settings)))
    engine._max_waiting = -1
    refuse(OverloadedError, lambda: reranker.rank(**TEXTS))
    reranker.close()
    refuse(ClosedError, lambda: reranker.rank(**TEXTS))
    refuse(ModelLoadError, lambda: _load_nothing())


def _load_nothing() -> None:
    from qwen3_reranker.model.loading import load_model

    load_model("/not/there", device="cpu")


@pytest.mark.usefixtures("engine")
def test_broken_observers_and_progress_log_no_text() -> None:
    def observe(record: Any) -> None:
        raise RuntimeError(CANARY)  # its message is the application's; it must not be passed on

    reranker = Reranker("model")
    reranker.observe(observe)
    reranker.rank(**TEXTS)
    reranker.rank(**TEXTS)


def test_cancelled_call_quotes_no_text(network: Faulty, engine: Engine) -> None:
    go = threading.Event()

    def wait(pack: Pack) -> NDArray[np.float32]:
        go.wait(10)
        return np.zeros(len(pack.last_tokens), np.float32)

    async def cancel() -> None:
        task = asyncio.create_task(Reranker("model").arank(**TEXTS))
        await asyncio.sleep(0.1)
        assert occurrences(repr(task)) == 0
        task.cancel()
        go.set()
        await task

    network.fault = wait
    refuse(asyncio.CancelledError, lambda: asyncio.run(cancel()))


class Losing:
    """Stands for a reranker that loses a document."""

    def rank(self, query: str, documents: list[str], **settings: Any) -> list[RankedDocument]:
        return []

    async def arank(self, query: str, documents: list[str], **settings: Any) -> Any:
        return []


@pytest.mark.usefixtures("engine")
def test_integrations_quote_no_text() -> None:
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode

    from langchain_qwen3_reranker import Qwen3Reranker as Compressor
    from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as Postprocessor

    documents = [Document(CANARY), Document("water")]
    nodes = [NodeWithScore(node=TextNode(text=CANARY)), NodeWithScore(node=TextNode(text="water"))]
    Compressor(model="model").compress_documents(documents, CANARY)
    Postprocessor(model="model").postprocess_nodes(nodes, query_str=CANARY)
    refuse(
        RankingError, lambda: Compressor(reranker=Losing()).compress_documents(documents, CANARY)
    )
    refuse(
        RankingError,
        lambda: Postprocessor(reranker=Losing()).postprocess_nodes(nodes, query_str=CANARY),
    )
    refuse(InputError, lambda: Compressor(model="model").compress_documents(documents, " "))
    refuse(ValueError, lambda: Compressor(model="model", instruction=[CANARY]))
    refuse(ValueError, lambda: Postprocessor(model="model", instruction=[CANARY]))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "lines",
    [
        [json.dumps({"text": CANARY}), "{" + CANARY],
        [json.dumps({"text": CANARY}), json.dumps({"text": [CANARY]})],
        [json.dumps({"other": CANARY})],
        [json.dumps([CANARY])],
        [json.dumps({"text": CANARY}) + CANARY],
        ['{"text": "' + CANARY + '", "text": "' + CANARY + '"}'],
    ],
    ids=["cut", "list", "missing", "no object", "extra", "twice"],
)
def test_command_line_quotes_no_text_of_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str]
) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert main(["rank", "-q", CANARY, "-d", str(file), "-m", "model", "-i", CANARY]) == 2
    said = capsys.readouterr()
    assert said.err
    assert occurrences(said.err + said.out) == 0


@pytest.mark.usefixtures("engine")
def test_command_line_quotes_no_text_of_a_bad_call(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-n", "0"], ["--threshold", "7"], ["--max-length", "9"]):
        assert main(["rank", "-q", CANARY, CANARY, "-m", "model", *arguments]) == 2
    assert occurrences(capsys.readouterr().err) == 0


def test_scores_kept_for_later_hold_no_text() -> None:
    network = fakes.FakeNetwork()
    model = fakes.FakeModel()
    engine = Engine(network.score, backend="documents", budget=model.budget, max_cached_scores=9)
    group = model.tokenizer.encode_group(CANARY, CANARY, [CANARY], max_length=512)
    engine.submit([group]).result(10)
    engine.close()
    assert engine._known is not None
    assert occurrences(repr(engine._known._kept)) == 0
    assert all(len(key) == 16 for key in engine._known._kept)


def test_control_what_is_heard_would_be_noticed() -> None:
    def raise_chained() -> None:
        try:
            raise KeyError(CANARY)
        except KeyError:
            raise InputError("a harmless message") from None

    with pytest.raises(InputError) as caught:
        raise_chained()
    assert occurrences(heard(caught.value)) > 0
    assert occurrences(repr([CANARY, f"{CANARY}\n"])) > 0
