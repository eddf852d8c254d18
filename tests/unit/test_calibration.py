from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_reranker import Calibration, InputError, ModelLoadError, Reranker
from qwen3_reranker.call.results import probability
from qwen3_reranker.cli.main import main
from tests import fakes
from tests.fakes import FRUIT, QUERY
from tests.invariants import check_ranking

ORDER = [1, 2, 4, 0, 3]
COOL = Calibration(temperature=4.0, bias=-1.0)
finite = st.floats(-1e6, 1e6)


def record(**changes: Any) -> dict[str, Any]:
    fake = fakes.FakeModel()
    return {
        "temperature": 4.0,
        "bias": -1,
        "model": {"fingerprint": fake.fingerprint},
        "template": {"hash": fake.tokenizer.template.hash},
        **changes,
    }


def write(folder: Path, content: Any) -> Path:
    file = folder / "calibration.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@given(finite)
def test_default_changes_no_bit(log_odds: float) -> None:
    assert Calibration().probability(log_odds) == probability(log_odds)


@given(st.lists(finite, min_size=2), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_scores_rise_with_log_odds_whatever_the_numbers(
    log_odds: list[float], temperature: float, bias: float
) -> None:
    calibration = Calibration(temperature, bias)
    scores = [calibration.probability(value) for value in sorted(log_odds)]
    assert all(0 <= low <= high <= 1 for low, high in pairwise([scores[0], *scores]))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, True, "2", None])
def test_temperature_that_is_no_number_above_0_is_refused(temperature: Any) -> None:
    with pytest.raises(InputError, match="temperature of a calibration must be a finite number ab"):
        Calibration(temperature)


@pytest.mark.parametrize("bias", [math.nan, -math.inf, False, "0", None])
def test_bias_that_is_no_number_is_refused(bias: Any) -> None:
    with pytest.raises(InputError, match="bias of a calibration must be a finite number, got"):
        Calibration(1.0, bias)


@pytest.mark.usefixtures("model")
async def test_scores_and_threshold_are_calibrated_and_order_and_log_odds_are_not() -> None:
    plain, cool = Reranker("model"), Reranker("model", calibration=COOL)
    before, after = plain.rank(QUERY, FRUIT), cool.rank(QUERY, FRUIT)
    check_ranking(after, FRUIT, temperature=4.0, bias=-1.0)
    assert [r.index for r in after] == [r.index for r in before] == ORDER
    assert [r.log_odds for r in after] == [r.log_odds for r in before]
    assert max(abs(a.score - b.score) for a, b in zip(after, before, strict=True)) > 0.1
    aligned = [r.score for r in sorted(after, key=lambda r: r.index)]
    assert cool.score(QUERY, FRUIT) == aligned == await cool.ascore(QUERY, FRUIT)
    assert cool.score_pairs([(QUERY, document) for document in FRUIT]) == aligned
    assert await cool.arank(QUERY, FRUIT) == after == cool.rank_many([QUERY], [FRUIT])[0]
    threshold = after[0].score
    kept = cool.rank(QUERY, FRUIT, score_threshold=threshold)
    assert kept == [r for r in after if r.score >= threshold]
    assert 0 < len(kept) < len(plain.rank(QUERY, FRUIT, score_threshold=threshold))
    assert cool.rank(QUERY, []) == []


@pytest.mark.usefixtures("model")
def test_file_path_and_object_are_one(tmp_path: Path) -> None:
    file = write(tmp_path, record())
    read = Calibration.read(file)
    assert (read.temperature, read.bias) == (4.0, -1)
    expected = Reranker("model", calibration=COOL).score(QUERY, FRUIT)
    for given_as in (file, str(file), read):
        assert Reranker("model", calibration=given_as).score(QUERY, FRUIT) == expected


@pytest.mark.parametrize(
    "content",
    [
        "", "[1]", "{}", "7", "[" * 100_000, '"text"', "\udcff",
        record(temperature="4"), record(temperature=math.nan), record(temperature=-4),
        record(bias=None),
        record(model=None), record(model={}), record(model={"fingerprint": 3}),
        record(template={"hash": None}), record(template="qwen3"),
    ],
)  # fmt: skip
def test_files_that_are_no_calibration_are_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "calibration.json"
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"calibrat.*qwen3-finetune calibrate"):
        Reranker("model", calibration=file)


