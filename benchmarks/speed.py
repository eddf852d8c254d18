"""CPU cost of scoring one query's documents, beside the official script and sentence-transformers.

Decides the workload, the contenders and the extrapolation to full depth. Knows nothing of quality:
the weights are random, which changes no cost. Every contender starts from text and ends with
P("yes"); none is timed before all agree on every document.

Two depths of the real widths are measured. Layers cost the same each, so two depths give the cost
of a layer and of the rest (tokenization, embedding, vocabulary head), hence that of 28 layers.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer

from qwen3_reranker import Reranker
from qwen3_reranker.loading import DTYPES
from tests.official import INSTRUCTION, PREFIX, SUFFIX, format_body
from tests.real_parts import QWEN3_0_6B, qwen3_tokenizer_file, save_random_qwen3

from .workload import (
    DisagreementError,
    add_run_options,
    count_tokens,
    describe_machine,
    one_token_words,
    spread_lengths,
    write_measurements,
)

OURS = "qwen3-reranker"
PACKAGES = ("torch", "transformers", "sentence-transformers")
OFFICIAL_BATCH = 8
DEPTHS = (4, 8)
FULL_DEPTH = 28
WIDTHS: dict[str, dict[str, Any]] = {"0.6b": QWEN3_0_6B, "tiny": {}}
# Greatest difference in P("yes") between any two contenders. In bfloat16 the official script
# differs from itself by up to 0.05 when the batch changes, so only float32 shows a wrong prompt.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
_LEAST_VARIATION = 0.01

_MEDIAN_TOKENS, _MEAN_TOKENS = 110, 120
_SHORTEST, _LONGEST = 40, 400
_QUERY_TOKENS = 15


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to get P("yes") of each document from text, and the tokens computed for it so far."""

    name: str
    score: Callable[[str, list[str]], list[float]]
    tokens: Callable[[], int]


@dataclass(slots=True)
class Result:
    """What one contender cost at one dtype and depth: padded tokens, and seconds per round."""

    contender: str
    dtype: str
    layers: int
    tokens: int
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


