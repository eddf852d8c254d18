"""`python -m finetune`: settings, a whole run, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from transformers import TrainingArguments

from finetune.cli import main, parse_training, training_parser
from finetune.config import SHOWN
from qwen3_reranker import InputError, ModelLoadError, Reranker
from qwen3_reranker.cli.main import main as rerank
from tests import texts

CHECKPOINTING = (
    "--activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "--gradient_checkpointing"
)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Write training rows and candidate lists whose answer is the document that is upper case."""
    documents = [document for _, document in texts.ordinary_pairs(40)]
    rows = [
        {
            "query": f"topic {i}",
            "positive": [documents[i].upper()],
            "negative": documents[i + 1 : i + 4],
            "instruction": "Find shouting",
            "scores": {"positive": [3.0], "negative": [-1.0, -2.0, -3.0]},
        }
        for i in range(16)
    ]
    lists = [
        {
            "query_id": f"q{i}",
            "query": f"subject {i}",
            "instruction": "Find shouting",
            "candidates": [{"text": documents[20 + (i + j) % 20], "label": 0} for j in range(4)]
            + [{"text": documents[(20 + i + 7) % 40].upper(), "label": 1}],
        }
        for i in range(6)
    ]
    files = {"train": tmp_path / "train.jsonl", "dev": tmp_path / "dev.jsonl"}
    files["train"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["dev"].write_text("".join(json.dumps(row) + "\n" for row in lists))
    return files


@pytest.fixture
def train(
    data: dict[str, Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[int, Path]]:
    """Return a function that runs `train` on a tiny model and gives its status and folder."""

    def run(*flags: str, **architecture: Any) -> tuple[int, Path]:
        output = tmp_path / "run"
        return main([
            "train", "--model_name_or_path", str(checkpoint(**architecture)),
            "--train_file", str(data["train"]), "--eval_file", str(data["dev"]),
            "--output_dir", str(output), "--learning_rate", "5e-3", "--max_length", "256",
            "--per_device_train_batch_size", "4", "--disable_tqdm", "true", *flags,
        ]), output  # fmt: skip

    return run


@pytest.mark.parametrize("architecture", [{}, {"tied": False}], ids=["tied", "untied"])
def test_train_leaves_an_adapter_that_the_core_serves(
    train: Callable[..., tuple[int, Path]],
    checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    architecture: dict[str, Any],
) -> None:
    flags = "--num_train_epochs 3 --logging_steps 1 --early_stopping_patience 0"
    status, output = train(*flags.split(), **architecture)
    out = capsys.readouterr().out
    assert status == 0
    files = "adapter_model.safetensors adapter_config.json qwen3_reranker.json run.json README.md"
    written = {file.name for file in output.iterdir()}
    assert {*files.split(), "report.html", "report.json"} <= written
    run = json.loads((output / "run.json").read_text())
    assert run["data"][0]["lines"] == run["data"][0]["accepted"] == 16
    logged = [entry for entry in run["history"] if "loss" in entry]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert {"groups/s", "tokens/s", "memory_gb"} <= set(logged[0])
    base = str(checkpoint(**architecture))
    documents = ["tea", "TEA"]
    with Reranker(base) as plain, Reranker(base, adapter=str(output)) as tuned:
        assert plain.score("topic", documents) != tuned.score("topic", documents)
    assert rerank(shlex.split(out.splitlines()[-1])[1:]) == 0
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    weights = load_file(output / "adapter_model.safetensors")
    num_layers = json.loads(Path(base, "config.json").read_text())["num_hidden_layers"]
    assert len(weights) == 2 * 7 * num_layers  # A and B of every linear layer, never of the head
    assert all("lora_" in name and ".layers." in name for name in weights)


@pytest.mark.slow  # two runs
def test_train_goes_on_from_an_adapter(
    train: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = train("--max_steps", "2")
    earlier = output.rename(tmp_path / "earlier")
    expected = load_file(earlier / "adapter_model.safetensors")
    again = ["--adapter", str(earlier), "--max_steps", "1"]
    status, output = train(*again, "--learning_rate", "0")
    assert status == 0
    weights = load_file(output / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    report = json.loads((output / "report.json").read_text())
    before = json.loads((earlier / "report.json").read_text())
    assert _ndcg(report, "mean_before") == pytest.approx(_ndcg(before, "mean_after"))
    for flags, message in (
        (["--lora_r", "4"], "its r is 16, this run's 4"),
        (["--lora_target_modules", "q_proj", "k_proj"], "it adapts other modules"),
        (["--use_peft", "false"], "this run trains every weight"),
        (["--template", "published-eval"], "was trained with template 'qwen3-reranker'"),
    ):
        assert train(*again, *flags)[0] == 2
        assert message in capsys.readouterr().err
    record = earlier / "qwen3_reranker.json"
    content = json.loads(record.read_text())
    content["base"]["fingerprint"] = "0" * 64
    record.write_text(json.dumps(content))
    assert train(*again)[0] == 2
    assert "was trained on other weights" in capsys.readouterr().err


def _ndcg(report: dict[str, Any], key: str) -> float:
    value: float = report["sets"][0]["metrics"]["nDCG@10"][key]
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "listwise"],
        ["--loss", "hybrid", "--listwise_weight", "0.5"],
        ["--loss", "distill"],
        ["--loss", "distill", "--distill_loss", "margin_mse"],
        ["--use_rslora", "true"],
        ["--use_dora", "true"],
        [CHECKPOINTING, "true", "--gradient_accumulation_steps", "2"],
        ["--use_peft", "false", "--learning_rate", "1e-4"],
        ["--dtype", "bfloat16"],
        ["--load_in_4bit", "true"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_train_with_other_settings(
    train: Callable[..., tuple[int, Path]], flags: list[str]
) -> None:
    status, output = train(*flags)
    assert status == 0
    assert (output / "report.html").is_file()
    # Small steps would round away in half precision, whatever the base is in.
    weights = load_file(next(output.glob("*model.safetensors")))
    assert {str(tensor.dtype) for tensor in weights.values()} == {"float32"}


@pytest.mark.slow
def test_train_on_a_sequence_classification_base(train: Callable[..., tuple[int, Path]]) -> None:
    status, output = train(architecture="ForSequenceClassification")
    assert status == 0
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"


def test_adapter_is_refused_under_another_template(
    train: Callable[..., tuple[int, Path]], checkpoint: Callable[..., Path]
) -> None:
    _, output = train()
    with pytest.raises(ModelLoadError, match="trained with template"):
        _ = Reranker(str(checkpoint()), adapter=str(output), template="published-eval").loaded


def test_dry_run_checks_everything_and_writes_nothing(
    train: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = train("--dry_run")
    out = capsys.readouterr().out
    assert status == 0
    assert not output.exists()
    for shown in ("Trained parameters", "First prompt", "<|im_start|>system", "Find shouting",
                  "Optimizer steps: 4", "p(yes) + p(no)", "Dry run"):  # fmt: skip
        assert shown in out


def test_faults_of_all_files_are_reported_at_once(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data["train"].write_text('{"query": 5}\n{"query": "q", "positive": ["a"], "negative": []}\n')
    data["dev"].write_text('{"query": "q", "candidates": [{"text": "a"}]}\n')
    status = main(["train", "--model_name_or_path", "nowhere", "--train_file", str(data["train"]),
                   "--eval_file", str(data["dev"])])  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2
    for part in (f"{data['train']}:1:", f"{data['train']}:2:", str(data["dev"])):
        assert part in error


def test_evaluation_queries_in_training_are_refused(
    train: Callable[..., tuple[int, Path]], data: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = data["dev"].read_text().replace("subject 3", " TOPIC  3 ")
    data["dev"].write_text(content)
    assert train()[0] == 2
    error = capsys.readouterr().err
    assert "q3" in error
    assert "--allow_leaks" in error


@pytest.mark.slow  # two runs, half a minute
def test_evaluate_compares_and_reuses_scores(
    train: Callable[..., tuple[int, Path]], data: dict[str, Path],
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, adapter = train()
    command = ["evaluate", "--model", str(checkpoint()), "--adapter", str(adapter), "--eval_file",
               str(data["dev"]), "--output_dir", str(tmp_path / "eval"),
               "--instruction_check"]  # fmt: skip
    assert main(command) == 0
    first = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert set(first["sets"][0]["instruction"]) == {"right", "default"}
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("reused") == 3
    assert json.loads((tmp_path / "eval" / "report.json").read_text()) == first
    assert f"--adapter {adapter}" in first["next_step"]
    os.utime(adapter / "adapter_model.safetensors", (0, 0))  # trained again, for all one knows
    assert main(command) == 0
    assert capsys.readouterr().out.count("reused") == 1, "only those of the base"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is nothing to evaluate on. Pass --eval_file FILE"),
        (["--eval_file", "f", "--first_stage", "bm25"], "--first_stage cannot be used here: cand"),
        (["--benchmark", "MLDR", "--depth", "9"], "--depth cannot be used here: benchmarks are"),
    ],
)
def test_evaluate_refuses_flags_that_would_do_nothing(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["evaluate", "--model", "m", *flags]) == 2
    assert message in capsys.readouterr().err


def parse(*argv: str) -> Any:
    required = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
    return parse_training(training_parser(), [*required, *argv])


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 3e-4\nloss: hybrid\nlora_r: 4\nreport_to: none\neval_file: [a, b]\n"
        "seed:\ninstruction: ['no']\nuse_dora: yes\n"
    )
    ours, base, training = parse("--config", str(file), "--learning_rate", "2e-4")
    assert training.learning_rate == 2e-4
    assert (ours.loss, ours.eval_file, ours.instruction) == ("hybrid", ["a", "b"], ["no"])
    assert (base.peft.r, base.peft.use_dora, base.peft.target_modules) == (4, True, "all-linear")
    assert training.seed == 42
    assert training.metric_for_best_model == "ndcg@10"


def test_states_are_saved_where_they_are_measured() -> None:
    _, _, training = parse("--eval_file", "dev.jsonl", "--eval_steps", "20")
    assert (training.save_steps, training.load_best_model_at_end) == (20, True)
    _, _, training = parse("--save_steps", "7")  # nothing is measured
    assert (training.save_steps, training.load_best_model_at_end) == (7, False)
    assert training.eval_strategy == "no"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate: 1e-4\n", "run.yaml:1: there is no setting 'lerning_rate'. Did you mean"),
        ("seed: 1\nloss: pointwise\nseed: 2\n", "run.yaml:3: 'seed' is set twice"),
        ("loss: pontwise\n", "invalid choice: 'pontwise'"),
        ("max_length: 1.5\n", "invalid int value: '1.5'"),
        ("learning_rate: fast\n", "invalid float value"),
        ("lora_r: {a: 1}\n", "run.yaml:1: 'lora_r' must be one value or a list"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "is not YAML"),
        (f"seed: 1{'0' * 400}\n", "--seed must be a number that a machine can count with"),
        (f"per_device_train_batch_size: 1{'0' * 400}\n", "--per_device_train_batch_size must be"),
        (f"max_length: 1{'0' * 400}\n", "--max_length must be a number that a machine can count"),
        ("learning_rate: 1e999\n", "--learning_rate must be a number that a machine can count"),
        ("listwise_weight: nan\n", "--listwise_weight must be a number that a machine can count"),
        (f"max_length: 1{'0' * 5000}\n", "invalid int value: '1000"),
        ("? [seed]\n: 1\n", "run.yaml:1: a setting's name must be a word"),
        ("lr_scheduler_type: cosin\n", "cosin"),
        ("use_peft: perhaps\n", "perhaps"),
        ("warmup_ratio: 0.1\n", "there is no setting 'warmup_ratio'. Did you mean 'warmup_"),
        ("evaluation_strategy: steps\n", "Did you mean 'eval"),
    ],
)  # fmt: skip
def test_wrong_settings_of_a_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["train", "--config", str(file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_fil", "x"], "Did you mean 'train_file'"),
        (["--instruction_dropout", "1.5"], "between 0 and 1"),
        (["--num_negatives", "0"], "at least 1"),
        (["--instruction", "a", "b", "c"], "3 values for 1 training files"),
        (["--attn_implementation", "sdpa"], "Leave it out"),
        (["--lora_modules_to_save", "lm_head"], "never trained"),
        (["--lora_target_modules", "q_proj", "lm_head"], "reaches 'lm_head'"),
        (["--lora_target_modules", "k_proj", "embed_tokens"], "only the decoder's layers"),
        (["--lora_target_modules", "c_attn"], "do not fit the base"),
    ],
)
def test_wrong_flags_are_refused(
    train: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str],
    flags: Sequence[str], message: str,
) -> None:  # fmt: skip
    assert train(*flags)[0] == 2
    assert message in capsys.readouterr().err


def test_help_shows_what_matters_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main(["train", flag])
        shown[flag] = capsys.readouterr().out
    named = {name for name in SHOWN if f"--{name}" in shown["--help"]}
    assert set(SHOWN) - named <= {"activation_checkpointing"}  # before transformers 5.19
    assert "--adam_beta1" not in shown["--help"]
    assert "--adam_beta1" in shown["--help_all"]


def test_training_imports_neither_trl_nor_datasets_by_itself() -> None:
    # transformers imports datasets where it is installed; without it training must work too.
    code = (
        "import sys\n"
        "for name in ('trl', 'datasets'): sys.modules[name] = None\n"
        "import finetune.train\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_processes_that_cannot_share_a_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from finetune.train import _check_processes

    one: Any = SimpleNamespace(n_gpu=1, fsdp=[])
    _check_processes(one)
    two: Any = SimpleNamespace(n_gpu=2, fsdp=[])
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2"):
        _check_processes(two)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP"):
        _check_processes(one)
