"""From a name or folder to a network that is known to score exactly.

Decides the device, the dtype, the prompt and the token budget, and lets no network out that fails
its self-test. Knows nothing of how files are read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers

from ..checkpoint.adapters import merge_adapter, scoring_fingerprint, template_of
from ..checkpoint.files import read_tokenizer, read_weights
from ..checkpoint.locate import locate, open_checkpoint
from ..engine.packing import Budget, build_pack, merge_duplicates, plan_packs
from ..errors import ModelLoadError, named
from ..text.prompt import PromptTemplate
from ..text.tokenizer import PromptTokenizer
from .attention import NAME as PACKED_ATTENTION
from .attention import choose_backend
from .cpu_trials import bfloat16_pays, prepacking_pays
from .network import YesNoCrossEncoder
from .prepacked import PrepackedLinear, prepacked
from .quantized import Int8Linear, replace_linears, weights_alone

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU_BATCH_TOKENS = 2048

_HEAD_CACHE_BYTES = 256 * 2**20
"""Instructions take 60 tokens each, 14 MB for the 0.6B in float32."""

ReadSample: TypeAlias = Callable[[], tuple[str, list[str]]]
"""Returns a query and documents."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint that passed its self-test, and how it is run.

    Attributes:
        network: The scoring network.
        tokenizer: Encodes prompts of the template the checkpoint was trained with.
        max_positions: Longest prompt the checkpoint knows, in tokens.
        budget: What a pack may hold.
        backend: Attention backend.
        fingerprint: Hash of the weights, those of the adapter merged.
        choices: Setting -> its value and the reason, for `doctor`.
    """

    network: YesNoCrossEncoder
    tokenizer: PromptTokenizer
    max_positions: int
    budget: Budget
    backend: str
    fingerprint: str
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
    exact: bool = False,
    read_sample: ReadSample | None = None,
) -> LoadedModel:
    """Load a causal or one-label sequence-classification checkpoint for scoring.

    Args:
        model: Hub name, folder, or path of a GGUF file.
        dtype: One of `call.arguments.DTYPES`, or None for the default of the device.
        device: A torch device, or None for CUDA where available, else CPU.
        template: The prompt, or None to take the adapter's or what the tokenizer can express.
        adapter: Folder or Hub name of LoRA weights, merged in float32.
        revision: Revision of a Hub model.
        max_batch_tokens: Token budget of a pack, or None to take it from device and memory.
        exact: Whether every document travels alone.
        read_sample: Returns a query and documents by which the error of 8 bits is measured, for
            `LoadedModel.choices`; None leaves it unmeasured.

    Raises:
        ModelLoadError: If anything about the checkpoint is missing, unsupported or inconsistent.
        MissingExtraError: If the dtype needs a library that is not installed.
    """
    torch_device = _choose_device(device)
    folder, gguf_file, config = open_checkpoint(model, revision)
    serving_dtype, dtype_reason = _choose_dtype(dtype, torch_device, config)
    adapter_folder = None if adapter is None else locate(adapter, None, "adapter")[0]
    template = template_of(template, folder, adapter_folder)
    tokenizer = PromptTokenizer(read_tokenizer(folder, gguf_file), template)

    # An adapter is merged in float32, otherwise the checkpoint's own dtype holds the head exactly.
    loading_dtype = "auto" if adapter_folder is None and gguf_file is None else torch.float32
    full = read_weights(folder, gguf_file, config, loading_dtype, attention=PACKED_ATTENTION)
    if adapter_folder is not None:
        full = merge_adapter(full, adapter_folder)
    head = yes_no_row(full, tokenizer)
    fingerprint = scoring_fingerprint(full, head)
    decoder = full.base_model
    del full
    of_weights = weights_alone(dtype, torch_device)
    if of_weights is not None:
        replace_linears(decoder, partial(of_weights, device=torch_device))
    network = YesNoCrossEncoder(
        cast_weights(decoder, torch_device, serving_dtype).eval().requires_grad_(False),
        head.to(torch_device),
        max_cached_tokens=(max_cached_tokens := cached_tokens(config, serving_dtype)),
    )
    backend, backend_reason = choose_backend(torch_device, serving_dtype, attention_sizes(config))
    if max_batch_tokens is None:
        max_batch_tokens = default_batch_tokens(torch_device, config, serving_dtype)
    network.is_lean = torch_device.type in ("cpu", "cuda")
    try:
        self_test(network, tokenizer, backend, config.max_position_embeddings)
    except Exception as error:
        if not network.is_lean:
            raise
        logger.warning("Layers run as transformers has them: lean, they failed (%s).",
                       type(error).__name__)  # fmt: skip
        network.is_lean = False
        self_test(network, tokenizer, backend, config.max_position_embeddings)
    if dtype == "int8" and of_weights is None:
        dtype_reason = quantise(network, tokenizer, backend, read_sample)
    matrices = "quantised" if dtype in ("int8", "nf4") else prepack(decoder, torch_device)
    return LoadedModel(
        network=network,
        tokenizer=tokenizer,
        max_positions=config.max_position_embeddings,
        budget=Budget(
            max_batch_tokens,
            attention_budget(backend, max_batch_tokens),
            0 if exact else max_cached_tokens,
            1 if exact else None,
        ),
        backend=backend,
        fingerprint=fingerprint,
        choices={
            "architecture": f"{config.architectures[0]} ({config.num_hidden_layers} layers, "
            f"hidden size {config.hidden_size})",
            "device": str(torch_device),
            "dtype": f"{dtype or str(serving_dtype).removeprefix('torch.')} ({dtype_reason})",
            "attention": f"{backend} ({backend_reason})",
            "layers": "lean: in place" if network.is_lean else "as transformers has them",
            "matrices": matrices,
            "template": f"{tokenizer.template.id} ({tokenizer.template.hash[:12]})",
            "token budget": f"{max_batch_tokens} per pack",
            "head cache": "off, exact" if exact else f"{max_cached_tokens} tokens",
            "longest prompt": f"{config.max_position_embeddings} tokens",
        },
    )


def attention_budget(backend: str, max_batch_tokens: int) -> int | None:
    """Return the attention tokens a pack may have, None for a backend that gathers nothing."""
    return 4 * max_batch_tokens if backend == "padded" else None


def cached_tokens(config: Any, dtype: torch.dtype) -> int:
    """Return how many tokens of heads' beginnings may be kept."""
    _, key_heads, size = attention_sizes(config)
    return int(
        _HEAD_CACHE_BYTES // (2 * config.num_hidden_layers * key_heads * size * dtype.itemsize)
    )


