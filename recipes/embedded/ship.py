"""Round a run's adapter to bfloat16 and make it that of the embedded model.

    python recipes/embedded/ship.py embedded-adapter

Run from the root of a clone. What is evaluated afterwards is what is shipped:
`python -m benchmarks.embedded DATA_FOLDER`.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwen3_reranker.embedded import ADAPTER

run = Path(sys.argv[1])
weights = load_file(run / "adapter_model.safetensors")
ADAPTER.mkdir(exist_ok=True)
save_file(
    {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()},
    ADAPTER / "adapter_model.safetensors",
    metadata={"format": "pt"},
)
for name in ("adapter_config.json", "qwen3_reranker.json", "run.json"):
    shutil.copy(run / name, ADAPTER / name)
print(f"{(ADAPTER / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB in {ADAPTER}")
