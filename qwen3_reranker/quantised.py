"""Linear layers in 8 bits, which a CPU multiplies faster, and in 4, of which more fit a GPU.

In 8 bits weights are rounded once, with a scale per output; activations as they come, with a scale
per token (vector-wise quantisation, Dettmers et al. 2022, without outliers kept apart). 4 bits are
bitsandbytes' NormalFloat (Dettmers et al. 2023): weights only, and no faster. Only the layers'
matrices: norms, attention and the yes/no row stay what they are. Knows nothing of packs or scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import MissingExtraError

_LARGEST = 127
_TINY = 1e-12
"""Keeps a row of zeros from dividing by zero."""


class Int8Linear(torch.nn.Module):
    """A linear layer whose two factors are rounded to 8 bits; sums are exact, in 32 bits.

    Args:
        linear: Has a `weight` of shape (outputs, inputs) and a `bias` or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: Any) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=_TINY) / _LARGEST  # (outputs,)
        small = (weight / scale[:, None]).round().to(torch.int8)
        # The product is a third faster with the factor that never changes laid out by inputs.
        self.register_buffer("weight", small.t().contiguous())  # (inputs, outputs)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return float32, shape (..., outputs), of float32 inputs of shape (..., inputs)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        # A tenth of the time of `rows.abs().amax()` or of the infinity norm.
        largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True))
        step = largest.clamp_(min=_TINY).div_(_LARGEST)  # (rows, 1)
        small = (rows / step).round_().to(torch.int8)
        product = torch._int_mm(small, self.weight)  # (rows, outputs), int32
        # Converted where it lies: new memory of this size costs as much as the multiplication.
        output = product.view(torch.float32).copy_(product).mul_(step).mul_(self.scale)
        if self.bias is not None:
            output.add_(self.bias)
        return output.view(*inputs.shape[:-1], -1)


def nf4_linear(linear: Any, device: torch.device) -> torch.nn.Module:
    """Return a linear layer on the device, its weights in 4 bits; it computes in its input's dtype.

    Raises:
        MissingExtraError: If bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError.of("dtype 'nf4'", "bitsandbytes", "quantization") from error
    nn: Any = bitsandbytes.nn
    small = nn.Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
    small.weight = nn.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", module=small
    )
    small.bias = linear.bias
    # On a CPU it would repack weights for a kernel that has to be installed by itself.
    small.support_avx512bf16_for_cpu = False
    rounded: torch.nn.Module = small.to(device)
    return rounded


def replace_linears(decoder: Any, make: Callable[[Any], torch.nn.Module]) -> None:
    """Replace the linear layers of every decoder layer, one at a time, in place."""
    for layer in decoder.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, make(child).train(child.training))