def attention_sizes(config: Any) -> tuple[int, int, int]:
    """Return heads, key heads and head size."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, config.num_key_value_heads, size


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


def cast_weights(decoder: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a decoder and cast its weights, but not its buffers.

    `Module.to` would round the rotary frequencies as well, which the library keeps in float32: at
    position 1,000 that alone doubles the error of half precision.
    """
    for parameter in decoder.parameters():
        if parameter.is_floating_point():  # what is quantised stays so
            parameter.data = parameter.data.to(device, dtype)
    return decoder.to(device)


def yes_no_row(full: Any, tokenizer: PromptTokenizer) -> torch.Tensor:
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
        is_cpu_build = "cuda" in str(device) and not torch.version.cuda
        why = ": this torch is a build without CUDA" if is_cpu_build else ""
        raise ModelLoadError(
            f"device {named(device)} cannot be used here{why}. Pass one that can, or None to "
            "choose."
        ) from error
    return chosen


def _choose_dtype(dtype: str | None, device: torch.device, config: Any) -> tuple[torch.dtype, str]:
    """Return the dtype of what is not quantised, and why."""
    if weights_alone(dtype, device) is not None:
        own, _ = _choose_dtype(None, device, config)
        bits = 4 if dtype == "nf4" else 8
        return own, f"asked for; {bits} bits a weight, computed in {str(own).split('.')[1]}"
    if dtype == "int8":
        return torch.float32, ""
    if dtype is not None:
        return DTYPES[dtype], "asked for"
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.type == "cuda":
        return stored, "the checkpoint's own"
    if device.type != "cpu":
        return torch.float32, "exact"
    if not bfloat16_pays():
        return torch.float32, "exact, and fastest on this CPU"
    if stored is torch.bfloat16:
        return stored, "the checkpoint's own, and faster than float32 on this CPU"
    return torch.float32, "exact; bfloat16 is faster on this CPU"


