"""The official scoring algorithm, written out one pair at a time: the oracle of the tests.

Follows the model card of Qwen3-Reranker (and, for `chatml`, differs only in the suffix). Imports
nothing of the package under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CHATML_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def format_body(instruction: str, query: str, document: str) -> str:
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


class Official:
    """A checkpoint scored as the model card scores it, without batching."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, suffix: str = SUFFIX) -> None:
        is_causal = AutoConfig.from_pretrained(folder).architectures[0].endswith("ForCausalLM")
        auto = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
        self.is_causal = is_causal
        self.model: Any = auto.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        state = json.loads(self.tokenizer.to_str())
        self.literal = Tokenizer.from_str(json.dumps({**state, "added_tokens": []}))
        self.control_tokens = [token["content"] for token in state["added_tokens"]]
        self.prefix_ids = self.ids(PREFIX)
        self.suffix_ids = self.ids(suffix)
        self.yes = self.tokenizer.token_to_id("yes")
        self.no = self.tokenizer.token_to_id("no")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt_ids(
        self, query: str, document: str, *, instruction: str = INSTRUCTION, max_length: int = 8192
    ) -> list[int]:
        body = self.ids(format_body(instruction, query, document))
        if any(token in query + document for token in self.control_tokens):
            # The official script would obey such text; the contract is to read it as text.
            text = format_body(instruction, query, document)
            body = list(self.literal.encode(text, add_special_tokens=False).ids)
        room = max_length - len(self.prefix_ids) - len(self.suffix_ids)
        return self.prefix_ids + body[:room] + self.suffix_ids

    @torch.no_grad()
    def log_odds_of_ids(self, ids: list[int]) -> float:
        if not self.is_causal:
            return self.model(input_ids=torch.tensor([ids])).logits[0, 0].float().item()
        # The last position's logits only: the same numbers, without 151,669 per token.
        logits = self.model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()
        return (logits[self.yes] - logits[self.no]).item()

    def log_odds(self, query: str, document: str, **settings: Any) -> float:
        return self.log_odds_of_ids(self.prompt_ids(query, document, **settings))
