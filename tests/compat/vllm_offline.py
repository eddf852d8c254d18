"""The recipe of vLLM without a server, on what standard input asks; for the environment of vLLM.

python vllm_offline.py RECIPE MODEL     prints log-odds by the recipe, and by `LLM.score`
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

from qwen3_reranker.cli.vllm_command import vllm_settings


def main(recipe: str, model: str) -> None:
    """Score calls of a query, documents and an instruction."""
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    calls = json.load(sys.stdin)
    reranker = module.VllmReranker(model, dtype="float32", max_model_len=1024, enforce_eager=True)
    found: dict[str, list[Any]] = {"recipe": [], "truncated": [], "score": []}
    for call in calls:
        ranking = sorted(reranker.rank(**call), key=lambda result: result.index)
        found["recipe"].append([result.log_odds for result in ranking])
        found["truncated"].append([result.truncated for result in ranking])
    template = vllm_settings(model)[1].read_text(encoding="utf-8")
    query, documents = calls[0]["query"], calls[0]["documents"]
    outputs = reranker._llm.score(query, documents, chat_template=template, use_tqdm=False)
    found["score"] = [output.outputs.score for output in outputs]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
