"""Linear layers for one row at a time, which is what a decoded token is: they are bound by reading the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Rows up to which the product with int8 weights is faster than with weights that are widened first (AVX-512).
FEW_ROWS = 4


class RowLinear(nn.Linear):
    """A linear layer that multiplies a single row in bfloat16, on a CPU, by torch's matrix-vector product.

    oneDNN's matrix product, which torch takes otherwise, takes a quarter to a half longer.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() != input.shape[-1] or input.dtype != torch.bfloat16 or input.device.type != "cpu":
            return super().forward(input)
        row = input.reshape(-1)
        out = torch.mv(self.weight, row) if self.bias is None else torch.addmv(self.bias, self.weight, row)
        return out.view(*input.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer in half of bfloat16's bytes: weights are integers from -127 to 127, with a factor for each output.

    Few rows are multiplied with the integers as they are; many with weights widened for it, a tenth more work beside
    such a product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round ``weight`` (out, in) to the nearest step."""
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


def to_rows(model: nn.Module) -> None:
    """Make every linear layer of a model a ``RowLinear`` of the same weights."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear


def to_int8(model: nn.Module) -> None:
    """Replace every linear layer of a model, the last one too. Embeddings, norms and biases stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child.weight, child.bias))


def _has_product(x: Tensor) -> bool:
    # torch's kernel reads rows of the weights in steps of 16, wherever they end.
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0
