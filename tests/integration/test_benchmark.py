"""mteb's own machinery around our reranker, on tiny tasks that are made here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer

from finetune import benchmark, two_stage
from finetune.cli import main
from finetune.cross_encoder import MtebCrossEncoder
from qwen3_reranker import (
    TEMPLATES,
    DataError,
    InputError,
    MissingExtraError,
    ModelLoadError,
    Reranker,
)
from tests import real_parts, texts

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install '.[mteb]'")
from datasets import Dataset  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

ROOT = Path(__file__).parents[2]
TEMPLATE = TEMPLATES["published-eval"]
DOCUMENTS = [document for _, document in texts.ordinary_pairs(130)]
RELEVANT = {f"q{i}": {f"d{j}": 1 for j in range(i, len(DOCUMENTS), 3)} for i in range(1, 4)}


def metadata(name: str, **settings: Any) -> TaskMetadata:
    return TaskMetadata(**{
        "name": name, "description": "made up", "type": "Retrieval", "category": "t2t",
        "dataset": {"path": "none", "revision": "1"}, "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"], "main_score": "ndcg_at_10", **settings,
    })  # fmt: skip


class Fruit(AbsTaskRetrieval):
    """Retrieval in a corpus of more than a hundred documents; the first query has no judgment."""

    metadata = metadata("Fruit", prompt={"query": "Find fruit"})
    loads: ClassVar[list[str]] = []

    def load_data(self, **settings: Any) -> None:
        if self.data_loaded:
            return
        self.loads.append(self.metadata.name)
        ids = [f"d{i}" for i in range(len(DOCUMENTS))]
        queries = [{"id": f"q{i}", "text": " ".join(DOCUMENTS[i].split()[:5])} for i in range(4)]
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_dict({"id": ids, "text": DOCUMENTS}),
                    "queries": Dataset.from_list(queries),
                    "relevant_docs": RELEVANT,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class Vegetables(Fruit):
    metadata = metadata("Vegetables")


class Followed(AbsTaskRetrieval):
    """As FollowIR: each query twice, under two instructions, with candidates."""

    metadata = metadata("Followed", type="InstructionReranking")

    def load_data(self, **settings: Any) -> None:
        names = [f"q{i}-{kind}" for i in range(2) for kind in ("og", "changed")]
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_list(
                        [{"id": f"d{i}", "title": "Title", "text": DOCUMENTS[i]} for i in range(6)]
                    ),
                    "queries": Dataset.from_list(
                        [
                            {"id": n, "text": f"query {n[:2]}", "instruction": f"Obey {n} please"}
                            for n in names
                        ]
                    ),
                    "relevant_docs": {name: {"d1": 1} for name in names},
                    "top_ranked": {name: [f"d{i}" for i in range(6)] for name in names},
                }
            }
        }
        self.data_loaded = True


@pytest.fixture(autouse=True)
def _count_loads() -> None:
    Fruit.loads.clear()


@pytest.fixture(scope="module")
def reranker(checkpoint: Callable[..., Path]) -> Iterator[Reranker]:
    with Reranker(str(checkpoint()), template="published-eval") as reranker:
        yield reranker


def reranked(folder: Path, task: str) -> dict[str, Any]:
    (file,) = folder.glob(f"results/*/{task}.json")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def scores_of(folder: Path, task: str) -> Any:
    return reranked(folder, task)["scores"]


class Recorder:
    """A reranker that remembers what it was asked."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker = reranker
        self.calls: list[tuple[list[str], list[list[str]], list[str | None]]] = []
        self.fails_after = 10**9

    @property
    def loaded(self) -> Any:
        return self.reranker.loaded

    def rank_many(self, queries: Any, documents: Any, *, instruction: Any) -> Any:
        if len(self.calls) == self.fails_after:
            raise KeyboardInterrupt
        self.calls.append((queries, documents, instruction))
        return self.reranker.rank_many(queries, documents, instruction=instruction)

    @property
    def prompts(self) -> list[str]:
        return [
            TEMPLATE.render(instruction or TEMPLATE.default_instruction, query, document)
            for queries, lists, instructions in self.calls
            for query, documents, instruction in zip(queries, lists, instructions, strict=True)
            for document in documents
        ]