def quantise(
    network: YesNoCrossEncoder,
    tokenizer: PromptTokenizer,
    backend: str,
    read_sample: ReadSample | None = None,
) -> str:
    """Round the layers' matrices to 8 bits; return what that does to scores, for `doctor`."""
    if read_sample is None:
        replace_linears(network.decoder, Int8Linear)
        return "asked for"
    query, texts = read_sample()
    group = tokenizer.encode_group(None, query, texts, max_length=512)
    merged, _ = merge_duplicates([group])
    plans = plan_packs(merged, Budget(_CPU_BATCH_TOKENS))
    packs = [build_pack(merged, seats, backend=backend) for seats in plans]
    exact = np.concatenate([network.score(pack) for pack in packs])
    replace_linears(network.decoder, Int8Linear)
    rounded = np.concatenate([network.score(pack) for pack in packs])
    error = float(np.sqrt(np.mean((rounded - exact) ** 2)))
    return (
        f"asked for; log-odds of {len(exact)} sample pairs are {error:.2f} off float32's "
        f"(root mean square), which spread by {float(exact.std()):.2f}"
    )


def prepack(decoder: Any, device: torch.device) -> str:
    """Pack the layers' matrices where this CPU gains by it; return what was done, for `doctor`."""
    if device.type != "cpu" or not prepacking_pays(decoder.dtype):
        return "as torch has them"
    replace_linears(decoder, prepacked)
    for parameter in decoder.parameters():  # lets go of a file whose weights are here twice now
        parameter.data = parameter.data.clone()
    packed = [isinstance(each, PrepackedLinear) for each in decoder.layers.modules()]
    left = [isinstance(each, torch.nn.Linear) for each in decoder.layers.modules()]
    return f"{sum(packed)} packed for oneDNN, which is faster on this CPU, {sum(left)} left"


@torch.inference_mode()
def self_test(
    network: YesNoCrossEncoder, tokenizer: PromptTokenizer, backend: str, max_positions: int
) -> None:
    """Score a pack of unequal documents and each alone by the library's own attention.

    On the first two layers and in float32: in half precision rounding hides a mask or position
    that is off, and every layer of a decoder is of one kind. A backend for half precision alone
    has been compared with the padded one, which stands in for it.
    """
    backend = "padded" if backend == "varlen" else backend
    decoder = network.decoder
    shallow = SimpleNamespace(
        embed_tokens=lambda ids: decoder.embed_tokens(ids).float(),
        rotary_emb=decoder.rotary_emb,
        layers=copy.deepcopy(decoder.layers[:2]).float(),
        norm=decoder.norm,
    )
    probe = YesNoCrossEncoder(shallow, network.head, is_lean=network.is_lean)
    groups = [
        tokenizer.encode_group("Test", query, documents, max_length=min(1024, max_positions))
        for query, documents in (("a b", ["", "one two three", "word " * 600]), ("c", ["x", "y z"]))
    ]
    merged, _ = merge_duplicates(groups)
    (seats,) = plan_packs(merged, Budget(10_000))
    layouts = [
        [replace(seat, num_cached=num_cached(merged[seat.group])) for seat in seats]
        for num_cached in (
            lambda group: 0, lambda group: group.num_shared, lambda group: len(group.head)
        )
    ]  # fmt: skip
    packed = torch.stack(
        [probe(build_pack(merged, layout, backend=backend)) for layout in layouts]
    )  # (layouts, documents)
    alone = torch.cat(
        [
            probe.forward_alone(
                np.concatenate([merged[seat.group].head, merged[seat.group].documents[d]]).astype(
                    np.int64
                )
            )
            for seat in seats
            for d in seat.documents
        ]
    )
    largest = (packed - alone).abs().max().item()
    # Far above rounding and far below what a wrong mask, position or rotation does; NaN fails.
    if not largest <= 1e-3 + 1e-4 * alone.abs().max().item():
        raise ModelLoadError(
            f"packed scores differ from plain ones by {largest:.2g} in log-odds, so this decoder "
            f"cannot be packed with transformers {transformers.__version__}. Use a supported "
            "checkpoint, and report this one."
        )
