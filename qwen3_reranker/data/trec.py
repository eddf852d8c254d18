"""Candidate lists from a run: the files of TREC, and BEIR folders with a run in them.

Decides which files belong to a run, what their lines mean and in which order a run has its
documents. Knows nothing of models. What lies in a folder together:

    corpus.jsonl    {"_id", "text", "title"?} per line; or corpus.tsv: id, tab, text
    queries.jsonl   {"_id", "text", "instruction"?} per line; or queries.tsv: id, tab, text
    qrels/test.tsv  BEIR's three columns under a header; or a file qrels.*, TREC's four columns
    bm25.trec       the run, six columns, ending in .trec or .run

Each may end in .gz or .xz as well. Without qrels the lists have no labels.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from .candidates import LARGEST_LABEL, CandidateList, read_candidate_rows
from .documents import parse_document
from .jsonl import Faults, parse_rows, read_lines

_RUN_ENDINGS = (".trec", ".run")
_TEXT_ENDINGS = (".jsonl", ".tsv")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a run or of qrels.

    Attributes:
        line: Its number.
        query: Id of the query.
        document: Id of the document.
        value: Score of a run, label of qrels; labels below 0 are 0, as trec_eval counts them.
    """

    line: int
    query: str
    document: str
    value: float


ByQuery = dict[str, list[Line]]


@dataclass(frozen=True, slots=True)
class _Found:
    """Where the parts of a collection are; `qrels` has a file per split, or none."""

    run: str
    corpus: str
    queries: str
    qrels: list[str]


def read_candidates(path: str) -> list[CandidateList]:
    """Read candidate lists of any kind.

    Args:
        path: A file as of `read_candidate_rows`; or a TREC run ending in .trec or .run, or a BEIR
            folder with one in it.

    Raises:
        DataError: If a file is missing, or with every fault of every file, by line.
    """
    return _read_collection(path) if is_collection(path) else read_candidate_rows(path)


def is_collection(path: str) -> bool:
    """Return whether a path leads to a run, or to a folder that should hold one."""
    return _plain(path).endswith(_RUN_ENDINGS) or os.path.isdir(path)


def files_of(path: str) -> list[str]:
    """Return the files that are read for a path of candidate lists.

    Raises:
        DataError: If one is missing.
    """
    if not is_collection(path):
        return [path]
    found = _find(path)
    return [found.run, found.corpus, found.queries, *found.qrels]


def _read_collection(path: str) -> list[CandidateList]:
    """Read a run, or the only one of a folder, with what lies beside it.

    Of several splits of qrels the one counts that judges queries of the run; if more do,
    `qrels/test.tsv`, as in BEIR's own reader.
    """
    found = _find(path)
    qrels = found.qrels[0] if found.qrels else None
    if len(found.qrels) > 1:
        qrels = _split_of(found)
    return read_run(found.run, corpus=found.corpus, queries=found.queries, qrels=qrels)


def read_run(
    run: str, *, corpus: str, queries: str, qrels: str | None = None
) -> list[CandidateList]:
    """Read a run as candidate lists, wherever its files are.

    Documents are ordered by falling score, equal ones as in the file; the column of ranks is not
    read, as by trec_eval. A document without judgment has label 0. Relevant documents that were not
    retrieved become `missing_labels`, in the corpus or not. Judged queries that the run lacks come
    last, without candidates, so that they count as failures; queries that nobody judged are left
    out. A title stands before its text, as in BEIR and MTEB.

    Args:
        run: Lines of query, "Q0", document, rank, score, name of the run.
        corpus: Documents.
        queries: Queries, maybe each with its instruction.
        qrels: Judgments; None gives lists without labels, of all queries of the run.

    Raises:
        DataError: With every fault of every file, by line.
    """
    errors: list[str] = []
    retrieved: ByQuery = _unless_faulty(errors, _read_lines_of, run, _parse_run) or {}
    judged: ByQuery = {}
    if qrels is not None:
        judged = _unless_faulty(errors, _read_lines_of, qrels, _parse_qrels) or {}
    wanted = {each.document for rows in retrieved.values() for each in rows}
    texts = _unless_faulty(errors, _read_texts, corpus, wanted)
    asked = _unless_faulty(errors, _read_named, queries, _parse_query)
    if texts is not None:
        lost = [each for rows in retrieved.values() for each in rows if each.document not in texts]
        _check(errors, run, lost, corpus, "document")
    if asked is not None:
        for path, by_query in ((run, retrieved), (qrels, judged)):
            unknown = [rows[0] for query, rows in by_query.items() if query not in asked]
            _check(errors, str(path), unknown, queries, "query")
    if qrels is not None and not errors and not judged.keys() & retrieved.keys():
        errors.append(f"{qrels} judges no query of {run}. Pass the qrels of the run's queries.")
    if errors or texts is None or asked is None:
        raise DataError("\n".join(errors))
    names = dict.fromkeys([*retrieved, *judged])
    return [
        _as_list(name, asked[name], retrieved.get(name, []), texts, judged.get(name))
        for name in names
        if qrels is None or name in judged
    ]


