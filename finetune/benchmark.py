"""`evaluate --benchmark`: a reranker on mteb's tasks, beside the published figures.

Decides which tasks a benchmark has, under which prompt they are run, and which figures stand side
by side. How they are run is `two_stage.py`'s; what a ranking is worth is mteb's.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from qwen3_reranker import Reranker
from qwen3_reranker.cli.terminal import fit
from qwen3_reranker.data.jsonl import read_json
from qwen3_reranker.errors import DataError, InputError, named
from qwen3_reranker.text.prompt import PUBLISHED_EVAL, TEMPLATES

from .output import write_json
from .served import Served
from .two_stage import TOP_K, TaskScore, check_installed, rerank_tasks

FIRST_STAGE = "Qwen/Qwen3-Embedding-0.6B"
"""The published figures are all of its candidates."""

_SOURCES = {
    "MTEB-R": ("MTEB(eng, v2)", "Retrieval"),
    "CMTEB-R": ("MTEB(cmn, v1)", "Retrieval"),
    "MMTEB-R": ("MTEB(Multilingual, v2)", "Retrieval"),
    "MTEB-Code": ("MTEB(Code, v1)", "Retrieval"),
    "FollowIR": ("FollowIR", "InstructionReranking"),
    "NanoBEIR": ("NanoBEIR", "Retrieval"),
}
"""Benchmarks of mteb, and the type of the tasks that are taken of each."""

BENCHMARKS = ("MTEB-R", "CMTEB-R", "MMTEB-R", "MLDR", "MTEB-Code", "FollowIR", "NanoBEIR")
"""The six columns that were published, and a cheap one that was not."""

_OF_LISTS = ["eval_file", "guard_file", "depth", "instruction_check", "relevant_from"]
_OF_BENCHMARKS = ["first_stage", "template", "task_prompts"]
"""Flags that one of the two reads."""

_MODELS = ("first", "0.6B", "4B", "8B", "Jina", "gte", "BGE")
# arXiv 2506.05176 and the model cards of Qwen3-Reranker: mean over tasks, times 100.
PUBLISHED = {
    "MTEB-R": (61.82, 65.80, 69.76, 69.02, 58.22, 59.51, 57.03),
    "CMTEB-R": (71.02, 71.31, 75.94, 77.45, 63.37, 74.08, 72.16),
    "MMTEB-R": (64.64, 66.36, 72.74, 72.94, 63.73, 59.44, 58.36),
    "MLDR": (50.26, 67.28, 69.97, 70.19, 39.66, 66.33, 59.51),
    "MTEB-Code": (75.41, 73.42, 81.20, 81.22, 58.98, 54.18, 41.38),
    "FollowIR": (5.09, 5.41, 14.84, 8.05, -0.68, -1.64, -0.01),
}
_LEGEND = """Published: arXiv 2506.05176 and the model cards. "first" is Qwen3-Embedding-0.6B,
whose best 100 all others order: Qwen3-Reranker 0.6B, 4B and 8B,
Jina-multilingual-reranker-v2-base, gte-multilingual-reranker-base and
BGE-reranker-v2-m3. Main metric of a task (mostly nDCG@10, p-MRR in FollowIR),
mean over tasks, times 100."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that belong to benchmarks."""
    group = parser.add_argument_group("benchmarks of mteb, instead of candidate lists")
    group.add_argument("--benchmark", nargs="+", metavar="NAME", help=", ".join(BENCHMARKS))
    group.add_argument("--first_stage", help=f'"bm25" or an encoder; default: {FIRST_STAGE}')
    group.add_argument(
        "--template",
        choices=sorted(TEMPLATES),
        help=f"prompt; default: the adapter's own, without an adapter {PUBLISHED_EVAL.id}",
    )
    group.add_argument(
        "--task_prompts", metavar="FILE", help='JSON {"task": "sentence"}; default: mteb\'s'
    )


def refuse_mixture(arguments: argparse.Namespace) -> None:
    """Refuse flags that would do nothing.

    Raises:
        InputError: If there is nothing to measure, or what is asked for belongs to two commands.
    """
    if not arguments.benchmark and not arguments.eval_file and not arguments.guard_file:
        raise InputError(
            "there is nothing to evaluate on. Pass --eval_file FILE, or --benchmark NAME."
        )
    if arguments.benchmark:
        measured, names = "benchmarks", _OF_LISTS
    else:
        measured, names = "candidate lists", _OF_BENCHMARKS
    mixed = [f"--{name}" for name in names if getattr(arguments, name) not in (None, [], False)]
    if mixed:
        raise InputError(
            f"{' and '.join(mixed)} cannot be used here: {measured} are measured, which do not "
            "read that. Run evaluate once for each."
        )


