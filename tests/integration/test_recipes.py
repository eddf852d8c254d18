"""Each recipe runs as it is."""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
from collections.abc import Callable
from math import log2
from pathlib import Path
from statistics import mean

import pytest

from tests.judgments import write_judgments
from tests.real_parts import save_random_adapter, save_random_qwen3_embedding

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))
ELSEWHERE = {"05_vllm_offline.py", "07_bulk_ray.py"}  # test_vllm.py, test_bulk_ray.py run them


def test_recipes_are_short() -> None:
    assert RECIPES
    assert all(len(recipe.read_text().splitlines()) <= 80 for recipe in RECIPES)


def test_table_lists_every_recipe() -> None:
    table = (RECIPES[0].parent / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(.*?)\]\(\1\)", table, re.MULTILINE) == [r.name for r in RECIPES]


SUPPORT = RECIPES[0].parent / "support"
TRAINING = ("08_distill.py", "09_merge.py", "12_own_domain.py", "13_calibrate.py")
"""Hear warnings of other libraries."""


@pytest.fixture
def arguments(checkpoint: Callable[..., Path], tmp_path: Path) -> dict[str, list[str]]:
    """Command lines with which recipes take seconds; any other gets a model."""
    model = str(checkpoint())
    for name in ("train", "dev"):
        rows = (SUPPORT / f"{name}.jsonl").read_text().splitlines()[:4]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = [str(tmp_path / "train.jsonl"), str(tmp_path / "dev.jsonl")]
    adapters = [str(save_random_adapter(tmp_path / name, checkpoint())) for name in ("a", "b")]
    embedding = str(save_random_qwen3_embedding(tmp_path / "embedding"))
    judged = tmp_path / "judged.jsonl"
    write_judgments(judged, checkpoint())
    one_step = ["--max_steps", "1", "--use_cpu", "true"]
    return {
        "08_distill.py": [model, model, *files, *one_step],
        "09_merge.py": [model, *adapters, files[1]],
        "10_two_stage.py": [model, embedding],
        "12_own_domain.py": [model, *write_unmined(tmp_path), files[1], *one_step],
        "13_calibrate.py": [model, str(judged), "--precision", "0.8"],
    }


