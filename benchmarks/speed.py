"""Cost of scoring, beside the official script, transformers, sentence-transformers and llama.cpp.

    python -m benchmarks.speed --workloads w1 w3 w6

llama.cpp takes part where xllamacpp is installed. "qwen3-reranker, stock layers", our packs on
transformers' own layers, takes part where it is named.

Decides the workloads and the extrapolation to full depth. Knows nothing of quality: the weights are
random, which changes no cost. Every contender starts from text and ends with P("yes"); none is
timed before all agree on every document.

Two depths of the real widths are measured. Layers cost the same each, so two depths give the cost
of a layer and of the rest (tokenization, embedding, vocabulary head), hence that of all layers.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from qwen3_reranker.model.loading import DTYPES
from tests.real_parts import (
    QWEN3_0_6B,
    QWEN3_4B,
    QWEN3_8B,
    qwen3_tokenizer_file,
    random_config,
    save_random_qwen3,
)

from .contenders import (
    LLAMA_CPP,
    NAMES,
    OFFICIAL,
    OURS,
    OURS_INT8,
    OURS_STOCK,
    TOLERANCES,
    Batch,
    check_agreement,
    load,
)
from .floor import best_rate, least_flops
from .workload import (
    DisagreementError,
    add_run_options,
    describe_machine,
    in_new_process,
    one_token_words,
    peak_memory,
    read_clock,
    spread_lengths,
    write_measurements,
)

PACKAGES = ("torch", "transformers", "sentence-transformers")
DEPTHS = (4, 8)
SLOW = (OFFICIAL, LLAMA_CPP)
"""Many times as long as the others, so that no round more is needed to tell."""
WIDTHS: dict[str, tuple[dict[str, Any], int]] = {
    "0.6b": (QWEN3_0_6B, 28), "4b": (QWEN3_4B, 36), "8b": (QWEN3_8B, 36), "tiny": ({}, 28),
}  # fmt: skip
"""Shape and number of layers of each checkpoint."""
_QUERY_TOKENS = 15
_HEAD_TOKENS = 60 + _QUERY_TOKENS
_SUFFIX_TOKENS = 9


@dataclass(frozen=True, slots=True)
class Workload:
    """Queries and the lengths of their documents in tokens."""

    text: str
    lengths: list[int]
    queries: int = 1


_SIGMA = float(np.sqrt(2 * np.log(1.09)))
"""Of lengths whose median lies 8 % below the mean."""


def _spread(
    count: int, mean: int, shortest: int, longest: int, *, sigma: float = _SIGMA
) -> list[int]:
    """Return log-normal lengths."""
    median = mean / np.exp(sigma**2 / 2)
    lengths: list[int] = spread_lengths(
        count, median=median, sigma=sigma, shortest=shortest, longest=longest
    ).tolist()
    return lengths


WORKLOADS = {
    # Of 100 documents the longest has 400 tokens. Padding costs more the wider lengths are spread.
    "w1": Workload("100 documents of 40 to 400 tokens", _spread(100, 120, 40, 400, sigma=0.52)),
    "w1-narrow": Workload("100 documents of 40 to 321 tokens", _spread(100, 120, 40, 400)),
    "w2": Workload("20 documents of about 500 tokens", _spread(20, 500, 200, 1200)),
    "w3": Workload("50 documents of about 30 tokens", _spread(50, 30, 10, 90)),
    "w4": Workload("4 documents of 2,000 to 6,000 tokens", [2000, 3500, 4500, 6000]),
    "w5": Workload("32 queries with 10 documents of about 120", _spread(10, 120, 40, 400), 32),
    "w6": Workload("1 document of 120 tokens", [120]),
    "long": Workload("1 document of 4,000 tokens", [4000]),
    "w1-12": Workload("12 documents of about 120 tokens", _spread(12, 120, 40, 400)),
}


@dataclass(slots=True)
class Result:
    """What one contender cost on one workload at one dtype and depth."""

    workload: str
    contender: str
    dtype: str
    layers: int
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class Total:
    """A contender's cost at all layers, from two depths or measured."""

    workload: str
    contender: str
    dtype: str
    seconds: float
    times_ours: float
    floor_share: float | None


