"""Two stages of mteb: a first stage ranks each corpus, the reranker orders its best 100.

Decides what is kept of a run, so that one that was interrupted goes on and ends alike. Knows
nothing of which tasks make a benchmark; how pairs are scored is `cross_encoder.py`'s.

    candidates/FIRST-STAGE-KEY/TASK_predictions.json   its best documents of each query
    candidates/FIRST-STAGE-KEY/TASK.json               its scores, written once the other is whole
    results/reranked-KEY/TASK.json                     scores after reranking
    results/reranked-KEY/subsets/                      mteb's own record of the subsets done
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen3_reranker import Reranker
from qwen3_reranker.errors import DataError, MissingExtraError, ModelLoadError

from .cross_encoder import MtebCrossEncoder, task_instruction
from .retrieval import BM25

TOP_K = 100
"""Candidates of a query, as published; mteb's default is 10."""

OWN_INSTRUCTIONS = "each query's own"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What came out of one task.

    Attributes:
        task: Its name in mteb.
        metric: mteb's main metric of it.
        instruction: Sentence of its queries, or `OWN_INSTRUCTIONS`.
        first_stage: Score of the first stage; None if the task brings its candidates.
        reranked: Score after reranking.
        dataset_revision: Of the data.
    """

    task: str
    metric: str
    instruction: str
    first_stage: float | None
    reranked: float
    dataset_revision: str


def rerank_tasks(
    tasks: Sequence[Any],
    reranker: Reranker,
    first_stage: str,
    output: Path,
    *,
    key: object = (),
    task_prompts: Mapping[str, str] | None = None,
    device: str | None = None,
) -> dict[str, TaskScore]:
    """Evaluate tasks in two stages; what an earlier run with the same settings finished is kept.

    Args:
        tasks: Retrieval or reranking tasks of mteb; one that comes twice is run once.
        reranker: What orders the candidates.
        first_stage: "bm25", or an encoder's name in mteb, on the Hub or on disk.
        output: Folder for candidates and results.
        key: Whatever the reranker's scores depend on; another key, other results.
        task_prompts: Task sentences by the name of their task, before mteb's own.
        device: Where the first stage runs.

    Returns:
        Scores by the name of the task.

    Raises:
        DataError: If a task's data cannot be loaded, or a query has no candidates.
        ModelLoadError: If the first stage cannot be loaded.
        MissingExtraError: Without mteb.
    """
    check_installed()
    prompts = {} if task_prompts is None else task_prompts
    tasks = list({task.metadata.name: task for task in tasks}.values())
    retrieved = _folder(output / "candidates", first_stage, (_files(first_stage), TOP_K))
    encoder = cache(partial(_load_first_stage, first_stage, device))
    first = {}
    for task in tqdm(tasks, desc="First stage", unit=" tasks", leave=False, disable=None):
        if "Reranking" not in task.metadata.type:
            compute = partial(_retrieve, task, encoder, retrieved)
            first[task.metadata.name] = _once(retrieved, task, compute)
    encoder.cache_clear()  # its memory is the reranker's now

    results = _folder(output / "results", "reranked", (key, retrieved.name))
    model = MtebCrossEncoder(reranker, _meta(results.name), prompts)
    default = reranker.loaded.tokenizer.template.default_instruction
    scores = {}
    for task in tqdm(tasks, desc="Reranking", unit=" tasks", leave=False, disable=None):
        name = task.metadata.name
        candidates = retrieved if name in first else None
        result = _once(results, task, partial(_rerank, task, model, candidates, results))
        scores[name] = TaskScore(
            task=name,
            metric=task.metadata.main_score,
            instruction=(
                OWN_INSTRUCTIONS
                if task.metadata.type.startswith("Instruction")
                else task_instruction(task.metadata, prompts) or default
            ),
            first_stage=float(first[name].get_score()) if name in first else None,
            reranked=float(result.get_score()),
            dataset_revision=result.dataset_revision,
        )
    return scores


def _retrieve(task: Any, encoder: Callable[[], Any], folder: Path) -> Any:
    """Have the first stage rank a task's corpus; leave its candidates in the folder."""
    (folder / task.prediction_file_name).unlink(missing_ok=True)  # mteb would add to it
    with _data(task):
        task._top_k = TOP_K  # mteb keeps 1000 documents per query, of which 900 are never read
        return _evaluate(encoder(), task, cache=None, prediction_folder=folder)