def run(served: Served, arguments: argparse.Namespace, output: Path) -> int:
    """Run the benchmarks that a command line names; return its exit status."""
    first_stage = arguments.first_stage or FIRST_STAGE
    tasks = {name: benchmark_tasks(name) for name in arguments.benchmark}
    prompts = {} if arguments.task_prompts is None else read_task_prompts(arguments.task_prompts)
    template = arguments.template or (None if served.adapter else PUBLISHED_EVAL.id)
    with Reranker(**asdict(served), template=template) as reranker:
        rendered = reranker.loaded.tokenizer.template  # a model that does not load fails here
        scores = rerank_tasks(
            [task for group in tasks.values() for task in group],
            reranker,
            first_stage,
            output,
            key=(served.identity, rendered.hash, prompts),
            task_prompts=prompts,
            device=served.device,
        )
    by_benchmark = {name: [scores[t.metadata.name] for t in group] for name, group in tasks.items()}
    settings = {
        "model": served.adapter or served.model,
        "template": f"{rendered.id}, {rendered.hash[:12]}",
        "default instruction": rendered.default_instruction,
        "first stage": f"{first_stage}, best {TOP_K}",
    }
    for line in report_lines(settings, by_benchmark):
        print(line)
    file = output / "benchmark.json"
    found = {name: [asdict(score) for score in row] for name, row in by_benchmark.items()}
    write_json(file, {"settings": settings, "benchmarks": found})
    print(f"Every digit: {file}")
    return 0


def benchmark_tasks(name: str) -> list[Any]:
    """Return the tasks of a benchmark; no data is loaded.

    Raises:
        InputError: If there is no such benchmark.
        MissingExtraError: Without mteb.
    """
    check_installed()
    import mteb

    if name == "MLDR":
        return [mteb.get_task("MultiLongDocRetrieval", eval_splits=["test"])]
    if name not in _SOURCES:
        known = {each.lower(): each for each in BENCHMARKS}
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f" Did you mean {known[near[0]]}?" if near else ""
        raise InputError(
            f"--benchmark {name!r} is none of those whose tasks are known here: "
            f"{', '.join(BENCHMARKS)}.{hint or ' Pass one of them.'}"
        )
    source, kind = _SOURCES[name]
    return [task for task in mteb.get_benchmark(source).tasks if task.metadata.type == kind]


def read_task_prompts(path: str) -> dict[str, str]:
    """Read task sentences: `{"task": "sentence"}`, or `{"task": {"query": "sentence"}}`.

    `evaluation/task_prompts.json` of QwenLM/Qwen3-Embedding, which the published evaluation read,
    is such a file.

    Raises:
        DataError: If it is none.
    """
    try:
        content = read_json(path)
        prompts = {
            task: value["query"] if isinstance(value, dict) else value
            for task, value in content.items()
        }
    except (ValueError, KeyError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else "they are not where they should be"
        raise DataError(
            f"{path}: no task sentences can be read ({what}). It must be JSON such "
            'as {"FiQA2018": "Given a financial question, ..."}.'
        ) from error
    wrong = [task for task, sentence in prompts.items() if not isinstance(sentence, str)]
    if wrong:
        raise DataError(
            f"{path}: the sentence of {named(wrong[0])} must be a string, got "
            f"{type(prompts[wrong[0]]).__name__}. Correct it, or leave the task out for mteb's."
        )
    return prompts


def report_lines(
    settings: Mapping[str, str], benchmarks: Mapping[str, Sequence[TaskScore]]
) -> list[str]:
    """Return settings, each task, and the means beside the published ones, for 80 columns."""
    lines = [f"{name}: {value}" for name, value in settings.items()]
    for name, scores in benchmarks.items():
        lines += ["", f"{name:30} first reranked instruction"]
        lines += [
            f"{each.task:29.29} {_cells(each.first_stage, each.reranked)} {each.instruction}"
            for each in scores
        ]
    lines += ["", f"{'':10} here{'':13}published"]
    lines.append(f"{'':10} first reranked" + "".join(f"{model:>7}" for model in _MODELS))
    for name, scores in benchmarks.items():
        first = [each.first_stage for each in scores if each.first_stage is not None]
        own = _cells(mean(first) if first else None, mean(each.reranked for each in scores))
        published = "".join(f"{value:7.2f}" for value in PUBLISHED.get(name, ()))
        lines.append(f"{name:10}{own}{published or '   none'}")
    lines += ["", *_LEGEND.splitlines(), *_concerns(settings, benchmarks)]
    return [fit(line) for line in lines]


def _concerns(
    settings: Mapping[str, str], benchmarks: Mapping[str, Sequence[TaskScore]]
) -> Iterator[str]:
    if FIRST_STAGE not in settings["first stage"]:
        yield f"! The published figures are of other candidates, those of {FIRST_STAGE}."
    if PUBLISHED_EVAL.hash[:12] not in settings["template"]:
        yield f"! The published figures are of another prompt, the template {PUBLISHED_EVAL.id}."
    for name, scores in benchmarks.items():
        without = sum(s.instruction == settings["default instruction"] for s in scores)
        if without:
            yield f"! {name}: {without} of {len(scores)} tasks lack an instruction: --task_prompts."
        worse = [s for s in scores if s.first_stage is not None and s.reranked < s.first_stage]
        if worse:
            yield f"! {name}: reranking loses in {len(worse)} of {len(scores)} tasks."


def _cells(first_stage: float | None, reranked: float) -> str:
    first = "-" if first_stage is None else f"{100 * first_stage:.2f}"
    return f"{first:>6}{100 * reranked:9.2f}"
