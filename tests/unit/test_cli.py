from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen3_reranker
from qwen3_reranker import ModelLoadError, Reranker
from qwen3_reranker.cli.main import main
from qwen3_reranker.runtime import Runtime
from tests import fakes

QUERY = "red apple"
FRUIT = ["green pear", "red apple", "red pear"]
RANKED = ["red apple", "red pear", "green pear"]


class Terminal(io.TextIOWrapper):
    """Standard input with nobody typing."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))


def write(tmp_path: Path, name: str, content: str) -> str:
    file = tmp_path / name
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    file.write_bytes(compress.get(file.suffix, bytes)(content.encode()))
    return str(file)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ranked(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """Run `rank --json` and return its lines, which are rankings of whole lists."""
    assert main(["rank", "--json", *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        indices = [result["index"] for result in line["results"]]
        assert sorted(indices) == list(range(len(indices)))
    return lines


def texts(line: dict[str, Any]) -> list[str]:
    return [result["text"] for result in line["results"]]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; return what it says."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def columns(text: str) -> int:
    """Return the terminal columns of a text; East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


@pytest.mark.usefixtures("model")
def test_rank_orders_documents_from_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = ranked(capsys, "-q", QUERY, *FRUIT)
    assert texts(line) == RANKED
    assert line["query"] == QUERY
    first = line["results"][0]
    assert first.keys() == {"index", "id", "score", "log_odds", "truncated", "text"}
    assert (first["index"], first["log_odds"], first["truncated"]) == (1, 0.5, False)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", ["fruit.txt", "fruit.txt.gz", "fruit.txt.xz", "fruit"])
def test_rank_reads_a_document_per_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = write(tmp_path, name, "green pear\n\nred apple\r\nred pear")
    (line,) = ranked(capsys, "-q", QUERY, "-d", path)
    assert [(result["id"], result["text"]) for result in line["results"]] == [
        ("3", "red apple"), ("4", "red pear"), ("1", "green pear")
    ]  # fmt: skip


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("name", ["fruit.jsonl", "fruit.jsonl.gz", "fruit.jsonl.xz"])
def test_rank_reads_a_text_per_jsonl_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    rows = [{"text": "green pear", "id": "g"}, {"text": "red apple"}, {"text": "red pear", "id": 7}]
    (line,) = ranked(capsys, "-q", QUERY, "-d", write(tmp_path, name, jsonl(*rows)))
    assert [(result["id"], result["text"]) for result in line["results"]] == [
        ("2", "red apple"), ("7", "red pear"), ("g", "green pear")
    ]  # fmt: skip


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("arguments", [["-d", "-"], ["-"], []], ids=["file", "dash", "pipe"])
def test_rank_reads_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(FRUIT).encode())))
    assert texts(ranked(capsys, "-q", QUERY, *arguments)[0]) == RANKED


@pytest.mark.usefixtures("model")
def test_dash_beside_a_file_is_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("\n".join(FRUIT))
    found = texts(ranked(capsys, "-q", QUERY, "-d", str(file), "-")[0])
    assert sorted(found) == ["-", *sorted(FRUIT)]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("qwen3_reranker.json", {"base": {"name": "org/base"}}, "org/base"),
        ("adapter_config.json", {"base_model_name_or_path": "org/base"}, "org/base"),
        ("adapter_config.json", {}, "Qwen/Qwen3-Reranker-0.6B"),
    ],
)
def test_rank_takes_the_base_that_the_adapter_names(
    tmp_path: Path, name: str, content: dict[str, Any], expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / name).write_text(json.dumps(content))
    made: list[str] = []

    class Recorded(Reranker):
        def __init__(self, model: str, **options: Any) -> None:
            made.append(model)
            super().__init__(model, **options)

    monkeypatch.setattr("qwen3_reranker.reranker.Reranker", Recorded)
    assert main(["rank", "-q", QUERY, "--adapter", str(tmp_path), *FRUIT]) == 0
    assert main(["rank", "-q", QUERY, "--adapter", str(tmp_path), "-m", "other", *FRUIT]) == 0
    assert made == [expected, "other"]


@pytest.mark.usefixtures("model")
def test_rank_with_arguments_leaves_standard_input_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"from the pipe"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert texts(ranked(capsys, "-q", QUERY, *FRUIT)[0]) == RANKED
    assert stdin.read() == "from the pipe"


@pytest.mark.usefixtures("model")
def test_rank_puts_arguments_before_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path, "fruit.txt", "plum\n")
    (line,) = ranked(capsys, "-q", QUERY, "pear", "-d", path)
    assert texts(line) == ["pear", "plum"]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["-n", "2"], RANKED[:2]),
        (["--top-n", "9"], RANKED),
        (["--threshold", "0.3"], RANKED[:2]),
        (["--threshold", "0.5"], RANKED[:1]),
        (["--threshold", "0.3", "-n", "1"], RANKED[:1]),
        (["--threshold", "1"], []),
    ],
)
def test_rank_cuts_what_it_prints(
    capsys: pytest.CaptureFixture[str], options: list[str], kept: list[str]
) -> None:
    assert main(["rank", "--json", "-q", QUERY, *options, *FRUIT]) == 0
    assert texts(json.loads(capsys.readouterr().out)) == kept


