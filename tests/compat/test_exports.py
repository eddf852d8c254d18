"""One fine-tune in all formats, scored by the program that each is for, on the same 50 pairs.

`make compat` installs llama.cpp into an environment of its own and runs this; `-s` shows the
largest differences.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune import export, gguf_export, whole
from finetune.cli import main
from qwen3_reranker import RemoteReranker, Reranker
from tests.real_parts import QWEN3_0_6B, save_random_adapter
from tests.servers import COMPAT_PYTHON, llama_cpp
from tests.texts import ordinary_pairs

PAIRS = ordinary_pairs(50)
TOLERANCE = 1e-4
"""In log-odds, all in float32."""
RANDOM = {**QWEN3_0_6B, "vocab_size": 151936, "num_hidden_layers": 2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not COMPAT_PYTHON.exists(), reason="llama.cpp is not installed: `make compat` does it"
    ),
]


@pytest.fixture(params=["smollm2", "tied", "untied"])
def base(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    """Return a real checkpoint, or random weights of the 0.6B's widths; the 8B's are untied."""
    if request.param == "smollm2":
        folder: Path = request.getfixturevalue("smollm2")
        return folder
    return checkpoint(tied=request.param == "tied", **RANDOM)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_random_adapter(tmp_path / "adapter", base, std=0.01)


def test_formats_score_alike(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for module in (whole, export, gguf_export):  # what each command compares by itself
        monkeypatch.setattr(module, "SAMPLE", [(query, [document]) for query, document in PAIRS])
    is_qwen3 = base.parts[-1].startswith("checkpoint")
    for form in ("merge", "seq-cls", "sentence-transformers", "gguf"):
        command = "merge" if form == "merge" else f"export --format {form}"
        arguments = f"--model {base} --adapter {adapter} --output_dir {tmp_path / form}"
        status = main(shlex.split(f"{command} {arguments}"))
        written = capsys.readouterr()
        if form == "gguf" and not is_qwen3:
            assert status == 2
            assert "llama.cpp reranks with Qwen3 decoders alone" in written.err
            break
        assert status == 0, written.err
        (found,) = re.findall(r"within (\S+) in log-odds", written.out)
        assert float(found) <= TOLERANCE
        with capsys.disabled():
            print(f"\n{form}: {found} in log-odds", end="")
    else:
        with Reranker(str(base), adapter=str(adapter), dtype="float32", device="cpu") as reranker:
            expected = log_odds(reranker.score_pairs(PAIRS))
        assert expected.std() > 0.1
        with (
            llama_cpp(tmp_path / "gguf" / gguf_export.FILE) as url,
            RemoteReranker(url, timeout_s=None) as reranker,  # a document takes it seconds
        ):
            difference = np.abs(log_odds(reranker.score_pairs(PAIRS)) - expected).max()
        with capsys.disabled():
            print(f"\nllama.cpp: {difference:.1g} in log-odds")
        assert difference <= TOLERANCE


def log_odds(scores: Sequence[float]) -> NDArray[np.float64]:
    probabilities = np.array(scores)
    found: NDArray[np.float64] = np.log(probabilities / (1 - probabilities))
    return found