class OfficialScript:
    """The script of the model card, with its pairs cut into batches.

    The card sends all pairs at once; their full-vocabulary logits would not fit into memory.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        auto: Any = transformers
        self.tokenizer = auto.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = auto.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.prefix = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        self.suffix = self.tokenizer.encode(SUFFIX, add_special_tokens=False)
        self.no_yes = self.tokenizer.convert_tokens_to_ids(["no", "yes"])

    @torch.no_grad()
    def score(self, query: str, documents: list[str], **forward: Any) -> list[float]:
        """Return P("yes") of each document; `forward` goes to the model."""
        pairs = [format_body(INSTRUCTION, query, document) for document in documents]
        scores: list[float] = []
        for start in range(0, len(pairs), OFFICIAL_BATCH):
            inputs = self._encode(pairs[start : start + OFFICIAL_BATCH])
            logits = self.model(**inputs, **forward).logits[:, -1, :]
            scores += logits[:, self.no_yes].log_softmax(dim=1)[:, 1].exp().tolist()
        return scores

    def _encode(self, pairs: list[str]) -> Any:
        room = 8192 - len(self.prefix) - len(self.suffix)
        inputs = self.tokenizer(
            pairs, truncation="longest_first", max_length=room, return_attention_mask=False
        )
        inputs["input_ids"] = [self.prefix + ids + self.suffix for ids in inputs["input_ids"]]
        return self.tokenizer.pad(inputs, padding=True, return_tensors="pt")


def draw_texts(num_documents: int, seed: int) -> tuple[str, list[str], list[int]]:
    """Draw a query and documents of words that are one token each.

    Returns:
        The query, the documents, and their lengths in tokens as the tokenizer counts them.
    """
    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer.from_file(str(qwen3_tokenizer_file()))
    words = one_token_words(tokenizer)
    sigma = np.sqrt(2 * np.log(_MEAN_TOKENS / _MEDIAN_TOKENS))
    lengths = spread_lengths(
        num_documents, median=_MEDIAN_TOKENS, sigma=sigma, shortest=_SHORTEST, longest=_LONGEST
    )
    wanted = rng.permutation(lengths)
    query, *documents = (" ".join(rng.choice(words, n)) for n in (_QUERY_TOKENS, *wanted))
    return query, documents, [len(tokenizer.encode(" " + text).ids) for text in documents]


def save_checkpoint(folder: Path, *, widths: str, layers: int, dtype: str, seed: int) -> None:
    """Write random weights, stored in the dtype they run in, so that all round them alike."""
    settings = {"num_hidden_layers": layers, **WIDTHS[widths]}
    save_random_qwen3(folder, dtype=dtype, seed=seed, **settings)
    # sentence-transformers sends a pair as one message per role.
    message = (
        '{{{{ messages | selectattr("role", "eq", "{}") | map(attribute="content") | first }}}}'
    )
    body = format_body(INSTRUCTION, message.format("query"), message.format("document"))
    # Jinja drops one newline at the end.
    (folder / "chat_template.jinja").write_text(PREFIX + body + SUFFIX + "\n", encoding="utf-8")


def load_contenders(folder: Path, dtype: str) -> list[Contender]:
    """Load each way to score once; the official two share a model."""
    official = OfficialScript(folder, DTYPES[dtype])
    official_tokens = count_tokens(official.model)
    encoder = CrossEncoder(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": DTYPES[dtype]}
    )
    reranker = Reranker(str(folder), dtype=dtype, device="cpu")

    def last_logits(query: str, documents: list[str]) -> list[float]:
        return official.score(query, documents, logits_to_keep=1, use_cache=False)

    def predict(query: str, documents: list[str]) -> list[float]:
        scores: list[float] = encoder.predict([(query, text) for text in documents]).tolist()
        return scores

    return [
        Contender("official script", official.score, official_tokens),
        Contender("official, last logits", last_logits, official_tokens),
        Contender("sentence-transformers", predict, count_tokens(encoder.model)),
        Contender(OURS, reranker.score, lambda: reranker.usage.tokens),
    ]


def check_agreement(
    contenders: Sequence[Contender], query: str, documents: list[str], tolerance: float
) -> str:
    """Score once with each, which also warms them up, and say how far they agree.

    Raises:
        DisagreementError: If they differ by more than `tolerance`, or scores hardly vary.
    """
    scores = np.array([contender.score(query, documents) for contender in contenders])
    difference, variation = np.ptp(scores, axis=0).max(), np.ptp(scores[0])
    if not difference <= tolerance:  # also when it is NaN
        names = [contender.name for contender in contenders]
        from_first = np.abs(scores - scores[0]).max(axis=1)
        raise DisagreementError(
            f"scores differ by up to {difference:.2g}, but only {tolerance} is allowed. Apart from "
            f"the {names[0]}: "
            + ", ".join(f"{n} {d:.2g}" for n, d in zip(names[1:], from_first[1:], strict=True))
        )
    if variation < _LEAST_VARIATION:
        raise DisagreementError(f"scores vary by {variation:.2g} only, so agreement shows nothing")
    return f"scores agree within {difference:.1e} and vary by {variation:.2f}"


def measure(
    args: argparse.Namespace, query: str, documents: list[str], dtype: str, layers: int
) -> list[Result]:
    """Check, then time every contender on one checkpoint, in a new order each round."""
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        folder = Path(name)
        save_checkpoint(folder, widths=args.widths, layers=layers, dtype=dtype, seed=args.seed)
        contenders = load_contenders(folder, dtype)
        agreement = check_agreement(contenders, query, documents, TOLERANCES[dtype])
        print(f"{dtype}, {layers} layers: {agreement}", flush=True)
        results = [Result(contender.name, dtype, layers, 0) for contender in contenders]
        for _ in range(args.rounds):
            for i in rng.permutation(len(contenders)):
                before = contenders[i].tokens()
                gc.collect()  # the garbage of one is not the next one's work
                wall, cpu = time.perf_counter(), time.process_time()
                contenders[i].score(query, documents)
                results[i].cpu.append(time.process_time() - cpu)
                results[i].wall.append(time.perf_counter() - wall)
                results[i].tokens = contenders[i].tokens() - before
    return results


def format_table(results: Sequence[Result]) -> str:
    """Return a line per contender and dtype: minima, because interference only ever adds."""
    first, second = DEPTHS
    lines = [
        f"{'':31}{'CPU s, minimum of rounds':>27}{'times':>7}{'max/min':>11}{'wall s, min.':>15}",
        f"{'contender':<22}{'dtype':<9}{f'T{first}':>9}{f'T{second}':>9}{f'T{FULL_DEPTH}':>9}"
        f"{'ours':>7}{f'T{first} T{second}':>11}{f'T{first}':>7}{f'T{second}':>8}{'tokens':>8}",
    ]
    at = {(result.contender, result.dtype, result.layers): result for result in results}
    pairs = [(r, at[r.contender, r.dtype, second]) for r in results if r.layers == first]
    full = {}
    for a, b in pairs:
        per_layer = (min(b.cpu) - min(a.cpu)) / (second - first)
        full[a.contender, a.dtype] = min(a.cpu) + (FULL_DEPTH - first) * per_layer
    for a, b in pairs:
        spread = f"{max(a.cpu) / min(a.cpu):.2f} {max(b.cpu) / min(b.cpu):.2f}"
        total = full[a.contender, a.dtype]
        lines.append(
            f"{a.contender:<22}{a.dtype:<9}{min(a.cpu):9.3f}{min(b.cpu):9.3f}{total:9.2f}"
            f"{total / full[OURS, a.dtype]:7.2f}{spread:>11}"
            f"{min(a.wall):7.2f}{min(b.wall):8.2f}{a.tokens:8d}"
        )
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--widths", choices=WIDTHS, default="0.6b")
    add_run_options(parser)
    args = parser.parse_args(argv)
    if min(args.documents, args.rounds, args.threads) < 1:
        parser.error("--documents, --rounds and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time and print; return 1 if contenders disagree."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    library_logging: Any = transformers.utils.logging
    library_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    query, documents, lengths = draw_texts(args.documents, args.seed)
    conditions = (
        f"$ {shlex.join(['python', '-m', 'benchmarks.speed', *argv])}\n"
        f"{describe_machine(PACKAGES)}\n"
        f"widths {args.widths}, {len(lengths)} documents of {min(lengths)} to {max(lengths)} "
        f"tokens, mean {np.mean(lengths):.0f}"
    )
    print(conditions, flush=True)
    results: list[Result] = []
    for dtype in args.dtypes:
        for layers in DEPTHS:
            try:
                results += measure(args, query, documents, dtype, layers)
            except DisagreementError as error:
                print(f"{dtype}, {layers} layers: {error}. Nothing more is timed.", file=sys.stderr)
                return 1
            gc.collect()  # models go before the next ones come
    print(f"\n{format_table(results)}")
    write_measurements(args.json, conditions.splitlines(), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
