"""`merge`: an adapter into its base, or several checkpoints of one kind into one.

Decides what may be merged and by which weights. All sums are taken in float32 or better, and what
is written is scored before it stands under its name. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen3_reranker.checkpoint.adapters import (
    ADAPTER_RECORD,
    ADAPTER_WEIGHTS,
    adapter_weights,
    template_of,
)
from qwen3_reranker.checkpoint.files import read_tokenizer
from qwen3_reranker.checkpoint.folder import read_json
from qwen3_reranker.checkpoint.locate import locate, open_checkpoint
from qwen3_reranker.errors import InputError
from qwen3_reranker.text.tokenizer import PromptTokenizer

from .output import MANIFEST, write_json
from .publish import deliver, write_card
from .served import next_step
from .whole import load_whole, refuse_difference, sample_scores

Coefficients: TypeAlias = Callable[[Callable[[], float]], Sequence[float]]
"""From the cosine between two tensors, computed where it is asked for, to the factor of each."""
_Lora: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A (rank, inputs) and B (outputs, rank), which is scaled."""

_OF_A_RUN = ("run.json", "report.json", MANIFEST)
"""What a training run tells of itself, and no longer holds."""
_PARITY = 1e-4
_PARALLEL = 0.9995
"""Cosine from which an arc is a straight line; the angle's sine would lose all digits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qwen3-finetune merge`; return 0.

    Raises:
        InputError: If what is asked for cannot be merged.
        ModelLoadError: If a checkpoint or adapter cannot be used.
        Qwen3RerankerError: If the result does not score as it should; nothing is left then.
    """
    arguments = _parser().parse_args(argv)
    models, adapters = arguments.model, arguments.adapter
    if len(models) == len(adapters) == 1:
        if arguments.method != "linear" or arguments.weights:
            raise InputError("an adapter is added whole. Leave --method and --weights out.")
        write = partial(merge_into_base, models[0], adapters[0])
    elif len(models or adapters) < 2 or (models and adapters):
        raise InputError(
            f"merge takes a model and an adapter, or several models, or several adapters; got "
            f"{len(models)} and {len(adapters)}. For a mean of adapters in their base, merge the "
            "adapters first."
        )
    else:
        factors = coefficients(arguments.method, arguments.weights, len(models or adapters))
        average = average_models if models else average_adapters
        write = partial(average, models or adapters, factors)
    output = deliver(arguments.output_dir, write, arguments.push_to_hub)
    print(next_step(str(output), None) if models else next_step(_base_of(output), str(output)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune merge",
        description="Merge an adapter into its base; or several models, or several adapters of one "
        "base, into one of their kind.",
    )
    parser.add_argument("--model", nargs="+", default=[], help="Hub names or folders")
    parser.add_argument("--adapter", nargs="+", default=[], help="LoRA weights")
    parser.add_argument(
        "--method", choices=("linear", "slerp"), default="linear",
        help="weighted mean, or the point on the arc between two",
    )  # fmt: skip
    parser.add_argument("--weights", nargs="+", type=float, help="one for each; default: equal")
    parser.add_argument("--output_dir", required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--push_to_hub", metavar="NAME", help="upload the result, privately if NAME is new"
    )
    return parser


def coefficients(method: str, weights: Sequence[float] | None, count: int) -> Coefficients:
    """Return how much of each checkpoint goes into the result, tensor by tensor.

    `linear` is the weighted mean. `slerp` is the point on the great arc between two tensors, seen
    as vectors (Shoemake 1985): sin((1-t) a) / sin(a) and sin(t a) / sin(a) at an angle a, with t
    the second one's share of the weights.

    Raises:
        InputError: If the weights do not fit.

    Example:
        >>> coefficients("linear", [1, 3], 2)(lambda: 0.0)
        [0.25, 0.75]
        >>> [round(c, 4) for c in coefficients("slerp", None, 2)(lambda: 0.5)]  # at 60 degrees
        [0.5774, 0.5774]
    """
    weights = [1.0] * count if weights is None else list(weights)
    is_usable = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
    if len(weights) != count or not is_usable:
        raise InputError(
            f"--weights must be {count} numbers that are not negative nor all 0, got {weights}. "
            "Leave it out for equal ones."
        )
    shares = [weight / sum(weights) for weight in weights]
    if method == "linear":
        return lambda cosine: shares
    if count != 2:
        raise InputError(
            f"slerp goes from one checkpoint to another, got {count}. Name two, or use linear."
        )

    def on_arc(cosine: Callable[[], float]) -> Sequence[float]:
        value = cosine()
        if not abs(value) < _PARALLEL:
            return shares
        angle = math.acos(value)
        return [math.sin(share * angle) / math.sin(angle) for share in shares]

    return on_arc


def merge_into_base(model: str, adapter: str, folder: Path) -> None:
    """Write a model with an adapter added in float32, rounded to its base's own dtype."""
    whole = load_whole(model, adapter)
    whole.save(folder)
    usage = f'qwen3_reranker.Reranker("{folder.name}")'
    write_card(folder, model, whole.tokenizer.template, whole.instruction, usage)
    found = sample_scores(str(folder), dtype=whole.dtype_name)
    expected = sample_scores(model, adapter=adapter, dtype=whole.dtype_name)
    refuse_difference("the merged model", "base and adapter", found, expected, _PARITY)


def average_models(models: Sequence[str], factors: Coefficients, folder: Path) -> None:
    """Write a model whose tensors lie between those of several, a file of the first at a time."""
    folders = [_model_folder(model) for model in models]
    places = [_places(each) for each in folders]
    for model, place in zip(models[1:], places[1:], strict=True):
        _refuse_unequal(models[0], model, set(places[0]), set(place))
    for file in sorted(set(places[0].values())):
        merged = {}
        for key in (key for key, place in places[0].items() if place == file):
            tensors = [_read(place[key], key) for place in places]
            if len({tensor.shape for tensor in tensors}) > 1:
                raise InputError(
                    f"'{key}' has other shapes in some of the models. Merge models of one base."
                )
            merged[key] = _between(tensors, factors).to(tensors[0].dtype).contiguous()
        save_file(merged, folder / file.name, metadata={"format": "pt"})
    for other in folders[0].iterdir():
        is_part = other.is_file() and other.suffix in (".json", ".txt", ".jinja")
        if is_part and other.name not in _OF_A_RUN:
            shutil.copyfile(other, folder / other.name)
    tokenizer_json = read_tokenizer(folder, None)
    template = PromptTokenizer(tokenizer_json, template_of(None, folder, None)).template
    usage = f'qwen3_reranker.Reranker("{folder.name}")'
    write_card(folder, models[0], template, template.default_instruction, usage)
    sample_scores(str(folder))  # it loads, passes the self-test, and its scores are finite


def _model_folder(model: str) -> Path:
    folder, gguf_file, _ = open_checkpoint(model, None)
    if gguf_file is not None:
        raise InputError(f"'{model}' is a GGUF file, whose weights are rounded. Pass a folder.")
    return folder


def _places(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file))
    return places


