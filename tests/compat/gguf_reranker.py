"""A checkpoint of random weights as a GGUF file that llama.cpp reranks with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from qwen3_reranker.prompt import QWEN3_RERANKER

_YES, _NO = 9693, 2152


def write_rank_gguf(folder: Path, file: Path, *, with_template: bool = True) -> Path:
    """Write a Qwen3 checkpoint with a yes/no head, and the prompt or none.

    llama.cpp wants the head as `cls.output.weight`, two rows whose softmax is the score, and the
    prompt as a chat template called "rerank"; without one it joins query and document bare.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    if with_template:
        template = QWEN3_RERANKER
        head = template.head(template.default_instruction, "{query}")
        prompt = template.prefix + head + " {document}" + template.suffix
        writer.add_chat_template([{"name": "rerank", "template": prompt}])
    _add_tensors(writer, load_file(folder / "model.safetensors"), config["num_hidden_layers"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: gguf.GGUFWriter, state: dict[str, Any]) -> None:
    """Add a Qwen tokenizer, from the content of its tokenizer.json."""
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    vocabulary = {**state["model"]["vocab"], **added}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in added else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(added["<|im_end|>"])
    writer.add_pad_token_id(added["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_tensors(
    writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray[Any, Any]], num_layers: int
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, num_layers)
    for name, tensor in tensors.items():
        stem = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{stem}.weight", tensor.astype(np.float32))
    rows = tensors["model.embed_tokens.weight"][[_YES, _NO]]
    writer.add_tensor("cls.output.weight", rows.astype(np.float32))
