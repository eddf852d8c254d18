"""Each recipe runs as it is."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


def test_recipes_are_short() -> None:
    assert RECIPES
    assert all(len(recipe.read_text().splitlines()) <= 80 for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_runs(recipe: Path, checkpoint: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(recipe), str(checkpoint())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_embedded_recipe_splits_questions_and_its_config_is_read(tmp_path: Path) -> None:
    from finetune.cli import parse_training, training_parser
    from finetune.data import read_training_file

    folder = RECIPES[0].parent / "embedded"
    names = {"general_en": "who?", "code": "adds", "med_en": "What are the treatments for Gout?"}
    for name, query in names.items():
        row = {"query": query, "positive": ["Gout\nRest."], "negative": ["a", "b"]}
        with lzma.open(tmp_path / f"{name}.train.jsonl.xz", "wt") as file:
            file.write(json.dumps({**row, "instruction": name}) + "\n")
    target = tmp_path / "rows.jsonl"
    subprocess.run(
        [sys.executable, str(folder / "prepare.py"), str(tmp_path), str(target)], check=True
    )
    groups = read_training_file(str(target)).groups
    assert len(groups) == 4
    (derived,) = [group for group in groups if group.query == "Gout"]
    assert "treat" in (derived.instruction or "")
    ours, base, _ = parse_training(training_parser(), ["--config", str(folder / "train.yaml")])
    assert (ours.loss, base.name, base.peft.r) == ("hybrid", "embedded", 16)
