"""`export --format gguf`: one file that llama.cpp's rerank server takes.

Decides what such a file holds: the decoder in its own dtype, the tokenizer, the prompt with its
instruction, and the yes/no row as a rank head. llama.cpp knows that head for the Qwen3 architecture
alone: a Llama or Qwen2 file with one does not load there ("wrong number of tensors"), and without
one the score would be a number of the hidden state. Its server keeps keys and values in float16
unless told otherwise, which moves scores by up to 6e-4. Knows nothing of other formats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qwen3_reranker.errors import InputError, MissingExtraError
from qwen3_reranker.model.loading import yes_no_row
from qwen3_reranker.model.network import YesNoCrossEncoder

from .whole import SAMPLE, Whole

FILE = "model.gguf"
_HEAD = "cls.output.weight"
_PROMPT = "tokenizer.chat_template.rerank"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizer cuts a text into words; llama.cpp knows it by the name `qwen2`."""


def write_gguf(whole: Whole, folder: Path) -> None:
    """Write the file.

    Raises:
        InputError: If llama.cpp could not score with the model.
        MissingExtraError: If gguf is not installed.
    """
    gguf = _gguf()
    config, tokenizer = whole.full.config, json.loads(whole.tokenizer_json)
    _refuse_what_llama_cpp_lacks(config, tokenizer)
    writer = gguf.GGUFWriter(folder / FILE, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    # Texts go into these holes; a request brings no instruction.
    prompt = whole.tokenizer.template.render(whole.instruction, "{query}", "{document}")
    writer.add_chat_template([{"name": "rerank", "template": prompt}])
    end = whole.tokenizer.template.control_tokens[1]
    add_tokenizer(writer, tokenizer, config.vocab_size, end=end)
    for name, tensor in _tensors(whole).items():
        kind = next(kind for kind, dtype in _DTYPES.items() if dtype is tensor.dtype)
        values = tensor.detach().contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, state: dict[str, Any], size: int, *, end: str) -> None:
    """Add a Qwen tokenizer.

    Args:
        writer: A GGUFWriter.
        state: Content of its `tokenizer.json`.
        size: Rows of the embedding, which may be more than there are tokens.
        end: The token that closes a turn.
    """
    kind = _gguf().TokenType
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    by_id = {id: token for token, id in {**state["model"]["vocab"], **added}.items()}
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(size)]
    kinds = [kind.NORMAL if id in by_id else kind.UNUSED for id in range(size)]
    for id in added.values():
        kinds[id] = kind.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(added[end])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _tensors(whole: Whole) -> dict[str, torch.Tensor]:
    """Return head and decoder by their names in the file.

    llama.cpp takes the softmax of two rows; that of W[yes] - W[no] and 0 is the score. The head is
    in float32, and so is what has one dimension, which llama.cpp wants.
    """
    row = yes_no_row(whole.full, whole.tokenizer)
    tensors = {_HEAD: torch.stack([row, torch.zeros_like(row)])}
    decoder = whole.full.base_model.state_dict()
    for name, file_name in _names(whole).items():
        tensor = decoder[name]
        tensors[file_name] = tensor.float() if tensor.ndim == 1 else tensor
    return tensors


def _names(whole: Whole) -> dict[str, str]:
    """Return the name in the file of each tensor of the decoder."""
    gguf = _gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, whole.full.config.num_hidden_layers)
    return {
        name: names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        for name in whole.full.base_model.state_dict()
    }


def _refuse_what_llama_cpp_lacks(config: Any, tokenizer: dict[str, Any]) -> None:
    rope = config.rope_parameters.get("rope_type", "default")
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
    words = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    problem = None
    if config.model_type != "qwen3":
        problem = f"llama.cpp reranks with Qwen3 decoders alone, this one is {config.model_type}"
    elif rope != "default":
        problem = f"its rotary embedding is {rope!r}, which the file could not carry"
    elif words != [_WORDS]:
        problem = "its tokenizer cuts words otherwise than Qwen's"
    if problem:
        raise InputError(
            f"the model cannot become a GGUF reranker: {problem}. Use --format seq-cls, or serve "
            "it by: qwen3-reranker serve MODEL"
        )


@torch.no_grad()
def score_gguf(whole: Whole, folder: Path) -> NDArray[np.float64]:
    """Return the log-odds of the sample by what stands in the file.

    Its tensors go into the model they came from, which is not needed any more; its tokens, merges
    and prompt are read as llama.cpp reads them.
    """
    # Copy on write: torch warns of arrays that it could not write to.
    reader = _gguf().GGUFReader(folder / FILE, "c")
    tensors = {tensor.name: _values(tensor) for tensor in reader.tensors}
    decoder = whole.full.base_model
    decoder.load_state_dict({name: tensors[known] for name, known in _names(whole).items()})
    yes, no = tensors[_HEAD]
    network = YesNoCrossEncoder(decoder.eval(), yes - no)
    encode = _read_tokenizer(whole, reader).encode
    prompt = reader.fields[_PROMPT].contents()
    texts = [
        prompt.replace("{query}", query).replace("{document}", document)
        for query, documents in SAMPLE
        for document in documents
    ]
    ids = [np.array(encode(text, add_special_tokens=False).ids) for text in texts]
    return np.array([float(network.forward_alone(each)) for each in ids])


def _values(tensor: Any) -> torch.Tensor:
    """Return a tensor that a GGUFReader has read, in its own dtype."""
    values = torch.from_numpy(tensor.data)
    return values.view(_DTYPES[tensor.tensor_type.name])


def _read_tokenizer(whole: Whole, reader: Any) -> Tokenizer:
    """Return the model's tokenizer with the tokens and merges of a file."""
    tokens, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")
    )
    state = json.loads(whole.tokenizer_json)
    state["model"]["vocab"] = {token: id for id, token in enumerate(tokens)}
    state["model"]["merges"] = [merge.split(" ") for merge in merges]
    return Tokenizer.from_str(json.dumps(state))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError.of("writing a GGUF file", error.name, "gguf") from error
    return gguf
