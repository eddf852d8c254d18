"""Linear layers whose weights lie as oneDNN multiplies them.

torch hands float32 products to MKL, which not every CPU runs at its best, and lays a bfloat16
weight out anew at every call. oneDNN does neither with a weight packed beforehand, by operations
that torch's own compiler emits, but that are private: so every layer is compared with what it
replaces. For inference on a CPU. Knows nothing of packs or scores.
"""

from __future__ import annotations

from typing import Any

import torch

ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the dtypes that are packed, the largest difference allowed, in shares of the largest output.

Rounding in another order stays below.
"""


class PrepackedLinear(torch.nn.Module):
    """A linear layer with its weight in oneDNN's own layout.

    Args:
        linear: On a CPU, in a dtype of `ERRORS`.

    Raises:
        AttributeError, RuntimeError: If this torch has no such operations, or not on this CPU.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        # A plain attribute: it has no storage, so that nothing done to parameters works on it.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return shape (..., outputs) of inputs of shape (..., inputs)."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.weight, self.bias, "none", [], ""
        )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Linear:
        """Return a plain linear layer, which can be cast."""
        weight = self.weight.to_dense()
        outputs, inputs = weight.shape
        copied = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        copied.weight = torch.nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            copied.bias = torch.nn.Parameter(self.bias.clone(), requires_grad=False)
        return copied


@torch.inference_mode()
def prepacked(linear: torch.nn.Linear) -> torch.nn.Module:
    """Return the layer with its weight packed, or as it is where that changes what it computes."""
    packed = PrepackedLinear(linear)
    rows = linear.weight[:8]  # inputs at hand: as wide as any, and random states stay untouched
    expected = linear(rows)
    error = (packed(rows) - expected).abs().max() / expected.abs().max()
    return packed if error <= ERRORS[linear.weight.dtype] else linear  # NaN keeps the layer
