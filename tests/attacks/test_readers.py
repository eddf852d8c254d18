"""Files that nobody would write: each is read, or refused by an error of ours that quotes nothing.

Files are made of pieces that mean something to a reader, put together at random, 10,000 to a
reader. In every text stands a canary, which no message may repeat; names of keys and settings, and
what stands for them, are repeated on purpose.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config import SHOWN, read_yaml
from finetune.data import read_training_file
from finetune.reading import paraphrases
from qwen3_reranker import TEMPLATES, Calibration
from qwen3_reranker.checkpoint.adapters import (
    _refuse_adapter,
    recorded_base,
    recorded_template,
    refuse_other_base,
)
from qwen3_reranker.checkpoint.files import read_tokenizer
from qwen3_reranker.checkpoint.locate import open_checkpoint
from qwen3_reranker.data.candidates import ndcg_at_10, read_candidate_rows
from qwen3_reranker.data.documents import read_documents
from qwen3_reranker.data.trec import read_run
from qwen3_reranker.errors import Qwen3RerankerError
from qwen3_reranker.text.tokenizer import PromptTokenizer
from tests.attacks.limits import bounded

pytestmark = pytest.mark.attack

EXAMPLES = 10_000
CANARY = "Kanarienvogel"
SECONDS, MEGABYTES = 5.0, 600.0
"""What one file may take, and all of them together."""

VALUES = [
    f'"{CANARY}"', f'"{CANARY} {CANARY}"', f'"{CANARY}\\n"', '""', '" "', '"yes"', '"1"', "0", "1",
    "2", "-1", "1.5", "-0.0", "1e-400", "true", "false", "null", "[]", "{}", "[1]", "[null]",
    f'["{CANARY}"]', f'["{CANARY}", "b"]', f'[["{CANARY}"]]', f'[{{"text": "{CANARY}"}}]',
    f'[{{"text": "{CANARY}", "label": 1, "id": "{CANARY}"}}, {{"text": "", "label": 0}}]',
    f'[{{"text": "a", "label": 1{"0" * 400}}}]', f'[{{"text": "a", "id": ["{CANARY}"]}}]',
    '[{"text": "a", "label": -1}]', f'{{"{CANARY}": "{CANARY}"}}', f'[{{"{CANARY}": 1}}]',
    f'[{{"role": "user", "content": "{CANARY}"}}]',
    f'[[{{"role": "user", "content": "{CANARY}"}}]]',
    '{"positive": [1.0], "negative": [0.5]}', f'{{"positive": [1{"0" * 400}], "negative": []}}',
    f"1{'0' * 400}", f"-1{'0' * 400}", f"[1{'0' * 400}]", "9" * 5000, "1e999", f"{'1' * 400}.5",
    "1000000000", "NaN", "-Infinity", "[" * 3000, '{"a":' * 3000, f"{'[' * 500}{']' * 500}",
    '"\\ud83d"', '"\\u0000"', f'"{CANARY}', f"{CANARY}", "{", "}", ",",
]  # fmt: skip
"""Of a key, as JSON has them or as it cannot."""
LINES = [
    b"", b" ", b"\r", b"\xef\xbb\xbf", b"\xff", b"\x00", b"[]", b"{", b"null", b"\x1f\x8b",
    CANARY.encode(), f'"{CANARY}"'.encode(), f'{{"text": "{CANARY}\xe9"}}'.encode("latin-1"),
    f'{{"text": "{CANARY}", "text": "{CANARY}"}}'.encode(), "\u2028".encode(),
]  # fmt: skip

some_bytes = st.binary(max_size=6)


def objects(usual: dict[str, str], *others: str) -> st.SearchStrategy[str]:
    """Return JSON objects: what is usual, or nothing, with up to three values changed or added."""
    key = st.sampled_from([*usual, *others])
    changes = st.lists(st.tuples(key, st.sampled_from(VALUES)), max_size=3)
    return st.builds(
        lambda start, changes: (
            "{"
            + ", ".join(f'"{key}": {value}' for key, value in (start | dict(changes)).items())
            + "}"
        ),
        st.sampled_from([usual, usual, {}]),
        changes,
    )


def rows(*usual: dict[str, str], others: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """Return files of JSON lines."""
    row = st.one_of([objects(each, *others) for each in usual]).map(str.encode)
    line = st.one_of(row, row, st.sampled_from(LINES) | some_bytes)
    return st.lists(line, max_size=3).map(b"\n".join)


def attack(
    drawn: st.SearchStrategy[Any],
    read: Callable[[Any], Any],
    tried: Callable[[int], None],
    *,
    accepts: bool = True,
    shows: Callable[[str], bool] = lambda message: False,
) -> None:
    """Read many files; fail on an error that is not ours, quotes a text, or comes too late.

    Args:
        drawn: What is read.
        read: Writes and reads it, and checks what was accepted.
        tried: The fixture.
        accepts: Whether some must have been accepted: an attack that is always refused at the
            first byte tries nothing.
        shows: Whether a message repeats a name, not a text.
    """
    outcomes = {"accepted": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(drawn)
    def check(content: Any) -> None:
        started = time.thread_time()  # of this thread: others have a share of the machine
        try:
            read(content)
            outcomes["accepted"] += 1
        except Qwen3RerankerError as error:
            outcomes["refused"] += 1
            message = str(error)
            assert len(message) < 5000, "message without end"
            assert CANARY not in message or shows(message), message
        assert time.thread_time() - started < SECONDS

    # What would take all the memory there is fails alone.
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    try:
        with bounded(seconds=600, megabytes=MEGABYTES, log_bytes=100_000):
            check()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert outcomes["refused"]
    assert outcomes["accepted"] or not accepts
    print(outcomes)
    tried(sum(outcomes.values()))


def test_json_lines_of_documents(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "documents.jsonl"
    usual = {"text": f'"{CANARY}"', "title": f'"{CANARY}"', "id": f'"{CANARY}"'}

    def read(content: bytes) -> None:
        file.write_bytes(content)
        for document in read_documents(str(file)):
            assert {type(part) for part in (document.id, document.text, document.title)} == {str}
            document.text.encode()

    attack(rows(usual, others=("_id",)), read, tried)


def test_json_lines_of_training(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "rows.jsonl"
    text, good, bad = f'"{CANARY}"', f'["{CANARY} 1"]', f'["{CANARY} 2", "b"]'
    message = f'{{"role": "user", "content": "{CANARY}'
    layouts: list[dict[str, str]] = [
        {"query": text, "positive": good, "negative": bad, "instruction": text,
         "scores": '{"positive": [1], "negative": [0.5, -7]}'},
        {"query": text, "document": text, "label": "1"},
        {"messages": f'[{message}"}}]', "positive_messages": f'[[{message} 1"}}]]',
         "negative_messages": f'[[{message} 2"}}]]'},
        {"query": text, "pos": good, "neg": bad, "pos_scores": "[1]", "neg_scores": "[0, 1]"},
    ]  # fmt: skip

    def read(drawn: tuple[bytes, bool]) -> None:
        content, skip_bad = drawn
        file.write_bytes(content)
        for group in read_training_file(str(file), skip_bad=skip_bad).groups:
            assert all(map(math.isfinite, group.scores or []))

    shows_key = "unknown key '"
    attack(
        st.tuples(rows(*layouts), st.booleans()),
        read,
        tried,
        shows=lambda message: shows_key in message,
    )


def test_json_lines_of_candidates(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "lists.jsonl"
    usual = {
        "query": f'"{CANARY}"', "instruction": f'"{CANARY}"', "query_id": f'"{CANARY}"',
        "candidates": f'[{{"text": "{CANARY}", "id": "{CANARY}", "label": 2147483647}}]',
        "missing_labels": "[1, 2147483647]",
    }  # fmt: skip

    def read(content: bytes) -> None:
        file.write_bytes(content)
        for each in read_candidate_rows(str(file)):
            found = ndcg_at_10(each.labels or [], [0.5] * len(each.ids), each.missing_labels)
            assert 0 <= found <= 1

    attack(rows(usual), read, tried)


def test_runs_and_judgments_of_trec(tmp_path: Path, tried: Callable[[int], None]) -> None:
    names = {
        "run": "run.trec",
        "corpus": "corpus.jsonl",
        "queries": "queries.tsv",
        "qrels": "qrels",
    }
    paths = {name: tmp_path / file for name, file in names.items()}
    ids = [CANARY, "d1", "d2"]
    corpus = "\n".join(json.dumps({"_id": id, "text": CANARY}) for id in ids)
    queries = "".join(f"{id}\t{CANARY}\n" for id in ("q1", "q2", CANARY))
    a_query, a_document = st.sampled_from(["q1", "q2", CANARY, "7"]), st.sampled_from([*ids, "7"])
    score = st.sampled_from(
        [
            *["1", "-1.5", "1e9"] * 5,
            "1e999",
            "nan",
            CANARY,
            "9" * 5000,
            "1_0",
            "inf",
            "0x1",
            "٣",
            "",
        ]
    )
    label = st.sampled_from(
        [*["0", "1", "-1", "+2", "007", "2147483647"] * 4, "2147483648", f"1{'0' * 400}",
         "9" * 5000, f"-{'9' * 5000}", f"{'0' * 5000}1", "1.0", CANARY, "٣", "", "-", "+"]
    )  # fmt: skip
    of_run = st.builds("{} Q0 {} 1 {} x".format, a_query, a_document, score)
    of_qrels = st.builds("{} 0 {} {}".format, a_query, a_document, label)
    of_beir = st.builds("{}\t{}\t{}".format, a_query, a_document, label)
    header = st.just("query-id\tcorpus-id\tscore")

    def lines(*kinds: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
        usual = st.one_of(*kinds).map(str.encode)
        line = st.one_of(usual, usual, usual, st.sampled_from(LINES) | some_bytes)
        return st.lists(line, max_size=3).map(b"\n".join)

    def read(drawn: tuple[bytes, bytes | None, bytes, bytes]) -> None:
        for path, content in zip(paths.values(), drawn, strict=True):
            path.write_bytes(content)
        for each in read_run(**{name: str(path) for name, path in paths.items()}):
            assert len(each.ids) == len(each.texts)
            found = ndcg_at_10(each.labels or [], [0.5] * len(each.ids), each.missing_labels)
            assert 0 <= found <= 1

    other = st.lists(st.sampled_from(LINES) | some_bytes, min_size=1, max_size=2).map(b"\n".join)
    drawn = st.tuples(
        lines(of_run),
        st.one_of(*[st.just(corpus.encode())] * 9, other),
        st.one_of(*[st.just(queries.encode())] * 9, other),
        lines(of_qrels, of_beir, header),
    )
    attack(drawn, read, tried)


def test_comma_separated_values(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "documents.csv"
    pieces = st.sampled_from(
        [b"text", b"id", b"title", b",", b",", b'"', b"\n", b"\n", b"\r", b"\x00", b"\xff", b"\t",
         b" ", CANARY.encode(), f'"{CANARY}\n{CANARY}"'.encode(), b'""', b"9" * 5000,
         b"x" * 140_000]
    )  # fmt: skip
    headers = st.sampled_from([b"", b"text\n", b"id,text\n", b"text,title,id\n", b"text,text\n"])
    drawn = st.builds(
        lambda header, body: header + b"".join(body),
        headers,
        st.lists(pieces | some_bytes, max_size=8),
    )

    def read(content: bytes) -> None:
        file.write_bytes(content)
        assert all(type(document.text) is str for document in read_documents(str(file)))

    attack(drawn, read, tried)


class Base:
    """Has what the checks of an adapter read of its base."""

    lm_head = None

    class config:  # noqa: N801
        tie_word_embeddings = True


def test_settings_of_adapters(tmp_path: Path, tried: Callable[[int], None]) -> None:
    config = {
        "peft_type": '"LORA"', "task_type": '"CAUSAL_LM"', "target_modules": '["q_proj"]',
        "alpha_pattern": '{"q_proj": 8}', "base_model_name_or_path": f'"{CANARY}"',
    }  # fmt: skip
    others = (
        "layers_pattern",
        "rank_pattern",
        "loftq_config",
        "modules_to_save",
        "exclude_modules",
    )
    template = TEMPLATES["chatml"]
    record = {
        "template": f'{{"id": "chatml", "hash": "{template.hash}"}}',
        "base": f'{{"name": "{CANARY}", "fingerprint": "x"}}',
    }
    parts = [
        "[]", '{"id": []}', '{"id": "chatml", "hash": []}', '{"id": {}, "hash": "x"}', '"x"',
        f'{{"id": "{CANARY}", "hash": "{CANARY}"}}', '{"fingerprint": []}',
    ]  # fmt: skip
    records = st.one_of(
        objects(record),
        st.builds('{{"template": {}}}'.format, st.sampled_from(parts)),
        st.builds('{{"base": {}}}'.format, st.sampled_from(parts)),
    )

    def read(drawn: tuple[str, str | None]) -> None:
        (tmp_path / "adapter_config.json").write_text(drawn[0])
        (tmp_path / "qwen3_reranker.json").write_text(drawn[1] or "{}")
        recorded_base(tmp_path)
        _refuse_adapter(Base(), tmp_path)
        refuse_other_base("x", tmp_path)
        if drawn[1] is not None:
            recorded_template(None, tmp_path)

    # The base and the template of a record are told by their names.
    attack(
        st.tuples(objects(config, *others), st.none() | records), read, tried,
        shows=lambda message: "was trained " in message or "is of type" in message,
    )  # fmt: skip


def test_configurations_of_checkpoints(tmp_path: Path, tried: Callable[[int], None]) -> None:
    usual = {
        "model_type": '"qwen3"', "architectures": '["Qwen3ForCausalLM"]', "num_hidden_layers": "1",
        "layer_types": '["full_attention"]', "rope_parameters": '{"rope_type": "default"}',
    }  # fmt: skip
    others = (
        "num_labels", "hidden_size", "rope_scaling", "rope_theta", "is_causal", "auto_map", "dtype",
        "transformers_weights", "id2label", "attn_logit_softcapping", "quantization_config",
        "num_hidden_layers", "attn_implementation", "sliding_window", "_name_or_path",
    )  # fmt: skip
    index = {"weight_map": '{"a": "model.safetensors"}'}

    def read(drawn: tuple[str, str]) -> None:
        (tmp_path / "config.json").write_text(drawn[0])
        (tmp_path / "model.safetensors.index.json").write_text(drawn[1])
        open_checkpoint(str(tmp_path), None)

    shows = ("its decoder is", "its architecture is", "of type", "rotary embedding")
    attack(
        st.tuples(objects(usual, *others), st.just('{"weight_map": {}}') | objects(index)),
        read, tried,
        shows=lambda message: any(part in message for part in shows),
    )  # fmt: skip


def _gguf(file: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(str(file), "qwen3")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_vocab_size, 4),
        (writer.add_embedding_length, 8), (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 1), (writer.add_head_count_kv, 1), (writer.add_key_length, 8),
        (writer.add_value_length, 8), (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_freq_base, 1e4), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, ["a", "b", "ab", CANARY]), (writer.add_token_merges, ["a b"]),
        (writer.add_token_types, [1, 1, 1, 1]), (writer.add_name, CANARY),
    ):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def test_metadata_of_gguf(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "model.gguf"
    whole = _gguf(file)
    numbers = [0, 1, 2, 4, 7, 8, 9, 12, 13, 255, 2**16, 2**31 - 1, 2**32 - 1]
    value = st.one_of(
        some_bytes,
        st.sampled_from([number.to_bytes(4, "little") for number in numbers]),
        st.sampled_from([n.to_bytes(8, "little") for n in (*numbers, 2**40, 2**63, 2**64 - 1)]),
    )
    change = st.tuples(st.integers(0, len(whole) - 1), value)
    end = st.just(len(whole)) | st.integers(0, len(whole))

    def read(drawn: tuple[list[tuple[int, bytes]], int]) -> None:
        changes, length = drawn
        content = bytearray(whole)
        for place, new in changes:
            content[place : place + len(new)] = new
        file.write_bytes(content[:length])
        folder, gguf_file, _ = open_checkpoint(str(file), None)
        read_tokenizer(folder, gguf_file)

    shows = ("its decoder is", "its architecture is", "of type", "rotary embedding")
    attack(
        st.tuples(st.lists(change, max_size=2), end), read, tried,
        shows=lambda message: any(part in message for part in shows),
    )  # fmt: skip


def test_settings_in_yaml(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "lora.yaml"
    names = st.sampled_from(["train_file", "instruction", "seed", "loss", "max_length", "other"])
    values = [
        CANARY, f"'{CANARY}'", f'"{CANARY}"', f"[{CANARY}, b]", f"\n- {CANARY}", f"{{a: {CANARY}}}",
        f"|\n  {CANARY}", f"&a {CANARY}", "*a", "&a [*a]", "!!python/object:os.system x", "!x 1",
        "null", "no", "1e-4", f"1{'0' * 400}", "9" * 5000, "[" * 300, "{" * 300, "- " * 300,
        f'"\\UFFFFFFFF{CANARY}"', '"\\x"', f"'{CANARY}", f'"{CANARY}', f"% {CANARY}",
        "2001-99-99", "0b2", "1:2:3", "<<", "", f"# {CANARY}",
    ]  # fmt: skip
    setting = st.builds("{}: {}".format, names, st.sampled_from(values))
    other = st.sampled_from(
        ["? [a]", "? [a]\n: b", "? {a: b}\n: c", "---", "...", "%YAML 9.9", "%TAG ! x", "<<: *a",
         "<<: {loss: a}", "- a", "\t- a", ": b", "?", "a", "!!set {a}", "&a", "\ufeff", "\u0085",
         "[" * 300, "{a: " * 300, "- " * 300, "? " * 300, "\x00", "\x07", "'", '"', "@", "`"]
    )  # fmt: skip
    line = st.one_of(setting, setting, setting, other).map(str.encode) | some_bytes

    def read(content: list[bytes]) -> None:
        file.write_bytes(b"\n".join(content))
        arguments = read_yaml(str(file), SHOWN)
        assert all(type(argument) is str for argument in arguments)

    attack(
        st.lists(line, max_size=4), read, tried,
        shows=lambda message: "there is no setting" in message or "is set twice" in message,
    )  # fmt: skip


def test_calibration_files(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "calibration.json"
    usual = {
        "temperature": "2", "bias": "-1", "model": f'{{"fingerprint": "{CANARY}"}}',
        "template": f'{{"hash": "{CANARY}"}}',
    }  # fmt: skip
    extreme = [
        usual | {"temperature": temperature, "bias": bias}
        for temperature in ("5e-324", "1e308")
        for bias in ("1e308", "-1e308", "1")
    ]

    def read(drawn: str) -> None:
        file.write_text(drawn)
        calibration = Calibration.read(file)
        for log_odds in (-1e9, -1.0, 0.0, 1.0, 1e9):
            assert 0 <= calibration.probability(log_odds) <= 1

    attack(objects(usual) | st.one_of(list(map(objects, extreme))), read, tried)


def test_paraphrase_files(tmp_path: Path, tried: Callable[[int], None]) -> None:
    file = tmp_path / "paraphrases.json"
    usual = {CANARY: f'["{CANARY}"]', "Find fruit": f'["{CANARY}", "Look for fruit"]'}
    content = objects(usual).map(str.encode) | st.sampled_from(LINES) | some_bytes

    def read(drawn: bytes) -> None:
        file.write_bytes(drawn)
        for wordings in paraphrases(str(file)).values():
            assert all(type(wording) is str for wording in wordings)

    attack(content, read, tried)


def test_tokenizers(tmp_path: Path, tried: Callable[[int], None]) -> None:
    model = {"type": '"BPE"', "vocab": '{"a": 0, "b": 1, "ab": 2}', "merges": '["a b"]'}
    whole = {"added_tokens": "[]", "version": '"1.0"', "normalizer": "null"}
    drawn = st.builds(
        lambda model, whole: whole[:-1] + (", " if len(whole) > 2 else "") + f'"model": {model}}}',
        objects(model, "dropout", "unk_token", "byte_fallback"),
        objects(whole, "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"),
    )
    attack(drawn, PromptTokenizer, tried, accepts=False)


def test_control_every_piece_is_tried_by_itself(tmp_path: Path) -> None:
    """Whatever Hypothesis draws, each value has stood for each key of a list of candidates once."""
    file = tmp_path / "lists.jsonl"
    keys = ("query", "instruction", "candidates", "missing_labels", "query_id")
    usual = {"query": '"q"', "candidates": "[]"}
    messages = []
    for key, value in itertools.product(keys, VALUES):
        members = (f'"{name}": {given}' for name, given in {**usual, key: value}.items())
        file.write_text("{" + ", ".join(members) + "}")
        try:
            read_candidate_rows(str(file))
        except Qwen3RerankerError as error:
            messages.append(str(error))
    assert not [message for message in messages if CANARY in message]
    assert len(messages) > len(VALUES)
