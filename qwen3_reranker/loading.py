"""From a name or folder to a network that is known to score exactly.

Decides which checkpoints are admitted, the device, the dtype and the token budget, and refuses
whatever the packed forward would get wrong. Only safetensors and GGUF files are read, and no code
from a checkpoint is ever run.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .attention import NAME as PACKED_ATTENTION
from .attention import choose_backend
from .errors import ModelLoadError
from .model import YesNoCrossEncoder
from .packing import Pack, build_pack, merge_duplicates, plan_packs
from .prompt import TEMPLATES, PromptTemplate
from .tokenization import PromptTokenizer

logger = logging.getLogger(__name__)

ADAPTER_RECORD = "qwen3_reranker.json"
"""File beside an adapter's weights that records what it was trained with."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SUPPORTED = ("qwen3", "qwen2", "llama")
# Their frequencies change with the longest position of a forward, so a score would depend on the
# other documents of its pack.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_CPU_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint that passed its self-test, and how it is run.

    Attributes:
        network: The scoring network.
        tokenizer: Encodes prompts of the template the checkpoint was trained with.
        max_positions: Longest prompt the checkpoint knows, in tokens.
        max_batch_tokens: Linear tokens per pack.
        max_attention_tokens: Attention tokens per pack, None where nothing is gathered.
        backend: Attention backend.
        choices: Setting -> its value and the reason, for `doctor`.
    """

    network: YesNoCrossEncoder
    tokenizer: PromptTokenizer
    max_positions: int
    max_batch_tokens: int
    max_attention_tokens: int | None
    backend: str
    choices: dict[str, str]


def load_model(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    template: PromptTemplate | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    max_batch_tokens: int | None = None,
) -> LoadedModel:
    """Load a causal or one-label sequence-classification checkpoint for scoring.

    Args:
        model: Hub name, folder, or path of a GGUF file.
        dtype: "float32", "bfloat16", "float16", or None for the default of the device.
        device: A torch device, or None for CUDA where available, else CPU.
        template: The prompt, or None to take the adapter's or what the tokenizer can express.
        adapter: Folder or Hub name of LoRA weights, merged in float32.
        revision: Revision of a Hub model.
        max_batch_tokens: Token budget of a pack, or None to take it from device and memory.

    Raises:
        ModelLoadError: If anything about the checkpoint is missing, unsupported or inconsistent.
    """
    torch_device = _choose_device(device)
    folder, gguf_file = locate(model, revision)
    config = read_config(folder, gguf_file)
    _refuse_unsupported(config, model)
    serving_dtype, dtype_reason = _choose_dtype(dtype, torch_device, config)
    adapter_folder = None if adapter is None else locate(adapter, None)[0]
    chosen_template = _choose_template(template, adapter_folder)
    tokenizer = PromptTokenizer(read_tokenizer(folder, gguf_file), chosen_template)

    # An adapter is merged in float32, otherwise the checkpoint's own dtype holds the head exactly.
    loading_dtype = "auto" if adapter_folder is None and gguf_file is None else torch.float32
    full = read_weights(folder, gguf_file, config, loading_dtype)
    if adapter_folder is not None:
        full = _merge_adapter(full, adapter_folder)
    head = _yes_no_row(full, tokenizer)
    decoder = full.base_model
    del full
    network = YesNoCrossEncoder(
        decoder.to(torch_device, serving_dtype).eval().requires_grad_(False), head.to(torch_device)
    )
    backend, backend_reason = choose_backend(torch_device)
    if max_batch_tokens is None:
        max_batch_tokens = default_batch_tokens(torch_device, config, serving_dtype)
    _self_test(network, tokenizer, backend)
    return LoadedModel(
        network=network,
        tokenizer=tokenizer,
        max_positions=config.max_position_embeddings,
        max_batch_tokens=max_batch_tokens,
        max_attention_tokens=None if backend == "documents" else 4 * max_batch_tokens,
        backend=backend,
        choices={
            "architecture": f"{config.architectures[0]} ({config.num_hidden_layers} layers, "
            f"hidden size {config.hidden_size})",
            "device": str(torch_device),
            "dtype": f"{str(serving_dtype).removeprefix('torch.')} ({dtype_reason})",
            "attention": f"{backend} ({backend_reason})",
            "template": f"{tokenizer.template.id} ({tokenizer.template.hash[:12]})",
            "token budget": f"{max_batch_tokens} per pack",
            "longest prompt": f"{config.max_position_embeddings} tokens",
        },
    )


def locate(model: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the local folder of a checkpoint and, for a GGUF file, its name.

    Raises:
        ModelLoadError: If it is neither on disk nor to be had from the Hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"model is the file '{model}', but only .gguf files load alone. Pass the folder "
                "that holds config.json, tokenizer.json and the safetensors files."
            )
        return path.parent, path.name
    try:
        # Patterns keep pickled weights off the disk as well as out of the process.
        folder = snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt"]
        )
    except HFValidationError as error:
        raise ModelLoadError(
            f"model '{model}' is not a folder here and not a Hub name either. Check the path."
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"model '{model}' could not be fetched from the Hub ({type(error).__name__}). Check "
            "the name, the connection and HF_TOKEN, or pass a local folder."
        ) from error
    return Path(folder), None


def default_batch_tokens(device: torch.device, config: Any, dtype: torch.dtype) -> int:
    """Return a token budget from the device and its free memory.

    CPU linear layers are fastest while activations stay in cache, and gain nothing past a few
    hundred rows. A GPU wants as many tokens as a fifth of its free memory holds: a layer keeps
    about four hidden states and three MLP activations alive per token.
    """
    if device.type != "cuda":
        return _CPU_BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    per_token = (4 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize
    return int(min(32768, max(1024, free // 5 // per_token)))


def read_config(folder: Path, gguf_file: str | None) -> Any:
    """Return the transformers configuration of a checkpoint.

    Raises:
        ModelLoadError: If there is none, or it asks for code of its own.
    """
    if gguf_file is None:
        file = folder / "config.json"
        if not file.is_file():
            raise ModelLoadError(
                f"'{folder}' has no config.json, so it is not a checkpoint. Pass a folder written "
                "by save_pretrained, a .gguf file or a Hub name."
            )
        if "auto_map" in _read_json(file):
            raise ModelLoadError(
                f"'{file}' asks for code of its own (auto_map), which is never run here. Use a "
                "checkpoint in the standard Qwen3 format."
            )
    try:
        extra = {} if gguf_file is None else {"gguf_file": gguf_file}
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **extra)
    except Exception as error:
        raise ModelLoadError(
            f"the configuration of '{folder}' cannot be read ({type(error).__name__}). Supported "
            f"decoders: {', '.join(_SUPPORTED)}."
        ) from error
    if not config.architectures:  # GGUF files do not say
        config.architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
    return config


def _refuse_unsupported(config: Any, model: str) -> None:
    architecture = config.architectures[0]
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    problem = None
    if config.model_type not in _SUPPORTED:
        problem = f"its decoder is {config.model_type!r}, not one of {', '.join(_SUPPORTED)}"
    elif not architecture.endswith(("ForCausalLM", "ForSequenceClassification")):
        problem = f"its architecture is {architecture}, which has no yes/no head"
    elif architecture.endswith("ForSequenceClassification") and config.num_labels != 1:
        problem = f"it classifies into {config.num_labels} labels, a reranker has one"
    elif others:
        problem = f"it has layers of type {', '.join(sorted(others))}, packs need full attention"
    elif getattr(config, "attn_logit_softcapping", None):
        problem = "its attention scores are soft-capped"
    elif rope in _LENGTH_DEPENDENT_ROPE:
        problem = f"its rotary embedding is {rope!r}, so scores would depend on pack companions"
    if problem:
        raise ModelLoadError(
            f"'{model}' cannot be packed exactly: {problem}. Use a Qwen3-Reranker checkpoint or "
            "a fine-tune of one."
        )


def read_tokenizer(folder: Path, gguf_file: str | None) -> str:
    """Return the content of a checkpoint's `tokenizer.json`.

    Raises:
        ModelLoadError: If there is none.
    """
    if gguf_file is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        return str(tokenizer.backend_tokenizer.to_str())
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelLoadError(
            f"'{folder}' has no tokenizer.json. Copy the one of the base model into it."
        )
    return file.read_text(encoding="utf-8")


def read_weights(
    folder: Path,
    gguf_file: str | None,
    config: Any,
    dtype: str | torch.dtype,
    *,
    attention: str = PACKED_ATTENTION,
) -> Any:
    """Load every tensor the architecture asks for, or fail: none is ever left at random.

    Returns:
        A transformers model with its head, of the architecture that the configuration names.

    Raises:
        ModelLoadError: If a file is broken or a tensor is missing.
    """
    is_causal = config.architectures[0].endswith("ForCausalLM")
    auto: Any = (
        transformers.AutoModelForCausalLM
        if is_causal
        else (transformers.AutoModelForSequenceClassification)
    )
    extra: dict[str, Any] = {"use_safetensors": True}
    if gguf_file is not None:
        extra = {
            "gguf_file": gguf_file,
            "quantization_config": transformers.GgufConfig(gguf_file=gguf_file, dequantize=True),
        }
    try:
        full, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:
        raise ModelLoadError(
            f"the weights in '{folder}' cannot be read ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Only complete "
            "safetensors or GGUF files load; fetch the checkpoint again."
        ) from error
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        raise ModelLoadError(
            f"the checkpoint in '{folder}' lacks {len(lacking)} tensors that "
            f"{config.architectures[0]} needs, the first is {lacking[0]}; left alone they would be "
            "random and so would every score. Fetch the checkpoint again."
        )
    return full


def _merge_adapter(full: Any, folder: Path) -> Any:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelLoadError(
            f"adapter '{folder}' has no adapter_model.safetensors. Save it with "
            "save_pretrained; pickled weights are never read."
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelLoadError(
            f"adapter '{folder}' needs peft, which is not installed. Run: "
            'pip install "qwen3-reranker[finetune]"'
        ) from error
    try:
        return PeftModel.from_pretrained(full, folder).merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ModelLoadError(
            f"adapter '{folder}' does not fit the base model ({type(error).__name__}). Load it on "
            "the base it was trained on."
        ) from error


def _yes_no_row(full: Any, tokenizer: PromptTokenizer) -> torch.Tensor:
    """Return W[yes] - W[no] in float32.

    From the output head, never the embedding: the 8B's are not tied.
    """
    if hasattr(full, "score"):
        row: torch.Tensor = full.score.weight[0].float()
    else:
        weight = full.get_output_embeddings().weight
        row = weight[tokenizer.yes_id].float() - weight[tokenizer.no_id].float()
    return row.detach().clone()


def _choose_device(device: str | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(
            f"device {device!r} cannot be used here. Pass 'cpu', 'cuda', or None to choose."
        ) from error
    return chosen


def _choose_dtype(dtype: str | None, device: torch.device, config: Any) -> tuple[torch.dtype, str]:
    if dtype is not None:
        return DTYPES[dtype], "asked for"
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.type == "cuda":
        return stored, "the checkpoint's own"
    if stored is torch.bfloat16 and device.type == "cpu" and cpu_has_bfloat16():
        return stored, "the checkpoint's own, and this CPU multiplies it natively"
    return torch.float32, "exact, and fastest without native bfloat16"


def cpu_has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _choose_template(
    asked: PromptTemplate | None, adapter_folder: Path | None
) -> PromptTemplate | None:
    """Return the template asked for or recorded by the adapter; None leaves it to the tokenizer."""
    if adapter_folder is None:
        return asked
    record_file = adapter_folder / ADAPTER_RECORD
    if not record_file.is_file():
        logger.warning(
            "Adapter '%s' has no %s, so its prompt cannot be checked.",
            adapter_folder,
            ADAPTER_RECORD,
        )
        return asked
    try:
        record = _read_json(record_file)["template"]
        recorded_id, recorded_hash = record["id"], record["hash"]
    except (KeyError, TypeError) as error:
        raise ModelLoadError(
            f"'{record_file}' has no template id and hash. Train the adapter again, or delete the "
            "file to load it unchecked."
        ) from error
    known = asked or TEMPLATES.get(recorded_id)
    if known is None or (known.id, known.hash) != (recorded_id, recorded_hash):
        here = f"{known.id!r} ({known.hash[:12]})" if known else "unknown"
        raise ModelLoadError(
            f"adapter '{adapter_folder}' was trained with template {recorded_id!r} "
            f"({recorded_hash[:12]}), but the prompt here is {here}, which would change its "
            "scores. Pass template=None, or the PromptTemplate that trained it."
        )
    return known


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"'{file}' is not valid JSON. Fetch it again.") from error
    return content


@torch.inference_mode()
def _self_test(network: YesNoCrossEncoder, tokenizer: PromptTokenizer, backend: str) -> None:
    """Score a pack of unequal documents and each alone by the library's own attention."""
    group = tokenizer.encode_group("Test", "a b", ["", "one two three four"], max_length=1024)
    merged, _ = merge_duplicates([group])
    (seats,) = plan_packs(merged, max_batch_tokens=4096)
    pack: Pack = build_pack(merged, seats, backend=backend)
    packed = network.forward(pack)
    order = [d for seat in seats for d in seat.documents]
    alone = torch.cat(
        [
            network.forward_alone(np.concatenate([group.head, group.documents[d]]).astype(np.int64))
            for d in order
        ]
    )
    # Rounding, with room to spare: a mask, position or rotation that is off moves scores by more.
    is_exact = network.decoder.dtype is torch.float32
    tolerance = (1e-3 if is_exact else 0.25) + (1e-4 if is_exact else 0.05) * alone.abs().max()
    if not bool(((packed - alone).abs() <= tolerance).all()):
        raise ModelLoadError(
            "packed scores differ from plain ones by "
            f"{(packed - alone).abs().max().item():.2g} in log-odds, so this decoder cannot be "
            f"packed with transformers {transformers.__version__}. Use a supported checkpoint, "
            "and report this one."
        )
