"""What runs here, and whether its scores are the official ones.

Decides what is compared. The official side is transformers alone: whole prompts, one pair at a
time, the full vocabulary head.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from tokenizers import Tokenizer

from .. import __version__
from ..call.results import probability
from ..checkpoint import files
from ..checkpoint.locate import locate
from ..model.cpu_trials import bfloat16_pays
from ..reranker import Reranker
from ..text.prompt import PromptTemplate

_SHOWN = ("torch", "transformers", "tokenizers", "numpy", "huggingface-hub")
_OPTIONAL = ("peft", "gguf", "langchain-core", "llama-index-core", "trl", "datasets")

_BEIJING = "The capital of China is Beijing."
_GRAVITY = (
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
    "objects and is responsible for the movement of planets around the sun."
)
_CHINA = "What is the capital of China?"

_PLANET = "Which planet is known as the Red Planet?"

# Published P(yes) of Qwen3-Reranker-0.6B in float32 and their sources.
_GOLDENS = (
    (_CHINA, _BEIJING, 0.9994982, "Qwen3-Embedding issue 64"),
    ("Explain gravity", _GRAVITY, 0.9972, "model card"),
    (_CHINA, "The capital of China is Tianjin.", 0.9983009, "Qwen3-Embedding issue 64"),
    (_CHINA, "The capital of China is Shanghai.", 0.9993713, "Qwen3-Embedding issue 64"),
    (_CHINA, "The capital of Korea is Seoul.", 0.00103, "text-embeddings-inference issue 835"),
    (
        _PLANET,
        "Venus is often called Earth's twin because of its similar size and proximity.",
        probability(-3.109298),
        "sentence-transformers tests",
    ),
    (
        _PLANET,
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        probability(7.120390),
        "sentence-transformers tests",
    ),
    (
        _PLANET,
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        probability(-0.378755),
        "sentence-transformers tests",
    ),
    (
        _PLANET,
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
        probability(3.541637),
        "sentence-transformers tests",
    ),
)
_PAIRS = (
    *((query, document) for query, document, _, _ in _GOLDENS),
    ("sort a list in place", "def f(x):\n    x.sort()\n    return None\n"),
    ("北京的人口", "  北京市常住人口约2180万。\n\n"),
    ("empty document", ""),
    ("long document", "word " * 600),
)
# Contract of the package in float32; in half precision the official script itself moves by more
# when its batch changes.
_BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class Report:
    """Findings about a model.

    Attributes:
        lines: Text to print.
        is_healthy: True if all scores agree within the bound of their dtype.
    """

    lines: list[str]
    is_healthy: bool


def describe_environment() -> list[str]:
    """Return versions, devices and cache folders, a line each."""
    cache = Path(constants.HF_HUB_CACHE)
    devices = [f"cpu ({torch.get_num_threads()} threads, {_cpu_kind()})"]
    devices += [
        f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
    ]
    return [
        f"qwen3-reranker {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {_version(name)}" for name in _SHOWN),
        "optional: " + ", ".join(f"{name} {_version(name)}" for name in _OPTIONAL),
        "devices: " + ", ".join(devices),
        f"Hub cache: {cache} ({'exists' if cache.is_dir() else 'not there yet'}); HF_HOME is "
        + os.environ.get("HF_HOME", "not set"),
    ]


def examine(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    template: str | None = None,
) -> Report:
    """Score the same pairs by the official algorithm and by ours.

    Raises:
        ModelLoadError: If the model cannot be loaded.
    """
    with Reranker(model, dtype=dtype, device=device, template=template) as reranker:
        loaded = reranker.loaded
        lines = [f"{setting}: {choice}" for setting, choice in loaded.choices.items()]
        prompt = loaded.tokenizer.template
        decoder_dtype: torch.dtype = loaded.network.decoder.dtype
        where = loaded.network.device
        answers = loaded.tokenizer.yes_id, loaded.tokenizer.no_id
        pairs = _PAIRS if loaded.max_positions >= 1024 else _PAIRS[:-1]
        ours = [reranker.rank(query, [document])[0].log_odds for query, document in pairs]
        del loaded
    gc.collect()  # the two models need not fit beside each other
    official = _official_log_odds(model, prompt, decoder_dtype, where, answers, pairs)

    lines += ["", "pair  official P  our P      log-odds: official     ours  difference"]
    for i, (theirs, mine) in enumerate(zip(official, ours, strict=True)):
        lines.append(
            f"{i:4d}  {probability(theirs):10.6f} {probability(mine):10.6f} "
            f"{theirs:19.6f} {mine:10.6f} {mine - theirs:+.1e}"
        )
    largest = max(abs(mine - theirs) for theirs, mine in zip(official, ours, strict=True))
    if dtype in ("int8", "nf4"):
        # What rounding costs depends on the model: its user judges that, and no bound of ours.
        is_healthy = math.isfinite(largest)
        verdict = f": the price of {dtype}, so compare rankings on queries of yours"
    else:
        bound = _BOUNDS[decoder_dtype]
        is_healthy = largest <= bound  # not turned round: a NaN must not count as healthy
        verdict = f", bound {bound:g} for {decoder_dtype}: " + (
            "as it should be" if is_healthy else "TOO LARGE, please report this model"
        )
    lines.append(f"largest difference {largest:.1e} in log-odds{verdict}")
    lines += ["", "P(yes) published for Qwen/Qwen3-Reranker-0.6B in float32, and of this model:"]
    for i, (_, _, published, source) in enumerate(_GOLDENS):
        lines.append(f"{i:4d}  {published:10.6f} {probability(ours[i]):10.6f}  {source}")
    lines.append("(another checkpoint or dtype has other scores)")
    return Report(lines, is_healthy)


@torch.inference_mode()
def _official_log_odds(
    model: str,
    template: PromptTemplate,
    dtype: torch.dtype,
    device: torch.device,
    answers: tuple[int, int],
    pairs: Sequence[tuple[str, str]],
) -> list[float]:
    folder, gguf_file = locate(model, None)
    config = files.read_config(folder, gguf_file)
    full = files.read_weights(folder, gguf_file, config, dtype, attention="sdpa")
    full.to(device).eval()  # not the dtype, which would round the rotary buffers too
    tokenizer = Tokenizer.from_str(files.read_tokenizer(folder, gguf_file))
    tokenizer.no_truncation()
    scores = []
    for query, document in pairs:
        prompt = template.render(template.default_instruction, query, document)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        logits = full(input_ids=torch.tensor([ids], device=device)).logits[0]
        if hasattr(full, "score"):
            scores.append(float(logits[0]))
        else:
            yes, no = logits[-1, list(answers)].tolist()
            scores.append(yes - no)
    return scores


def _cpu_kind() -> str:
    compared = "faster" if bfloat16_pays() else "no faster"
    return f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 is {compared} than float32"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