def _as_list(
    name: str,
    asked: tuple[str, str | None],
    retrieved: list[Line],
    texts: dict[str, str],
    judged: list[Line] | None,
) -> CandidateList:
    ids = [each.document for each in sorted(retrieved, key=lambda each: -each.value)]
    labels = {each.document: int(each.value) for each in judged or []}
    missing = labels.keys() - set(ids)
    return CandidateList(
        query_id=name,
        query=asked[0],
        instruction=asked[1],
        ids=ids,
        texts=[texts[id] for id in ids],
        labels=None if judged is None else [labels.get(id, 0) for id in ids],
        missing_labels=[label for id, label in labels.items() if id in missing and label],
    )


def _find(path: str) -> _Found:
    given = Path(path)
    is_folder = os.path.isdir(path)
    folder = given if is_folder else given.parent
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise DataError(
            f"the folder of '{path}' cannot be read ({type(error).__name__}). Check the path."
        ) from error
    files = [folder / name for name in names if _plain(name).endswith(_RUN_ENDINGS)]
    runs = [str(file) for file in files if not file.name.startswith("qrels.")]
    if is_folder and len(runs) != 1:
        what = f"{len(runs)} runs" if runs else "no run (a file that ends in .trec or .run)"
        raise DataError(f"'{path}' has {what}. Pass the path of the run, in that folder.")
    qrels = [file for file in folder.glob("qrels.*") if file.is_file()]
    qrels += [file for file in folder.glob("qrels/*") if file.is_file()]
    return _Found(
        run=runs[0] if is_folder else path,
        corpus=_text_file(folder, "corpus"),
        queries=_text_file(folder, "queries"),
        qrels=sorted(map(str, qrels)),
    )


def _text_file(folder: Path, name: str) -> str:
    names = [f"{name}{end}{packed}" for end in _TEXT_ENDINGS for packed in ("", ".gz", ".xz")]
    found = [str(folder / each) for each in names if (folder / each).is_file()]
    if len(found) != 1:
        got = " and ".join(Path(each).name for each in found) or "neither"
        raise DataError(
            f"'{folder}' must have one {name}.jsonl or {name}.tsv beside the run, got {got}. Put "
            "or link it there."
        )
    return found[0]


def _split_of(found: _Found) -> str:
    asked = _read_lines_of(found.run, _parse_run).keys()
    fitting = [
        path for path in found.qrels if asked & _read_lines_of(path, _parse_qrels).keys()
    ]  # fmt: skip
    usual = [path for path in fitting if _plain(Path(path).name) == "test.tsv"]
    if len(fitting) == 1 or usual:
        return (usual or fitting)[0]
    got = ", ".join(Path(path).name for path in fitting) or "none"
    raise DataError(
        f"one file of {len(found.qrels)} with qrels beside '{found.run}' must judge its queries, "
        f"got {got}. Leave the one that counts."
    )