def _read(file: Path, key: str) -> torch.Tensor:
    with safe_open(str(file), "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(key)
    return tensor


def _between(tensors: Sequence[torch.Tensor], factors: Coefficients) -> torch.Tensor:
    """Return the weighted sum of tensors of one shape, in float32."""

    def cosine() -> float:
        first, second = (tensor.double().flatten() for tensor in tensors[:2])
        norms = float(first.norm() * second.norm())
        return float(first @ second) / norms if norms else 1.0

    total = torch.zeros(tensors[0].shape)
    for factor, tensor in zip(factors(cosine), tensors, strict=True):
        total += factor * tensor.float()
    return total


def average_adapters(adapters: Sequence[str], factors: Coefficients, folder: Path) -> None:
    """Write an adapter whose change of each layer lies between those of several.

    What LoRA adds to a layer is B A, and a sum of such products is a product again, of the factors
    side by side: exact, of a rank that is the sum of theirs.
    """
    folders = [locate(adapter, None, "adapter")[0] for adapter in adapters]
    settings = [_lora_settings(each) for each in folders]
    record = _common_record(folders)
    layers = [_lora_layers(each, one) for each, one in zip(folders, settings, strict=True)]
    for adapter, each in zip(adapters[1:], layers[1:], strict=True):
        _refuse_unequal(adapters[0], adapter, set(layers[0]), set(each))
    merged = {}
    for name in layers[0]:
        parts = [each[name] for each in layers]
        try:
            scaled = factors(partial(_cosine, *parts[:2]))
            a = torch.cat([a for a, _ in parts])  # (sum of ranks, inputs)
            b = torch.cat([c * b for c, (_, b) in zip(scaled, parts, strict=True)], dim=1)
        except RuntimeError as error:
            raise InputError(
                f"the adapters change '{name}' of other sizes. Merge adapters of one base."
            ) from error
        merged[f"{name}.lora_A.weight"], merged[f"{name}.lora_B.weight"] = a, b
    rank = sum(one["r"] for one in settings)
    save_file(merged, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json",
           {**settings[0], "r": rank, "lora_alpha": rank, "use_rslora": False})  # fmt: skip
    if record is not None:
        write_json(folder / ADAPTER_RECORD, {**record, "merged_from": list(adapters)})


def _base_of(adapter: Path) -> str:
    settings = read_json(adapter / "adapter_config.json")
    return settings.get("base_model_name_or_path") or "BASE_MODEL"


def _lora_settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / "adapter_config.json")
    others = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
    found = [name for name in others if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias {settings['bias']}")
    if settings.get("peft_type") != "LORA":
        found = [f"peft_type {settings.get('peft_type')}"]
    if found:
        raise InputError(
            f"adapter '{folder}' has {', '.join(found)}: its change is no plain product that could "
            "be summed. Merge each into the base, then merge the models."
        )
    return settings


def _lora_layers(folder: Path, settings: dict[str, Any]) -> dict[str, _Lora]:
    """Return what an adapter adds to each layer, in float32."""
    state = load_file(adapter_weights(folder))
    lost = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if lost:
        raise InputError(
            f"adapter '{folder}' changes more than linear layers ('{lost[0]}'), which no sum of "
            "products holds. Merge each into the base, then merge the models."
        )
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {
        name: (
            state[f"{name}.lora_A.weight"].float(),
            scale * state[f"{name}.lora_B.weight"].float(),
        )
        for name in names
    }


def _cosine(one: _Lora, other: _Lora) -> float:
    """Return the cosine between B A of two layers, without the products: <BA, DC> = <B'D, AC'>."""

    def inner(x: _Lora, y: _Lora) -> float:
        (a, b), (c, d) = x, y
        return float(((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum())

    norms = math.sqrt(max(inner(one, one), 0.0) * max(inner(other, other), 0.0))
    return inner(one, other) / norms if norms else 1.0


def _common_record(folders: Sequence[Path]) -> dict[str, Any] | None:
    """Return what was recorded of template and base, None where an adapter has no record.

    Raises:
        InputError: If the adapters were trained with other prompts or on other bases.
    """
    files = [folder / ADAPTER_RECORD for folder in folders]
    if not all(file.is_file() for file in files):
        return None
    records = [read_json(file) for file in files]
    for name, part in (("template", "hash"), ("base", "fingerprint")):
        if len({(record.get(name) or {}).get(part) for record in records}) > 1:
            raise InputError(
                f"the adapters were trained with another {name}, so a mean of them means nothing. "
                "Merge adapters of one base and prompt."
            )
    return {name: records[0].get(name) for name in ("template", "base")}


def _refuse_unequal(first: str, other: str, names: set[str], others: set[str]) -> None:
    if names != others:
        raise InputError(
            f"'{other}' has other tensors than '{first}' ({len(names ^ others)} differ). Merge "
            "checkpoints of one base, trained with the same settings."
        )
