"""`mine`: hard negatives for training rows, from a corpus.

Decides what is read and written, and how a run that was killed goes on. Which passages come near a
query is `retrieval.py`'s to say, which of them may be negatives `negatives.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from qwen3_reranker import Reranker, __version__
from qwen3_reranker.call.arguments import DTYPES
from qwen3_reranker.call.results import in_order
from qwen3_reranker.checkpoint.locate import stamp
from qwen3_reranker.errors import DataError, InputError

from .data import TrainingGroup, normalised, read_training_file
from .negatives import HIGH, NEAR, Judge, Mining, Pending, candidates, find_negatives, result
from .output import LOCK, hash_file, only_run, whole_lines, write_whole
from .retrieval import BM25, Corpus, Rankings, read_corpus, require, search

PIECE = 16
"""Rows whose documents a teacher scores together; what a killed run loses, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qwen3-finetune mine`; return 0.

    Raises:
        InputError: If settings cannot be used, or a result or other unfinished work is in the way.
        DataError: With every fault of the training file or the corpus.
        MissingExtraError: If the library of a retriever is not installed.
        ModelLoadError: If the teacher or a bi-encoder cannot be used.
    """
    arguments = _parser().parse_args(argv)
    mining = _mining(arguments)
    output = Path(arguments.output_file)
    review = output.with_name(f"{output.stem}.dropped.jsonl")
    work = output.with_name(f"{output.name}.work")
    _check_paths(arguments.corpus, output, work)
    require(arguments.retriever)
    file = read_training_file(
        arguments.train_file, instruction=arguments.instruction, needs_negatives=False
    )
    positives = {normalised(document) for group in file.groups for document in group.positive}
    corpus = read_corpus(arguments.corpus, positives)
    work.mkdir(parents=True, exist_ok=True)
    with only_run(work):
        _check_work(work, _identity(arguments, file.sha256))
        for line in _describe(arguments, file.groups, positives, corpus):
            print(line, flush=True)
        rankings = _first_stage(arguments, corpus, file.groups, work)
        pending = candidates(file.groups, corpus, rankings, mining)
        with _teacher(arguments) as judge:
            mine(pending, corpus, mining, judge, work)
        for line in _finish(work, output, review, len(file.groups) - len(pending)):
            print(line, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-finetune mine",
        description="Give training rows hard negatives from a corpus. A first stage finds passages "
        "near each query; a teacher drops those that may be relevant. Killed and started again, it "
        "goes on where it was.",
    )
    add, default = parser.add_argument, Mining()
    shown = "; default: %(default)s"
    add("--train_file", required=True, help="rows as of validate; negatives may be missing")
    add("--corpus", required=True, help='JSONL of {"text", "title"?, "_id"?}, or a text per line')
    add("--output_file", required=True,
        help="JSONL of training rows; what was dropped, and why, is written beside it")  # fmt: skip
    add("--retriever", nargs="+", default=[BM25], metavar="NAME",
        help="bm25 (the default), names or folders of sentence-transformers models, or several: "
        "then a passage gets its best rank")  # fmt: skip
    add("--skip_top", type=int, default=default.skip_top,
        help=f"first ranks that are never taken{shown}")  # fmt: skip
    add("--depth", type=int, default=default.depth, help=f"last rank that is{shown}")
    add("--num_negatives", type=int, default=default.num_negatives,
        help=f"negatives a row gets, at most, after its own{shown}")  # fmt: skip
    add("--teacher", help='reranker that filters: Hub name, folder or "embedded"')
    add("--teacher_adapter", help="LoRA weights of the teacher")
    add("--margin", type=float,
        help="drop candidates less than this many log-odds below the median "
        "of the row's positives; "
        f"default: {default.margin:g}")  # fmt: skip
    add("--max_log_odds", type=float, help="drop candidates with more, too")
    add("--instruction", help="task sentence of rows that have none")
    add(
        "--max_length",
        type=int,
        default=8192,
        help=f"tokens per pair that the teacher reads{shown}",
    )
    add("--dtype", choices=DTYPES, help="of the teacher")
    add("--device", help="such as cpu or cuda:1")
    add("--seed", type=int, default=default.seed, help=f"of the draw among the ranks{shown}")
    return parser


def _mining(arguments: argparse.Namespace) -> Mining:
    names = ("num_negatives", "skip_top", "depth", "margin", "max_log_odds", "seed")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.teacher is None:
        for name in ("margin", "max_log_odds", "teacher_adapter"):
            if getattr(arguments, name) is not None:
                raise InputError(
                    f"--{name} was given without --teacher, and only a teacher gives log-odds. "
                    f"Pass --teacher MODEL, or leave --{name} out."
                )
    return Mining(**{name: value for name, value in given.items() if value is not None})


def _check_paths(corpus: str, output: Path, work: Path) -> None:
    if not Path(corpus).is_file():
        raise DataError(f"{corpus} is not a file, so a run could not go on with it. Pass a file.")
    if output.suffix != ".jsonl":
        raise InputError(
            f"--output_file must end in .jsonl, got '{output}'. Training files are read by their "
            "ending; compress it afterwards."
        )
    if output.exists() and not work.exists():  # with it, a run was killed while it finished
        raise InputError(f"'{output}' exists already. Name another --output_file, or move it.")


def _identity(arguments: argparse.Namespace, sha256: str) -> dict[str, Any]:
    """Return everything that the result depends on."""
    models = [name for name in (arguments.teacher, arguments.teacher_adapter) if name is not None]
    return {
        "version": __version__,
        **{name: value for name, value in vars(arguments).items() if name != "output_file"},
        "content of the training file": sha256,
        "content of the corpus": hash_file(arguments.corpus),
        "weights of the teacher": [list(map(list, stamp(name))) for name in models],
    }


def _check_work(work: Path, identity: dict[str, Any]) -> None:
    """See that unfinished work in the folder is of this very run."""
    record = work / "run.json"
    if any(each.name != LOCK for each in work.iterdir()):
        found = _kept(record) if record.is_file() else {}
        is_record = isinstance(found, dict)
        changed = [name for name in identity if not is_record or found.get(name) != identity[name]]
        if changed:
            raise InputError(
                f"'{work}' holds an unfinished run with other settings ({', '.join(changed)}), and "
                "rows of both would mix. Repeat that run's command to finish it, delete the "
                "folder, or name another --output_file."
            )
    write_whole(record, json.dumps(identity, indent=2))


def _describe(
    arguments: argparse.Namespace,
    groups: Sequence[TrainingGroup],
    positives: set[str],
    corpus: Corpus,
) -> Iterator[str]:
    yield (
        f"{arguments.train_file}: {len(groups)} rows, {len(positives)} different positives, "
        f"{corpus.num_known} of them passages of the corpus"
    )
    yield (
        f"{arguments.corpus}: {len(corpus.documents)} passages; {corpus.num_left_out} that are "
        "blank or come again were left out"
    )
    if corpus.num_known < len(positives) / 2:
        yield (
            "WARNING: most positives are no passages of the corpus word for word, so those that "
            "are there in another form are not recognised."
        )
    if arguments.teacher is None:
        yield (
            "No teacher: nothing is filtered, and relevant passages that nobody labelled become "
            "negatives. Pass --teacher MODEL, or leave out the first ranks with --skip_top."
        )
        if any(group.scores for group in groups):
            yield "Scores of the rows are left out: mined negatives have none without a teacher."


def _first_stage(
    arguments: argparse.Namespace, corpus: Corpus, groups: Sequence[TrainingGroup], work: Path
) -> Rankings:
    file = work / "rankings.json"
    if not file.is_file():
        found = search(arguments.retriever, corpus, groups, arguments.depth, work, arguments.device)
        write_whole(file, json.dumps(found))
    rankings: Rankings = _kept(file)
    return rankings


def _kept(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"'{file}' of an unfinished run cannot be read ({type(error).__name__}). Delete its "
            "folder to start anew."
        ) from error


@contextmanager
def _teacher(arguments: argparse.Namespace) -> Iterator[Judge | None]:
    if arguments.teacher is None:
        yield None
        return
    with Reranker(
        arguments.teacher,
        adapter=arguments.teacher_adapter,
        dtype=arguments.dtype,
        device=arguments.device,
        max_length=arguments.max_length,
    ) as reranker:
        yield judge_with(reranker)


def judge_with(reranker: Reranker) -> Judge:
    """Return what a reranker makes of documents, under the instruction of each group."""

    def judge(
        groups: Sequence[TrainingGroup], documents: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        rankings = reranker.rank_many(
            [group.query for group in groups],
            documents,
            instruction=[group.instruction for group in groups],
        )
        return [in_order(ranking) for ranking in rankings]

    return judge


def mine(
    pending: Sequence[Pending], corpus: Corpus, mining: Mining, judge: Judge | None, work: Path
) -> None:
    """Find the negatives of each row and write them to the folder, a piece at a time.

    Pieces are the same in every run, so that a run that goes on where another was killed has the
    teacher score the same documents together, and gets the same bits.
    """
    done = work / "pieces.jsonl"
    num_done = len(whole_lines(done)) * PIECE
    with (
        done.open("a", encoding="utf-8") as file,
        tqdm(
            total=len(pending), initial=min(num_done, len(pending)), desc="Mining",
            unit=" rows", leave=False, disable=None,
        ) as bar,
    ):  # fmt: skip
        for start in range(num_done, len(pending), PIECE):
            piece = pending[start : start + PIECE]
            find_negatives(piece, corpus, mining, judge)
            file.write(_as_line([result(each, corpus) for each in piece]))
            file.flush()
            bar.update(len(piece))


def _finish(work: Path, output: Path, review: Path, num_without_positive: int) -> list[str]:
    """Write both files, remove the folder, and return what is to be said."""
    with (work / "pieces.jsonl").open(encoding="utf-8") as file:
        results = [each for line in file for each in json.loads(line)]
    rows = [each["row"] for each in results if each["row"] is not None]
    dropped = [line for each in results for line in each["review"]]
    write_whole(review, "".join(map(_as_line, dropped)))
    if not rows:
        shutil.rmtree(work)
        raise DataError(
            f"no row has a negative, so there is nothing to train on. '{review}' says what was "
            "dropped and why. Raise --depth or lower --margin."
        )
    finished = work / output.name
    write_whole(finished, "".join(map(_as_line, rows)))
    read_training_file(str(finished))  # what training would refuse is refused here
    os.replace(finished, output)
    shutil.rmtree(work)
    return [
        *_summary(results, dropped, num_without_positive),
        f"Written: {output}, and what was dropped: {review}",
        "qwen3-finetune train --model_name_or_path Qwen/Qwen3-Reranker-0.6B "
        f"--train_file {shlex.quote(str(output))}",
    ]


def _summary(
    results: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]], num_without_positive: int
) -> Iterator[str]:
    counts = [each["num_kept"] for each in results]
    yield (
        f"{sum(counts)} negatives mined; per row {min(counts)} min, {median(counts):g} median, "
        f"{max(counts)} max"
    )
    reasons = Counter(line["reason"] for line in dropped)
    tried = sum(each["num_tried"] for each in results)
    yield f"{tried} candidates tried, dropped {reasons[NEAR]} {NEAR} and {reasons[HIGH]} {HIGH}"
    rows = [each["row"] for each in results if each["row"] is not None]
    positives = [score for row in rows if "scores" in row for score in row["scores"]["positive"]]
    if positives:
        refused = sum(score < 0 for score in positives)
        yield f"The teacher says no to {refused} of {len(positives)} positives of these rows"
    for kind, count in (
        ("negative", len(results) - len(rows)), ("positive", num_without_positive)
    ):  # fmt: skip
        if count:
            yield f"Left out for want of a {kind}: {count} of the rows"


def _as_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