def _read_lines_of(path: str, parse: Callable[[list[str]], tuple[str, str, float]]) -> ByQuery:
    """Read the lines of a run or of qrels, by query in order of appearance."""
    found: ByQuery = {}
    seen: dict[tuple[str, str], int] = {}
    faults = Faults(path)
    for line, text in read_lines(path):
        columns = text.split()
        if line == 1 and len(columns) == 3 and columns[2].isalpha():
            continue  # BEIR's header
        try:
            query, document, value = parse(columns)
            first = seen.setdefault((query, document), line)
            if first != line:
                raise ValueError(
                    f"its query and document are those of line {first}; give each pair once"
                )
        except ValueError as error:
            faults.add(f"line {line}: {error}")
            continue
        found.setdefault(query, []).append(Line(line, query, document, value))
    if faults:
        raise faults.error()
    if not found:
        raise DataError(f"{path} has no lines. Pass a run or qrels with one document per line.")
    return found


def _parse_run(columns: list[str]) -> tuple[str, str, float]:
    if len(columns) != 6:
        raise ValueError(
            f"must have 6 columns (query, Q0, document, rank, score, run), got {len(columns)}"
        )
    try:
        score = float(columns[4])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError("the score in column 5 must be a finite number")
    return columns[0], columns[2], score


def _parse_qrels(columns: list[str]) -> tuple[str, str, float]:
    if len(columns) not in (3, 4):
        raise ValueError(
            "must have 4 columns (query, 0, document, label) or BEIR's 3 (query, document, label), "
            f"got {len(columns)}"
        )
    label = columns[-1]
    if re.fullmatch(r"-[0-9]+", label):
        return columns[0], columns[-2], 0
    digits = label.removeprefix("+").lstrip("0") or label[-1]
    if re.fullmatch(r"[0-9]{1,10}", digits) is None or int(digits) > LARGEST_LABEL:
        raise ValueError(
            f"the label in the last column must be a whole number of at most {LARGEST_LABEL}"
        )
    return columns[0], columns[-2], int(digits)


def _read_texts(path: str, wanted: Collection[str]) -> dict[str, str]:
    """Read the documents of a corpus that are wanted; it may be too large to keep."""

    def parse(row: dict[str, Any], line: int) -> tuple[str, str | None]:
        document = parse_document(row, line)
        return document.id, document.titled_text if document.id in wanted else None

    return _read_named(path, parse)


def _parse_query(row: dict[str, Any], line: int) -> tuple[str, tuple[str, str | None]]:
    query = parse_document(row, line)
    if not query.text.strip():
        raise ValueError("'text' is blank")
    instruction = row.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"'instruction' must be a string, got {type(instruction).__name__}")
    return query.id, (query.text, instruction)


def _read_named(
    path: str, parse: Callable[[dict[str, Any], int], tuple[str, Value | None]]
) -> dict[str, Value]:
    """Read what is called by an id; what is parsed as None is left out."""
    found: dict[str, Value] = {}
    lines: dict[str, int] = {}

    def keep(row: dict[str, Any], line: int) -> None:
        name, value = parse(row, line)
        if name in found:
            raise ValueError(f"its id is that of line {lines[name]}; give each id once")
        if value is not None:
            found[name], lines[name] = value, line

    if _plain(path).endswith(".jsonl"):
        parse_rows(path, keep)
        return found
    faults = Faults(path)
    for line, text in read_lines(path):
        name, tab, rest = text.partition("\t")
        try:
            if not tab:
                raise ValueError("must be an id, a tab and a text")
            keep({"_id": name, "text": rest}, line)
        except ValueError as error:
            faults.add(f"line {line}: {error}")
    if faults:
        raise faults.error()
    return found


def _unless_faulty(errors: list[str], read: Callable[..., Value], *args: Any) -> Value | None:
    """Return what is read, or None and one error more."""
    try:
        return read(*args)
    except DataError as error:
        errors.append(str(error))
        return None


def _check(errors: list[str], path: str, lost: Iterable[Line], target: str, kind: str) -> None:
    """Add an error for lines that name what is not in another file."""
    faults = Faults(path, (f"line {each.line}: its {kind} is not in {target}" for each in lost))
    if faults:
        errors.append(str(faults.error()))


def _plain(path: str) -> str:
    return path.removesuffix(".gz").removesuffix(".xz")
