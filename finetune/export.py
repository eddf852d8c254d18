"""`export`: a model in the formats of other programs, scored there before it is kept.

Decides the files of each format. `seq-cls` is a sequence classifier of one label, whose logit is
the log-odds (vLLM, transformers, text pipelines). `sentence-transformers` is the causal model with
a chat template that its `CrossEncoder` reads, and what vLLM must know to make a classifier of it.
`gguf` is one file for llama.cpp, see `gguf_export`. Knows nothing of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from qwen3_reranker.checkpoint.folder import read_json
from qwen3_reranker.errors import InputError, MissingExtraError
from qwen3_reranker.model.loading import yes_no_row

from .gguf_export import FILE, score_gguf, write_gguf
from .output import write_json
from .publish import deliver, write_card
from .whole import (
    SAMPLE,
    Whole,
    load_whole,
    refuse_difference,
    sample_scores,
)

_TOLERANCES = {"float32": 1e-4}
_HALF_TOLERANCE = 0.3
"""In log-odds: half precision rounds other sums elsewhere, and in `seq-cls` the yes/no row."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qwen3-finetune export`; return 0.

    Raises:
        InputError: If the model cannot have that format.
        ModelLoadError: If the checkpoint or adapter cannot be used.
        Qwen3RerankerError: If the result scores otherwise than its source; nothing is left then.
    """
    arguments = _parser().parse_args(argv)
    write = partial(_export, arguments)
    output = deliver(arguments.output_dir, write, arguments.push_to_hub)
    print(_FORMATS[arguments.format][2].format(output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune export",
        description="Write a model, with its adapter merged, in the format of another program.",
    )
    parser.add_argument("--model", required=True, help="Hub name or folder")
    parser.add_argument("--adapter", help="LoRA weights to merge")
    parser.add_argument("--format", choices=_FORMATS, required=True)
    parser.add_argument("--output_dir", required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--instruction", help="task sentence of the prompt that is written; default: the model's"
    )
    parser.add_argument(
        "--push_to_hub", metavar="NAME", help="upload the result, privately if NAME is new"
    )
    return parser


Write = Callable[[Whole, Path], None]
Check = Callable[[Whole, Path], NDArray[np.float64]]


def _export(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the files, and compare what they score with what the source does."""
    model, adapter = arguments.model, arguments.adapter
    write, check, usage = _FORMATS[arguments.format]
    whole = load_whole(model, adapter, arguments.instruction)
    template = whole.tokenizer.template
    write(whole, folder)
    write_card(folder, model, template, whole.instruction, usage.format(folder.name))
    expected = sample_scores(
        model, adapter=adapter, dtype=whole.dtype_name, template=template,
        instruction=whole.instruction,
    )  # fmt: skip
    bound = _TOLERANCES.get(whole.dtype_name, _HALF_TOLERANCE)
    refuse_difference("the export", "its source", check(whole, folder), expected, bound)


def write_classifier(whole: Whole, folder: Path) -> None:
    """Write a sequence classifier whose one row is W[yes] - W[no]."""
    full = whole.full
    if hasattr(full, "lm_head"):
        config = full.config.__class__.from_dict({**full.config.to_dict(), "num_labels": 1})
        config.architectures = [
            config.architectures[0].replace("ForCausalLM", "ForSequenceClassification")
        ]
        if config.pad_token_id is None:  # batches are padded; any id does, masks hide it
            config.pad_token_id = config.eos_token_id if isinstance(config.eos_token_id, int) else 0
        auto: Any = transformers.AutoModelForSequenceClassification
        classifier = auto.from_config(config).to(whole.full.dtype)
        classifier.base_model.load_state_dict(full.base_model.state_dict())
        with torch.no_grad():
            classifier.score.weight.copy_(yes_no_row(full, whole.tokenizer)[None])
        full = classifier
    whole.save(folder, full)
    # vLLM applies it when told to; under the usual name others would, around a whole prompt.
    (folder / "score_template.jinja").write_text(_chat_template(whole), encoding="utf-8")


def write_cross_encoder(whole: Whole, folder: Path) -> None:
    """Write the causal model with a chat template of a query and a document message."""
    if not hasattr(whole.full, "lm_head"):
        raise InputError(
            "the model is a sequence classifier already, which sentence-transformers would read "
            "without the prompt. Export the causal checkpoint it came from."
        )
    whole.save(folder)
    (folder / "chat_template.jinja").write_text(_chat_template(whole), encoding="utf-8")
    template, config = whole.tokenizer.template, folder / "config.json"
    # With these vLLM subtracts the two rows, as its `is_original_qwen3_reranker` would have it do.
    as_classifier = {
        "classifier_from_token": [template.no, template.yes], "method": "from_2_way_softmax",
    }  # fmt: skip
    write_json(config, {**read_json(config), **as_classifier})


def _chat_template(whole: Whole) -> str:
    return whole.tokenizer.template.as_jinja(whole.instruction)


def _prompts(whole: Whole) -> list[list[int]]:
    """Return the ids of each prompt of the sample."""
    groups = [
        whole.tokenizer.encode_group(whole.instruction, query, documents, max_length=8192)
        for query, documents in SAMPLE
    ]
    return [
        [*group.head.tolist(), *document.tolist()]
        for group in groups
        for document in group.documents
    ]


@torch.no_grad()
def score_classifier(whole: Whole, folder: Path) -> NDArray[np.float64]:
    """Return the logits of the sample by transformers' own classifier."""
    auto: Any = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    return np.array([float(model(torch.tensor([ids])).logits) for ids in _prompts(whole)])


def score_cross_encoder(whole: Whole, folder: Path) -> NDArray[np.float64]:
    """Return the log-odds of the sample by sentence-transformers."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise MissingExtraError.of("checking this export", error.name, "mine") from error
    encoder = CrossEncoder(str(folder), device="cpu", local_files_only=True,
                           model_kwargs={"dtype": whole.full.dtype})  # fmt: skip
    pairs = [(query, document) for query, documents in SAMPLE for document in documents]
    raw = encoder.predict(pairs, batch_size=1, activation_fn=torch.nn.Identity())
    return np.asarray(raw, np.float64)


_FORMATS: dict[str, tuple[Write, Check, str]] = {
    "seq-cls": (
        write_classifier, score_classifier,
        'transformers.AutoModelForSequenceClassification.from_pretrained("{0}")\n'
        "vllm serve {0} --runner pooling --chat-template {0}/score_template.jinja",
    ),
    "sentence-transformers": (
        write_cross_encoder, score_cross_encoder,
        'sentence_transformers.CrossEncoder("{0}")\n'
        "vllm serve {0} --runner pooling --convert classify "
        "--chat-template {0}/chat_template.jinja",
    ),
    "gguf": (write_gguf, score_gguf, "llama-server --rerank --model {}/" + FILE),
}  # fmt: skip