def test_two_stages_equal_a_direct_computation(reranker: Reranker, tmp_path: Path) -> None:
    recorder: Any = Recorder(reranker)
    found = two_stage.rerank_tasks([Fruit(), Fruit()], recorder, "bm25", tmp_path)
    (score,) = found.values()
    assert score.instruction == "Find fruit"
    (queries, lists, instructions) = recorder.calls[0]
    assert len(recorder.calls) == 1
    assert len(queries) == 3, "the query without judgments is not ranked, a task is run once"
    assert instructions == ["Find fruit"] * 3
    assert [len(documents) for documents in lists] == [two_stage.TOP_K] * 3, "mteb's default is 10"
    (file,) = tmp_path.glob("candidates/bm25-*/Fruit_predictions.json")
    candidates = json.loads(file.read_text())["default"]["test"]
    values = []
    for i in range(1, 4):
        query = " ".join(DOCUMENTS[i].split()[:5])
        names = list(candidates[f"q{i}"])
        assert len(names) == two_stage.TOP_K
        ranking = reranker.rank(
            query, [DOCUMENTS[int(name[1:])] for name in names], instruction="Find fruit"
        )
        gains = [names[result.index] in RELEVANT[f"q{i}"] for result in ranking[:10]]
        discounts = 1 / np.log2(np.arange(2, 12))
        values.append(discounts @ gains / discounts.sum())
    assert 0 < np.mean(values) < 1
    assert score.reranked == pytest.approx(np.mean(values), abs=1e-5)
    assert score.first_stage not in (None, score.reranked)