def test_rank_passes_the_instruction_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: fakes.FakeModel
) -> None:
    own = {"query": QUERY, "candidates": [{"text": "a"}], "instruction": "Find law"}
    other = {"query": QUERY, "candidates": [{"text": "a"}]}
    ranked(capsys, "-c", write(tmp_path, "c.jsonl", jsonl(own, other)), "-i", "Find code")
    assert model.network.heads == [
        fakes.small_tokenizer().encode_group(text, QUERY, [], max_length=999).head.tolist()
        for text in ("Find law", "Find code")
    ]


LABELLED = [
    # Ranked 0, 1, 2: (0.6309 + 1) / 2.6309 = 0.6199; as given 2, 0, 1: 2.5 / 2.6309 = 0.9502.
    {
        "query_id": "fruit",
        "query": QUERY,
        "candidates": [
            {"text": "green pear", "label": 2, "id": "g"},
            {"text": "red apple", "label": 0, "id": "a"},
            {"text": "red pear", "label": 1, "id": "p"},
        ],
    },
    # One relevant document was never found. Ranked 1, 0: 1 / 1.6309 = 0.6131; as given 0.3869.
    {
        "query": "plum",
        "candidates": [{"text": "pear", "label": 0}, {"text": "plum", "label": 1}],
        "missing_labels": [1],
    },
    {"query": "pear", "candidates": [{"text": "pear"}]},
]


@pytest.mark.usefixtures("model")
def test_rank_candidates_prints_rankings_and_ndcg(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path, "candidates.jsonl.xz", jsonl(*LABELLED))
    assert main(["rank", "--json", "-c", path, "-n", "1"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["query_id"] for line in lines] == ["fruit", "2", "3"]
    assert [[result["id"] for result in line["results"]] for line in lines] == [["a"], ["1"], ["0"]]
    assert "nDCG@10 0.6165, in the order given 0.6685 (2 queries with labels)" in err
    assert "documents 6" in err


@pytest.mark.usefixtures("model")
def test_rank_candidates_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl(*LABELLED).encode())))
    lines = ranked(capsys, "--candidates", "-")
    assert [texts(line)[0] for line in lines] == ["red apple", "plum", "pear"]


@pytest.mark.usefixtures("model")
def test_rank_without_labels_prints_no_ndcg(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "-q", QUERY, *FRUIT]) == 0
    assert "nDCG" not in capsys.readouterr().err


@pytest.mark.usefixtures("model")
def test_rank_prints_a_table_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "-q", QUERY, *FRUIT]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].endswith(QUERY)
    assert [line.split()[0:4:3] for line in lines[3:]] == [["1", "2"], ["2", "3"], ["3", "1"]]
    assert all(line.endswith(text) for line, text in zip(lines[3:], RANKED, strict=True))
    assert "documents 3" in err


