"""Real vLLM, on a CPU, scores what this package scores: as a server and without one.

`make vllm` installs it into an environment of its own and runs this. It starts slowly.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import main as finetune
from qwen3_reranker import RemoteError, RemoteReranker, Reranker
from tests.compat.clients import DOCUMENTS, QUERY
from tests.invariants import check_ranking
from tests.real_parts import save_random_adapter
from tests.servers import ROOT, VLLM_ENVIRONMENT, VLLM_PYTHON, vllm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not VLLM_PYTHON.exists(), reason="vLLM is not installed: `make vllm` does it"
    ),
]

TOLERANCE = 1e-5  # in P, float32 on both sides; 1e-6 was measured
INSTRUCTION = 'Given a "planet", find texts\nthat {{ name }} it 行星'
TEXTS = [*DOCUMENTS, "", " two  spaces ", 'a "b" \\ {{ c }}', "Mars 火星 é 🪐\n\n"]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint()


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("adapters") / "one", model)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with vllm(model, "--max-model-len", "1024") as url:
        yield url


def check(found: list[float], expected: list[float], bound: float = TOLERANCE) -> None:
    print(f"largest difference {max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e}")
    assert found == pytest.approx(expected, abs=bound)


def in_process(model: Path, instruction: str | None = None, **settings: Any) -> list[float]:
    with Reranker(str(model), dtype="float32", **settings) as reranker:
        return reranker.score(QUERY, TEXTS, instruction=instruction)


def test_server_scores_as_we_do(url: str, model: Path) -> None:
    with RemoteReranker(url) as reranker:
        check_ranking(reranker.rank(QUERY, TEXTS), TEXTS)
        scores = reranker.score(QUERY, TEXTS)
    expected = in_process(model)
    assert max(expected) - min(expected) > 0.2  # a wrong prompt would be seen
    check(scores, expected)


def test_instruction_of_a_request_is_read(url: str, model: Path) -> None:
    with RemoteReranker(url) as reranker:
        scores = reranker.score(QUERY, TEXTS, instruction=INSTRUCTION)
    expected = in_process(model, INSTRUCTION)
    check(scores, expected)
    assert scores != pytest.approx(in_process(model), abs=100 * TOLERANCE)


def test_long_document_is_refused_or_cut_where_we_cut_it(url: str, model: Path) -> None:
    words = "The planet Mars is red. " * 300
    with RemoteReranker(url) as reranker, pytest.raises(RemoteError, match="status 400"):
        reranker.score(QUERY, [words])
    tokens = 60
    with RemoteReranker(url, max_tokens_per_doc=tokens) as reranker:
        scores = reranker.score(QUERY, [words, DOCUMENTS[0]])
    # Its first tokens as text again; the space before it is ours, so that it counts for us alone.
    cut = "The planet Mars is red. " * (tokens // 6)
    with Reranker(str(model), dtype="float32") as reranker:
        check(scores, reranker.score(QUERY, [cut[:-1], DOCUMENTS[0]]))


def test_merged_export_is_served_unchanged(model: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "seq-cls"
    command = f"export --format seq-cls --model {model} --adapter {adapter} --output_dir {output}"
    assert finetune(shlex.split(command)) == 0
    with vllm(output) as url, RemoteReranker(url) as reranker:
        found = [reranker.score(QUERY, TEXTS, instruction=i) for i in (None, INSTRUCTION)]
    for scores, instruction in zip(found, (None, INSTRUCTION), strict=True):
        expected = in_process(model, instruction, adapter=str(adapter))
        check(scores, expected)
        assert scores != pytest.approx(in_process(model, instruction), abs=100 * TOLERANCE)


PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
print(found.model_tag, found.runner, found.max_model_len)
"""


@pytest.mark.parametrize("service", ["reranker", "embedding"])
def test_vllm_knows_the_options_of_the_compose_recipe(service: str) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/vllm/compose.yaml").read_text())
    words = shlex.split(recipe["services"][service]["command"])
    done = subprocess.run(
        [str(VLLM_PYTHON), "-c", PARSE, *words],
        env=VLLM_ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{words[0]} pooling 8192" in done.stdout


@pytest.mark.parametrize("form", ["causal", "sentence-transformers"])
def test_recipe_without_a_server_scores_as_we_do(
    form: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    source, settings = model, {}
    if form != "causal":
        source, settings = tmp_path / "export", {"adapter": str(adapter)}
        command = f"export --format {form} --model {model} --adapter {adapter}"
        assert finetune(shlex.split(f"{command} --output_dir {source}")) == 0
    long = "The planet Mars is red. " * 300
    calls = [
        {"query": QUERY, "documents": TEXTS},
        {"query": QUERY, "documents": [*TEXTS, long], "instruction": INSTRUCTION},
    ]
    done = subprocess.run(
        [
            str(VLLM_PYTHON), str(ROOT / "tests/compat/vllm_offline.py"),
            str(ROOT / "recipes/05_vllm_offline.py"), str(source),
        ],
        input=json.dumps(calls), env=VLLM_ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    with Reranker(str(model), dtype="float32", max_length=1024, **settings) as reranker:
        for call, log_odds, truncated in zip(
            calls, found["recipe"], found["truncated"], strict=True
        ):
            ranking = sorted(reranker.rank(**call), key=lambda result: result.index)
            check(log_odds, [r.log_odds for r in ranking], 1e-4)
            assert truncated == [r.truncated for r in ranking]
        scores = reranker.score(QUERY, TEXTS)
    check(found["score"], scores)  # LLM.score with our template
