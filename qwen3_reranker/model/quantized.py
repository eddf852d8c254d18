"""Linear layers in 8 bits, which a CPU multiplies faster, and in 8 or 4, of which more fit a GPU.

In 8 bits weights are rounded once, with a scale per output; on a CPU activations, too, as they
come, with a scale per token (vector-wise quantisation, Dettmers et al. 2022; its outliers are left
out, because which they are depends on a token's company). 4 bits are bitsandbytes' NormalFloat
(Dettmers et al. 2023): weights only. Weights alone are slower. Only the layers' matrices: norms,
attention and the yes/no row stay what they are. Knows nothing of packs or scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as multiply

from ..errors import MissingExtraError

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
        small, scale = _round_rows(linear.weight)
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


class Int8Weights(torch.nn.Module):
    """A linear layer whose weight alone lies in 8 bits; it computes in its input's dtype.

    Args:
        linear: Has a `weight` of shape (outputs, inputs) and a `bias` or None.
        device: Where the layer goes; the linear layer stays where it is.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: Any, device: torch.device) -> None:
        super().__init__()
        small, scale = _round_rows(linear.weight)
        self.register_buffer("weight", small.to(device))
        self.register_buffer("scale", scale.to(device))
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return shape (..., outputs) of inputs of shape (..., inputs)."""
        # Scaled before the product, which in float16 could overflow without.
        weight = inputs.new_empty(self.weight.shape)
        torch.mul(self.weight, self.scale[:, None], out=weight)
        return multiply(inputs, weight, self.bias)


def _round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8, shape (outputs, inputs), and float32 scales, shape (outputs,)."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=_TINY) / _LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


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


def weights_alone(dtype: str | None, device: torch.device) -> Callable[..., Any] | None:
    """Return what makes a layer of which the weights alone are quantised, if the dtype is one."""
    if dtype == "nf4":
        return nf4_linear
    return Int8Weights if dtype == "int8" and device.type != "cpu" else None


def replace_linears(decoder: Any, make: Callable[[Any], torch.nn.Module]) -> None:
    """Replace the linear layers of every decoder layer, one at a time, in place."""
    for layer in decoder.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, make(child).train(child.training))