def draw_batch(workload: Workload, seed: int) -> Batch:
    """Draw queries and documents of words that are one token each."""
    rng = np.random.default_rng(seed)
    words = one_token_words(Tokenizer.from_file(str(qwen3_tokenizer_file())))

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    return [
        (text(_QUERY_TOKENS), [text(n) for n in rng.permutation(workload.lengths).tolist()])
        for _ in range(workload.queries)
    ]


def save_checkpoint(folder: Path, args: argparse.Namespace, dtype: str, layers: int) -> None:
    """Write random weights, stored in the dtype they run in, so that all round them alike."""
    shape, _ = WIDTHS[args.widths]
    settings = {**shape, "num_hidden_layers": layers}
    save_random_qwen3(folder, dtype=dtype, seed=args.seed, **settings)


def measure(
    args: argparse.Namespace, batches: dict[str, Batch], dtype: str, layers: int
) -> list[Result]:
    """Check, then time every contender on one checkpoint, in a new order each round."""
    rng = np.random.default_rng(args.seed)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        folder = Path(name)
        save_checkpoint(folder, args, dtype, layers)
        contenders = load(folder, dtype, args.device, args.contenders)
        for workload, batch in batches.items():
            agreement = check_agreement(contenders, batch, TOLERANCES[dtype])
            print(f"{workload}, {dtype}, {layers} layers: {agreement}", flush=True)
            found = [Result(workload, contender.name, dtype, layers) for contender in contenders]
            for number in range(args.rounds):
                for i in rng.permutation(len(contenders)):
                    if contenders[i].name in SLOW and number >= args.slow_rounds:
                        continue
                    gc.collect()  # the garbage of one is not the next one's work
                    before, start = contenders[i].tokens(), read_clock(args.device)
                    contenders[i].score(batch)
                    found[i].seconds.append(read_clock(args.device) - start)
                    found[i].tokens = contenders[i].tokens() - before
            results += [result for result in found if result.seconds]
        if args.memory and layers == max(args.depths):
            del contenders
            for result in results:
                alone = partial(score_once, folder, dtype, args.device, result.contender)
                result.peak_mb = in_new_process(
                    peak_memory, alone, batches[result.workload], args.device
                )
    return results


def score_once(folder: Path, dtype: str, device: str, name: str, batch: Batch) -> None:
    """Load one contender and score a batch; for a process that does nothing else."""
    (contender,) = load(folder, dtype, device, [name])
    contender.score(batch)


def extrapolate(
    args: argparse.Namespace, results: Sequence[Result], rates: dict[str, float]
) -> list[Total]:
    """Return every contender's cost at all layers, and its share of the floor."""
    _, layers = WIDTHS[args.widths]
    seconds: dict[tuple[str, str, str], float] = {}
    at = {(r.workload, r.contender, r.dtype, r.layers): min(r.seconds) for r in results}
    for workload, contender, dtype, depth in at:
        found = [at.get((workload, contender, dtype, d)) for d in args.depths]
        if depth != args.depths[0] or None in found:
            continue
        first, *others = (value for value in found if value is not None)
        per_layer = (others[0] - first) / (args.depths[1] - args.depths[0]) if others else 0.0
        beyond = layers - args.depths[0] if others else 0
        seconds[workload, contender, dtype] = first + beyond * per_layer
    totals = []
    for (workload, contender, dtype), total in seconds.items():
        depth = layers if len(args.depths) > 1 else args.depths[0]
        floor = _least(args, workload, depth) / rates[dtype]
        ours = seconds.get((workload, OURS, dtype), np.nan)
        totals.append(Total(workload, contender, dtype, total, total / ours, floor / total))
    return totals


def _least(args: argparse.Namespace, workload: str, layers: int) -> float:
    each = WORKLOADS[workload]
    lengths = [length + _SUFFIX_TOKENS for length in each.lengths]
    return each.queries * least_flops(_config(args), layers, _HEAD_TOKENS, lengths)


def _config(args: argparse.Namespace) -> Any:
    return random_config(**WIDTHS[args.widths][0])


