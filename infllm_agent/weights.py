"""Weights in eight bits: half of what a decoded token has to read of a bfloat16 model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Rows up to which the product with int8 weights is faster than with weights that are widened first (AVX-512).
FEW_ROWS = 4


class Int8Linear(nn.Module):
    """A linear layer whose weights are integers from -127 to 127, with one factor for each output.

    Few rows are multiplied with the integers as they are; many with weights widened for it, a tenth more work beside
    such a product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rounds ``weight`` (out, in) to the nearest step."""
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=1).clamp_min(1e-20) / 127
        steps = (weight.detach().float() / scale.unsqueeze(1)).round_().to(torch.int8)
        self.weight = nn.Parameter(steps, requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW_ROWS and _has_product(x):
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
            return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)
        return linear(x, self.weight.to(x.dtype) * self.scale.unsqueeze(1), self.bias)


def to_int8(model: nn.Module) -> None:
    """Replace every linear layer of a model, the last one too. Embeddings, norms and biases stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child.weight, child.bias))


def _has_product(x: Tensor) -> bool:
    # torch's kernel reads rows of the weights in steps of 16, wherever they end.
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0
