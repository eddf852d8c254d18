"""Round the adapter of two runs to bfloat16 and make it that of the embedded model.

    python recipes/embedded/ship.py first-adapter embedded-adapter

Run from the root of a clone. What is evaluated afterwards is what is shipped:
`python -m benchmarks.embedded DATA_FOLDER`.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwen3_reranker.checkpoint.embedded import ADAPTER

first, second = map(Path, sys.argv[1:])
weights = load_file(second / "adapter_model.safetensors")
ADAPTER.mkdir(exist_ok=True)
save_file(
    {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()},
    ADAPTER / "adapter_model.safetensors",
    metadata={"format": "pt"},
)
for name in ("adapter_config.json", "qwen3_reranker.json"):
    shutil.copy(second / name, ADAPTER / name)
for run in (first, second):  # their settings, data hashes and learning curves
    shutil.copy(run / "run.json", ADAPTER / f"{'first' if run is first else 'second'}.json")
print(f"{(ADAPTER / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB in {ADAPTER}")