def format_table(results: Sequence[Result], totals: Sequence[Total]) -> str:
    """Return Markdown: minima of the rounds, because interference only ever adds."""
    lines = [
        "| workload | contender | dtype | tokens | all layers, s | times ours | of the floor "
        "| max/min | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for total in totals:
        mine = [
            r for r in results
            if (r.workload, r.contender, r.dtype) == (total.workload, total.contender, total.dtype)
        ]  # fmt: skip
        spread = " ".join(f"{max(r.seconds) / min(r.seconds):.2f}" for r in mine)
        peak = max(r.peak_mb for r in mine)
        share = "" if total.floor_share is None else f"{100 * total.floor_share:.0f} %"
        lines.append(
            f"| {total.workload} | {total.contender} | {total.dtype} | {mine[0].tokens} "
            f"| {total.seconds:.2f} | {total.times_ours:.2f} | {share} | {spread} "
            f"| {f'{peak:.0f}' if peak else ''} |"
        )
    return "\n".join(lines)


def save_plot(file: Path, totals: Sequence[Total], title: str) -> None:
    """Draw each contender's cost in times of ours, a group of bars per workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    rivals = [name for name in NAMES if any(total.contender == name for total in totals)]
    groups = list(dict.fromkeys((total.workload, total.dtype) for total in totals))
    height = 0.8 / len(rivals)
    for j, name in enumerate(rivals):
        found = {(t.workload, t.dtype): t.times_ours for t in totals if t.contender == name}
        places = [i + j * height for i, group in enumerate(groups) if group in found]
        values = [found[group] for group in groups if group in found]
        bars = axes.barh(places, values, height, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(
        [i + 0.4 - height / 2 for i in range(len(groups))],
        [f"{WORKLOADS[workload].text}\n{dtype}" for workload, dtype in groups],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time, in times of qwen3-reranker's (less is faster)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["w1-12"])
    here = [n for n in NAMES if n != OURS_STOCK and (n != LLAMA_CPP or find_spec("xllamacpp"))]
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=here)
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--widths", choices=WIDTHS, default="0.6b")
    parser.add_argument(
        "--depths", nargs="+", type=int, default=list(DEPTHS),
        help="layers that are measured; one depth is not extrapolated",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--slow-rounds", type=int, default=1, help=f"of what takes hours: {', '.join(SLOW)}"
    )
    parser.add_argument("--memory", action="store_true", help="also the peak of a process of each")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart here")
    add_run_options(parser)
    args = parser.parse_args(argv)
    if min(*args.depths, args.rounds, args.threads) < 1 or len(args.depths) > 2:
        parser.error("--depths (one or two), --rounds and --threads must be at least 1")
    if args.device != "cpu":
        args.contenders = [n for n in args.contenders if n not in (OURS_INT8, LLAMA_CPP)]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time and print; return 1 if contenders disagree."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    library_logging: Any = transformers.utils.logging
    library_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    machine = describe_machine(PACKAGES)
    if args.device == "cuda":
        machine += f"\n{torch.cuda.get_device_name()}, wall seconds"
    lines = [f"$ {shlex.join(['python', '-m', 'benchmarks.speed', *argv])}", *machine.splitlines()]
    rates = {}
    for dtype in args.dtypes:
        clock = partial(read_clock, args.device)
        rates[dtype], rows = best_rate(_config(args), DTYPES[dtype], args.device, clock)
        lines.append(
            f"{dtype}: the layer's matrices at best {rates[dtype] / 1e9:.0f} GFLOP/s, {rows} tokens"
        )
    print("\n".join(lines), flush=True)
    batches = {name: draw_batch(WORKLOADS[name], args.seed) for name in args.workloads}
    results: list[Result] = []
    for dtype in args.dtypes:
        for layers in args.depths:
            try:
                results += measure(args, batches, dtype, layers)
            except DisagreementError as error:
                print(f"{dtype}, {layers} layers: {error}. Nothing more is timed.", file=sys.stderr)
                return 1
            gc.collect()  # models go before the next ones come
    totals = extrapolate(args, results, rates)
    print(f"\n{format_table(results, totals)}")
    write_measurements(args.json, lines, results)
    if args.plot is not None:
        save_plot(args.plot, totals, f"{args.widths} widths, {machine.splitlines()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
