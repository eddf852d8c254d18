"""Calibrated scores end to end: on judged medical questions, adapters, frameworks and a server."""

from __future__ import annotations

import json
import lzma
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from finetune.cli import main
from finetune.fitting import calibrated, fit, precision_at, quality
from finetune.metrics import ScoredSet
from langchain_qwen3_reranker import Qwen3Reranker as LangChainReranker
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as LlamaIndexReranker
from qwen3_reranker import Calibration, DataError, ModelLoadError, RemoteReranker, Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.data.trec import read_candidates
from qwen3_reranker.framework_settings import scorer_of
from tests import real_parts
from tests.fakes import FakeModel, loaded
from tests.invariants import check_ranking
from tests.servers import serving

MAX_LENGTH = "160"  # a passage's beginning says what it is about, and costs half


@pytest.fixture
def medical_halves(tmp_path: Path) -> list[Path]:
    """Write two halves of 100 medical questions, each with the first 8 candidates of BM25."""
    folder = real_parts.shared_data()
    if folder is None:
        pytest.skip("the judged sets of ../shared/data are not here")
    with lzma.open(folder / "med_en.dev.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    halves = []
    for name, start in (("fitted", 0), ("held-out", 1)):
        lines = [{**row, "candidates": row["candidates"][:8]} for row in rows[start::2]]
        half = tmp_path / f"{name}.jsonl"
        half.write_text("".join(json.dumps(line) + "\n" for line in lines))
        halves.append(half)
    return halves


@pytest.mark.slow
def test_calibration_fitted_on_half_of_the_questions_holds_on_the_other(
    medical_halves: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted, held_out = medical_halves
    output = tmp_path / "calibration"
    command = ["--model", "embedded", "--eval_file", str(fitted), "--output_dir", str(output)]
    options = ["--max_length", MAX_LENGTH, "--precision", "0.8"]
    assert main(["calibrate", *command, *options]) == 0
    record = json.loads((output / "calibration.json").read_text())

    lists = read_candidates(str(held_out))
    served = Calibration.read(output / "calibration.json")
    with Reranker("embedded", max_length=int(MAX_LENGTH), calibration=served) as reranker:
        rankings = [reranker.rank(each.query, each.texts, instruction=each.instruction)
                    for each in lists]  # fmt: skip
    rows = []
    for each, ranking in zip(lists, rankings, strict=True):
        # Sorted by the model's own log-odds, and the calibrated scores fall with them.
        check_ranking(ranking, each.texts, temperature=served.temperature, bias=served.bias)
        scores = [result.score for result in ranking]
        assert scores == sorted(scores, reverse=True)
        rows.append(in_order(ranking))

    plain = ScoredSet("held-out", lists, rows)
    calm = calibrated(plain, served)
    before, after = quality(plain), quality(calm)
    kept = precision_at(calm, record["threshold"]["score_threshold"])
    with capsys.disabled():
        print(f"\ntemperature {served.temperature:.3f}, bias {served.bias:+.3f}")
        print(f"held out: log-loss {before.log_loss:.4f} -> {after.log_loss:.4f}, "
              f"ECE {before.reliability.ece:.4f} -> {after.reliability.ece:.4f}")  # fmt: skip
        print(f"fitted   {record['threshold']}\nheld out {kept}")
    assert after.log_loss < before.log_loss
    assert after.reliability.ece < before.reliability.ece
    assert kept is not None
    assert kept.low <= record["threshold"]["target"] <= kept.high

    labels = [label for each in lists for label in each.labels or []]
    random.Random(0).shuffle(labels)
    shuffled = [replace(each, labels=labels[8 * i : 8 * i + 8]) for i, each in enumerate(lists)]
    with pytest.raises(DataError, match="the scores say nothing about these labels"):
        fit(ScoredSet("shuffled", shuffled, rows))


QUERY, DOCUMENTS = "red apple", ["green pear", "red apple", "red pear", ""]


@pytest.fixture
def adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Write an adapter that changes one kind of matrix alone."""
    return real_parts.save_random_adapter(
        tmp_path / "adapter", checkpoint(), target_modules=["v_proj"]
    )


def calibration_for(file: Path, model: Path, **settings: Any) -> Path:
    """Write what `calibrate` writes for a model, with made-up numbers."""
    with Reranker(str(model), dtype="float32", **settings) as reranker:
        loaded = reranker.loaded
    template = loaded.tokenizer.template
    content = {
        "temperature": 3.0,
        "bias": -0.5,
        "model": {"fingerprint": loaded.fingerprint},
        "template": {"id": template.id, "hash": template.hash},
    }
    file.write_text(json.dumps(content))
    return file


@pytest.mark.slow  # half a minute
def test_calibration_fits_the_adapter_and_its_merge_and_no_other_weights(
    checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base, merged, exported = checkpoint(), tmp_path / "merged", tmp_path / "exported"
    file = calibration_for(tmp_path / "calibration.json", base, adapter=adapter)
    names = ["--model", str(base), "--adapter", str(adapter), "--output_dir"]
    assert main(["merge", *names, str(merged)]) == 0
    assert main(["export", "--format", "seq-cls", *names, str(exported)]) == 0
    expected = None
    for model, settings in (
        (base, {"adapter": adapter}),
        (base, {"adapter": adapter, "dtype": "bfloat16"}),
        (merged, {}),
        (exported, {}),
    ):
        with Reranker(str(model), calibration=file, **{"dtype": "float32", **settings}) as reranker:
            ranking = reranker.rank(QUERY, DOCUMENTS)
        check_ranking(ranking, DOCUMENTS, temperature=3.0, bias=-0.5)
        expected = expected or [r.index for r in ranking]
        assert [r.index for r in ranking] == expected
    others = (
        (base, {}),
        (checkpoint(seed=1), {}),
        (base, {"adapter": adapter, "template": "chatml"}),
    )
    for model, settings in others:
        with (
            Reranker(str(model), calibration=file, **settings) as reranker,
            pytest.raises(ModelLoadError, match="the calibration was fitted"),
        ):
            reranker.rank(QUERY, DOCUMENTS)


def test_served_scores_are_calibrated_and_a_client_gets_them(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = calibration_for(tmp_path / "calibration.json", checkpoint())
    with Reranker(str(checkpoint()), dtype="float32", calibration=file) as reranker:
        here = reranker.rank(QUERY, DOCUMENTS)
    options = ("--calibration", str(file), "--dtype", "float32")
    with serving(checkpoint(), *options) as server:
        body = {"query": QUERY, "documents": DOCUMENTS}
        results = httpx.post(f"{server.url}/v1/rerank", json=body).json()["results"]
        with RemoteReranker(server.url) as remote:
            there = remote.rank(QUERY, DOCUMENTS)
    check_ranking(there, DOCUMENTS)
    for ours, answer, remotely in zip(here, results, there, strict=True):
        assert ours.index == answer["index"] == remotely.index
        assert ours.score == pytest.approx(answer["relevance_score"], abs=1e-6)
        assert ours.log_odds == pytest.approx(answer["log_odds"], abs=1e-4)
        assert ours.score == pytest.approx(remotely.score, abs=1e-6)


@pytest.mark.parametrize("integration", [LangChainReranker, LlamaIndexReranker])
def test_integrations_read_the_file_once_and_keep_what_it_says(
    integration: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel()
    content = {
        "temperature": 3.0,
        "bias": -0.5,
        "model": {"fingerprint": model.fingerprint},
        "template": {"hash": model.tokenizer.template.hash},
    }
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(content))
    component = integration(model="model", calibration=file, top_n=None)
    file.unlink()
    assert component.calibration == Calibration(
        3.0, -0.5, model.fingerprint, model.tokenizer.template.hash
    )
    dumped = json.loads(component.model_dump_json(exclude={"reranker", "callback_manager"}))
    copies = [component, pickle.loads(pickle.dumps(component)), integration(**dumped)]  # noqa: S301
    if integration is LlamaIndexReranker:
        copies.append(LlamaIndexReranker.from_dict(component.to_dict()))
    with loaded(monkeypatch, model):
        for each in copies:
            ranking = scorer_of(each).rank(QUERY, DOCUMENTS)
            check_ranking(ranking, DOCUMENTS, temperature=3.0, bias=-0.5)
        best = ranking[0]
        if integration is LangChainReranker:
            documents = [Document(text) for text in DOCUMENTS]
            first = component.compress_documents(documents, QUERY)[0]
            assert first.metadata["relevance_score"] == best.score
        else:
            nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
            assert component.postprocess_nodes(nodes, query_str=QUERY)[0].score == best.score


@pytest.mark.parametrize("integration", [LangChainReranker, LlamaIndexReranker])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": "none.json"}, "calibration 'none.json' cannot be used"),
        ({"calibration": 3}, "calibration"),
        ({"calibration": {"temperature": -1}}, "temperature"),
        ({"calibration": Calibration(2.0), "model": "http://127.0.0.1:1"}, "have no effect"),
        ({"calibration": Calibration(2.0), "reranker": Reranker("model")}, "have no effect"),
    ],
)
def test_integrations_refuse_a_calibration_that_cannot_be_used(
    integration: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        integration(**settings)