def _rerank(task: Any, model: MtebCrossEncoder, candidates: Path | None, folder: Path) -> Any:
    """Have the reranker order a task's candidates; a subset that is done is not done again."""
    import mteb

    with _data(task):
        if candidates is not None:
            task.convert_to_reranking(candidates, top_k=TOP_K)
        _check_candidates(task)
        return _evaluate(model, task, cache=mteb.ResultCache(folder / "subsets"))


def _evaluate(model: Any, task: Any, **settings: Any) -> Any:
    import mteb

    (result,) = mteb.evaluate(
        model,
        task,
        co2_tracker=False,
        encode_kwargs={"batch_size": 32, "show_progress_bar": sys.stderr.isatty()},
        show_progress_bar=False,  # of the one task
        **settings,
    ).task_results
    return result


@contextmanager
def _data(task: Any) -> Iterator[None]:
    """Load a task's data, in the layout of mteb 2, and let go of it at the end."""
    try:
        task.load_data()
    except (OSError, ValueError) as error:
        raise DataError(
            f"the data of {task.metadata.name} cannot be loaded ({type(error).__name__}). They "
            "come from the Hub. Check the connection and start again: what is finished is kept."
        ) from error
    try:
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        yield
    finally:
        task.unload_data()


def _check_candidates(task: Any) -> None:
    """Refuse what mteb only warns of: a query without candidates."""
    for subset, splits in task.dataset.items():
        for split, data in splits.items():
            ranked, judged = data["top_ranked"] or {}, data["relevant_docs"]
            ids = [each for each in data["queries"]["id"] if judged.get(each)]
            missing = [each for each in ids if not ranked.get(each)]
            if missing:
                raise DataError(
                    f"{task.metadata.name}, {subset}, {split}: {len(missing)} of {len(ids)} "
                    f"queries have no candidates, the first is {missing[0]}, so that their scores "
                    "would not be the reranker's. Delete the folder candidates to make them anew."
                )


def _once(folder: Path, task: Any, compute: Callable[[], Any]) -> Any:
    """Return a task's result, computed unless the folder has it for the same data."""
    from mteb.results import TaskResult

    file = folder / f"{task.metadata.name}.json"
    if file.is_file():
        result = TaskResult.from_disk(file)
        if result.dataset_revision == task.metadata.revision:
            return result
    part = file.with_suffix(".part")
    compute().to_disk(part)
    part.replace(file)
    return TaskResult.from_disk(file)  # rounded to six digits, whether interrupted or not


def _load_first_stage(name: str, device: str | None) -> Any:
    import mteb
    from mteb.models import SentenceTransformerEncoderWrapper

    try:
        meta = mteb.get_model_meta("mteb/baseline-bm25s" if name == BM25 else name)
    except KeyError:
        meta = None
    try:
        if meta is None:
            return SentenceTransformerEncoderWrapper(name, device=device)
        return meta.load_model(device=device)
    except (OSError, ValueError, ImportError) as error:
        raise ModelLoadError(
            f"--first_stage {name!r} cannot be loaded ({error}). Pass {BM25}, a name that mteb "
            "knows, or a model or folder of sentence-transformers."
        ) from error


def _meta(revision: str) -> Any:
    """Return the record under which mteb keeps results; the revision says all they depend on."""
    from mteb.models import ModelMeta

    return ModelMeta.create_empty(
        {"name": "reranker", "revision": revision, "model_type": ["cross-encoder"]}
    )


def _folder(parent: Path, name: str, key: object) -> Path:
    """Make the folder of what a key decides."""
    digest = hashlib.sha256(json.dumps((name, key), sort_keys=True).encode()).hexdigest()[:16]
    folder = parent / f"{re.sub('[^A-Za-z0-9.]+', '-', name).strip('-')}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files(name: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of the weights of a first stage on disk: others, other lists."""
    found = sorted(Path(name).rglob("*.safetensors")) if Path(name).is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def check_installed() -> None:
    """Refuse to go on without mteb.

    Raises:
        MissingExtraError: If it, or a package that it needs, is not installed.
    """
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("a benchmark", error.name, "finetune,mteb") from error