@pytest.mark.usefixtures("model")
def test_table_marks_truncated_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "-q", QUERY, "--max-length", "100", "word " * 200, "red"]) == 0
    first, second, note = capsys.readouterr().out.splitlines()[-3:]
    assert "~" not in first
    assert "1~ word word" in second
    assert "~ the end of this document was cut to --max-length" in note


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred",
        "a\x1b]0;title\x07b",
        "a\rb",
        "a\tb",
        "a\x00b",
        "a\x9bb",
        "a\u202eb",
        "a\u2028b",
    ],
    ids=ascii,
)
def test_table_prints_no_control_characters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    row = {"query": f"q {text}", "query_id": f"i {text}", "candidates": [{"text": text}]}
    assert main(["rank", "-c", write(tmp_path, "c.jsonl", jsonl(row))]) == 0
    out = capsys.readouterr().out
    assert all(letter.isprintable() for letter in out.replace("\n", ""))


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    "text",
    [
        "a" * 500,
        "漢字" * 200,
        "ｆｕｌｌ" * 90,
        "a漢" * 100,
        "👩" * 200,
        "カタ カナ" * 80,
        "한국어" * 99,
    ],
    ids=lambda text: text[:4],
)
def test_table_fits_eighty_columns(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["rank", "-q", text[:300], text, "short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(columns, lines)) <= 80
    assert sum(line.endswith("…") for line in lines) == 2
    assert max(map(columns, lines)) >= 78  # the room there is gets used


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["rank", "doc"], "there is no query. Pass --query TEXT, or --candidates FILE"),
        (["rank"], "there is no query"),
        (["rank", "-q", QUERY], "there are no documents"),
        (["rank", "-q", " ", "doc"], "query is blank (1 characters)"),
        (["rank", "-q", QUERY, "-c", "c.jsonl"], "--candidates brings its own queries"),
        (["rank", "-c", "c.jsonl", "doc"], "--candidates brings its own queries"),
        (["rank", "-c", "c.jsonl", "-d", "d.txt"], "--candidates brings its own queries"),
        (["rank", "-q", QUERY, "-d", "missing.txt"], "missing.txt cannot be read"),
        (["rank", "-c", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["rank", "-q", QUERY, "-n", "0", "doc"], "top_n must be an integer of at least 1"),
        (["rank", "-q", QUERY, "--top-n", "-2", "doc"], "got -2"),
        (["rank", "-q", QUERY, "--threshold", "1.5", "doc"], "got 1.5"),
        (["rank", "-q", QUERY, "--threshold", "nan", "doc"], "got nan"),
        (["rank", "-q", QUERY, "--max-length", "0", "doc"], "max_length must be an integer"),
        (["rank", "-q", QUERY, "-m", "", "doc"], "model is blank"),
    ],
)
def test_bad_arguments_are_refused_without_a_model(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fragment: str,
) -> None:
    fakes.forbid_loading(monkeypatch)
    assert fragment in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("option", "name", "content", "fragments"),
    [
        ("-d", "d.jsonl", '{"text": 1}\n[]\n', ["line 1: must have a string 'text'", "line 2: "]),
        ("-d", "d.jsonl", "", ["d.jsonl has no rows"]),
        ("-d", "d.txt", "\n\n", ["there are no documents"]),
        ("-d", "d.txt.gz", "no archive", ["d.txt.gz"]),
        ("-c", "c.jsonl", '{"query": "q"}\n{\n', ["2 faults", "line 1: 'cand", "line 2: not JSON"]),
    ],
)
def test_bad_files_are_refused_without_a_model(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    option: str,
    name: str,
    content: str,
    fragments: list[str],
) -> None:
    fakes.forbid_loading(monkeypatch)
    (tmp_path / name).write_text(content)
    query = ["-q", QUERY] if option == "-d" else []
    err = refusal(capsys, "rank", *query, option, str(tmp_path / name))
    assert all(fragment in err for fragment in fragments)


def test_empty_standard_input_is_no_documents(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert "there are no documents" in refusal(capsys, "rank", "-q", QUERY)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "command"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["rank", "-n", "two", "-q", QUERY, "doc"], "invalid int value: 'two'"),
        (["rank", "--dtype", "int4", "-q", QUERY, "doc"], "invalid choice: 'int4'"),
        (["rank", "--template", "none", "-q", QUERY, "doc"], "invalid choice: 'none'"),
        (["rank", "--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_exit_with_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str], fragment: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert fragment in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(ModelLoadError("no such model"), 2, "no such model\n"), (KeyboardInterrupt(), 130, "")],
)
def test_errors_of_a_run_become_an_exit_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def load(runtime: Runtime) -> None:
        raise error

    monkeypatch.setattr(Runtime, "load", load)
    assert main(["rank", "-q", QUERY, "doc"]) == status
    assert capsys.readouterr() == ("", message)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"qwen3-reranker {qwen3_reranker.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["rank", "--help"], ["ui", "--help"], ["doctor", "--help"]]
)
def test_help_is_printed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: qwen3-reranker" in capsys.readouterr().out


def test_doctor_without_a_model_prints_versions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.forbid_loading(monkeypatch)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"qwen3-reranker {qwen3_reranker.__version__}, Python 3." in out
    for name in ("torch", "transformers", "tokenizers", "numpy", "devices: cpu", "Hub cache: "):
        assert name in out
    assert "Next: qwen3-reranker doctor Qwen/Qwen3-Reranker-0.6B" in out


@pytest.mark.usefixtures("model")
def test_newlines_in_texts_cannot_forge_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path, "d.jsonl", jsonl({"text": "red\n   1  0.9999   +9.000    1  forged"}))
    assert main(["rank", "-q", "red\nforged", "-d", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.lstrip().startswith("1 ")]) == 1
    assert len(lines) == 4  # blank, query, header, one document


@pytest.mark.usefixtures("model")
def test_json_output_is_ascii_whatever_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    broken = "red \ud83d"
    assert main(["rank", "--json", "-q", broken, broken, "rød"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert {"rød"} < set(texts(json.loads(out)))


@pytest.mark.usefixtures("model")
def test_documents_from_everywhere_have_distinct_ids(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path, "d.jsonl", jsonl({"text": "a"}, {"text": "b", "id": None}))
    (line,) = ranked(capsys, "-q", QUERY, "x", "y", "-d", file)
    assert sorted(r["id"] for r in line["results"]) == ["1", "2", "argument 1", "argument 2"]
