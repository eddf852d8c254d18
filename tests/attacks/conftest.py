"""Counts the attacks of each area and the seconds they took; `make attack` prints the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Return a function that says how many attacks a test has tried, where it is not one."""
    return lambda count: record_property("attacks", count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print attacks tried and survived, and seconds, by area: the name of the test file."""
    attacks: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            file = Path(report.nodeid.split("::")[0])
            if not isinstance(report, pytest.TestReport) or file.parent.name != _FOLDER.name:
                continue
            if report.when == "call":
                area = file.stem.removeprefix("test_")
                count = dict(report.user_properties).get("attacks", 1)
                attacks[area] += count
                survived[area] += count if outcome == "passed" else 0
                seconds[area] += round(report.duration)
    if attacks:
        terminalreporter.section("attacks: area, tried, survived, seconds")
        for area in sorted(attacks):
            row = f"{area:<14}{attacks[area]:>8,}{survived[area]:>8,}{seconds[area]:>6}"
            terminalreporter.write_line(row)
