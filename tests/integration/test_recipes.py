"""Each recipe runs as it is."""

from __future__ import annotations

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
