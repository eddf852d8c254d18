"""Mining: what is found, what may be a negative, what a teacher drops, and how a run goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune import mine as command
from finetune.cli import main
from finetune.data import TrainingGroup, normalised, read_training_file
from finetune.negatives import HIGH, LEFT_OUT, NEAR, Judge, Mining, candidates, find_negatives
from finetune.output import only_run
from finetune.retrieval import BM25, Corpus, query_prompt, read_corpus, search, unite, words
from qwen3_reranker import DataError
from qwen3_reranker.data.documents import Document


def corpus_of(*texts: str) -> Corpus:
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    return Corpus(documents, has_titles=True, num_left_out=0, num_known=0)


def group(
    query: str, positive: Sequence[str], negative: Sequence[str] = (), instruction: Any = None
) -> TrainingGroup:
    return TrainingGroup(query, list(positive), list(negative), instruction)


def write(file: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(file)


# Rows.

ANSWER = [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("none", ["absent", [], None])
@pytest.mark.parametrize(
    ("row", "key"),
    [({"query": "q", "positive": ["yes"]}, "negative"),
     ({"query": "q", "pos": ["yes"]}, "neg"),
     ({"messages": [{"role": "user", "content": "q"}], "positive_messages": [ANSWER]},
      "negative_messages")],
    ids=["ours", "FlagEmbedding", "ms-swift"],
)  # fmt: skip
def test_rows_without_negatives_are_read_where_none_are_needed(
    tmp_path: Path, row: dict[str, Any], key: str, none: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", row | ({} if none == "absent" else {key: none}))
    expected = [TrainingGroup("q", ["yes"], [], None)]
    assert read_training_file(path, needs_negatives=False).groups == expected
    with pytest.raises(DataError, match=f"'{key}' must be a list of at least one"):
        read_training_file(path)
    wrong = write(tmp_path / "wrong.jsonl", row | {key: "no"})
    with pytest.raises(DataError, match=f"'{key}' must be a list of at least one"):
        read_training_file(wrong, needs_negatives=False)


# A corpus.


def test_passages_are_taken_once_and_blank_ones_never(tmp_path: Path) -> None:
    path = write(
        tmp_path / "corpus.jsonl",
        {"_id": "a", "text": "Tea  is hot"}, {"_id": "b", "text": " "}, {"text": "tea is HOT"},
        {"id": 7, "text": "Rain"},
    )  # fmt: skip
    corpus = read_corpus(path, {normalised("RAIN")})
    assert [document.id for document in corpus.documents] == ["a", "7"]
    assert (corpus.num_left_out, corpus.num_known) == (2, 1)


def test_a_text_file_holds_a_passage_per_line(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path / "corpus.txt", "Tea", "", "Rain"), set())
    assert [corpus.text(i) for i in range(2)] == ["Tea", "Rain"]


@pytest.mark.parametrize(
    ("positive", "expected"),
    [("Tea Drink it hot", "Tea Drink it hot"), ("Drink it hot", "Drink it hot"),
     ("something else", "Tea Drink it hot")],
    ids=["with", "without", "in doubt"],
)  # fmt: skip
def test_passages_have_titles_if_the_positives_have(
    tmp_path: Path, positive: str, expected: str
) -> None:
    path = write(tmp_path / "corpus.jsonl", {"title": "Tea", "text": "Drink it hot"})
    corpus = read_corpus(path, {normalised(positive)})
    assert corpus.text(0) == expected
    # However they are read, a positive is recognised in either form.
    assert corpus.forms(0) == {"tea drink it hot", "drink it hot"}


def test_an_empty_corpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = files(tmp_path, [ROW], [])
    Path(arguments[4]).write_text('{"text": " "}\n')
    assert main(arguments) == 2
    assert "has no passages" in capsys.readouterr().err


# The first stage.


def test_bm25_finds_passages_that_share_a_word_and_no_others(tmp_path: Path) -> None:
    corpus = corpus_of("green tea", "rain", "tea", "black tea and rain", "tea")
    groups = [group("tea", ["x"]), group("rain", ["x"]), group("!?", ["x"]), group("snow", ["x"])]
    tea, rain, *others = search([BM25], corpus, groups, 10, tmp_path)
    assert set(tea) == {0, 2, 3, 4}
    assert tea[:2] == [2, 4], "equal scores stand in the corpus's order"
    assert rain == [1, 3]
    assert others == [[], []]
    assert search([BM25], corpus, groups[:1], 2, tmp_path) == [[2, 4]]


def test_a_corpus_without_words_is_searched_in_vain(tmp_path: Path) -> None:
    assert search([BM25], corpus_of("!?", "..."), [group("tea", ["x"])], 10, tmp_path) == [[]]


@pytest.mark.parametrize("query", ["哪种茶不含咖啡因", "ชาไม่มีคาเฟอีน", "カフェインのないお茶"])
def test_bm25_reads_scripts_without_spaces(query: str, tmp_path: Path) -> None:
    corpus = corpus_of(
        "洋甘菊茶不含咖啡因。",
        "ชาคาโมมายล์ไม่มีคาเฟอีน",
        "カモミールティーはカフェインのないお茶です",
        "雨",
    )
    (found,) = search([BM25], corpus, [group(query, ["x"])], 1, tmp_path)
    assert found == [["哪种茶不含咖啡因", "ชาไม่มีคาเฟอีน", "カフェインのないお茶"].index(query)]
    assert len(words(query)) > 5


def test_rankings_are_united_by_best_rank() -> None:
    assert unite([[1, 2, 3], [4, 3]], depth=10) == [1, 4, 2, 3]
    assert unite([[4, 3], [1, 2, 3]], depth=2) == [4, 1], "of equal ranks the first named wins"
    assert unite([[], [5]], depth=1) == [5]


def test_instruction_takes_the_place_of_the_checkpoints_task() -> None:
    qwen = "Instruct: Given a web search query, retrieve passages\nQuery:"
    assert query_prompt(qwen, r"Find \1 law") == "Instruct: Find \\1 law\nQuery:"
    assert query_prompt(qwen, None) == qwen
    assert query_prompt("query: ", "Find law") == "query: "
    assert query_prompt(None, "Find law") is None


# What may be a negative.

LETTERS = corpus_of("a", "b", "c", "d", "e", "f")


def tried(groups: Sequence[TrainingGroup], corpus: Corpus = LETTERS, **settings: Any) -> Any:
    everything = [list(range(len(corpus.documents))) for _ in groups]
    found = candidates(groups, corpus, everything, Mining(**settings))
    return [{corpus.text(place) for _, place in each.untried} for each in found]


def test_positives_of_every_row_with_the_query_are_left_out() -> None:
    groups = [group("Q  1", ["a"]), group("q 1", ["B "], instruction="other"), group("q 2", ["c"])]
    assert tried(groups) == [set("cdef"), set("cdef"), set("abdef")]


def test_the_query_and_negatives_that_are_there_are_left_out() -> None:
    assert tried([group("F", ["a"], ["b"])]) == [set("cde")]


def test_only_ranks_of_the_window_are_tried() -> None:
    (search,) = candidates(
        [group("q", ["b"])], LETTERS, [[5, 4, 1, 3]], Mining(skip_top=1, depth=3)
    )
    assert search.untried == [(2, 4)], "ranks are those of the first stage, exclusions included"


def test_a_row_without_positive_is_left_out_and_the_others_keep_their_numbers() -> None:
    found = candidates([group("q", [], ["a"]), group("r", ["b"])], LETTERS, [[0], [0]], Mining())
    assert [search.row for search in found] == [2]


def test_the_seed_decides_what_is_tried_first() -> None:
    corpus = corpus_of(*(f"passage {i}" for i in range(40)))
    groups, rankings = [group("q", ["a"])] * 2, [list(range(40))] * 2

    def order(seed: int) -> list[list[tuple[int, int]]]:
        return [
            search.untried for search in candidates(groups, corpus, rankings, Mining(seed=seed))
        ]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[0] != order(0)[1], "rows with one query do not get the same negatives"


# What a teacher drops.


def judge_by(log_odds: dict[str, float], seen: list[Any] | None = None) -> Judge:
    def judge(
        groups: Sequence[TrainingGroup], documents: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        if seen is not None:
            seen.extend(zip([group.instruction for group in groups], documents, strict=True))
        return [[log_odds[text] for text in row] for row in documents]

    return judge


def found_by(
    log_odds: dict[str, float], positive: Sequence[str], **settings: Any
) -> tuple[set[str], dict[str, str]]:
    mining = Mining(**settings)
    places = [list(range(len(LETTERS.documents)))]
    (search,) = candidates([group("q", positive)], LETTERS, places, mining)
    find_negatives([search], LETTERS, mining, judge_by(log_odds))
    kept = {LETTERS.text(place) for place, _ in search.kept}
    return kept, {line["document"]: line["reason"] for line in search.dropped}


SCORES = {
    "p": 4.0,
    "high": 9.0,
    "low": -8.0,
    "a": 5.0,
    "b": 4.0,
    "c": 3.001,
    "d": 3.0,
    "e": 1.0,
    "f": -7.0,
}


def test_what_comes_within_the_margin_of_the_positive_is_dropped() -> None:
    assert found_by(SCORES, ["p"]) == (set("def"), dict.fromkeys("abc", NEAR))
    assert found_by(SCORES, ["p"], margin=0)[0] == set("bcdef")
    assert found_by(SCORES, ["p"], margin=3.5)[0] == set("f")


def test_of_several_positives_the_median_counts() -> None:
    assert found_by(SCORES, ["high", "low", "p"]) == found_by(SCORES, ["p"])
    assert found_by(SCORES, ["high", "p"], margin=1.5)[0] == set("abcdef")
    assert found_by(SCORES, ["high", "p"], margin=1.6)[0] == set("bcdef")


def test_what_is_above_the_limit_is_dropped_however_good_the_positive_is() -> None:
    kept, dropped = found_by(SCORES, ["high"], max_log_odds=3.5)
    assert kept == set("cdef")
    assert dropped == dict.fromkeys("ab", HIGH)


def test_without_a_teacher_nothing_is_dropped() -> None:
    (search,) = candidates([group("q", ["a"])], LETTERS, [[0, 1, 2]], Mining())
    find_negatives([search], LETTERS, Mining(), None)
    assert {place for place, _ in search.kept} == {1, 2}
    assert (search.scores, search.dropped) == ([], [])


def test_no_candidate_is_scored_in_vain_and_rows_bring_their_instructions() -> None:
    corpus = corpus_of(*(f"passage {i}" for i in range(30)))
    log_odds = {f"passage {i}": 5.0 if i % 2 else 0.0 for i in range(30)} | {"p": 4.0, "n": 1.0}
    groups = [group("q", ["p"], ["n"], "Find law"), group("r", ["p"])]
    seen: list[Any] = []
    mining = Mining(num_negatives=4)
    found = candidates(groups, corpus, [list(range(30))] * 2, mining)
    find_negatives(found, corpus, mining, judge_by(log_odds, seen))
    assert seen[:2] == [("Find law", ["p", "n"]), (None, ["p"])]
    for each in found:
        documents = [text for instruction, row in seen if instruction == each.group.instruction
                     for text in row if text.startswith("passage")]  # fmt: skip
        assert len(each.kept) == 4
        assert len(documents) == len(set(documents)) == 4 + len(each.dropped) == each.num_tried
        assert all(log_odds[corpus.text(place)] == score == 0.0 for place, score in each.kept)


# The command.

ROW = {"query": "tea", "positive": ["green tea"]}
TEXTS = ["green tea", "tea pot", "tea bag", "hot tea", "tea time", "rain"]


def files(tmp_path: Path, rows: Sequence[Any], texts: Sequence[str], *flags: str) -> list[str]:
    train = write(tmp_path / "train.jsonl", *rows)
    corpus = write(tmp_path / "corpus.jsonl", *({"text": text} for text in texts))
    return ["mine", "--train_file", train, "--corpus", corpus,
            "--output_file", str(tmp_path / "mined.jsonl"), *flags]  # fmt: skip


@pytest.fixture
def teach(monkeypatch: pytest.MonkeyPatch) -> Callable[[Judge], None]:
    """Return a function that puts a judge in the place of every teacher."""

    def put(judge: Judge) -> None:
        @contextmanager
        def teacher(arguments: Any) -> Iterator[Judge]:
            yield judge

        monkeypatch.setattr(command, "_teacher", teacher)
        monkeypatch.setattr(command, "stamp", lambda name: [(name, 1, 1)])

    return put


def by_length(
    groups: Sequence[TrainingGroup], documents: Sequence[Sequence[str]]
) -> list[list[float]]:
    return [[float(len(text)) for text in row] for row in documents]


def test_without_negatives_and_teacher_rows_get_some_and_the_output_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(files(tmp_path, [ROW], TEXTS)) == 0
    out = capsys.readouterr().out
    assert "No teacher: nothing is filtered" in out
    assert out.splitlines()[-1].startswith("qwen3-finetune train --model_name_or_path ")
    (row,) = read_training_file(str(tmp_path / "mined.jsonl")).groups
    assert set(row.negative) == {"tea pot", "tea bag", "hot tea", "tea time"}
    assert row.scores is None
    assert {file.name for file in tmp_path.iterdir()} == {
        "train.jsonl", "corpus.jsonl", "mined.jsonl", "mined.dropped.jsonl"
    }  # fmt: skip


def test_rows_in_every_layout_keep_negatives_and_instruction_and_get_scores(
    tmp_path: Path, teach: Callable[[Judge], None], capsys: pytest.CaptureFixture[str]
) -> None:
    teach(by_length)
    rows = [
        [{"query": "tea", "positive": ["green tea"], "negative": ["hot tea"], "instruction": "I"}],
        [{"query": "tea", "document": "green tea", "label": 1, "instruction": "I"},
         {"query": "tea", "document": "hot tea", "label": 0, "instruction": "I"}],
        [{"query": "tea", "pos": ["green tea"], "neg": ["hot tea"], "prompt": "I"}],
        [{"messages": [{"role": "system", "content": "I"}, {"role": "user", "content": "tea"}],
          "positive_messages": [[{"role": "user", "content": "green tea"}]],
          "negative_messages": [[{"role": "user", "content": "hot tea"}]]}],
    ]  # fmt: skip
    for number, layout in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert main(files(folder, layout, TEXTS, "--teacher", "fake", "--margin", "1.5")) == 0
        (mined,) = read_training_file(str(folder / "mined.jsonl")).groups
        # Eight letters are within 1.5 of nine; own negatives are judged and stay.
        assert (mined.query, mined.positive, mined.instruction) == ("tea", ["green tea"], "I")
        assert mined.negative[0] == "hot tea"
        assert set(mined.negative[1:]) == {"tea pot", "tea bag"}
        assert mined.scores == [9.0, 7.0, 7.0, 7.0]
        (dropped,) = map(json.loads, (folder / "mined.dropped.jsonl").read_text().splitlines())
        assert dropped.pop("rank") in range(1, 6)
        assert dropped == {
            "row": 1, "query": "tea", "instruction": "I", "id": "5", "document": "tea time",
            "reason": NEAR, "log_odds": 8.0, "positives": [9.0],
        }  # fmt: skip
    assert "No teacher" not in capsys.readouterr().out


def test_scores_that_would_no_longer_fit_are_left_out_and_the_output_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"positive": [2.0], "negative": [1.0]}
    assert main(files(tmp_path, [{**ROW, "negative": ["hot tea"], "scores": scores}], TEXTS)) == 0
    assert "Scores of the rows are left out" in capsys.readouterr().out
    (row,) = read_training_file(str(tmp_path / "mined.jsonl")).groups
    assert row.scores is None


def test_rows_left_without_negative_are_left_out_and_named(
    tmp_path: Path, teach: Callable[[Judge], None], capsys: pytest.CaptureFixture[str]
) -> None:
    teach(by_length)
    rows = [{"query": "rain", "positive": ["r"]}, ROW, {"query": "snow", "positive": ["cold snow"]}]
    assert main(files(tmp_path, rows, [*TEXTS, "x\u2028 rain"], "--teacher", "fake")) == 0
    (row,) = read_training_file(str(tmp_path / "mined.jsonl")).groups
    assert row.query == "tea"
    review = (tmp_path / "mined.dropped.jsonl").read_text(encoding="utf-8").strip().split("\n")
    left_out = [line["row"] for line in map(json.loads, review) if line["reason"] == LEFT_OUT]
    assert left_out == [1, 3]
    out = capsys.readouterr().out
    assert "Left out for want of a negative: 2 of the rows" in out
    assert "WARNING: most positives are no passages" in out


def test_nothing_found_is_an_error_and_can_be_tried_again(
    tmp_path: Path, teach: Callable[[Judge], None], capsys: pytest.CaptureFixture[str]
) -> None:
    teach(by_length)
    assert main(files(tmp_path, [ROW], TEXTS, "--teacher", "fake", "--margin", "99")) == 2
    assert "no row has a negative" in capsys.readouterr().err
    assert (tmp_path / "mined.dropped.jsonl").read_text().count(NEAR) == 4
    assert not (tmp_path / "mined.jsonl").exists()
    assert main(files(tmp_path, [ROW], TEXTS, "--teacher", "fake", "--margin", "0")) == 0


MANY_ROWS = [{"query": f"tea {i}", "positive": [f"green tea {i}"]} for i in range(40)]
MANY_TEXTS = [f"{word} tea {i}" for i in range(40) for word in ("green", "hot", "a long cup of")]


@pytest.mark.parametrize("fails_at", range(1, 10))
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, teach: Callable[[Judge], None], fails_at: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    calls: list[int] = []

    def dies(groups: Sequence[TrainingGroup], documents: Sequence[Sequence[str]]) -> Any:
        calls.append(len(groups))
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return by_length(groups, documents)

    for folder, judges in ((whole, [by_length]), (killed, [dies, by_length])):
        folder.mkdir()
        arguments = files(folder, MANY_ROWS, MANY_TEXTS, "--teacher", "fake", "--margin", "0")
        for judge in judges:
            teach(judge)
            status = main(arguments)
        assert status == 0
    for name in ("mined.jsonl", "mined.dropped.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert len((whole / "mined.dropped.jsonl").read_bytes()) > 1000, "something was dropped"


def test_second_run_of_a_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = files(tmp_path, [ROW], TEXTS)
    work = tmp_path / "mined.jsonl.work"
    work.mkdir()
    with only_run(work):
        assert main(arguments) == 2
    assert f"another run writes to '{work}', process {os.getpid()} on" in capsys.readouterr().err
    assert main(arguments) == 0


def test_half_a_line_of_a_killed_run_is_computed_again(
    tmp_path: Path, teach: Callable[[Judge], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = files(tmp_path, MANY_ROWS, MANY_TEXTS, "--teacher", "fake")
    teach(by_length)
    with monkeypatch.context() as patch:
        patch.setattr(command, "_finish", lambda *_: [])  # killed before it
        assert main(arguments) == 0
    pieces = tmp_path / "mined.jsonl.work" / "pieces.jsonl"
    whole = pieces.read_bytes()
    assert whole.count(b"\n") == 3
    pieces.write_bytes(whole[:-10])
    scored: list[int] = []

    def counting(groups: Sequence[TrainingGroup], documents: Sequence[Sequence[str]]) -> Any:
        scored.extend(group_.query == "tea 39" for group_ in groups)
        return by_length(groups, documents)

    teach(counting)
    with monkeypatch.context() as patch:
        patch.setattr(command, "_finish", lambda *_: [])
        assert main(arguments) == 0
    assert pieces.read_bytes() == whole
    assert 0 < len(scored) < 40, "whole pieces are not scored again"
    assert main(arguments) == 0


def test_a_run_killed_while_it_finishes_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = files(tmp_path, [ROW], TEXTS)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.shutil, "rmtree", killed)
        assert main(arguments) == 130
    before = (tmp_path / "mined.jsonl").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "mined.jsonl").read_bytes() == before
    assert not (tmp_path / "mined.jsonl.work").exists()
    assert main(arguments) == 2, "and is not overwritten"


@pytest.mark.parametrize(
    ("change", "named"),
    [(["--margin", "2"], "margin"), (["--seed", "1"], "seed"), (None, "content of the corpus")],
    ids=["margin", "seed", "corpus"],
)
def test_unfinished_work_of_another_run_is_never_mixed_in(
    tmp_path: Path, teach: Callable[[Judge], None], capsys: pytest.CaptureFixture[str],
    change: list[str] | None, named: str,
) -> None:  # fmt: skip
    def dies(groups: Any, documents: Any) -> Any:
        raise KeyboardInterrupt

    teach(dies)
    arguments = files(tmp_path, [ROW], TEXTS, "--teacher", "fake")
    assert main(arguments) == 130
    teach(by_length)
    other = arguments + change if change else files(tmp_path, [ROW], TEXTS[1:], *arguments[7:])
    assert main(other) == 2
    assert f"other settings ({named})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--margin", "1"], "--margin was given without --teacher"),
        (["--max_log_odds", "1"], "--max_log_odds was given without --teacher"),
        (["--teacher_adapter", "a"], "--teacher_adapter was given without --teacher"),
        (["--teacher", "fake", "--margin", "-1"], "--margin must be at least 0, got -1"),
        (["--teacher", "fake", "--max_log_odds", "nan"], "must be a finite number"),
        (["--num_negatives", "0"], "--num_negatives must be at least 1, got 0"),
        (["--skip_top", "50"], "--skip_top must be at least 0 and less than --depth"),
        (["--output_file", "mined.jsonl.gz"], "must end in .jsonl"),
        (["--corpus", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(files(tmp_path, [ROW], TEXTS, *flags)) == 2
    assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"train.jsonl", "corpus.jsonl"}


@pytest.mark.parametrize(
    ("retriever", "missing"), [("bm25", "bm25s"), ("some/encoder", "sentence_transformers")]
)
def test_a_missing_library_is_told_with_the_command_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    retriever: str, missing: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(files(tmp_path, [ROW], TEXTS, "--retriever", retriever)) == 2
    error = capsys.readouterr().err
    assert f"'{retriever}' needs {missing}" in error
    assert 'pip install "qwen3-reranker[mine]"' in error


def test_faults_of_the_training_file_and_the_corpus_have_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = files(tmp_path, [ROW, {"query": "q", "positive": []}], TEXTS)
    assert main(arguments) == 2
    assert f"{arguments[2]}:2: 'positive' must be a list" in capsys.readouterr().err
    arguments = files(tmp_path, [ROW], [])
    write(Path(arguments[4]), {"text": "tea"}, {"text": 5}, {"text": "tea", "title": 5})
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "line 2: must have a string 'text'" in error
    assert "line 3: 'title' must be a string" in error