@pytest.mark.parametrize("order", ["by query", "shuffled"])
def test_predict_returns_log_odds_in_the_order_of_the_pairs(
    reranker: Reranker, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.data import DataLoader

    monkeypatch.setattr("finetune.cross_encoder._PAIRS", 12)
    pairs = [(f"query {i // 10}", DOCUMENTS[i % 10]) for i in range(20)]
    if order == "shuffled":
        pairs = pairs[::2] + pairs[1::2]
    queries: Any = [{"query": query, "text": "not this"} for query, _ in pairs]
    documents: Any = [{"text": document} for _, document in pairs]
    recorder: Any = Recorder(reranker)
    meta = two_stage._meta("1")
    model = MtebCrossEncoder(recorder, meta, {"Fruit": "Pick"})
    assert isinstance(model, mteb.models.CrossEncoderProtocol)
    assert not isinstance(model, mteb.EncoderProtocol)
    scores = model.predict(
        DataLoader(queries, batch_size=3), DataLoader(documents, batch_size=3),
        task_metadata=Fruit.metadata, hf_split="test", hf_subset="default", batch_size=3,
    )  # fmt: skip
    assert scores.dtype == np.float32
    expected = [
        reranker.rank(query, [document], instruction="Pick")[0].log_odds
        for query, document in pairs
    ]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert len(set(expected)) > 10
    assert [len(queries) for queries, _, _ in recorder.calls] == [
        2,
        2 if order == "shuffled" else 1,
    ]


def test_an_instruction_of_the_data_stands_in_the_prompt_once(
    reranker: Reranker, tmp_path: Path
) -> None:
    recorder: Any = Recorder(reranker)
    found = two_stage.rerank_tasks([Followed()], recorder, "bm25", tmp_path)
    assert found["Followed"].first_stage is None
    assert found["Followed"].instruction == two_stage.OWN_INSTRUCTIONS
    assert not list(tmp_path.glob("candidates/*/*"))
    assert len(recorder.prompts) == 24
    heads = set()
    for prompt in recorder.prompts:
        assert prompt.count("Obey") == prompt.count("please") == prompt.count("query q") == 1
        heads.add(prompt.removeprefix(TEMPLATE.prefix).split("\n\n<Document>: Title ")[0])
    assert heads == {
        f"<Instruct>: Obey q{i}-{kind} please\n\n<Query>: query q{i}"
        for i in range(2)
        for kind in ("og", "changed")
    }


def test_interrupted_and_started_again_equals_uninterrupted(
    reranker: Reranker, tmp_path: Path
) -> None:
    tasks = [Fruit, Vegetables]
    recorder: Any = Recorder(reranker)
    recorder.fails_after = 1
    with pytest.raises(KeyboardInterrupt):
        two_stage.rerank_tasks([t() for t in tasks], recorder, "bm25", tmp_path / "a")
    (candidates,) = tmp_path.glob("a/candidates/bm25-*")
    # As if it had been killed while the first stage was at work, too.
    (candidates / "Vegetables.json").unlink()
    (candidates / "Vegetables_predictions.json").write_text('{"default": {"te')
    Fruit.loads.clear()
    recorder.fails_after = 10**9
    resumed = two_stage.rerank_tasks([t() for t in tasks], recorder, "bm25", tmp_path / "a")
    assert Fruit.loads == ["Vegetables"] * 2, "what is finished is not even loaded"
    assert len(recorder.calls) == 2
    whole = two_stage.rerank_tasks([t() for t in tasks], reranker, "bm25", tmp_path / "b")
    assert resumed == whole
    for task in ("Fruit", "Vegetables"):
        assert scores_of(tmp_path / "a", task) == scores_of(tmp_path / "b", task)
    other = two_stage.rerank_tasks([Fruit()], recorder, "bm25", tmp_path / "a", key="other weights")
    assert other["Fruit"] == whole["Fruit"]
    assert len(recorder.calls) == 3, "other weights are scored anew"


def test_a_query_without_candidates_is_refused(reranker: Reranker, tmp_path: Path) -> None:
    task = Fruit()
    two_stage.rerank_tasks([task], reranker, "bm25", tmp_path)
    (file,) = tmp_path.glob("candidates/bm25-*/Fruit_predictions.json")
    content = json.loads(file.read_text())
    del content["default"]["test"]["q2"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="1 of 3 queries have no candidates, the first is q2"):
        two_stage.rerank_tasks([task], reranker, "bm25", tmp_path, key="again")


def test_data_that_cannot_be_loaded_are_named(reranker: Reranker, tmp_path: Path) -> None:
    class Unreachable(Fruit):
        metadata = metadata("Unreachable")

        def load_data(self, **settings: Any) -> None:
            raise ConnectionError

    with pytest.raises(DataError, match="the data of Unreachable cannot be loaded"):
        two_stage.rerank_tasks([Unreachable()], reranker, "bm25", tmp_path)


TASKS = {
    "MTEB-R": """ArguAna CQADupstackGamingRetrieval CQADupstackUnixRetrieval
        ClimateFEVERHardNegatives FEVERHardNegatives FiQA2018 HotpotQAHardNegatives SCIDOCS
        TRECCOVID Touche2020Retrieval.v3""",
    "CMTEB-R": """T2Retrieval MMarcoRetrieval DuRetrieval CovidRetrieval CmedqaRetrieval
        EcomRetrieval MedicalRetrieval VideoRetrieval""",
    "MMTEB-R": """StackOverflowQA TwitterHjerneRetrieval AILAStatutes ArguAna HagridRetrieval
        LegalBenchCorporateLobbying LEMBPasskeyRetrieval SCIDOCS SpartQA TempReasonL1 TRECCOVID
        WinoGrande BelebeleRetrieval MLQARetrieval StatcanDialogueDatasetRetrieval
        WikipediaRetrievalMultilingual CovidRetrieval MIRACLRetrievalHardNegatives""",
    "MLDR": "MultiLongDocRetrieval",
    "MTEB-Code": """AppsRetrieval CodeEditSearchRetrieval CodeFeedbackMT CodeFeedbackST
        CodeSearchNetCCRetrieval CodeSearchNetRetrieval CodeTransOceanContest CodeTransOceanDL
        CosQA COIRCodeSearchNetRetrieval StackOverflowQA SyntheticText2SQL""",
    "FollowIR": """Core17InstructionRetrieval News21InstructionRetrieval
        Robust04InstructionRetrieval""",
    "NanoBEIR": """NanoArguAnaRetrieval NanoClimateFeverRetrieval NanoDBPediaRetrieval
        NanoFEVERRetrieval NanoFiQA2018Retrieval NanoHotpotQARetrieval NanoMSMARCORetrieval
        NanoNFCorpusRetrieval NanoNQRetrieval NanoQuoraRetrieval NanoSCIDOCSRetrieval
        NanoSciFactRetrieval NanoTouche2020Retrieval""",
}


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_a_benchmark_is_these_tasks(name: str) -> None:
    tasks = benchmark.benchmark_tasks(name)
    assert sorted(task.metadata.name for task in tasks) == sorted(TASKS[name].split())
    metrics = {task.metadata.main_score for task in tasks}
    others = {"FollowIR": {"p-MRR"}, "MMTEB-R": {"ndcg_at_10", "ndcg_at_1", "recall_at_10"}}
    assert metrics == others.get(name, {"ndcg_at_10"})
    if name == "MLDR":
        assert list(tasks[0].eval_splits) == ["test"]
        assert len(tasks[0].hf_subsets) == 13


def test_published_figures_are_of_the_benchmarks() -> None:
    assert set(benchmark.PUBLISHED) == set(benchmark.BENCHMARKS) - {"NanoBEIR"}
    assert {len(row) for row in benchmark.PUBLISHED.values()} == {len(benchmark._MODELS)}


@pytest.fixture
def fruit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "benchmark_tasks", lambda name: [Fruit(), Vegetables()])


