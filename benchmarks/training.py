"""Cost of a LoRA step, beside a plain `Trainer` on padded pairs and TRL's `SFTTrainer`.

Decides the workload, how a step is driven and what is measured. Knows nothing of quality: nothing
is timed before the plain trainers and ours have the same loss and gradient. TRL's differs by
design (the whole vocabulary, and an end token learnt beside the answer), so only its prompts are
compared. It stands beside the others as a reference and takes no turns: without Triton it projects
every position onto the vocabulary, and a step takes minutes.

Whole `train()` calls cannot take turns. Each trainer therefore runs the calls that its own loop
makes in a step, in that order: batches, `training_step` of each, clipping, optimizer. What is left
out (schedule, logging, saving) is the same code for all. Every step has the same groups, so rounds
differ by interference alone. Memory, and all of TRL, is measured in a process per contender.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from finetune.data import TrainingGroup
from qwen3_reranker.checkpoint.embedded import EMBEDDED_BASE, embedded_folder
from qwen3_reranker.model.loading import DTYPES
from tests.official import CHATML_SUFFIX, SUFFIX
from tests.real_parts import QWEN3_0_6B, save_random_qwen3

from .trainers import NEGATIVES, PAIRS, Contender, Setting, list_loaders, load_trl, pairs
from .workload import (
    DisagreementError,
    add_run_options,
    describe_machine,
    in_new_process,
    one_token_words,
    read_clock,
    resident_bytes,
    spread_lengths,
    write_measurements,
)

PACKAGES = ("torch", "transformers", "peft", "trl")
WIDTHS = ("smollm2", "0.6b", "tiny")
# Greatest relative difference of the losses and of the gradients (norm of the difference).
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.2)}

# Two standard deviations of the logarithm lie between the median and either end.
_SHORTEST, _LONGEST = 60, 300
_MEDIAN = (_SHORTEST * _LONGEST) ** 0.5
_SIGMA = np.log(_LONGEST / _SHORTEST) / 4
_QUERY_TOKENS = 15


@dataclass(slots=True)
class Result:
    """What one contender cost: padded tokens of a step, seconds of each, memory in MB.

    `peak_mb` is that of the process (CUDA: of allocated device memory), `loaded_mb` the level
    before the first step.
    """

    contender: str
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    loaded_mb: float = 0.0
    peak_mb: float = 0.0


def draw_rows(folder: Path, count: int, seed: int) -> list[TrainingGroup]:
    """Draw groups of words that are one token each; all groups together have spread lengths."""
    rng = np.random.default_rng(seed)
    words = one_token_words(Tokenizer.from_file(str(folder / "tokenizer.json")))
    lengths = spread_lengths(
        count * PAIRS, median=_MEDIAN, sigma=_SIGMA, shortest=_SHORTEST, longest=_LONGEST
    )
    rows = []
    for of_group in rng.permutation(lengths).reshape(count, PAIRS):
        query, positive, *negative = (
            " ".join(rng.choice(words, n)) for n in (_QUERY_TOKENS, *of_group)
        )
        rows.append(TrainingGroup(query, [positive], negative, None))
    return rows


def save_checkpoint(folder: Path, *, widths: str, layers: int, dtype: str, seed: int) -> str:
    """Write a checkpoint of few layers, in the dtype it trains in; return its prompt's suffix."""
    if widths != "smollm2":
        shape: dict[str, Any] = QWEN3_0_6B if widths == "0.6b" else {}
        save_random_qwen3(folder, dtype=dtype, seed=seed, num_hidden_layers=layers, **shape)
        return SUFFIX
    source = embedded_folder(EMBEDDED_BASE)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(source, num_hidden_layers=layers, dtype=DTYPES[dtype])
    model.save_pretrained(folder)
    tokenizer = (source / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return CHATML_SUFFIX


def check_agreement(contenders: Sequence[Contender], tolerances: tuple[float, float]) -> str:
    """Run a step with each, which also warms them up, and say how far they agree.

    Raises:
        DisagreementError: If loss or gradient of one is not that of the first.
    """
    steps = []
    for contender in contenders:
        loss = contender.add_gradients()
        steps.append((loss, contender.gradient()))
        contender.update()
    loss, gradient = steps[0]
    differences = [
        (abs(its - loss) / loss, float((its_gradient - gradient).norm() / gradient.norm()))
        for its, its_gradient in steps[1:]
    ]
    for contender, found in zip(contenders[1:], differences, strict=True):
        if not (found[0] <= tolerances[0] and found[1] <= tolerances[1]):  # also when it is NaN
            raise DisagreementError(
                f"loss and gradient of {contender.name} differ from {contenders[0].name} by "
                f"{found[0]:.2g} and {found[1]:.2g}, but {tolerances[0]} and {tolerances[1]} are "
                "allowed"
            )
    losses, gradients = np.max(differences, axis=0)
    return (
        f"loss {loss:.4f} within {losses:.1e}, gradient of norm {float(gradient.norm()):.3g} "
        f"within {gradients:.1e} of it"
    )


def measure_time(contenders: Sequence[Contender], setting: Setting, rounds: int) -> list[Result]:
    """Time a step of every contender, in a new order each round."""
    rng = np.random.default_rng(setting.seed)
    results = [Result(contender.name) for contender in contenders]
    for _ in range(rounds):
        for i in rng.permutation(len(contenders)):
            time_step(contenders[i], setting.device, results[i])
    return results


def time_step(contender: Contender, device: str, result: Result) -> None:
    """Run a step and note its seconds and tokens."""
    gc.collect()  # the garbage of one is not the next one's work
    before, start = contender.tokens(), read_clock(device)
    contender.step()
    result.seconds.append(read_clock(device) - start)
    result.tokens = contender.tokens() - before


def measure_alone(load: Callable[[], Contender], device: str, threads: int, steps: int) -> Result:
    """Return time and memory of the first steps; for a process that does nothing else."""
    _quieten(threads)
    contender = load()
    contender.touch_weights()
    gc.collect()
    if device == "cuda":
        loaded = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not room for the steps
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present level
        loaded = resident_bytes("VmRSS")
    result = Result(contender.name)
    for _ in range(steps):
        time_step(contender, device, result)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
    result.loaded_mb, result.peak_mb = loaded / 1e6, peak / 1e6
    return result


def format_table(results: Sequence[Result]) -> str:
    """Return a line per contender; minima lead, because interference only ever adds."""
    ours = results[0]
    lines = [
        f"{'':24}{'tokens':>15}{'seconds per step':>27}{'times ours':>15}{'peak MB':>15}",
        f"{'contender':<24}{'a step':>8}{'ours=1':>7}{'min.':>9}{'median':>9}{'max/min':>9}"
        f"{'min.':>7}{'median':>8}{'above':>8}{'whole':>7}",
    ]
    for r in results:
        low, middle = min(r.seconds), median(r.seconds)
        lines.append(
            f"{r.contender:<24}{r.tokens:8d}{r.tokens / ours.tokens:7.2f}{low:9.3f}{middle:9.3f}"
            f"{max(r.seconds) / low:9.2f}{low / min(ours.seconds):7.2f}"
            f"{middle / median(ours.seconds):8.2f}{r.peak_mb - r.loaded_mb:8.0f}{r.peak_mb:7.0f}"
        )
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--widths", choices=WIDTHS, default="smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4, help="1+7 documents each, per step")
    parser.add_argument("--reference-rounds", type=int, default=1, help="of TRL, 0 leaves it out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    add_run_options(parser)
    args = parser.parse_args(argv)
    if min(args.layers, args.groups, args.rounds, args.threads) < 1:
        parser.error("--layers, --groups, --rounds and --threads must be at least 1")
    return args


def _quieten(threads: int) -> None:
    # peft and TRL use names that transformers has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning)
    library_logging: Any = transformers.utils.logging
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, measure memory and print; return 1 if contenders disagree."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    _quieten(args.threads)
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        folder = Path(name)
        suffix = save_checkpoint(
            folder, widths=args.widths, layers=args.layers, dtype=args.dtype, seed=args.seed
        )
        rows = draw_rows(folder, args.groups, args.seed)
        setting = Setting(folder, suffix, rows, args.dtype, args.device, args.seed)
        loaders = list_loaders(setting)
        conditions = describe(args, argv, setting)
        print(conditions, flush=True)
        try:
            contenders = [load() for load in loaders]
            agreement = check_agreement(contenders, TOLERANCES[args.dtype])
        except DisagreementError as error:
            print(f"{error}. Nothing is timed.", file=sys.stderr)
            return 1
        print(agreement, flush=True)
        results = measure_time(contenders, setting, args.rounds)
        del contenders
        # The second step has the optimizer's state beside the activations.
        alone = partial(in_new_process, measure_alone)
        for result, load in zip(results, loaders, strict=True):
            measured = alone(load, args.device, args.threads, 2)
            result.loaded_mb, result.peak_mb = measured.loaded_mb, measured.peak_mb
        if args.reference_rounds:
            steps = 1 + args.reference_rounds
            reference = alone(partial(load_trl, setting), args.device, args.threads, steps)
            del reference.seconds[0]  # the warm-up
            results.append(reference)
    print(f"\n{format_table(results)}")
    write_measurements(args.json, [*conditions.splitlines(), agreement], results)
    return 0


def describe(args: argparse.Namespace, argv: Sequence[str], setting: Setting) -> str:
    """Return the command, the machine and the workload."""
    lengths = [len(document.split()) for _, document, _ in pairs(setting.rows)]
    machine = describe_machine(PACKAGES)
    if args.device == "cuda":
        machine += f"\n{torch.cuda.get_device_name()}, wall seconds"
    return (
        f"$ {shlex.join(['python', '-m', 'benchmarks.training', *argv])}\n{machine}\n"
        f"widths {args.widths} x {args.layers} layers, {args.dtype}, LoRA r 16 on all linear "
        f"layers, {args.groups} group(s) of 1+{NEGATIVES} per step, documents of {min(lengths)} to "
        f"{max(lengths)} tokens, mean {np.mean(lengths):.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
