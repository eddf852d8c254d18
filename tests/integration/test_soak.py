"""A short soak in every run; `make soak MINUTES=30` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("minutes", ["0.2", pytest.param("1", marks=pytest.mark.slow)])
def test_load_through_all_paths_is_exact_and_leaves_nothing(minutes: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", minutes],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_server_survives_clients_that_misbehave() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server_soak", "--seconds", "60"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