def write_unmined(folder: Path) -> list[str]:
    """Write rows that have no negatives, and the corpus where these are to be found."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    corpus = folder / "passages.txt"
    corpus.write_text("\n".join(text for row in rows for text in row["positive"] + row["negative"]))
    labelled = folder / "labelled.jsonl"
    labelled.write_text("\n".join(json.dumps({**row, "negative": []}) for row in rows))
    return [str(labelled), str(corpus)]


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.name not in ELSEWHERE], ids=lambda recipe: recipe.name
)
def test_recipe_runs(
    recipe: Path,
    checkpoint: Callable[..., Path],
    arguments: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    own = arguments.get(recipe.name)
    strict = [] if recipe.name in TRAINING else ["-W", "error"]
    done = subprocess.run(
        [sys.executable, *strict, str(recipe), *(own or [str(checkpoint())])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if recipe.name == "10_two_stage.py":
        ways = re.split("Plain Python|LangChain|LlamaIndex", done.stdout)[-3:]
        assert ways == ways[:1] * 3
        assert ways[0].count("\n") == 4


def test_embedded_recipe_splits_questions_and_its_config_is_read(tmp_path: Path) -> None:
    from finetune.cli import parse_training, training_parser
    from finetune.data import read_training_file

    folder = RECIPES[0].parent / "embedded"
    names = {"general_en": "who?", "code": "adds", "med_en": "What are the treatments for Gout?"}
    for name, query in names.items():
        row = {"query": query, "positive": ["Gout\nRest."], "negative": ["a", "b"]}
        with lzma.open(tmp_path / f"{name}.train.jsonl.xz", "wt") as file:
            file.write(json.dumps({**row, "instruction": name}) + "\n")
    target = tmp_path / "rows"
    subprocess.run(
        [sys.executable, str(folder / "prepare.py"), str(tmp_path), str(target)], check=True
    )
    groups = read_training_file(str(target / "first.jsonl")).groups
    derived = [group for group in groups if group.query == "Gout"]
    assert derived
    assert all("treat" in (group.instruction or "") for group in derived)
    assert {group.query for group in groups} == {*names.values(), "Gout"}
    first, second = (
        parse_training(training_parser(), ["--config", str(folder / f"{name}.yaml")])
        for name in ("first", "second")
    )
    for ours, base, _ in (first, second):
        assert (ours.loss, base.name, base.peft.r) == ("hybrid", "embedded-base", 16)
    assert second[0].adapter == first[2].output_dir


def test_support_recipe_is_read_and_its_data_is_what_it_says() -> None:
    from finetune.cli import parse_training, training_parser
    from finetune.data import check_leaks, read_training_file
    from finetune.served import read_lists

    config = ["--config", str(SUPPORT / "train.yaml")]
    ours, base, _ = parse_training(training_parser(), config)
    assert (base.name, base.peft.r, ours.max_length) == ("embedded", 16, 256)
    assert ours.train_file == ["recipes/support/train.jsonl"]  # from the root of a clone
    assert ours.eval_file == ["recipes/support/dev.jsonl"]
    groups = read_training_file(str(SUPPORT / "train.jsonl")).groups
    lists = read_lists([str(SUPPORT / "dev.jsonl")])
    assert (len(groups), len(lists["dev"])) == (192, 48)
    assert {(len(group.positive), len(group.negative)) for group in groups} == {(1, 5)}
    assert {(len(each.texts), sum(each.labels or [])) for each in lists["dev"]} == {(10, 1)}
    assert check_leaks(groups, lists) == []
    trained = {text for group in groups for text in [*group.positive, *group.negative]}
    assert not trained & {text for each in lists["dev"] for text in each.texts}


def test_support_queries_have_another_answer_under_each_instruction() -> None:
    from finetune.data import read_training_file
    from finetune.served import read_lists

    groups = read_training_file(str(SUPPORT / "train.jsonl")).groups
    (lists,) = read_lists([str(SUPPORT / "dev.jsonl")]).values()
    answers = [(group.query, group.instruction, group.positive[0]) for group in groups]
    answers += [
        (each.query, each.instruction, each.texts[(each.labels or []).index(1)]) for each in lists
    ]
    by_query: dict[str, set[tuple[str | None, str]]] = {}
    for query, instruction, answer in answers:
        by_query.setdefault(query, set()).add((instruction, answer))
    for pairs in by_query.values():
        assert len(pairs) == len({instruction for instruction, _ in pairs}) == 2
        assert len({answer for _, answer in pairs}) == 2
    # A scorer that does not read the instruction cannot tell the two lists of a query apart.
    texts = [(each.query, tuple(each.texts)) for each in lists]
    assert all(texts.count(each) == 2 for each in texts)


def test_support_lists_are_not_given_away_by_order_or_length() -> None:
    from finetune.metrics import ScoredSet, heuristics, measure
    from finetune.served import read_lists

    (lists,) = read_lists([str(SUPPORT / "dev.jsonl")]).values()
    by_chance = sum(1 / log2(rank + 2) for rank in range(10)) / 10  # 0.454
    for name, scores in heuristics(lists).items():
        assert mean(measure(ScoredSet(name, lists, scores))["nDCG@10"]) < by_chance + 0.05


@pytest.mark.slow  # a training run: minutes
def test_support_recipe_teaches_its_domain(tmp_path: Path) -> None:
    from dataclasses import replace

    from benchmarks.domain import CONFIG, by_topic, train
    from finetune.cli import parse_training, training_parser
    from finetune.metrics import compare
    from finetune.served import Served, read_lists, saved_scores

    ours, base, _ = parse_training(training_parser(), ["--config", CONFIG])
    (lists,) = read_lists(ours.eval_file).values()
    train(ours.train_file[0], 0, tmp_path / "adapter")
    untuned = Served(base.name, max_length=ours.max_length)
    before, after = (
        by_topic(lists, saved_scores(served, {"dev": lists}, tmp_path)["dev"])
        for served in (untuned, replace(untuned, adapter=str(tmp_path / "adapter")))
    )
    gain = compare(before, after)
    assert gain.difference > 0.1
    assert gain.p_value < 0.05
