"""A short soak in every run; `make soak MINUTES=30` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def check(module: str, *options: str) -> None:
    """Run a soak to its end; it says itself whether all was as promised."""
    done = subprocess.run(
        [sys.executable, "-m", module, *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["0.2", "1"])
def test_load_through_all_paths_is_exact_and_leaves_nothing(minutes: str) -> None:
    check("tests.soak", "--minutes", minutes)


@pytest.mark.slow
def test_server_survives_clients_that_misbehave() -> None:
    check("tests.server_soak", "--minutes", "1")