def test_command_shows_what_is_compared_with_what(
    fruit_only: None, checkpoint: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"Vegetables": {"query": "Find roots", "passage": ""}}')
    guide = (ROOT / "docs/finetuning/evaluate.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^qwen3-finetune (.* --benchmark) (NanoBEIR.*)$", guide, re.MULTILINE)
    command = " MTEB-R ".join(shown).replace("Qwen/Qwen3-Reranker-0.6B", str(checkpoint()))
    flags = ["--task_prompts", str(prompts), "--output_dir", str(tmp_path / "out")]
    assert main([*command.split(), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    out = "\n".join(lines)
    assert f"template: published-eval, {TEMPLATE.hash[:12]}" in out
    assert "first stage: bm25, best 100" in out
    for task, sentence in (("Fruit", "Find fruit"), ("Vegetables", "Find roots")):
        assert any(line.startswith(task) and line.endswith(sentence) for line in lines)
    assert "! The published figures are of other candidates" in out
    assert "lack an instruction" not in out
    (row,) = [line for line in lines if line.startswith("MTEB-R ") and "instruction" not in line]
    kept = json.loads((tmp_path / "out/benchmark.json").read_text())
    score = np.mean([each["reranked"] for each in kept["benchmarks"]["MTEB-R"]])
    assert row.split()[2:] == [f"{100 * score:.2f}", "61.82", "65.80", "69.76", "69.02", "58.22",
                               "59.51", "57.03"]  # fmt: skip
    assert any(line.startswith("NanoBEIR ") and line.endswith("none") for line in lines)


def test_an_adapter_is_served_under_its_own_prompt(
    fruit_only: None, checkpoint: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = checkpoint()
    adapter = real_parts.save_random_adapter(tmp_path / "adapter", base)
    command = ["evaluate", "--model", str(base), "--adapter", str(adapter), "--benchmark",
               "NanoBEIR", "--first_stage", "bm25", "--output_dir", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "template: qwen3-reranker, " in out
    assert "! The published figures are of another prompt" in out
    assert "! NanoBEIR: 1 of 2 tasks lack an instruction" in out


def test_an_encoder_on_disk_is_a_first_stage(reranker: Reranker, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = tmp_path / "encoder"
    tokenizer = real_parts.qwen3_tokenizer_file()
    embedding = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_dim=4)
    SentenceTransformer(modules=[embedding], device="cpu").save(str(folder))
    for seconds in (1, 2):
        os.utime(next(folder.rglob("*.safetensors")), (seconds, seconds))
        found = two_stage.rerank_tasks([Fruit()], reranker, str(folder), tmp_path)
        assert found["Fruit"].first_stage is not None
        assert len(list(tmp_path.glob("candidates/*"))) == seconds, "weights that have changed"
    with pytest.raises(ModelLoadError, match="Pass bm25, a name that mteb knows"):
        two_stage.rerank_tasks([Fruit()], reranker, str(tmp_path / "nowhere"), tmp_path)


def test_unknown_benchmark_names_the_nearest(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"FollowIR.*Did you mean CMTEB-R\?"):
        benchmark.benchmark_tasks("cmtebr")
    flags = ["--model", str(checkpoint()), "--output_dir", str(tmp_path)]
    assert main(["evaluate", *flags, "--benchmark", "nanobeer"]) == 2
    assert "Did you mean NanoBEIR?" in capsys.readouterr().err
    lists = ["--benchmark", "NanoBEIR", "--eval_file"]
    assert main(["evaluate", *flags, *lists, str(ROOT / "recipes/support/dev.jsonl")]) == 2
    assert "Run evaluate once for each" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{", '{"Fruit": {"passage": ""}}', '{"Fruit": 5}'])
def test_wrong_task_prompts_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(DataError, match=f"{file}: "):
        benchmark.read_task_prompts(str(file))


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    with pytest.raises(MissingExtraError, match=r"qwen3-reranker\[finetune,mteb\]"):
        benchmark.benchmark_tasks("FollowIR")