def test_missing_file_and_folder_are_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json' cannot be used \(FileNotFoundError\). Pass"):
        Reranker("model", calibration=tmp_path / "none.json")
    with pytest.raises(InputError, match=r"is a folder. Pass the file in it, '.*calibration.json'"):
        Reranker("model", calibration=tmp_path)


@pytest.mark.parametrize("value", [1.5, True, {"temperature": 2.0}, b"file"])
def test_calibration_of_another_type_is_refused(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(InputError, match=f"calibration must be a file, .* got {kind}. Pass"):
        Reranker("model", calibration=value)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": {"fingerprint": "another's"}}, "fitted for other weights than these"),
        ({"template": {"hash": "another's"}}, "fitted with another prompt template"),
    ],
)
async def test_calibration_of_another_model_is_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    reranker = Reranker("model", calibration=write(tmp_path, record(**other)))
    with pytest.raises(ModelLoadError, match=message):
        reranker.rank(QUERY, FRUIT)
    with pytest.raises(ModelLoadError, match=message):
        await reranker.ascore(QUERY, FRUIT)
    with pytest.raises(ModelLoadError, match=message):  # what a server does before it is ready
        reranker.observe(lambda record: None)
    with pytest.raises(ModelLoadError, match=message):
        _ = reranker.loaded


def test_rerankers_that_share_weights_keep_their_own_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[Any] = []
    fakes.replace_load_model(monkeypatch, lambda **_: loads.append(1) or fakes.FakeModel())
    with (
        Reranker.shared("model") as plain,
        Reranker.shared("model", calibration=COOL) as cool,
    ):
        assert plain.score(QUERY, FRUIT) != cool.score(QUERY, FRUIT)
        assert len(loads) == 1
        for twin in (copy.copy(cool), copy.deepcopy(cool), pickle.loads(pickle.dumps(cool))):  # noqa: S301
            assert twin.score(QUERY, FRUIT) == cool.score(QUERY, FRUIT)


@pytest.mark.usefixtures("model")
def test_rank_command_prints_calibrated_scores_and_cuts_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write(tmp_path, record()))
    cool = Reranker("model", calibration=COOL).rank(QUERY, FRUIT)
    options = ["--calibration", file, "--threshold", str(cool[1].score)]
    assert main(["rank", "--json", "-q", QUERY, *options, *FRUIT]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    kept = [r for r in cool if r.score >= cool[1].score]
    assert [(r["score"], r["log_odds"]) for r in results] == [(r.score, r.log_odds) for r in kept]
    assert main(["rank", "-q", QUERY, "--calibration", str(tmp_path / "none"), *FRUIT]) == 2
    assert "cannot be used (FileNotFoundError)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, np.uint8, int])
def test_any_number_is_a_temperature_and_a_bias(kind: Callable[[int], Any]) -> None:
    calibration = Calibration(kind(2), kind(1))
    assert calibration == Calibration(2.0, 1.0)
    assert type(calibration.temperature) is type(calibration.bias) is float
    assert calibration.probability(-2.0) == 0.5


@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, np.float32("inf"), np.bool_(True), "CANARY"],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["temperature", "bias"])
def test_what_is_no_number_is_refused_and_not_shown(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} of a calibration must be") as caught:
        Calibration(**{name: value})
    assert "CANARY" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["fingerprint", "template_hash"])
@pytest.mark.parametrize(
    "value", [3, ["x"], Mock(spec=str)], ids=lambda value: type(value).__name__
)
def test_hash_that_is_no_string_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} of a calibration must be a string or None"):
        Calibration(**{name: value})


def test_file_too_long_or_of_no_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_reranker.data.jsonl.MAX_LINE_BYTES", 100)
    with pytest.raises(InputError, match=r"cannot be used \(more than 100 bytes\). Pass a file"):
        Calibration.read(write(tmp_path, " " * 101))
    for name in ("x" * 5000, "null\0character"):
        with pytest.raises(InputError, match="cannot be used"):
            Calibration.read(name)
