"""Judged sets of all forms on every path: TREC and BEIR files, and the real sets beside us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from finetune.cli import main
from finetune.served import read_lists
from langchain_qwen3_reranker import Qwen3Reranker as LangChainReranker
from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker as LlamaIndexReranker
from qwen3_reranker import Reranker
from tests import real_parts

FILES = {
    "corpus.jsonl": '{"_id": "d1", "title": "Bread", "text": "up."}\n{"_id": "d2", "text": ""}\n',
    "queries.jsonl": '{"_id": "q1", "text": "bread?"}\n{"_id": "q2", "text": "tea?"}\n',
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t1\nq2\td9\t1\n",
    "bm25.trec": "q1 Q0 d1 1 2.5 bm25\nq1 Q0 d2 2 1.5 bm25\n",
}


def test_evaluate_measures_a_run_in_a_beir_folder(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in FILES.items():
        file = tmp_path / "bread" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    output = tmp_path / "figures"
    command = ["evaluate", "--model", str(checkpoint()), "--output_dir", str(output), "--eval_file"]
    assert main([*command, str(tmp_path / "bread"), "--depth", "1"]) == 0
    report = json.loads((output / "report.json").read_text())
    (found,) = report["sets"]
    assert (found["name"], found["num_queries"]) == ("bread", 2)
    # q1: 2 / (2 + 1 * 0.6309298), d2 being cut off; q2 was never found: 0. Then their mean.
    assert found["metrics"]["nDCG@10"]["mean_before"] == pytest.approx(0.3800938)
    assert [line.split(",")[0].split("/")[-1] for line in report["data"]] == [
        "bm25.trec", "corpus.jsonl", "queries.jsonl", "test.tsv"
    ]  # fmt: skip
    assert main([*command, str(tmp_path / "bread"), "--depth", "0"]) == 2
    assert "depth must be at least 1 or None, got 0" in capsys.readouterr().err


def test_list_without_candidates_needs_no_labels(tmp_path: Path) -> None:
    rows = [
        {"query": "bread?", "candidates": [{"text": "rises", "label": 1}]},
        {"query": "tea?", "candidates": [], "missing_labels": [1]},
    ]
    file = tmp_path / "dev.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [each.missing_labels for each in read_lists([str(file)])["dev"]] == [[], [1]]


@pytest.mark.slow  # 12,000 documents
@pytest.mark.parametrize("name", ["general_en", "med_en", "code_cosqa", "xling", "zh"])
def test_core_langchain_and_llama_index_agree_exactly(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    data = real_parts.shared_data()
    if data is None:
        pytest.skip("needs the reranking sets in ../shared/data")
    model = str(checkpoint())
    reranker = Reranker.shared(model, max_length=512)
    compressor = LangChainReranker(model=model, max_length=512, top_n=None)
    postprocessor = LlamaIndexReranker(
        model=model, max_length=512, top_n=None, metadata_mode="none"
    )
    (lists,) = read_lists([str(data / f"{name}.mini.jsonl.xz")]).values()
    assert len(lists) >= 40
    for each in lists:
        ranking = reranker.rank(each.query, each.texts, instruction=each.instruction)
        expected = [(each.ids[result.index], result.score) for result in ranking]
        compressor.instruction = postprocessor.instruction = each.instruction
        pairs = list(zip(each.ids, each.texts, strict=True))
        documents = compressor.compress_documents([Document(t, id=i) for i, t in pairs], each.query)
        assert [(d.id, d.metadata["relevance_score"]) for d in documents] == expected
        nodes = postprocessor.postprocess_nodes(
            [NodeWithScore(node=TextNode(text=t, id_=i)) for i, t in pairs], query_str=each.query
        )
        assert [(node.node_id, node.score) for node in nodes] == expected
